"""What is said of judgements: accuracy, confusion, and the share of tips found (PCK).

Letters: B clips, F latent frames, N tips marked in a frame, K classes.

The moment of a latent frame: it holds pixel frames 4 k - 3 to 4 k, and stands for the last of them, 4 k, as
the flow between latent frames does (`train/data/flow.py`). The stand-in codec keeps the mean of the four in
every band and their change in luma, so the middle of the four could be expected to be found best. It is not:
on synthetic scenes, whose tips move 3 px a frame, a detector of frame 4 k, of the mean of the four and of
frame 4 k - 1.5 found 80, 80 and 82 % of 240 held-out tips within 8 px.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...moe_lora.wan.codec import TIME_STRIDE

FOUND = 0.1
"""Confidence from which a tip counts as found at all."""


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of clips whose predicted class has the largest weight of the label; NaN without clips.

    `predicted` [B] class indices, `labels` [B, K] weights; where two classes of a label weigh the same, each
    of them is right.
    """
    if not len(predicted):
        return math.nan
    chosen = labels.gather(1, predicted.to(labels.device)[:, None])[:, 0]
    return float((chosen >= labels.amax(1)).float().mean())


def confusion(predicted: Tensor, labels: Tensor) -> Tensor:
    """[K, K]: clips of the class of the row that were judged to be the class of the column.

    A clip of several labels counts in each of their rows by its weight, so the sum is the number of clips.
    """
    chosen = torch.nn.functional.one_hot(predicted.to(labels.device), labels.shape[1])
    return labels.T @ chosen.to(labels.dtype)


def interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval (Wilson) of a share that was measured on `count` clips; (0, 1) without any."""
    if not count or math.isnan(share):
        return 0.0, 1.0
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def true_tips(meta: Mapping[str, Any], frames: int) -> Tensor:
    """[F, N, 2]: (x, y) in pixels of the tips marked at the moment of each of `frames` latent frames.

    `meta` is the JSON part of a sample. N is the most that any frame has, 1 at least; NaN fills what is not
    marked, which may be a tip out of the picture or one that nobody marked.
    """
    marked: list[list[tuple[float, float]]] = [[] for _ in range(frames)]
    for tip in meta.get("tips") or ():
        at, between = divmod(int(tip["frame"]), TIME_STRIDE)
        if not between and at < frames:
            marked[at].append((float(tip["x"]), float(tip["y"])))
    out = torch.full((frames, max(1, *map(len, marked)), 2), math.nan)
    for at, tips in enumerate(marked):
        if tips:
            out[at, : len(tips)] = torch.tensor(tips)
    return out


def pad_tips(clips: list[Tensor]) -> Tensor:
    """Tips of clips of one length, [F, N, 2] each, as [B, F, N, 2] with the largest N; NaN fills."""
    most = max(tips.shape[1] for tips in clips)
    return torch.stack(
        [torch.nn.functional.pad(tips, (0, 0, 0, most - tips.shape[1]), value=math.nan) for tips in clips]
    )


def tip_errors(predicted: Tensor, truth: Tensor, found: float = FOUND) -> Tensor:
    """Distance in pixels from each predicted tip to the nearest marked one of its frame, [n], for the n
    frames in which a tip is marked; infinite where the tip was missed (confidence below `found`).

    `predicted` [B, F, 3] (x, y, confidence), `truth` [B, F, N, 2], NaN where nothing is marked. Frames
    without a mark are left out: whether a tip is there was not said, so a false alarm is not counted.
    """
    truth = truth.to(predicted)
    apart = (predicted[..., None, :2] - truth).norm(dim=-1)
    marked = ~truth.isnan().any(-1)
    nearest = torch.where(marked & ~apart.isnan(), apart, math.inf).amin(-1)
    nearest = torch.where(predicted[..., 2] >= found, nearest, math.inf)
    return nearest[marked.any(-1)]


def pck(predicted: Tensor, truth: Tensor, radius_px: float, found: float = FOUND) -> float:
    """Percentage of correct keypoints, as a share: marked frames whose predicted tip lies within `radius_px`.

    A missed tip counts as wrong. One tip is predicted per frame; where several are marked the nearest counts.
    Shapes as of `tip_errors`; NaN where no frame has a mark.
    """
    errors = tip_errors(predicted, truth, found)
    return float((errors <= radius_px).float().mean()) if len(errors) else math.nan
