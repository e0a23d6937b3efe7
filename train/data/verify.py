"""A full pass over a folder of shards: every byte hashed, every sample read, every fault named."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE, HeaderError, TarInfo
from typing import Any, NamedTuple

from tqdm import tqdm

from .contents import content_faults, manifest_fault, row_fault
from .shards import (
    META,
    TEXTS,
    ShardError,
    check_part,
    check_size,
    histogram,
    histogram_lines,
    read_index,
    read_manifest,
    read_prompts,
)
from .store import LocalStore, Store, is_url, open_store
from .stored_prompts import ROUTER_PROMPTS

_PIECE = 8 << 20  # bytes read at a time


@dataclass
class ShardReport:
    """What `verify_shards` found; `problems` is empty for a folder that can be trained on."""

    root: str | Path
    shards: int = 0
    """Sound ones."""
    bytes: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    """Samples per split."""
    histogram: dict[str, dict[str, float]] = field(default_factory=dict)
    """Sum of instrument weights per split and instrument."""
    shared_sources: list[str] = field(default_factory=list)
    """Source videos with samples in more than one split: held-out moments, not held-out videos."""
    problems: list[str] = field(default_factory=list)
    """One line each: those of the whole folder, then shard by shard, by offset."""

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


@dataclass
class ShardCheck:
    """What one pass over one shard found."""

    bytes: int = 0
    sha256: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Index rows whose parts are all there, unaltered and right, by offset."""
    sources: list[tuple[str, str, str]] = field(default_factory=list)
    """Source video, its SHA-256 or "", and split of each of these rows that is a sample."""
    faults: list[ShardError] = field(default_factory=list)


def verify_shards(root: str | Path) -> ShardReport:
    """Check a folder of shards, or its URL, in full: SHA-256, tar members, checksums, shapes, dtypes, NaN,
    keys, texts, fingerprints and counts.

    Each shard is read once. A damaged place is named as closely as it can be (a part of a sample, else a
    shard). Faults of shards and samples are collected in the report; `ShardError` is raised where the
    manifest or the index itself cannot be read. Tars that the manifest does not name are looked for in
    folders alone.
    """
    store = open_store(root)
    manifest, _ = read_manifest(store)
    if fault := manifest_fault(manifest):
        raise ShardError(store.path("manifest.json"), None, None, fault)
    report = ShardReport(root)
    rows: list[dict[str, Any]] = []
    by_shard: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_index(store, manifest), start=1):
        if fault := row_fault(row):
            report.problems.append(f"index.jsonl:{number}: {fault}")
        else:
            rows.append(row)
            by_shard.setdefault(row["shard"], []).append(row)
    report.samples = dict(Counter(row["split"] for row in rows if row["split"] != TEXTS))
    report.histogram = histogram(rows)
    report.problems += [*folder_faults(manifest, rows), *prompt_faults(store, manifest)]
    sources: dict[str, set[tuple[str, str]]] = {}
    total = sum(shard["bytes"] for shard in manifest["shards"])
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None, delay=1) as bar:
        for shard in manifest["shards"]:
            check = check_shard(store, shard, by_shard.get(shard["name"], []), manifest, bar.update)
            report.problems += [str(fault) for fault in check.faults]
            report.shards += not check.faults
            report.bytes += 0 if check.faults else check.bytes
            for source, digest, split in check.sources:
                sources.setdefault(digest or source, set()).add((source, split))
    shared = [seen for seen in sources.values() if len({split for _, split in seen}) > 1]
    report.shared_sources = sorted({source for seen in shared for source, _ in seen})
    named = {shard["name"] for shard in manifest["shards"]}
    strays = [] if is_url(root) else sorted({path.name for path in Path(root).glob("*.tar")} - named)
    report.problems += [f"shard {stray}: the manifest does not name it" for stray in strays]
    return report


def prompt_faults(store: Store, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with the router prompts; nothing where there are none."""
    try:
        if read_prompts(store, manifest) is None and isinstance(store, LocalStore):
            there = (store.root / ROUTER_PROMPTS).exists()
            return [f"{ROUTER_PROMPTS}: the manifest does not name it"] if there else []
    except ShardError as error:
        return [str(error)]
    return []


def folder_faults(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the manifest and the rows of the index contradict each other or themselves."""
    texts = {row["key"] for row in rows if row["split"] == TEXTS}
    samples = [row for row in rows if row["split"] != TEXTS]
    shards = {shard["name"]: shard for shard in manifest["shards"]}
    faults = [
        f"shard {name}: the manifest names it {count} times"
        for name, count in Counter(shard["name"] for shard in manifest["shards"]).items()
        if count > 1
    ]
    counts = Counter(row["key"] for row in rows)
    faults += [f"sample {key}: the key occurs {count} times" for key, count in counts.items() if count > 1]
    for row in rows:
        if row["shard"] not in shards:
            faults.append(f"shard {row['shard']}, sample {row['key']}: the manifest has no such shard")
    faults += [f"sample {row['key']}: no text {row['text']}" for row in samples if row["text"] not in texts]
    null = manifest.get("null_text")
    if null is not None and null not in texts:
        faults.append(f"no text {null}, which the manifest says is that of no caption")
    used = {row["text"] for row in samples} | {null}
    faults += [f"text {text}: no sample uses it" for text in sorted(texts - used)]
    said = {"n_samples": manifest["n_samples"], "n_texts": manifest["n_texts"]}
    there = {"n_samples": dict(Counter(row["split"] for row in samples)), "n_texts": len(texts)}
    faults += [
        f"{what}: {said[what]} said, {there[what]} there" for what in said if said[what] != there[what]
    ]
    if manifest["histogram"] != histogram(rows):
        faults.append("the manifest's histogram of instruments is not that of the index")
    own = Counter(row["shard"] for row in rows)
    for name, shard in shards.items():
        if shard["n_samples"] != own[name]:
            faults.append(f"shard {name}: {shard['n_samples']} samples said, {own[name]} in the index")
    return faults


def check_shard(
    store: Store,
    shard: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    manifest: Mapping[str, Any],
    advance: Callable[[int], object] = lambda count: None,
) -> ShardCheck:
    """Read a shard once, from front to back, and hold it against its row of the manifest and its rows of the
    index; `advance` is told of bytes read."""
    name, check = shard["name"], ShardCheck()
    try:
        check_size(store, shard)
    except ShardError as error:
        check.faults.append(error)
    try:
        check.bytes = store.size(name)
    except OSError:
        return check
    stream = _Stream(store, name, check.bytes, advance)
    whole = check.bytes >= shard["bytes"]
    members = _members(check, name, rows, whole)
    pending: dict[int, dict[str, bytes]] = {}
    try:
        for row, part, data in _read(stream, members, check.faults, whole):
            pending.setdefault(id(row), {})[part] = data
            if len(pending[id(row)]) == len(row["parts"]):
                _check_row(check, row, pending.pop(id(row)), manifest)
    except OSError as error:
        reason = f"cannot be read at byte {stream.offset}: {error.strerror or error}"
        check.faults.append(ShardError(name, None, None, reason))
    check.sha256 = stream.sha.hexdigest()
    if not check.faults and check.sha256 != shard["sha256"]:
        check.faults.append(ShardError(name, None, None, "altered: SHA-256 differs from the manifest"))
    return check


class _Member(NamedTuple):
    """A part of a sample, where the index says that it lies."""

    offset: int
    size: int
    part: str
    row: dict[str, Any]


class _Stream:
    """A file of a store read once, front to back, in large pieces; knows the SHA-256 of what was read."""

    def __init__(self, store: Store, name: str, size: int, advance: Callable[[int], object]) -> None:
        self.store, self.name, self.size, self.advance = store, name, size, advance
        self.sha = hashlib.sha256()
        self.offset = 0
        """Of the next byte that `take` gives."""
        self._ahead, self._at = b"", 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end of the file."""
        left = len(self._ahead) - self._at
        if left < count and (unread := self.size - self.offset - left):
            wanted = min(unread, max(_PIECE, count - left))
            piece = self.store.read(self.name, self.offset + left, wanted)
            self.sha.update(piece)
            self.advance(len(piece))
            self._ahead, self._at = self._ahead[self._at :] + piece, 0
        data = self._ahead[self._at : self._at + count]
        self._at += len(data)
        self.offset += len(data)
        return data


def _members(check: ShardCheck, shard: str, rows: Sequence[dict[str, Any]], whole: bool) -> list[_Member]:
    """The parts of all rows by offset, less those that lie outside the file or over another part.

    In a shard that is not `whole` those outside are one fault together: what the cut took.
    """
    every = [
        _Member(at["offset"], at["size"], part, row) for row in rows for part, at in row["parts"].items()
    ]
    end, kept, cut = 0, [], {}
    for member in sorted(every, key=lambda member: member[:3]):
        if member.offset + member.size > check.bytes:
            cut[id(member.row)] = member
            if whole:
                reason = f"the index has it up to byte {member.offset + member.size} of {check.bytes}"
                check.faults.append(ShardError(shard, member.row["key"], member.part, reason))
        elif member.offset - BLOCKSIZE < end:
            reason = f"lies over another part: it begins at {member.offset - BLOCKSIZE}, that ends at {end}"
            check.faults.append(ShardError(shard, member.row["key"], member.part, reason))
        else:
            kept.append(member)
            end = member.offset + member.size + -member.size % BLOCKSIZE
    if cut and not whole:
        first = next(iter(cut.values()))
        reason = f"{len(cut)} of {len(rows)} samples lie beyond its end, from {first.row['key']} on"
        check.faults.append(ShardError(shard, None, None, reason))
    return kept


def _read(
    stream: _Stream, members: Sequence[_Member], faults: list[ShardError], ends: bool
) -> Iterator[tuple[dict[str, Any], str, bytes]]:
    """The data of each member, its header checked; all of the file has passed at the end.

    `ends` says that nothing but zeros should follow the last member: the file was not cut.
    """
    for offset, size, part, row in members:
        if gap := offset - BLOCKSIZE - stream.offset:
            reason = f"{gap} bytes from {stream.offset} on are in no row of the index"
            faults.append(ShardError(stream.name, None, None, reason))
            stream.take(gap)
        try:
            info = TarInfo.frombuf(stream.take(BLOCKSIZE), "utf-8", "replace")
            if (info.name, info.size, info.isreg()) != (f"{row['key']}.{part}", size, True):
                reason = f"the tar has {info.name!r} of {info.size} bytes in its place"
                faults.append(ShardError(stream.name, row["key"], part, reason))
        except HeaderError as error:
            reason = f"its tar header is altered ({error}); its data may be sound"
            faults.append(ShardError(stream.name, row["key"], part, reason))
        yield row, part, stream.take(size)
        if stream.take(-size % BLOCKSIZE).strip(b"\0"):
            faults.append(ShardError(stream.name, row["key"], part, "the zeros that follow it are altered"))
    end = stream.offset
    altered = False
    while piece := stream.take(_PIECE):
        altered = altered or bool(piece.strip(b"\0"))
    if altered and ends:
        reason = f"after the last sample, from byte {end} on, there is something that the index does not name"
        faults.append(ShardError(stream.name, None, None, reason))


def _check_row(
    check: ShardCheck, row: dict[str, Any], parts: Mapping[str, bytes], manifest: Mapping[str, Any]
) -> None:
    """Checksums, then contents: what is altered need not be looked into."""
    faults = []
    for part, data in parts.items():
        try:
            check_part(row, part, data)
        except ShardError as error:
            faults.append(error)
    if not faults:
        found = content_faults(row, parts, manifest)
        faults = [ShardError(row["shard"], row["key"], part, reason) for part, reason in found]
    check.faults += faults
    if faults:
        return
    check.rows.append(row)
    if META in parts:
        meta = json.loads(parts[META])
        check.sources.append((str(meta.get("source")), meta.get("source_sha256") or "", row["split"]))
