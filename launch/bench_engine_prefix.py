"""The frozen prefix against the graph through all blocks: one model, one batch, one run, the same loss.

With "full graph" the input requires grad, as it does where adapters and checkpointing are put on a model from
outside (`enable_input_require_grads`): every block then has a graph, and checkpointing runs every one again.

Letters: B clips, C channels, F, H, W latent frames, height, width, E experts.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..moe_lora import Adapter, AdapterConfig, attach
from ..moe_lora.routing import Gates
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT

# The split and depth of A14B: 40 blocks, of which the adapter's default takes the last 8.
BLOCKS = 40


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often."""

    sizes: WanConfig
    latent: tuple[int, int, int]
    """F, H, W of the clip."""
    dtype: torch.dtype
    rounds: int


CPU = Setting(
    WanConfig(dim=192, ffn_dim=512, num_heads=6, num_layers=BLOCKS, text_dim=64, text_len=32, freq_dim=64),
    (4, 16, 16),
    torch.float32,
    7,
)
QUICK = Setting(
    WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=BLOCKS, text_dim=16, text_len=8, freq_dim=16),
    (2, 4, 4),
    torch.float32,
    2,
)
GPU = Setting(
    WanConfig(dim=2048, ffn_dim=5632, num_heads=16, num_layers=BLOCKS, text_dim=512, freq_dim=256),
    (21, 32, 32),
    torch.bfloat16,
    7,
)


@dataclass(frozen=True)
class Variant:
    """One way of making the same step."""

    name: str
    full: bool
    """The graph goes through all blocks."""
    checkpointing: bool


VARIANTS = (
    Variant("prefix", full=False, checkpointing=False),
    Variant("full graph", full=True, checkpointing=False),
    Variant("prefix, checkpointed", full=False, checkpointing=True),
    Variant("full graph, checkpointed", full=True, checkpointing=True),
)


@dataclass
class PrefixRow:
    """What one variant did."""

    name: str
    seconds: list[float]
    """Of each round: forward and backward."""
    loss: float
    gradient_difference: float
    """Largest difference of an adapter gradient from those of the first variant, over the largest of them."""
    forwards: list[int]
    """Calls of each block in one step."""
    backwards: list[int]
    saved_bytes: int
    """What the forward keeps for the backward, parameters apart."""
    peak_bytes: int | None
    """Highest of a step beyond what lay on the card before; None on the CPU."""


class Step:
    """A training step's forward and backward on a random model whose adapter already speaks."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        sizes, latent, dtype = setting.sizes, setting.latent, setting.dtype
        torch.manual_seed(0)
        with device:
            self.dit = WanDiT(sizes).to(dtype)
        nn.init.normal_(self.dit.head.head.weight, std=0.05)
        self.adapter: Adapter = attach(self.dit, AdapterConfig(rank_dropout=0.0))
        self.trained = self.adapter.train_only(("base", "experts"))
        with torch.no_grad():
            for name, parameter in self.trained.items():
                if name.endswith("_up"):
                    nn.init.normal_(parameter, std=0.02)
        self.dit.train()
        experts = len(self.adapter.experts)
        generator = torch.Generator(device).manual_seed(1)
        kind: dict[str, Any] = {"generator": generator, "device": device}
        self.x = torch.randn(1, sizes.out_dim, *latent, **kind).to(dtype)
        self.target = torch.randn(self.x.shape, **kind)
        self.context = torch.randn(1, sizes.text_len, sizes.text_dim, **kind).to(dtype)
        self.t = torch.full((1,), 0.5, device=device)
        routed = torch.full((1, experts), 1 / experts, device=device)
        self.gates: Gates = self.adapter.gates(routed, self.t, tokens=self.tokens)

    @property
    def tokens(self) -> int:
        """Of the clip."""
        count = 1
        for size, patch in zip(self.x.shape[2:], self.dit.config.patch_size, strict=True):
            count *= size // patch
        return count

    def __call__(self, variant: Variant) -> Tensor:
        """The loss, after its backward; gradients of the adapter are those of this step alone."""
        for parameter in self.trained.values():
            parameter.grad = None
        loss = self.forward(variant)
        loss.backward()
        return loss.detach()

    def forward(self, variant: Variant) -> Tensor:
        """The loss with its graph."""
        self.dit.prefix_frozen = not variant.full
        self.dit.checkpointing = variant.checkpointing
        x = self.x.clone().requires_grad_(variant.full)
        v = self.dit(x, self.t, self.context, self.gates)
        return (v - self.target).square().mean()

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step."""
        return {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}


def measure_prefix(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Every variant on the same model and batch: counted once, then timed in turn, round after round."""
    step = Step(setting, device)
    rows: list[PrefixRow] = []
    first: dict[str, Tensor] = {}
    for variant in VARIANTS:
        with calls(step.dit) as (forwards, backwards):
            loss = float(step(variant))
        found = step.gradients()
        first = first or found
        row = PrefixRow(
            variant.name,
            [],
            loss,
            _difference(first, found),
            [forwards[block] for block in range(len(step.dit.blocks))],
            [backwards[block] for block in range(len(step.dit.blocks))],
            saved_bytes(step, variant),
            _peak_bytes(step, variant, device),
        )
        rows.append(row)
    for _ in range(setting.rounds):
        for variant, row in zip(VARIANTS, rows, strict=True):
            began = _now(device)
            step(variant)
            row.seconds.append(_now(device) - began)
    return {
        "sizes": asdict(setting.sizes),
        "tokens": step.tokens,
        "adapted_from": step.dit.first_adapted,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "rows": [asdict(row) | {"median_s": statistics.median(row.seconds)} for row in rows],
    }


@contextmanager
def calls(dit: WanDiT) -> Iterator[tuple[Counter[int], Counter[int]]]:
    """Counts forward and backward calls of each block; a forward that recomputes is a call."""
    forwards: Counter[int] = Counter()
    backwards: Counter[int] = Counter()
    handles: list[RemovableHandle] = []

    def watch(place: int, block: nn.Module) -> None:
        def entered(*_: Any) -> None:
            forwards[place] += 1

        def left(module: nn.Module, given: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda gradient: backwards.update([place]))

        handles.extend((block.register_forward_pre_hook(entered), block.register_forward_hook(left)))

    for place, block in enumerate(dit.blocks):
        watch(place, block)
    try:
        yield forwards, backwards
    finally:
        for handle in handles:
            handle.remove()


def saved_bytes(step: Step, variant: Variant) -> int:
    """Bytes that a forward keeps for the backward: storages counted once, parameters not at all."""
    kept: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in step.dit.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward(variant)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return total


def _peak_bytes(step: Step, variant: Variant, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(variant)
    return torch.cuda.max_memory_allocated(device) - before


def _difference(first: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    if first.keys() != found.keys():
        return float("inf")
    largest = max(float(gradient.abs().max()) for gradient in first.values())
    return max(float((found[name] - first[name]).abs().max()) for name in first) / largest


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
