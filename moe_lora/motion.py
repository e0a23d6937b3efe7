"""Where things were a moment before: optical flow between frames, and what is seen in both.

Letters: F, H, W frames, height, width of the video in pixels; h, w the flow's own grid.

The flow is OpenCV's DIS (Kroeger et al., ECCV 2016), preset medium, at half size where the picture is large;
a point is seen in both moments where going back and forth returns to it (Sundaram, Brox and Keutzer, ECCV
2010).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Grey = NDArray[np.uint8]

_HALVED_FROM = 320  # a picture whose shorter side has as many pixels is halved for the search


class ClipFlow(NamedTuple):
    """Motion between neighbouring frames of a window, (x, y) in pixels of the picture; n = F - 1."""

    backward: Floats
    """[n, 2, h, w]: what is at p in frame k + 1 was at p + backward[k] in frame k."""
    forward: Floats
    """[n, 2, h, w]: what is at p in frame k comes to p + forward[k] in frame k + 1."""
    visible: NDArray[np.bool_]
    """[n, h, w]: what is at p in frame k + 1 is seen in frame k."""
    scale: int
    """Pixels of the picture to a cell of the grid."""

    def field(self, start: int, stop: int) -> Floats:
        """[2, h, w]: where each point of frame `start` goes in its neighbour `stop`, later or earlier."""
        return self.forward[start] if stop > start else self.backward[stop]


def clip_flow(pictures: Tensor, step: int = 1) -> ClipFlow:
    """Flow between the frames 0, `step`, 2 `step`, ... of a window.

    `pictures` uint8 [F, H, W, 3], RGB, H and W multiples of 8 from 16 on. The same pictures give the same
    bytes with any number of threads.
    """
    height, width = pictures.shape[1:3]
    scale = 2 if min(height, width) >= _HALVED_FROM else 1
    greys = [_grey(picture, scale) for picture in pictures[::step].numpy()]
    shape = (len(greys) - 1, 2, height // scale, width // scale)
    backward, forward = np.empty(shape, np.float32), np.empty(shape, np.float32)
    visible = np.empty((shape[0], *shape[2:]), np.bool_)

    def one(index: int) -> None:
        before, after = greys[index], greys[index + 1]
        back, forth = _search(after, before), _search(before, after)
        visible[index] = _seen(back, forth)
        backward[index] = back.transpose(2, 0, 1) * scale
        forward[index] = forth.transpose(2, 0, 1) * scale

    with ThreadPoolExecutor(_threads()) as pool:  # OpenCV lets go of the GIL
        list(pool.map(one, range(shape[0])))
    return ClipFlow(backward, forward, visible, scale)


def _threads() -> int:
    """This rank's share of the cores; torchrun and DeepSpeed's launcher name the ranks of a machine so."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, (os.cpu_count() or 1) // int(ranks))


def _grey(picture: Grey, scale: int) -> Grey:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    if scale > 1:
        size = (grey.shape[1] // scale, grey.shape[0] // scale)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return np.asarray(grey, np.uint8)


def _search(start: Grey, stop: Grey) -> Floats:
    """[h, w, 2]: where each pixel of `start` is in `stop`, less where it was."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # it has buffers: one for each thread
    return np.asarray(dis.calc(start, stop, np.zeros((*start.shape, 2), np.float32)), np.float32)


def _seen(back: Floats, forth: Floats) -> NDArray[np.bool_]:
    """[h, w]: whether the way back lies in the picture and the way forth from there returns."""
    height, width = back.shape[:2]
    rows, cols = np.mgrid[0:height, 0:width].astype(np.float32)
    at_x, at_y = cols + back[..., 0], rows + back[..., 1]
    inside = (at_x >= 0) & (at_x <= width - 1) & (at_y >= 0) & (at_y <= height - 1)
    there = cv2.remap(forth, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    miss = ((back + there) ** 2).sum(-1)
    length = (back**2).sum(-1) + (there**2).sum(-1)
    return np.asarray(inside & (miss < 0.01 * length + 0.5), np.bool_)
