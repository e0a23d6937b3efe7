"""The figures of `wanmoe bench engine` as Markdown tables: what it prints and what docs/engine.md shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KINDS = ("frozen", "resident", "trained", "gradients", "buckets", "masters", "moments")
TARGET = 2.0
"""How much faster the step with the prefix should be, by the project's own target at A14B's sizes."""


def tables(result: dict[str, Any]) -> list[str]:
    """One Markdown table, with a line above it, for each part that was measured."""
    made = []
    if "measured" in result:
        made += [measured_table(result["measured"]), modelled_table(result["modelled"])]
    if "speed" in result:
        made.append(speed_table(result["speed"], result["no_gpu"]))
    if "prefix" in result:
        made += [prefix_table(result["prefix"])]
    return made


def measured_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formulas and real ranks at small sizes, in kB."""
    lines = []
    for row in rows:
        nodes = row["ranks"] // row["local"]
        ranks = f"{row['ranks']}, {nodes} nodes" if nodes > 1 else str(row["ranks"])
        most = {key: max(one[key] for one in row["measured"]) for key in row["measured"][0]}
        totals = []
        for what, found in (("formula", row["modelled"]), ("counted", most)):
            held = [found["frozen"] + found["resident"], found["trained"]]
            held += [found["gradients"] + found["buckets"], found["masters"] + found["moments"]]
            held.append(sum(found[kind] for kind in KINDS))
            moved = [found["gathered"], found["in_node"], found["all_reduced"] + found["scattered"]]
            totals.append(sum(held) + sum(moved) + found["peak"])
            ratio = "" if what == "formula" else f"{totals[1] / totals[0]:.6f}"
            figures = [f"{value / 1e3:.1f}" for value in (*held, *moved, found["peak"])]
            lines.append([row["subject"], str(row["stage"]), ranks, what, *figures, ratio])
    head = ["model", "ZeRO", "ranks", "", "base", "adapter", "gradients", "optimizer", "states"]
    head += ["gathered", "in node", "reduced", "at once", "ratio"]
    return _table("Bytes of one rank, kB, by formula and counted, bf16:", head, lines, left=(0, 2, 3))


def modelled_table(rows: Sequence[dict[str, Any]]) -> str:
    """A14B by the formulas, in GB."""
    lines = []
    for row in rows:
        one, models = row["one_model"], row["models"]
        held = [one["frozen"] + one["resident"], one["trained"] + one["gradients"] + one["buckets"]]
        held += [one["masters"] + one["moments"]]
        figures = [_gb(models * value) for value in held] + [_gb(row["states"])]
        figures += [_gb(one["peak"]) if one["peak"] else "", _gb(one["gathered"]), _gb(row["received"])]
        figures += [_gb(row["across"]) if row["nodes"] > 1 else ""]
        estimate = row["deepspeed_estimate"]
        figures += ["" if estimate is None else _gb(estimate)]
        where = f"{row['ranks']} on {row['nodes']} node{'s' * (row['nodes'] > 1)}"
        lines.append([str(models), where, row["zero"], *figures])
    head = ["models", "ranks", "ZeRO", "base", "adapter", "optimizer", "states", "at once", "gathered"]
    head += ["received", "by all nodes", "DeepSpeed says"]
    return _table("A14B, GB a rank, modelled:", head, lines, left=(1, 2))


def speed_table(rows: Sequence[dict[str, Any]], no_gpu: str | None) -> str:
    """Steps as they are, and with their parts one after the other."""
    lines = []
    for row in rows:
        apart = row["apart"]
        times = [f"{1e3 * apart[key]:.1f}" for key in ("compute", "gather", "reduce", "loader", "whole")]
        step = [f"{1e3 * row['step_s']:.1f}", f"{row['tokens_per_s']:.0f}"]
        peak = "" if row["peak_memory"] is None else _gb(row["peak_memory"])
        lines.append(
            [row["subject"], row["device"], str(row["ranks"]), str(row["stage"]), *step, *times, peak]
        )
    head = ["model", "device", "ranks", "ZeRO", "step ms", "tokens/s", "compute", "gather", "reduce"]
    head += ["loader", "sum", "peak GB"]
    text = _table("Training steps; from `compute` on one part after the other, ms:", head, lines, left=(0, 1))
    return text if no_gpu is None else f"{text}\n\n{no_gpu}"


def prefix_table(part: dict[str, Any]) -> str:
    """The same step with and without the prefix."""
    rows, first, lines = part["rows"], part["adapted_from"], []
    for row in rows:
        full = next(other for other in rows if other["name"] == row["name"].replace("prefix", "full graph"))
        gain = "" if full is row else f"{full['median_s'] / row['median_s']:.2f}"
        calls = [f"{counts[0]}, {counts[first]}" for counts in (row["forwards"], row["backwards"])]
        peak = [] if row["peak_bytes"] is None else [f"{row['peak_bytes'] / 1e6:.1f}"]
        figures = [f"{1e3 * row['median_s']:.1f}", gain, *calls, f"{row['saved_bytes'] / 1e6:.1f}", *peak]
        lines.append([row["name"], *figures, f"{row['loss']:.9g}", f"{row['gradient_difference']:.1e}"])
    sizes = part["sizes"]
    head = ["step", "ms", "full / prefix", f"forwards, blocks 0-{first - 1} and on", "backwards", "saved MB"]
    head += [] if rows[0]["peak_bytes"] is None else ["peak MB"]
    head += ["loss", "gradients differ"]
    told = (
        f"{sizes['num_layers']} blocks {sizes['dim']} wide, adapted from block {first}, {part['tokens']} "
        f"tokens, {part['dtype']}, median of {len(rows[0]['seconds'])} (target at A14B's sizes: {TARGET:g}):"
    )
    return _table(told, head, lines, left=(0,))


def _gb(value: int) -> str:
    return f"{value / 1e9:.3g}" if value else "0"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Aligned, so that it reads in a terminal too; columns in `left` are text."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (w + 2) if place in left else "-" * (w + 1) + ":" for place, w in enumerate(widths))
    return "\n".join([title, "", line(head), f"|{rule}|", *map(line, rows)])
