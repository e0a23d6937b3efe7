"""What a trained judge gets right on clips that it has not seen, as JSON values.

"Noise" is the level t of the x0-guess that is judged (`linear_guess`); 0 is the clip itself.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .examples import Clips, View
from .judge import Classifier, Detector
from .measures import FOUND, accuracy, confusion, interval, tip_errors
from .nets import widened

LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8)
RADII = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Pixels at which PCK is given."""
_BATCH = 16


@torch.no_grad()
def classifier_figures(
    judge: Classifier, clips: Clips, view: View, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Figures of a classifier.

    Keys: `clips`; `accuracy` and `accuracy_region`, without and with the region given (None where no clip
    has one); `interval`, the 95 % interval of the former; `chance`, what always naming the most frequent
    class would get; `by_noise`, a row per level with both accuracies; `by_class`, the share of right ones of
    the clips of each class (None without any); `confusion`, rows the label, columns the judgement, without a
    region; `looks_at_region`, the share of its weight that it puts into the region when it is not told where
    that is.
    """
    labels = clips.labels[[n for batch in clips.batches(_BATCH) for n in batch]]
    rows, clean = [], torch.zeros(0, dtype=torch.long)
    share: list[Tensor] = []
    for t in LEVELS:
        told, untold, known = [], [], []
        for picks in clips.batches(_BATCH):
            found = clips.whole(picks, view, t)
            roi = found.roi.to(device)
            logits, weights = judge.weigh(found.x.to(device))
            untold.append(logits.argmax(1).cpu())
            known.append(found.roi.amax((1, 2, 3)) > 0)
            told.append(judge.predict(found.x.to(device), roi).cpu())
            if t == 0:
                share.append((weights * widened(roi)).sum((1, 2, 3)).cpu()[known[-1]])
        has = torch.cat(known)
        if t == 0:
            clean = torch.cat(untold)
        rows.append(
            {
                "t": t,
                "accuracy": accuracy(torch.cat(untold), labels),
                "accuracy_region": _or_none(accuracy(torch.cat(told)[has], labels[has])),
            }
        )
    table = confusion(clean, labels)
    frequent = int(labels.sum(0).argmax())
    return {
        "clips": len(clips),
        "accuracy": rows[0]["accuracy"],
        "accuracy_region": rows[0]["accuracy_region"],
        "interval": list(interval(float(rows[0]["accuracy"] or 0.0), len(clips))),
        "chance": accuracy(torch.full((len(labels),), frequent), labels),
        "by_noise": rows,
        "by_class": {
            name: _or_none(float(table[n, n] / table[n].sum())) for n, name in enumerate(judge.classes)
        },
        "confusion": table.tolist(),
        "looks_at_region": _or_none(float(torch.cat(share).mean())),
    }


def detector_figures(judge: Detector, clips: Clips, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Figures of a detector.

    Keys: `clips`; `frames`, latent frames with a marked tip; `pck`, the share of them whose tip was found
    within 8 px; `interval`, the 95 % interval of that, as if each clip, not each frame, were a trial;
    `chance`, the same share for one fixed place, the mean of these very tips, which needs no looking;
    `median_px`, the median distance of the tips found; `missed`, the share of frames in which confidence
    stayed below 0.1; `by_noise`, a row per level with PCK at each of `radii`.
    """
    rows = []
    errors = torch.zeros(0)
    truths: list[Tensor] = []
    for t in LEVELS:
        parts = []
        for picks in clips.batches(_BATCH):
            found = clips.whole(picks, lambda latent: latent, t)
            truths += [found.tips] if t == 0 else []
            parts.append(tip_errors(judge.tips(found.x.to(device)).cpu(), found.tips, FOUND))
        all_errors = torch.cat(parts)
        errors = all_errors if t == 0 else errors
        rows.append({"t": t, "pck": _curve(all_errors, RADII)})
    pck = float((errors <= 8).float().mean())
    found_ones = errors[errors.isfinite()]
    return {
        "clips": len(clips),
        "frames": len(errors),
        "pck": pck,
        "interval": list(interval(pck, len(clips))),
        "chance": _fixed_place(truths),
        "median_px": _or_none(float(found_ones.median()) if len(found_ones) else math.nan),
        "missed": float(errors.isinf().float().mean()),
        "radii": list(RADII),
        "by_noise": rows,
    }


def _fixed_place(truths: Sequence[Tensor], radius: float = 8.0) -> float:
    """PCK of naming the mean of the marked tips in every frame."""
    tips = torch.cat([truth.flatten(0, 2) for truth in truths])
    place = torch.cat([tips.nanmean(0), torch.ones(1)])
    errors = [tip_errors(place.expand(*truth.shape[:2], 3), truth) for truth in truths]
    return float((torch.cat(errors) <= radius).float().mean())


def _curve(errors: Tensor, radii: Sequence[int]) -> list[float]:
    return [float((errors <= radius).float().mean()) for radius in radii]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
