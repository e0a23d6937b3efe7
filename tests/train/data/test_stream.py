"""Streamed shards: every sample once an epoch over all readers, in an order of the seed; faults named."""

import json
import logging
import tracemalloc
from collections import Counter
from hashlib import sha256
from itertools import islice
from pathlib import Path
from tarfile import USTAR_FORMAT, TarInfo
from typing import Any

import pytest
import torch
import webdataset
from safetensors.torch import load
from torch.utils.data import DataLoader, IterableDataset

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data import stream
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import Sample, ShardDataset, ShardError, manifest_bytes
from wanmoe.train.data.stream import ShardStream

GOLDEN = [6, 5, 9, 4, 7, 8, 2, 1, 0, 3, 10]
CODEC = {"name": "test", "fingerprint": "c0", "stand_in": True}
TEXT = {"name": "test", "fingerprint": "t0", "stand_in": True}
SIZE = (1, 3, 2)


def write(root: Path, count: int = 11, *, per_shard: int = 3, size: tuple[int, int, int] = SIZE) -> Path:
    """A folder of `count` samples, every second one with a region, `per_shard` of them to a shard."""
    torch.manual_seed(0)
    with ShardWriter(root, CODEC, TEXT) as writer:
        for number in range(count):
            writer.max_bytes = 0 if number % per_shard == per_shard - 1 else 2**30
            writer.add(
                f"v_clip{number:02d}_0000{number:04x}",
                "train",
                torch.randn(16, *size),
                torch.randn(2 + number % 3, 8),
                {"caption": f"剪刀 {number}", "instruments": [{"name": "Scissors", "weight": 1.0}]},
                roi=torch.full(size, 255, dtype=torch.uint8) if number % 2 else None,
            )
    return root


def keys(root: Path, n: int, part: int = 0, parts: int = 1, skip: int = 0, **options: Any) -> list[str]:
    found = islice(ShardStream(root, **{"seed": 3, **options}).samples(SIZE, part, parts, skip), n)
    return [sample.key for sample in found if isinstance(sample, Sample)]


def epoch(root: Path, **options: Any) -> list[Sample | ShardError]:
    data = ShardStream(root, seed=3, **options)
    return list(islice(data.samples(SIZE, 0, 1), len(data)))


def edit_index(root: Path, number: int, change: Any, turned: bool = False) -> None:
    """Alters a row of the index, and the manifest with it, as who forges a folder would."""
    rows = [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]
    change([row for row in rows if row["split"] == "train"][number])
    index = "".join(json.dumps(row) + "\n" for row in rows[:: -1 if turned else 1]).encode()
    (root / "index.jsonl").write_bytes(index)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["index"] = {"bytes": len(index), "sha256": sha256(index).hexdigest()}
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))


def recorded(data: ShardStream, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that the stream asks its store for, as it does."""
    asked: list[str] = []
    real = data.store.read

    def read(name: str, offset: int = 0, size: int | None = None) -> bytes:
        asked.append(name)
        return real(name, offset, size)

    monkeypatch.setattr(data.store, "read", read)
    return asked


def shard_of(root: Path, number: int = 0) -> Path:
    return root / f"train-1x3x2-{number:06d}.tar"


def test_the_stream_gives_what_the_reader_by_offset_gives(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    by_offset = {sample.key: sample for sample in map(ShardDataset(root).__getitem__, range(11))}
    streamed = epoch(root)
    assert len(streamed) == len(by_offset) == 11 and len({one.key for one in streamed}) == 11
    for sample in streamed:
        assert isinstance(sample, Sample)
        for mine, other in zip(sample, by_offset[sample.key], strict=True):
            assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_real_latents_pass_through_bit_for_bit(tmp_path: Path, data_dir: Path) -> None:
    (real,) = next(iter(load((data_dir / "wan" / "test_latents_wan.safetensors").read_bytes()).values()))
    with ShardWriter(tmp_path / "s", CODEC, TEXT) as writer:
        for number in range(3):
            meta = {"caption": "x", "instruments": []}
            writer.add(f"real{number}", "train", real[:, number : number + 5], torch.ones(1, 8), meta)
    for sample in islice(ShardStream(tmp_path / "s", seed=0).samples((5, 40, 64), 0, 1), 3):
        assert isinstance(sample, Sample) and sample.latent.dtype == torch.bfloat16
        first = int(sample.key[-1])
        assert torch.equal(sample.latent.view(torch.int16), real[:, first : first + 5].view(torch.int16))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8, 11, 16])
def test_the_readers_together_read_every_sample_once_an_epoch(tmp_path: Path, parts: int) -> None:
    root = write(tmp_path / "s")  # 4 shards: 3, 3, 3 and 2 samples
    data = ShardStream(root, seed=3, shuffle=2)
    shards = data._layout(SIZE)
    seen: set[tuple[str, ...]] = set()
    for number in range(3):
        shares = [data._share(shards, number, part, parts) for part in range(parts)]
        assert sorted(one.row["key"] for share in shares for one in share) == sorted(data.keys)
        if parts > 4:
            assert {len(share) for share in shares} <= {11 // parts, 11 // parts + 1}
        seen.add(tuple(one.row["key"] for share in shares for one in share))
    assert len(seen) == 3
    for part in range(parts):  # and what `samples` gives is these shares, one after the other
        shares = [data._share(shards, number, part, parts) for number in range(4)]
        given = iter(keys(root, sum(map(len, shares)), part, parts, shuffle=2))
        for share in shares:
            assert sorted(islice(given, len(share))) == sorted(one.row["key"] for one in share)


def test_the_order_is_one_of_seed_and_epoch(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    first = keys(root, 33)
    assert keys(root, 33) == first and keys(root, 33, seed=4) != first
    epochs = [first[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(one) == sorted(set(first)) for one in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # The same on every machine and with every version of Python and webdataset: a resumed run goes on.
    assert [int(key[6:8]) for key in first[:11]] == GOLDEN


def test_readers_see_other_shards_in_other_epochs(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    one_shard = write(tmp_path / "one", per_shard=11)
    for folder, parts in ((root, 4), (one_shard, 3)):
        counts = Counter(keys(folder, 11 * parts * 4, 1, parts))
        assert set(counts) == {f"v_clip{number:02d}_0000{number:04x}" for number in range(11)}


def test_without_a_buffer_a_shard_is_read_front_to_back(tmp_path: Path) -> None:
    root = write(tmp_path / "s", per_shard=4)
    for width in (0, 1):
        order = keys(root, 11, shuffle=width)
        assert [key for key in order if key in order[:4]] == sorted(order[:4])
    mixed = [int(key[6:8]) // 4 for key in keys(root, 11, shuffle=8)]
    assert mixed != sorted(mixed, key=mixed.index)  # a buffer wider than a shard mixes shards


@pytest.mark.parametrize(("part", "parts"), [(0, 1), (1, 2), (4, 5), (2, 16)])
def test_skipped_samples_are_passed_over_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, parts: int
) -> None:
    root = write(tmp_path / "s")
    whole = keys(root, 40, part, parts, shuffle=4)
    for skip in (1, 2, 5, 11, 12, 30):
        assert keys(root, 40 - skip, part, parts, skip, shuffle=4) == whole[skip:]
    data = ShardStream(root, seed=3, shuffle=4)
    asked = recorded(data, monkeypatch)
    next(data.samples(SIZE, 0, 1, 10))
    assert sum(name.startswith("train") for name in asked) == 1


@pytest.mark.parametrize(("limit", "requests"), [(2**24, 4), (1, 11)])
def test_neighbours_are_read_with_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, requests: int
) -> None:
    data = ShardStream(write(tmp_path / "s"), seed=3)
    monkeypatch.setattr(stream, "REQUEST_BYTES", limit)
    asked = recorded(data, monkeypatch)
    assert all(isinstance(one, Sample) for one in islice(data.samples(SIZE, 0, 1), 11))
    assert sum(name.startswith("train") for name in asked) == requests


def test_a_reader_asks_for_its_own_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShardStream(write(tmp_path / "s", per_shard=11), seed=3)
    real, asked = data.store.read, 0

    def read(name: str, offset: int = 0, size: int | None = None) -> bytes:
        nonlocal asked
        asked += size or 0
        return real(name, offset, size)

    monkeypatch.setattr(data.store, "read", read)
    share = data._share(data._layout(SIZE), 0, 1, 4)  # every fourth sample
    wanted = sum(place.end - place.start for place in [*share, *data._texts_of(share)])
    assert len(list(islice(data.samples(SIZE, 1, 4), len(share)))) == len(share) > 1
    assert wanted <= asked <= wanted + 2  # a byte more at the end of a shard shows that it ends


def test_an_index_in_another_order_than_the_tar_is_read_as_well(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    edit_index(root, 0, lambda row: None, turned=True)
    assert len({one.key for one in epoch(root) if isinstance(one, Sample)}) == 11


def test_fewer_shards_than_readers_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ShardStream(write(tmp_path / "s"), seed=3)
    with caplog.at_level(logging.WARNING):
        for part in range(4):
            data.samples(SIZE, part, 4)
        assert caplog.messages == []
        for part in range(5):
            data.samples(SIZE, part, 5)
    (message,) = caplog.messages
    assert "4 shards of size 1x3x2 for 5 readers" in message


def test_wrong_arguments_are_one_line_at_once(tmp_path: Path) -> None:
    data = ShardStream(write(tmp_path / "s"), seed=3)
    with pytest.raises(WanmoeError, match=r"no 'train' samples of latent size \(9, 9, 9\).* \(1, 3, 2\)"):
        data.samples((9, 9, 9), 0, 1)
    for part, parts, skip in ((1, 1, 0), (-1, 2, 0), (0, 1, -1)):
        with pytest.raises(WanmoeError, match="a reader is one of"):
            data.samples(SIZE, part, parts, skip)
    with pytest.raises(WanmoeError, match="no 'val' samples"):
        ShardStream(tmp_path / "s", "val", seed=3)


FAULTS = {
    "cut between two samples": (lambda d, p: d[: p[3][0]], {3: "cut short", 4: "cut short"}),
    "cut inside a header": (lambda d, p: d[: p[3][0] + 100], {3: "cut short", 4: "cut short"}),
    "cut inside a latent": (lambda d, p: d[: p[3][1] + 9], {3: "cut short", 4: "cut short"}),
    "cut in its last zeros": (lambda d, p: d[:-1], {4: "cut short"}),
    "empty": (lambda d, p: b"", dict.fromkeys(range(5), "cut short")),
    "garbage": (lambda d, p: bytes(7 * n % 256 for n in range(len(d))), dict.fromkeys(range(5), "altered")),
    "all zeros": (lambda d, p: bytes(len(d)), dict.fromkeys(range(5), "altered")),
    "a bit of a header": (lambda d, p: flipped(d, p[2][0] + 3), {2: "the tar is altered: bad checksum"}),
    "a bit of a latent": (lambda d, p: flipped(d, p[2][1] + 200), {2: "the checksum differs"}),
    "a bit of the padding, which nothing reads": (lambda d, p: flipped(d, p[3][0] - 1), {}),
    "one sample twice": (
        lambda d, p: d[: p[2][0]] + d[p[1][0] :],
        {2: "member 'k1", 3: "member", 4: "member"},
    ),
    "two samples swapped": (
        lambda d, p: d[: p[1][0]] + d[p[2][0] : p[3][0]] + d[p[1][0] : p[2][0]] + d[p[3][0] :],
        {1: "member 'k2.latent.safetensors'", 2: "member 'k1.latent.safetensors'"},
    ),
    "a sample missing": (lambda d, p: d[: p[2][0]] + d[p[3][0] :], {2: "member 'k3", 3: "member 'k4", 4: ""}),
    "a foreign member": (
        lambda d, p: d[: p[2][0]] + member("k1.pyd", b"x") + d[p[2][0] :],
        {2: "member 'k1.pyd' of 1 bytes", 3: "", 4: ""},
    ),
    "a foreign member at the end": (
        lambda d, p: d[:-1024] + member("k4.pyd", b"x"),
        {4: "ends with bytes that the index does not name"},
    ),
    "one byte more": (lambda d, p: d + b"\0", {4: "ends with bytes"}),
    "a header of 2 GB": (
        lambda d, p: d[: p[2][0]] + member("k2.latent.safetensors", b"", 2**31) + d[p[2][1] :],
        {2: "of 2147483648 bytes"},
    ),
    "a path out of the folder": (
        lambda d, p: d[: p[2][0]] + member("../../k2.latent.safetensors", b"") + d[p[2][1] :],
        {2: "member '../../k2"},
    ),
}


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def member(name: str, data: bytes, size: int | None = None) -> bytes:
    info = TarInfo(name)
    info.size = len(data) if size is None else size
    return info.tobuf(USTAR_FORMAT) + data + b"\0" * (-len(data) % 512)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_exactly_its_samples(tmp_path: Path, fault: str) -> None:
    root = tmp_path / "s"
    with ShardWriter(root, CODEC, TEXT) as writer:
        for number in range(5):
            meta = {"caption": str(number), "instruments": []}
            writer.add(f"k{number}", "train", torch.full((16, *SIZE), number), torch.ones(2, 8), meta)
    rows = [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]
    offsets = [row["parts"]["latent.safetensors"]["offset"] for row in rows if row["split"] == "train"]
    damage, expected = FAULTS[fault]
    shard = shard_of(root)
    shard.write_bytes(damage(shard.read_bytes(), [(offset - 512, offset) for offset in offsets]))
    found = {}
    for one in epoch(root, shuffle=3):
        if isinstance(one, ShardError):
            found[int(one.key[1])] = one
            assert one.shard == shard.name and "\n" not in str(one)
        else:  # no sample is ever mixed from two
            assert one.latent.unique().tolist() == [int(one.key[1])] and one.caption == one.key[1]
    assert found.keys() == expected.keys()
    for number, reason in expected.items():
        assert reason in found[number].reason


def test_a_missing_shard_costs_an_error_a_sample_and_no_more(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    shard_of(root, 1).unlink()
    whole = epoch(root)
    assert len({one.key for one in whole}) == 11
    assert {one.key[:8] for one in whole if isinstance(one, ShardError)} == {
        "v_clip03",
        "v_clip04",
        "v_clip05",
    }
    assert all("No such file" in str(one) for one in whole if isinstance(one, ShardError))


def test_a_hiccup_of_the_store_costs_nothing_and_a_dead_store_every_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ShardStream(write(tmp_path / "s"), seed=3)
    real, fails = data.store.read, [True]

    def read(name: str, offset: int = 0, size: int | None = None) -> bytes:
        if name.startswith("train") and fails:
            fails.pop()
            raise TimeoutError("too slow")
        return real(name, offset, size)

    monkeypatch.setattr(data.store, "read", read)
    assert all(isinstance(one, Sample) for one in islice(data.samples(SIZE, 0, 1), 11))
    fails.extend([True] * 1000)
    errors = list(islice(data.samples(SIZE, 0, 1), 11))
    assert all(isinstance(one, ShardError) and "cannot be read: too slow" in str(one) for one in errors)


def test_a_faulty_text_is_an_error_of_each_of_its_samples(tmp_path: Path) -> None:
    root = tmp_path / "s"
    with ShardWriter(root, CODEC, TEXT) as writer:
        for number in range(5):  # three samples share the first text
            context = torch.full((2, 8), float(max(number - 2, 0)))
            writer.add(
                f"k{number}", "train", torch.ones(16, *SIZE), context, {"caption": "", "instruments": []}
            )
    (text,) = root.glob("text-*.tar")
    data = text.read_bytes()
    rows = [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]
    (name,) = {row["text"] for row in rows if row.get("key") in ("k0", "k1", "k2")}
    (place,) = [row["parts"]["text.safetensors"] for row in rows if row["key"] == name]
    for damaged, reason in (
        (flipped(data, place["offset"] + place["size"] - 1), "the checksum differs"),
        (data[: place["offset"] + 9], "cut short"),
        (None, "No such file"),
    ):
        text.unlink() if damaged is None else text.write_bytes(damaged)
        errors = {one.key: one for one in epoch(root) if isinstance(one, ShardError)}
        assert {"k0", "k1", "k2"} <= errors.keys()
        for error in errors.values():
            assert (error.shard, error.part) == ("train-1x3x2-000000.tar", "text.safetensors")
        assert reason in str(errors["k0"]) and f"text {name}, shard {text.name}" in str(errors["k0"])
        if reason == "the checksum differs":
            assert len(errors) == 3


def test_the_bytes_held_back_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "s", per_shard=6)
    data = ShardStream(root, seed=3)
    largest = max(
        sum(place.end - place.start for place in (one, *data._texts_of([one])))
        for own in data._layout(SIZE).values()
        for one in own
    )
    whole = keys(root, 33)
    monkeypatch.setattr(stream, "REQUEST_BYTES", 1)
    for room, width in ((11 * largest, 11), (5 * largest - 1, 4), (4 * largest, 4), (largest, 1), (1, 1)):
        monkeypatch.setattr(stream, "SHUFFLE_BYTES", room)
        order = keys(root, 33)
        assert order == keys(root, 33, shuffle=width) and order[11:] == keys(root, 22, skip=11)
        assert (order == whole) == (width == 11)
        data, most = ShardStream(root, seed=3), 0
        asked = recorded(data, monkeypatch)
        for given, _ in enumerate(islice(data.samples(SIZE, 0, 1), 11)):
            most = max(most, sum(name.startswith("train") for name in asked) - given)
        assert most == width if width < 11 else most <= width
    assert keys(root, 33, shuffle=0) == keys(root, 33)


def test_the_sizes_share_the_bytes_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path / "s", CODEC, TEXT) as writer:
        for number, frames in enumerate((1, 1, 90, 90)):
            meta = {"caption": "", "instruments": []}
            writer.add(f"k{number}", "train", torch.ones(16, frames, 30, 20), torch.ones(2, 8), meta)
    data = ShardStream(tmp_path / "s", seed=3)
    large = 16 * 90 * 30 * 20 * 2  # bytes as fp16
    for room, widths in ((2 * 6 * large, [64, 5]), (2 * 4 * large, [64, 3]), (0, [1, 1])):
        monkeypatch.setattr(stream, "SHUFFLE_BYTES", room)
        assert [data._width(data._layout(size)) for size in data.buckets] == widths


def test_neighbouring_texts_are_read_with_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "s")  # 4 shards of samples and the texts of all in one shard
    by_offset = {sample.key: sample for sample in map(ShardDataset(root).__getitem__, range(11))}
    data = ShardStream(root, seed=3)
    asked = recorded(data, monkeypatch)
    found = list(islice(data.samples(SIZE, 0, 1), 11))
    assert sum(name.startswith("text") for name in asked) == 4  # one for each run of samples
    for one in found:
        assert isinstance(one, Sample) and torch.equal(one.context, by_offset[one.key].context)
    asked.clear()
    assert len(list(islice(data.samples(SIZE, 0, 1), 11))) == 11
    assert [name for name in asked if name.startswith("text")] == []  # they are still known
    del found, one
    data._text.cache_clear()
    assert len(data._contexts) == 0  # what no sample held back needs is not kept


def test_an_index_that_lies_is_an_error_and_reserves_no_memory(tmp_path: Path) -> None:
    for name, change in {
        "overlap": lambda row: row["parts"]["json"].update(row["parts"]["latent.safetensors"]),
        "huge": lambda row: row["parts"]["latent.safetensors"].update(size=2**40),
        "far": lambda row: row["parts"]["latent.safetensors"].update(offset=2**40),
        "forged": lambda row: row["parts"]["latent.safetensors"].update(crc32=1),
        "elsewhere": lambda row: row.update(shard="../../secret.tar"),
    }.items():
        root = write(tmp_path / name, count=3)
        edit_index(root, 1, change)
        tracemalloc.start()
        try:
            found = epoch(root)
        except ShardError as error:  # of a shard that the manifest does not name
            assert name == "elsewhere" and "does not name this shard" in str(error)
            continue
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2**22
        assert [key for key in (one.key for one in found if isinstance(one, ShardError)) if key] != [], name
        with pytest.raises(ShardError):
            ShardDataset(root)[1]


@pytest.mark.parametrize("name", ["pipe:touch canary", "pipe:cat /dev/null; mkdir canary"])
def test_a_command_in_place_of_a_shard_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = write(tmp_path / "s", count=2, per_shard=2)
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        edit_index(root, number, lambda row: row.update(shard=name))
    manifest = json.loads((root / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["name"].startswith("train"):
            shard["name"] = name
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))
    found = list(islice(ShardStream(root, seed=0).samples(SIZE, 0, 1), 2))
    assert all(isinstance(one, ShardError) and "cannot be read" in str(one) for one in found)
    with pytest.raises(ShardError):
        ShardStream(name, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    plain = webdataset.WebDataset(
        [name], shardshuffle=False, empty_check=False, handler=webdataset.ignore_and_continue
    )
    list(plain)
    assert (tmp_path / "canary").exists()  # what webdataset makes of the same name


class Endless(IterableDataset[str]):
    def __init__(self, data: ShardStream) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return (one.key for one in islice(self.data.samples(SIZE, 0, 1), 11))


def test_a_reader_process_gives_the_same(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    data = ShardStream(root, seed=3)
    loader = DataLoader(Endless(data), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert list(loader) == keys(root, 11)
