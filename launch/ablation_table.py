"""The table of an ablation: means and deviations over seeds, and the paired difference from one row."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
    """95 % interval over clips, and over seeds where there are several; NaN where it cannot be had."""


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
    apart = apart[:, np.isfinite(apart).all(0)]
    if apart.shape[1] < 2:
        return Difference(value, math.nan, math.nan)
    centre = value - float(apart.mean())  # shares of tips are pooled, their clips are not
    low, high = _over_clips(apart[0], seed) if len(apart) == 1 else _over_both(apart)
    return Difference(value, low + centre, high + centre)


def _numbers(each: Sequence[float | None]) -> list[float]:
    return [math.nan if one is None else one for one in each]


def _over_clips(apart: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Of differences [N]: over draws of clips with replacement."""
    drawn = np.random.default_rng(seed).integers(len(apart), size=(_DRAWS, len(apart)))
    low, high = np.quantile(apart[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _over_both(apart: NDArray[np.float64]) -> tuple[float, float]:
    """Of differences [S, N] by seed and clip, both drawn from many: crossed random effects, with
    Satterthwaite's degrees of freedom. Draws with replacement of two or three seeds would give an interval
    that is too narrow."""
    from scipy.stats import t

    seeds, clips = apart.shape
    mean = apart.mean()
    by_seed, by_clip = apart.mean(1), apart.mean(0)
    rest = apart - by_seed[:, None] - by_clip + mean
    # Of the mean: what seeds bring, what clips bring, and what both have in them already.
    of_seeds, of_clips = by_seed.var(ddof=1) / seeds, by_clip.var(ddof=1) / clips
    twice = (rest**2).sum() / ((seeds - 1) * (clips - 1)) / (seeds * clips)
    if of_seeds + of_clips == 0:
        return float(mean), float(mean)
    variance = max(of_seeds + of_clips - twice, of_seeds, of_clips)
    freedom = (of_seeds + of_clips) ** 2 / (of_seeds**2 / (seeds - 1) + of_clips**2 / (clips - 1))
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return float(mean) - half, float(mean) + half


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
