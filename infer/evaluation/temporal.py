"""How steady a clip is: each frame against the one before it, carried along by the clip's own motion.

What moves is no fault; what flickers, melts or jumps is. Points that were hidden a frame earlier do not
count, nor do those outside of the instruments' region where that is known.

Letters: F, H, W frames, height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ...moe_lora.motion import ClipFlow, clip_flow
from .scene import Scene

Distance = Callable[[Tensor, Tensor], Tensor]
"""Pictures [N, 3, H, W] in [-1, 1] and others -> how far they look apart at each pixel, [N, H, W]: LPIPS."""

BEST_PSNR = 100.0
"""dB of a clip that its motion explains exactly."""
_MARGIN = 32  # pixels about the region that are looked at too: SSIM's window, and LPIPS' first layers
_FEWEST = 16  # pixels of a frame that must count for it to be measured


def temporal_scores(
    scene: Scene, lpips: Distance | None = None, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """`warped_psnr` in dB and `warped_ssim`, with `lpips` also `warped_lpips`; means over the pairs of
    neighbouring frames, PSNR of their mean error. {} where no pair has enough points that count.

    Points count that are seen in both frames (forward-backward check) and lie in the region of the later one
    (`Scene.region`); a frame of which no region is known counts in a clip alone that has none at all, and
    then everywhere.
    """
    height, width = scene.size
    even = scene.frames[:, : height // 8 * 8, : width // 8 * 8]
    if len(even) < 2 or min(even.shape[1:3]) < 16:
        return {}
    flow = clip_flow(even.contiguous())
    errors, similar, apart = [], [], []
    for index, region in enumerate(scene.region()[1:]):
        before, now = even[index], even[index + 1]
        counts = _grown(flow.visible[index].astype(np.uint8), flow.scale).astype(bool)
        if region is None and scene.marked:
            continue
        if region is not None:
            counts &= region.numpy()[: counts.shape[0], : counts.shape[1]]
        if counts.sum() < _FEWEST:
            continue
        view = _about(counts)
        warped = _carried(before.numpy(), flow, index)[view]
        counted, later = torch.from_numpy(counts[view]), now.numpy()[view].astype(np.float32)
        # What does not count is made equal, so that it is in no window of what does.
        warped = np.where(counted.numpy()[..., None], warped, later)
        own, other = (torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in (warped, later))
        errors.append(float((own - other).square().mean(1)[0][counted].mean()))
        similar.append(float(_ssim(own.to(device), other.to(device))[0].cpu()[counted].mean()))
        if lpips is not None:
            apart.append(float(lpips(own / 127.5 - 1, other / 127.5 - 1)[0][counted].mean()))
    if not errors:
        return {}
    scores = {"warped_psnr": psnr(float(np.mean(errors))), "warped_ssim": float(np.mean(similar))}
    return scores | ({"warped_lpips": float(np.mean(apart))} if apart else {})


def psnr(error: float) -> float:
    """dB of a mean squared error in grey levels; at most BEST_PSNR."""
    return BEST_PSNR if error <= 0 else min(BEST_PSNR, 10 * math.log10(255**2 / error))


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    """SSIM at each pixel, [N, H, W], of pictures [N, 3, H, W] in grey levels (Wang et al., 2004)."""
    _, full = structural_similarity_index_measure(
        one, other, data_range=255.0, return_full_image=True, reduction="none"
    )
    return torch.as_tensor(full).mean(1)


def _carried(picture: np.ndarray, flow: ClipFlow, index: int) -> np.ndarray:
    """The frame `index` where the flow puts it in the next one, fp32 [H, W, 3]."""
    height, width = picture.shape[:2]
    field = flow.backward[index]
    if flow.scale > 1:
        field = np.stack(
            [cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR) for part in field]
        )
    rows, cols = np.mgrid[0:height, 0:width].astype(np.float32)
    moved = cv2.remap(
        picture.astype(np.float32),
        cols + field[0],
        rows + field[1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(moved, np.float32)


def _grown(grid: np.ndarray, scale: int) -> np.ndarray:
    return grid.repeat(scale, 0).repeat(scale, 1)


def _about(counts: np.ndarray) -> tuple[slice, slice]:
    """The smallest cut that holds what counts, with a margin."""
    spans = []
    for axis in (1, 0):
        inside = np.flatnonzero(counts.any(axis))
        low, high = max(0, int(inside[0]) - _MARGIN), int(inside[-1]) + 1 + _MARGIN
        spans.append(slice(low, min(counts.shape[1 - axis], high)))
    return spans[0], spans[1]
