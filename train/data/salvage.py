"""What a tar still holds when the index does not say, or not reliably: whole samples, and what vouches for
each."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from tarfile import BLOCKSIZE, HeaderError, TarInfo
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from .contents import row_fault
from .shards import FLOW, LATENT, META, ROI, TEXT, TEXTS

_ORDER = (LATENT, ROI, FLOW, META)  # of a sample's parts in the tar
Places = dict[str, tuple[int, int]]
"""Offset and size of each part."""


@dataclass
class Salvage:
    """What was found in one shard."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """As they would be in the index; the contents of the parts are not looked into."""
    not_verifiable: list[str] = field(default_factory=list)
    """Keys of the rows for which no checksum vouches."""
    lost: dict[str, str] = field(default_factory=dict)
    """Why, by key, of what is there in part or altered."""
    codecs: Counter[str] = field(default_factory=Counter)
    """JSON of codec and text encoder, as the samples say."""
    text_dims: Counter[int] = field(default_factory=Counter)
    image_latents: Counter[bool] = field(default_factory=Counter)


def salvage(shard: str, data: bytes, known: Sequence[Mapping[str, Any]], unaltered: bool) -> Salvage:
    """Find the samples and texts of a shard.

    `known` are rows of an index that may itself be damaged: one whose checksums agree with the data says
    where a sample lies although its headers are damaged. `unaltered` says that the shard's own SHA-256 is
    right. Headers are looked for at every block, so that one which is damaged hides its own sample alone.
    """
    out = Salvage()
    seen: set[int] = set()
    for row in known:
        placed = sorted(row["parts"].items(), key=lambda item: item[1]["offset"])
        places = {part: (at["offset"], at["size"]) for part, at in placed}
        if all(zlib.crc32(_cut(data, places[part])) == at["crc32"] for part, at in row["parts"].items()):
            seen.update(offset for offset, _ in places.values())
            _keep(out, shard, row["key"], places, data, True)
        else:
            out.lost[row["key"]] = "altered, or not there: its checksum is not that of the index"
    refuted = set() if unaltered else set(out.lost)
    for key, places in _samples(data):
        if key not in refuted and seen.isdisjoint(offset for offset, _ in places.values()):
            _keep(out, shard, key, places, data, unaltered)
    for row in out.rows:
        out.lost.pop(row["key"], None)
    out.rows.sort(key=lambda row: min(at["offset"] for at in row["parts"].values()))
    return out


def _keep(out: Salvage, shard: str, key: str, places: Places, data: bytes, vouched: bool) -> None:
    """Make the row of a sample or text from its own parts, or say why there is none."""
    parts = {
        part: {"offset": offset, "size": size, "crc32": zlib.crc32(_cut(data, (offset, size)))}
        for part, (offset, size) in places.items()
    }
    row: dict[str, Any] = {"key": key, "shard": shard, "parts": parts}
    if [part for part in _ORDER if part in places] != list(places) and TEXT not in places:
        out.lost[key] = "its parts are not in the order in which they are written"
        return
    if TEXT not in places and not {LATENT, META} <= places.keys():
        out.lost[key] = f"of its parts there are only {', '.join(places)}"
        return
    try:
        tensors = load(_cut(data, places[TEXT if TEXT in places else LATENT]))
        if TEXT in places:
            key = hashlib.sha256(_cut(data, places[TEXT])).hexdigest()[:16]
            row |= {"key": key, "split": TEXTS}
            out.text_dims[tensors["context"].shape[-1]] += 1
        else:
            meta = json.loads(_cut(data, places[META]))
            row |= {name: meta[name] for name in ("key", "split", "bucket", "text", "instruments")}
            row |= {"region": meta["region"]} if "region" in meta else {}
            out.codecs[json.dumps([meta["codec"], meta["text_encoder"]], sort_keys=True)] += 1
            out.image_latents["image_latent" in tensors] += 1
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        out.lost[key] = f"its parts cannot be read: {type(error).__name__} {error}"
        return
    if fault := row_fault(row):
        out.lost[key] = f"its facts are wrong: {fault}"
        return
    out.rows.append(row)
    if not vouched and TEXT not in places:  # a text's key is the checksum of its content
        out.not_verifiable.append(row["key"])


def _samples(data: bytes) -> Iterator[tuple[str, Places]]:
    """Members of one key that follow each other without a gap."""
    end, run = 0, 0
    members = []
    for name, offset, size in _members(data):
        key, _, part = name.partition(".")
        run += offset - BLOCKSIZE != end
        end = offset + size + -size % BLOCKSIZE
        members.append((key, run, part, offset, size))
    for (key, _), group in groupby(members, key=lambda member: member[:2]):
        yield key, {part: (offset, size) for _, _, part, offset, size in group}


def _members(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar whose header is sound and whose data is all there."""
    at = 0
    while at + BLOCKSIZE <= len(data):
        try:
            info = TarInfo.frombuf(data[at : at + BLOCKSIZE], "utf-8", "replace")
        except HeaderError:
            at += BLOCKSIZE
            continue
        at += BLOCKSIZE
        if info.isreg() and at + info.size <= len(data):
            yield info.name, at, info.size
            at += info.size + -info.size % BLOCKSIZE


def _cut(data: bytes, place: tuple[int, int]) -> bytes:
    return data[place[0] : place[0] + place[1]]
