"""Shards: tar files of encoded clips, with a manifest and an index that make every read checked and every
order exact.

A folder of shards (written by `shard_writer`) holds `{split}-{F}x{H}x{W}-{NNNNNN}.tar`, `index.jsonl` (where
each part of each sample lies, and its CRC-32), `null.safetensors` (the text encoding of no caption) and
`manifest.json` (what was written, with which codec;
SHA-256 per shard). The tars stay plain WebDataset tars, but are read by offset: a tar reader loses samples
without an error when a shard is cut at a member border or a byte of a header flips, and never sees a flipped
byte of a payload.

Letters: F, H, W latent frames, height, width; n tokens of the caption; D width of the text encoder.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset

from ...moe_lora.errors import WanmoeError

FORMAT = "wanmoe-shards/1"
LATENT, TEXT, ROI, META = "latent.safetensors", "text.safetensors", "roi.safetensors", "json"
NULL = "null.safetensors"


class ShardError(WanmoeError):
    """A shard or one of its samples that cannot be trusted: which shard, sample and part, and why."""

    def __init__(self, shard: str, key: str | None, part: str | None, reason: str) -> None:
        where = ", ".join(
            text for text in (f"shard {shard}", key and f"sample {key}", part and f"part {part}") if text
        )
        super().__init__(f"{where}: {reason}")
        self.shard, self.key, self.part, self.reason = shard, key, part, reason

    def __reduce__(self) -> tuple[Any, ...]:  # so that it crosses the border of a loader's worker process
        return ShardError, (self.shard, self.key, self.part, self.reason)


class Sample(NamedTuple):
    """One encoded clip.

    `latent` fp32 [16, F, H, W], normalised; `context` fp32 [n, D]; `roi` fp32 [F, H, W] in [0, 1] or None;
    `image_latent` fp32 [20, F, H, W] (i2v) or None; `instruments` (name, weight) pairs, () = no evidence.
    """

    key: str
    latent: Tensor
    context: Tensor
    roi: Tensor | None
    image_latent: Tensor | None
    instruments: tuple[tuple[str, float], ...]
    caption: str
    meta: dict[str, Any]


class ShardDataset(Dataset[Sample]):
    """Reads single samples of one split by offset, each checked against its CRC-32.

    Args:
        root: a folder that `ShardWriter` made.
        split: "train" or "val".
        bucket: latent size "FxHxW" to keep; needed for `.bucket` where the split holds several.

    Raises `ShardError` where the manifest, the index or a shard is missing, cut short or altered.
    """

    def __init__(self, root: str | Path, split: str = "train", *, bucket: str | None = None) -> None:
        self.root, self.split = Path(root), split
        self.manifest, self.fingerprint = read_manifest(self.root)
        every = [row for row in read_index(self.root, self.manifest) if row["split"] == split]
        self.buckets = sorted({row["bucket"] for row in every})
        self._rows = [row for row in every if bucket in (None, row["bucket"])]
        if not every:
            raise WanmoeError(
                f"{root}: no {split!r} samples; splits: {', '.join(self.manifest['n_samples'])}"
            )
        if not self._rows:
            raise WanmoeError(
                f"{root}: no {split!r} samples of size {bucket}; there are: {', '.join(self.buckets)}"
            )
        used = {row["shard"] for row in self._rows}
        for shard in self.manifest["shards"]:
            if shard["name"] in used:
                check_size(self.root, shard)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        latents = self._tensors(row, LATENT, ("latent",))
        context = self._tensors(row, TEXT, ("context",))["context"]
        roi = self._tensors(row, ROI, ("roi",))["roi"].float() / 255 if ROI in row["parts"] else None
        meta = self._meta(row)
        image = latents.get("image_latent")
        return Sample(
            key=row["key"],
            latent=latents["latent"].float(),
            context=context.float(),
            roi=roi,
            image_latent=None if image is None else image.float(),
            instruments=self.instruments(index),
            caption=str(meta["caption"]),
            meta=meta,
        )

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in the order of the index."""
        return [row["key"] for row in self._rows]

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Latent (F, H, W) of all samples; an error where the split holds several sizes."""
        if len(self.buckets) > 1 and len({row["bucket"] for row in self._rows}) > 1:
            raise WanmoeError(
                f"{self.root}: the {self.split!r} samples have several sizes ({', '.join(self.buckets)}); "
                f'choose one: bucket="{self.buckets[0]}", or prepare the clips with one size'
            )
        frames, height, width = (int(n) for n in self._rows[0]["bucket"].split("x"))
        return frames, height, width

    @property
    def null_context(self) -> Tensor | None:
        """fp32 [n, D], what the text encoder made of no caption; None in a folder that has none."""
        facts = self.manifest.get("null_context")
        if facts is None:
            return None
        path = self.root / NULL
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ShardError(str(path), None, None, f"cannot be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise ShardError(str(path), None, None, "altered or cut short: its SHA-256 is not the manifest's")
        return load(data)["context"].float()

    def instruments(self, index: int) -> tuple[tuple[str, float], ...]:
        """(name, weight) pairs of one sample, from the index alone."""
        return tuple((str(one["name"]), float(one["weight"])) for one in self._rows[index]["instruments"])

    def read_part(self, index: int, part: str) -> bytes:
        """The checked bytes of one part of one sample."""
        return _read(self.root, self._rows[index], part)

    def _tensors(self, row: Mapping[str, Any], part: str, names: Sequence[str]) -> dict[str, Tensor]:
        data = _read(self.root, row, part)
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise ShardError(row["shard"], row["key"], part, f"not a safetensors file: {error}") from error
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ShardError(row["shard"], row["key"], part, f"holds no tensor {missing[0]!r}")
        return tensors

    def _meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            meta = json.loads(_read(self.root, row, META))
        except ValueError as error:
            raise ShardError(row["shard"], row["key"], META, f"not JSON: {error}") from error
        if meta.get("key") != row["key"]:
            raise ShardError(row["shard"], row["key"], META, f"belongs to sample {meta.get('key')!r}")
        return dict(meta)


def is_shard_file(name: str) -> bool:
    """Whether a file of this name in a folder of shards was written by `ShardWriter`."""
    return name in ("manifest.json", "index.jsonl", NULL) or name.endswith(".tar")


def read_manifest(root: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a folder of shards and its SHA-256; `ShardError` where it is not one."""
    path = root / "manifest.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); a folder of shards is made by `wanmoe prepare`"
        raise ShardError(str(path), None, None, reason) from error
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise ShardError(str(path), None, None, f"not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ShardError(str(path), None, None, f"format is {found!r}, expected {FORMAT!r}")
    return manifest, hashlib.sha256(data).hexdigest()


def read_index(root: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `index.jsonl`, checked against the manifest; `ShardError` where they differ."""
    path = root / "index.jsonl"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(str(path), None, None, f"cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != manifest["index"]["sha256"]:
        reason = f"altered or cut short: {len(data)} bytes, the manifest says {manifest['index']['bytes']}"
        raise ShardError(str(path), None, None, reason)
    return [json.loads(line) for line in data.splitlines()]


def check_size(root: Path, shard: Mapping[str, Any]) -> None:
    """Raise `ShardError` where a shard is missing or has not the bytes that the manifest says."""
    path = root / shard["name"]
    if not path.is_file():
        raise ShardError(
            str(path), None, None, "the file is missing; prepare the clips again or copy it anew"
        )
    size = path.stat().st_size
    if size != shard["bytes"]:
        verb = "cut short" if size < shard["bytes"] else "too long"
        raise ShardError(str(path), None, None, f"{verb}: {size} bytes, the manifest says {shard['bytes']}")


def histogram(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Sum of instrument weights per split and instrument; "(no evidence)" counts the samples without one."""
    counts: dict[str, dict[str, float]] = {}
    for row in rows:
        split = counts.setdefault(str(row["split"]), {})
        for one in row["instruments"] or [{"name": "(no evidence)", "weight": 1.0}]:
            split[one["name"]] = round(split.get(one["name"], 0.0) + float(one["weight"]), 6)
    return {split: dict(sorted(counts[split].items())) for split in sorted(counts)}


def histogram_lines(counts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The histogram as text, a line per split."""
    return [
        f"{split}: " + ", ".join(f"{name} {weight:g}" for name, weight in own.items())
        for split, own in counts.items()
    ]


def _read(root: Path, row: Mapping[str, Any], part: str) -> bytes:
    place = row["parts"].get(part)
    if place is None:
        raise ShardError(row["shard"], row["key"], part, "the sample has no such part")
    try:
        with (root / row["shard"]).open("rb") as file:
            file.seek(place["offset"])
            data = file.read(place["size"])
    except OSError as error:
        raise ShardError(row["shard"], row["key"], part, f"cannot be read: {error.strerror}") from error
    if len(data) != place["size"]:
        raise ShardError(row["shard"], row["key"], part, f"cut short: {len(data)} of {place['size']} bytes")
    if zlib.crc32(data) != place["crc32"]:
        raise ShardError(row["shard"], row["key"], part, "altered: the checksum differs from the index")
    return data
