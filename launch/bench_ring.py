"""`wanmoe bench ring`: blocks that stream against blocks that stay, training and generation, in one run, each
beside what `wanmoe plan` says of it.

The models have the sizes of real ones and random weights, all blocks the same: a stand-in that computes and
copies as much.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.bench.provenance import provenance
from ..kernels.bench.record import write_text
from ..moe_lora.adapter import Adapter, AdapterConfig, attach
from ..moe_lora.block_store import BlockStore
from ..moe_lora.needs import spread
from ..moe_lora.ring import BlockRing
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT
from ..train.planner import GB, Job, Needs, Planner, Settings, card_here

FORMAT = "wanmoe-bench-ring/1"
WARM_UP, STEPS = 2, 4


@dataclass(frozen=True)
class Setting:
    """What is measured on a kind of device."""

    preset: str
    latent: tuple[int, int, int]
    adapter: AdapterConfig
    caps: dict[str, float]
    """GB that training and generation may take of the card; 0: no limit."""
    stream: int | None
    """Blocks of each model that stream; None: as the planner proposes for the cap."""


GPU = Setting("t2v-A14B", (21, 32, 32), AdapterConfig(), {"training": 24, "generation": 16}, None)
SMALL = AdapterConfig(blocks=2, ffn_blocks=1)
CPU = Setting("tiny", (3, 16, 16), SMALL, {"training": 0, "generation": 0}, 6)


def bench_ring(
    device: torch.device,
    setting: Setting,
    *,
    argv: list[str],
    say: Callable[[str], object],
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Measures the ring and returns what was found, with where and by what; `keep` gets it row by row."""
    card = card_here(device)
    rows: list[dict[str, Any]] = []
    result = {"format": FORMAT, "provenance": provenance(device, argv), "rows": rows}
    for kind in ("training", "generation"):
        parts: tuple[Any, ...] = ("base", "experts") if kind == "training" else ()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        config = WanConfig.preset(setting.preset)
        job = Job(setting.preset, config, 2, setting.adapter, parts, setting.latent, dtype=dtype)
        planner = Planner(job, card)
        for settings, cap in _settings(planner, setting, setting.caps[kind]):
            say(f"{kind}: {settings.describe(job)}")
            try:
                rows.append({"kind": kind} | _measure(planner, settings, cap, device))
            except torch.OutOfMemoryError as error:  # the others are worth having
                say(f"{kind} ran out of memory: {str(error).splitlines()[0]}")
            keep(result)
    return result


def _settings(planner: Planner, setting: Setting, cap: float) -> list[tuple[Settings, float]]:
    """What is measured, and GB that it may take: all blocks resident if they fit, and the ring."""
    ring = Settings(stream=setting.stream or 0)
    if setting.stream is None:
        small = Planner(planner.job, replace(planner.card, memory=int(cap * GB)))
        ring = next(one.settings for one in small.fit((None,)) if one.settings.stream)
    resident = replace(ring, stream=0)
    fits = planner.needs(resident).peak <= planner.card.memory
    return [*[(resident, 0.0)] * fits, (ring, cap)]


def _measure(planner: Planner, settings: Settings, cap: float, device: torch.device) -> dict[str, Any]:
    job, planned = planner.job, planner.needs(settings)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap * GB / total, 1.0) if cap else 1.0, device)
    ring = BlockRing(device, settings.slots)
    models = [_Model(job, settings, ring, seed, device) for seed in range(job.models)]
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            ring.copies.stall()
            moved = ring.moved
        began = time.perf_counter()
        models[step % len(models)].step()
        if gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    stall, copied = ring.copies.stall() / STEPS, (ring.moved - moved) / STEPS
    found = {
        "model": job.name,
        "models": job.models,
        "latent": list(job.latent),
        "tokens": job.tokens,
        "settings": settings.describe(job),
        "stream": settings.stream,
        "cap_gb": cap,
        "seconds": statistics.median(times[WARM_UP:]),
        "all_seconds": times[WARM_UP:],
        "stall": stall,
        "copied": copied,
        "blocks_copied": copied / planner.base(None).block,
        "planned_seconds": planned.seconds,
        "planned_copy": planned.copy,
        "planned_stall": planned.time.stall,
        "planned_peak": _allocated(planned, gpu),
        "peak": torch.cuda.max_memory_allocated(device) if gpu else None,
    }
    ring.close()
    del models, ring
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return found


def _allocated(planned: Needs, gpu: bool) -> int | None:
    """What is planned of that which torch itself allocates, in the phases that are measured."""
    if not gpu:
        return None
    own = sum(size for name, size in planned.held.items() if name != "CUDA and its libraries")
    return own + max(size for name, size in planned.phases.items() if not name.startswith("decoding"))


class _Model:
    """One side with random weights, and a step of it."""

    def __init__(
        self, job: Job, settings: Settings, ring: BlockRing, seed: int, device: torch.device
    ) -> None:
        torch.manual_seed(seed)
        config, blocks = job.config, job.config.num_layers
        with torch.device("meta"):
            self.dit = WanDiT(config)
        adapter = job.adapter
        self.adapter: Adapter
        template = 0.02 * torch.randn(max(p.numel() for p in self.dit.blocks[0].parameters())).to(job.dtype)
        store = None
        if settings.stream:
            first = adapter.block_indices(blocks)[0] if job.trains else blocks
            store = BlockStore(device, resident=set(range(blocks)) - spread(settings.stream, first, blocks))
            store.lay_out(list(self.dit.blocks), lambda name: job.dtype)
        else:
            template = template.to(device)
        for name, shape in [(name, p.shape) for name, p in self.dit.named_parameters()]:
            read = partial(_piece, template, shape)
            parameter = None if store is None else store.put(name, read)
            if parameter is None:
                value = 0.02 * torch.randn(shape, device=device)
                if name.startswith("blocks."):
                    value = _piece(template, shape).clone()
                parameter = nn.Parameter(value.to(job.dtype), requires_grad=False)
            module, _, leaf = name.rpartition(".")
            setattr(self.dit.get_submodule(module), leaf, parameter)
        self.dit.checkpointing = settings.checkpointing and job.trains
        self.adapter = attach(self.dit, adapter, seed=seed, device=device)
        trained: list[nn.Parameter] = []
        if job.trains:
            trained = list(self.adapter.train_only(job.parts).values())
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        if store is not None:
            tail = self.dit.first_adapted if job.trains else blocks
            self.dit.streamed = ring.add(store, list(self.dit.blocks), tail)
        self._inputs = self._draw(job, device)

    def _draw(self, job: Job, device: torch.device) -> tuple[Tensor, ...]:
        config, clips = job.config, job.clips
        x = torch.randn(clips, config.out_dim, *job.latent, device=device).to(job.dtype)
        context = torch.randn(clips, config.text_len, config.text_dim, device=device).to(job.dtype)
        experts = torch.full((clips, len(self.adapter.experts)), 0.25, device=device)
        self._tokens = job.tokens
        return x, torch.full((clips,), 0.5, device=device), context, experts

    def step(self) -> None:
        """A forward, and where it trains a backward and an update."""
        x, t, context, experts = self._inputs
        with torch.set_grad_enabled(self.optimizer is not None):
            out = self.dit(x, t, context, self.adapter.gates(experts, t, tokens=self._tokens))
        if self.optimizer is not None:
            out.square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def _piece(template: Tensor, shape: Sequence[int]) -> Tensor:
    return template[: math.prod(shape)].view(*shape)


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, measured beside planned."""
    lines = [
        "| | settings | limit | s a step | planned | waits | blocks copied | planned peak | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        limit = f"{row['cap_gb']:g} GB" if row["cap_gb"] else "none"
        peaks = ["-" if row[key] is None else f"{row[key] / GB:.2f} GB" for key in ("planned_peak", "peak")]
        seconds = [f"{row[key]:.3f}" for key in ("seconds", "planned_seconds", "stall")]
        cells = [row["kind"], row["settings"], limit, *seconds, f"{row['blocks_copied']:.0f}", *peaks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """Writes the figures as JSON into `folder`/ring and returns the path."""
    stamp = result["provenance"]["utc"].replace(":", "").replace("-", "").replace("+0000", "Z")
    path = folder / "ring" / f"ring-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path
