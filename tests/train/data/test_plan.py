"""What `prepare` will encode: labels, windows of several lengths, and the size that is nearest in shape."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC, SURGICAL, ExpertSet
from wanmoe.moe_lora.video import VideoInfo
from wanmoe.train.data.clip_list import read_clip_list
from wanmoe.train.data.clips import Clip
from wanmoe.train.data.plan import Plan, Settings, Source, label, make_plan, nearest_size, recipe, sample_key

EXPERTS = ExpertSet(SURGICAL)
VIDEO = Path("videos/v.mp4")
CLIP = Clip(VIDEO, "the hook", id="c", source="v", origin="clips.jsonl:1", split="train")


def listed(folder: Path, *rows: dict[str, Any]) -> list[Clip]:
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_clip_list(path)


def planned(
    *clips: Clip,
    frames: int = 100,
    size: tuple[int, int] = (96, 128),
    lengths: tuple[int, ...] = (9,),
    **options: Any,
) -> Plan:
    """The plan for clips of videos of so many frames, 25 a second."""
    settings = Settings(**({"sizes": ((32, 48),), "frames": lengths} | options))
    info = VideoInfo(25.0, frames, *size)
    return make_plan(clips, EXPERTS, {clip.video_path: Source("0" * 64, info) for clip in clips}, settings)


def test_labels_come_first_from_fields_then_tools_then_words(tmp_path: Path) -> None:
    base = {"video_path": "v.mp4", "caption": "The hook and the suction tube."}
    got = [
        label(clip, EXPERTS)
        for clip in listed(
            tmp_path,
            {**base, "instruments": ["scissors"], "instrument_label": 3},
            {**base, "instruments": []},
            {**base, "instrument_label": 3},
            {**base, "caption": "The hook [Tools in: scissors, grasper]"},
            base,
            {**base, "caption": "电凝钩烧灼，电凝钩退出，剪刀进入。"},
            {**base, "caption": "Fat.", "caption_zh": "吸引器"},
            {**base, "caption": "The camera moves."},
        )
    ]
    assert got == [
        (("Scissors", 1.0),),
        (),
        (("Other", 1.0),),
        (("Scissors", 0.5), ("Other", 0.5)),
        (("Hook/Electrocautery", 0.5), ("Suction", 0.5)),
        (("Scissors", 0.25), ("Hook/Electrocautery", 0.75)),
        (("Suction", 1.0),),
        (),
    ]


def test_the_longest_window_comes_first_and_shorter_ones_take_the_rest() -> None:
    for available, lengths in (
        (28, [17, 9]),
        (31, [17, 9, 5]),
        (17, [17]),
        (16, [9, 5]),
        (60, [17, 17, 17, 9]),
    ):
        pieces = planned(replace(CLIP, num_frames=available), lengths=(5, 17, 9)).pieces
        assert [len(piece.window.indices) for piece in pieces] == lengths, available
        assert [index for piece in pieces for index in piece.window.indices] == list(range(sum(lengths)))
        assert [piece.window.number for piece in pieces] == list(range(len(lengths)))


def test_shorter_windows_go_on_in_step_where_the_rate_is_another() -> None:
    first, second = planned(CLIP, frames=50, lengths=(9, 17), fps=16.0).pieces
    assert (len(first.window.indices), len(second.window.indices)) == (17, 9)
    indices = first.window.indices + second.window.indices
    assert {later - earlier for earlier, later in pairwise(indices)} == {1, 2}
    assert second.window.indices[0] == 27 and first.fps == second.fps == 16.0


def test_a_stride_is_kept_for_every_length() -> None:
    starts = [
        (len(piece.window.indices), piece.window.indices[0])
        for piece in planned(CLIP, frames=30, lengths=(9, 5), window_stride=10).pieces
    ]
    assert starts == [(9, 0), (9, 10), (9, 20)]
    with_rest = planned(CLIP, frames=25, lengths=(9, 5), window_stride=10).pieces
    assert [piece.window.indices[0] for piece in with_rest] == [0, 10, 19]


def test_a_clip_that_is_a_window_keeps_its_length_and_rate() -> None:
    clip = replace(CLIP, frames=13, fps=12.5, start_frame=4)
    (piece,) = planned(clip, lengths=(33, 9), fps=16.0).pieces
    assert piece.window.indices == tuple(range(4, 4 + 26, 2)) and piece.fps == 12.5
    with pytest.raises(WanmoeError, match=r"1 x clip shorter than 13 frames at 12\.5 fps"):
        planned(clip, frames=20)


@pytest.mark.parametrize(
    ("video", "size"),
    [
        ((480, 854), (32, 64)),
        ((1080, 1920), (32, 64)),
        ((960, 540), (64, 32)),
        ((500, 500), (48, 48)),
        ((400, 500), (48, 48)),
        ((1, 100), (32, 64)),
    ],
)
def test_a_video_takes_the_size_of_the_nearest_shape(video: tuple[int, int], size: tuple[int, int]) -> None:
    sizes = ((64, 32), (48, 48), (32, 64))
    assert nearest_size(VideoInfo(25.0, 10, *video), sizes) == size
    assert nearest_size(VideoInfo(25.0, 10, *video), sizes[::-1]) == size
    (piece,) = planned(CLIP, frames=9, size=video, sizes=sizes).pieces
    assert (piece.fit.height, piece.fit.width) == size and piece.fit.source == video


def test_the_recipe_changes_with_all_that_decides_a_sample_and_with_no_path() -> None:
    settings = Settings(sizes=((32, 48),), frames=(9,))
    sources = {VIDEO: Source("a" * 64, VideoInfo(25.0, 30, 64, 96))}

    def digests(clip: Clip, source: Source = sources[VIDEO], experts: ExpertSet = EXPERTS) -> dict[str, Any]:
        plan = make_plan([clip], experts, {clip.video_path: source}, settings)
        return dict(recipe(plan, settings, {})["samples"])

    base = digests(CLIP)
    assert digests(replace(CLIP, video_path=Path("/elsewhere/v.mp4"), origin="other.jsonl:7")) == base
    for change in (
        {"caption": "the scissors"},
        {"caption_zh": "电凝钩"},
        {"instruments": (("Scissors", 1.0),)},
        {"phase": "dissection"},
        {"licence": "CC BY 4.0"},
        {"split": "val"},
        {"start_frame": 1},
    ):
        assert digests(replace(CLIP, **change)) != base, change  # type: ignore[arg-type]
    assert digests(CLIP, Source("b" * 64, sources[VIDEO].info)) != base
    assert digests(CLIP, experts=ExpertSet(CHOLEC)) != base, "the same words are another instrument there"


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"sizes": ((32, 48), (30, 48))}, "size is 30 x 48"),
        ({"frames": (9, 16)}, "frames is 16"),
        ({"frames": ()}, "at least one"),
        ({"task": "v2v"}, "v2v"),
    ],
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any], cause: str) -> None:
    with pytest.raises(WanmoeError, match=cause):
        Settings(**({"sizes": ((32, 48),), "frames": (9,)} | wrong))


def test_clips_of_one_recording_are_on_one_side_of_the_split() -> None:
    names = [f"cholec{video:02d}_{clip:04d}_part{clip % 2}" for video in (2, 7, 14) for clip in range(40, 48)]
    clips = [Clip(Path(f"clips/{name}.mp4"), "the hook", id=name, source=name, origin=name) for name in names]
    info = VideoInfo(25.0, 20, 96, 128)
    files = {clip.video_path: Source(clip.id, info) for clip in clips}
    plan = make_plan(clips, EXPERTS, files, Settings(sizes=((32, 48),), frames=(9,)))
    sides = {
        split: {piece.clip.source for piece in plan.pieces if piece.clip.split == split}
        for split in ("train", "val")
    }
    assert len(sides["train"]) == 2 and len(sides["val"]) == 1 and not sides["train"] & sides["val"]
    assert sides["train"] | sides["val"] == {"cholec02", "cholec07", "cholec14"}


def test_two_samples_of_one_key_are_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(CLIP, caption="another hook", origin="clips.jsonl:2")
    monkeypatch.setattr("wanmoe.train.data.plan._digest", lambda content: "0" * 64)
    with pytest.raises(WanmoeError, match=r"clips\.jsonl:1 and clips\.jsonl:2: different samples"):
        planned(replace(CLIP, num_frames=9), replace(other, num_frames=9))
    same = planned(replace(CLIP, num_frames=9), replace(CLIP, num_frames=9, origin="clips.jsonl:2"))
    assert same.dropped == {"the same window and caption twice": 1}


def test_a_key_fits_a_shard_whatever_the_names() -> None:
    key = sample_key("s" * 99, "clip name " * 9, 123456, "content")
    assert len(key) <= 70 and re.fullmatch(r"s{22}_[\w-]{22}-w123456_[0-9a-f]{16}", key)


def test_windows_that_are_cut_already_stay_and_the_settings_that_differ_are_told() -> None:
    window = replace(CLIP, frames=17, fps=16.0)
    plan = planned(window, replace(window, start_frame=30), CLIP, lengths=(9,), fps=16.0, val_fraction=0.0)
    assert plan.notes == [
        "2 clips are windows of 17 frames at 16 fps already and stay so, whatever --frames, --fps and "
        "--stride say"
    ]
    assert len(plan.pieces[0].window.indices) == 17
    assert planned(window, lengths=(9, 17), fps=16.0, val_fraction=0.0).notes == []
    for differs in ({"fps": 16.0, "window_stride": 4}, {"fps": 12.0}):
        (note,) = planned(window, lengths=(17,), val_fraction=0.0, **differs).notes
        assert note.startswith("1 clips are windows of 17 frames at 16 fps")
