"""The report of a judge: one HTML page and the same figures as JSON, beside the judge's file.

Nothing in the page is loaded from elsewhere; charts are inline SVG.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from ...moe_lora.files import write_atomic
from .judge import JudgeInfo

TEMPLATE = Path(__file__).with_name("report.html.j2")
_WIDE, _HIGH, _LEFT, _BELOW = 520, 250, 46, 40  # of a chart and its margins
_COLOURS = ("#3f7fa6", "#c4622d", "#1f7a4d", "#8a5fb0", "#7a6a1f")


class Line(NamedTuple):
    """One line of a chart; None is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def classifier_summary(info: JudgeInfo) -> list[str]:
    """The main figures of a classifier, as sentences."""
    held = info.held_out
    low, high = held["interval"]
    lines = [
        f"It names the instrument of {percent(held['accuracy'])} of {held['clips']} held-out clips (95 % "
        f"interval {percent(low)} to {percent(high)}); always naming the most frequent one is right for "
        f"{percent(held['chance'])}."
    ]
    if held["accuracy_region"] is not None:
        lines.append(
            f"Told where the instrument is, {percent(held['accuracy_region'])}. Not told, it puts "
            f"{percent(held['looks_at_region'])} of its weight there."
        )
    noisy = held["by_noise"][-1]
    lines.append(f"Of guesses from noise {noisy['t']:g}: {percent(noisy['accuracy'])}.")
    worst = min(
        ((name, share) for name, share in held["by_class"].items() if share is not None),
        key=lambda pair: pair[1],
    )
    if worst[1] < 1:
        lines.append(f"Hardest: {worst[0]}, {percent(worst[1])} of its clips.")
    return lines


def detector_summary(info: JudgeInfo) -> list[str]:
    """The main figures of a detector, as sentences."""
    held = info.held_out
    low, high = held["interval"]
    apart = "none was found" if held["median_px"] is None else f"{held['median_px']:.1f} px"
    return [
        f"It finds the tip within 8 px in {percent(held['pck'])} of {held['frames']} latent frames "
        f"of {held['clips']} held-out clips (95 % interval {percent(low)} to {percent(high)}); one fixed "
        f"place, the mean of these tips, is right for {percent(held['chance'])}.",
        f"Median distance of the tips it found: {apart}; missed altogether: {percent(held['missed'])}.",
    ]


def write_classifier_report(info: JudgeInfo, judge: Path) -> None:
    """Writes `<judge>.html` and `<judge>.json` beside the file of a classifier; WanmoeError on failure."""
    rows = info.held_out["by_noise"]
    levels = [row["t"] for row in rows]
    lines = [Line("no region given", levels, [row["accuracy"] for row in rows])]
    if info.held_out["accuracy_region"] is not None:
        lines.append(Line("region given", levels, [row["accuracy_region"] for row in rows]))
    names = [expert.name for expert in info.experts]
    _write(
        info,
        judge,
        title="Instrument classifier",
        summary=classifier_summary(info),
        chart=chart(lines, "noise level t of the guess that is judged", "accuracy"),
        names=names,
        confusion=[_shares(row) for row in info.held_out["confusion"]],
        header=["noise t", "no region given", "region given"],
        table=[[f"{row['t']:g}", percent(row["accuracy"]), percent(row["accuracy_region"])] for row in rows],
    )


def write_detector_report(info: JudgeInfo, judge: Path) -> None:
    """Writes `<judge>.html` and `<judge>.json` beside the file of a detector; WanmoeError on failure."""
    held = info.held_out
    radii = [float(radius) for radius in held["radii"]]
    lines = [Line(f"noise {row['t']:g}", radii, row["pck"]) for row in held["by_noise"]]
    _write(
        info,
        judge,
        title="Tip detector",
        summary=detector_summary(info),
        chart=chart(lines, "radius in pixels", "PCK"),
        names=[],
        confusion=[],
        header=["noise t", *(f"{radius:g} px" for radius in radii)],
        table=[[f"{row['t']:g}", *map(percent, row["pck"])] for row in held["by_noise"]],
    )


def percent(share: float | None) -> str:
    """A share as "97.9 %"; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def chart(lines: Sequence[Line], x_title: str, y_title: str) -> str:
    """Lines of shares (0 to 1) as an SVG."""
    right = max(max(line.x) for line in lines)
    left = min(0.0, *(min(line.x) for line in lines))
    across = (_WIDE - _LEFT - 14) / ((right - left) or 1.0)
    down = _HIGH - _BELOW - 12

    def place(x: float, y: float) -> str:
        return f"{_LEFT + (x - left) * across:.1f},{12 + (1 - y) * down:.1f}"

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = 12 + (1 - tick) * down
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDE - 14}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>')
    for x in _ticks([*lines[0].x]):
        at = _LEFT + (x - left) * across
        parts.append(f'<text x="{at:.1f}" y="{_HIGH - _BELOW + 18}" text-anchor="middle">{x:g}</text>')
    for number, line in enumerate(lines):
        points = " ".join(place(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None)
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{point.split(",")[0]}" cy="{point.split(",")[1]}" r="2.6" fill="{colour}"/>'
            for point in points.split()
        ]
    middle = (_LEFT + _WIDE) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HIGH - 4}" text-anchor="middle">{escape(x_title)}</text>')
    legend = "".join(
        f'<span><i class="swatch" style="background:{_COLOURS[n % len(_COLOURS)]}"></i>'
        f"{escape(line.name)}</span>"
        for n, line in enumerate(lines)
    )
    label = f"{escape(y_title)} against {escape(x_title)}"
    return (
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f'<p class="legend">{legend}</p>'
    )


def _ticks(values: list[float]) -> list[float]:
    """At most eight of the values, far enough apart to be read."""
    apart = (max(values) - min(values)) / 12
    kept: list[float] = []
    for value in values:
        if not kept or value - kept[-1] >= apart:
            kept.append(value)
    return kept


def _shares(row: Sequence[float]) -> list[tuple[float, float]]:
    """(clips, share of the row) of a row of the confusion matrix."""
    total = sum(row) or 1.0
    return [(clips, clips / total) for clips in row]


def _write(info: JudgeInfo, judge: Path, **values: Any) -> None:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(info=info, file=judge.name, **values)
    figures = json.dumps(info.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"
    for suffix, text in ((".html", page), (".json", figures)):

        def write(partial: Path, text: str = text) -> None:
            partial.write_text(text, encoding="utf-8")

        write_atomic(judge.with_suffix(suffix), write)
