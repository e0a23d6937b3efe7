"""A full pass over a folder of shards: every byte hashed, every sample read, every fault named."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...moe_lora.files import file_sha256
from .shards import (
    TEXTS,
    Sample,
    ShardDataset,
    ShardError,
    check_size,
    histogram,
    histogram_lines,
    read_index,
    read_manifest,
)
from .store import open_store


@dataclass
class ShardReport:
    """What `verify_shards` found; `problems` is empty for a folder that can be trained on."""

    root: Path
    shards: int = 0
    bytes: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    """Samples per split."""
    histogram: dict[str, dict[str, float]] = field(default_factory=dict)
    """Sum of instrument weights per split and instrument."""
    shared_sources: list[str] = field(default_factory=list)
    """Source videos with samples in more than one split: held-out moments, not held-out videos."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        samples = ", ".join(f"{count} {split}" for split, count in sorted(self.samples.items()))
        lines = [
            f"{self.root}: {samples} samples in {self.shards} sound shards, {self.bytes / 2**20:.1f} MiB"
        ]
        lines += histogram_lines(self.histogram)
        if self.shared_sources:
            lines.append(f"{len(self.shared_sources)} videos are in several splits: held-out moments of them")
        return "\n".join([*lines, *(f"FAULT {problem}" for problem in self.problems)])


def verify_shards(root: str | Path) -> ShardReport:
    """Check a folder of shards in full: SHA-256, tar members, counts, shapes, dtypes, NaN, duplicate keys.

    Faults of shards and samples are collected in the report; `ShardError` is raised where the manifest or the
    index itself cannot be read.
    """
    root = Path(root)
    store = open_store(root)
    manifest, _ = read_manifest(store)
    rows = read_index(store, manifest)
    report = ShardReport(root, histogram=histogram(rows))
    report.samples = dict(Counter(row["split"] for row in rows if row["split"] != TEXTS))
    for key, count in Counter(row["key"] for row in rows).items():
        if count > 1:
            report.problems.append(f"sample {key}: the key occurs {count} times")
    sound = _check_shards(report, manifest["shards"], Counter(row["shard"] for row in rows))
    named = {shard["name"] for shard in manifest["shards"]}
    for stray in sorted(path.name for path in root.glob("*.tar") if path.name not in named):
        report.problems.append(f"shard {stray}: the manifest does not name it")
    sources: dict[str, set[str]] = {}
    for split in report.samples if len(sound) == len(named) else ():
        for sample in _samples(report, ShardDataset(root, split)):
            sources.setdefault(str(sample.meta.get("source")), set()).add(split)
    report.shared_sources = sorted(source for source, splits in sources.items() if len(splits) > 1)
    return report


def _check_shards(report: ShardReport, shards: list[dict[str, Any]], counts: Counter[str]) -> set[str]:
    sound = set()
    for shard in shards:
        name = shard["name"]
        try:
            check_size(open_store(report.root), shard)
            if file_sha256(report.root / name) != shard["sha256"]:
                raise ShardError(name, None, None, "altered: SHA-256 differs from the manifest")
            with tarfile.open(report.root / name) as tar:
                keys = {member.name.split(".")[0] for member in tar}
            if not len(keys) == counts[name] == shard["n_samples"]:
                reason = (
                    f"samples: {len(keys)} in the tar, {counts[name]} in the index, {shard['n_samples']} said"
                )
                raise ShardError(name, None, None, reason)
        except (ShardError, tarfile.TarError) as error:
            report.problems.append(str(error))
            continue
        sound.add(name)
        report.shards += 1
        report.bytes += shard["bytes"]
    return sound


def _samples(report: ShardReport, dataset: ShardDataset) -> Iterator[Sample]:
    widths: set[int] = set()
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except ShardError as error:
            report.problems.append(str(error))
            continue
        widths.add(sample.context.shape[-1])
        size = tuple(int(n) for n in str(sample.meta["bucket"]).split("x"))
        faults = [
            (
                sample.latent.shape != (16, *size),
                f"latent {list(sample.latent.shape)}, bucket {sample.meta['bucket']}",
            ),
            (not torch.isfinite(sample.latent).all(), "the latent holds NaN or infinity"),
            (not torch.isfinite(sample.context).all(), "the text holds NaN or infinity"),
            (sample.context.ndim != 2, f"the text is {list(sample.context.shape)}, expected [n, D]"),
            (sample.roi is not None and sample.roi.shape != size, "the region has not the latent's size"),
            (
                sample.image_latent is not None and sample.image_latent.shape != (20, *size),
                "wrong image latent",
            ),
            (sample.meta.get("normalised") is not True, "the latent is not marked as normalised"),
        ]
        report.problems += [f"sample {sample.key}: {text}" for wrong, text in faults if wrong]
        yield sample
    if len(widths) > 1:
        report.problems.append(f"{dataset.split}: text widths differ: {sorted(widths)}")
