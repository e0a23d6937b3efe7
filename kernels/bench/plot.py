"""The picture of a run: the roofline of its ceilings with our points, and what each variant adds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .ceilings import Ceilings
from .record import Row, Run

__all__ = ["plot_run"]

_COLOURS = {
    "frozen": "#404040",
    "loop": "#c44e52",
    "loop compiled": "#dd8452",
    "PEFT": "#937860",
    "packed": "#4c72b0",
    "library": "#64b5cd",
    "single_pass": "#8172b3",
    "delta_first": "#ccb974",
    "epilogue": "#da8bc3",
    "auto": "#55a868",
    "wanmoe": "#55a868",
    "diffusers + PEFT": "#937860",
}
_POINTS = ("frozen", "loop", "packed", "auto")
_BAR_MODES = {"fwd": "forward", "fwd+bwd": "forward and backward"}
_SLOW = ("loop", "loop compiled", "PEFT", "PEFT compiled")
_NEVER_CUT = 60.0
"""Percent up to which a bar keeps its length, so that lengths can be compared."""
_CLIP = 1.25
"""The bars end at this multiple of the largest overhead that is not one of these."""


def plot_run(run: Run, path: Path) -> str | None:
    """Writes a PNG; returns None, or why there is none."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed"
    rows = [row for row in run.rows if row.status == "ok" and row.ms]
    if not rows:
        return "no plot: no row has a time"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = {mode: groups for mode in _BAR_MODES if (groups := _bar_groups(rows, mode))}
    tall = max([5.6, *(1.6 + sum(0.2 * len(group) + 0.4 for group in g) for g in columns.values())])
    wide = len(columns) + (run.ceilings is not None)
    figure = pyplot.figure(figsize=(max(6.5 * wide, 7), tall), layout="constrained")
    grid = figure.add_gridspec(2, wide, height_ratios=(5.5, max(tall - 5.5, 0.01)))
    if run.ceilings is not None:
        _roofline(figure.add_subplot(grid[0, 0]), run.ceilings, rows)
    for place, (mode, groups) in enumerate(columns.items(), run.ceilings is not None):
        _overheads(figure.add_subplot(grid[:, place]), groups, _BAR_MODES[mode])
    versions = run.provenance["versions"]
    figure.suptitle(
        f"{run.provenance['device']}, torch {versions['torch']}, "
        f"suite {run.suite}, {run.provenance['utc'][:10]}"
    )
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)
    partial.replace(path)
    return None


def _roofline(axes: Any, ceilings: Ceilings, rows: Sequence[Row]) -> None:
    """Arithmetic rate over intensity (both of what must be done), under this run's two ceilings."""
    points = [row for row in rows if row.variant in _POINTS and row.flops and row.moved and row.ms]
    if points:
        tflops, tbps = ceilings.tflops, ceilings.copy_tbps
        ridge = tflops / tbps
        intensities = [row.flops / row.moved for row in points]
        low, high = min(*intensities, ridge / 2) / 2, max(*intensities, ridge) * 4
        slowest = min(row.flops / row.ms["median"] / 1e9 for row in points if row.ms)
        axes.set_ylim(min(slowest, low * tbps) / 2, tflops * 2)
        axes.plot([low, ridge, high], [low * tbps, tflops, tflops], color="black", linewidth=1.5)
        axes.annotate(
            f"matrix product {tflops:.3g} TFLOP/s",
            (high, tflops),
            xytext=(-4, 5),
            textcoords="offset points",
            ha="right",
        )
        axes.annotate(
            f"copy {tbps:.3g} TB/s",
            (low, low * tbps),
            xytext=(14, 4),
            textcoords="offset points",
            va="center",
        )
    seen: set[str] = set()
    for variant in _POINTS:
        for row in points:
            if row.variant != variant or not row.ms:
                continue
            axes.scatter(
                row.flops / row.moved,
                row.flops / row.ms["median"] / 1e9,
                s=34,
                marker={"fwd": "o", "bwd": "v"}.get(row.mode, "s"),
                color=_COLOURS[variant],
                alpha=0.8,
                label=None if variant in seen else variant,
                zorder=3,
            )
            seen.add(variant)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte that must move",
        ylabel="TFLOP/s",
        title="Roofline: measured ceilings (o fwd, v bwd, squares both)",
    )
    axes.grid(True, which="both", alpha=0.2)
    if seen:
        axes.legend(loc="lower right")


def _bar_groups(rows: Sequence[Row], mode: str) -> list[list[Row]]:
    """Per linear, the largest problem with gates per clip that ran in this mode."""
    out = []
    for linear in dict.fromkeys(row.linear for row in rows):
        some = [r for r in rows if (r.linear, r.mode) == (linear, mode) and r.gates in ("clip", "")]
        if some:
            slug = max(some, key=lambda row: (row.tokens, -row.clips)).group
            bars = [row for row in some if row.group == slug and "frozen" not in row.variant]
            out.append([row for row in bars if row.overhead_pct is not None])
    return [group for group in out if group]


def _overheads(axes: Any, groups: Sequence[Sequence[Row]], what: str) -> None:
    ours = [_spread(row)[1] for group in groups for row in group if row.variant not in _SLOW]
    limit = max(_NEVER_CUT, _CLIP * max([*ours, 0.0]))
    least = min([0.0, *(_spread(row)[0] for group in groups for row in group)])
    place, ticks, labels = 0.0, [], []
    for group in groups:
        first = group[0]
        axes.text(
            0.006,
            place,
            f"{first.linear}, {first.tokens} tokens",
            weight="bold",
            va="center",
            transform=axes.get_yaxis_transform(),
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        place += 1.0
        for row in group:
            value = row.overhead_pct or 0.0
            low, high = _spread(row)
            axes.barh(place, min(value, limit), height=0.8, color=_COLOURS.get(row.variant, "#8c8c8c"))
            axes.plot([min(low, limit), min(high, limit)], [place, place], color="black", linewidth=0.8)
            axes.text(
                max(min(max(value, high), limit), 0.0),
                place,
                f" {value:+.1f}{' ->' if value > limit else ''}",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2, "alpha": 0.7},
            )
            ticks.append(place)
            labels.append(row.variant)
            place += 1.0
        place += 0.6
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set(
        xlim=(least - 0.03 * limit, limit * 1.25),
        ylim=(place - 1.0, -0.9),
        xlabel="% over the frozen one; lines from p20 to p80; -> goes on",
        title=f"What the adapters cost: {what}",
    )
    axes.axvline(0, color="black", linewidth=0.8, zorder=1)
    axes.grid(True, axis="x", alpha=0.2)


def _spread(row: Row) -> tuple[float, float]:
    """p20 and p80 as overheads in percent."""
    if not row.ms or not row.ratio:
        return 0.0, 0.0
    base = row.ms["median"] / row.ratio
    return 100 * (row.ms["p20"] / base - 1), 100 * (row.ms["p80"] / base - 1)
