"""Segments to clips of one window each: frames, scenes, marks, labels, splits and what is left out."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC, ExpertSet
from wanmoe.moe_lora.video import read_video, video_info, write_video
from wanmoe.train.data.clip_list import read_clip_list, write_clip_list
from wanmoe.train.data.clips import Box, Clip, Polygon, Tip, windows
from wanmoe.train.data.cut import CutReport, cut_segments
from wanmoe.train.data.segment import Moment, Segment

SURGICAL = ExpertSet()


@pytest.fixture(scope="module")
def small(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ten seconds of endo.mp4 at 25 frames a second, small, as video07.mp4."""
    path = tmp_path_factory.mktemp("videos") / "video07.mp4"
    write_video(path, read_video(data_dir / "surgical" / "endo.mp4", size=(90, 160)), fps=25, crf=20)
    return path


def video(path: Path, seconds: float, *, fps: float = 20, seed: int = 0) -> Path:
    """A video whose pictures drift slowly, unlike those of another seed."""
    pictures = np.random.default_rng(seed).integers(40, 220, (1, 3, 5, 6))
    count = round(seconds * fps)
    shift = torch.linspace(0, 8, count).round().int()
    large = torch.nn.functional.interpolate(torch.from_numpy(pictures).float(), size=(48, 64), mode="bicubic")
    large = large.clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0)
    write_video(path, torch.stack([large.roll(int(step), 1) for step in shift]), fps=fps)
    return path


def segment(video: str = "video07", start: float = 0.0, end: float = 10.0, **more: Any) -> Segment:
    caption = more.pop("caption", "hook dissects")
    return Segment(video, start, end, caption, more.pop("origin", "labels.txt:1"), **more)


def cut(segments: list[Any], videos: Any, **options: Any) -> CutReport:
    options = {"experts": SURGICAL, "val_fraction": 0.0, "progress": False, **options}
    return cut_segments(segments, videos, **options)


def spans(report: CutReport) -> list[tuple[int, int, int | None]]:
    return [(clip.start_frame, clip.num_frames or 0, clip.frames) for clip in report.clips]


def test_a_window_takes_the_frames_of_the_source_at_its_rate(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "VID07.mp4").symlink_to(data_dir / "surgical" / "endo.mp4")
    report = cut([segment("cholec07", 1.02, 9.0)], tmp_path, frames=(33, 81))
    info = video_info(tmp_path / "VID07.mp4")
    # 1.02 s is frame 25.5, taken as 26; 81 frames at 16 fps span 126 of 25, the next begins 127 after 26.
    assert spans(report) == [(26, 126, 81), (153, 51, 33)]
    for clip in report.clips:
        (window,) = windows(clip, info, frames=1)
        assert window.indices == tuple(
            clip.start_frame + int(n * 25 / 16 + 0.5) for n in range(clip.frames or 0)
        )
        assert window.indices[-1] == clip.start_frame + (clip.num_frames or 0) - 1
    assert [clip.id for clip in report.clips] == ["cholec07-1040", "cholec07-6120"]
    assert {(clip.source, clip.fps) for clip in report.clips} == {("cholec07", 16.0)}


@pytest.mark.parametrize(("rate", "fps"), [(30000 / 1001, 16.0), (25.0, 24.0), (12.5, 16.0)])
def test_windows_follow_one_another_without_sharing_a_frame(tmp_path: Path, rate: float, fps: float) -> None:
    video(tmp_path / "a.mp4", 6.3, fps=rate)
    report = cut([segment("a", 0.2, 6.2)], tmp_path, frames=(33, 17, 9), fps=fps)
    info = video_info(tmp_path / "a.mp4")
    sizes = [clip.frames or 0 for clip in report.clips]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 33
    indices = [windows(clip, info, frames=1)[0].indices for clip in report.clips]
    assert all(one[-1] < other[0] <= one[-1] + 3 for one, other in pairwise(indices))
    used = 6.0 - sum(size / fps for size in sizes)
    assert used < 9 / fps + 0.2  # no further window of the shortest fits


def test_the_end_is_clipped_and_what_lies_outside_is_dropped(small: Path) -> None:
    known = [
        segment(start=7.0, end=14.0, origin="a:1"),
        segment(start=10.0, end=14.0, origin="a:2"),
        segment(start=11.0, end=14.0, origin="a:3"),
    ]
    report = cut(known, small.parent, frames=(33,))
    assert spans(report) == [(175, 51, 33)]
    assert report.dropped == {"outside the video": 2} and report.examples == {"outside the video": "a:2"}
    assert report.segments == 3 and report.videos == 1


def test_lengths_are_kept_to_the_frame(small: Path) -> None:
    known = [
        segment(start=0.02, end=2.12, origin="exact"),  # 52.5 frames, which begin and end on whole ones: 52
        segment(start=3.0, end=4.9, origin="short"),
        segment(start=3.0, end=9.1, origin="long"),
    ]
    report = cut(known, small.parent, frames=(29,), seconds=(2.1, 6.0))
    assert spans(report) == [(1, 45, 29)]
    assert report.examples == {"shorter than 2.1 s": "short", "longer than 6 s": "long"}


def test_a_video_that_ends_before_its_header_says_is_cut_where_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = video(tmp_path / "a.mp4", 4)  # 80 frames
    monkeypatch.setattr(
        "wanmoe.train.data.footage.video_info", lambda path: replace(video_info(path), frames=200)
    )
    known = [segment("a", 1, 8, origin="a:1"), segment("a", 6, 9, origin="a:2")]
    report = cut(known, path.parent, frames=(33,), fps=20)
    assert spans(report) == [(20, 33, 33)] and report.examples == {"outside the video": "a:2"}
    cause = "it ends there, though its header says 200 frames"
    assert report.notes == [f"1 video ends early: {path} at frame 80 ({cause})"]


def test_a_video_damaged_in_its_middle_is_cut_up_to_there_and_named(data_dir: Path, tmp_path: Path) -> None:
    data = bytearray((data_dir / "bikes.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (tmp_path / "a.mp4").write_bytes(data)
    known = [segment("a", 3.1, 6.0, origin="a:1"), segment("a", 7.0, 9.5, origin="a:2")]
    report = cut(known, tmp_path, frames=(17,), seconds=(1.5, 20), fps=12.5)
    assert spans(report) == [(78, 33, 17)] and report.examples == {"outside the video": "a:2"}
    assert report.notes[0].startswith(f"1 video ends early: {tmp_path / 'a.mp4'} at frame 120 (it is damaged")
    (clip,) = report.clips
    assert read_video(clip.video_path, start_frame=clip.start_frame, num_frames=33).shape[0] == 33


def test_scene_cuts_split_a_segment_and_its_parts_are_filtered_again(data_dir: Path) -> None:
    report = cut([segment("bikes", 0.0, 10.0, caption="bikes")], data_dir, frames=(33, 17), seconds=(1.5, 20))
    info = video_info(data_dir / "bikes.mp4")
    cuts = (0, 30, 76, 137, 187, 242, 250)
    scenes = [range(*scene) for scene in pairwise(cuts)]
    used = [windows(clip, info, frames=1)[0].indices for clip in report.clips]
    assert all(any(one[0] in scene and one[-1] in scene for scene in scenes) for one in used)
    # Scenes of 30, 46, 61, 50, 55 and 8 frames, of which 30 and 8 are shorter than 1.5 s.
    assert spans(report) == [(30, 26, 17), (76, 51, 33), (137, 26, 17), (187, 51, 33)]
    assert report.dropped == {"shorter than 1.5 s": 2}
    assert report.notes == ["1 segment is split at 5 scene cuts"]


def test_windows_that_are_black_are_dropped(tmp_path: Path) -> None:
    frames = read_video(video(tmp_path / "light.mp4", 6))
    frames[60:] //= 40
    write_video(tmp_path / "a.mp4", frames, fps=20)
    known = [segment("a", 0, 2.9, origin="light"), segment("a", 3.2, 6, origin="dark")]
    report = cut(known, tmp_path, frames=(33,), fps=20)
    assert spans(report) == [(0, 33, 33)] and report.examples == {"black pictures": "dark"}


# ---- copies ----


def test_the_same_frames_are_taken_once_whatever_the_path(small: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.mp4").write_bytes(small.read_bytes())
    files = {"video07": small, "copy": tmp_path / "copy.mp4"}
    known = [
        segment(start=0, end=2.1, origin="a:1"),
        segment("copy", 0.08, 2.2, origin="a:2"),  # 2 of 51 frames later
        segment(start=0.2, end=2.3, origin="a:3", caption="clip applier"),  # 5 frames: 46 of 56 are shared
    ]
    report = cut(known, files, frames=(33,))
    assert [clip.start_frame for clip in report.clips] == [0, 5]
    assert report.examples == {"the same frames of a video twice": "a:2"}


def test_a_reencoded_copy_is_taken_once_and_other_moments_stay(small: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "again.mp4", read_video(small, size=(64, 114)), fps=25, crf=34)
    files = {"video07": small, "again": tmp_path / "again.mp4"}
    known = [segment(start=0, end=4.2, origin="a"), segment("again", 0, 8.4, origin="b")]
    report = cut(known, files, frames=(33,))
    assert [(clip.video_path.stem, clip.start_frame) for clip in report.clips] == [
        *(("video07", 0), ("video07", 52)),
        *(("again", 104), ("again", 156)),
    ]
    assert report.dropped == {"the same pictures in another video file": 2}


# ---- what comes along ----


def test_captions_are_cleaned_and_tools_become_evidence(small: Path) -> None:
    known = [
        segment(start=0, end=3, caption="抓钳A牵拉 [Tools in: scissors]", tools=("hook",)),
        segment(start=3, end=6, caption="显露 cvs", origin="a:2"),
        segment(start=6, end=9, caption="[Tools in: hook]", origin="a:3"),
    ]
    report = cut(known, small.parent, frames=(33,))
    (clip,) = report.clips
    assert clip.caption == "抓钳牵拉" and clip.tools == "hook, scissors"
    assert report.histogram == {"train": {"Hook/Electrocautery": 0.5, "Scissors": 0.5}}
    assert report.examples == {
        "the caption says 'cvs'": "a:2",
        "nothing of the caption is left when it is cleaned": "a:3",
    }


def test_tools_count_before_words_and_no_evidence_is_not_the_expert_other(small: Path) -> None:
    known = [
        segment(start=0, end=2.1, caption="the hook dissects", tools=("scissors",)),
        segment(start=2.2, end=4.4, caption="a grasper pulls"),
        segment(start=4.5, end=6.7, caption="the liver"),
        segment(start=6.8, end=9, caption="the hook", instruments=(("irrigator", 1.0),)),
    ]
    report = cut(known, small.parent, frames=(33,))
    assert report.histogram == {"train": {"(no evidence)": 1, "Other": 1, "Scissors": 1, "Suction": 1}}
    assert [clip.instruments for clip in report.clips] == [None, None, None, (("irrigator", 1.0),)]
    tools = cut(known, small.parent, frames=(33,), experts=ExpertSet(CHOLEC)).histogram
    assert tools == {"train": {"(no evidence)": 1, "grasper": 1, "irrigator": 1, "scissors": 1}}


def test_an_unknown_instrument_is_an_error_that_names_the_line(small: Path) -> None:
    with pytest.raises(WanmoeError, match="^labels.txt:9: unknown expert 'laser'"):
        cut([segment(instruments=(("laser", 1.0),), origin="labels.txt:9")], small.parent)


def test_what_an_annotation_says_comes_along(small: Path) -> None:
    more = {"caption_zh": "电凝钩A切割", "phase": "calot", "triplets": ("hook,cut,fat",), "licence": "CC"}
    (clip,) = cut([segment(start=0, end=3, split="val", **more)], small.parent, frames=(33,)).clips
    assert (clip.caption_zh, clip.phase, clip.triplets) == ("电凝钩切割", "calot", ("hook,cut,fat",))
    assert (clip.licence, clip.split, clip.video_path) == ("CC", "val", small)


def test_marks_become_pixels_and_nearest_frames(small: Path) -> None:
    marks = (
        Moment(1.03, Tip(0, 0.5, 0.5, "hook", "1")),
        Moment(1.0, Box(0, 0.0, 0.1, 0.5, 0.9, "hook")),
        Moment(1.0, Polygon(0, ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)), "hook", "2")),
    )
    (clip,) = cut([segment(start=0, end=3, moments=marks)], small.parent, frames=(33,)).clips
    assert clip.tips == (
        Tip(26, 79.5, 44.5, "hook", "1"),
    )  # between pixels 79 and 80 of 160, 44 and 45 of 90
    assert clip.boxes == (Box(25, 0.0, 9.0, 80.0, 81.0, "hook"),)
    assert clip.polygons == (Polygon(25, ((-0.5, -0.5), (159.5, -0.5), (159.5, 89.5)), "hook", "2"),)


def test_a_window_has_its_marks_and_the_nearest_of_each_track_outside(small: Path) -> None:
    def tips(*seconds: float, track: str) -> tuple[Moment, ...]:
        return tuple(Moment(one, Tip(0, 0.5, 0.5, "hook", track)) for one in seconds)

    marks = (
        *tips(0.5, 1.2, 1.6, 3.0, 4.2, 4.4, 9.0, track="1"),
        *tips(0.9, 5.2, track="2"),  # more than a second away
        *tips(4.16, 4.16, track="3"),  # two of one time
    )
    (clip,) = cut([segment(start=2, end=4.2, moments=marks)], small.parent, frames=(33,)).clips
    assert (clip.start_frame, clip.num_frames) == (50, 51)
    assert [(tip.track, tip.frame) for tip in clip.tips] == [
        *(("1", 40), ("1", 75), ("1", 105)),
        *(("3", 104), ("3", 104)),
    ]


def test_marks_of_another_scene_do_not_come_along(data_dir: Path) -> None:
    marks = tuple(Moment(frame / 25, Tip(0, 0.5, 0.5, "a")) for frame in (70, 80, 136, 140))
    known = [segment("bikes", 0.0, 10.0, caption="bikes", moments=marks)]
    report = cut(known, data_dir, frames=(33,), seconds=(2, 20))
    tips = {clip.start_frame: [tip.frame for tip in clip.tips] for clip in report.clips}
    assert tips == {76: [80, 136], 187: []}


# ---- splits ----


def sources(tmp_path: Path, count: int, seconds: float = 4.0) -> Path:
    for number in range(count):
        video(tmp_path / f"v{number}.mp4", seconds, seed=number)
    return tmp_path


def test_videos_are_held_out_whole_and_for_every_label(tmp_path: Path) -> None:
    folder = sources(tmp_path, 6, seconds=3.4)
    known = [
        segment(
            f"v{number}", start, start + 2, caption=("hook", "scissors")[number % 2], origin=f"a:{number}"
        )
        for number in range(6)
        for start in (0, 1.7)
    ]
    options: dict[str, Any] = {"frames": (17,), "fps": 10, "seconds": (1, 2), "val_fraction": 0.3}
    report = cut(known, folder, **options)
    held = {clip.source for clip in report.clips if clip.split == "val"}
    trained = {clip.source for clip in report.clips if clip.split == "train"}
    assert len(held) == 2 and len(trained) == 4 and not held & trained
    assert report.histogram == {
        split: {"Hook/Electrocautery": count, "Scissors": count}
        for split, count in (("train", 4), ("val", 2))
    }
    assert cut(known, folder, **options).clips == report.clips
    seeds = [cut(known, folder, **options, seed=seed) for seed in (1, 2)]
    assert any({clip.source for clip in one.clips if clip.split == "val"} != held for one in seeds)


def test_names_of_one_operation_go_to_one_split(tmp_path: Path) -> None:
    for number, name in enumerate(("VID07", "video07", "cholec08", "VID09")):
        video(tmp_path / f"{name}.mp4", 2.5, seed=number)
    known = [segment(name, 0, 2.5) for name in ("VID07", "video07", "cholec08", "VID09")]
    for seed in range(3):
        report = cut(known, tmp_path, frames=(17,), fps=10, val_fraction=0.4, seed=seed)
        split = {clip.video_path.stem: clip.split for clip in report.clips}
        assert split["VID07"] == split["video07"] and set(split.values()) == {"train", "val"}
        assert {clip.source for clip in report.clips} == {"cholec07", "cholec08", "cholec09"}


def test_held_out_windows_share_no_frames_with_training(tmp_path: Path) -> None:
    folder = sources(tmp_path, 1, seconds=8)
    (folder / "same.mp4").write_bytes((folder / "v0.mp4").read_bytes())
    known = [
        segment("v0", 0, 8, caption="hook"),
        segment("v0", 1, 8, caption="scissors"),
        segment("same", 2, 8, caption="suction"),
    ]
    report = cut(known, folder, frames=(17,), fps=10, val_fraction=0.4)
    used: dict[str | None, Counter[int]] = {"train": Counter(), "val": Counter()}
    for clip in report.clips:
        used[clip.split].update(range(clip.start_frame, clip.start_frame + (clip.num_frames or 0)))
    assert used["val"] and not used["val"].keys() & used["train"].keys()
    assert report.dropped["held-out window shares frames with training"]


# ---- lists and folders ----


def test_what_was_cut_is_written_read_and_cut_again_to_the_same(small: Path, tmp_path: Path) -> None:
    marks = (Moment(1.0, Tip(0, 0.5, 0.5, "hook")), Moment(1.0, Box(0, 0.1, 0.1, 0.2, 0.2, "hook")))
    known = [
        segment(start=0, end=9, tools=("hook", "grasper"), moments=marks),
        segment(start=0, end=3, caption="it overlaps"),
    ]
    report = cut(known, small.parent, frames=(33, 81))
    assert [clip.id for clip in report.clips] == ["cholec07-0", "cholec07-0-2", "cholec07-5080"]
    write_clip_list(tmp_path / "clips.jsonl", report.clips)
    read = read_clip_list(tmp_path / "clips.jsonl")
    again = cut(read, [], frames=(33, 81))
    unread = [replace(clip, origin="", masks_from=0, video_path=small) for clip in again.clips]
    assert unread == [replace(clip, origin="") for clip in report.clips]


def test_a_stack_of_masks_is_not_cut(small: Path) -> None:
    clip = Clip(small, "hook", "a", "a", "clips.jsonl:4", masks=small.parent / "masks.png")
    assert cut([replace(clip, num_frames=60)], [], frames=(33,)).clips[0].masks == clip.masks
    with pytest.raises(
        WanmoeError, match="^clips.jsonl:4: the masks are one picture that begins with frame 0"
    ):
        cut([clip], [], frames=(33,))
    (small.parent / "folder").mkdir()
    report = cut([replace(clip, masks=small.parent / "folder")], [], frames=(33,))
    assert len(report.clips) == 4


# ---- faults and the report ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": (80,)}, "frames is 80"),
        ({"frames": ()}, "at least one length"),
        ({"fps": 0}, "a positive rate"),
        ({"seconds": (5.0, 2.0)}, "seconds are 5 to 2"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
    ],
)
def test_wrong_options_are_named(small: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WanmoeError, match=message):
        cut([segment()], small.parent, **options)


def test_a_missing_video_names_the_segment_and_the_folder(small: Path) -> None:
    with pytest.raises(WanmoeError, match=f"^labels.txt:1: there is no video 'video09' in {small.parent}"):
        cut([segment("video09")], small.parent)


def test_a_damaged_video_names_the_segment(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(WanmoeError, match=f"^labels.txt:1: {tmp_path / 'a.mp4'}: not a video"):
        cut([segment("a")], tmp_path)


def test_nothing_left_is_an_error_with_all_causes(small: Path) -> None:
    known = [segment(start=0, end=3), segment(start=0, end=1), segment(caption="CVS")]
    causes = (
        "1 x shorter than 2 s; 1 x shorter than a window of 81 frames at 16 fps; 1 x the caption says 'cvs'"
    )
    with pytest.raises(WanmoeError, match=f"^no window is left of 3 segments: {causes}; lower the frames"):
        cut(known, small.parent)
    with pytest.raises(WanmoeError, match="^no window is left of 1 segment: "):
        cut(known[:1], small.parent)


def test_the_report_says_what_was_kept_dropped_and_why(small: Path) -> None:
    known = [
        segment(start=0, end=3),
        segment(start=4, end=4.5, origin="labels.txt:2"),
        segment(start=6, end=9, caption="the liver"),
    ]
    assert cut(known, small.parent, frames=(33,)).lines() == [
        "kept 2 windows of 3 segments from 1 video",
        "dropped 1: shorter than 2 s (first: labels.txt:2)",
        "train: (no evidence) 1, Hook/Electrocautery 1",
    ]


def test_the_order_is_that_of_the_videos_and_of_time(tmp_path: Path) -> None:
    folder = sources(tmp_path, 2)
    known = [segment("v1", 2, 4), segment("v0", 0, 2), segment("v1", 0, 2)]
    report = cut(known, folder, frames=(17,), fps=10)
    assert [(clip.source, clip.start_frame) for clip in report.clips] == [("v1", 0), ("v1", 40), ("v0", 0)]
