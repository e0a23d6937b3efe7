"""`wanmoe plan` as it is typed, its presets, and what an out-of-memory error of training says."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from wanmoe.launch import plan, train
from wanmoe.launch.cli import app
from wanmoe.launch.config import load_config
from wanmoe.moe_lora import WanmoeError
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import save_dit
from wanmoe.train import model
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.planner import GB, Planner, card_of
from wanmoe.train.zero import FULL

MACHINES = plan.PRESETS / "machines"
SIZES = {"256x256x81": (256, 256), "512x512x81": (512, 512), "832x480x81": (480, 832)}
CARDS = ["16gb", "24gb", "40gb", "80gb"]


def run(*words):
    found = CliRunner().invoke(app, ["plan", *map(str, words)])
    if found.exception is not None and not isinstance(found.exception, SystemExit | WanmoeError):
        raise found.exception
    return found


def refused(*words):
    found = run(*words)
    assert isinstance(found.exception, WanmoeError), found.output
    return str(found.exception)


@pytest.fixture
def config(tmp_path):
    dit = WanDiT(WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=3, text_dim=16, text_len=8))
    save_dit(dit, tmp_path / "model.safetensors")
    by = {"name": "test", "fingerprint": "0" * 64, "stand_in": True}
    with ShardWriter(tmp_path / "clips", by, by, null_context=torch.ones(1, 16)) as writer:
        for index, size in enumerate([(2, 4, 4), (3, 8, 8)]):
            meta = {"caption": "a clip", "instruments": [], "source": str(index)}
            writer.add(f"train_{index}_abcdef01", "train", torch.randn(16, *size), torch.ones(2, 16), meta)
    path = tmp_path / "b.toml"
    path.write_text(
        '[model]\ndit = "model.safetensors"\n[adapter]\nblocks = 2\n[data]\nshards = "clips"\nbatch = 2\n'
        '[train]\nstage = "b"\nrun = "run"\nepochs = 3\nglobal_batch = 4\n'
    )
    return path


def test_the_plan_of_a_run_by_its_own_weights_and_shards(config):
    found = run("--config", config, "--card", "24GB")
    assert found.exit_code == 0
    assert f"{load_config(config).model.dit}, training base, experts: 9 frames of 64x64" in found.output
    assert "settings: bf16, all blocks on the card" in found.output
    assert re.search(r"peak +\d+\.\d\d of 24\n", found.output)
    assert re.search(r"hours of steps, modelled: stage b \d\.\d \(\d+ steps of 4 clips\)", found.output)


def test_settings_of_the_config_are_shown_and_keys_change_them(config):
    found = run("--config", config, "--card", "24GB", "--ring.blocks", 2, "--train.checkpointing", "true")
    assert "settings: bf16, the tail computed again, 2 of 3 blocks stream, 2 slots" in found.output
    assert "blocks that stream, pinned" in found.output and "copied from the host" in found.output


def test_without_a_config_a14b_is_planned_for_every_stage():
    found = run("--fit", "24GB", "--clips", 80)
    assert "t2v-A14B x 2, training base, experts: 81 frames of 256x256, 5376 tokens a clip" in found.output
    assert re.search(r"stage a .* stage b .* \(500 steps of 8 clips\); stage c", found.output)
    assert "others that fit:" in found.output and "fp8" in found.output


def test_generation_is_planned_too():
    found = run("--generate", "--fit", "16GB", "--size", 512, 512)
    assert "t2v-A14B x 2, generation: 81 frames of 512x512, 21504 tokens a clip" in found.output
    assert "optimizer" not in found.output and "hours" not in found.output
    assert re.search(r"a step, modelled: [\d.]+ s with guidance; 40 steps take [\d.]+ minutes", found.output)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --card CARD for the run as configured, or --fit CARD"),
        (["--card", "24GB", "--fit", "24GB"], "or --fit CARD: not both"),
        (["--card", "24GB", "--out", "x.toml"], "--out writes what --fit proposes"),
        (["--fit", "24GB", "--generate", "--out", "x.toml"], "--out writes what --fit proposes"),
        (["--card", "b200"], "no card 'b200': give a size such as 24GB, or one of 4090-24g"),
        (["--fit", "24GB", "--model", "t2v-A15B"], "did you mean 't2v-A14B'"),
        (
            ["--fit", "24GB", "--size", 250, 256],
            "--size 250 256: multiples of 16 are wanted; nearest is 256 256",
        ),
        (["--fit", "24GB", "--size", -16, 472], "nearest is 16 480"),
        (["--card", "4090"], "no card of 4090 GB; did you mean 4090-24g?"),
        (["--card", "24GB", "--host", 4, "--ring.blocks", 32], "45 GB on the host do not fit into --host 4"),
        (
            ["--fit", "24GB", "--ring.blocks", 5],
            "--ring.blocks: --fit chooses it itself; leave it out, or give --card",
        ),
        (["--generate", "--card", "24GB", "--ring.blocks", 5], "--ring.blocks: --generate chooses it itself"),
        (["--generate", "--card", "24GB", "--ranks", 4], "--ranks is for training"),
        (["--generate", "--card", "24GB", "--host", 4], "other weights (model.quantised)"),
        (["--card", "24GB", "--train.sequence_parallel", 3, "--ranks", 3], "the model's 40 attention heads"),
        (
            ["--card", "24GB", "--ring.blocks", -2],
            "--ring.blocks: Input should be 'auto'; or Input should be gr",
        ),
        (
            ["--card", "24GB", "--ring.blocks", 5, "--ring.slots", 7],
            "ring.slots = 7 is more than the 5 blocks",
        ),
        (["--fit", "24GB", "--out", "none/x.toml"], "the folder none does not exist"),
        (["--fit", "24GB", "--frames", 80], "frames must be 4n+1; nearest is 81"),
        (["--fit", "4GB"], "nothing fits into 4 GB: the least on a card is"),
        (["--card", "16GB", "--ring.blocks", 2], "do not fit into 16; see --fit 16GB"),
        (
            ["--card", "24GB", "--train.stage", "pretrain"],
            "and for generation; stage pretrain trains the base",
        ),
        (["--card", "24GB", "--train.sequence_parallel", 2], "--ranks 1 does not divide by"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*words)
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_name_the_way_to_plan_without_them(config):
    config.write_text(config.read_text().replace('"model.', '"nowhere.'))
    assert "give --model t2v-A14B to plan without the weights" in refused(
        "--config", config, "--card", "24GB"
    )
    found = run("--config", config, "--card", "24GB", "--model", "t2v-1.3B")
    assert "t2v-1.3B, training base, experts" in found.output


def test_a_written_preset_trains_as_it_was_planned(tmp_path):
    out = tmp_path / "ours.toml"
    run("--fit", "24GB", "--out", out)
    config = load_config(plan.PRESETS / "stage_b.toml", [], str(out))
    planner = Planner(plan.job_of(config, "t2v-A14B", None, None, 1), card_of("24GB"))
    settings = plan.settings_of(config, planner)
    assert settings == planner.fit()[0].settings
    assert re.fullmatch(r"# 24GB, 1 rank: t2v-A14B, both noise experts .*", out.read_text().splitlines()[0])


@pytest.mark.parametrize("memory", [9 * 10**8, 2 * 10**9, 10**10])
@pytest.mark.parametrize("asked", [{}, {"checkpointing": "true"}, {"blocks": "2"}])
def test_training_holds_the_models_as_planned(config, monkeypatch, memory, asked):
    """On a card whose memory the small model fills or not."""
    keys = {"checkpointing": "train.checkpointing", "blocks": "ring.blocks"}
    words = [word for key, value in asked.items() for word in (f"--{keys[key]}", value)]
    words += ["--adapter.ffn_blocks", "1", "--train.precision", "bf16"]
    read = load_config(config, words)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Properties)
    monkeypatch.setattr("wanmoe.train.model.room", lambda device: memory)
    sides = list(model.side_configs(read).values())
    found = model.plan_of(read, sides, 1, torch.device("cuda"))
    planner = Planner(
        plan.job_of(read, None, None, None, 1), replace(card_of("24GB"), memory=int(FULL * memory))
    )
    settings = plan.settings_of(read, planner)
    assert (settings.stage, settings.park, settings.stream) == (found.stage, found.park, found.stream)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("card", CARDS)
def test_the_presets_are_what_the_planner_proposes(card, size, tmp_path):
    config = load_config(plan.PRESETS / "stage_b.toml")
    planner = Planner(plan.job_of(config, "t2v-A14B", SIZES[size], 81, 1), card_of(card))
    plan.write_preset(tmp_path / "now.toml", planner, planner.fit()[0])
    there = MACHINES / f"{card}-{size}.toml"
    assert there.read_text() == (tmp_path / "now.toml").read_text(), f"wanmoe plan --fit {card} ... --out"


class Properties:
    name, total_memory = "NVIDIA GeForce RTX 4090", 25_400_000_000


def test_training_that_runs_out_of_memory_says_where_it_went_and_what_to_try(config, monkeypatch, capsys):
    def train_until_full(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    # Too large for its card, as no card is here to be full.
    text = config.read_text().replace('dit = "model.safetensors"', 'preset = "t2v-A14B"')
    config.write_text(text.replace("blocks = 2", "blocks = 8"))
    monkeypatch.setattr("wanmoe.train.loop.train", train_until_full)
    monkeypatch.setattr(train, "under_launcher", lambda: True)
    monkeypatch.setattr(train.signal, "signal", lambda number, act: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Properties)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 23 * GB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 * GB, total=64 * GB))
    with pytest.raises(
        WanmoeError, match=r"CUDA out of memory; try --train.checkpointing true --ring.blocks 1\d$"
    ) as raised:
        train.start(Path(config), [], None)
    told = capsys.readouterr().err
    assert "NVIDIA GeForce RTX 4090: 24.1 GB, 165 TFLOP/s" in told
    assert re.search(r"measured before it ran out +23\.00\n", told)
    assert "\n" not in str(raised.value)
