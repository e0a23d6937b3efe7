"""`wanmoe clips` as a user meets it: what it reads, writes and says, and one line for what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer
from typer.testing import CliRunner, Result

from wanmoe.launch.clips import clips
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.video import read_video, write_video
from wanmoe.train.data.annotations import formats
from wanmoe.train.data.annotations.formats import detect
from wanmoe.train.data.clip_list import read_clip_list

LINES = "抓钳A牵拉 [Tools in: grasper] 0:01 0:04\nhook dissects 0:04-0:07\nCVS 0:02 0:05\n"


@pytest.fixture(scope="module")
def footage(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    write_video(
        folder / "video07.mp4", read_video(data_dir / "surgical" / "endo.mp4", size=(90, 160)), fps=25
    )
    return folder


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "VID07.txt").write_text(LINES, encoding="utf-8")
    return tmp_path / "labels"


def run(*words: Any) -> Result:
    """The command; what it raises for the user is raised here."""
    app = typer.Typer()
    app.command()(clips)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, WanmoeError):
        raise result.exception
    return result


def test_annotations_become_windows_and_the_report_says_all(footage: Path, labels: Path) -> None:
    out = labels.parent / "clips.jsonl"
    result = run(labels, "--videos", footage, "--out", out, "--frames", 33, "--val-fraction", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {out}\n"
    said = [line for line in result.stderr.splitlines() if line and "look:" not in line]
    assert said == [
        "kept 2 windows of 3 segments from 1 video",
        f"dropped 1: the caption says 'cvs' (first: {labels / 'VID07.txt'}:3)",
        "train: Hook/Electrocautery 1, Other 1",
    ]
    first, second = read_clip_list(out)
    assert (first.caption, first.tools, first.source) == ("抓钳牵拉", "grasper", "cholec07")
    assert (first.start_frame, first.num_frames, first.frames, first.fps) == (25, 51, 33, 16.0)
    assert first.video_path.resolve() == (footage / "video07.mp4").resolve()
    assert (second.caption, second.start_frame, second.split) == ("hook dissects", 100, "train")


def test_the_same_command_writes_the_same_bytes(footage: Path, labels: Path) -> None:
    written = []
    for name in ("a.jsonl", "b.jsonl"):
        run(labels, "--videos", footage, "--out", labels.parent / name, "--frames", 33, "--frames", 17)
        written.append((labels.parent / name).read_bytes())
    assert written[0] == written[1] and written[0]


def test_videos_are_looked_for_where_the_annotations_lie(footage: Path, tmp_path: Path) -> None:
    (tmp_path / "video07.mp4").symlink_to(footage / "video07.mp4")
    (tmp_path / "notes.txt").write_text("hook dissects 0:01 0:04\n")
    out = tmp_path / "clips.jsonl"
    run(tmp_path / "notes.txt", "--video", "video07", "--out", out, "--frames", 33, "--licence", "CC BY")
    assert [clip.licence for clip in read_clip_list(out)] == ["CC BY"]


def test_a_folder_of_videos_is_a_clip_each_and_a_list_is_cut_again(data_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "signs.toml"
    names = ["book", "help", "milk"]
    (tmp_path / "signs").mkdir()
    for name in names:
        (tmp_path / "signs" / f"{name}.mkv").symlink_to(data_dir / "gestures" / f"{name}.mkv")
    config.write_text(tomli_w.dumps({"adapter": {"experts": [{"name": name} for name in names]}}))
    options = ("--seconds", 1, 20, "--frames", 33, "--frames", 17, "--experts", config)
    run(tmp_path / "signs", "--out", tmp_path / "a.jsonl", *options)
    first = read_clip_list(tmp_path / "a.jsonl")
    assert {clip.source for clip in first} == set(names) and {clip.frames for clip in first} == {33, 17}
    run(tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl", *options)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_several_sources_are_cut_together(footage: Path, labels: Path) -> None:
    one, two = labels.parent / "one.jsonl", labels.parent / "two.jsonl"
    run(labels, "--videos", footage, "--out", one, "--frames", 33, "--val-fraction", 0)
    result = run(one, labels, "--videos", footage, "--out", two, "--frames", 33, "--val-fraction", 0)
    assert "dropped 2: the same frames of a video twice" in result.stderr
    assert one.read_bytes() == two.read_bytes()


def test_times_that_may_mean_several_things_are_asked_for_and_said(footage: Path, tmp_path: Path) -> None:
    (tmp_path / "video07.txt").write_text("hook dissects\t0.03-0.06\n")
    words = (tmp_path / "video07.txt", "--videos", footage, "--out", tmp_path / "clips.jsonl", "--frames", 17)
    with pytest.raises(
        WanmoeError, match=r"video07.txt:1: the time 0.03 may be .* --times decimal, mm.ss or"
    ):
        run(*words)
    for times, start in (("decimal", 45), ("mm.ss", 75)):
        run(*words, "--times", times, "--seconds", 1, 20, "--val-fraction", 0)
        assert read_clip_list(tmp_path / "clips.jsonl")[0].start_frame == start


def test_runs_of_labelled_frames_are_cut_to_the_longest_of_seconds(footage: Path, tmp_path: Path) -> None:
    rows = "".join(f"{25 * second}\t1\n" for second in range(10))
    (tmp_path / "video07-tool.txt").write_text(f"Frame\tGrasper\n{rows}")
    out = tmp_path / "clips.jsonl"
    result = run(tmp_path, "--videos", footage, "--out", out, "--frames", 65, "--seconds", 2, 5)
    assert "kept 2 windows of 2 segments" in result.stderr and "longer" not in result.stderr
    assert [clip.start_frame for clip in read_clip_list(out)] == [0, 125]


def test_a_folder_of_annotations_is_looked_at_once_and_read_once(
    footage: Path, labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(formats, "detect", lambda path: looked.append(path) or detect(path))
    run(labels, "--videos", footage, "--out", labels.parent / "clips.jsonl", "--frames", 33)
    assert looked == [labels / "VID07.txt"]


def test_an_existing_file_of_a_source_is_never_replaced(footage: Path, labels: Path) -> None:
    text = labels / "VID07.txt"
    for source, out in ((text, text), (labels, text), (labels / ".." / "labels", text)):
        with pytest.raises(WanmoeError, match="it would replace a file of the source"):
            run(source, "--videos", footage, "--out", out, "--frames", 33)
    assert text.read_text(encoding="utf-8") == LINES
    run(labels, "--videos", footage, "--out", labels / "clips.jsonl", "--frames", 33)
    assert (labels / "clips.jsonl").is_file()


def test_nothing_is_written_where_nothing_is_left(footage: Path, labels: Path) -> None:
    out = labels.parent / "clips.jsonl"
    with pytest.raises(WanmoeError, match="no window is left of 3 segments: 2 x shorter than a window of 81"):
        run(labels, "--videos", footage, "--out", out)
    assert not out.exists()


def test_texts_beside_videos_of_their_name_are_captions_or_times_but_never_guessed(
    footage: Path, tmp_path: Path
) -> None:
    (tmp_path / "video07.mp4").symlink_to(footage / "video07.mp4")
    out = tmp_path / "out.jsonl"
    (tmp_path / "video07.txt").write_text("the hook dissects\n")
    run(tmp_path, "--out", out, "--frames", 33, "--experts", _hook(tmp_path))
    assert {clip.caption for clip in read_clip_list(out)} == {"the hook dissects"}
    out.unlink()
    (tmp_path / "video07.txt").write_text("hook dissects 0:01 0:04\n")
    with pytest.raises(WanmoeError, match="video07.txt: it has the name of a video beside it"):
        run(tmp_path, "--out", out, "--frames", 33)
    run(tmp_path, "--out", out, "--frames", 33, "--format", "times")
    assert [clip.start_frame for clip in read_clip_list(out)] == [25]


def _hook(folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text('adapter.experts = [{name = "video"}]\n')  # the label of video07.mp4
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("labels", "--out", "none/clips.jsonl"), "the folder none does not exist"),
        (("labels", "--out", "labels"), "this is a folder"),
        (("video07.mp4", "--out", "a.jsonl"), "video07.mp4: this is a video"),
        (("none", "--out", "a.jsonl"), "none: no such file or folder"),
        (("none.jsonl", "--out", "a.jsonl"), "none.jsonl: the clip list cannot be read"),
        (("labels", "--out", "a.jsonl"), "there is no video 'VID07' in labels"),
        (("labels", "--out", "a.jsonl", "--frames", 80), "frames is 80"),
        (("labels", "--out", "a.jsonl", "--format", "cvat"), "--format is 'cvat'"),
        (("labels", "--out", "a.jsonl", "--times", "hours"), "--times is 'hours'"),
    ],
)
def test_what_is_wrong_is_one_line(
    labels: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], message: str
) -> None:
    monkeypatch.chdir(labels.parent)
    (labels.parent / "video07.mp4").touch()
    with pytest.raises(WanmoeError, match=message) as error:
        run(*words)
    assert "\n" not in str(error.value)
    assert not Path("a.jsonl").exists()
