"""Where plain webdataset 1.0.2 loses, mixes or runs what is in a folder of shards; what our readers do there.

Each test first shows webdataset's behaviour on tars that `ShardWriter` wrote, so that the claim stays true
for the version that is pinned, and then both of our readers on the same files.
"""

import hashlib
import json
import tarfile
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from safetensors.torch import load

from wanmoe.train.data.order import SampleOrder
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import Sample, ShardDataset, ShardError, manifest_bytes
from wanmoe.train.data.stream import ShardStream

CODEC = {"name": "test", "fingerprint": "c0", "stand_in": True}
TEXT = {"name": "test", "fingerprint": "t0", "stand_in": True}
SIZE = (1, 3, 5)
LATENT = "latent.safetensors"


def write(root: Path, shards: int = 1, value: int = 0) -> Path:
    """Shards of 5 samples; latent and caption of sample n hold `value` + n."""
    with ShardWriter(root, CODEC, TEXT) as writer:
        for number in range(5 * shards):
            writer.max_bytes = 0 if number % 5 == 4 else 2**30
            latent = torch.full((16, *SIZE), float(value + number))
            meta = {"caption": str(value + number), "instruments": []}
            writer.add(f"v_c_{number:08x}", "train", latent, torch.ones(2, 8), meta)
    return root


def tars(root: Path) -> list[str]:
    return sorted(map(str, root.glob("train-*.tar")))


def places(root: Path) -> list[dict[str, dict[str, int]]]:
    """Where the parts of each sample lie."""
    rows = [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]
    return [row["parts"] for row in rows if row["split"] == "train"]


def damage(root: Path, change: Callable[[bytes], bytes]) -> None:
    """Alters the first shard."""
    shard = Path(tars(root)[0])
    shard.write_bytes(change(shard.read_bytes()))


def flip(root: Path, place: int) -> None:
    damage(root, lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def plain(urls: list[str], handler: Any = wds.reraise_exception, **options: Any) -> list[dict[str, Any]]:
    """Everything that webdataset gives."""
    options = {"shardshuffle": False, "empty_check": False, **options}
    return list(wds.WebDataset(urls, handler=handler, **options))


def order_of(samples: Any, n: int) -> list[str]:
    return [sample["__key__"] for sample in islice(samples, n)]


def streamed(root: Path) -> tuple[dict[int, Sample], list[ShardError]]:
    """An epoch of the stream: its samples by number, and its errors."""
    data = ShardStream(root, seed=0)
    found = list(islice(data.samples(SIZE, 0, 1), len(data)))
    samples = {int(one.key[-8:], 16): one for one in found if isinstance(one, Sample)}
    for number, sample in samples.items():
        assert sample.latent.unique().tolist() == [float(sample.caption)] == [number]
    return samples, [one for one in found if isinstance(one, ShardError)]


def stream_keys(root: Path, n: int, part: int = 0, parts: int = 1, **options: Any) -> list[str]:
    found = islice(ShardStream(root, **{"seed": 1, **options}).samples(SIZE, part, parts), n)
    return [one.key for one in found if isinstance(one, Sample)]


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each sleep would have been."""
    sleeps: list[float] = []
    monkeypatch.setattr(time, "sleep", sleeps.append)
    return sleeps


@pytest.mark.parametrize("inside", [0, 100])
def test_01_a_shard_cut_at_a_member_loses_samples_without_an_error(tmp_path: Path, inside: int) -> None:
    root = write(tmp_path / "s")
    cut = places(root)[1][LATENT]["offset"] - 512 + inside
    damage(root, lambda data: data[:cut])
    assert len(plain(tars(root))) == 1  # of 5, though errors are raised

    with pytest.raises(ShardError, match=f"cut short: {cut} bytes"):
        ShardDataset(root)
    samples, errors = streamed(root)
    assert list(samples) == [0] and len(errors) == 4 and all("cut short" in str(one) for one in errors)


def test_02_a_flipped_byte_in_a_header_loses_samples_without_an_error(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    flip(root, places(root)[2][LATENT]["offset"] - 512 + 7)
    assert len(plain(tars(root))) == 2

    data = ShardDataset(root)  # no header is read: all samples are there, and unaltered
    assert [data[number].latent.unique().item() for number in range(5)] == [0, 1, 2, 3, 4]
    samples, (error,) = streamed(root)
    assert sorted(samples) == [0, 1, 3, 4] and error.key == "v_c_00000002" and "altered" in str(error)


def test_03_a_flipped_byte_in_a_payload_is_a_wrong_latent_without_an_error(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    flip(root, places(root)[3][LATENT]["offset"] + places(root)[3][LATENT]["size"] - 1)
    latents = [load(sample[LATENT])["latent"] for sample in plain(tars(root))]
    assert len(latents) == 5 and latents[3].unique().numel() == 2

    with pytest.raises(ShardError, match="altered"):
        ShardDataset(root)[3]
    samples, (error,) = streamed(root)
    assert sorted(samples) == [0, 1, 2, 4] and (error.key, error.part) == ("v_c_00000003", LATENT)


def test_04_after_a_broken_shard_a_sample_is_mixed_from_two(tmp_path: Path, slept: list[float]) -> None:
    root, other = write(tmp_path / "a"), write(tmp_path / "b", value=100)  # keys restart in the other
    cut = places(root)[0]["json"]["offset"] + 9
    damage(root, lambda data: data[:cut])
    with pytest.warns(UserWarning):
        first = plain(tars(root) + tars(other), wds.warn_and_continue)[0]
    assert (
        load(first[LATENT])["latent"].unique().item() == 0 and json.loads(first["json"])["caption"] == "100"
    )

    with pytest.raises(ShardError, match="cut short"):
        ShardDataset(root)
    samples, errors = streamed(root)
    assert samples == {} and len(errors) == 5
    # Nor does the other shard under this one's name give a sample.
    damage(root, lambda _: Path(tars(other)[0]).read_bytes())
    samples, errors = streamed(root)
    assert samples == {} and len(errors) == 5
    for number in range(5):
        with pytest.raises(ShardError):
            ShardDataset(root)[number]
    # And in one folder keys cannot restart.
    with (
        pytest.raises(ShardError, match="written before"),
        ShardWriter(tmp_path / "c", CODEC, TEXT) as writer,
    ):
        for _ in range(2):
            meta = {"caption": "", "instruments": []}
            writer.add("v_c_00000000", "train", torch.ones(16, *SIZE), torch.ones(2, 8), meta)


def test_05_a_sample_without_its_metadata_is_given_as_whole(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    cut = places(root)[2]["json"]["offset"] - 512
    damage(root, lambda data: data[:cut])
    assert [("json" in sample, LATENT in sample) for sample in plain(tars(root))] == [
        (True, True),
        (True, True),
        (False, True),
    ]

    with pytest.raises(ShardError, match="cut short"):
        ShardDataset(root)
    samples, errors = streamed(root)
    assert sorted(samples) == [0, 1] and len(errors) == 3


def test_06_a_key_with_dots_becomes_another_key(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    with wds.TarWriter(str(tmp_path / "dots.tar")) as tar:
        for number in range(3):
            sample = plain(tars(root))[number]
            tar.write({"__key__": f"clip.v1.{number:04d}", LATENT: sample[LATENT], "json": sample["json"]})
    (merged,) = plain([str(tmp_path / "dots.tar")])
    assert merged["__key__"] == "clip" and f"v1.0001.{LATENT}" in merged and LATENT not in merged

    with pytest.raises(ShardError, match="no dot"), ShardWriter(tmp_path / "t", CODEC, TEXT) as writer:
        meta = {"caption": "", "instruments": []}
        writer.add("clip.v1.0001", "train", torch.ones(16, *SIZE), torch.ones(2, 8), meta)


def test_07_resampling_with_a_seed_is_another_order_every_time(tmp_path: Path) -> None:
    root = write(tmp_path / "s", shards=8)
    twice = [
        order_of(wds.WebDataset(tars(root), shardshuffle=False, resampled=True, seed=1), 200)
        for _ in range(2)
    ]
    assert twice[0] != twice[1]

    assert stream_keys(root, 80) == stream_keys(root, 80) != stream_keys(root, 80, seed=2)
    buckets = [list(range(40))]
    orders = [[SampleOrder(buckets, global_batch=1, seed=seed)[n] for n in range(80)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_08_a_seeded_shuffle_is_the_same_order_in_every_epoch(tmp_path: Path) -> None:
    root = write(tmp_path / "s", shards=8)
    data = wds.WebDataset(tars(root), shardshuffle=100, seed=1)
    assert order_of(data, 40) == order_of(data, 40)

    ours = stream_keys(root, 80)
    assert ours[:40] != ours[40:] and sorted(ours[:40]) == sorted(ours[40:])
    order = SampleOrder([list(range(40))], global_batch=1, seed=1)
    assert [order[n] for n in range(40)] != [order[n] for n in range(40, 80)]


def on_rank(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_09_with_fewer_shards_than_ranks_some_ranks_have_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "s", shards=4)

    def rank(number: int, **options: Any) -> list[dict[str, Any]]:
        on_rank(number, 8, monkeypatch)
        return plain(tars(root), empty_check=True, **options)

    assert len(rank(3, nodesplitter=wds.split_by_node)) == 5
    with pytest.raises(ValueError, match="No samples found"):
        rank(5, nodesplitter=wds.split_by_node)
    with pytest.raises(ValueError, match="explicit nodesplitter"):  # and by default no rank has
        rank(0)

    parts = [set(stream_keys(root, n, part, 8)) for part, n in enumerate([3, 3, 3, 3, 2, 2, 2, 2])]
    assert sum(map(len, parts)) == 20 == len(set.union(*parts))
    assert len(SampleOrder([list(range(20))], global_batch=8, seed=0).batch(0)) == 8


def test_10_a_rank_sees_the_same_shards_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "s", shards=8)
    on_rank(1, 4, monkeypatch)
    options: dict[str, Any] = {"shardshuffle": 100, "detshuffle": True, "nodesplitter": wds.split_by_node}
    data = wds.WebDataset(tars(root), seed=1, **options)
    epochs = [order_of(data, 40) for _ in range(6)]
    assert {len(set(keys)) for keys in epochs} == {10} and len({frozenset(keys) for keys in epochs}) == 1

    assert len(set(stream_keys(root, 10 * 24, 1, 4))) == 40


def test_11_the_same_samples_make_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tar(name: str, now: float) -> bytes:
        monkeypatch.setattr(time, "time", lambda: now)
        with wds.TarWriter(str(tmp_path / name)) as writer:
            writer.write({"__key__": "a", "json": b"{}"})
        return (tmp_path / name).read_bytes()

    assert tar("a.tar", 1e9) != tar("b.tar", 1e9 + 5)

    monkeypatch.setattr(time, "time", lambda: 1e9)
    first = write(tmp_path / "first", shards=2)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    second = write(tmp_path / "second", shards=2)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def hostile(canary: Path) -> bytes:
    """A pickle that makes a folder when it is loaded, written out by hand."""
    return f"cos\nmkdir\n(S'{canary}'\ntR.".encode()


def member(name: str, data: bytes) -> bytes:
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, BytesIO(data))
    return stream.getvalue()[: 512 + len(data) + -len(data) % 512]


def test_12_default_decoding_leaves_tensors_as_bytes(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    assert isinstance(next(iter(wds.WebDataset(tars(root), shardshuffle=False).decode()))[LATENT], bytes)

    assert ShardDataset(root)[1].latent.shape == (16, *SIZE) and len(streamed(root)[0]) == 5


@pytest.mark.parametrize("kind", ["pyd", "pkl", "pth"])
@pytest.mark.parametrize("at_end", [False, True])
def test_12_default_decoding_runs_a_pickle_in_a_shard(tmp_path: Path, kind: str, at_end: bool) -> None:
    root, canary = write(tmp_path / "s"), tmp_path / "canary"
    victim = 4 if at_end else 1
    evil = member(f"v_c_{victim:08x}.{kind}", hostile(canary))
    start = places(root)[2][LATENT]["offset"] - 512
    end = places(root)[4]["json"]["offset"] + places(root)[4]["json"]["size"]
    end += -end % 512

    def insert(data: bytes) -> bytes:
        return data[:end] + evil + data[end + len(evil) :] if at_end else data[:start] + evil + data[start:]

    damage(root, insert)
    list(wds.WebDataset(tars(root), shardshuffle=False).decode(handler=wds.ignore_and_continue))
    assert canary.exists()

    canary.rmdir()
    samples, errors = streamed(root)
    assert victim + (not at_end) not in samples and errors
    if at_end:  # the size is as it was, and no sample of the index is touched
        assert [error.key for error in errors] == ["v_c_00000004"]
        assert [ShardDataset(root)[number].caption for number in range(5)] == list("01234")
    else:
        assert any(f"{kind}' of" in str(error) for error in errors)
        with pytest.raises(ShardError, match="too long"):
            ShardDataset(root)
    assert not canary.exists()


def test_12_a_pickle_in_place_of_a_tensor_is_not_run_even_if_the_index_vouches_for_it(tmp_path: Path) -> None:
    root, canary = write(tmp_path / "s"), tmp_path / "canary"
    place = places(root)[1][LATENT]
    evil = hostile(canary).ljust(place["size"], b".")
    damage(root, lambda data: data[: place["offset"]] + evil + data[place["offset"] + len(evil) :])
    rows = [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]
    forge(root, rows, 1, evil)
    (sample,) = [one for one in plain(tars(root)) if one["__key__"] == "v_c_00000001"]
    with pytest.raises(RuntimeError, match="Invalid magic number"):  # too late
        wds.torch_loads(sample[LATENT])  # what its decoder does with a .pth
    assert canary.exists()

    canary.rmdir()
    with pytest.raises(ShardError, match="not a safetensors file"):
        ShardDataset(root)[1]
    samples, (error,) = streamed(root)
    assert sorted(samples) == [0, 2, 3, 4] and "not a safetensors file" in str(error)
    assert not canary.exists()


def forge(root: Path, rows: list[dict[str, Any]], number: int, data: bytes) -> None:
    """Makes index and manifest agree with an altered latent."""
    row = [row for row in rows if row["split"] == "train"][number]
    row["parts"][LATENT]["crc32"] = zlib.crc32(data)
    index = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (root / "index.jsonl").write_bytes(index)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["index"] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))


def test_12_a_pipe_url_runs_a_command(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    plain([f"pipe:mkdir {canary}"], wds.ignore_and_continue)
    assert canary.exists()

    canary.rmdir()
    for reader in (ShardDataset, lambda root: ShardStream(root, seed=0)):
        with pytest.raises(ShardError, match="cannot be read"):
            reader(f"pipe:mkdir {canary}")
    assert not canary.exists()


def test_13_a_half_broken_folder_trains_uncounted_and_sleeps(tmp_path: Path, slept: list[float]) -> None:
    root = write(tmp_path / "s", shards=4)
    for name, sample in zip(tars(root)[:3], places(root)[2::5], strict=False):
        Path(name).write_bytes(Path(name).read_bytes()[: sample[LATENT]["offset"] + 9])
    with pytest.warns(UserWarning):
        found = plain(tars(root), wds.warn_and_continue)
    assert len(found) == 11 and slept == [0.5] * 6  # 9 of 20 are gone; nobody counts

    slept.clear()
    with pytest.raises(ShardError, match="cut short"):
        ShardDataset(root)
    samples, errors = streamed(root)
    assert len(samples) == 11 and len(errors) == 9 and slept == []
