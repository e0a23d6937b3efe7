"""Clip lists and folders: what is read and refused, windows, and what is held out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.video import VideoInfo, write_video
from wanmoe.train.data.clip_list import clips_from_folder, read_clip_list, write_clip_list
from wanmoe.train.data.clips import Box, Clip, Polygon, Tip, instrument_names, windows
from wanmoe.train.data.splits import assign_splits

INFO = VideoInfo(fps=30.0, frames=77, height=48, width=64)
GOOD = {"video_path": "a.mp4", "caption": "Scissors cut."}


def write_list(folder: Path, *lines: str) -> Path:
    path = folder / "clips.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def clip(name: str, label: str, **more: object) -> Clip:
    made = Clip(Path(f"{name}.mp4"), label, name, name, f"list:{name}", instruments=((label, 1.0),))
    return replace(made, **more)  # type: ignore[arg-type]


def test_all_fields_are_read(tmp_path: Path) -> None:
    row = {
        **GOOD,
        "id": "clip 1",
        "instruments": ["Scissors", {"name": "Other", "weight": 3}],
        "instrument_label": 2,
        "source": "cholec02",
        "split": "val",
        "start_frame": 5,
        "num_frames": 40,
        "tips": [[5, 1.5, 2]],
        "boxes": [[5, 0, 0, 4, 4]],
        "masks": "m/a.png",
        "caption_zh": "剪刀剪切。",
        "licence": "unknown keys are left alone",
    }
    (got,) = read_clip_list(write_list(tmp_path, json.dumps(row)))
    assert got.video_path == tmp_path / "a.mp4" and got.masks == tmp_path / "m/a.png"
    assert got.instruments == (("Scissors", 0.25), ("Other", 0.75)) and got.instrument_label == 2
    assert (got.id, got.source, got.split, got.start_frame, got.num_frames) == (
        "clip 1",
        "cholec02",
        "val",
        5,
        40,
    )
    assert (
        got.masks_from == 5 and got.tips == (Tip(5, 1.5, 2.0),) and got.boxes == (Box(5, 0.0, 0.0, 4.0, 4.0),)
    )
    assert got.origin.endswith("clips.jsonl:1") and got.caption_zh == "剪刀剪切。"


def test_what_is_written_reads_back_as_the_same_clips(tmp_path: Path) -> None:
    row = {
        **GOOD,
        "instruments": [],
        "tools": ["scissors"],
        "frames": 81,
        "fps": 16,
        "start_frame": 7,
        "num_frames": 126,
        "tips": [{"frame": 8, "x": 1, "y": 2.5, "instrument": "hook", "track": "1", "kind": "interpolated"}],
        "boxes": [[9, 1, 2, 3, 4]],
        "polygons": [{"frame": 7, "points": [[0, 0], [4, 0], [0, 4.5]], "instrument": "hook", "track": "g"}],
        "masks": "m/a.png",
        "phase": "dissection",
        "triplets": ["hook,dissect,gallbladder"],
        "licence": "CC BY-NC-SA 4.0",
    }
    (clip,) = read_clip_list(write_list(tmp_path, json.dumps(row)))
    assert clip.polygons == (Polygon(7, ((0, 0), (4, 0), (0, 4.5)), "hook", "g"),)
    assert clip.tips == (Tip(8, 1, 2.5, "hook", "1", "interpolated"),) and clip.tools == "scissors"
    (tmp_path / "sub").mkdir()
    written = tmp_path / "sub" / "clips.jsonl"
    write_clip_list(written, [clip])
    (again,) = read_clip_list(written)
    assert again.video_path.resolve() == clip.video_path.resolve()
    paths = {"video_path": clip.video_path, "masks": clip.masks, "origin": clip.origin}
    assert replace(again, **paths) == clip


def test_little_is_needed_and_the_seconds_marker_is_accepted(tmp_path: Path) -> None:
    first, second = read_clip_list(
        write_list(tmp_path, json.dumps(GOOD) + " [3s]", "", json.dumps({**GOOD, "video_path": "b/c.mp4"}))
    )
    assert first.caption == "Scissors cut." and first.instruments is None and first.split is None
    assert (second.source, second.id, second.origin[-2:]) == ("b/c", "c", ":3")


def test_tools_in_brackets_become_evidence_and_leave_the_caption(tmp_path: Path) -> None:
    row = {**GOOD, "caption": "Fat is moved [Tools in: scissors, hook] to the left."}
    (got,) = read_clip_list(write_list(tmp_path, json.dumps(row)))
    assert got.caption == "Fat is moved to the left." and got.tools == "scissors, hook"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"video_path": "a.mp4", "caption": "x"', "not a JSON object"),
        ('["a.mp4"]', "expected a JSON object, got list"),
        ('{"caption": "x"}', "the key 'video_path' is missing"),
        ('{"video_path": "a.mp4"}', "the key 'caption' is missing"),
        (json.dumps({**GOOD, "caption": "  "}), "'caption' must be a text"),
        (json.dumps({**GOOD, "split": "test"}), '"split" is "train" or "val", got \'test\''),
        (json.dumps({**GOOD, "num_frames": 0}), "'num_frames' must be a whole number of 1 or more"),
        (json.dumps({**GOOD, "start_frame": True}), "'start_frame' must be a whole number"),
        (json.dumps({**GOOD, "tips": [[1, 2]]}), "'tips' is a list of rows of 3 numbers"),
        (json.dumps({**GOOD, "tips": [[1.5, 2, 3]]}), "'tips' is a list of rows of 3 numbers"),
        (json.dumps({**GOOD, "boxes": [{"frame": 1, "kind": "guess"}]}), "'boxes' is a list of rows of 5"),
        (json.dumps({**GOOD, "polygons": [{"frame": 1, "points": [[1, 2]]}]}), "with 3 points or more"),
        (json.dumps({**GOOD, "fps": 0}), "'fps' must be a positive number"),
        (json.dumps({**GOOD, "tools": "hook"}), "'tools' must be a list of texts"),
        (json.dumps({**GOOD, "instruments": [{"weight": 1}]}), '"instruments" is a list'),
        (json.dumps({**GOOD, "instruments": [{"name": "a", "weight": -1}]}), "positive weights"),
    ],
)
def test_a_broken_line_is_named_with_its_cause(tmp_path: Path, line: str, cause: str) -> None:
    with pytest.raises(WanmoeError) as caught:
        read_clip_list(write_list(tmp_path, json.dumps(GOOD), line))
    text = str(caught.value)
    assert "clips.jsonl:2: " in text and cause in text and "\n" not in text


def test_a_list_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(WanmoeError, match="holds no clips"):
        read_clip_list(write_list(tmp_path, "", "  "))
    with pytest.raises(WanmoeError, match="cannot be read"):
        read_clip_list(tmp_path / "none.jsonl")
    (tmp_path / "clips.jsonl").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(WanmoeError, match="UTF-8"):
        read_clip_list(tmp_path / "clips.jsonl")


def test_a_folder_is_labelled_by_its_file_names(tmp_path: Path) -> None:
    names = ("scissors_003.mp4", "scissors (2).MP4", "hook-1.mkv", "milk.mov", "walk/0001.mp4", ".hidden.mp4")
    (tmp_path / "walk").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "milk.txt").write_text("A hand signs milk.\nDuration: 2s\n", encoding="utf-8")
    got = {clip.id: clip for clip in clips_from_folder(tmp_path)}
    assert {name: clip.instruments for name, clip in got.items()} == {
        "scissors_003": (("scissors", 1.0),),
        "scissors (2)": (("scissors", 1.0),),
        "hook-1": (("hook", 1.0),),
        "milk": (("milk", 1.0),),
        "0001": (("walk", 1.0),),
    }
    assert got["milk"].caption == "A hand signs milk." and got["hook-1"].caption == "hook"
    assert instrument_names(got.values()) == ["hook", "milk", "scissors", "walk"]


def test_a_folder_uses_its_list_and_an_empty_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WanmoeError, match="no video in it"):
        clips_from_folder(tmp_path)
    with pytest.raises(WanmoeError, match="no such folder"):
        clips_from_folder(tmp_path / "none")
    (tmp_path / "b.mp4").write_bytes(b"x")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(WanmoeError, match=r"b\.txt: the caption file is empty"):
        clips_from_folder(tmp_path)
    write_list(tmp_path, json.dumps(GOOD))
    assert [clip.id for clip in clips_from_folder(tmp_path)] == ["a"]


def test_windows_lie_inside_the_clip() -> None:
    own = clip("v", "a", start_frame=10, num_frames=40)
    cut = windows(own, INFO, frames=9)
    assert [window.indices for window in cut] == [tuple(range(s, s + 9)) for s in (10, 19, 28, 37)]
    assert [window.number for window in cut] == [0, 1, 2, 3]
    slow = windows(own, INFO, frames=9, fps=15)
    assert [window.indices for window in slow] == [tuple(range(s, s + 18, 2)) for s in (10, 28)]
    dense = windows(own, INFO, frames=9, fps=16, stride=3)
    assert all(window.indices[-1] < 50 for window in dense) and len(dense) == 5
    assert windows(own, INFO, frames=41) == []
    assert len(windows(clip("v", "a"), INFO, frames=77)) == 1
    assert windows(clip("v", "a", start_frame=200), INFO, frames=1) == []
    with pytest.raises(WanmoeError, match="4 n \\+ 1"):
        windows(own, INFO, frames=16)
    with pytest.raises(WanmoeError, match="must be positive"):
        windows(own, INFO, frames=9, stride=0)


def split(clips: list[Clip], **more: object) -> tuple[list[Clip], list[str]]:
    labels = [[name for name, _ in clip.instruments or ()] for clip in clips]
    infos = {clip.video_path: INFO for clip in clips}
    options = {"val_fraction": 0.25, "frames": 17, "fps": None, "seed": 0, **more}
    return assign_splits(clips, labels, infos, **options)  # type: ignore[arg-type]


def test_whole_videos_are_held_out_where_there_are_several() -> None:
    clips = [clip(f"{label}{n}", label) for label in ("a", "b") for n in range(8)]
    done, notes = split(clips)
    assert len(done) == 16 and notes == []
    for label in ("a", "b"):
        held = [own for own in done if own.split == "val" and own.caption == label]
        assert len(held) == 2
    assert split(clips)[0] == done != split(clips, seed=1)[0]


def test_clips_of_one_source_stay_together_and_every_label_keeps_training() -> None:
    clips = [clip(f"{source}{label}", label, source=source) for source in "xyz" for label in ("a", "b")]
    clips.append(clip("w", "b", source="w"))
    done, _ = split(clips, val_fraction=0.3)
    sides = {own.source: own.split for own in done}
    assert all(own.split == sides[own.source] for own in done)
    for label in ("a", "b"):
        assert {own.split for own in done if own.caption == label} == {"train", "val"}


def test_a_single_video_is_cut_in_time_and_said_so() -> None:
    done, notes = split([clip("only", "a")])
    head, tail = done
    assert (head.split, tail.split) == ("train", "val") and head.id != tail.id
    assert head.start_frame + (head.num_frames or 0) == tail.start_frame
    assert tail.start_frame + (tail.num_frames or 0) == INFO.frames
    for part in done:
        assert windows(part, INFO, frames=17)
    assert notes == ["held-out moments, not held-out videos, for 1 labels: a"]
    short, notes = split([clip("only", "a")], frames=65)
    assert [own.split for own in short] == ["train"] and "nothing is held out for 1 labels" in notes[0]


def test_a_given_split_is_kept() -> None:
    clips = [clip("a0", "a", split="val"), clip("a1", "a"), clip("a2", "a")]
    assert [own.split for own in split(clips)[0]] == ["val", "train", "train"]
    assert [own.split for own in split(clips[1:], val_fraction=0.0)[0]] == ["train", "train"]
    with pytest.raises(WanmoeError, match="val_fraction"):
        split(clips, val_fraction=1.0)


def test_the_real_gestures(data_dir: Path) -> None:
    clips = clips_from_folder(data_dir / "gestures")
    assert len(clips) == 12 and instrument_names(clips)[:3] == ["again", "bird", "book"]


def test_names_are_taken_relative_to_the_list(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_video(tmp_path / "sub" / "a.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    (own,) = read_clip_list(write_list(tmp_path / "sub", json.dumps(GOOD)))
    assert own.video_path.is_file()
