"""Annotations of a clip on the grid of its latent: where the instrument is, and its tip.

Letters: F, H, W frames, height, width of the clip in pixels; latent frames are (F - 1) / 4 + 1, latent pixels
8 x 8.
"""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ...moe_lora.video import Fit
from .clips import Clip

_TIP_RADIUS = 0.08  # of the shorter side: the region about a tip where neither mask nor box is given
Row = tuple[float, ...]


def latent_region(
    clip: Clip, indices: Sequence[int], fit: Fit, masks: NDArray[np.uint8] | None
) -> Tensor | None:
    """The instrument's region on the latent grid, uint8 [(F - 1) / 4 + 1, H / 8, W / 8] of 0 and 255.

    From the masks where there are any, else the boxes, else discs about the tips; None where nothing is
    annotated. `indices` are the file frames of the window, `fit` how they were scaled and cut.
    """
    picture = np.zeros((len(indices), fit.height, fit.width), np.uint8)
    if masks is not None:
        for place, index in enumerate(indices):
            picture[place] = fit.picture(masks[index - clip.masks_from], nearest=True)
    elif clip.boxes:
        for row, _, x, y, w, h in _track([box[:5] for box in clip.boxes], indices):
            left, top = fit.point(x, y)
            right, bottom = fit.point(x + w - 1, y + h - 1)
            corners = [(round(left), round(top)), (round(right), round(bottom))]
            cv2.rectangle(picture[int(row)], corners[0], corners[1], 255, -1)
    elif clip.tips:
        radius = max(1, round(_TIP_RADIUS * min(fit.height, fit.width)))
        for place, tip_x, tip_y in window_tips(clip, indices, fit):
            cv2.circle(picture[place], (round(tip_x), round(tip_y)), radius, 255, -1)
    else:
        return None
    return pool(torch.from_numpy(picture))


def pool(masks: Tensor) -> Tensor:
    """Masks [F, H, W] on the latent grid by maximum: cells of 8 x 8; the first frame, then groups of 4."""
    frames, height, width = masks.shape
    cells = masks.reshape(frames, height // 8, 8, width // 8, 8).amax(dim=(2, 4))
    groups = cells[1:].reshape((frames - 1) // 4, 4, height // 8, width // 8).amax(dim=1)
    return torch.cat([cells[:1], groups])


def window_tips(clip: Clip, indices: Sequence[int], fit: Fit) -> list[tuple[int, float, float]]:
    """Rows (frame of the window, x, y) in pixels of the window; tips that the cut removed are left out."""
    rows = []
    for place, _, x, y in _track([tip[:3] for tip in clip.tips], indices):
        new_x, new_y = fit.point(x, y)
        if -0.5 <= new_x < fit.width - 0.5 and -0.5 <= new_y < fit.height - 0.5:
            rows.append((int(place), round(new_x, 3), round(new_y, 3)))
    return rows


def read_masks(clip: Clip, height: int, width: int) -> NDArray[np.uint8] | None:
    """The clip's masks, uint8 [F, H, W] with 255 inside; `WanmoeError` where they do not fit the video."""
    if clip.masks is None:
        return None
    if not clip.masks.is_file():
        raise WanmoeError(f"{clip.origin}: no such file of masks: {clip.masks}")
    data = np.frombuffer(clip.masks.read_bytes(), np.uint8)
    stack = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None
    if stack is None:
        raise WanmoeError(f"{clip.origin}: the masks are not a picture that can be decoded: {clip.masks}")
    if stack.shape[1] != width or stack.shape[0] % height:
        raise WanmoeError(
            f"{clip.origin}: the masks are {stack.shape[0]} x {stack.shape[1]}, "
            f"not frames of {height} x {width} stacked vertically: {clip.masks}"
        )
    return np.where(stack.reshape(-1, height, width) > 0, 255, 0).astype(np.uint8)


def _track(rows: Iterable[Row], indices: Sequence[int]) -> list[Row]:
    """Rows (frame, ...) of the window as (place in the window, frame, ...), gaps filled linearly.

    A gap is filled only between two frames with one row each: with more it is not known which belongs to
    which.
    """
    by_frame: dict[int, list[Row]] = {}
    for row in rows:
        by_frame.setdefault(int(row[0]), []).append(row)
    known = sorted(by_frame)
    out: list[Row] = []
    for place, index in enumerate(indices):
        if index in by_frame:
            out += [(place, *row) for row in by_frame[index]]
            continue
        after = int(np.searchsorted(known, index))
        if 0 < after < len(known):
            left, right = by_frame[known[after - 1]], by_frame[known[after]]
            if len(left) == len(right) == 1:
                share = (index - left[0][0]) / (right[0][0] - left[0][0])
                out.append((place, *(a + share * (b - a) for a, b in zip(left[0], right[0], strict=True))))
    return out
