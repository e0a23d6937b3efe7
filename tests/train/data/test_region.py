"""Annotations in a window: tips and boxes in its pixels, and the region on the grid of its latent."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.motion import ClipFlow, clip_flow
from wanmoe.moe_lora.video import Fit, read_video
from wanmoe.train.data.clip_list import read_clip_list
from wanmoe.train.data.clips import GIVEN, INTERPOLATED, Box, Clip, Polygon, Tip
from wanmoe.train.data.region import Marks, Mask, MaskReader, latent_region, pool, window_marks
from wanmoe.train.synth import synth_clips

SAME = Fit.cover((64, 96), (64, 96))


def clip(**known: Any) -> Clip:
    return Clip(video_path=Path("v"), caption="", id="", source="", origin="clips.jsonl:1", **known)


def read_masks(known: Clip, height: int, width: int) -> Mapping[int, Mask] | None:
    return MaskReader()(known, height, width)


def still(frames: int, x: float = 0.0) -> ClipFlow:
    """The flow of a picture that moves by x to the right with every frame."""
    forward = np.zeros((frames - 1, 2, 64, 96), np.float32)
    forward[:, 0] = x
    return ClipFlow(-forward, forward, np.ones((frames - 1, 64, 96), bool), 1)


def region(
    known: Clip, frames: int = 5, fit: Fit = SAME, flow: ClipFlow | None = None, step: int = 1
) -> Tensor:
    indices = range(0, frames * step, step)
    marks = window_marks(known, indices, fit, flow)
    found = latent_region(known, indices, fit, read_masks(known, *fit.source), marks, flow)
    assert found is not None and found.dtype == torch.uint8 and set(found.unique().tolist()) <= {0, 255}
    return found > 0


def cells(found: Tensor) -> list[list[int]]:
    return found.nonzero().tolist()


def test_the_region_pools_cells_and_groups_of_four() -> None:
    masks = torch.zeros(9, 16, 24, dtype=torch.uint8)
    masks[0, 0, 0] = 255
    masks[4, 15, 23] = 255  # the last frame of the first group
    masks[5, 8, 7] = 255  # the first of the second
    expected = torch.zeros(3, 2, 3, dtype=torch.uint8)
    expected[0, 0, 0] = expected[1, 1, 2] = expected[2, 1, 0] = 255
    assert torch.equal(pool(masks), expected)


def test_marks_follow_the_scaling_and_the_cut() -> None:
    fit = Fit.cover((64, 128), (32, 32))  # half the size, then the middle half of the width
    tips = (Tip(0, 64.5, 32.5, "hook", "a"), Tip(4, 64.5, 40.5, "hook", "a"), Tip(8, 5.0, 5.0, "hook", "b"))
    boxes = (Box(0, 64.0, 32.0, 16.0, 16.0), Box(0, 24.0, 60.0, 16.0, 10.0, "hook"), Box(1, 2, 2, 20, 20))
    marks = window_marks(clip(tips=tips, boxes=boxes), range(9), fit, None)
    assert marks.tips[0] == Tip(0, 16.0, 16.0, "hook", "a", GIVEN)
    assert marks.tips[2] == Tip(2, 16.0, 18.0, "hook", "a", INTERPOLATED), "gaps are filled"
    assert [tip.frame for tip in marks.tips] == [0, 1, 2, 3, 4], "frame 8's tip is cut away"
    assert marks.boxes == [Box(0, 16.0, 16.0, 8.0, 8.0), Box(0, 0.0, 30.0, 4.0, 2.0, "hook")]
    found = latent_region(clip(tips=tips), range(5), fit, None, marks._replace(boxes=[]), None)
    assert found is not None and found[0, 2, 2] == 255 and not found[:, :, 0].any()
    boxed = region(clip(boxes=boxes[:1]), fit=fit)
    assert cells(boxed) == [[0, 2, 2]], "one box of 8 x 8 in the first frame, and none is known after it"
    assert latent_region(clip(), range(5), fit, None, Marks([], []), None) is None


def test_a_window_at_another_rate_keeps_what_its_frames_left_out() -> None:
    """25 to 16 frames a second: frame 7 of the file is none of the window's, 6 and 8 are."""
    indices = [0, 2, 3, 5, 6, 8, 9, 11, 13]
    known = clip(tips=(Tip(7, 40.0, 20.0, "a"), Tip(3, 10.0, 20.0, "b"), Tip(5, 20.0, 20.0, "b")))
    tips = window_marks(known, indices, SAME, None).tips
    assert [(tip.frame, tip.kind) for tip in tips if tip.instrument == "a"] == [(4, INTERPOLATED)]
    assert [(t.frame, t.x, t.kind) for t in tips if t.instrument == "b"] == [(2, 10, GIVEN), (3, 20, GIVEN)]
    dense = clip(tips=tuple(Tip(frame, float(frame), 3.0) for frame in range(14)))
    got = window_marks(dense, indices, SAME, None).tips
    assert got == [Tip(place, float(index), 3.0) for place, index in enumerate(indices)]


def test_a_frame_that_a_slow_video_shows_twice_keeps_its_mark_in_both() -> None:
    indices = [0, 1, 1, 2, 2]  # 8 frames a second shown at 16
    known = clip(tips=tuple(Tip(frame, 10.0 * frame, 3.0) for frame in range(3)))
    got = window_marks(known, indices, SAME, None).tips
    assert [(tip.frame, tip.x, tip.kind) for tip in got] == [
        (k, 10.0 * n, GIVEN) for k, n in enumerate(indices)
    ]


def test_key_frames_before_and_after_the_window_lead_through_it() -> None:
    known = clip(tips=(Tip(4, 10.0, 10.0), Tip(20, 42.0, 26.0)))
    tips = window_marks(known, range(10, 15), SAME, None).tips
    assert [(tip.frame, tip.x, tip.y) for tip in tips] == [(k, 22.0 + 2 * k, 16.0 + k) for k in range(5)]


def test_marks_are_carried_by_the_flow() -> None:
    known = clip(boxes=(Box(2, 8.0, 8.0, 8.0, 8.0),))
    boxes = window_marks(known, range(5), SAME, still(5, x=8.0)).boxes
    assert [(box.frame, box.x, box.kind) for box in boxes if box.x >= 0 and box.width == 8] == [
        (1, 0.0, INTERPOLATED),
        (2, 8.0, GIVEN),
        (3, 16.0, INTERPOLATED),
        (4, 24.0, INTERPOLATED),
    ]
    assert cells(region(known, flow=still(5, x=8.0))) == [[1, 1, n] for n in range(4)]


def test_outlines_of_one_instance_are_filled_together() -> None:
    square = ((8.0, 8.0), (47.0, 8.0), (47.0, 31.0), (8.0, 31.0))
    other = ((16.0, 8.0), (63.0, 8.0), (63.0, 31.0), (16.0, 31.0))  # overlaps the first
    far = ((72.0, 40.0), (79.0, 40.0), (79.0, 47.0))
    known = clip(polygons=tuple(Polygon(0, points, "hook", "a") for points in (square, other, far)))
    assert cells(region(known)[0]) == [*([r, c] for r in (1, 2, 3) for c in range(1, 8)), [5, 9]]
    assert not region(known)[1].any(), "without flow nothing is said of the other frames"


def test_outlines_follow_the_scaling_to_parts_of_a_pixel() -> None:
    fit = Fit.cover((128, 192), (64, 96))
    points = ((16.0, 16.0), (31.0, 16.0), (31.0, 31.0), (16.0, 31.0))
    assert cells(region(clip(polygons=(Polygon(0, points),)), fit=fit)) == [[0, 1, 1]]


def test_a_mask_is_moved_by_the_flow_to_the_frames_that_have_none(tmp_path: Path) -> None:
    mask = np.zeros((64, 96), np.uint8)
    mask[8:16, 8:16] = 3  # an index of a class counts as well as 255
    cv2.imwrite(str(tmp_path / "0.png"), mask)
    cv2.imwrite(str(tmp_path / "000008.png"), np.roll(mask, 64, axis=1))
    known = clip(masks=tmp_path, boxes=(Box(3, 0.0, 56.0, 8.0, 8.0),))
    found = region(known, frames=9, flow=still(9, x=8.0))
    assert cells(found[0]) == [[1, 1]]
    assert cells(found[1]) == [[1, n] for n in (2, 3, 4, 5)] and cells(found[2]) == [
        [1, n] for n in (6, 7, 8, 9)
    ]
    alone = region(known, frames=9)
    assert cells(alone) == [[0, 1, 1], [1, 7, 0], [2, 1, 9]], "without flow only the box and the masks"
    late = region(known, frames=29, flow=still(29))
    assert late[6].any() and not late[7].any(), "a mask is moved for 16 frames and no further"


def test_an_empty_mask_says_that_there_is_nothing(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((64, 96), np.uint8))
    known = clip(masks=tmp_path, boxes=(Box(0, 0.0, 0.0, 8.0, 8.0), Box(1, 0.0, 0.0, 8.0, 8.0)))
    assert cells(region(known, flow=still(5))) == [[1, 0, 0]], "its own frame; the box holds for the next"


def test_a_stack_of_masks_is_the_region_of_its_frames(tmp_path: Path) -> None:
    masks = np.zeros((12, 64, 96), np.uint8)
    for frame in range(12):
        masks[frame, :8, 8 * frame : 8 * frame + 8] = 255
    cv2.imwrite(str(tmp_path / "m.png"), masks.reshape(-1, 96))
    known = clip(masks=tmp_path / "m.png", tips=(Tip(0, 90.0, 60.0),))
    assert cells(region(known)) == [[0, 0, 0], *([1, 0, n] for n in (1, 2, 3, 4))]
    assert cells(region(known, step=2)) == [[0, 0, 0], *([1, 0, n] for n in (2, 4, 6, 8))]
    shifted = replace(known, masks_from=20)
    found = latent_region(shifted, range(23, 28), SAME, read_masks(shifted, 64, 96), Marks([], []), None)
    assert found is not None and cells(found) == [[0, 0, 3], *([1, 0, n] for n in (4, 5, 6, 7))]


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    cv2.imwrite(str(path), np.zeros((10 * 64, 96), np.uint8))
    known = clip(masks=path)
    cases = [
        (known, range(13), r"^clips\.jsonl:1: there are 10 masks, but 13 frames are used: .*m\.png$"),
        (replace(known, masks_from=3), range(1, 6), "begin with frame 3, but frame 1 is used"),
        (replace(known, masks=tmp_path / "n.png"), range(5), "no such file or folder of masks"),
    ]
    for one, indices, cause in cases:
        with pytest.raises(WanmoeError, match=cause):
            latent_region(one, indices, SAME, read_masks(one, 64, 96), Marks([], []), None)
    with pytest.raises(WanmoeError, match="the masks are 640 x 96, not frames of 62 x 96"):
        read_masks(known, 62, 96)
    path.write_bytes(b"no picture")
    with pytest.raises(WanmoeError, match="not a picture that can be decoded"):
        read_masks(known, 64, 96)


def test_a_folder_of_masks_that_does_not_fit_is_named(tmp_path: Path) -> None:
    known = clip(masks=tmp_path)
    with pytest.raises(WanmoeError, match=r"clips\.jsonl:1: there is no \.png in the folder"):
        read_masks(known, 64, 96)
    cv2.imwrite(str(tmp_path / "0004.png"), np.zeros((32, 96), np.uint8))
    with pytest.raises(WanmoeError, match=r"the mask is 32 x 96, but the video is 64 x 96: .*0004\.png"):
        region(known)
    (tmp_path / "frame_5.png").write_bytes(b"")
    with pytest.raises(WanmoeError, match=r"named <frame of the video>\.png: .*frame_5\.png"):
        read_masks(known, 64, 96)


def test_marks_of_a_list_keep_instrument_and_track(tmp_path: Path) -> None:
    tip = {"frame": 1, "x": 5.0, "y": 6.5, "instrument": "hook", "track": "t1"}
    row = {"video_path": "v.mp4", "caption": "x", "tips": [tip], "boxes": [[0, 1, 2, 3, 4]]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(row) + "\n")
    (known,) = read_clip_list(tmp_path / "clips.jsonl")
    marks = window_marks(known, range(5), SAME, None)
    assert marks == Marks([Tip(1, 5.0, 6.5, "hook", "t1", GIVEN)], [Box(0, 1.0, 2.0, 3.0, 4.0)])


def test_one_mask_a_second_and_the_flow_give_nearly_the_true_region(tmp_path: Path) -> None:
    made = synth_clips(tmp_path / "c", clips=4, val=0, height=128, width=160, frames=33, seed=2)
    fit, shares = Fit.cover((128, 160), (128, 160)), []
    for known in read_clip_list(made):
        flow = clip_flow(read_video(known.video_path))
        masks = read_masks(known, 128, 160)
        assert masks is not None
        nothing = Marks([], [])
        truth = latent_region(known, range(33), fit, masks, nothing, None)
        folder = tmp_path / known.id
        folder.mkdir()
        for frame in range(0, 33, 16):
            cv2.imwrite(str(folder / f"{frame}.png"), masks[frame])
        few = replace(known, masks=folder)
        found = latent_region(few, range(33), fit, read_masks(few, 128, 160), nothing, flow)
        assert truth is not None and found is not None
        shares.append(float(((truth & found) > 0).sum() / ((truth | found) > 0).sum()))
    assert np.mean(shares) > 0.8


def test_what_clips_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording has a line for each of its windows, and one folder of masks for all of them."""
    (tmp_path / "masks").mkdir()
    frames = list(range(0, 300, 7))
    for frame in frames:
        cv2.imwrite(str(tmp_path / "masks" / f"{frame}.png"), np.full((64, 96), frame % 2, np.uint8))
    cv2.imwrite(str(tmp_path / "stack.png"), np.zeros((9 * 64, 96), np.uint8))
    listed: list[Path] = []
    decoded: list[str] = []
    glob, imdecode = Path.glob, cv2.imdecode
    monkeypatch.setattr(Path, "glob", lambda path, pattern: (listed.append(path), glob(path, pattern))[1])
    monkeypatch.setattr(cv2, "imdecode", lambda *given: (decoded.append(""), imdecode(*given))[1])
    read = MaskReader()
    for number in range(5):
        known = replace(clip(masks=tmp_path / "masks"), origin=f"clips.jsonl:{number}")
        masks = read(known, 64, 96)
        assert masks is not None and list(masks) == frames
    assert listed == [tmp_path / "masks"] and not decoded
    assert masks is not None and masks[7].all() and not masks[14].any() and len(decoded) == 2
    for number in range(5):
        stack = read(clip(masks=tmp_path / "stack.png", masks_from=number), 64, 96)
        assert stack is not None and list(stack) == list(range(number, number + 9))
    assert len(decoded) == 3
