"""FDS, GATC and TCD, as the evaluation of Cosmos-H-Surgical-Simulator defines them (NVIDIA, 2025,
scripts/README_EVALUATION.md): how far a clip that should repeat a true one is from it.

They make sense where the generated clip begins with the true clip's pictures (image to video, or a clip that
was noised and made again), not for clips that share a caption alone.

Letters: F, H, W frames, height and width in pixels, n instances in a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from .scene import Scene
from .tips import tip_errors

Grey = NDArray[np.float32]

DILATION, REACH = 10, 3
"""Pixels that GATC's masks grow by, and that the picture may be off by."""
FEWEST = 50
"""Pixels of a mask from which it counts."""
_PHASES = {"early": (0.0, 1 / 6), "mid": (1 / 6, 1 / 2), "late": (1 / 2, 1.0)}
# The original's frames 1 to 12, 13 to 36 and 37 to 72, as shares of a clip of any length.


def simulator_scores(made: Scene, true: Scene, device: str | torch.device = "cpu") -> dict[str, float]:
    """`fds` (with `fds_early`, `fds_mid`, `fds_late`) and `frame_ssim`; with masks of the true clip `gatc`,
    with masks of both `tcd`. Frame 0, which such a clip is given, is in none of FDS and SSIM."""
    scores = frame_decay(made.frames, true.frames, device)
    truth = true.masks
    if truth:
        unions = [None if masks is None else masks.any(0).numpy() for masks in truth]
        value = tool_consistency(made.frames, true.frames, unions)
        scores |= {} if value is None else {"gatc": value}
    if truth and made.masks:
        distance = centroid_distance(made.masks, truth, true.size)
        scores |= {} if distance is None else {"tcd": distance}
    return scores


def frame_decay(made: Tensor, true: Tensor, device: str | torch.device = "cpu") -> dict[str, float]:
    """Mean absolute difference of two clips uint8 [F, H, W, 3] in [-1, 1], as a whole and by phase, and their
    mean SSIM (Gaussian window). {} for a single frame."""
    length = min(len(made), len(true)) - 1
    if length < 1:
        return {}
    each, similar = [], []
    for pair in zip(made[1 : length + 1], true[1 : length + 1], strict=True):
        own, other = (frame.to(device).permute(2, 0, 1)[None].float() / 127.5 - 1 for frame in pair)
        each.append((own - other).abs().mean())
        similar.append(torch.as_tensor(structural_similarity_index_measure(own, other, data_range=2.0)))
    apart = torch.stack(each).cpu()
    scores = {"fds": float(apart.mean())}
    for name, (start, stop) in _PHASES.items():
        part = apart[round(start * length) : round(stop * length)]
        scores |= {f"fds_{name}": float(part.mean())} if len(part) else {}
    return scores | {"frame_ssim": float(torch.stack(similar).mean())}


def tool_consistency(made: Tensor, true: Tensor, masks: Sequence[NDArray[np.bool_] | None]) -> float | None:
    """GATC: whether the instrument is where the true clip has it and looks as it does there.

    The median over frames of the best correlation inside the true mask (grown by 10 px) of the true grey
    picture with the made one, up to a frame and 3 px off, times the share of the true edges that the made
    picture has there, at most 1. Clips uint8 [F, H, W, 3], masks bool [H, W]; None where no mask is large
    enough.
    """
    length = min(len(made), len(true), len(masks))
    greys = [_grey(made[index]) for index in range(length)]
    scores = []
    for index in range(length):
        mask = masks[index]
        if mask is None or not mask.any():
            continue
        grown = cv2.dilate(mask.astype(np.uint8), _DISC) > 0
        if grown.sum() < FEWEST:
            continue
        truth = _grey(true[index])
        best = max(
            _correlation(truth, greys[at], grown) for at in (index - 1, index, index + 1) if 0 <= at < length
        )
        edges = float(_edges(greys[index])[grown].mean()) / (float(_edges(truth)[grown].mean()) + 1e-6)
        scores.append(best * min(1.0, edges))
    return float(np.median(scores)) if scores else None


def centroid_distance(
    made: Sequence[Tensor | None], true: Sequence[Tensor | None], size: tuple[int, int]
) -> float | None:
    """TCD in pixels: from the middle of each true instance to that of the one matched with it, half the
    picture's diagonal for a missed one; the mean of a frame, the median over frames.

    Masks bool [n, H, W] by frame; None where no frame has a true instance.
    """
    miss = 0.5 * float(np.hypot(*size))
    frames = []
    for own, other in zip(made, true, strict=False):
        if own is None or other is None:
            continue
        truth = _middles(other)
        if len(truth):
            frames.append(float(tip_errors(_middles(own), truth).nan_to_num(posinf=miss).mean()))
    return float(np.median(frames)) if frames else None


_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * DILATION + 1, 2 * DILATION + 1))


def _correlation(truth: Grey, made: Grey, mask: NDArray[np.bool_]) -> float:
    """The highest zero-mean normalised correlation inside the mask over shifts of up to REACH pixels."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left, bottom, right = rows[0], cols[0], rows[-1] + 1, cols[-1] + 1
    wide = cv2.copyMakeBorder(made, REACH, REACH, REACH, REACH, cv2.BORDER_REPLICATE)
    window = wide[top : bottom + 2 * REACH, left : right + 2 * REACH]
    inside = mask[top:bottom, left:right].astype(np.float32)
    found = cv2.matchTemplate(window, truth[top:bottom, left:right], cv2.TM_CCOEFF_NORMED, mask=inside)
    # Where one of the two is flat there is no correlation; OpenCV then divides by about 0.
    sure = found[np.isfinite(found) & (np.abs(found) <= 1 + 1e-3)]
    return float(sure.max().clip(-1, 1)) if len(sure) else 0.0


def _grey(picture: Tensor) -> Grey:
    grey = np.asarray(cv2.cvtColor(picture.numpy(), cv2.COLOR_RGB2GRAY), np.float32)
    return grey / np.float32(255)


def _edges(grey: Grey) -> Grey:
    across, down = cv2.Sobel(grey, cv2.CV_32F, 1, 0, ksize=3), cv2.Sobel(grey, cv2.CV_32F, 0, 1, ksize=3)
    return np.asarray(cv2.magnitude(across, down), np.float32)


def _middles(masks: Tensor) -> Tensor:
    """(x, y) of the centroids of instances bool [n, H, W] that are large enough."""
    out = []
    for mask in masks:
        rows, cols = mask.nonzero(as_tuple=True)
        if len(rows) >= FEWEST:
            out.append(torch.stack([cols.double().mean(), rows.double().mean()]))
    return torch.stack(out) if out else torch.zeros(0, 2, dtype=torch.float64)
