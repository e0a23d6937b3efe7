"""Tips and boxes between key frames: carried by the flow, and told from those that were given."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from wanmoe.moe_lora.motion import ClipFlow, clip_flow
from wanmoe.moe_lora.video import read_video
from wanmoe.train.data.clip_list import read_clip_list
from wanmoe.train.data.clips import GIVEN, INTERPOLATED, Box, Tip
from wanmoe.train.data.tracks import carry
from wanmoe.train.synth import synth_clips


def uniform(path: Sequence[tuple[float, float]], height: int = 64, width: int = 96) -> ClipFlow:
    """The flow of a picture that moves as a whole along `path`."""
    steps = np.diff(np.array(path, np.float32), axis=0)[:, :, None, None]
    forward = np.broadcast_to(steps, (len(steps), 2, height, width)).astype(np.float32)
    return ClipFlow(-forward, forward, np.ones((len(steps), height, width), bool), 1)


def overlap(a: Box, b: Box) -> float:
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    both = max(width, 0) * max(height, 0)
    return both / (a.width * a.height + b.width * b.height - both)


def test_key_frames_stay_as_given_and_the_rest_is_said_to_be_interpolated() -> None:
    keys = [Tip(0, 10.0, 20.0, "hook", "a"), Tip(4, 18.0, 24.0, "hook", "a")]
    marks = carry(keys, None, 9)
    assert [mark for mark in marks if mark.kind == GIVEN] == keys
    assert marks[1:4] == [Tip(k, 10.0 + 2 * k, 20.0 + k, "hook", "a", INTERPOLATED) for k in (1, 2, 3)]
    assert len(marks) == 5, "without flow nothing is said after the last key frame"


def test_a_motion_that_is_no_straight_line_is_followed_by_the_flow() -> None:
    path = [(30 + 15 * np.sin(k / 2), 30 + 10 * np.cos(k / 3)) for k in range(17)]
    flow = uniform(path)
    for mark in carry([Tip(0, *path[0]), Tip(16, *path[16])], flow, 17):
        assert np.hypot(mark.x - path[mark.frame][0], mark.y - path[mark.frame][1]) < 1e-3
    boxes = carry([Box(0, *path[0], 20, 10), Box(16, path[16][0] - 4, path[16][1], 28, 10)], flow, 17)
    assert [box.width for box in boxes] == pytest.approx([20 + k / 2 for k in range(17)])
    for box in boxes:
        centre = box.x + (box.width - 1) / 2, box.y + 4.5
        assert np.allclose(centre, (path[box.frame][0] + 9.5, path[box.frame][1] + 4.5), atol=1e-3)


def test_a_wrong_flow_still_meets_both_key_frames() -> None:
    marks = carry([Tip(0, 10, 10), Tip(8, 10, 10)], uniform([(k, 0) for k in range(9)]), 9)
    assert [round(mark.x, 3) for mark in marks] == [10, 10, 10, 10, 10, 10, 10, 10, 10]
    marks = carry([Tip(0, 10, 10), Tip(8, 18, 10)], uniform([(0, 0)] * 9), 9)
    assert [round(mark.x, 3) for mark in marks] == [10 + k for k in range(9)]


def test_before_the_first_and_after_the_last_a_mark_is_carried_for_a_second() -> None:
    marks = carry([Tip(20, 40.0, 30.0)], uniform([(40 + k / 4, 30) for k in range(60)]), 60)
    assert [mark.frame for mark in marks] == list(range(4, 37))
    assert all(abs(mark.x - (35 + mark.frame / 4)) < 1e-3 for mark in marks)
    assert [mark.frame for mark in marks if mark.kind == GIVEN] == [20]


def test_a_mark_ends_where_its_instrument_is_known_to_be_elsewhere() -> None:
    keys = [Tip(0, 10, 10), Tip(0, 80, 50), Tip(8, 12, 10)]
    marks = carry(keys, uniform([(0, 0)] * 17), 17)
    far = [mark.frame for mark in marks if mark.x > 40]
    assert far == list(range(8)), "at frame 8 one tip is left"
    assert [mark.frame for mark in marks if mark.x < 40] == list(range(17))
    backwards = [mark._replace(frame=8 - mark.frame) for mark in keys]
    marks = carry(backwards, uniform([(0, 0)] * 17), 17)
    assert [mark.frame for mark in marks if mark.x > 40] == list(range(1, 17))


def test_a_long_gap_is_not_bridged() -> None:
    assert len(carry([Tip(0, 1, 1), Tip(33, 1, 1)], None, 34)) == 2
    assert len(carry([Tip(0, 1, 1), Tip(32, 1, 1)], None, 34)) == 33
    both = carry([Tip(0, 1, 1), Tip(40, 1, 1)], uniform([(0, 0)] * 41), 41)
    assert [mark.frame for mark in both] == [*range(17), *range(24, 41)]


def test_marks_are_matched_within_an_instrument_by_nearness_and_by_track_where_it_is_named() -> None:
    keys = [Tip(0, 10, 10), Tip(0, 50, 10), Tip(4, 48, 10), Tip(4, 12, 10), Tip(4, 30, 40)]
    middle = [(mark.x, mark.y) for mark in carry(keys, None, 5) if mark.frame == 2]
    assert sorted(middle) == [(11, 10), (49, 10)]
    crossing = [
        Tip(0, 10, 10, "", "a"),
        Tip(0, 50, 10, "", "b"),
        Tip(4, 50, 10, "", "a"),
        Tip(4, 10, 10, "", "b"),
    ]
    middle = [(mark.x, mark.track) for mark in carry(crossing, None, 5) if mark.frame == 1]
    assert sorted(middle) == [(20, "a"), (40, "b")]
    other = [Tip(0, 10, 10, "hook"), Tip(4, 10, 10, "scissors")]
    assert carry(other, None, 5) == other


def test_marks_outside_the_window_help_and_are_not_returned() -> None:
    marks = carry([Tip(-4, 10, 10), Tip(4, 18, 10)], None, 3)
    assert [(mark.frame, mark.x) for mark in marks] == [(0, 14), (1, 15), (2, 16)]
    still = uniform([(0, 0)] * 3)
    assert carry([Tip(-2, 10, 10)], still, 3) == [], "what it did before the window was not seen"
    assert carry([Tip(4, 10, 10)], still, 3) == []


def test_a_mark_that_leaves_the_picture_does_no_harm() -> None:
    flow = uniform([(30 * k, -20 * k) for k in range(9)])
    for mark in (Tip(0, 90.0, 3.0), Box(0, 80.0, -5.0, 30.0, 20.0), Box(0, -40.0, -40.0, 10.0, 10.0)):
        assert [one.frame for one in carry([mark], flow, 9)] == list(range(9))
    assert carry(list[Tip](), flow, 9) == []


@pytest.mark.parametrize(("size", "frames", "every"), [((96, 96), 17, 8), ((96, 128), 33, 16)])
def test_synthetic_instruments_are_followed_better_than_by_straight_lines(
    size: tuple[int, int], frames: int, every: int, tmp_path: Path
) -> None:
    height, width = size
    made = synth_clips(tmp_path / "c", clips=8, val=0, height=height, width=width, frames=frames, seed=3)
    tips: dict[str, list[float]] = {"flow": [], "line": []}
    boxes: dict[str, list[float]] = {"flow": [], "line": []}
    for clip in read_clip_list(made):
        found = clip_flow(read_video(clip.video_path))
        for name, flow in (("flow", found), ("line", None)):
            got = carry([tip for tip in clip.tips if tip.frame % every == 0], flow, frames)
            tips[name] += [np.hypot(a.x - b.x, a.y - b.y) for a, b in zip(got, clip.tips, strict=True)]
            inside = carry([box for box in clip.boxes if box.frame % every == 0], flow, frames)
            boxes[name] += [overlap(a, b) for a, b in zip(inside, clip.boxes, strict=True)]
    assert np.mean(tips["flow"]) * 1.8 < np.mean(tips["line"])
    assert np.mean(boxes["flow"]) > np.mean(boxes["line"]) + 0.02
    assert torch.tensor(tips["flow"]).quantile(0.5) < 0.02 * max(size)
