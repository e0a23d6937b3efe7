"""Shards read as a stream, for object stores: in the order of the tar, many samples to one request.

Plain webdataset loses samples, mixes them and runs what a tar holds without an error
(`tests/train/data/test_webdataset_failures.py`). So its stages make the order here, from the names in the
index alone, and it opens, reads and decodes nothing: bytes come through the store, are compared with the
index header by header and checksum by checksum, and one row of the index gives one item, a sample or a
`ShardError`, whatever the tar holds.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from tarfile import BLOCKSIZE, HeaderError, TarInfo
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import webdataset as wds
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from .shards import TEXT, Sample, ShardError, ShardIndex, check_part

REQUEST_BYTES = 16 * 2**20
"""Neighbouring samples are read with one request of up to so many bytes; the latency of a store is then a
small part of it."""

SHUFFLE_BYTES = 256 * 2**20
"""One reader holds back samples and their texts of up to so many bytes, over all latent sizes together."""

_log = logging.getLogger(__name__)


class _Stretch(NamedTuple):
    """Where a sample lies in its shard: up to where the next begins or, for the last one, the shard ends."""

    row: dict[str, Any]
    start: int
    end: int
    last: bool


class _Held(NamedTuple):
    """The bytes of a sample until its turn comes; `context` only keeps its text from being read again."""

    found: dict[str, bytes] | ShardError
    context: Tensor | None


class ShardStream(ShardIndex):
    """Samples of one split read sequentially, shard by shard, each checked against the index.

    Args:
        root: a folder that `ShardWriter` made, or its URL (`https://`, `s3://`, ...).
        split: "train" or "val".
        seed: another seed is another order.
        shuffle: samples held back to be mixed, in each reader and for each latent size; fewer, but one, where
            they would have more bytes than this size's equal part of `SHUFFLE_BYTES`.

    Raises `ShardError` where the manifest or the index is missing, cut short or altered.
    """

    def __init__(self, root: str | Path, split: str = "train", *, seed: int, shuffle: int = 64) -> None:
        super().__init__(root, split)
        self.seed, self.shuffle = seed, shuffle
        texts = self._places(row for row in self._texts.values() if TEXT in row["parts"])
        self._text_places = {place.row["key"]: place for own in texts.values() for place in own}
        self._contexts: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def __getstate__(self) -> dict[str, Any]:  # weak references do not cross into a worker process
        return {name: value for name, value in super().__getstate__().items() if name != "_contexts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._contexts = WeakValueDictionary()

    def samples(
        self, bucket: tuple[int, int, int], part: int, parts: int, skip: int = 0
    ) -> Iterator[Sample | ShardError]:
        """The endless sequence of one of `parts` readers; its first `skip` items are passed over, unread.

        In each epoch the readers have disjoint shares, which together are all samples of the latent size
        `bucket`, and another order and other shares than in the epoch before: whole shards where there are
        at least `parts` of them, else every `parts`-th sample. A reader goes on to its next epoch by itself,
        so near an end of an epoch, and the more shares differ in size, readers may be in different epochs:
        no reader ever ends, or waits for another. The sequence depends on seed, part, parts, shuffle and the
        index, by which alone the bytes held back are reckoned.

        A sample that cannot be read or is not what was written stands in the sequence as a `ShardError`.
        """
        if not 0 <= part < parts or skip < 0:
            raise WanmoeError(f"{self.root}: a reader is one of {parts} from 0 on, got {part}, skip {skip}")
        shards = self._layout(bucket)
        if len(shards) < parts and part == 0:
            _log.warning(
                "%s: %d shards of size %s for %d readers (ranks x workers): each reads every %d-th sample of "
                "all shards, with more and smaller requests; smaller shards would stream better",
                *(self.root, len(shards), "x".join(map(str, bucket)), parts, parts),
            )
        return self._endless(shards, self._width(shards), part, parts, skip)

    def _width(self, shards: Mapping[str, Sequence[_Stretch]]) -> int:
        """Samples of one latent size that are held back, reckoned as if each were as large as the largest."""
        largest = max(
            sum(place.end - place.start for place in (stretch, *self._texts_of([stretch])))
            for stretches in shards.values()
            for stretch in stretches
        )
        return min(self.shuffle, max(SHUFFLE_BYTES // len(self.buckets) // max(largest, 1), 1))

    def _texts_of(self, stretches: Iterable[_Stretch]) -> list[_Stretch]:
        """Where the texts of some samples lie, each once, in the order of their tars."""
        names = {stretch.row["text"] for stretch in stretches} & self._text_places.keys()
        return sorted(
            (self._text_places[name] for name in names), key=lambda place: (place.row["shard"], place.start)
        )

    def _layout(self, bucket: tuple[int, int, int]) -> dict[str, list[_Stretch]]:
        """The samples of each shard of one latent size, in the order of the tar."""
        buckets = self.buckets
        if bucket not in buckets:
            raise WanmoeError(
                f"{self.root}: no {self.split!r} samples of latent size {bucket}; there are: "
                f"{', '.join(map(str, buckets))}"
            )
        return self._places(self.rows[index] for index in buckets[bucket])

    def _places(self, rows: Iterable[dict[str, Any]]) -> dict[str, list[_Stretch]]:
        """Where rows lie: those of each shard, in the order of the tar."""
        sizes = {shard["name"]: shard["bytes"] for shard in self.manifest["shards"]}
        by_shard: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_shard.setdefault(row["shard"], []).append(row)
        for name in by_shard.keys() - sizes.keys():
            raise ShardError(name, by_shard[name][0]["key"], None, "the manifest does not name this shard")
        return {name: _stretches(own, sizes[name]) for name, own in by_shard.items()}

    def _endless(
        self, shards: Mapping[str, Sequence[_Stretch]], width: int, part: int, parts: int, skip: int
    ) -> Iterator[Sample | ShardError]:
        for epoch in count():
            share = self._share(shards, epoch, part, parts)
            if skip >= len(share):  # also where it is empty, as some are with fewer samples than readers
                skip -= len(share)
                continue
            mix = wds.shuffle(width, initial=width, seed=f"{self.seed} {epoch} {part} {parts}")
            turns = list(mix(iter(range(len(share)))))[skip:]
            skip = 0
            reading = sorted(turns)
            read = zip(reading, self._read_ahead([share[place] for place in reading]), strict=True)
            held: dict[int, _Held] = {}
            for turn in turns:
                while turn not in held:
                    place, one = next(read)
                    held[place] = one
                yield self._decoded(share[turn].row, held.pop(turn))

    def _share(
        self, shards: Mapping[str, Sequence[_Stretch]], epoch: int, part: int, parts: int
    ) -> list[_Stretch]:
        """What one reader reads in an epoch, in the order of reading."""

        def expand(names: Iterable[dict[str, str]]) -> Iterator[_Stretch]:
            for name in names:
                yield from shards[name["url"]]

        # Split after the shuffle, and moved on by one: else a reader could see the same ones for ever.
        split = wds.slice((part + epoch) % parts, None, parts)
        stages = (split, expand) if len(shards) >= parts else (expand, split)
        return list(
            wds.DataPipeline(wds.SimpleShardList(sorted(shards), seed=f"{self.seed} {epoch}"), *stages)
        )

    def _read_ahead(self, stretches: Iterable[_Stretch]) -> Iterator[_Held]:
        for run in _runs(stretches):
            contexts = self._read_contexts(run)
            for stretch, found in zip(run, self._read(run), strict=True):
                yield _Held(found, contexts.get(stretch.row["text"]))

    def _read_contexts(self, run: Sequence[_Stretch]) -> dict[str, Tensor]:
        """The texts of some samples; one that cannot be read is left to `decode`, which says why."""
        contexts, missing = {}, []
        for place in self._texts_of(run):
            known = self._contexts.get(place.row["key"])
            if known is None:
                missing.append(place)
            else:
                contexts[place.row["key"]] = known
        for texts in _runs(missing):
            try:
                found = list(self._read_run(texts))
            except OSError:
                continue
            for place, parts in zip(texts, found, strict=True):
                if isinstance(parts, ShardError):
                    continue
                try:
                    check_part(place.row, TEXT, parts[TEXT])
                    contexts[place.row["key"]] = load(parts[TEXT])["context"]
                except (ShardError, SafetensorError, KeyError):
                    continue
        self._contexts.update(contexts)
        return contexts

    def _read_text(self, key: str) -> Tensor:
        found = self._contexts.get(key)
        if found is None:
            found = self._contexts[key] = super()._read_text(key)
        return found

    def _read(self, stretches: Iterable[_Stretch]) -> Iterator[dict[str, bytes] | ShardError]:
        """The parts of each sample, or what is wrong with it, in the order given."""
        for run in _runs(stretches):
            try:
                yield from self._read_run(run)
            except OSError as error:
                if len(run) > 1:  # one by one: a hiccup of the store costs no sample that can be read now
                    for stretch in run:
                        yield from self._read([stretch])
                else:
                    yield _fault(run[0], f"cannot be read: {error.strerror or error}")

    def _read_run(self, run: Sequence[_Stretch]) -> Iterator[dict[str, bytes] | ShardError]:
        """The parts of neighbours, by one request; raises `OSError` before the first."""
        first, final = run[0], run[-1]
        # One byte more than a shard should have shows that it has more.
        size = max(final.end - first.start, 0) + final.last
        data = memoryview(self.store.read(first.row["shard"], first.start, size))
        for stretch in run:
            end = None if stretch.last else stretch.end - first.start
            yield _parts(stretch, data[stretch.start - first.start : end])

    def _decoded(self, row: Mapping[str, Any], held: _Held) -> Sample | ShardError:
        if isinstance(held.found, ShardError):
            return held.found
        try:
            return self.decode(row, held.found)
        except ShardError as error:
            if error.key == row["key"]:
                return error
            # A text's error names the text; each sample that uses it is a bad sample of its own.
            reason = f"{error.reason} (text {error.key}, shard {error.shard})"
            return ShardError(row["shard"], row["key"], TEXT, reason)


def _stretches(rows: Iterable[dict[str, Any]], size: int) -> list[_Stretch]:
    """The rows of one shard of `size` bytes, in the order of the tar."""
    rows = sorted(rows, key=_first_header)
    starts = [0, *(_first_header(row) for row in rows[1:])]
    return [
        _Stretch(row, start, end, last=row is rows[-1])
        for row, start, end in zip(rows, starts, [*starts[1:], size], strict=True)
    ]


def _first_header(row: Mapping[str, Any]) -> int:
    return min(place["offset"] for place in row["parts"].values()) - BLOCKSIZE


def _runs(stretches: Iterable[_Stretch]) -> Iterator[list[_Stretch]]:
    """Neighbours in one shard, together at most `REQUEST_BYTES` or a single sample."""
    run: list[_Stretch] = []
    for stretch in stretches:
        if run and (
            stretch.row["shard"] != run[0].row["shard"]
            or stretch.start != run[-1].end
            or stretch.end - run[0].start > REQUEST_BYTES
        ):
            yield run
            run = []
        run.append(stretch)
    if run:
        yield run


def _parts(stretch: _Stretch, data: memoryview) -> dict[str, bytes] | ShardError:
    """The parts of a sample from the bytes of its stretch of the tar, which holds them and nothing else."""
    row, start, end, last = stretch
    if len(data) < end - start:
        return _fault(stretch, f"the shard is cut short: {max(len(data), 0)} of {end - start} bytes are left")
    parts, at = {}, 0
    for part, place in sorted(row["parts"].items(), key=lambda item: item[1]["offset"]):
        try:
            found = TarInfo.frombuf(bytes(data[at : at + BLOCKSIZE]), "utf-8", "surrogateescape")
        except HeaderError as error:
            return _fault(stretch, f"the tar is altered: {error}", part)
        at += BLOCKSIZE
        wanted = (f"{row['key']}.{part}", place["size"], place["offset"])
        if (found.name, found.size, start + at) != wanted:
            reason = "the tar has member {!r} of {} bytes at {} where the index has {!r} of {} at {}"
            return _fault(stretch, reason.format(found.name, found.size, start + at, *wanted), part)
        parts[part] = bytes(data[at : at + place["size"]])
        at += place["size"] + -place["size"] % BLOCKSIZE
    if len(data) > end - start or any(data[at:]):
        verb = "ends with" if last else "has after this sample"
        return _fault(stretch, f"the shard {verb} bytes that the index does not name")
    return parts


def _fault(stretch: _Stretch, reason: str, part: str | None = None) -> ShardError:
    return ShardError(stretch.row["shard"], stretch.row["key"], part, reason)
