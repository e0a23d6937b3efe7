"""Where instruments are against where they should be: tips, boxes and masks, matched one to one.

Letters: n marked in a frame, m found in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .scene import Scene, tip_side

Pair = tuple[Tensor, Tensor]

RADII = (5.0, 10.0, 20.0)
"""Pixels at which PCK is given."""
SHARE = 0.05
"""Of the picture's diagonal: the radius of the normalised PCK."""
_SLACK = 1e-3  # pixels: marks are stored with three decimals


class Share(NamedTuple):
    """So much `of` a clip; figures of clips are added up, so that each mark weighs the same."""

    hits: float
    of: float


def tip_errors(found: Tensor, true: Tensor) -> Tensor:
    """Pixels from each true tip [n, 2] to the one of `found` [m, 2] that is matched with it; infinite for a
    tip that is missed. The matching has the least sum of distances (Hungarian)."""
    out = torch.full((len(true),), torch.inf, dtype=torch.float64)
    if len(found) and len(true):
        distance = torch.cdist(true.double(), found.double())
        rows, cols = (torch.from_numpy(index) for index in linear_sum_assignment(distance.numpy()))
        out[rows] = distance[rows, cols]
    return out


def box_iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union [n, m] of boxes [n, 4] and [m, 4], each left, top, width, height."""
    one, other = one.double()[:, None], other.double()[None]
    first = torch.maximum(one[..., :2], other[..., :2])
    last = torch.minimum(one[..., :2] + one[..., 2:], other[..., :2] + other[..., 2:])
    shared = (last - first).clamp(min=0).prod(-1)
    return _ratio(shared, one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - shared)


def mask_iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union [n, m] of masks bool [n, H, W] and [m, H, W]."""
    flat, against = one.flatten(1).double(), other.flatten(1).double()
    shared = flat @ against.T
    return _ratio(shared, flat.sum(1)[:, None] + against.sum(1)[None] - shared)


def _ratio(shared: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, shared / whole.clamp(min=1e-12), torch.zeros_like(whole))


def best_overlaps(found: Tensor, true: Tensor, iou: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[n]: the overlap of each true mark with the one that is matched with it, 0 for a missed one; the
    matching has the largest sum."""
    out = torch.zeros(len(true), dtype=torch.float64)
    if len(found) and len(true):
        overlap = iou(true, found)
        rows, cols = (
            torch.from_numpy(index) for index in linear_sum_assignment(overlap.numpy(), maximize=True)
        )
        out[rows] = overlap[rows, cols]
    return out


def location_scores(found: Scene, true: Scene) -> dict[str, Share]:
    """What of the true marks of a clip is found at their place, over the frames that both know.

    Keys, where there are such marks: `tip_pck@5px`, `@10px`, `@20px` and `tip_pck@0.05diag` (the share of
    true tips with a found one within that radius; a missed one is wrong), `tip_iou` (of squares about the
    tips, a sixth of the picture's shorter side), `tip_extra` (found tips that match none, to one true tip),
    `box_iou`, `mask_iou`.
    """
    scores: dict[str, Share] = {}
    pairs = _known(found.tips, true.tips)
    if pairs:
        errors = torch.cat([tip_errors(own, other) for own, other in pairs])
        diagonal = float(torch.tensor(true.size, dtype=torch.float64).norm())
        radii = {f"tip_pck@{radius:g}px": radius for radius in RADII}
        for name, radius in (radii | {f"tip_pck@{SHARE:g}diag": SHARE * diagonal}).items():
            scores[name] = Share(float((errors <= radius + _SLACK).sum()), len(errors))
        side = tip_side(true.size)
        scores["tip_iou"] = _overlap_share(
            [(_squares(a, side), _squares(b, side)) for a, b in pairs], box_iou
        )
        extra = sum(max(0, len(own) - len(other)) for own, other in pairs)
        scores["tip_extra"] = Share(extra, len(errors))
    if boxes := _known(found.boxes, true.boxes):
        scores["box_iou"] = _overlap_share(boxes, box_iou)
    if masks := _known(found.masks, true.masks):
        scores["mask_iou"] = _overlap_share(masks, mask_iou)
    return {name: share for name, share in scores.items() if share.of}


def _known(found: Sequence[Tensor | None], true: Sequence[Tensor | None]) -> list[Pair]:
    """The frames of which both sides know something."""
    pairs = zip(found, true, strict=False)
    return [(own, other) for own, other in pairs if own is not None and other is not None]


def _overlap_share(pairs: Sequence[Pair], iou: Callable[[Tensor, Tensor], Tensor]) -> Share:
    overlaps = torch.cat([best_overlaps(own, other, iou) for own, other in pairs])
    return Share(float(overlaps.sum()), len(overlaps))


def _squares(tips: Tensor, side: float) -> Tensor:
    return torch.cat([tips - side / 2, torch.full_like(tips, side)], 1)
