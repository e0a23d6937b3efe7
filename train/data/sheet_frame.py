"""One decoded frame with what is known about it drawn in: region, tips, boxes, border and motion.

Letters: F, H, W frames, height, width of the decoded clip in pixels; f, h, w the same of the latent.
"""

from collections.abc import Mapping
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from ...moe_lora.wan.codec import SPACE_STRIDE, TIME_STRIDE
from .clips import GIVEN, INTERPOLATED
from .shards import META, Sample, ShardError

Pictures = NDArray[np.uint8]

REGION, BORDER, FAINT = "#00d5ff", "#c8c8c8", "#666666"
_ARROW = "#ffffff"
_OUTLINE = [patheffects.withStroke(linewidth=2.6, foreground="black")]


class Mark(NamedTuple):
    """A tip, or a box (left, top, width, height), in pixels of the window."""

    frame: int
    x: float
    y: float
    width: float = 0.0
    height: float = 0.0
    instrument: str = ""
    kind: str = GIVEN


def draw_frame(
    axes: Axes, sample: Sample, number: int, picture: Pictures, colours: Mapping[str, str]
) -> None:
    """One frame of a decoded sample, uint8 [H, W, 3], with what is known of it; `colours` by instrument."""
    height, width = picture.shape[:2]
    latent = -(-number // TIME_STRIDE)
    axes.imshow(picture, interpolation="bilinear")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    if sample.picture is not None:
        outside = 1 - _cells(sample.picture)
        shade = np.zeros((*outside.shape, 4), np.float32)
        shade[..., 3] = 0.55 * outside
        axes.imshow(shade, extent=extent, interpolation="nearest")
        _outline(axes, outside, BORDER, 0.8, ":")
    if sample.roi is not None:
        inside = _cells(sample.roi[latent])
        tint = np.zeros((*inside.shape, 4), np.float32)
        tint[...] = matplotlib.colors.to_rgba(REGION)
        tint[..., 3] = 0.18 * inside
        axes.imshow(tint, extent=extent, interpolation="nearest")
        _outline(axes, inside, REGION, 1.1, "-")
    if sample.flow is not None and sample.visible is not None and number and number % TIME_STRIDE == 0:
        _arrows(axes, sample.flow[latent - 1], sample.visible[latent - 1])
    for box in marks(sample, "boxes"):
        if box.frame == number:
            style = "--" if box.kind == INTERPOLATED else "-"
            colour = _colour(box, sample, colours)
            corner = (box.x - 0.5, box.y - 0.5)
            axes.add_patch(
                Rectangle(
                    corner,
                    box.width,
                    box.height,
                    fill=False,
                    ec=colour,
                    ls=style,
                    lw=1.2,
                    path_effects=_OUTLINE,
                )
            )
    for tip in marks(sample, "tips"):
        if tip.frame == number:
            marker = "+" if tip.kind == INTERPOLATED else "x"
            colour = _colour(tip, sample, colours)
            axes.plot(tip.x, tip.y, marker, color=colour, ms=7, mew=1.5, path_effects=_OUTLINE)
    axes.set(xlim=extent[:2], ylim=extent[2:], xticks=(), yticks=())
    axes.spines[:].set_visible(False)
    seconds = f"  {number / float(sample.meta['fps']):.2f} s" if sample.meta.get("fps") else ""
    axes.set_title(f"frame {number}{seconds}", fontsize=7, color=FAINT, loc="left", pad=2)


def _cells(grid: Tensor) -> NDArray[np.float32]:
    """Values of latent cells [h, w] as pixels [H, W]."""
    return np.kron(grid.numpy(), np.ones((SPACE_STRIDE, SPACE_STRIDE), np.float32))


def _outline(axes: Axes, inside: NDArray[np.float32], colour: str, width: float, style: str) -> None:
    if inside.max() > 0.5:  # padded, so that the line closes at the edge of the frame
        padded = np.pad(inside, 1)
        rows, cols = np.arange(padded.shape[0]) - 1, np.arange(padded.shape[1]) - 1
        axes.contour(cols, rows, padded, levels=[0.5], colors=colour, linewidths=width, linestyles=style)


def _arrows(axes: Axes, flow: Tensor, visible: Tensor) -> None:
    """Motion in a latent frame: each arrow leads from where a point was to where it is."""
    height, width = flow.shape[1:]
    step = -(-max(height, width) // 8)
    rows, cols = np.mgrid[step // 2 : height : step, step // 2 : width : step]
    way = flow.numpy()[:, rows, cols] * SPACE_STRIDE
    far = np.hypot(way[0], way[1]) >= 0.02 * width * SPACE_STRIDE  # what is shorter is but a dot
    shown = far & (visible.numpy()[rows, cols] > 0.5)
    x, y = (grid[shown] * SPACE_STRIDE + (SPACE_STRIDE - 1) / 2 for grid in (cols, rows))
    dx, dy = way[0][shown], way[1][shown]
    axes.quiver(
        *(x + dx, y + dy, -dx, -dy),
        angles="xy",
        scale_units="xy",
        scale=1,
        color=_ARROW,
        width=0.006,
        headwidth=4,
        headlength=4,
        headaxislength=3.5,
        minlength=0,
        edgecolor="black",
        linewidth=0.4,
    )


def marks(sample: Sample, name: str) -> list[Mark]:
    """The tips or boxes of the facts of a sample, whether rows [frame, x, y, ...] or objects."""
    known = Mark._fields
    try:
        return [
            Mark(**{field: one[field] for field in known if field in one})
            if isinstance(one, Mapping)
            else Mark(*one)
            for one in sample.meta.get(name) or ()
        ]
    except TypeError as error:
        raise ShardError("?", sample.key, META, f"{name} are neither rows nor objects: {error}") from error


def _colour(mark: Mark, sample: Sample, colours: Mapping[str, str]) -> str:
    name = mark.instrument or max(sample.instruments, key=lambda one: one[1], default=("", 0.0))[0]
    return colours.get(name, "#ffffff")
