"""A full pass over shards: sound ones pass, and every damage is one line that names its place."""

import hashlib
import json
import re
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tarfile import BLOCKSIZE, USTAR_FORMAT, TarInfo
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save

from wanmoe.train.data import verify
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import ShardDataset, ShardError, manifest_bytes
from wanmoe.train.data.verify import verify_shards

CODEC = {"name": "test", "fingerprint": "c0", "stand_in": True}
TEXT = {"name": "test", "fingerprint": "t0", "stand_in": True}
SHARD = "train-3x3x5-000000.tar"


def write(root: Path, count: int = 5, val: int = 2, **options: Any) -> Path:
    """Samples with every part, two by two of one source; `options` go to the writer."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def mask(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) * 255

    with ShardWriter(root, CODEC, TEXT, null_context=noise(1, 8), **options) as writer:
        for number in range(count + val):
            writer.add(
                f"v_clip{number:02d}_0000{number:04x}",
                "train" if number < count else "val",
                noise(16, 3, 3, 5),
                noise(3 + number, 8),
                {
                    "caption": f"剪刀 {number}",
                    "instruments": [{"name": "Scissors" if number % 2 else "Other", "weight": 1.0}],
                    "source": f"s{number // 2}",
                    "source_sha256": f"{number // 2:064x}",
                },
                roi=mask(3, 3, 5),
                picture=mask(3, 5),
                flow=noise(2, 2, 3, 5),
                visible=mask(2, 3, 5),
            )
    return root


def index(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def change(root: Path, alter: Callable[[dict[str, Any], list[dict[str, Any]]], object]) -> None:
    """Alter manifest and index, and make the first vouch for the second again."""
    manifest, rows = json.loads((root / "manifest.json").read_text()), index(root)
    alter(manifest, rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (root / "index.jsonl").write_bytes(text)
    manifest["index"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))


def replace_part(root: Path, number: int, part: str, data: bytes) -> None:
    """Put other contents into a part, with checksums that agree: what another tool might have written."""
    rows = index(root)
    row = [row for row in rows if row["split"] == "train"][number]
    path = root / row["shard"]
    old, new, at = path.read_bytes(), BytesIO(), 0
    members = sorted(
        (place["offset"], place["size"], own, name)
        for own in rows
        if own["shard"] == row["shard"]
        for name, place in own["parts"].items()
    )
    places: dict[tuple[str, str], dict[str, int]] = {}
    for offset, size, own, name in members:
        content = data if (own is row and name == part) else old[offset : offset + size]
        info = TarInfo(f"{own['key']}.{name}")
        info.size = len(content)
        new.write(info.tobuf(USTAR_FORMAT))
        at = new.tell()
        new.write(content + b"\0" * (-len(content) % BLOCKSIZE))
        places[own["key"], name] = {"offset": at, "size": len(content), "crc32": zlib.crc32(content)}
    new.write(b"\0" * 2 * BLOCKSIZE)
    path.write_bytes(new.getvalue())

    def alter(manifest: dict[str, Any], own_rows: list[dict[str, Any]]) -> None:
        for one in own_rows:
            for name in one["parts"]:
                one["parts"][name] = places.get((one["key"], name), one["parts"][name])
        for shard in manifest["shards"]:
            if shard["name"] == row["shard"]:
                digest = hashlib.sha256(new.getvalue()).hexdigest()
                shard.update(bytes=len(new.getvalue()), sha256=digest)

    change(root, alter)


def part_of(root: Path, number: int, part: str) -> tuple[Path, int, int]:
    """(shard, offset, size) of a part of a training sample."""
    row = [row for row in index(root) if row["split"] == "train"][number]
    return root / row["shard"], row["parts"][part]["offset"], row["parts"][part]["size"]


def test_sound_shards_are_counted_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "s", max_bytes=20_000)
    monkeypatch.setattr(verify, "_PIECE", 1000)  # smaller than a part, and no multiple of a block
    read: list[int] = []
    feed = verify._Stream.take

    def take(self: Any, count: int) -> bytes:
        data = feed(self, count)
        read.append(len(data))
        return data

    monkeypatch.setattr(verify._Stream, "take", take)
    report = verify_shards(root)
    assert report.ok, report.problems
    tars = list(root.glob("*.tar"))
    assert report.shards == len(tars) > 3
    assert report.bytes == sum(path.stat().st_size for path in tars) == sum(read)
    assert report.samples == {"train": 5, "val": 2}
    assert report.histogram == {
        "train": {"Other": 3.0, "Scissors": 2.0},
        "val": {"Other": 1.0, "Scissors": 1.0},
    }
    assert report.shared_sources == ["s2"]
    assert "5 train, 2 val samples" in str(report) and "1 videos are in several splits" in str(report)


def test_every_single_flipped_byte_of_a_shard_is_found(tmp_path: Path) -> None:
    root = write(tmp_path / "s", count=2, val=0)
    whole = (root / SHARD).read_bytes()
    generator = np.random.default_rng(0)
    offsets = {0, 257, BLOCKSIZE, len(whole) - 1, *generator.integers(0, len(whole), 60).tolist()}
    for offset in sorted(offsets):
        flip(root / SHARD, offset)
        problems = verify_shards(root).problems
        assert len(problems) == 1 and SHARD in problems[0], (offset, problems)
        (root / SHARD).write_bytes(whole)
    assert verify_shards(root).ok


@pytest.mark.parametrize(
    ("shift", "cause"),
    [
        (-BLOCKSIZE, "its tar header is altered"),
        (-BLOCKSIZE + 156, "its tar header is altered"),
        (0, "altered: the checksum differs"),
    ],
)
def test_damage_is_named_by_sample_and_part(tmp_path: Path, shift: int, cause: str) -> None:
    root = write(tmp_path / "s")
    path, offset, _ = part_of(root, 3, "roi.safetensors")
    flip(path, offset + shift)
    (problem,) = verify_shards(root).problems
    assert cause in problem and "sample v_clip03_00000003, part roi.safetensors" in problem


def test_a_cut_a_lost_and_a_stray_shard(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    path, offset, _ = part_of(root, 2, "flow.safetensors")
    path.write_bytes(path.read_bytes()[: offset + 7])
    (root / "val-3x3x5-000000.tar").unlink()
    (root / "train-3x3x5-000009.tar").write_bytes(b"")
    problems = verify_shards(root).problems
    assert len(problems) == 4
    assert f"cut short: {offset + 7} bytes, the manifest says" in problems[0]
    assert "3 of 5 samples lie beyond its end, from v_clip02_00000002 on" in problems[1]
    assert "val-3x3x5-000000.tar: the file is missing" in problems[2]
    assert problems[3] == "shard train-3x3x5-000009.tar: the manifest does not name it"


def test_a_byte_that_only_the_sum_of_the_shard_covers_and_zeros_that_are_none(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    path, offset, size = part_of(root, 2, "json")
    assert size % BLOCKSIZE
    whole = path.read_bytes()
    flip(path, offset + size)
    (problem,) = verify_shards(root).problems
    assert "sample v_clip02_00000002, part json: the zeros that follow it are altered" in problem
    path.write_bytes(whole)
    info = TarInfo.frombuf(whole[offset - BLOCKSIZE : offset], "utf-8", "strict")
    info.mtime = 1  # another header, sound in itself
    path.write_bytes(whole[: offset - BLOCKSIZE] + info.tobuf(USTAR_FORMAT) + whole[offset:])
    (problem,) = verify_shards(root).problems
    assert problem == f"shard {SHARD}: altered: SHA-256 differs from the manifest"
    info.name = "other.json"
    path.write_bytes(whole[: offset - BLOCKSIZE] + info.tobuf(USTAR_FORMAT) + whole[offset:])
    (problem,) = verify_shards(root).problems
    assert "sample v_clip02_00000002, part json: the tar has 'other.json' of" in problem


def test_a_text_is_the_one_that_its_key_says(tmp_path: Path) -> None:
    root = write(tmp_path / "s")

    def rename(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        text = next(row for row in rows if row["split"] == "text")
        for row in rows:
            if row.get("text") == text["key"]:
                row["text"] = "0" * 16
        text["key"] = "0" * 16

    change(root, rename)
    problems = verify_shards(root).problems
    assert any(
        "sample 0000000000000000, part text.safetensors: the text is not the one" in p for p in problems
    )


def test_bytes_after_the_end_and_garbage(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    whole = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(whole + b"x" * 700)
    problems = verify_shards(root).problems
    assert "too long" in problems[0] and "there is something that the index does not name" in problems[1]
    (root / SHARD).write_bytes(np.random.default_rng(0).bytes(len(whole)))
    problems = verify_shards(root).problems
    assert len(problems) >= 5 * 5 and len(set(problems)) == len(problems)  # five samples of five parts
    assert all("\n" not in problem for problem in problems)
    assert verify_shards(root).problems == problems  # the same order each time


def tensors(**changes: torch.Tensor) -> bytes:
    return save(changes)


NAN = torch.full((16, 3, 3, 5), float("nan"), dtype=torch.float16)
WRONG = {
    "NaN": ("latent.safetensors", tensors(latent=NAN), "latent holds NaN"),
    "dtype": (
        "latent.safetensors",
        tensors(latent=NAN.float()),
        "latent is float32 [16, 3, 3, 5], expected float16 or bfloat16 [16, 3, 3, 5]",
    ),
    "shape": ("latent.safetensors", tensors(latent=NAN[:, :2].clone()), "latent is float16 [16, 2, 3, 5]"),
    "name": ("latent.safetensors", tensors(), "holds no tensor 'latent'"),
    "more": (
        "latent.safetensors",
        tensors(latent=torch.zeros_like(NAN), image_latent=NAN),
        "holds a tensor 'image_latent', which no part has",
    ),
    "roi": ("roi.safetensors", tensors(roi=torch.zeros(3, 3, 5)), "roi is float32 [3, 3, 5], expected uint8"),
    "picture": (
        "roi.safetensors",
        tensors(picture=torch.zeros(3, 3, 5, dtype=torch.uint8)),
        "picture is uint8 [3, 3, 5], expected uint8 [3, 5]",
    ),
    "flow": (
        "flow.safetensors",
        tensors(flow=torch.zeros(2, 2, 3, 5).half(), visible=torch.zeros(3, 3, 5, dtype=torch.uint8)),
        "visible is uint8 [3, 3, 5], expected uint8 [2, 3, 5]",
    ),
    "visible": (
        "flow.safetensors",
        tensors(flow=torch.zeros(2, 2, 3, 5).half()),
        "holds no tensor 'visible'",
    ),
    "pickle": ("latent.safetensors", b"\x80\x04cposix\nsystem\n.", "not a safetensors file"),
    "header of 2 GB": (
        "latent.safetensors",
        (2 << 30).to_bytes(8, "little") + b"{" * 64,
        "not a safetensors file",
    ),
    "json": ("json", b'{"key"', "not JSON"),
    "list": ("json", b"[]", "is a JSON list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_contents_that_their_checksums_do_not_betray(tmp_path: Path, name: str) -> None:
    part, data, cause = WRONG[name]
    root = write(tmp_path / "s")
    replace_part(root, 1, part, data)
    problems = verify_shards(root).problems
    assert len(problems) == 1 and cause in problems[0], problems
    assert f"sample v_clip01_00000001, part {part}" in problems[0]


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("key", "v_clip02_00000002", "key is 'v_clip02_00000002', the index says 'v_clip01_00000001'"),
        ("split", "val", "split is 'val', the index says 'train'"),
        ("instruments", [], "instruments is []"),
        ("normalised", False, "not marked as normalised"),
        ("codec", {**CODEC, "fingerprint": "c1"}, "encoded with another codec"),
        ("text_encoder", None, "encoded with another text_encoder: None"),
        ("caption", 3, "has no caption"),
    ],
)
def test_facts_of_a_sample_are_those_of_the_index_and_the_manifest(
    tmp_path: Path, name: str, value: Any, cause: str
) -> None:
    root = write(tmp_path / "s")
    path, offset, size = part_of(root, 1, "json")
    meta = json.loads(path.read_bytes()[offset : offset + size])
    replace_part(root, 1, "json", json.dumps({**meta, name: value}).encode())
    (problem,) = verify_shards(root).problems
    assert cause in problem and "sample v_clip01_00000001, part json" in problem


def drop_text(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    rows.remove(next(row for row in rows if row["split"] == "text"))


def overlap(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    first, second = [row for row in rows if row["split"] == "train"][:2]
    second["parts"]["json"] = dict(first["parts"]["json"])


def outside(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    rows[1]["parts"]["json"]["size"] = 1 << 40


def twice(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    train = [row for row in rows if row["split"] == "train"]
    train[1]["key"] = train[0]["key"]


def pickle_part(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    rows[1]["parts"]["pyd"] = rows[1]["parts"].pop("flow.safetensors")


def climb(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["shard"] = "../" + row["shard"]


def no_size(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    del rows[1]["parts"]["json"]["size"]


@pytest.mark.parametrize(
    ("alter", "cause"),
    [
        (drop_text, r"sample v_clip00_00000000: no text [0-9a-f]{16}"),
        (lambda m, r: m.update(null_text=None), r"text [0-9a-f]{16}: no sample uses it"),
        (lambda m, r: m.update(null_text="0" * 16), "no text 0000000000000000, which the manifest says"),
        (overlap, "lies over another part"),
        (outside, "the index has it up to byte 10995"),
        (twice, "sample v_clip00_00000000: the key occurs 2 times"),
        (pickle_part, "has a part 'pyd'; parts are flow.safetensors"),
        (climb, "shard: String should match pattern"),
        (no_size, "index.jsonl:2: parts.json.size: Field required"),
        (lambda m, r: r.pop(-2), "n_samples: {'train': 5, 'val': 2} said"),
        (lambda m, r: m["histogram"].pop("val"), "histogram of instruments is not that of the index"),
        (lambda m, r: m["shards"].append(m["shards"][0]), "text-000000.tar: the manifest names it 2 times"),
        (lambda m, r: m["shards"].pop(0), "text-000000.tar, sample"),
    ],
)
def test_an_index_that_contradicts_the_shards_is_told_without_a_large_read(
    tmp_path: Path, alter: Callable[[Any, Any], object], cause: str
) -> None:
    root = write(tmp_path / "s")
    change(root, alter)
    problems = verify_shards(root).problems
    assert any(re.search(cause, problem) for problem in problems), problems


def test_a_manifest_or_index_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    change(root, lambda manifest, rows: manifest["shards"][0].update(name="../x.tar"))
    with pytest.raises(ShardError, match=r"manifest.json: shards.0.name: String should match"):
        verify_shards(root)
    change(root, lambda manifest, rows: manifest["shards"][0].update(name="text-000000.tar"))
    flip(root / "index.jsonl", 30)
    with pytest.raises(ShardError, match="altered or cut short"):
        verify_shards(root)


def test_what_verify_passes_is_what_training_reads(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    assert verify_shards(root).ok
    data = ShardDataset(root)
    assert all(torch.isfinite(data[number].latent).all() for number in range(5))


def test_a_url_is_verified_as_a_folder_is(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    files = fsspec.filesystem("memory")
    files.put(str(root), "/verify-set", recursive=True)
    report = verify_shards("memory://verify-set")
    assert report.ok and report.samples == {"train": 5, "val": 2} and report.shards == 3
    path, offset, _ = part_of(root, 3, "latent.safetensors")
    flip(path, offset + 90)
    files.put(str(path), f"/verify-set/{SHARD}")
    (problem,) = verify_shards("memory://verify-set").problems
    assert "sample v_clip03_00000003, part latent.safetensors: altered" in problem
