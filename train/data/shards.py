"""Shards: tar files of encoded clips, with a manifest and an index that make every read checked and every
order exact.

A folder of shards (written by `shard_writer`) holds `{split}-{F}x{H}x{W}-{NNNNNN}.tar`, `text-{NNNNNN}.tar`
(every encoded caption once), `index.jsonl` (where each part of each sample and text lies, and its CRC-32) and
`manifest.json` (what was written, with which codec; SHA-256 per shard); where the manifest says so, there is
`router_prompts.safetensors` too (see `stored_prompts`). The tars stay plain WebDataset tars, but are read by
offset, or checked against the index when they are streamed: a tar reader loses samples without an error when
a shard is cut at a member border or a byte of a header flips, and never sees a flipped byte of a payload.

Letters: F, H, W latent frames, height, width; n tokens of the caption; D width of the text encoder.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset

from ...moe_lora.errors import WanmoeError
from .store import Store, open_store
from .stored_prompts import ROUTER_PROMPTS, RouterPrompts, unpack_prompts

FORMAT = "wanmoe-shards/2"
LATENT, TEXT, ROI, FLOW, META = (
    "latent.safetensors",
    "text.safetensors",
    "roi.safetensors",
    "flow.safetensors",
    "json",
)
TEXTS = "text"  # the split of the index' rows that are captions
_KEPT_TEXTS = 16  # a caption has up to 4 MB; windows of one clip, which share it, are read close together


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
    """One encoded clip; what was not stored is None.

    `latent` [16, F, H, W], normalised, as stored (fp16 or bf16); `context` [n, D]; `image_latent`
    [20, F, H, W] (i2v); `roi` fp32 [F, H, W] in [0, 1], 1 = instrument; `picture` fp32 [H, W], 0 = the
    endoscope's border; `flow` fp32 [F - 1, 2, H, W]: (x, y) in latent pixels from latent frame k + 1 back to
    k; `visible` fp32 [F - 1, H, W], 1 = seen in both; `instruments` (name, weight) pairs, () = no evidence;
    `meta` the JSON part.
    """

    key: str
    latent: Tensor
    context: Tensor
    image_latent: Tensor | None
    roi: Tensor | None
    picture: Tensor | None
    flow: Tensor | None
    visible: Tensor | None
    instruments: tuple[tuple[str, float], ...]
    caption: str
    meta: dict[str, Any]


class ShardIndex:
    """What a folder of shards says of one split, without reading a sample.

    Args:
        root: a folder that `ShardWriter` made, or its URL (`https://`, `s3://`, ...).
        split: "train" or "val".
        bucket: latent size "FxHxW" to keep; all sizes when None.

    Raises `ShardError` where the manifest, the index or a shard is missing, cut short or altered.
    """

    def __init__(self, root: str | Path, split: str = "train", *, bucket: str | None = None) -> None:
        self.root, self.split = str(root), split
        self.store = open_store(root)
        self.manifest, self.fingerprint = read_manifest(self.store)
        every = read_index(self.store, self.manifest)
        self._texts = {row["key"]: row for row in every if row["split"] == TEXTS}
        own = [row for row in every if row["split"] == split]
        self.rows = [row for row in own if bucket in (None, row["bucket"])]
        if not own:
            held_out = "; prepare with --val-fraction above 0" if split == "val" else ""
            known = ", ".join(self.manifest["n_samples"])
            raise WanmoeError(f"{root}: no {split!r} samples; splits: {known}{held_out}")
        if not self.rows:
            known = ", ".join(sorted({row["bucket"] for row in own}))
            raise WanmoeError(f"{root}: no {split!r} samples of size {bucket}; there are: {known}")
        self._text = lru_cache(_KEPT_TEXTS)(self._read_text)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:  # a cache does not cross into a worker process
        return {name: value for name, value in self.__dict__.items() if name != "_text"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._text = lru_cache(_KEPT_TEXTS)(self._read_text)

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in the order of the index."""
        return [row["key"] for row in self.rows]

    @property
    def buckets(self) -> dict[tuple[int, int, int], list[int]]:
        """Indices of the samples of each latent size (F, H, W), sizes sorted."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for index, row in enumerate(self.rows):
            frames, height, width = (int(n) for n in row["bucket"].split("x"))
            found.setdefault((frames, height, width), []).append(index)
        return dict(sorted(found.items()))

    @property
    def null_context(self) -> Tensor | None:
        """[n, D], what the text encoder made of no caption; None in a folder that has none."""
        key = self.manifest.get("null_text")
        return None if key is None else self._text(key)

    def router_prompts(self) -> RouterPrompts | None:
        """Prompts that teach a router, read and checked; None in a folder that has none."""
        return read_prompts(self.store, self.manifest)

    def instruments(self, index: int) -> tuple[tuple[str, float], ...]:
        """(name, weight) pairs of one sample, from the index alone."""
        return tuple((str(one["name"]), float(one["weight"])) for one in self.rows[index]["instruments"])

    def has_region(self, index: int) -> bool:
        """Whether a sample says where the instrument is, from the index alone."""
        row = self.rows[index]
        return bool(row.get("region", ROI in row["parts"]))

    def read(self, index: int) -> Sample:
        """One sample, each part checked against its CRC-32; its parts lie together and are read at once."""
        row = self.rows[index]
        places = row["parts"].values()
        start = min(place["offset"] for place in places)
        stop = max(place["offset"] + place["size"] for place in places)
        data = memoryview(_read(self.store, row, None, start, stop - start))
        parts = {
            part: bytes(data[place["offset"] - start : place["offset"] - start + place["size"]])
            for part, place in row["parts"].items()
        }
        return self.decode(row, parts)

    def check_shards(self) -> None:
        """Raise `ShardError` where a shard of this split is missing or has not the bytes it should have."""
        used = {row["shard"] for row in [*self.rows, *self._texts.values()]}
        for shard in self.manifest["shards"]:
            if shard["name"] in used:
                check_size(self.store, shard)

    def decode(self, row: Mapping[str, Any], parts: Mapping[str, bytes]) -> Sample:
        """The sample of an index row from the bytes of its parts; `ShardError` where one is altered."""
        for part in row["parts"]:
            if part not in parts:
                raise ShardError(row["shard"], row["key"], part, "the shard lacks this part of the sample")
            check_part(row, part, parts[part])
        latents = _tensors(row, LATENT, parts[LATENT], ("latent",))
        region = _tensors(row, ROI, parts[ROI]) if ROI in row["parts"] else {}
        motion = _tensors(row, FLOW, parts[FLOW], ("flow", "visible")) if FLOW in row["parts"] else {}
        meta = self._meta(row, parts[META])
        return Sample(
            key=row["key"],
            latent=latents["latent"],
            context=self._text(row["text"]),
            image_latent=latents.get("image_latent"),
            roi=_share(region.get("roi")),
            picture=_share(region.get("picture")),
            flow=motion["flow"].float() if motion else None,
            visible=_share(motion.get("visible")),
            instruments=tuple((str(one["name"]), float(one["weight"])) for one in row["instruments"]),
            caption=str(meta["caption"]),
            meta=meta,
        )

    def _read_text(self, key: str) -> Tensor:
        row = self._texts.get(key)
        if row is None:
            raise ShardError(self.root, key, TEXT, "the index has no such text")
        return _tensors(row, TEXT, read_part(self.store, row, TEXT), ("context",))["context"]

    def _meta(self, row: Mapping[str, Any], data: bytes) -> dict[str, Any]:
        try:
            meta = json.loads(data)
        except ValueError as error:
            raise ShardError(row["shard"], row["key"], META, f"not JSON: {error}") from error
        if meta.get("key") != row["key"]:
            raise ShardError(row["shard"], row["key"], META, f"belongs to sample {meta.get('key')!r}")
        for name in ("codec", "text_encoder"):
            if meta.get(name) != self.manifest[name]:
                reason = (
                    f"encoded with another {name}: {meta.get(name)}, the manifest says {self.manifest[name]}"
                )
                raise ShardError(row["shard"], row["key"], META, reason)
        return dict(meta)


class ShardDataset(ShardIndex, Dataset[Sample]):
    """Reads single samples of one split by offset.

    Arguments and errors as of `ShardIndex`; the sizes of the shards are checked at once.
    """

    def __init__(self, root: str | Path, split: str = "train", *, bucket: str | None = None) -> None:
        super().__init__(root, split, bucket=bucket)
        self.check_shards()

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)


def is_shard_file(name: str) -> bool:
    """Whether a file of this name in a folder of shards was written by `ShardWriter`."""
    return name in ("manifest.json", "index.jsonl", ROUTER_PROMPTS) or name.endswith(".tar")


def read_manifest(store: Store) -> tuple[dict[str, Any], str]:
    """The manifest of a folder of shards and its SHA-256; `ShardError` where it is not one."""
    path = store.path("manifest.json")
    try:
        data = store.read("manifest.json")
    except OSError as error:
        reason = f"cannot be read ({_cause(error)}); a folder of shards is made by `wanmoe prepare`"
        raise ShardError(path, None, None, reason) from error
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise ShardError(path, None, None, f"damaged, not JSON: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found != FORMAT:
        reason = f"format is {found!r}, expected {FORMAT!r}; prepare the clips again"
        raise ShardError(path, None, None, reason)
    if data != manifest_bytes(manifest):
        reason = "altered: it is not as `wanmoe prepare` or `wanmoe data repair` wrote it; copy it anew"
        raise ShardError(path, None, None, reason)
    return dict(manifest), hashlib.sha256(data).hexdigest()


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """`manifest.json` of these facts, which carries a checksum of itself."""
    facts = {name: value for name, value in manifest.items() if name != "checksum"}
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    facts["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(facts, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


def compact_json(value: Mapping[str, Any]) -> bytes:
    """A line of the index, or the JSON part of a sample: one form for the same facts."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def read_index(store: Store, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `index.jsonl`, checked against the manifest; `ShardError` where they differ."""
    path = store.path("index.jsonl")
    try:
        data = store.read("index.jsonl")
    except OSError as error:
        raise ShardError(path, None, None, f"cannot be read ({_cause(error)})") from error
    if hashlib.sha256(data).hexdigest() != manifest["index"]["sha256"]:
        reason = (
            f"altered or cut short: {len(data)} bytes, the manifest says {manifest['index']['bytes']}; "
            "`wanmoe data repair` makes it again"
        )
        raise ShardError(path, None, None, reason)
    return [json.loads(line) for line in data.splitlines()]


def check_size(store: Store, shard: Mapping[str, Any]) -> None:
    """Raise `ShardError` where a shard is missing or has not the bytes that the manifest says."""
    path = store.path(shard["name"])
    try:
        size = store.size(shard["name"])
    except OSError as error:
        reason = (
            f"the file is missing ({_cause(error)}); copy it anew, or `wanmoe data repair` drops its samples"
        )
        raise ShardError(path, None, None, reason) from error
    if size != shard["bytes"]:
        verb = "cut short" if size < shard["bytes"] else "too long"
        raise ShardError(path, None, None, f"{verb}: {size} bytes, the manifest says {shard['bytes']}")


def read_prompts(store: Store, manifest: Mapping[str, Any]) -> RouterPrompts | None:
    """The router prompts that a manifest names, None where it names none; `ShardError` where they are not as
    they were written."""
    said = manifest.get("router_prompts")
    if said is None:
        return None
    path = store.path(ROUTER_PROMPTS)
    try:
        data = store.read(ROUTER_PROMPTS)
    except OSError as error:
        raise ShardError(path, None, None, f"cannot be read ({_cause(error)}); copy it anew") from error
    if hashlib.sha256(data).hexdigest() != said["sha256"]:
        reason = f"altered or cut short: {len(data)} bytes, the manifest says {said['bytes']}"
        raise ShardError(path, None, None, f"{reason}; `wanmoe data repair` goes on without it")
    try:
        prompts = unpack_prompts(data, manifest["text_dim"])
    except ValueError as error:
        raise ShardError(path, None, None, str(error)) from error
    if len(prompts.texts) != said["n"]:
        reason = f"holds {len(prompts.texts)} prompts, the manifest says {said['n']}"
        raise ShardError(path, None, None, reason)
    return prompts


def read_part(store: Store, row: Mapping[str, Any], part: str) -> bytes:
    """The checked bytes of one part of a sample or text."""
    place = row["parts"].get(part)
    if place is None:
        raise ShardError(row["shard"], row["key"], part, "the sample has no such part")
    data = _read(store, row, part, place["offset"], place["size"])
    check_part(row, part, data)
    return data


def _read(store: Store, row: Mapping[str, Any], part: str | None, offset: int, size: int) -> bytes:
    try:
        return store.read(row["shard"], offset, size)
    except OSError as error:
        raise ShardError(row["shard"], row["key"], part, f"cannot be read: {_cause(error)}") from error


def check_part(row: Mapping[str, Any], part: str, data: bytes) -> None:
    """Raise `ShardError` where the bytes of a part are not those that were written."""
    place = row["parts"][part]
    if len(data) != place["size"]:
        raise ShardError(row["shard"], row["key"], part, f"cut short: {len(data)} of {place['size']} bytes")
    if zlib.crc32(data) != place["crc32"]:
        raise ShardError(row["shard"], row["key"], part, "altered: the checksum differs from the index")


def histogram(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Sum of instrument weights per split and instrument; "(no evidence)" counts the samples without one."""
    counts: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["split"] == TEXTS:
            continue
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


def _tensors(row: Mapping[str, Any], part: str, data: bytes, names: Sequence[str] = ()) -> dict[str, Tensor]:
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ShardError(row["shard"], row["key"], part, f"not a safetensors file: {error}") from error
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ShardError(row["shard"], row["key"], part, f"holds no tensor {missing[0]!r}")
    return tensors


def _share(stored: Tensor | None) -> Tensor | None:
    """0..255 as 0..1."""
    return None if stored is None else stored.float() / 255


def _cause(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
