"""The report of a run as one HTML page: numbers, curves and frames, and sentences computed from the numbers.

Nothing in the page is loaded from elsewhere: charts are inline SVG, frames are inline PNG. Only the videos
themselves are linked, by a path relative to the page.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined

from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import write_atomic
from ..moe_lora.video import read_video
from .charts import STYLE, Curve, curve_chart, inline_png

TEMPLATE = Path(__file__).with_name("report.html.j2")
FRAME_SIDE = 256
"""Longest side of a frame in the page, in pixels."""
SAME = 5e-4
"""Losses closer than this share of one another are called the same."""


@dataclass
class DemoResults:
    """Everything that the report shows; JSON there and back."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    """Versions, seeds, times, parameter counts: shown as they are."""
    stand_ins: list[str] = field(default_factory=list)
    """One sentence for each part that is not the real one."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By stage, in the order they ran."""
    validation: dict[str, float] = field(default_factory=dict)
    """Validation loss by model, the frozen base first, then stages in order."""
    validation_by_t: dict[str, dict[float, float]] = field(default_factory=dict)
    """The same by model and noise level t."""
    experts: list[str] = field(default_factory=list)
    """Names in the order of the gate columns."""
    wrong_expert: dict[str, list[float]] = field(default_factory=dict)
    """Validation loss of the clips of a label (row) with each expert routed (column)."""
    gates: dict[str, list[float]] = field(default_factory=dict)
    """Mean gates of the learned router on the held-out prompts of a label."""
    rule_gates: dict[str, list[float]] = field(default_factory=dict)
    """The same of the rule router."""
    videos: dict[str, str] = field(default_factory=dict)
    """Generated clip by label, all from the same noise."""
    real_videos: dict[str, str] = field(default_factory=dict)
    """Held-out real clip by label."""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The results as JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1, default=str)

    @classmethod
    def from_json(cls, text: str) -> DemoResults:
        """Results from JSON text; `WanmoeError` on broken text or an unknown key."""
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise WanmoeError(f"report results: not JSON: {error}") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or "title" not in values or values.keys() - known:
            wrong = sorted(values.keys() - known) if isinstance(values, dict) else [type(values).__name__]
            raise WanmoeError(f"report results: unknown or missing keys {wrong}; known are {sorted(known)}")
        try:
            values["curves"] = {stage: Curve(**curve) for stage, curve in values.get("curves", {}).items()}
            values["validation_by_t"] = {
                name: {float(t): loss for t, loss in losses.items()}
                for name, losses in values.get("validation_by_t", {}).items()
            }
        except (TypeError, AttributeError, ValueError) as error:
            raise WanmoeError(f"report results: curves or validation_by_t: {error}") from error
        return cls(**values)


class Finding(NamedTuple):
    """One sentence about the numbers and whether it is good news."""

    verdict: Literal["good", "bad", "open"]
    text: str


def findings(run: DemoResults) -> list[Finding]:
    """What the numbers say, good or bad; nothing is said of what was not measured."""
    found = [finding for stage, curve in run.curves.items() if (finding := _curve_finding(stage, curve))]
    names = list(run.validation)
    for before, name in pairwise(names):
        old, new = run.validation[before], run.validation[name]
        found.append(
            _compare(f"Held-out loss of {name} ({_number(new)})", new, old, f"{before} ({_number(old)})")
        )
    if rows := _expert_rows(run):
        best = sum(row["right_is_best"] for row in rows)
        mean = sum(row["right_beats_mean"] for row in rows)
        found.append(
            Finding(
                "good" if best >= 0.75 * len(rows) else "bad",
                f"The right expert has the lowest loss for {best} of {len(rows)} labels; "
                f"it is lower than the mean of the wrong ones for {mean} of {len(rows)}.",
            )
        )
    scored = [
        (run.experts[int(np.argmax(g))] == label) for label, g in run.gates.items() if label in run.experts
    ]
    if scored:
        found.append(
            Finding(
                "good" if all(scored) else "bad",
                "The learned router gives the largest gate to the right expert "
                f"for {sum(scored)} of {len(scored)} labels.",
            )
        )
    return found


def _curve_finding(stage: str, curve: Curve) -> Finding | None:
    if len(curve.val) > 1:
        first, last = curve.val[0], curve.val[-1]
        return _compare(
            f"Stage {stage}: validation loss ends at {_number(last)}",
            last,
            first,
            f"{'with its untrained router' if stage == 'c' else 'at its start'} ({_number(first)})",
        )
    if len(curve.train) > 1:
        window = max(1, len(curve.train) // 10)
        first, last = float(np.mean(curve.train[:window])), float(np.mean(curve.train[-window:]))
        return _compare(
            f"Stage {stage}: training loss ends at {_number(last)}",
            last,
            first,
            f"at its start ({_number(first)})",
        )
    return None


def _compare(what: str, new: float, old: float, than: str) -> Finding:
    if not (math.isfinite(new) and math.isfinite(old)) or old == 0:
        return Finding("bad", f"{what}: cannot be compared with {than}, a value is not finite or zero.")
    change = new / old - 1
    if abs(change) < SAME:
        return Finding("open", f"{what}: the same as {than} to within {100 * SAME:.2f} %.")
    direction = "lower" if change < 0 else "higher"
    return Finding(
        "good" if change < 0 else "bad", f"{what}: {100 * abs(change):.2f} % {direction} than {than}."
    )


def write_report(run: DemoResults, path: str | Path) -> None:
    """Writes the report as one HTML file, whole or not at all.

    Raises `WanmoeError` where a video cannot be read, a table does not fit the experts, or the file cannot be
    written.
    """
    path = Path(path)
    _check(run)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=_number, percent=_percent)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        style=STYLE.read_text(encoding="utf-8"),
        findings=findings(run),
        charts=[(stage, curve_chart(stage, curve)) for stage, curve in run.curves.items()],
        validation=_validation_rows(run),
        by_t=_by_t_rows(run),
        expert_rows=_expert_rows(run),
        gate_rows=_gate_rows(run),
        colours=[_colour(i, len(run.experts)) for i in range(len(run.experts))],
        generated=_film_rows(run.videos, path),
        real=_film_rows(run.real_videos, path),
    )
    write_atomic(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def _check(run: DemoResults) -> None:
    for what in ("wrong_expert", "gates", "rule_gates"):
        for label, row in getattr(run, what).items():
            if len(row) != len(run.experts):
                raise WanmoeError(
                    f"report: {what}[{label!r}] has {len(row)} values for {len(run.experts)} experts"
                )
    for stage, curve in run.curves.items():
        if len(curve.steps) != len(curve.train) or len(curve.val_steps) != len(curve.val):
            raise WanmoeError(f"report: the curve of stage {stage} has steps and losses of different lengths")


# ------------------------------------------------------------------------------------------------ tables


def _number(value: float) -> str:
    """Four significant digits, for losses."""
    return f"{value:#.4g}" if math.isfinite(value) else "not finite"


def _percent(change: float | None) -> str:
    """A signed percentage with a real minus sign; a dash where there is nothing to compare."""
    if change is None or not math.isfinite(change):
        return "–"
    return f"{100 * change:+.2f} %".replace("-", "−")


def _relative(new: float, old: float) -> float | None:
    return new / old - 1 if old and math.isfinite(new) and math.isfinite(old) else None


def _shade(change: float | None, full: float) -> str:
    """Background of a cell: warm where the loss is higher, cool where lower, full strength at +-`full`."""
    if change is None or not full:
        return "transparent"
    strength = round(0.55 * min(1.0, abs(change) / full), 3)
    return f"rgba({'214, 96, 62' if change > 0 else '42, 135, 160'}, {strength})"


def _validation_rows(run: DemoResults) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    values = list(run.validation.items())
    top = max((loss for _, loss in values if math.isfinite(loss)), default=1.0)
    for i, (name, loss) in enumerate(values):
        base = None if i == 0 else _relative(loss, values[0][1])
        before = None if i == 0 else _relative(loss, values[i - 1][1])
        width = 100 * loss / top if math.isfinite(loss) and top > 0 else 0
        rows.append({"name": name, "loss": loss, "base": base, "before": before, "width": round(width, 2)})
    return rows


def _by_t_rows(run: DemoResults) -> list[dict[str, Any]]:
    """A row for each noise level: the loss of every model, and its change against the first."""
    names = list(run.validation_by_t)
    levels = sorted({t for losses in run.validation_by_t.values() for t in losses})
    table = []
    for t in levels:
        losses = [run.validation_by_t[name].get(t, math.nan) for name in names]
        changes = [_relative(loss, losses[0]) for loss in losses]
        table.append((t, losses, changes))
    full = max(
        (abs(change) for _, _, changes in table for change in changes if change is not None), default=0
    )
    return [
        {"t": t, "cells": [(loss, c, _shade(c, full)) for loss, c in zip(losses, changes, strict=True)]}
        for t, losses, changes in table
    ]


def _expert_rows(run: DemoResults) -> list[dict[str, Any]]:
    """A row for each label that has an expert of its own: losses relative to that of the right expert."""
    rows: list[dict[str, Any]] = []
    labelled = {label: row for label, row in run.wrong_expert.items() if label in run.experts}
    changes = {
        label: [_relative(loss, row[run.experts.index(label)]) for loss in row]
        for label, row in labelled.items()
    }
    full = max((abs(c) for row in changes.values() for c in row if c is not None), default=0)
    for label, losses in labelled.items():
        right = run.experts.index(label)
        wrong = [loss for i, loss in enumerate(losses) if i != right]
        cells = [
            {"loss": loss, "change": c, "shade": _shade(c, full), "right": i == right}
            for i, (loss, c) in enumerate(zip(losses, changes[label], strict=True))
        ]
        rows.append(
            {
                "label": label,
                "cells": cells,
                "right_is_best": bool(wrong) and all(losses[right] < loss for loss in wrong),
                "right_beats_mean": bool(wrong) and losses[right] < float(np.mean(wrong)),
                "mean": _relative(float(np.mean(wrong)), losses[right]) if wrong else None,
            }
        )
    return rows


def _gate_rows(run: DemoResults) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for label in dict.fromkeys([*run.gates, *run.rule_gates]):
        bars = [("learned", run.gates.get(label)), ("rule", run.rule_gates.get(label))]
        shown = [
            {
                "router": router,
                "parts": [
                    (name, 100 * g, _colour(i, len(gates)))
                    for i, (name, g) in enumerate(zip(run.experts, gates, strict=True))
                    if g > 0
                ],
                "right": gates[run.experts.index(label)] if label in run.experts else None,
            }
            for router, gates in bars
            if gates is not None
        ]
        rows.append({"label": label, "bars": shown})
    return rows


def _colour(index: int, count: int) -> str:
    """Colour of an expert: hues far apart, of one lightness, readable on light and dark ground."""
    hue = (205 + 360 * index / max(1, count)) % 360
    return f"hsl({hue:.0f} 52% {50 if index % 2 == 0 else 60}%)"


# ------------------------------------------------------------------------------------------------ pictures


def _film_rows(videos: dict[str, str], page: Path) -> list[dict[str, Any]]:
    """First, middle and last frame of every clip, and a link from the page to it."""
    rows = []
    for label, video in videos.items():
        frames = read_video(video)
        count = len(frames)
        chosen = [(i, inline_png(frames[i], FRAME_SIDE)) for i in dict.fromkeys((0, count // 2, count - 1))]
        link = Path(os.path.relpath(Path(video).resolve(), page.resolve().parent)).as_posix()
        rows.append({"label": label, "frames": chosen, "count": count, "link": link})
    return rows
