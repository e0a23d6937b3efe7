"""An evaluation as text: a table for the terminal and for a page in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .estimate import Estimate
from .evaluate import Evaluation, Row, SetRow
from .metrics import METRICS

_ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}


def markdown(found: Evaluation, title: str) -> str:
    """The whole evaluation as a page."""
    lines = [f"# {title}", "", f"{found.made} generated clips, {found.clips} of them beside a real one.", ""]
    for group, rows in _groups(found).items():
        lines += [
            f"## {group}",
            "",
            "| figure | generated | real clips, measured alike | generated less real | clips |",
        ]
        lines += ["|---|---|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows), ""]
    if found.sets:
        lines += ["## Sets of clips", "", "| " + " | ".join(_SET_HEAD) + " |", "|" + "---|" * len(_SET_HEAD)]
        lines += ["| " + " | ".join(_set_row(row)) + " |" for row in found.sets] + [""]
    for side, table in found.confusion.items():
        lines += [f"## What the classifier saw: {'generated' if side == 'made' else side}", ""]
        lines += ["| label | " + " | ".join(found.classes) + " |", "|" + "---|" * (len(found.classes) + 1)]
        for name, row in zip(found.classes, table, strict=True):
            lines.append(f"| {name} | " + " | ".join(f"{count:.4g}" for count in row) + " |")
        lines.append("")
    if found.load:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in found.load.items())
        lines += ["## Load of the experts", "", f"Mean gate over the held-out clips: {shares}.", ""]
    if found.routed:
        names = list(found.load)
        lines += ["## Gates of the router", "", "| label | " + " | ".join(names) + " |"]
        lines.append("|" + "---|" * (len(names) + 1))
        for label, gates in found.routed.items():
            lines.append(f"| {label} | " + " | ".join(f"{gates[name]:.2f}" for name in names) + " |")
        lines.append("")
    lines += ["## Notes", "", *(f"- {note}" for note in found.notes), ""] if found.notes else []
    return "\n".join(lines)


def terminal(found: Evaluation) -> list[str]:
    """The same as lines of a terminal, in columns."""
    lines = []
    for group, rows in _groups(found).items():
        lines += ["", group, *_columns([["", "generated", "real", "difference", "clips"], *rows])]
    if found.sets:
        lines += ["", "Sets of clips", *_columns([list(_SET_HEAD), *(_set_row(row) for row in found.sets)])]
    lines += ["", *(f"note: {note}" for note in found.notes)] if found.notes else []
    return lines[1:]


def shown(value: Estimate | None) -> str:
    """`0.82 (0.71 to 0.90)`: the value and its interval; "" for None."""
    if value is None:
        return ""
    text = number(value.value)
    if math.isfinite(value.low):
        text += f" ({number(value.low)} to {number(value.high)})"
    return text


def number(value: float) -> str:
    """Three or more significant digits, with a real minus sign."""
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return text.replace("-", "−")


def _groups(found: Evaluation) -> dict[str, list[list[str]]]:
    groups: dict[str, list[list[str]]] = {}
    for key, row in found.rows.items():
        metric = METRICS[key]
        cells = [_title(key), shown(row.made), shown(row.real), shown(row.excess), _clips(row)]
        groups.setdefault(metric.group, []).append(cells)
    for key, value in found.router.items():
        groups.setdefault(METRICS[key].group, []).append(
            [_title(key), shown(value), "", "", str(value.clips)]
        )
    return groups


def _clips(row: Row) -> str:
    """Of the generated clips; of the real ones too where they are others."""
    real = row.made.clips if row.real is None else row.real.clips
    return str(row.made.clips) if real == row.made.clips else f"{row.made.clips}, real {real}"


def _title(key: str) -> str:
    metric = METRICS[key]
    unit = f", {metric.unit}" if metric.unit not in ("", "share") else ""
    return f"{metric.title}{unit} {_ARROWS[metric.better]}".strip()


_SET_HEAD = ("distance ↓", "all clips (95 %)", "clips", "half sets", "real halves: the floor", "")


def _set_row(row: SetRow) -> list[str]:
    found = row.distance
    return [
        row.name + (" (headline)" if row.headline else ""),
        f"{_short(found.value)} ({_short(found.low)} to {_short(found.high)})",
        f"{found.made} and {found.real}",
        f"{_short(found.halves)} ± {_short(found.halves_sd)}",
        f"{_short(found.floor)} ± {_short(found.floor_sd)}",
        "inside the floor" if found.inside_floor else "above the floor",
    ]


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def flat(found: Evaluation) -> Mapping[str, float]:
    """Figures by name, for a tracker: `evaluate/<key>`, `evaluate/real/<key>`."""
    values: dict[str, float] = {}
    for key, row in found.rows.items():
        name = key.replace("@", "_at_")
        values[f"evaluate/{name}"] = row.made.value
        if row.real is not None:
            values[f"evaluate/real/{name}"] = row.real.value
    values |= {f"evaluate/{key}": value.value for key, value in found.router.items()}
    values |= {f"evaluate/load/{name}": share for name, share in found.load.items()}
    for row_ in found.sets:
        values[f"evaluate/{row_.name}"] = row_.distance.value
        values[f"evaluate/floor/{row_.name}"] = row_.distance.floor
    return {name: value for name, value in values.items() if math.isfinite(value)}
