"""The figures of a folder of shards are those of what was written."""

import json
import math
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from wanmoe.train.data import stats as module
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import ShardDataset, ShardError
from wanmoe.train.data.stats import ShardStats, shard_stats

HEAD = {"name": "test", "fingerprint": "c0", "stand_in": False}
CAPTIONS = ("cut", "cut", "吸引", "cut", "grasp", "a longer caption")


def write(root: Path, shift: float = 0.0) -> Path:
    """Six samples, four of training; odd ones with region and border, the first two of bf16."""
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(root, HEAD, HEAD, null_context=torch.ones(1, 8)) as writer:
        for number, caption in enumerate(CAPTIONS):
            latent = torch.randn(16, 2 + (number == 3), 8, 9, generator=generator)
            latent[3] += shift
            frames, odd = 4 * (latent.shape[1] - 1) + 1, number % 2
            picture = torch.full((8, 9), 255, dtype=torch.uint8)
            picture[0, 0] = 255 * (number == 1)
            writer.add(
                f"k{number}",
                "train" if number < 4 else "val",
                latent.bfloat16() if number < 2 else latent,
                torch.randn(len(caption), 8, generator=torch.Generator().manual_seed(len(caption))),
                {
                    "caption": caption,
                    "instruments": [{"name": "Scissors", "weight": 0.75}, {"name": "Other", "weight": 0.25}],
                    "source": f"s{number}",
                    "source_sha256": "one film" if number < 2 else f"film {number}",
                    "fps": 8.0,
                    "n_frames": frames,
                    "tips": [[0, 1.0, 2.0]] * (number if odd else 0),
                },
                roi=torch.zeros(latent.shape[1:], dtype=torch.uint8) if odd else None,
                picture=picture if odd else None,
                flow=torch.zeros(1, 2, 8, 9) if number == 5 else None,
                visible=torch.zeros(1, 8, 9, dtype=torch.uint8) if number == 5 else None,
            )
    return root


def test_the_figures_are_those_of_what_was_written(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    found = shard_stats(root)
    assert found.samples == {"train": 4, "val": 2}
    assert found.buckets == {"train": {"2x8x9": 3, "3x8x9": 1}, "val": {"2x8x9": 2}}
    assert found.instruments == {
        "train": {"Other": 1.0, "Scissors": 3.0},
        "val": {"Other": 0.5, "Scissors": 1.5},
    }
    assert found.sources == {"train": 3, "val": 2}
    assert found.hours == pytest.approx({"train": (3 * 5 + 9) / 8 / 3600, "val": 2 * 5 / 8 / 3600})
    assert found.share == pytest.approx({"roi": 3 / 6, "flow": 1 / 6, "tips": 3 / 6, "border": 2 / 6})
    assert found.tips == {"min": 0, "median": 0.5, "max": 5}
    assert found.tokens == {"min": 2, "median": 4, "max": 16}  # not of the text of no caption
    assert found.captions == 4 and found.repeated_captions == {"cut": 3}  # two of one film, one of another
    assert found.dtypes == {"BF16": 2, "F16": 4}
    assert found.latents_read == 6 and found.warnings == []
    assert all(abs(mean) < 0.15 for mean in found.mean) and all(0.9 < std < 1.1 for std in found.std)
    stored = [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]
    bytes_of = {
        part: sum(row["parts"][part]["size"] for row in stored if part in row["parts"]) for part in found.mib
    }
    assert {part: round(mib * 2**20) for part, mib in found.mib.items()} == bytes_of
    assert json.loads(found.to_json())["mean"] == found.mean


def test_the_page_of_text_says_it_in_words(tmp_path: Path) -> None:
    page = str(shard_stats(write(tmp_path / "s")))
    for words in (
        "6 samples, 4.2 s",
        "train: 4 samples of 3 source videos, 3.0 s",
        "Other 0.5, Scissors 1.5",
        "roi 50 %, flow 17 %",
        "tips per sample    min 0, median 0.5, max 5",
        "    3 x cut",
        "BF16 2, F16 4; 6 read",
    ):
        assert words in page, page
    assert "WARNING" not in page and max(len(line) for line in page.splitlines()) < 125


def test_mean_and_deviation_are_those_of_all_latents(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    found = shard_stats(root)
    every = [
        data[i].latent.double().flatten(1)
        for data in (ShardDataset(root), ShardDataset(root, "val"))
        for i in range(len(data))
    ]
    values = torch.cat(every, dim=1)
    assert torch.allclose(torch.tensor(found.mean).double(), values.mean(1), atol=1e-6)
    assert torch.allclose(torch.tensor(found.std).double(), values.std(1, correction=0), atol=1e-6)


def test_latents_that_are_not_normalised_are_said(tmp_path: Path) -> None:
    found = shard_stats(write(tmp_path / "s", shift=1.6))
    (warning,) = found.warnings
    assert "latent channel 3 has mean 1.6" in warning and "WARNING latent channel 3" in str(found)


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        *[((1.05, 1.05), True), ((-1.05, -1.05), True), ((0.29, -0.29), True), ((3.1, -3.1), True)],
        *[((0.31, -0.31), False), ((2.9, -2.9), False), ((0.9 + 0.5, 0.9 - 0.5), False)],
        ((math.nan, 0), True),
    ],
)
def test_the_limits_of_a_normalised_channel(values: tuple[float, float], warned: bool) -> None:
    moments = module._Moments()
    moments.add(torch.tensor(values).expand(16, 1, 1, 2))
    found = ShardStats("x", {}, {}, {}, {}, {}, {})
    moments.fill(found, claimed=True)
    assert len(found.warnings) == 16 * warned


def test_of_many_samples_some_latents_are_read_evenly_spread(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_LATENTS", 4)
    root = write(tmp_path / "s")
    read: list[str] = []
    plain = module._latent

    def spy(store: Any, row: Any) -> torch.Tensor:
        read.append(row["key"])
        return plain(store, row)

    monkeypatch.setattr(module, "_latent", spy)
    found = shard_stats(root)
    assert found.latents_read == 3 and read == ["k0", "k2", "k4"] and found.dtypes == {"BF16": 2, "F16": 4}


def test_a_damaged_header_is_one_line_and_no_large_read(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    row = next(
        row for row in map(json.loads, (root / "index.jsonl").read_text().splitlines()) if row["key"] == "k2"
    )
    place = row["parts"]["latent.safetensors"]
    path = root / row["shard"]
    data = bytearray(path.read_bytes())
    data[place["offset"] + 3] = 0x80  # the length of the header: 2 GB
    path.write_bytes(data)
    with pytest.raises(
        ShardError, match="sample k2, part latent.safetensors: damaged: its header claims 2147"
    ):
        shard_stats(root)
    data[place["offset"] + 3] = 0
    data[place["offset"] + 8] = ord("x")
    path.write_bytes(data)
    with pytest.raises(ShardError, match="damaged: its header is no JSON"):
        shard_stats(root)


def test_a_url_gives_the_same_figures(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    fsspec.filesystem("memory").put(str(root), "/stats-set", recursive=True)
    here, there = shard_stats(root), shard_stats("memory://stats-set")
    there.root = here.root
    assert here == there
