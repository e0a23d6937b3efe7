"""`wanmoe data`: its options, its exit codes, and one line for what can be wrong."""

import json
from pathlib import Path

import cv2
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from wanmoe.launch.data import app
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.wan.codec import HaarCodec
from wanmoe.train.data.shard_writer import ShardWriter

# Names that users and scripts rely on; a new option is added here, one that goes is a break.
OPTIONS = {
    "verify": "",
    "repair": "apply",
    "stats": "json",
    "show": "out vae split samples key any-codec device",
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    codec = HaarCodec()
    head = {"name": codec.name, "fingerprint": codec.fingerprint, "stand_in": True}
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(tmp_path / "s", head, head, settings={"experts": ["Other"]}) as writer:
        for number in range(4):
            facts = {
                "caption": f"clip {number}",
                "instruments": [{"name": "Other", "weight": 1.0}],
                "source": f"s{number}",
                "fps": 16.0,
                "n_frames": 5,
            }
            latent = torch.randn(16, 2, 4, 6, generator=generator)
            text = torch.randn(3 + number, 8, generator=generator)
            writer.add(f"k{number}", "train" if number < 3 else "val", latent, text, facts)
    return tmp_path / "s"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def flip(shards: Path) -> None:
    row = json.loads((shards / "index.jsonl").read_text().splitlines()[1])
    path, offset = shards / row["shard"], row["parts"]["latent.safetensors"]["offset"]
    data = bytearray(path.read_bytes())
    data[offset + 200] ^= 1
    path.write_bytes(data)


def test_the_options_are_those_that_users_know() -> None:
    group = typer.main.get_command(app)
    found = {
        name: " ".join(param.opts[0].lstrip("-") for param in command.params if param.opts[0].startswith("-"))
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == OPTIONS


def test_verify_repair_and_verify_again(shards: Path) -> None:
    sound = run("verify", shards)
    assert sound.exit_code == 0 and sound.stderr == ""  # the bar is for terminals alone
    flip(shards)
    result = run("verify", shards)
    assert result.exit_code == 1 and "FAULT shard train-2x4x6-000000.tar, sample k0" in result.stdout
    assert "wanmoe data repair" in result.stderr
    plan = run("repair", shards)
    assert plan.exit_code == 0 and "lost k0" in plan.stdout and "nothing was changed" in plan.stdout
    assert run("verify", shards).exit_code == 1
    done = run("repair", shards, "--apply")
    assert done.exit_code == 0 and "s.quarantine-1" in done.stdout
    result = run("verify", shards)
    assert result.exit_code == 0 and "2 train, 1 val samples" in result.stdout
    assert "nothing to repair" in run("repair", shards).stdout


def test_stats_are_printed_and_written(shards: Path, tmp_path: Path) -> None:
    result = run("stats", shards, "--json", tmp_path / "stats.json")
    assert result.exit_code == 0 and "train: 3 samples of 3 source videos" in result.stdout
    assert json.loads((tmp_path / "stats.json").read_text())["samples"] == {"train": 3, "val": 1}
    fault = run("stats", shards, "--json", tmp_path / "no" / "stats.json").exception
    assert isinstance(fault, WanmoeError) and "does not exist" in str(fault)


def test_show_writes_a_picture_of_chosen_samples(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    result = run("show", shards, "--out", out, "--key", "k3", "--key", "k0", "--vae", "haar")
    assert result.exit_code == 0 and f"wrote {out}" in result.stdout, result.output
    assert "note: haar is a stand-in" in result.stdout
    picture = cv2.imread(str(out))
    assert picture is not None and picture.shape[1] > picture.shape[0] > 200
    fault = run("show", shards, "--out", out, "--key", "k9").exception
    assert isinstance(fault, WanmoeError) and "no sample 'k9'; nearest is 'k" in str(fault)
