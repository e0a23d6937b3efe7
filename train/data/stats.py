"""What a folder of shards holds, in figures: samples, instruments, hours, captions, sizes, and whether the
latents look normalised.

Letters: F, H, W latent frames, height, width.
"""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm

from .shards import (
    FLOW,
    LATENT,
    META,
    ROI,
    TEXT,
    TEXTS,
    ShardError,
    histogram,
    read_index,
    read_manifest,
    read_part,
)
from .store import Store, open_store

_LATENTS = 512  # samples, evenly spread, whose latents are read for mean and deviation
_LONGEST_HEADER = 1 << 20  # bytes: ours have a few hundred
_MEAN, _STD = 1.0, (0.3, 3.0)  # of a channel of normalised latents, at the most
_SHOWN = 5  # captions


@dataclass
class ShardStats:
    """Figures of a folder of shards; `str()` is a page of text, `to_json` all of it."""

    root: str
    samples: dict[str, int]
    """Per split."""
    buckets: dict[str, dict[str, int]]
    """Samples per split and latent size FxHxW."""
    instruments: dict[str, dict[str, float]]
    """Sum of weights per split and instrument."""
    sources: dict[str, int]
    """Source videos per split."""
    hours: dict[str, float]
    """Of video, per split: n_frames / fps."""
    mib: dict[str, float]
    """Per kind of part."""
    share: dict[str, float] = field(default_factory=dict)
    """Of the samples with a roi, a flow, tips, and (of those that `latents_read` counts) a border."""
    tips: dict[str, float] = field(default_factory=dict)
    """Marked tips per sample: min, median, max."""
    tokens: dict[str, float] = field(default_factory=dict)
    """Tokens of a caption: min, median, max."""
    captions: int = 0
    """Different ones."""
    repeated_captions: dict[str, int] = field(default_factory=dict)
    """Captions of more than one source video, and of how many samples, most frequent first."""
    dtypes: dict[str, int] = field(default_factory=dict)
    """Samples per dtype of the latent."""
    latents_read: int = 0
    """Samples behind `mean` and `std`."""
    mean: list[float] = field(default_factory=list)
    """Per channel of the latent."""
    std: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """All figures as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"

    def __str__(self) -> str:
        total = sum(self.samples.values())
        hours, mib = _time(sum(self.hours.values())), sum(self.mib.values())
        lines = [f"{self.root}: {total} samples, {hours}, {mib:.3g} MiB"]
        for split in self.samples:
            weights = ", ".join(f"{name} {weight:g}" for name, weight in self.instruments[split].items())
            sizes = ", ".join(f"{bucket} {count}" for bucket, count in self.buckets[split].items())
            lines += [
                f"{split}: {self.samples[split]} samples of {self.sources[split]} source videos, "
                f"{_time(self.hours[split])}",
                f"  latent sizes   {sizes}",
                f"  instruments    {weights}",
            ]
        parts = ", ".join(f"{name.removesuffix('.safetensors')} {mib:.3g}" for name, mib in self.mib.items())
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.share.items())
        types = ", ".join(f"{name} {count}" for name, count in self.dtypes.items())
        lines += [
            f"MiB per part       {parts}",
            f"samples with       {shares}",
            f"tips per sample    {_range(self.tips)}",
            f"caption tokens     {_range(self.tokens)}",
            f"captions           {self.captions} different for {total} samples; "
            f"{len(self.repeated_captions)} of them for several source videos",
            *(
                f"  {count:>5} x {caption[:90]}"
                for caption, count in list(self.repeated_captions.items())[:_SHOWN]
            ),
            f"latents            {types}; {self.latents_read} read, per channel against N(0, 1):",
            "  mean " + " ".join(f"{value:6.2f}" for value in self.mean),
            "  std  " + " ".join(f"{value:6.2f}" for value in self.std),
        ]
        return "\n".join([*lines, *(f"WARNING {warning}" for warning in self.warnings)])


def shard_stats(root: str | Path) -> ShardStats:
    """Read the figures of a folder of shards, or of its URL.

    The index tells most of them; the facts and tensor headers of every sample are read, and the latents of up
    to 512, evenly spread. Raises `ShardError` where one of these is damaged: `wanmoe data verify` tells all.
    """
    store = open_store(root)
    manifest, _ = read_manifest(store)
    every = read_index(store, manifest)
    rows = [row for row in every if row["split"] != TEXTS]
    texts = [row for row in every if row["split"] == TEXTS]
    stats = _from_index(str(root), rows, texts)
    step = -(-len(rows) // _LATENTS)
    moments = _Moments()
    seen, borders = _Seen(), 0
    bar = tqdm(rows, unit="sample", desc="stats", disable=None, delay=1)
    for number, row in enumerate(bar):
        seen.add(row, _meta(store, row), _header(store, row, LATENT))
        if ROI in row["parts"]:
            seen.having["roi"] += "roi" in _header(store, row, ROI)
        if number % step == 0:
            moments.add(_latent(store, row))
            borders += _has_border(store, row)
    used = {row["text"] for row in rows}  # the text of no caption is none
    lengths = [_header(store, row, TEXT)["context"]["shape"][0] for row in texts if row["key"] in used]
    stats.tokens = _spread(lengths)
    seen.fill(stats, rows)
    moments.fill(stats, claimed=not manifest["codec"]["stand_in"])
    stats.share["border"] = borders / moments.samples
    return stats


def _from_index(
    root: str, rows: Sequence[Mapping[str, Any]], texts: Sequence[Mapping[str, Any]]
) -> ShardStats:
    splits = sorted({row["split"] for row in rows})
    sizes: Counter[str] = Counter()
    for row in [*rows, *texts]:
        for part, place in row["parts"].items():
            sizes[part] += place["size"]
    return ShardStats(
        root=root,
        samples={split: sum(row["split"] == split for row in rows) for split in splits},
        buckets={
            split: dict(sorted(Counter(row["bucket"] for row in rows if row["split"] == split).items()))
            for split in splits
        },
        instruments=histogram(rows),
        sources={},
        hours={},
        mib={part: sizes[part] / 2**20 for part in (LATENT, TEXT, ROI, FLOW, META) if part in sizes},
    )


class _Seen:
    """What the facts of the samples add up to."""

    def __init__(self) -> None:
        self.having: Counter[str] = Counter()
        self.dtypes: Counter[str] = Counter()
        self.tips: list[int] = []
        self.sources: dict[str, set[str]] = {}
        self.hours: dict[str, float] = {}
        self.captions: dict[str, list[str]] = {}
        """Source video of each sample, by caption."""

    def add(self, row: Mapping[str, Any], meta: Mapping[str, Any], latents: Mapping[str, Any]) -> None:
        split, source = row["split"], str(meta.get("source_sha256") or meta.get("source"))
        self.dtypes[latents["latent"]["dtype"]] += 1
        self.having["flow"] += FLOW in row["parts"]
        self.tips.append(len(meta.get("tips") or ()))
        self.sources.setdefault(split, set()).add(source)
        if meta.get("fps") and meta.get("n_frames"):
            seconds = float(meta["n_frames"]) / float(meta["fps"])
            self.hours[split] = self.hours.get(split, 0.0) + seconds / 3600
        self.captions.setdefault(str(meta["caption"]), []).append(source)

    def fill(self, stats: ShardStats, rows: Sequence[Mapping[str, Any]]) -> None:
        count = max(1, len(rows))
        stats.sources = {split: len(self.sources.get(split, ())) for split in stats.samples}
        stats.hours = {split: self.hours.get(split, 0.0) for split in stats.samples}
        stats.share = {name: self.having[name] / count for name in ("roi", "flow")}
        stats.share["tips"] = sum(tips > 0 for tips in self.tips) / count
        stats.tips = _spread(self.tips)
        stats.captions = len(self.captions)
        repeated = {text: len(own) for text, own in self.captions.items() if len(set(own)) > 1}
        stats.repeated_captions = dict(sorted(repeated.items(), key=lambda item: (-item[1], item[0])))
        stats.dtypes = dict(sorted(self.dtypes.items()))


class _Moments:
    """Mean and deviation of each channel over many latents [16, F, H, W]."""

    def __init__(self) -> None:
        self.samples = self.count = 0
        self.sum: Tensor = torch.zeros(1, dtype=torch.float64)
        self.squares: Tensor = torch.zeros(1, dtype=torch.float64)

    def add(self, latent: Tensor) -> None:
        values = latent.double().flatten(1)
        self.samples += 1
        self.count += values.shape[1]
        self.sum = self.sum + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    def fill(self, stats: ShardStats, claimed: bool) -> None:
        """Sets the figures; warns where latents are `claimed` to be near N(0, 1)."""
        mean = self.sum / self.count
        std = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        stats.latents_read, stats.mean, stats.std = self.samples, mean.tolist(), std.tolist()
        for channel, (middle, width) in enumerate(zip(stats.mean, stats.std, strict=True)):
            if claimed and not (abs(middle) <= _MEAN and _STD[0] <= width <= _STD[1]):
                stats.warnings.append(
                    f"latent channel {channel} has mean {middle:.2f} and std {width:.2f}; normalised latents "
                    f"have about 0 and 1 (at most {_MEAN:g} off, {_STD[0]:g} to {_STD[1]:g})"
                )


def _latent(store: Store, row: Mapping[str, Any]) -> Tensor:
    return load(read_part(store, row, LATENT))["latent"]


def _has_border(store: Store, row: Mapping[str, Any]) -> bool:
    if ROI not in row["parts"]:
        return False
    picture = load(read_part(store, row, ROI)).get("picture")
    return picture is not None and int(picture.min()) == 0


def _meta(store: Store, row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(read_part(store, row, META)))


def _header(store: Store, row: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The header of a safetensors part, without its tensors: dtype and shape by name."""
    place = row["parts"][part]
    data = store.read(row["shard"], place["offset"], min(place["size"], 4096))
    length = int.from_bytes(data[:8], "little")
    if length > min(_LONGEST_HEADER, place["size"]):
        raise ShardError(row["shard"], row["key"], part, f"damaged: its header claims {length} bytes")
    if len(data) < 8 + length:
        data = store.read(row["shard"], place["offset"], 8 + length)
    try:
        return dict(json.loads(data[8 : 8 + length]))
    except ValueError as error:
        raise ShardError(
            row["shard"], row["key"], part, f"damaged: its header is no JSON: {error}"
        ) from error


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _time(hours: float) -> str:
    seconds = hours * 3600
    return (
        f"{hours:.2f} h" if hours >= 1 else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
    )


def _range(spread: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in spread.items()) or "none"
