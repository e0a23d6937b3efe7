"""The table of an ablation: means and deviations over seeds, and the paired difference from one row."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import write_atomic
from .ablation import FIGURES

_DRAWS = 2000
_WHOLE = ("parameters", "train_s")

Result = Mapping[str, Any]


class Difference(NamedTuple):
    """A row less the reference."""

    value: float
    low: float
    high: float
    """95 % interval over draws of clips, and of seeds where there are several; NaN where it cannot be had."""


def columns(result: Result) -> list[str]:
    """The figures that some row has, in the order of the file."""
    return [key for key in result["figures"] if any(_values(result, name, key) for name in result["rows"])]


def _values(result: Result, name: str, key: str) -> list[float]:
    seeds = result["rows"][name].values()
    return [row["figures"][key]["value"] for row in seeds if key in row["figures"]]


def difference(result: Result, name: str, key: str, seed: int = 0) -> Difference | None:
    """Of a figure from the reference, over the seeds that both have; None without any."""
    rows, others = result["rows"][name], result["rows"].get(result["reference"], {})
    # A row that trains nothing has one result for all seeds.
    seeds = list(others) if len(rows) == 1 else [one for one in rows if one in others]
    pairs = [(rows.get(one, next(iter(rows.values()))), others[one]) for one in seeds]
    pairs = [
        (own["figures"][key], other["figures"][key])
        for own, other in pairs
        if key in own["figures"] and key in other["figures"]
    ]
    if not pairs:
        return None
    value = statistics.fmean(own["value"] - other["value"] for own, other in pairs)
    each = [(own.get("each"), other.get("each")) for own, other in pairs]
    if key in _WHOLE or any(own is None or other is None for own, other in each):
        return Difference(value, *_over_seeds([own["value"] - other["value"] for own, other in pairs]))
    apart = np.array([np.subtract(_numbers(own), _numbers(other)) for own, other in each])
    rng = np.random.default_rng(seed)
    seeds_, clips = apart.shape
    drawn = [
        np.nanmean(apart[np.ix_(rng.integers(seeds_, size=seeds_), rng.integers(clips, size=clips))])
        for _ in range(_DRAWS)
    ]
    centre = value - float(np.nanmean(apart))  # shares of tips are pooled, their clips are not
    low, high = np.quantile(drawn, [0.025, 0.975]) + centre
    return Difference(value, float(low), float(high))


def _numbers(each: Sequence[float | None]) -> list[float]:
    return [math.nan if one is None else one for one in each]


def _over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Of a figure that no clip has by itself: Student's interval over the seeds, from three on."""
    if len(values) < 3:
        return math.nan, math.nan
    from scipy.stats import t

    middle = statistics.fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half


def table(result: Result) -> str:
    """Markdown: every row, then every row's difference from the reference."""
    keys = columns(result)
    head = ["| row | " + " | ".join(FIGURES[key] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    out = [*head]
    for name, axis in _by_axis(result):
        cells = [_cell(key, _values(result, name, key)) for key in keys]
        out += [f"| {_told(name, axis)} | " + " | ".join(cells) + " |"]
    reference = result["reference"]
    if reference not in result["rows"]:
        return "\n".join([*out, "", f'No differences: the reference "{reference}" is not among the rows.'])
    clips = _clips(result, reference)
    seeds = f"{len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else "one seed"
    over = f"{clips} held-out clips and {seeds}" if clips else seeds
    interval = f", with its 95 % interval over {over}" if clips or len(result["seeds"]) > 1 else ""
    out += ["", f'Difference from "{reference}", paired{interval}:', "", *head]
    for name, axis in _by_axis(result):
        if name != reference:
            cells = [_difference_cell(key, difference(result, name, key)) for key in keys]
            out += [f"| {_told(name, axis)} | " + " | ".join(cells) + " |"]
    return "\n".join(out)


def _clips(result: Result, name: str) -> int:
    """Clips that a row's loss is of; 0 where figures of single clips are not there."""
    rows = result["rows"][name].values()
    each = [
        row["figures"][key].get("each") for row in rows for key in ("loss", "roi") if key in row["figures"]
    ]
    return max((len(one) for one in each if one is not None), default=0)


def _by_axis(result: Result) -> list[tuple[str, str]]:
    """Rows in the order of their file, with their axis where it has one."""
    return [(name, result["axes"].get(name, "")) for name in result["rows"]]


def _told(name: str, axis: str) -> str:
    return f"{axis}: {name}" if axis and not name.startswith(axis) else name


def _cell(key: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if key in _WHOLE:
        return f"{mean:,.0f}"
    spread = f" ± {_number(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{_number(mean)}{spread}"


def _difference_cell(key: str, found: Difference | None) -> str:
    if found is None:
        return ""
    if key in _WHOLE:
        return f"{found.value:+,.0f}".replace("-", "−")
    text = _number(found.value, "+")
    if math.isfinite(found.low):
        text += f" ({_number(found.low, '+')} to {_number(found.high, '+')})"
        if found.low > 0 or found.high < 0:
            text = f"**{text}**"
    return text


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("-", "−")


def write_result(result: Result, folder: Path) -> Path:
    """Writes `ablation.json` and, beside it, its table `ablation.md`; returns the former."""
    path = folder / "ablation.json"
    text = json.dumps(_rounded(result), indent=None, separators=(",", ":")) + "\n"
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    failed = [f"\nFailed: {name}: {why}\n" for name, why in result["failed"].items()]
    page = "".join([table(result), "\n", *failed])
    write_atomic(path.with_suffix(".md"), lambda partial: partial.write_text(page, encoding="utf-8"))
    return path


def read_result(path: Path) -> dict[str, Any]:
    """A result that `write_result` wrote; WanmoeError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WanmoeError(f"{path}: not a JSON file that can be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != "wanmoe-ablation/1":
        raise WanmoeError(f"{path}: not the result of an ablation (ablation.json)")
    return found


def _rounded(value: Any) -> Any:
    """JSON values with numbers of seven digits; what is not finite becomes null."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
