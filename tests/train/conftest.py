"""A small set of labelled shards, a base and configs that train on it in a second or two a run."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch
import torch.distributed as dist

from wanmoe.launch.config import LaunchConfig
from wanmoe.launch.launcher import command, environment
from wanmoe.moe_lora.instruments import SURGICAL
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import save_dit
from wanmoe.train.data.router_prompts import RouterPrompt
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.judges.judge import Classifier, JudgeInfo, save_judge

NAMES = ("Scissors", "Hook/Electrocautery", "Suction", "Other")
STAND_IN = {"name": "test", "fingerprint": "0" * 64, "stand_in": True}
CONFIG = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=3, text_dim=16, text_len=8, freq_dim=16)


def write_shards(
    root: Path,
    labelled: bool = True,
    count: int = 12,
    marks: bool = True,
    codec: dict | None = None,
    image: bool = False,
) -> Path:
    """Clips whose latent has a pattern of their instrument, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 16, 2, 4, 4, generator=generator)
    with ShardWriter(root, codec or STAND_IN, STAND_IN, null_context=torch.ones(1, 16)) as writer:
        prompts = [RouterPrompt(f"prompt {n}", {NAMES[n % 4]: 1.0}) for n in range(8)]
        if labelled:
            pooled = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
            writer.set_router_prompts(pooled.half(), prompts)
        for index in range(count + 4):
            label = index % 4
            latent = patterns[label] + 0.3 * torch.randn(16, 2, 4, 4, generator=generator)
            context = torch.randn(1 + index % 5, 16, generator=generator) + label
            instruments = [{"name": NAMES[label], "weight": 1.0}] if labelled else []
            split = "train" if index < count else "val"
            meta = {"caption": "a clip", "instruments": instruments, "source": f"{split}{index}"}
            region = torch.zeros(2, 4, 4, dtype=torch.uint8)
            region[:, label : label + 1, 1:3] = 255
            parts = {
                "roi": region,
                "flow": 0.5 * torch.randn(1, 2, 4, 4, generator=generator).half(),
                "visible": torch.full((1, 4, 4), 255, dtype=torch.uint8),
            }
            more = parts if marks else {}
            if image:
                more = more | {"image_latent": torch.randn(20, 2, 4, 4, generator=generator)}
            writer.add(f"{split}_{index:03d}_abcdef01", split, latent, context, meta, **more)
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "clips")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """Random base weights, the head too, so that the adapter has gradients from the first step."""
    torch.manual_seed(0)
    dit = WanDiT(CONFIG)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_dit(dit, path)
    return path


@pytest.fixture
def config(shards, base, tmp_path) -> dict:
    """Stage A on two blocks; tests change what they need."""
    return {
        "model": {"dit": str(base)},
        "adapter": {"blocks": 2, "ffn_blocks": 1},
        "data": {"shards": str(shards), "batch": 1, "workers": 0},
        "objective": {"identity": 0},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"stage": "a", "run": str(tmp_path / "run"), "steps": 6, "log_every": 1},
        "tracking": {"enabled": False},
        "launch": {"ranks": 2},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(tree: dict, path: Path, through_wanmoe: bool = False) -> subprocess.Popen:
    """Starts the real deepspeed launcher on a config; directly, or as `wanmoe train` does."""
    tree = tree | {"launch": {"master_port": free_port()} | tree["launch"]}
    path.write_text(tomli_w.dumps(tree))
    launch = LaunchConfig(**tree["launch"])
    words = command(launch, ["train", "--config", str(path)])
    if through_wanmoe:
        words = [sys.executable, "-m", "wanmoe.launch", "train", "--config", str(path)]
    return subprocess.Popen(
        words, env=environment(launch), stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )


def run(tree: dict, path: Path) -> str:
    """Trains under the real launcher and returns its output; fails the test when it fails."""
    process = start(tree, path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="session")
def launcher() -> SimpleNamespace:
    """`start` and `run` of a training config under the deepspeed launcher, and a `free_port`."""
    return SimpleNamespace(start=start, run=run, free_port=free_port)


@pytest.fixture(scope="session")
def make_shards():
    """`write_shards`, for tests that need a set of their own."""
    return write_shards


@pytest.fixture(scope="session")
def random_classifier(shards):
    """`random_classifier(path, experts, space)` writes a classifier of these shards, of random weights: for
    tests in which it is only asked."""

    def write(path: Path, experts=SURGICAL, space: str = "latent") -> Path:
        torch.manual_seed(0)
        info = JudgeInfo(
            space=space,
            experts=experts,
            sizes=("2x4x4",),
            codec=ShardDataset(shards, "train").manifest["codec"],
            shards_sha256="",
            clips=12,
            steps=1,
            batch=1,
            lr=1.0,
            seed=0,
            held_out={},
            versions={},
        )
        save_judge(Classifier(info), path)
        return path

    return write


@pytest.fixture(scope="session")
def classifier(random_classifier, tmp_path_factory) -> Path:
    """A classifier of the four families with random weights."""
    return random_classifier(tmp_path_factory.mktemp("judge") / "classifier.safetensors")


@pytest.fixture(scope="module")
def lone_group(tmp_path_factory):
    """A process group of one, for what asks its ranks."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
