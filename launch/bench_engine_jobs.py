"""Starts the real ranks of `wanmoe bench engine`, with a random base and random clips to train on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..moe_lora import WanmoeError
from ..moe_lora.instruments import SURGICAL
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import save_dit
from ..train.data.shard_writer import ShardWriter
from .config import LaunchConfig
from .hosts import free_port
from .launcher import environment

CLIPS, TEXT_TOKENS = 16, 8
_HEAD = {"name": "random", "fingerprint": "0", "stand_in": True}


@dataclass(frozen=True)
class Subject:
    """A model that real ranks train, and on what."""

    name: str
    sizes: WanConfig
    latent: tuple[int, int, int]
    """F, H, W of a clip."""
    adapter: Mapping[str, Any]
    """Section `adapter` of the config."""
    zero: Mapping[str, Any] = field(default_factory=dict)
    """Laid over DeepSpeed's zero_optimization in stage 3."""
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Of a clip."""
        count = 1
        for size, patch in zip(self.latent, self.sizes.patch_size, strict=True):
            count *= size // patch
        return count

    def config(self, folder: Path, stage: int, workers: int = 0) -> dict[str, Any]:
        """Stage b of the base and the clips in `folder`, without what would be written."""
        zero = {"config": {"zero_optimization": dict(self.zero)}} if stage == 3 and self.zero else {}
        return {
            "model": {"dit": str(folder / "base.safetensors")},
            "adapter": dict(self.adapter),
            "data": {"shards": str(folder / "shards"), "workers": workers, "caption_dropout": 0},
            "objective": {"temporal": 0, "roi": 0},
            "train": {
                "stage": "b",
                "run": str(folder / f"run-{stage}"),
                "steps": 1_000_000,
                "log_every": 1_000_000,
                "precision": "bf16",
                "checkpointing": self.checkpointing,
            },
            "deepspeed": {"zero": stage} | zero,
            "tracking": {"enabled": False},
        }


def run_subjects(
    wanted: Sequence[tuple[Subject, Sequence[int]]],
    ranks: int,
    local: int,
    steps: int,
    *,
    gpu: bool = False,
    workers: int = 0,
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What every rank found, by subject and stage; `local` ranks make up a node.

    Args:
        steps: that are timed under each.
        workers: reader processes of a rank.

    Raises:
        WanmoeError: a rank failed; the last lines that it wrote are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="wanmoe-bench-") as name:
        folder = Path(name)
        cases: list[dict[str, Any]] = []
        for number, (subject, stages) in enumerate(wanted):
            _write(subject, folder / str(number), gpu)
            for stage in stages:
                config = subject.config(folder / str(number), stage, workers)
                cases.append({"subject": subject.name, "stage": stage, "config": config, "steps": steps})
        job = folder / "job.json"
        job.write_text(json.dumps(cases))
        _start(job, ranks, local, gpu)
        found = [json.loads(job.with_suffix(f".{rank}.json").read_text()) for rank in range(ranks)]
    return {
        (case["subject"], case["stage"]): [rank[place] for rank in found] for place, case in enumerate(cases)
    }


def _write(subject: Subject, folder: Path, gpu: bool) -> None:
    folder.mkdir()
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        dit = WanDiT(subject.sizes)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    save_dit(dit.to("cpu", torch.bfloat16), folder / "base.safetensors")
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder / "shards", _HEAD, _HEAD) as writer:
        for number in range(CLIPS):
            latent = torch.randn(16, *subject.latent, generator=generator).bfloat16()
            text = torch.randn(TEXT_TOKENS, subject.sizes.text_dim, generator=generator).bfloat16()
            split, expert = ("val" if number % 4 == 3 else "train"), SURGICAL[number % 3].name
            meta = {
                "caption": "random",
                "instruments": [{"name": expert, "weight": 1.0}],
                "source": f"{split}{number}",
            }
            writer.add(f"clip_{number:04d}_00000000", split, latent, text, meta)


def _start(job: Path, ranks: int, local: int, gpu: bool) -> None:
    shared = environment(LaunchConfig(ranks=ranks)) | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    if not gpu:
        shared |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    words = [sys.executable, "-m", "wanmoe.launch.bench_engine_rank", str(job)]
    started = []
    logs = [job.with_suffix(f".{rank}.log") for rank in range(ranks)]
    try:
        for rank, log in enumerate(logs):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % local)}
            with log.open("wb") as file:
                started.append(subprocess.Popen(words, env=own, stdout=file, stderr=file))
        # Where one fails, the others would wait for it.
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    for rank, process in enumerate(started):
        if process.returncode != 0:
            told = logs[rank].read_text(errors="replace").strip().splitlines()
            raise WanmoeError(f"bench engine: rank {rank} failed: {' | '.join(told[-3:])}")
