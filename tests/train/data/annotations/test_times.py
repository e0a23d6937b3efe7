"""Text files of actions and times: each form comes back as it was written, each fault names its line."""

import logging
import random
import time
from pathlib import Path

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data.annotations.times import read_times
from wanmoe.train.data.segment import Segment


def written(folder: Path, text: str, name: str = "cholec02.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def spans(segments: list[Segment]) -> list[tuple[str, float, float]]:
    return [(segment.caption, segment.start, segment.end) for segment in segments]


def read(folder: Path, text: str, times: str = "auto") -> list[tuple[str, float, float]]:
    return spans(read_times(written(folder, text), times))


def test_pairs_ranges_and_single_times_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "电凝钩A切割胆囊三角 1'54 5'32\n"
        "抓钳固定胆囊 0'05 - 0'09 1'00 - 1'10\n"
        "\n"
        "grasper 2 retracts 2'00 2'04 3'00 3'04.5\r\n"
        "钛夹钳夹闭胆囊管 12'34\n",
        "cholec02_labels.txt",
    )
    got = read_times(path)
    assert spans(got) == [
        ("电凝钩A切割胆囊三角", 114, 332),
        ("抓钳固定胆囊", 5, 9),
        ("抓钳固定胆囊", 60, 70),
        ("grasper 2 retracts", 120, 124),
        ("grasper 2 retracts", 180, 184.5),
        ("钛夹钳夹闭胆囊管", 754, 756),
    ]
    assert {segment.video for segment in got} == {"cholec02"}
    assert got[0].origin == f"{path}:1" and got[-1].origin == f"{path}:5"
    assert got[0].instruments is None and got[0].tools == ()


@pytest.mark.parametrize(
    "line",
    [
        "剪刀剪断 1’54 5’32",
        "剪刀剪断 1′54″ 5′32″",
        "剪刀剪断 1：54－5：32",
        "剪刀剪断：1:54~5:32",
        "剪刀剪断1分54秒至5分32秒",
        "剪刀剪断 0:01:54 - 0:05:32",
        "剪刀剪断，1'54\" — 5'32\"",
        "剪刀剪断 1'54，5'32",
        "剪刀剪断\t1'54-5'32",
        "剪刀剪断 114s - 332s",
        "state 剪刀剪断 1'54 5'32",
        "Reason 剪刀剪断 1'54 5'32",
        "constant  剪刀剪断 1'54 5'32",
    ],
)
def test_every_way_of_writing_a_range_means_the_same(tmp_path: Path, line: str) -> None:
    assert read(tmp_path, line) == [("剪刀剪断", 114, 332)]


def test_hours_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, "冲洗 1:02:03 - 1:02:13") == [("冲洗", 3723, 3733)]


def test_what_is_said_in_brackets_stays_in_the_caption(tmp_path: Path) -> None:
    ((caption, _, _),) = read(tmp_path, "切割 [Tools in: 电凝钩, 抓钳] 1'54 5'32")
    assert caption == "切割 [Tools in: 电凝钩, 抓钳]"


@pytest.mark.parametrize("indent", ["    ", "\t", " "])
def test_a_parent_with_indented_parts_is_skipped_and_its_parts_are_read(tmp_path: Path, indent: str) -> None:
    text = (
        "解剖胆囊三角 0'10 9'00\n"
        f"{indent}分离浆膜 0'10 4'00\n"
        f"{indent}{indent}电凝钩切割 0'20 0'30\n"
        f"{indent}显露胆囊管 4'00 9'00\n"
        "夹闭\n"
        f"{indent}钛夹钳夹闭 10'00 10'05\n"
        "冲洗 11'00 11'09"
    )
    assert [caption for caption, _, _ in read(tmp_path, text)] == [
        "电凝钩切割",
        "显露胆囊管",
        "钛夹钳夹闭",
        "冲洗",
    ]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            "grasp\t0.32-0.34\t1.05-1.12\n",
            1,
            "0.32 may be decimal minutes (19.2 s), minutes.seconds (32 s) or",
        ),
        ("cut 10-11\ngrasp 12.5-18.0\n", 2, "(750 s), minutes.seconds (770 s) or seconds (12.5 s)"),
        ("cut 1'02 1'05\ngrasp 3s 4s\nhold 2.0\n", 3, "2.0 may be"),
    ],
)
def test_numbers_with_a_point_that_may_mean_several_things_are_never_guessed(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(WanmoeError) as caught:
        read_times(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and said in str(caught.value)
    assert str(caught.value).endswith("say which with --times decimal, mm.ss or seconds")


@pytest.mark.parametrize("odd", ["0.60", "0.75", "0.325"])
def test_a_fraction_that_cannot_be_seconds_makes_the_whole_file_decimal(
    tmp_path: Path, odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        got = read(tmp_path, f"grasp\t0.25-0.50\ncut\t0.30-{odd}\n")
    assert got == [("grasp", 15, 30), ("cut", 18, 60 * float(odd))]
    assert len(caplog.records) == 1 and odd in caplog.text and "--times seconds" in caplog.text


def test_what_a_point_means_can_be_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "grasp\t1.30-2.50"
    assert read(tmp_path, text, "decimal") == [("grasp", 78, 150)]
    assert read(tmp_path, text, "mm.ss") == [("grasp", 90, 170)]
    assert read(tmp_path, text, "seconds") == [("grasp", 1.3, 2.5)]
    assert not caplog.records
    # Marks of a clock and an s say what they are, whatever is said of the numbers.
    assert read(tmp_path, "a 1'30 2'00\nb 2.5s 4s", "decimal") == [("a", 90, 120), ("b", 2.5, 4)]


@pytest.mark.parametrize("text", ["grasp 114 332", "grasp\t114-332", "grasp\t114\t332", "grasp: 114 - 332"])
def test_numbers_without_a_point_are_seconds(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == [("grasp", 114, 332)]


def test_the_text_beside_a_clip_is_read(tmp_path: Path) -> None:
    (tmp_path / "cholec14" / "texts").mkdir(parents=True)
    text = "抓钳A固定胆囊。\nDuration: 98.0s\nTime range: 114s - 212s\n"
    (got,) = read_times(written(tmp_path / "cholec14" / "texts", text, "clip_0046.txt"))
    assert (got.video, got.caption, got.start, got.end) == ("cholec14", "抓钳A固定胆囊。", 114, 212)
    (got,) = read_times(written(tmp_path, text, "cholec02_0046_part1.txt"))
    assert got.video == "cholec02" and got.origin.endswith("cholec02_0046_part1.txt:3")


WRITERS = {
    "clock": lambda start, end: f"{start // 60}'{start % 60:02d} {end // 60}'{end % 60:02d}",
    "dash": lambda start, end: f"{start // 60}'{start % 60:02d} - {end // 60}'{end % 60:02d}",
    "mm.ss": lambda start, end: f"{start // 60}.{start % 60:02d}-{end // 60}.{end % 60:02d}",
    "decimal": lambda start, end: f"{start / 60:.5f}-{end / 60:.5f}",
    "seconds": lambda start, end: f"{start} - {end}",
    "suffix": lambda start, end: f"{start}s-{end}s",
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_comes_back(tmp_path: Path, form: str, seed: int) -> None:
    draw = random.Random(seed)
    lines, wanted = [], []
    for index in range(draw.randint(1, 30)):
        action = (
            draw.choice(("抓钳固定", "hook dissects", "clip 2 applied", "吸引A", "to the liver"))
            + f" x{index}"
        )
        ranges = [
            (start, start + draw.randint(1, 300)) for start in draw.sample(range(5000), draw.randint(1, 4))
        ]
        tab = form in ("mm.ss", "decimal")
        joint = "\t" if tab else "  "
        lines.append(action + joint + joint.join(WRITERS[form](*one) for one in ranges))
        wanted += [(action, *one) for one in ranges]
    got = read(tmp_path, "\n".join(lines), form if tab else "auto")
    assert [caption for caption, _, _ in got] == [caption for caption, _, _ in wanted]
    for (_, *span), (_, *truth) in zip(got, wanted, strict=True):
        assert span == pytest.approx(truth, abs=0.002)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("grasp 1'54 5'32\nno times here\n", 2, "expected \"action 1'54 5'32\""),
        ("grasp 1'54 5'32 6'00", 1, "each start needs its end"),
        ("grasp 1'54 1'32", 1, "comes before"),
        ("grasp 1'75 2'32", 1, "60 or more seconds"),
        ("grasp 1:75:10 2:32:10", 1, "60 or more seconds"),
        ("1'54 5'32", 1, "no action"),
        ("grasp\t0.32-0.34\tlater", 1, "no list of times"),
        ("\n\ncaption\nTime range: soon\n", 4, "114s - 212s"),
        ("x" * 3000, 1, "3000 characters"),
    ],
)
def test_a_fault_names_file_line_value_and_form(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(WanmoeError, match=said) as caught:
        read_times(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "times", "said"),
    [
        ("", "auto", "empty"),
        ("a caption alone\nDuration: 98.0s\n", "auto", "Time range"),
        ("grasp\t0.32-0.75", "mm.ss", "not minutes.seconds"),
        ("grasp\t0.32-0.75", "hours", "auto, decimal, mm.ss, seconds"),
    ],
)
def test_other_faults_are_named_too(tmp_path: Path, text: str, times: str, said: str) -> None:
    with pytest.raises(WanmoeError, match=said):
        read_times(written(tmp_path, text), times)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("抓钳固定 1'54 5'32".encode("gbk"))
    with pytest.raises(WanmoeError, match="save it as UTF-8"):
        read_times(path)


@pytest.mark.parametrize("unit", ["1'2 ", "1 ", "1-", "1 - ", "1s,", "1:", "至"])
def test_a_hostile_line_takes_no_long_time(tmp_path: Path, unit: str) -> None:
    line = (unit * 2000)[:1990]
    start = time.process_time()
    for text in (f"a {line}x", f"a\t{line}x", f"{line}\tx"):
        with pytest.raises(WanmoeError):
            read_times(written(tmp_path, text))
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("hook 0'01 5", "before '5' looks like a time of another spelling"),
        ("hook 0,5 4,5", "'0,5' has a comma between digits"),
        ("hook 114,332", "'114,332' has a comma between digits"),
    ],
)
def test_what_may_be_a_time_never_becomes_a_word(tmp_path: Path, line: str, cause: str) -> None:
    (tmp_path / "v.txt").write_text(f"cut 0'00 0'04\n{line}\n", encoding="utf-8")
    with pytest.raises(WanmoeError) as caught:
        read_times(tmp_path / "v.txt")
    assert "v.txt:2: " in str(caught.value) and cause in str(caught.value)


def test_commas_between_clock_times_are_fine(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("cut 0'00 0'04,0'05 0'08\n", encoding="utf-8")
    assert [(one.start, one.end) for one in read_times(tmp_path / "v.txt")] == [(0, 4), (5, 8)]
