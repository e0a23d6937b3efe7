"""What a clip's annotations say of one of its windows: tips and boxes in its pixels, and the region of the
instruments on the grid of its latent.

Letters: F, H, W frames, height, width of the window in pixels; latent frames are (F - 1) / 4 + 1, latent
pixels 8 x 8. A place is a frame of the window, counted from 0.

A mask that is moved comes before boxes: with one mask a second of a synthetic scene its cells overlap the
true ones by 0.86 (IoU), those of exact boxes in every frame by 0.60.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ...moe_lora.motion import ClipFlow
from ...moe_lora.video import Fit
from .clips import INTERPOLATED, Box, Clip, Polygon, Tip
from .tracks import REACH, Mark, carry

Mask = NDArray[np.uint8]

_TIP_RADIUS = 0.08  # of the shorter side: the region about a tip where neither mask nor box is given
_SHIFT = 4  # bits of sub-pixel position that OpenCV's drawing takes


class Marks(NamedTuple):
    """Tips and boxes of a window, by frame, in frames and pixels of the window."""

    tips: list[Tip]
    boxes: list[Box]


def window_marks(clip: Clip, indices: Sequence[int], fit: Fit, flow: ClipFlow | None) -> Marks:
    """The clip's tips and boxes in a window, between key frames too (`carry`).

    `indices` are the file frames of the window, `fit` how they were scaled and cut, `flow` that of the
    window's frames. A mark of a frame that the window leaves out goes to the nearest one, as INTERPOLATED.
    Tips that the cut removed are left out; boxes are cut to the picture.
    """
    tips = carry(
        [tip._replace(x=x, y=y) for tip in _placed(clip.tips, indices) for x, y in [fit.point(tip.x, tip.y)]],
        flow,
        len(indices),
    )
    boxes = carry([_scaled(box, fit) for box in _placed(clip.boxes, indices)], flow, len(indices))
    seen = [tip for tip in tips if -0.5 <= tip.x < fit.width - 0.5 and -0.5 <= tip.y < fit.height - 0.5]
    cut = (_cut(box, fit) for box in boxes)
    return Marks(
        [tip._replace(x=round(tip.x, 3), y=round(tip.y, 3)) for tip in seen],
        [box for box in cut if box is not None],
    )


def latent_region(
    clip: Clip,
    indices: Sequence[int],
    fit: Fit,
    masks: Mapping[int, Mask] | None,
    marks: Marks,
    flow: ClipFlow | None,
) -> Tensor | None:
    """`window_region` on the latent grid, uint8 [(F - 1) / 4 + 1, H / 8, W / 8] of 0 and 255."""
    region = window_region(clip, indices, fit, masks, marks, flow)
    return None if region is None else pool(region)


def window_region(
    clip: Clip,
    indices: Sequence[int],
    fit: Fit,
    masks: Mapping[int, Mask] | None,
    marks: Marks,
    flow: ClipFlow | None,
) -> Tensor | None:
    """The instruments' region in each frame of a window, uint8 [F, H, W] of 0 and 255.

    A frame's region is its mask, else its polygons, else the nearest of either within a second, moved by the
    median flow inside, else its boxes, else discs about its tips. None where the clip has no annotation at
    all. `masks` come from `MaskReader`, `marks` from `window_marks`; without `flow` nothing is moved. Raises
    `WanmoeError` where a stack of masks does not cover the window.
    """
    if masks is None and not (clip.polygons or clip.boxes or clip.tips):
        return None
    _check_stack(clip, indices, masks)
    picture = np.zeros((len(indices), fit.height, fit.width), np.uint8)
    outlines = _outlines(clip, indices, fit, masks or {})
    outlined = set()
    for place in range(len(indices)):
        near = place if place in outlines else _to_move(outlines, place, flow)
        if near is not None:
            picture[place] = _moved(outlines[near], near, place, flow)
            outlined.add(place)
    for box in marks.boxes:
        if box.frame not in outlined:
            right, bottom = round(box.x + box.width - 1), round(box.y + box.height - 1)
            cv2.rectangle(picture[box.frame], (round(box.x), round(box.y)), (right, bottom), 255, -1)
    boxed = {box.frame for box in marks.boxes}
    radius = max(1, round(_TIP_RADIUS * min(fit.height, fit.width)))
    for tip in marks.tips:
        if tip.frame not in outlined and tip.frame not in boxed:
            cv2.circle(picture[tip.frame], (round(tip.x), round(tip.y)), radius, 255, -1)
    return torch.from_numpy(picture)


def pool(masks: Tensor) -> Tensor:
    """Masks [F, H, W] on the latent grid by maximum: cells of 8 x 8; the first frame, then groups of 4."""
    frames, height, width = masks.shape
    cells = masks.reshape(frames, height // 8, 8, width // 8, 8).amax(dim=(2, 4))
    groups = cells[1:].reshape((frames - 1) // 4, 4, height // 8, width // 8).amax(dim=1)
    return torch.cat([cells[:1], groups])


class MaskReader:
    """Reads the masks of clips; what many clips share is read once.

    The names in a folder are kept for all folders, the pictures of a stack for the last one alone.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, dict[int, Path]] = {}
        self._stack: tuple[Path, Mask] | None = None

    def __call__(self, clip: Clip, height: int, width: int) -> Mapping[int, Mask] | None:
        """The clip's masks by frame of the video, uint8 [H, W] with 255 inside; None where it has none.

        A stack is read at once and a folder picture by picture, when asked for. Raises `WanmoeError` where
        they are missing or do not fit the video.
        """
        if clip.masks is None:
            return None
        if clip.masks.is_dir():
            if clip.masks not in self._folders:
                self._folders[clip.masks] = _numbered(clip, clip.masks)
            return _MaskFolder(clip, self._folders[clip.masks], (height, width))
        if self._stack is None or self._stack[0] != clip.masks:
            self._stack = (clip.masks, _decode(clip, clip.masks))
        stack = self._stack[1]
        if stack.shape[1] != width or stack.shape[0] % height:
            raise WanmoeError(
                f"{clip.origin}: the masks are {stack.shape[0]} x {stack.shape[1]}, "
                f"not frames of {height} x {width} stacked vertically: {clip.masks}"
            )
        return {clip.masks_from + place: mask for place, mask in enumerate(stack.reshape(-1, height, width))}


def _numbered(clip: Clip, folder: Path) -> dict[int, Path]:
    """The pictures in a folder of masks by frame, rising."""
    paths: dict[int, Path] = {}
    for path in folder.glob("*.png"):
        if not (path.stem.isascii() and path.stem.isdecimal()):
            raise WanmoeError(f"{clip.origin}: masks in a folder are named <frame of the video>.png: {path}")
        paths[int(path.stem)] = path
    if not paths:
        raise WanmoeError(f"{clip.origin}: there is no .png in the folder of masks: {folder}")
    return dict(sorted(paths.items()))


class _MaskFolder(Mapping[int, Mask]):
    """Masks in a folder of `<frame of the video>.png`."""

    def __init__(self, clip: Clip, paths: dict[int, Path], size: tuple[int, int]) -> None:
        self.clip, self.paths, self.size = clip, paths, size

    def __getitem__(self, frame: int) -> Mask:
        mask = _decode(self.clip, self.paths[frame])
        if mask.shape != self.size:
            raise WanmoeError(
                f"{self.clip.origin}: the mask is {mask.shape[0]} x {mask.shape[1]}, "
                f"but the video is {self.size[0]} x {self.size[1]}: {self.paths[frame]}"
            )
        return mask

    def __iter__(self) -> Iterator[int]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def _decode(clip: Clip, path: Path) -> Mask:
    if not path.is_file():
        raise WanmoeError(f"{clip.origin}: no such file or folder of masks: {path}")
    data = np.frombuffer(path.read_bytes(), np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None
    if picture is None:
        raise WanmoeError(f"{clip.origin}: the masks are not a picture that can be decoded: {path}")
    return np.where(picture > 0, 255, 0).astype(np.uint8)


def _check_stack(clip: Clip, indices: Sequence[int], masks: Mapping[int, Mask] | None) -> None:
    """A folder may have gaps; a stack without a mask for each frame belongs to other frames."""
    if masks is None or isinstance(masks, _MaskFolder):
        return
    if indices[0] < clip.masks_from:
        raise WanmoeError(
            f"{clip.origin}: the masks begin with frame {clip.masks_from}, but frame {indices[0]} is used: "
            f"{clip.masks}"
        )
    needed = indices[-1] + 1 - clip.masks_from
    if len(masks) < needed:
        raise WanmoeError(
            f"{clip.origin}: there are {len(masks)} masks, but {needed} frames are used: {clip.masks}"
        )


def _outlines(clip: Clip, indices: Sequence[int], fit: Fit, masks: Mapping[int, Mask]) -> dict[int, Mask]:
    """The window's masks by place, drawn polygons where there is no mask."""
    drawn: dict[int, list[Polygon]] = {}
    for polygon in clip.polygons:
        drawn.setdefault(polygon.frame, []).append(polygon)
    out = {place: outline(drawn[frame], fit) for place, frame in _nearest(sorted(drawn), indices).items()}
    for place, frame in _nearest(list(masks), indices).items():
        out[place] = fit.picture(masks[frame], nearest=True)
    return out


def outline(polygons: Iterable[Polygon], fit: Fit) -> Mask:
    """Polygons as a mask of the window, filled one by one: together they would cut holes where they meet."""
    mask = np.zeros((fit.height, fit.width), np.uint8)
    for polygon in polygons:
        corners = np.array([fit.point(x, y) for x, y in polygon.points]) * 2**_SHIFT
        cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 255, cv2.LINE_8, _SHIFT)
    return mask


def _to_move(outlines: Mapping[int, Mask], place: int, flow: ClipFlow | None) -> int | None:
    """The nearest frame whose outline tells where the instruments are at `place`; the earlier of two."""
    near = min(outlines, key=lambda known: (abs(known - place), known), default=None)
    if flow is None or near is None or abs(near - place) > REACH or not outlines[near].any():
        return None
    return near


def _moved(mask: Mask, start: int, stop: int, flow: ClipFlow | None) -> Mask:
    """A mask of the frame `start` shifted to the frame `stop` by the median motion of what is inside."""
    if start == stop or flow is None or not mask.any():
        return mask
    shift = np.zeros(2)
    way = 1 if stop > start else -1
    for frame in range(start, stop, way):
        inside = _shifted(mask, shift)[:: flow.scale, :: flow.scale] > 0
        if not inside.any():
            break
        shift += np.median(flow.field(frame, frame + way)[:, inside], axis=1)
    return _shifted(mask, shift)


def _shifted(mask: Mask, shift: NDArray[np.float64]) -> Mask:
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]])
    moved = cv2.warpAffine(mask, matrix, mask.shape[::-1], flags=cv2.INTER_NEAREST)
    return np.asarray(moved, dtype=np.uint8)


def _nearest(frames: Sequence[int], indices: Sequence[int]) -> dict[int, int]:
    """Place in the window -> the known frame of the file that it shows, else the nearest to it alone.

    `frames` rise.
    """
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    half = (indices[-1] - indices[0]) / max(1, len(indices) - 1) / 2
    out: dict[int, int] = {}
    near = slice(bisect_left(frames, indices[0] - half), bisect_right(frames, indices[-1] + half))
    for frame in frames[near]:
        after = bisect_left(indices, frame)
        index = min(indices[max(0, after - 1) : after + 1], key=lambda index: abs(index - frame))
        for place in places[index] if index == frame else places[index][:1]:
            if place not in out or abs(frame - index) < abs(out[place] - index):
                out[place] = frame
    return out


def _placed(marks: Sequence[Mark], indices: Sequence[int]) -> Iterator[Mark]:
    """The marks with places for frames; some before and after the window too, for `carry` to start from."""
    step = (indices[-1] - indices[0]) / max(1, len(indices) - 1)
    ahead: list[int] = [round(step * n) for n in range(1, 2 * REACH + 1)] if step > 0 else []
    wide = [*(indices[0] - n for n in reversed(ahead)), *indices, *(indices[-1] + n for n in ahead)]
    groups: dict[tuple[str, str], dict[int, list[Mark]]] = {}
    for mark in marks:
        group = groups.setdefault((mark.instrument, mark.track), {})
        group.setdefault(mark.frame, []).append(mark)
    for group in groups.values():
        for place, frame in _nearest(sorted(group), wide).items():
            for mark in group[frame]:
                kind = mark.kind if wide[place] == frame else INTERPOLATED
                yield mark._replace(frame=place - len(ahead), kind=kind)


def _scaled(box: Box, fit: Fit) -> Box:
    left, top = fit.point(box.x - 0.5, box.y - 0.5)
    right, bottom = fit.point(box.x + box.width - 0.5, box.y + box.height - 0.5)
    return box._replace(x=left + 0.5, y=top + 0.5, width=right - left, height=bottom - top)


def _cut(box: Box, fit: Fit) -> Box | None:
    """The part of a box that lies in the picture, whose edges are half a pixel outside its outer centres."""
    left, top = max(box.x, 0.0), max(box.y, 0.0)
    right, bottom = min(box.x + box.width, float(fit.width)), min(box.y + box.height, float(fit.height))
    if right <= left or bottom <= top:
        return None
    left, top, right, bottom = (round(edge, 3) for edge in (left, top, right, bottom))
    return box._replace(x=left, y=top, width=round(right - left, 3), height=round(bottom - top, 3))
