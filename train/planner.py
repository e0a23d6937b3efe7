"""What a job takes of a card and of its host, how long a step is, and the fastest settings that fit.

Bytes of weights and optimizer are those of the job, bytes of activations are counted in a dry run of the
model; seconds are modelled from the card's rates, as roofline, and say so.
L video tokens, Lc text tokens, D width.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import psutil
import torch

from ..moe_lora import WanmoeError
from ..moe_lora.adapter import AdapterConfig, Part
from ..moe_lora.formats import FORMATS
from ..moe_lora.needs import (
    CONTEXT,
    Activations,
    Base,
    activations,
    adapter_elements,
    base_of,
    decoding,
    spread,
)
from ..moe_lora.wan.config import WanConfig
from .ring_time import StepTime, step_time
from .zero import FULL, GATHERED, STATE_BYTES, Stage

GB = 10**9
# Part of a card's rates that large matrix products, attention, and norms and the like reach.
GEMM, ATTENTION, STREAM = 0.85, 0.6, 0.8
# Reads and writes of [L, D] in a block beside matrix products and attention: norms, modulation, residual
# sums, GELU, rotary positions and the adapter's own.
PASSES = 40
# How much longer a step may be with exacter weights.
WORTH = 1.05
# Bytes of Wan's VAE in fp32.
VAE = 507_570_124
# Bytes of a rank on the CPU before it has a model, with the heaps of its threads: measured.
PROCESS = 570_000_000
# Bytes of one block of umT5-xxl in bf16.
TEXT_BLOCK = 385_896_448


@dataclass(frozen=True)
class Card:
    """A kind of card, by its memory and its rates."""

    name: str
    memory: int
    """Bytes that a job may take; a card sold as of 24 GB has 25.4."""
    flops: float
    """bf16, dense, a second."""
    bandwidth: float
    """Bytes a second."""
    link: float = 25e9
    """Bytes a second from pinned host memory."""
    fabric: float = 20e9
    """Bytes a second from the other cards of its machine."""

    @property
    def is_host(self) -> bool:
        return self.name == "cpu"


# By their makers' data sheets, the H100's as measured once; what sustained work reaches is below them.
CARDS = {
    card.name: card
    for card in (
        Card("4090-24g", 24 * GB, 165e12, 1.0e12),
        Card("a100-40g", 40 * GB, 312e12, 1.6e12, fabric=250e9),
        Card("a100-80g", 80 * GB, 312e12, 2.0e12, fabric=250e9),
        Card("h100-80g", 80 * GB, 800e12, 3.0e12, 50e9, fabric=400e9),
        Card("h200-141g", 141 * GB, 800e12, 4.8e12, 50e9, fabric=400e9),
    )
}


def card_of(text: str, link: float | None = None) -> Card:
    """A card by its name in `CARDS`, the CPU of this machine by "cpu", or a card by its memory, "24GB": the
    smallest of these with so much, cut to it.

    link: bytes a second from pinned host memory, where it is known. Raises WanmoeError for another text.
    """
    card = this_host() if text == "cpu" else CARDS.get(text)
    if card is None:
        try:
            memory = float(text.upper().removesuffix("GB")) * GB
        except ValueError:
            memory = math.nan
        if not memory > 0:
            raise WanmoeError(
                f"no card {text!r}: give a size such as 24GB, or one of {', '.join(CARDS)}, cpu"
            )
        larger = [card for card in CARDS.values() if card.memory >= memory]
        if not larger:
            named = [name for name in CARDS if text.lower() in name]
            most = named or [max(CARDS.values(), key=lambda card: card.memory).name]
            hint = f"did you mean {most[0]}?" if named else f"the largest that is known is {most[0]}"
            raise WanmoeError(f"no card of {text} GB; {hint}")
        smallest = min(larger, key=lambda card: card.memory)
        card = replace(smallest, memory=int(memory), name=f"{text.upper().removesuffix('GB')}GB")
    return card if link is None else replace(card, link=link)


def card_here(device: torch.device) -> Card:
    """The card of this machine, its rates by its name, of its memory what a job may take; on a CPU
    `this_host`."""
    if device.type == "cpu":
        return this_host()
    found = torch.cuda.get_device_properties(device)
    of_name = [card for card in CARDS.values() if card.name.split("-")[0].upper() in found.name.upper()]
    like = min(of_name or CARDS.values(), key=lambda card: abs(card.memory - found.total_memory))
    name = found.name if of_name else f"{found.name}, with the rates of a {like.name}"
    return replace(like, name=name, memory=int(FULL * found.total_memory))


def this_host() -> Card:
    """The CPU as a card: its memory, and its rates as they are measured now, in a second or two."""
    a = torch.randn(1024, 1024)
    flops = 2 * 1024**3 / _fastest(lambda: a @ a)
    large = torch.empty(64 * 2**20, dtype=torch.uint8)
    copied = large.nbytes / _fastest(large.clone)
    memory = int(FULL * psutil.virtual_memory().total)
    return Card("cpu", memory, flops, 2 * copied, copied, copied)


def _fastest(call: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True)
class Job:
    """What is asked for, whatever holds it."""

    name: str
    """Of the model."""
    config: WanConfig
    models: int
    """Two where both noise experts take part."""
    adapter: AdapterConfig
    parts: tuple[Part, ...]
    """That train; () for generation."""
    latent: tuple[int, int, int]
    """[F, H, W]."""
    clips: int = 1
    """Of a forward."""
    forwards: int = 1
    """Of a step; 2 where guidance wants two passes."""
    ranks: int = 1
    """On a machine."""
    shared: int = 1
    """Ranks that share a clip."""
    dtype: torch.dtype = torch.bfloat16
    """That is computed in."""

    @property
    def tokens(self) -> int:
        """L."""
        return math.prod(n // p for n, p in zip(self.latent, self.config.patch_size, strict=True))

    @property
    def trains(self) -> bool:
        return bool(self.parts)

    @property
    def clip(self) -> str:
        """In words."""
        frames, height, width = self.latent
        return f"{4 * frames - 3} frames of {8 * height}x{8 * width}"


@dataclass(frozen=True)
class Settings:
    """What a plan may choose."""

    quantised: str | None = None
    checkpointing: bool = False
    stage: Stage = 0
    park: bool = False
    """Of two models, the one that does not compute waits in host memory."""
    stream: int = 0
    """Blocks of each model that come from the host."""
    slots: int = 2

    def describe(self, job: Job) -> str:
        """In words."""
        blocks = job.config.num_layers
        words = [self.quantised or ("fp32" if job.dtype == torch.float32 else "bf16")]
        words += ["the tail computed again"] * self.checkpointing
        words += ["shards (ZeRO-3)"] * (self.stage == 3)
        words += ["the idle model in host memory"] * self.park
        if self.stream:
            words.append(f"{self.stream} of {blocks} blocks stream, {self.slots} slots")
        elif self.stage < 3:
            words.append("all blocks on the card" if not self.park else "its blocks on the card")
        return ", ".join(words)


@dataclass(frozen=True)
class Needs:
    """Bytes by where they lie, and modelled seconds."""

    settings: Settings
    held: dict[str, int]
    """On the card all the time, by name."""
    phases: dict[str, int]
    """Beside it at the highest point of each phase."""
    host: dict[str, int]
    """Of a machine, by name."""
    copy: float
    """Seconds in which one block comes to the card; 0 where all are there."""
    forward: float
    """Seconds of one block."""
    backward: float
    time: StepTime
    """Of a step; of generation, a forward."""
    swap: float
    """Seconds of a step in which a parked model comes to the card."""

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(self.phases.values())

    @property
    def seconds(self) -> float:
        return self.time.seconds + self.swap


def block_seconds(config: WanConfig, tokens: int, card: Card) -> tuple[float, float]:
    """(forward, backward for the input alone) of one block on `tokens` tokens of a clip."""
    d, ffn, text = config.dim, config.ffn_dim, config.text_len
    linear = 2 * d * d * (4 * tokens + 2 * tokens + 2 * text) + 4 * tokens * d * ffn
    attended = 4 * d * tokens * (tokens + text)
    passes = PASSES * tokens * d * 2 / (STREAM * card.bandwidth)
    forward = linear / (GEMM * card.flops) + attended / (ATTENTION * card.flops) + passes
    backward = linear / (GEMM * card.flops) + 2.5 * attended / (ATTENTION * card.flops) + 2 * passes
    return forward, backward


class Planner:
    """What a rank of a job takes on a card of some kind, under any settings."""

    def __init__(self, job: Job, card: Card) -> None:
        self.job, self.card = job, card
        self._bases: dict[str | None, Base] = {}

    def needs(self, settings: Settings) -> Needs:
        """Of these settings, whether they fit or not."""
        job, base = self.job, self.base(settings.quantised)
        trained, adapters = self.elements
        held = _weights(job, base, settings)
        held["adapters, fp32"] = 4 * adapters * job.models
        if job.trains:
            held["their gradients and optimizer"] = STATE_BYTES * trained * job.models
        if self.card.is_host:
            held["Python, torch, DeepSpeed and their threads"] = PROCESS
        else:
            held["CUDA and its libraries"] = CONTEXT
        beside = self._activations(settings.checkpointing)
        if job.trains:
            phases = {"prefix": beside.prefix, "tail, forward": beside.forward, "backward": beside.backward}
            phases = {name: size // job.shared for name, size in phases.items()}
        else:
            frames, height, width = job.latent
            phases = {"denoising": beside.peak}
            phases["text encoding, its blocks streamed"] = 2 * TEXT_BLOCK
            phases["decoding, with the VAE"] = VAE + decoding(4 * frames - 3, 8 * height, 8 * width)
        host = {}
        if settings.stream and self.card.is_host:  # they wait where the rest is
            held["blocks that stream"] = job.models * settings.stream * base.block
        elif settings.stream:
            host["blocks that stream, pinned"] = job.models * settings.stream * base.block
        if settings.park:
            host["models that wait, pinned"] = job.models * base.whole
        forward, backward, copy, time = self._time(base, settings)
        # Every second step goes to the other model; of a generation, one.
        swap = base.whole / self.card.link / 2 if settings.park and job.trains else 0.0
        return Needs(settings, held, phases, host, copy, forward, backward, time, swap)

    def fit(
        self, quantised: Sequence[str | None] = (None, "fp8", "nf4"), host: float = math.inf
    ) -> list[Needs]:
        """The settings that fit, of each kind the one with the fewest blocks that stream; the one to take
        first.

        That is the fastest, but for exacter weights that cost less than 5 % more.

        Args:
            quantised: what the base may be held in, the exactest first.
            host: bytes that the host has for what waits there.

        Raises:
            WanmoeError: nothing fits; says what the least is.
        """
        tried = [self._fewest(settings) for settings in _kinds(self.job, quantised)]
        memory = self.card.memory
        fitting = [one for one in tried if one.peak <= memory and sum(one.host.values()) <= host]
        if not fitting:
            least = min(tried, key=lambda one: one.peak)
            others = "" if "nf4" in quantised else ", other weights (model.quantised)"
            raise WanmoeError(
                f"nothing fits into {memory / GB:.3g} GB{_of_host(host)}: the least on a card is "
                f"{least.peak / GB:.3g} GB, with {sum(least.host.values()) / GB:.3g} GB of the host "
                f"({least.settings.describe(self.job)}); take smaller or shorter clips{others}, or "
                "a larger card"
            )
        fitting.sort(key=lambda one: one.seconds)
        worth = [one for one in fitting if one.seconds <= WORTH * fitting[0].seconds]
        chosen = min(worth, key=lambda one: quantised.index(one.settings.quantised))
        return [chosen, *(one for one in fitting if one is not chosen)]

    def _fewest(self, settings: Settings) -> Needs:
        """With as few blocks that stream as fit; with all of them where nothing fits."""
        whole = self.needs(settings)
        if whole.peak <= self.card.memory or settings.park or settings.stage == 3:
            return whole
        base = self.base(settings.quantised)
        over = whole.peak + settings.slots * base.block - self.card.memory
        stream = min(max(-(-over // (self.job.models * base.block)), 1), base.blocks)
        return self.needs(replace(settings, stream=stream))

    def _time(self, base: Base, settings: Settings) -> tuple[float, float, float, StepTime]:
        """(forward and backward of a block, copy of a block, all forwards of a step), seconds."""
        job, card = self.job, self.card
        forward, backward = (
            job.clips * one / job.shared for one in block_seconds(job.config, job.tokens, card)
        )
        if base.unpacked:
            # bitsandbytes writes once; values and scales of rows are a copy and a product in place.
            passes = 1 if settings.quantised == "nf4" else 3
            unpack = (base.block + passes * base.unpacked) / (STREAM * card.bandwidth)
            forward, backward = forward + unpack, backward + unpack
        if settings.checkpointing:
            backward += forward
        first = job.adapter.block_indices(base.blocks)[0]
        tail = first if job.trains else base.blocks
        streamed, rate = spread(settings.stream, tail, base.blocks), card.link
        if settings.stage == 3:
            streamed, rate = frozenset(range(base.blocks)), card.fabric * job.ranks / max(job.ranks - 1, 1)
        one = step_time(
            base.block,
            base.blocks,
            tail,
            streamed,
            settings.slots,
            rate,
            forward,
            backward,
        )
        times = job.forwards
        whole = StepTime(times * one.seconds, times * one.stall, times * one.copied)
        return forward, backward, base.block / rate if streamed else 0.0, whole

    def beside(self, checkpointing: bool) -> int:
        """Bytes that a step takes beside the base and the optimizer."""
        around = PROCESS if self.card.is_host else CONTEXT
        adapters = 4 * self.elements[1] * self.job.models
        return self._activations(checkpointing).peak // self.job.shared + around + adapters

    def base(self, quantised: str | None) -> Base:
        """One model, held in a format."""
        if quantised not in self._bases:
            self._bases[quantised] = base_of(self.job.config, self.job.dtype, FORMATS[quantised or "bf16"])
        return self._bases[quantised]

    def _activations(self, checkpointing: bool) -> Activations:
        job = self.job
        adapter = job.adapter.model_dump_json()
        on = not self.card.is_host
        return _counted(job.config, adapter, job.parts, job.latent, job.clips, checkpointing, job.dtype, on)

    @cached_property
    def elements(self) -> tuple[int, int]:
        """Elements that train, and all of the adapter, of one model."""
        return adapter_elements(self.job.config, self.job.adapter, self.job.parts)


@lru_cache
def _counted(
    config: WanConfig,
    adapter: str,
    parts: tuple[Part, ...],
    latent: tuple[int, int, int],
    clips: int,
    checkpointing: bool,
    dtype: torch.dtype,
    card: bool,
) -> Activations:
    """A dry run takes a second or two; `adapter` is JSON, for it has no hash."""
    known = AdapterConfig.model_validate_json(adapter)
    more: dict[str, Any] = {"dtype": dtype, "checkpointing": checkpointing, "card": card}
    return activations(config, known, parts, latent, clips=clips, **more)


def _of_host(host: float) -> str:
    return f" with {host / GB:.3g} GB of the host" if math.isfinite(host) else ""


def _weights(job: Job, base: Base, settings: Settings) -> dict[str, int]:
    if settings.stage == 3:
        return {
            "base, this rank's shards": -(-job.models * base.whole // job.ranks),
            "blocks that are gathered": GATHERED * base.block,
        }
    models = 1 if settings.park else job.models
    held = {
        "base, outside of blocks": models * base.rest,
        "base, blocks that stay": models * (base.blocks - settings.stream) * base.block,
    }
    if settings.stream:
        held["slots of the ring"] = settings.slots * base.block
    if base.unpacked:
        held["one block, unpacked"] = base.unpacked
    return held


def _kinds(job: Job, quantised: Sequence[str | None]) -> Iterator[Settings]:
    replicated: Stage = 1 if job.trains and job.ranks > 1 else 0
    for form, checkpointing in itertools.product(quantised, (False, True) if job.trains else (False,)):
        yield Settings(form, checkpointing, replicated)
        if form is None and job.models > 1 and replicated == 0:
            yield Settings(form, checkpointing, replicated, park=True)
        if form is None and replicated == 1:
            yield Settings(form, checkpointing, 3)
