import inspect
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from wanmoe.launch.judges import train_classifier, train_detector
from wanmoe.moe_lora import WanmoeError
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.judges import Recipe, load_classifier, load_detector

MADE_BY = {"name": "test", "fingerprint": "0" * 64, "stand_in": True}
NAMES = ("hook", "scissors", "grasper")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Clips whose instrument is a pattern of channels, and whose tip is where it stands."""
    root = tmp_path_factory.mktemp("shards") / "clips"
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 16, generator=generator) * 3
    with ShardWriter(root, MADE_BY, MADE_BY, null_context=torch.ones(1, 4)) as writer:
        for number in range(24):
            latent = 0.3 * torch.randn(16, 2, 6, 6, generator=generator)
            row, col = (int(n) for n in torch.randint(1, 5, (2,), generator=generator))
            latent[:, :, row, col] = patterns[number % 3, :, None]
            tips = [{"frame": 4 * k, "x": col * 8 + 3.5, "y": row * 8 + 3.5} for k in range(2)]
            labels = [{"name": NAMES[number % 3], "weight": 1.0}]
            meta = {"caption": "x", "instruments": labels, "tips": tips, "source": f"s{number}"}
            split = "train" if number < 18 else "val"
            writer.add(f"s_{number:03d}_abcdef01", split, latent, torch.ones(1, 4), meta)
    return root


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(train_classifier)
    app.command()(train_detector)

    def command(*words: object):
        return CliRunner().invoke(app, [str(word) for word in words])

    return command


def test_train_classifier(run, shards, tmp_path) -> None:
    config = tmp_path / "tools.toml"
    config.write_text("[adapter]\nexperts = [{name='grasper'}, {name='hook'}, {name='scissors'}]\n")
    out = tmp_path / "new" / "classifier.safetensors"
    result = run(
        *("train-classifier", "--shards", shards, "--out", out, "--config", config),
        *("--steps", 30, "--batch", 8, "--lr", 0.01, "--seed", 1, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    judge = load_classifier(out)
    assert judge.classes == ("grasper", "hook", "scissors")
    assert (judge.info.steps, judge.info.batch, judge.info.lr, judge.info.seed) == (30, 8, 0.01, 1)
    assert judge.info.held_out["accuracy"] > 0.6
    assert "held-out clips (95 % interval" in result.output
    assert "always naming the most frequent" in result.output
    assert f"wrote {out}; report: {out.with_suffix('.html')}" in result.output
    assert out.with_suffix(".html").is_file() and out.with_suffix(".json").is_file()


def test_train_detector(run, shards, tmp_path) -> None:
    out = tmp_path / "detector.safetensors"
    result = run("train-detector", "--shards", shards, "--out", out, "--steps", 30, "--batch", 8)
    assert result.exit_code == 0, result.output
    assert load_detector(out).info.held_out["pck"] > 0.5
    assert "It finds the tip within 8 px in" in result.output and out.with_suffix(".html").is_file()


def test_faults_of_the_user_are_one_line(run, shards, tmp_path) -> None:
    out = tmp_path / "c.safetensors"
    for words, message in (
        (("--vae", "haar"), "--vae is for --space pixels alone"),
        (("--space", "pixels", "--vae", "haar"), "pixels need the codec that made the latents, test"),
        (("--steps", "0"), "steps and batch are 1 or more"),
        (("--device", "tpu"), "--device 'tpu'"),
    ):
        result = run("train-classifier", "--shards", shards, "--out", out, *words)
        assert isinstance(result.exception, WanmoeError) and message in str(result.exception), words
    result = run("train-detector", "--shards", tmp_path, "--out", out)
    assert isinstance(result.exception, WanmoeError) and "wanmoe prepare" in str(result.exception)
    assert not out.exists()


def test_the_defaults_are_those_of_the_recipe() -> None:
    for command in (train_classifier, train_detector):
        given = inspect.signature(command).parameters
        assert Recipe(*(given[name].default for name in ("steps", "batch", "lr", "seed"))) == Recipe()
