"""Shards: what is written is read, every fault is named, and the order is one of seed and step."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from safetensors.torch import load

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data import shard_writer
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import ShardDataset, ShardError, manifest_bytes
from wanmoe.train.data.verify import verify_shards

CODEC = {"name": "test", "fingerprint": "c0", "stand_in": True}
TEXT = {"name": "test", "fingerprint": "t0", "stand_in": True}


def write(root: Path, count: int = 5, *, prefix: str = "v_clip", val: int = 2, **options: Any) -> Path:
    torch.manual_seed(0)
    with ShardWriter(root, CODEC, TEXT, **options) as writer:
        for number in range(count + val):
            instruments = [{"name": "Scissors" if number % 2 else "Other", "weight": 1.0}]
            writer.add(
                f"{prefix}{number:02d}_0000{number:04x}",
                "train" if number < count else "val",
                torch.randn(16, 2, 3, 4) * 4,
                torch.randn(3 + number, 8),
                {"caption": f"剪刀 {number}", "instruments": instruments, "source": f"s{number}"},
                roi=torch.full((2, 3, 4), 255, dtype=torch.uint8) if number % 2 else None,
                flow=torch.full((1, 2, 3, 4), 0.5) if number % 2 else None,
                visible=torch.full((1, 3, 4), 255, dtype=torch.uint8) if number % 2 else None,
            )
    return root


def rows(root: Path) -> list[dict[str, Any]]:
    """The index' rows of samples."""
    every = [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]
    return [row for row in every if row["split"] != "text"]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = ShardDataset(write(tmp_path / "s"), "train")
    torch.manual_seed(0)
    assert len(data) == 5 and data.buckets == {(2, 3, 4): [0, 1, 2, 3, 4]}
    for number in range(5):
        latent, context = torch.randn(16, 2, 3, 4) * 4, torch.randn(3 + number, 8)
        sample = data[number]
        assert torch.equal(sample.latent, latent.half()) and torch.equal(sample.context, context.half())
        assert (sample.roi is not None) == bool(number % 2) and sample.image_latent is None
        assert sample.roi is None or (sample.roi.shape == (2, 3, 4) and sample.roi.unique().tolist() == [1.0])
        assert (sample.flow is None) == (sample.visible is None) == (sample.roi is None)
        assert sample.flow is None or (sample.flow.shape == (1, 2, 3, 4) and float(sample.flow.min()) == 0.5)
        assert sample.visible is None or sample.visible.tolist() == torch.ones(1, 3, 4).tolist()
        assert sample.picture is None
        assert sample.instruments == ((("Other", "Scissors")[number % 2], 1.0),) == data.instruments(number)
        assert sample.caption == f"剪刀 {number}" and sample.key == data.keys[number]
        assert sample.meta["normalised"] is True and sample.meta["codec"] == CODEC
        assert sample.meta["bucket"] == "2x3x4" and sample.meta["split"] == "train"
    assert len(ShardDataset(tmp_path / "s", "val")) == 2
    assert data.manifest["n_samples"] == {"train": 5, "val": 2} and len(data.fingerprint) == 64
    assert data.manifest["histogram"] == {
        "train": {"Other": 3.0, "Scissors": 2.0},
        "val": {"Other": 1.0, "Scissors": 1.0},
    }


def test_a_rebuild_is_identical_byte_for_byte_and_replaces(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    files = sorted(path.name for path in first.iterdir())
    assert files == [
        "index.jsonl",
        "manifest.json",
        "text-000000.tar",
        "train-2x3x4-000000.tar",
        "val-2x3x4-000000.tar",
    ]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    write(first, count=3, val=0)
    assert sorted(path.name for path in first.iterdir()) == files[:4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_tars_stay_readable_by_webdataset(tmp_path: Path) -> None:
    root = write(tmp_path / "s", max_bytes=8_000)
    names = sorted(str(path) for path in root.glob("train-*.tar"))
    assert len(names) > 1
    stream = webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
    samples = {sample["__key__"]: sample for sample in stream}
    data = ShardDataset(root, "train")
    assert sorted(samples) == sorted(data.keys)
    for index, key in enumerate(data.keys):
        assert torch.equal(load(samples[key]["latent.safetensors"])["latent"], data[index].latent)
        assert json.loads(samples[key]["json"])["key"] == key
    assert load(samples[data.keys[1]]["roi.safetensors"])["roi"].dtype == torch.uint8
    texts = {
        row["__key__"]: row for row in webdataset.WebDataset(str(root / "text-000000.tar"), empty_check=False)
    }
    first = json.loads(samples[data.keys[0]]["json"])["text"]
    assert torch.equal(load(texts[first]["text.safetensors"])["context"], data[0].context)


def test_a_text_is_stored_once(tmp_path: Path) -> None:
    meta, text = {"caption": "x", "instruments": []}, torch.randn(3, 8)
    with ShardWriter(tmp_path / "s", CODEC, TEXT, null_context=text) as writer:
        for key, own in (("a", text), ("b", text.clone()), ("c", text + 1)):
            writer.add(key, "train", torch.zeros(16, 1, 2, 2), own, meta)
    data = ShardDataset(tmp_path / "s")
    assert data.manifest["n_texts"] == 2 and data.null_context is not None
    assert torch.equal(data[0].context, data[1].context) and torch.equal(data.null_context, text.half())
    assert torch.equal(data[2].context, (text + 1).half())


def test_real_latents_pass_through_bit_for_bit_with_their_axes(tmp_path: Path, data_dir: Path) -> None:
    stored = load((data_dir / "wan" / "test_latents_wan.safetensors").read_bytes())
    (real,) = next(iter(stored.values()))
    assert real.dtype == torch.bfloat16 and real.shape == (16, 16, 40, 64)
    with ShardWriter(tmp_path / "s", CODEC, TEXT) as writer:
        writer.add("real", "train", real, torch.ones(1, 8).bfloat16(), {"caption": "x", "instruments": []})
    latent = ShardDataset(tmp_path / "s")[0].latent
    assert latent.dtype == torch.bfloat16 and torch.equal(latent.view(torch.int16), real.view(torch.int16))
    # 16 channels, 16 frames: only the content tells the axes. Neighbouring frames are alike, channels not.
    centred = latent.float() - latent.float().mean((2, 3), keepdim=True)

    def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a.flatten(2), b.flatten(2), dim=2).mean())

    assert likeness(centred[:, 1:], centred[:, :-1]) > 0.7 > 0.2 > abs(likeness(centred[1:], centred[:-1]))


def test_a_sample_of_another_codec_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["codec"]["fingerprint"] = "c1"
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"manifest\.json: altered"):
        ShardDataset(root)
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))
    with pytest.raises(ShardError, match="encoded with another codec"):
        ShardDataset(root)[0]


@pytest.mark.parametrize("part", ["latent.safetensors", "roi.safetensors", "flow.safetensors", "json"])
def test_a_flipped_byte_is_seen_on_read(tmp_path: Path, part: str) -> None:
    root = write(tmp_path / "s")
    row = rows(root)[1]
    flip(root / row["shard"], row["parts"][part]["offset"] + row["parts"][part]["size"] - 2)
    data = ShardDataset(root, "train")
    assert data[0].latent.std() > 1
    with pytest.raises(ShardError, match="altered") as caught:
        data[1]
    error = caught.value
    assert (error.shard, error.key, error.part) == ("train-2x3x4-000000.tar", row["key"], part)
    assert "\n" not in str(error)
    kind, arguments = error.__reduce__()  # how a loader's worker sends it
    assert str(kind(*arguments)) == str(error)
    assert len(verify_shards(root).problems) == 1


def test_a_shard_cut_short_at_any_place_is_seen_before_training(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    shard = root / "train-2x3x4-000000.tar"
    whole = shard.read_bytes()
    row = rows(root)[2]
    for place in (row["parts"]["latent.safetensors"]["offset"] - 512, 5000, len(whole) - 1):
        shard.write_bytes(whole[:place])
        with pytest.raises(ShardError, match=rf"cut short: {place} bytes, the manifest says {len(whole)}"):
            ShardDataset(root, "train")
        assert len(ShardDataset(root, "val")) == 2
    shard.unlink()
    with pytest.raises(ShardError, match=r"train-2x3x4-000000\.tar: the file is missing"):
        ShardDataset(root, "train")


def test_a_shard_cut_short_under_a_running_job_is_seen(tmp_path: Path) -> None:
    data = ShardDataset(write(tmp_path / "s"), "train")
    shard = tmp_path / "s" / "train-2x3x4-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ShardError, match="cut short"):
        data[4]


def test_a_lost_or_altered_manifest_or_index(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    for name, cause in (("manifest.json", "wanmoe prepare"), ("index.jsonl", "cannot be read")):
        shutil.copytree(root, tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(ShardError, match=cause):
            ShardDataset(tmp_path / name)
    flip(root / "index.jsonl", 30)
    with pytest.raises(ShardError, match="altered or cut short"):
        ShardDataset(root)
    (root / "manifest.json").write_text('{"format": "wanmoe-shards/9"}')
    with pytest.raises(ShardError, match="'wanmoe-shards/9', expected 'wanmoe-shards/2'"):
        ShardDataset(root)
    (root / "manifest.json").write_text('{"form')
    with pytest.raises(ShardError, match="not JSON"):
        ShardDataset(root)


def test_a_split_with_several_sizes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", CODEC, TEXT) as writer:
        for number, frames in enumerate((3, 2, 3)):
            meta = {"caption": "x", "instruments": []}
            writer.add(f"a_b_{number}", "train", torch.randn(16, frames, 3, 4), torch.randn(2, 8), meta)
    every = ShardDataset(tmp_path / "s")
    assert every.buckets == {(2, 3, 4): [1], (3, 3, 4): [0, 2]} and every[0].instruments == ()
    assert [every[index].latent.shape[1] for index in range(3)] == [3, 2, 3]
    assert ShardDataset(tmp_path / "s", bucket="3x3x4").keys == ["a_b_0", "a_b_2"]
    with pytest.raises(WanmoeError, match="no 'train' samples of size 9x9x9; there are: 2x3x4, 3x3x4"):
        ShardDataset(tmp_path / "s", bucket="9x9x9")
    with pytest.raises(WanmoeError, match="no 'val' samples; splits: train"):
        ShardDataset(tmp_path / "s", "val")


@pytest.mark.parametrize(
    ("key", "change", "cause"),
    [
        ("a.b_1", {}, "no dot"),
        ("a/b_1", {}, "no slash"),
        ("k", {"latent": torch.full((16, 1, 2, 2), float("nan"))}, "NaN"),
        ("k", {"latent": torch.full((16, 1, 2, 2), 1e6)}, "float16 cannot hold"),
        ("k", {"latent": torch.zeros(4, 1, 2, 2)}, r"latent is \[4, 1, 2, 2\]"),
        ("k", {"latent": torch.zeros(16, 2, 2)}, r"latent is \[16, 2, 2\]"),
        ("k", {"context": torch.zeros(0, 8)}, "n >= 1"),
        ("k", {"roi": torch.zeros(1, 2, 3)}, r"roi is \[1, 2, 3\] beside a latent \[16, 1, 2, 2\]"),
        ("k", {"picture": torch.zeros(1, 2)}, r"picture is \[1, 2\]"),
        ("k", {"image_latent": torch.zeros(16, 1, 2, 2)}, "image_latent is"),
        ("k", {"flow": torch.zeros(0, 2, 2, 2)}, "given together"),
        ("k", {"flow": torch.zeros(1, 2, 2, 2), "visible": torch.zeros(0, 2, 2)}, "flow is"),
    ],
)
def test_a_wrong_sample_is_refused_and_nothing_is_left(
    tmp_path: Path, key: str, change: dict[str, Any], cause: str
) -> None:
    sample: dict[str, Any] = {"latent": torch.zeros(16, 1, 2, 2), "context": torch.zeros(2, 8), **change}
    meta = {"caption": "x", "instruments": []}
    with pytest.raises(ShardError, match=cause), ShardWriter(tmp_path / "s", CODEC, TEXT) as writer:
        writer.add(key, "train", sample.pop("latent"), sample.pop("context"), meta, **sample)
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_unique_over_splits(tmp_path: Path) -> None:
    meta = {"caption": "x", "instruments": []}
    with (
        pytest.raises(ShardError, match="written before"),
        ShardWriter(tmp_path / "s", CODEC, TEXT) as writer,
    ):
        for split in ("train", "val"):
            writer.add("same", split, torch.zeros(16, 1, 2, 2), torch.zeros(2, 8), meta)


def test_no_space_left_is_one_line_and_leaves_the_former_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "s")
    before = ShardDataset(root).fingerprint

    def full(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer.TarFile, "_write", full)
    with pytest.raises(ShardError, match="No space left on device") as caught:
        write(root, count=2, val=0)
    assert "\n" not in str(caught.value)
    assert ShardDataset(root).fingerprint == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_no_space_left_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer.TarFile, "close", full)
    with pytest.raises(WanmoeError, match="No space left on device"):
        write(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing_and_a_killed_one_is_cleaned_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "s", CODEC, TEXT) as writer:
        inside = writer._staging.path
        assert inside.is_dir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    killed = inside.with_name(inside.name.rsplit("-", 1)[0] + "-4194399")  # above the largest process number
    killed.mkdir()
    write(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(WanmoeError, match=r"thesis\.txt"):
        write(tmp_path)
    with pytest.raises(WanmoeError, match="no sample was written"), ShardWriter(tmp_path / "s", CODEC, TEXT):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
