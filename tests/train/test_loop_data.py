"""Training on shards with faults: what cannot be read is replaced, named and counted, up to a limit."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wanmoe.train.tracking import read_metrics


def spoil(root: Path, number: int, split: str = "train") -> str:
    """Flips a bit in the latent of a sample; returns its key."""
    rows = [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]
    row = [row for row in rows if row["split"] == split][number]
    path, place = root / row["shard"], row["parts"]["latent.safetensors"]
    data = bytearray(path.read_bytes())
    data[place["offset"] + place["size"] - 3] ^= 8
    path.write_bytes(data)
    return row["key"]


@pytest.fixture
def spoiled(shards: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    root = tmp_path / "spoiled"
    shutil.copytree(shards, root)
    return root, [spoil(root, 2), spoil(root, 5)]


def test_bad_samples_are_replaced_counted_and_named_on_all_ranks(ranks, config, tmp_path, spoiled):
    root, bad = spoiled
    # One clip of the first rank's validation; the second rank has its own.
    bad.append(spoil(root, 0, "val"))
    config["data"] |= {"shards": str(root), "max_bad_samples": 3}
    config["train"] |= {"steps": 12, "save_every": 6}
    output = ranks.run(config)
    for key in bad:
        line = (
            f"replaced a sample that cannot be read: shard {key.split('_')[0]}-2x4x4-000000.tar, sample {key}"
        )
        assert output.count(line) == 1
    metrics = read_metrics(tmp_path / "run")
    lines = [line for line in metrics if "train/loss" in line]
    assert len(lines) == 12 and lines[-1]["data/bad_samples"] == 3
    assert all(line["data/wait_s"] >= 0 for line in lines)
    held_out = [line["val/loss"] for line in metrics if "val/loss" in line]
    assert len(held_out) == 2 and all(math.isfinite(loss) for loss in held_out)
    # A resume knows them: one more than allowed is one too many, wherever the run was interrupted.
    shutil.rmtree(tmp_path / "run" / "resume" / "step_00000012")
    spoil(root, 8)
    output = ranks.fail(config)
    assert "4 samples cannot be read" in output and "Traceback" not in output


def test_a_rank_that_finds_nothing_to_read_ends_the_run_on_all(ranks, config, tmp_path, shards):
    """Every sample of a whole split is gone: no rank is left waiting in a forward."""
    root = tmp_path / "gone"
    shutil.copytree(shards, root)
    for number in range(12):
        spoil(root, number)
    config["data"] |= {"shards": str(root), "max_bad_samples": 5}
    output = ranks.fail(config)
    assert "Traceback" not in output
    assert "on rank 0:" in output and "6 samples in a row cannot be read" in output


def test_more_bad_samples_than_allowed_stop_all_ranks_in_one_line(ranks, config, tmp_path, spoiled):
    root, _ = spoiled
    config["data"] |= {"shards": str(root), "max_bad_samples": 1}
    config["train"] |= {"steps": 12}
    output = ranks.fail(config)
    assert "Traceback" not in output
    assert "2 samples cannot be read, at last" in output and "raise data.max_bad_samples" in output


@pytest.mark.parametrize("fault", ["other", "missing"])
def test_nodes_whose_shards_differ_are_told_so_and_none_hangs(
    launcher, config, tmp_path, shards, make_shards, fault
):
    """The same path on both nodes; one of them holds other samples, or lacks a shard."""
    nodes = []
    for rank, section in enumerate(launcher.two_nodes(tmp_path, 1)):
        folder = tmp_path / f"disk{rank}"
        folder.mkdir()
        if rank == 1 and fault == "other":
            make_shards(folder / "s", count=8)
        else:
            shutil.copytree(shards, folder / "s")
        if rank == 1 and fault == "missing":
            (folder / "s" / "train-2x4x4-000000.tar").unlink()
        tree = config | {"launch": section}
        tree["data"] = config["data"] | {"shards": "s"}
        tree["train"] = config["train"] | {"run": str(tmp_path / "run")}
        nodes.append(launcher.start(tree, folder / "config.toml"))
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes)
    wanted = {"other": "the ranks disagree on", "missing": "on rank 1: shard"}[fault]
    assert all(wanted in text for text in texts), texts[0][-3000:]


def test_a_streamed_run_trains_and_goes_on_where_it_was_stopped(ranks, config, tmp_path):
    """Shards are read one after the other by two ranks with a reader process each; a resume is bit-equal."""
    config["data"] |= {"reader": "streaming", "workers": 1}
    config["train"] |= {"steps": 6, "save_every": 3}
    ranks.run(config)
    straight = load_file(tmp_path / "run" / "adapter.safetensors")
    shutil.rmtree(tmp_path / "run" / "resume" / "step_00000006")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    output = ranks.run(config)
    assert "at step 3" in output
    resumed = load_file(tmp_path / "run" / "adapter.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
