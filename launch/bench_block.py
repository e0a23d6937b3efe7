"""One adapted DiT block and its peers, as subjects of the benchmark: the same function, weights and inputs.

The peer is the block of diffusers with LoRA by PEFT (see `bench_peft` for what that can and cannot do). No
clock is read here: the benchmark calls what this module builds.

Letters: B clips, F, H, W token grid, L = F * H * W video tokens, Lc text tokens, D width, P rotated pairs,
E experts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..moe_lora.adapter import Adapter, AdapterConfig, attach
from ..moe_lora.routing import Gates
from ..moe_lora.wan.block import WanBlock
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.rope import rope_tables
from ..moe_lora.wan.weights import to_diffusers
from .bench_peft import PeftAdapters, why_no_peft

__all__ = ["BlockTruth", "Variant", "block_truth", "block_variants"]

_BLOCK = "blocks.0."


class BlockInputs(NamedTuple):
    """What a block of the tail reads in a training step, and the gradient that comes back to it."""

    x: Tensor
    """[B, L, D]; requires grad, as behind another adapted block."""
    e0: Tensor
    """[B, 6, D] float32."""
    context: Tensor
    """[B, Lc, D]."""
    cos: Tensor
    """[L, P] float32."""
    sin: Tensor
    gates: Gates
    """One row per clip, all alike, since PEFT has one gate row."""
    context_gates: Gates
    dy: Tensor
    """[B, L, D]."""


@dataclass(frozen=True)
class Variant:
    """One row of the benchmark; callable only where `why_not` is None."""

    name: str
    module: Callable[..., Tensor] | None
    inputs: BlockInputs
    arguments: tuple[Any, ...] = ()
    """The inputs as the module takes them."""
    leaves: tuple[Tensor, ...] = ()
    """What gets a gradient: the adapters and x."""
    adapter_grads: Callable[[], dict[str, Tensor]] = dict
    why_not: str | None = None

    def forward(self) -> Tensor:
        """[B, L, D] without a graph."""
        with torch.no_grad():
            return self.graph()

    def graph(self) -> Tensor:
        """[B, L, D] with what a backward needs; raises ValueError where the variant cannot run."""
        if self.module is None:
            raise ValueError(f"{self.name} cannot run: {self.why_not}")
        return self.module(*self.arguments)

    def backward(self, out: Tensor) -> None:
        """The backward of `graph()`, with the same output gradient each time."""
        out.backward(self.inputs.dy)

    def clear(self) -> None:
        """Sets every gradient to None."""
        for leaf in self.leaves:
            leaf.grad = None

    def step(self) -> None:
        """Forward and backward, from gradients that are None."""
        self.clear()
        self.backward(self.graph())

    def grads(self) -> dict[str, Tensor]:
        """Gradients of one step: of `x`, and of the adapters as `self_attn.q.base_down` and so on."""
        self.step()
        found = {} if self.inputs.x.grad is None else {"x": self.inputs.x.grad.clone()}
        found |= self.adapter_grads()
        self.clear()
        return found


def block_variants(
    config: WanConfig,
    tokens_grid: tuple[int, int, int],
    text_len: int,
    clips: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    adapter: AdapterConfig | None = None,
    compiler: str = "inductor",
) -> dict[str, Variant]:
    """The rows "wanmoe", "wanmoe compiled", "wanmoe frozen" (no adapter: the floor), "diffusers + PEFT" and
    "diffusers + PEFT compiled".

    All share one set of inputs and one frozen base, so a step of one overwrites the gradient of x of another.
    Our adapters are fp32 masters, as in training; PEFT's copies have the given dtype.

    Args:
        config: sizes of the block.
        tokens_grid: F, H, W.
        clips, text_len: B and Lc.
        dtype: of base and activations; the norms of diffusers are float32 even in a float64 block.
        adapter: ranks and experts; by default those of the last block of a model.
        compiler: backend of torch.compile.
    """
    dit_adapter = _adapted_block(
        config, adapter or AdapterConfig(blocks=1, ffn_blocks=1), device, dtype, seed
    )
    block = dit_adapter.dit.blocks[0]
    inputs = _inputs(config, tokens_grid, text_len, clips, len(dit_adapter.experts), device, dtype, seed + 1)
    ours = dit_adapter.parameters(("base", "experts"))

    def gradients() -> dict[str, Tensor]:
        return {n.removeprefix(_BLOCK): p.grad.clone() for n, p in ours.items() if p.grad is not None}

    def variant(name: str, module: Callable[..., Tensor], gated: bool = True) -> Variant:
        gates = (inputs.gates, inputs.context_gates) if gated else (None, None)
        given = (inputs.x, inputs.e0, inputs.context, inputs.cos, inputs.sin, *gates)
        leaves = (inputs.x, *ours.values()) if gated else (inputs.x,)
        return Variant(name, module, inputs, given, leaves, gradients if gated else dict)

    compiled = torch.compile(block, backend=compiler, dynamic=False)
    rows = [
        variant("wanmoe", block),
        variant("wanmoe compiled", compiled),
        variant("wanmoe frozen", block, gated=False),
        *_peers(config, dit_adapter, inputs, compiler),
    ]
    return {row.name: row for row in rows}


class BlockTruth(NamedTuple):
    """What an adapted block gives at a higher precision, from the same values."""

    y: Tensor
    """[B, L, D]"""
    frozen: Tensor
    """The output without adapters."""
    gradients: dict[str, Tensor]
    """Under the names of `Variant.grads`."""


def block_truth(ours: Variant) -> BlockTruth:
    """Output and gradients of the "wanmoe" row in float32 for 16-bit rows, else in float64."""
    dtype = ours.inputs.x.dtype
    wider = torch.float32 if dtype.itemsize == 2 else torch.float64

    def widened(value: Any) -> Any:
        if isinstance(value, Gates):
            return Gates(value.experts.to(wider), value.base.to(wider), value.tokens_per_row)
        return value.detach().to(wider)

    block = copy.deepcopy(ours.module)
    if not isinstance(block, WanBlock):
        raise ValueError(f"{ours.name} has no block of ours to compute the truth with")
    block.to(wider)
    x, *rest = map(widened, ours.arguments)
    x.requires_grad_()
    y = block(x, *rest)
    y.backward(ours.inputs.dy.to(wider))
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    with torch.no_grad():
        frozen = block(x, *rest[:-2])
    return BlockTruth(y.detach(), frozen, gradients | {"x": x.grad})


def _adapted_block(
    config: WanConfig, adapter: AdapterConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> Adapter:
    """A DiT whose one block is real, adapted and random, and whose other parts are on the meta device."""
    with torch.device("meta"):
        dit = WanDiT(dataclasses.replace(config, num_layers=1))
    with torch.device(device):
        block = WanBlock(config).to(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            # Products of unit size, norms near one, biases small against both.
            fan_in = parameter.shape[-1]
            std = fan_in**-0.5 if parameter.ndim > 1 else 0.02 if name.endswith("bias") else 0.1
            # Drawn wide: the values are then the same, but for rounding, in every dtype.
            wide = parameter.new_empty(parameter.shape, dtype=torch.promote_types(dtype, torch.float32))
            parameter.copy_(wide.normal_(std=std, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    dit.blocks[0] = block
    attached = attach(dit, adapter, seed=seed)
    with torch.no_grad():
        for module in attached.modules.values():
            # Not zero as in a fresh adapter: a delta of about a tenth of the base product.
            for up in (module.base_up, module.expert_up):
                up.normal_(std=0.1, generator=generator)
    return attached


def _inputs(
    config: WanConfig,
    grid: tuple[int, int, int],
    text_len: int,
    clips: int,
    experts: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> BlockInputs:
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=wide).to(kind)

    tokens = grid[0] * grid[1] * grid[2]
    # Every expert speaks, each half as loud as the one before: no gate is zero or one by accident.
    row = torch.tensor([0.5 ** (e + 1) for e in range(experts)], device=device)
    gates = Gates(row.repeat(clips, 1), torch.ones(clips, device=device), tokens)
    cos, sin = rope_tables(grid, config.head_dim, dtype=wide, device=device)
    return BlockInputs(
        x=draw(clips, tokens, config.dim).requires_grad_(),
        e0=draw(clips, 6, config.dim, kind=wide),
        context=draw(clips, text_len, config.dim),
        cos=cos,
        sin=sin,
        gates=gates,
        context_gates=gates.per_clip(clips, text_len),
        dy=draw(clips, tokens, config.dim),
    )


def _peers(config: WanConfig, adapter: Adapter, inputs: BlockInputs, compiler: str) -> list[Variant]:
    """The block of diffusers on the storage of our base, with PEFT adapters of our values."""
    names = ("diffusers + PEFT", "diffusers + PEFT compiled")
    why_not = why_no_peft(inputs.gates.base, inputs.gates.experts)
    if why_not is not None:
        return [Variant(name, None, inputs, why_not=why_not) for name in names]
    block = _diffusers_block(config, adapter)
    ours = {_their_name(name): name.removeprefix(_BLOCK) for name in adapter.modules}
    weights = {_their_name(name): module.adapted() for name, module in adapter.modules.items()}
    row = inputs.gates.base[0].item(), inputs.gates.experts[0].tolist()
    adapters = PeftAdapters(block, weights, *row)
    # Diffusers holds each angle twice, once per half of a pair.
    rotary = tuple(table.repeat_interleave(2, dim=-1)[None, :, None] for table in (inputs.cos, inputs.sin))
    given = (inputs.x, inputs.context, inputs.e0, rotary)

    def gradients() -> dict[str, Tensor]:
        return {f"{ours[linear]}.{part}": grad for (linear, part), grad in adapters.grads().items()}

    def variant(name: str, module: Callable[..., Tensor]) -> Variant:
        return Variant(name, module, inputs, given, (inputs.x, *adapters.leaves()), gradients)

    compiled = torch.compile(block, backend=compiler, dynamic=False)
    return [variant(names[0], block), variant(names[1], compiled)]


def _diffusers_block(config: WanConfig, adapter: Adapter) -> nn.Module:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    with torch.device("meta"):
        block: nn.Module = WanTransformerBlock(
            config.dim,
            config.ffn_dim,
            config.num_heads,
            qk_norm="rms_norm_across_heads",
            cross_attn_norm=True,
            eps=config.eps,
        )
    ours = {_their_name(f"{_BLOCK}{name}"): p for name, p in adapter.dit.blocks[0].named_parameters()}
    base = {name: ours[name].detach() for name, _ in block.named_parameters()}
    block.load_state_dict(base, strict=True, assign=True)
    return block


def _their_name(name: str) -> str:
    return to_diffusers(name).removeprefix(_BLOCK)
