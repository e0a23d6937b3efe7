"""A run as text: one table per problem and mode, for a terminal and for markdown, and the modelled table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

from . import model
from .ceilings import Ceilings
from .record import Row, Run, read_run, write_text

__all__ = ["folder_page", "markdown", "modelled_text", "run_text", "unmeasured"]

COLUMNS = (
    "variant",
    "ms",
    "p20-p80",
    "x frozen",
    "over %",
    "model %",
    "GB/s",
    "floor %",
    "graph ms",
    "peak MB",
    "saved MB",
    "error",
    "x eager",
)
LEGEND = """\
over %: time over the frozen linear (or block) of the same mode. model %: what counting bytes predicts from
this run's ceilings. GB/s: bytes that must move, over the time. floor %: time at the ceilings, each the best
of its repeats, over the time. graph ms: replayed as a CUDA graph; far below ms, the host is what takes the
time. peak: memory above the start; saved: activations kept for the backward. error: {errors}. x eager: over
the error of the eager loop, at most 1.2 is wanted; !: more, but within rounding. *: fastest with adapters,
its p80 below the others' p20. Noise: of the frozen linear, timed twice under two names."""
ERRORS = "of the worst tensor against fp64, an output's or dx's over the norm of the adapters' part alone"
_NOISY = 10.0
"""Percent of noise above which a row is not called the fastest, and a warning is printed."""
_RESET, _BOLD, _RED, _GREEN, _DIM = "\033[0m", "\033[1m", "\033[31m", "\033[32m", "\033[2m"


def run_text(run: Run, *, colour: bool = False) -> str:
    """The whole run for a terminal."""
    parts = [summary_line(run)]
    if run.ceilings is not None:
        parts.append(ceilings_text(run.ceilings))
    for title, rows in _tables(run.rows):
        parts.append(_terminal_table(title, rows, colour))
    parts.append(f"\n{legend(run)}")
    parts += _failures(run)
    return "\n".join(parts)


def summary_line(run: Run) -> str:
    found = run.provenance
    versions = found["versions"]
    commit = found["commit"]
    code = f", commit {commit['hash'][:10]}{' + changes' if commit['dirty'] else ''}" if commit else ""
    cuda = f", CUDA {versions['cuda']}, triton {versions['triton']}" if versions["cuda"] else ""
    part = "" if run.configuration.get("complete", True) else " (interrupted)"
    return (
        f"{found['device']}, torch {versions['torch']}{cuda}{code}, {found['utc']}, suite {run.suite}{part}"
    )


def legend(run: Run) -> str:
    """What the columns mean; a run of other things than linears says itself what its errors are."""
    return fill(LEGEND.format(errors=run.configuration.get("errors", ERRORS)), 110)


def ceilings_text(ceilings: Ceilings) -> str:
    unit = (lambda v: f"{v:.0f}") if ceilings.tflops >= 10 else (lambda v: f"{v:.3g}")
    shapes = ", ".join(f"{m.tokens} x {m.d_in} x {m.d_out}: {unit(m.tflops)}" for m in ceilings.matmuls)
    return (
        f"ceilings ({ceilings.dtype}): copy {ceilings.copy_tbps:.3g} TB/s, "
        f"matrix product {unit(ceilings.tflops)} TFLOP/s ({shapes})"
    )


def modelled_text(cards: Sequence[model.Card] = model.CARDS, tokens: int = 5376) -> str:
    """Overheads that nobody measured, as the byte model has them."""
    names = " / ".join(card.name for card in cards)
    lines = [
        f"MODELLED, not measured: % over the frozen linear on {names}, bf16, {tokens} tokens",
        f"(at {', '.join(f'{card.name} {card.tflops:g} TFLOP/s, {card.tbps:g} TB/s' for card in cards)})",
    ]
    heads = ["", "implementation", *(shape.name for shape in model.SHAPES)]
    cells = [[direction, name, *values] for direction, name, values in model.table(cards, tokens)]
    for place in range(len(cells) - 1, 0, -1):
        if cells[place][0] == cells[place - 1][0]:
            cells[place][0] = ""
    return "\n".join([*lines, *_aligned([heads, *cells], left=2)])


def unmeasured(runs: Iterable[Run]) -> list[model.Card]:
    """The cards of the model on which none of these runs was made."""
    names = [run.provenance["device"] for run in runs]
    return [card for card in model.CARDS if not any(card.name in name for name in names)]


def markdown(run: Run, stem: str) -> str:
    """The run as a markdown section; `stem` names its JSON and its plot."""
    parts = [f"## {run.suite}: {run.provenance['device']}", "", summary_line(run) + ".", ""]
    parts += [f"Command: `{run.provenance['command']}`; data: [{stem}.json]({stem}.json)", ""]
    if run.ceilings is not None:
        shown = ceilings_text(run.ceilings)
        parts += [f"{shown[0].upper()}{shown[1:]}.", ""]
    states = [state for state in run.provenance.get("gpu_states", []) if state]
    if states:
        shown = ", ".join(f"{key} {value}" for key, value in states[-1].items() if key != "name")
        parts += [f"GPU at the end (read, never set): {shown}.", ""]
    parts += [f"![roofline and overheads]({stem}.png)", "", legend(run), ""]
    for title, rows in _tables(run.rows):
        present = [row for row in rows if row.ms]
        columns = _used(present)
        parts += [f"### {title}", ""]
        parts += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        best = _best(rows)
        for row in present:
            cells = _cells(row, best)
            parts.append(f"| {' | '.join(cells[name] for name in columns)} |")
        parts.append("")
        parts += [line.strip() + "\n" for line in _verdict_lines(rows)]
        parts += _absent_lines(rows)
        parts.append("")
    return "\n".join([*parts, *_failures(run), ""])


def folder_page(folder: Path) -> Path:
    """Writes README.md of a results folder from its JSON: the newest run of each suite, others by name."""
    runs = {path: read_run(path) for path in sorted(folder.glob("*.json"))}
    newest: dict[str, Path] = {}
    for path, run in runs.items():
        last = newest.get(run.suite)
        if last is None or runs[last].provenance["utc"] <= run.provenance["utc"]:
            newest[run.suite] = path
    page = ["# Benchmark results", "", "Generated from the JSON files beside this page.", ""]
    page += [markdown(runs[path], path.stem) for path in newest.values()]
    older = [path for path in runs if path not in newest.values()]
    if older:
        page += ["## Older runs", "", *(f"- [{path.name}]({path.name})" for path in older), ""]
    page += ["## Modelled, not measured", "", "```text", modelled_text(unmeasured(runs.values())), "```", ""]
    target = folder / "README.md"
    write_text(target, "\n".join(page))
    return target


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    out = []
    for _, some in groupby(rows, key=lambda row: (row.group, row.mode)):
        these = list(some)
        noise = noise_pct(these)
        shown = f"; noise {noise:.1f} %" if noise is not None else ""
        repeats = len(next((row.samples for row in these if row.samples), ()))
        out.append((f"{these[0].title} - {these[0].mode} (median of {repeats}{shown})", these))
    return out


def noise_pct(rows: Sequence[Row]) -> float | None:
    """How far the frozen linear is from itself, in percent: between its two names, or within one.

    The larger of the difference of both medians and half the spread from p20 to p80.
    """
    again = next((row for row in rows if row.variant.endswith("again")), None)
    if again is None or again.ms is None or again.overhead_pct is None:
        return None
    spread = 50 * (again.ms["p80"] - again.ms["p20"]) / again.ms["median"]
    return max(abs(again.overhead_pct), spread)


def _best(rows: Sequence[Row]) -> str | None:
    """The fastest right variant with adapters, where its p80 is below every other's p20."""
    right = [row for row in rows if row.status == "ok" and row.ms and "frozen" not in row.variant]
    right.sort(key=lambda row: row.ms["median"] if row.ms else 0.0)
    if len(right) < 2 or right[0].ms is None:
        return None
    others = min(row.ms["p20"] for row in right[1:] if row.ms)
    if (noise_pct(rows) or 0.0) > _NOISY:
        return None
    return right[0].variant if right[0].ms["p80"] < others else None


def _verdict_lines(rows: Sequence[Row]) -> list[str]:
    """What a user gets (auto, on the CPU packed) beside the peers, in one line, and a warning of noise."""
    ms = {row.variant: row.ms["median"] for row in rows if row.ms and row.status == "ok"}
    ours = next((name for name in ("auto", "packed") if name in ms), None)
    peers = [name for name in ("PEFT", "PEFT compiled", "loop", "loop compiled") if name in ms]
    lines = []
    if ours is not None and peers:
        shares = ", ".join(f"{ms[ours] / ms[peer]:.2f} x {peer}" for peer in peers)
        lines.append(f"  {ours} takes {shares}")
    noise = noise_pct(rows)
    if noise is not None and noise > _NOISY:
        lines.append(f"  noise of {noise:.0f} %: differences below that mean nothing; run on a quiet machine")
    return lines


def _cells(row: Row, best: str | None) -> dict[str, str]:
    ms = row.ms or {"median": 0.0, "p20": 0.0, "p80": 0.0}
    mark = " FAILED" if row.status == "FAILED" else " *" if row.variant == best else ""
    ratio = row.error_ratio
    return {
        "variant": row.variant + mark,
        "ms": _figure(ms["median"]),
        "p20-p80": f"{_figure(ms['p20'])}-{_figure(ms['p80'])}",
        "x frozen": _optional(row.ratio, ".3f"),
        "over %": _optional(row.overhead_pct, "+.1f"),
        "model %": _optional(row.model_pct, "+.1f"),
        "GB/s": _optional(row.gbps, ".3g" if row.gbps and row.gbps < 100 else ".0f"),
        "floor %": _optional(row.floor_pct, ".0f"),
        "graph ms": _figure(row.graph_ms) if row.graph_ms is not None else "",
        "peak MB": _optional(row.peak_bytes, ".0f", 1e6),
        "saved MB": _optional(row.saved_bytes, ".1f", 1e6),
        "error": f"{row.error:.1e} {row.tensor}" if row.error is not None else "",
        "x eager": _optional(ratio, ".2f") + (" !" if ratio is not None and ratio > 1.2 else ""),
    }


def _used(rows: Sequence[Row]) -> list[str]:
    """Columns in which any row has something."""
    filled = [_cells(row, None) for row in rows]
    return [name for name in COLUMNS if name == "variant" or any(cells[name] for cells in filled)]


def _terminal_table(title: str, rows: Sequence[Row], colour: bool) -> str:
    present = [row for row in rows if row.ms]
    best = _best(rows)
    columns = _used(present)
    lines = _aligned([columns, *([_cells(row, best)[name] for name in columns] for row in present)])
    if colour:
        lines[0] = f"{_DIM}{lines[0]}{_RESET}"
        for place, row in enumerate(present, 1):
            tint = _RED if row.status == "FAILED" else _GREEN if row.variant == best else ""
            lines[place] = f"{tint}{lines[place]}{_RESET}" if tint else lines[place]
        title = f"{_BOLD}{title}{_RESET}"
    return "\n".join(["", title, *lines, *_verdict_lines(rows), *_absent_lines(rows)])


def _absent_lines(rows: Sequence[Row]) -> list[str]:
    """Rows without a time, one line per reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.ms:
            why = f"{'FAILED: ' if row.status == 'FAILED' else ''}{row.note}"
            reasons.setdefault(why, []).append(row.variant)
    notes = [f"{row.variant}: {row.note}" for row in rows if row.ms and row.note]
    return [f"  not run: {', '.join(names)} ({why})" for why, names in reasons.items()] + [
        f"  {note}" for note in notes
    ]


def _failures(run: Run) -> list[str]:
    failed = run.failed
    if not failed:
        return []
    return ["", f"{len(failed)} rows FAILED:"] + [
        f"  {row.group}/{row.mode} {row.variant}: {row.note or row.tensor}"
        + (f", error {row.error:.2g}" if row.error is not None else "")
        for row in failed
    ]


def _aligned(table: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns padded to one width; the first `left` to the left, the others to the right."""
    widths = [max(len(line[place]) for line in table) for place in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def _optional(value: Any, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit, form)
