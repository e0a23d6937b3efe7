"""The dark border round an endoscope's picture, which is no part of the scene.

Letters: F, H, W frames, height, width of the window in pixels.
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Mask = NDArray[np.bool_]

_DARK = 24  # grey levels of 255: what a border's pixel never exceeds
_STEP = 2  # times _DARK: how bright the picture is just inside its rim
_FILL = 0.9  # of the picture's convex hull that is light
_LEAST = 0.2  # of the frame: a smaller bright part is no endoscope's picture


def endoscope_border(pictures: Tensor) -> Tensor:
    """Which cells of the latent grid hold picture: uint8 [H / 8, W / 8], 255 = picture, 0 = border.

    `pictures` uint8 [F, H, W, 3]. Border is what is dark in all frames and lies outside a convex, sharply
    bounded picture; a cell is border only when all of it is. Where nothing of that kind is seen, a dark scene
    or no light at all, every cell is picture.
    """
    border = _border(pictures.amax(dim=(0, 3)).numpy())
    height, width = border.shape
    cells = border.reshape(height // 8, 8, width // 8, 8).all(axis=(1, 3))
    return torch.from_numpy(np.where(cells, 0, 255).astype(np.uint8))


def _border(brightest: NDArray[np.uint8]) -> Mask:
    """The border at pixel scale, from the brightest that each pixel has been; nowhere if it is not one."""
    none = np.zeros(brightest.shape, np.bool_)
    light = (brightest > _DARK).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(light)
    if count < 2:
        return none
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    picture = (labels == largest).astype(np.uint8)
    hull = _hull(picture)
    # The hull takes in what is dark at the rim of the picture; a lit part of any shape fills it badly.
    convex = picture.sum() >= _FILL * hull.sum()
    if hull.mean() < _LEAST or not convex or not _sharp(brightest, hull):
        return none
    return np.asarray((light == 0) & (hull == 0), dtype=np.bool_)


def _hull(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The convex hull of a mask [H, W] of 0 and 1, filled."""
    outlines, _ = cv2.findContours(picture, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    corners = cv2.convexHull(np.concatenate(outlines))
    return np.asarray(cv2.fillConvexPoly(np.zeros_like(picture), corners, 1), dtype=np.uint8)


def _sharp(brightest: NDArray[np.uint8], hull: NDArray[np.uint8]) -> bool:
    """Whether it is bright a few pixels inside the rim: a scene's light falls off slowly."""
    reach = max(2.0, min(hull.shape) / 80)
    inside = cv2.distanceTransform(hull, cv2.DIST_L2, 5)
    ring = (inside > reach) & (inside <= 2 * reach)
    return bool(ring.any()) and float(np.median(brightest[ring])) >= _STEP * _DARK
