"""The report of runs as one HTML page: curves, figures, clips with their tips, failures, ablations.

Everything in it is read from files that training, evaluation and ablation wrote; nothing is computed anew,
and nothing in the page is loaded from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import write_atomic
from ..moe_lora.video import frame_at, read_video, video_info
from .charts import STYLE, Curve, Dot, curve_chart, dot_chart, inline_png
from .evaluation.estimate import Estimate, as_share, difference
from .evaluation.metrics import METRICS, Metric, direction
from .evaluation.table import number
from .evaluation.table import shown as shown_estimate

TEMPLATE = Path(__file__).with_name("run_report.html.j2")
SHEET, FRAMES, WORST = 8, 4, 10
"""Clips of a contact sheet, frames of each, and how many of the worst clips are shown by each figure."""
_FRAME_SIDE, _THUMB_SIDE = 220, 150
_FOUND, _TRUE = (255, 214, 10), (64, 224, 120)
"""Colours of tips: found in the generated clip, marked in the real one."""


@dataclass
class RunPart:
    """A training run."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    """By noise expert; "" where there is one."""


@dataclass
class EvaluationPart:
    """An evaluation, as `evaluation.json` has it."""

    name: str
    values: Mapping[str, Any]


@dataclass
class AblationPart:
    """An ablation: its table in rows of text, and the differences that are plotted."""

    name: str
    reference: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    differences: Mapping[str, tuple[str, Sequence[Dot]]]
    """By figure: which way is better, and a dot for each row."""
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class TallyPart:
    """What raters said of two sets, as `tally.json` has it."""

    name: str
    values: Mapping[str, Any]


Part = RunPart | EvaluationPart | AblationPart | TallyPart


class _Clip(NamedTuple):
    """One clip of a sheet."""

    id: str
    made: list[str]
    real: list[str]


class _Failure(NamedTuple):
    """One of the worst clips by a figure."""

    id: str
    value: str
    made: str
    real: str


def write_run_report(path: Path, title: str, parts: Sequence[Part]) -> None:
    """Writes the report as one HTML file, whole or not at all.

    Clips of an evaluation that are gone have no pictures. Raises WanmoeError without anything to report.
    """
    if not parts:
        raise WanmoeError("there is nothing to report: give run folders, evaluations or ablations")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(METRICS=METRICS, direction=direction)
    environment.filters["interval"] = _interval
    environment.filters["estimate"] = shown_estimate
    evaluations = [part for part in parts if isinstance(part, EvaluationPart)]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        style=STYLE.read_text(encoding="utf-8"),
        runs=[(run, _curve_charts(run)) for run in parts if isinstance(run, RunPart)],
        evaluations=[_evaluation(part) for part in evaluations],
        compared=[
            (other.name, rows)
            for other in evaluations[1:]
            if (rows := compared(evaluations[0].values, other.values))
        ],
        tallies=[part for part in parts if isinstance(part, TallyPart)],
        ablations=[(part, _dots(part)) for part in parts if isinstance(part, AblationPart)],
    )
    write_atomic(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def _curve_charts(run: RunPart) -> list[tuple[str, str]]:
    return [(side, curve_chart(f"{run.name} {side}", curve)) for side, curve in run.curves.items()]


def _dots(part: AblationPart) -> list[str]:
    charts = []
    for key, (better, dots) in part.differences.items():
        shown = [dot for dot in dots if math.isfinite(dot.value)]
        if shown and any(dot.value for dot in shown):
            charts.append(dot_chart(shown, key, better))
    return charts


# ------------------------------------------------------------------------------------------------ evaluations


def _evaluation(part: EvaluationPart) -> dict[str, Any]:
    values = part.values
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, row in values["rows"].items():
        metric = METRICS.get(key)
        if metric is not None:
            groups.setdefault(metric.group, []).append({"metric": metric, **row})
    for key, estimate in values["router"].items():
        row = {"metric": METRICS[key], "made": estimate, "real": None, "excess": None}
        groups.setdefault(METRICS[key].group, []).append(row)
    confusion = {
        side: [(name, _shaded(row)) for name, row in zip(values["classes"], table, strict=True)]
        for side, table in values["confusion"].items()
    }
    return {
        "name": part.name,
        "values": values,
        "groups": groups,
        "confusion": confusion,
        "sheet": _sheet(values),
        "gone": gone(values),
        "failures": _failures(values),
    }


def compared(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[Metric, Estimate]]:
    """By how much each figure of an evaluation is above that of the first, over the clips that both have: the
    mean of the clips' differences with its interval. Nothing without three such clips."""
    out = []
    for key, metric in METRICS.items():
        one, two = (
            {name: as_share(row[key]) for name, row in values["each"].items() if row.get(key) is not None}
            for values in (first, other)
        )
        found = difference(two, one)
        if found is not None and found.clips >= 3:
            out.append((metric, found))
    return out


def gone(values: Mapping[str, Any]) -> list[str]:
    """Paths of clips that were measured and are not there any more."""
    paths = [
        source[side] for source in values["sources"].values() for side in ("made", "real") if side in source
    ]
    return [path for path in paths if not Path(path).is_file()]


def _shaded(row: Sequence[float]) -> list[tuple[str, float]]:
    """(count, share of the row) of each cell."""
    total = sum(row) or 1.0
    return [(f"{count:.4g}", count / total) for count in row]


def _interval(estimate: Mapping[str, Any] | None) -> str:
    """`0.82 (0.71 to 0.90)` of an estimate in JSON."""
    if estimate is None:
        return ""
    text = number(estimate["value"])
    if estimate["low"] is not None:
        text += f" ({number(estimate['low'])} to {number(estimate['high'])})"
    return text


def _sheet(values: Mapping[str, Any]) -> list[_Clip]:
    """The first clips, frames evenly spread."""
    out = []
    for name in list(values["each"])[:SHEET]:
        made = _film(values, name, "made")
        real = _film(values, name, "real")
        if made is not None:
            out.append(_Clip(name, _spread(made), _spread(real)))
    return out


def _spread(film: list[Tensor] | None) -> list[str]:
    if film is None:
        return []
    # A detector looks at one frame in four.
    moments = range(0, len(film), 4)
    places = np.linspace(0, len(moments) - 1, min(FRAMES, len(moments))).round().astype(int)
    return [inline_png(film[moments[place]], _FRAME_SIDE) for place in places]


def _failures(values: Mapping[str, Any]) -> list[tuple[str, list[_Failure]]]:
    """By figure, the clips that are worst by it; a figure by which no clip differs is left out."""
    films: dict[tuple[str, str], str] = {}

    def thumb(name: str, side: str) -> str:
        if (name, side) not in films:
            film = _film(values, name, side)
            films[name, side] = "" if film is None else inline_png(film[len(film) // 8 * 4], _THUMB_SIDE)
        return films[name, side]

    out = []
    for key, metric in METRICS.items():
        each = {name: row[key] for name, row in values["each"].items() if row.get(key) is not None}
        if metric.better == "neither" or key.startswith("fds_") or len(set(each.values())) < 2:
            continue
        worst = sorted(each, key=lambda name: each[name], reverse=metric.better == "lower")[:WORST]
        # A share of 1 is no failure, however few clips there are.
        worst = [name for name in worst if each[name] != _best(metric.better, each)]
        rows = [
            _Failure(name, number(each[name]), thumb(name, "made"), thumb(name, "real")) for name in worst
        ]
        if rows:
            out.append((metric.title, rows))
    return out


def _best(better: str, each: Mapping[str, float]) -> float:
    """The best value that a clip has."""
    return max(each.values()) if better == "higher" else min(each.values())


def _film(values: Mapping[str, Any], name: str, side: str) -> list[Tensor] | None:
    """The frames of a clip with tips drawn: on the real one those that are marked, on the generated one those
    that were found, and small the marked ones too. None where there is no such clip."""
    source = values["sources"].get(name, {})
    if side not in source:
        return None
    path = Path(source[side])
    if not path.is_file() or not Path(source["made"]).is_file():  # its size and rate are those of both
        return None
    frames = list(_as_measured(values, name, side, path))
    marks = values["marks"].get(name, {})
    true, found = marks.get("true", []), marks.get("found", [])
    size = tuple(frames[0].shape[:2])
    length = max(3, round(min(size) / 16))
    for place, x, y in true:
        if place < len(frames):
            frames[place] = _ring(frames[place], x, y, length if side == "real" else length // 2, _TRUE)
    if side == "made":
        for place, x, y in found:
            if place < len(frames):
                frames[place] = _cross(frames[place], x, y, length, _FOUND)
    return frames


def _as_measured(values: Mapping[str, Any], name: str, side: str, path: Path) -> Tensor:
    """A clip at the size and rate at which it was measured: those of the generated one."""
    source = values["sources"][name]
    info = video_info(source["made"])
    size = info.height // 8 * 8, info.width // 8 * 8
    if side == "made":
        return read_video(path, size=size)
    own = video_info(path)
    start = int(source.get("real_start", 0))
    ratio = own.fps / info.fps
    count = 0
    while count < info.frames and frame_at(start, count, ratio) < own.frames:
        count += 1
    return read_video(path, fps=info.fps, size=size, start_frame=start, num_frames=max(1, count))


def _ring(frame: Tensor, x: float, y: float, radius: int, colour: tuple[int, int, int]) -> Tensor:
    picture = frame.numpy().copy()
    cv2.circle(picture, (round(x), round(y)), max(2, radius), (0, 0, 0), 3, cv2.LINE_AA)
    cv2.circle(picture, (round(x), round(y)), max(2, radius), colour, 1, cv2.LINE_AA)
    return torch.from_numpy(picture)


def _cross(frame: Tensor, x: float, y: float, length: int, colour: tuple[int, int, int]) -> Tensor:
    picture = frame.numpy().copy()
    for shade, width in (((0, 0, 0), 3), (colour, 1)):
        for dx, dy in ((length, length), (length, -length)):
            ends = (round(x - dx / 2), round(y - dy / 2)), (round(x + dx / 2), round(y + dy / 2))
            cv2.line(picture, *ends, shade, width, cv2.LINE_AA)
    return torch.from_numpy(picture)
