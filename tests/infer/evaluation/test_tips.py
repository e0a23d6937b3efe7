"""Place of the instrument: known shifts give known values, missed and extra marks count as they should."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from wanmoe.infer.evaluation.scene import Scene, tip_side
from wanmoe.infer.evaluation.tips import (
    Share,
    best_overlaps,
    box_iou,
    location_scores,
    mask_iou,
    tip_errors,
)

H, W, F = 96, 128, 3


def scene(
    tips: list[Tensor | None] | None = None,
    boxes: list[Tensor | None] | None = None,
    masks: list[Tensor | None] | None = None,
) -> Scene:
    frames = torch.zeros(F, H, W, 3, dtype=torch.uint8)
    return Scene(
        "clip", frames, 8.0, tips=tuple(tips or ()), boxes=tuple(boxes or ()), masks=tuple(masks or ())
    )


def points(seed: int, count: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform((20, 20), (W - 20, H - 20), (count, 2)))


def values(found: Scene, true: Scene) -> dict[str, float]:
    return {key: share.hits / share.of for key, share in location_scores(found, true).items()}


def test_a_shift_of_five_pixels_is_within_five_and_not_within_four() -> None:
    tips = [points(n, 2) for n in range(F)]
    true = scene(list(tips))
    for x, y in ((5.0, 0.0), (3.0, 4.0), (-4.0, 3.0)):
        shift = torch.tensor([x, y], dtype=torch.float64)
        shifted = scene([one + shift for one in tips])
        found = values(shifted, true)
        assert found["tip_pck@5px"] == found["tip_pck@10px"] == found["tip_pck@20px"] == 1
        assert all((tip_errors(a + shift, a) > 4).all() for a in tips), "PCK@4 is 0"
        side = tip_side((H, W))
        assert side == 16
        shared = (side - abs(x)) * (side - abs(y))
        assert found["tip_iou"] == pytest.approx(shared / (2 * side**2 - shared))
        assert found["tip_extra"] == 0


def test_the_normalised_radius_is_a_twentieth_of_the_diagonal() -> None:
    radius = 0.05 * math.hypot(H, W)
    assert radius == pytest.approx(8.0)
    true = scene([points(0, 1)] * F)
    for apart, right in ((7.99, 1.0), (8.01, 0.0)):
        found = values(scene([points(0, 1) + torch.tensor([apart, 0.0])] * F), true)
        assert found["tip_pck@0.05diag"] == right


def test_identical_marks_are_perfect() -> None:
    masks = torch.zeros(2, H, W, dtype=torch.bool)
    masks[0, 10:30, 10:30], masks[1, 50:60, 70:90] = True, True
    one = scene([points(n, 2) for n in range(F)], [torch.tensor([[10.0, 10, 20, 20]])] * F, [masks] * F)
    found = values(one, one)
    assert found.pop("tip_extra") == 0
    assert len(found) == 7 and set(found.values()) == {1.0}


def test_missed_tips_are_wrong_and_extra_ones_are_counted() -> None:
    tips = points(0, 2)
    none = torch.zeros(0, 2, dtype=torch.float64)
    true = scene([tips, tips, None])
    shares = location_scores(scene([tips[:1], none, tips]), true)
    assert shares["tip_pck@5px"] == Share(1, 4), "a frame that nobody marked says nothing"
    assert shares["tip_iou"].hits == pytest.approx(1) and shares["tip_iou"].of == 4
    extra = location_scores(scene([torch.cat([tips, tips + 40]), tips, None]), true)
    assert extra["tip_extra"] == Share(2, 4) and extra["tip_pck@5px"] == Share(4, 4)
    assert location_scores(scene([None, None, tips]), true) == {}


def test_the_matching_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, m = rng.integers(1, 5, 2).tolist()
        true, found = (torch.from_numpy(rng.uniform(0, 50, (k, 2))) for k in (n, m))
        apart = torch.cdist(true, found)
        best = min(
            (
                sum(float(apart[r, c]) for r, c in zip(rows, cols, strict=True))
                for rows in itertools.combinations(range(n), min(n, m))
                for cols in itertools.permutations(range(m), min(n, m))
            ),
        )
        errors = tip_errors(found, true)
        assert float(errors[errors.isfinite()].sum()) == pytest.approx(best)
        assert int(errors.isinf().sum()) == max(0, n - m)


def test_overlap_of_boxes_and_masks_by_counting_cells() -> None:
    rng = np.random.default_rng(1)
    boxes = torch.from_numpy(rng.integers(0, 30, (6, 4)) + np.array([0, 0, 1, 1])).double()
    masks = torch.zeros(6, 64, 64, dtype=torch.bool)
    for mask, (x, y, w, h) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y : y + h, x : x + w] = True
    counted = torch.tensor([[float((a & b).sum() / (a | b).sum()) for b in masks] for a in masks]).double()
    torch.testing.assert_close(box_iou(boxes, boxes), counted, atol=1e-6, rtol=0)
    torch.testing.assert_close(mask_iou(masks, masks), counted, atol=1e-6, rtol=0)
    overlaps = best_overlaps(masks[[3, 1]], masks[:4], mask_iou)
    assert overlaps[1] == overlaps[3] == 1 and overlaps[0] == overlaps[2] == 0
    empty = torch.zeros(1, 64, 64, dtype=torch.bool)
    assert float(mask_iou(empty, empty)) == 0


def test_the_region_is_what_is_known_best() -> None:
    mask = torch.zeros(1, H, W, dtype=torch.bool)
    mask[0, 5:9, 7:11] = True
    box, tip = torch.tensor([[20.0, 30, 10, 6]]), torch.tensor([[64.0, 48.0]])
    by_mask = scene([tip] * F, [box] * F, [mask, None, torch.zeros(0, H, W, dtype=torch.bool)]).region()
    assert torch.equal(by_mask[0], mask[0]) and not by_mask[2].any()
    assert by_mask[1][30:36, 20:30].all() and by_mask[1].sum() == 60
    around = scene([tip, None, None]).region()
    assert around[1] is None and around[0].sum() == 256 and around[0][48, 64]
    rows, cols = around[0].nonzero(as_tuple=True)
    assert abs(float(rows.double().mean()) - 48) <= 0.5 and abs(float(cols.double().mean()) - 64) <= 0.5
