"""Charts and pictures as parts of a page: inline SVG in the page's own colours, inline PNG.

Nothing in a page is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import Tensor

from ..moe_lora.errors import WanmoeError

STYLE = Path(__file__).with_name("page.css")


@dataclass
class Curve:
    """Losses of one stage against its steps."""

    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    val_steps: list[int] = field(default_factory=list)
    val: list[float] = field(default_factory=list)


def smooth(values: list[float], window: float) -> list[float]:
    """Bias-corrected exponential moving average over about `window` values; not-finite ones are skipped."""
    beta = 1 - 1 / max(1.0, window)
    total, weight, out = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = beta * total + value, beta * weight + 1
        out.append(total / weight if weight else math.nan)
    return out


# The page's own colours stand in for these in the SVG, so that a chart follows its light or dark ground.
_INK, _TRAIN, _VALID = "#010203", "#010204", "#010205"
_PAGE_COLOURS = {_INK: "currentColor", _TRAIN: "var(--train)", _VALID: "var(--valid)"}


@contextmanager
def _look(salt: str) -> Iterator[None]:
    """Charts in the page's colours; `salt` makes the names inside of one SVG its own."""
    import matplotlib

    look = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "text.color": _INK}
    look |= {"axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    with matplotlib.rc_context(look):
        yield


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _as_svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    return adopt_svg(text.getvalue())


def curve_chart(stage: str, curve: Curve) -> str:
    """Inline SVG: raw and smoothed training loss, and validation loss, against the step."""
    with _look(stage):
        figure, axes = _figure(4.6, 2.7)
        if curve.train:
            smoothed = smooth(curve.train, len(curve.train) / 20)
            axes.plot(curve.steps, curve.train, color=_TRAIN, alpha=0.28, linewidth=0.8)
            axes.plot(curve.steps, smoothed, color=_TRAIN, linewidth=1.8, label="train (smoothed)")
            shown = [v for v in [*curve.train, *curve.val] if math.isfinite(v)]
            low, high = np.percentile(shown, [0, 99]) if shown else (0.0, 1.0)
            high = max([high, *(v for v in curve.val if math.isfinite(v))])
            pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            axes.set_ylim(low - pad, high + pad)
        if curve.val:
            axes.plot(
                curve.val_steps,
                curve.val,
                color=_VALID,
                linewidth=1.6,
                marker="o",
                markersize=3.5,
                label="validation",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if curve.train or curve.val:
            axes.legend(frameon=False, loc="upper right")
        return _as_svg(figure)


def adopt_svg(svg: str) -> str:
    """An SVG file as part of a page: no prologue, no metadata, no fixed size, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", svg, count=1)
    svg = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg


def inline_png(frame: Tensor, side: int) -> str:
    """A picture uint8 [H, W, 3] as an address that holds it, its longest side at most `side` pixels."""
    picture = frame.numpy()
    scale = min(1.0, side / max(picture.shape[:2]))
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    ok, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not ok:
        raise WanmoeError("report: a frame could not be encoded as PNG")
    return "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()


class Dot(NamedTuple):
    """A value with its interval; NaN bounds draw none."""

    label: str
    value: float
    low: float
    high: float
    group: str = ""


def dot_chart(dots: Sequence[Dot], title: str, better: str) -> str:
    """Inline SVG: differences from a reference, a row each, with their intervals about a line at 0."""
    with _look(title):
        figure, axes = _figure(5.4, 0.9 + 0.27 * len(dots))
        places = np.arange(len(dots))[::-1]
        for place, dot in zip(places, dots, strict=True):
            sure = math.isfinite(dot.low) and (dot.low > 0 or dot.high < 0)
            if math.isfinite(dot.low):
                axes.plot([dot.low, dot.high], [place, place], color=_TRAIN, linewidth=1.6)
            filled = _TRAIN if sure else "none"
            axes.plot([dot.value], [place], "o", color=_TRAIN, markersize=4.5, markerfacecolor=filled)
        axes.axvline(0, color=_INK, linewidth=0.8, alpha=0.6)
        axes.set_yticks(places, [f"{dot.group}: {dot.label}" if dot.group else dot.label for dot in dots])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(dots) - 0.4)
        axes.locator_params(axis="x", nbins=5)
        told = title + (f" ({better} is better)" if better != "neither" else "")
        figure.suptitle(told, fontsize=9, x=0.01, ha="left", color=_INK)
        axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        return _as_svg(figure)
