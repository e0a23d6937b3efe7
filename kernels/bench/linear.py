"""What is measured: one adapted linear of Wan2.2 A14B, or q, k and v on one x, with random data.

Letters: B clips, N tokens per clip, G gate rows, E experts, r rank of one part, R packed rank r_base + E r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora_moe import LoRAMoEWeights
from .model import Shape

__all__ = ["GATES", "LINEARS", "MODES", "TEXT_TOKENS", "Inputs", "Mode", "Part", "Problem", "make_inputs"]

GATES = ("clip", "frame", "one-hot", "top-2", "one zero")
_FRAMES = 21
"""Latent frames of an 81-frame clip."""
_DELTA = 0.05
"""Size of each adapter's output beside the base product's: large enough for a wrong gate to show in bf16."""


class Part(NamedTuple):
    """One linear: widths, and the rank of its base adapter and of each expert."""

    d_in: int
    d_out: int
    rank: int


LINEARS: dict[str, tuple[Part, ...]] = {
    "q": (Part(5120, 5120, 8),),
    "k": (Part(5120, 5120, 4),),
    "ffn.0": (Part(5120, 13824, 4),),
    "ffn.2": (Part(13824, 5120, 4),),
    "qkv": (Part(5120, 5120, 8), Part(5120, 5120, 4), Part(5120, 5120, 4)),
    "kv": (Part(5120, 5120, 4), Part(5120, 5120, 4)),
}
"""k stands for v and o too; qkv reads one x; kv reads the text tokens in cross-attention."""
TEXT_TOKENS = 512


class Mode(NamedTuple):
    """What is timed, and what wants a gradient."""

    name: str
    forward: bool
    backward: bool
    input_grad: bool = True
    gate_grad: bool = False


MODES = {
    mode.name: mode
    for mode in (
        Mode("fwd", True, False),
        Mode("bwd", False, True),
        Mode("fwd+bwd", True, True),
        Mode("no dx", True, True, input_grad=False),
        Mode("router", True, True, gate_grad=True),
    )
}
"""fwd builds no graph; no dx is the first adapted block, whose x needs no gradient: the frozen linear has no
backward there; router adds the gates' gradient to fwd+bwd."""


@dataclass(frozen=True)
class Problem:
    """One shape to measure."""

    linear: str
    parts: tuple[Part, ...]
    tokens: int
    """Per clip."""
    clips: int = 1
    gates: str = "clip"
    experts: int = 4

    @property
    def slug(self) -> str:
        return f"{self.linear}-n{self.tokens}-b{self.clips}-{self.gates.replace(' ', '-')}"

    @property
    def all_tokens(self) -> int:
        return self.tokens * self.clips

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(
            Shape(self.linear, part.d_in, part.d_out, (1 + self.experts) * part.rank) for part in self.parts
        )

    @property
    def gate_rows(self) -> int:
        return self.clips * (_frames(self.tokens) if self.gates == "frame" else 1)

    def flops(self, mode: Mode, *, adapted: bool) -> float:
        """Multiplications and additions that the mode cannot do without."""
        products = (mode.forward, mode.backward and mode.input_grad)
        low_rank = (mode.forward, mode.backward, mode.backward, mode.backward and mode.input_grad)
        total = 0.0
        for shape in self.shapes:
            total += sum(products) * 2 * shape.d_in * shape.d_out
            # Forward: down and up. Backward: du and dB are of width d_out, dA and dx of width d_in.
            wide = (
                low_rank[0] * (shape.d_in + shape.d_out)
                + low_rank[1] * 2 * shape.d_out
                + low_rank[2] * shape.d_in
            )
            wide += low_rank[3] * shape.d_in
            total += 2 * shape.rank * wide if adapted else 0
        return total * self.all_tokens

    def bytes(self, mode: Mode, itemsize: int, *, adapted: bool) -> float:
        """Bytes that the mode must move: each input read once, each output written once."""
        forward, backward = mode.forward, mode.backward
        dx = backward and mode.input_grad
        x_passes = forward + dx + (backward and adapted)
        total = float(x_passes * self.parts[0].d_in * self.all_tokens * itemsize)
        for shape in self.shapes:
            y_passes = forward + (dx or (backward and adapted))
            total += y_passes * shape.d_out * self.all_tokens * itemsize
            total += (forward + dx) * shape.d_in * shape.d_out * itemsize
            # Adapters and their gradients are fp32.
            total += (forward + 2 * backward) * adapted * 4 * shape.rank * (shape.d_in + shape.d_out)
        return total


@dataclass(frozen=True)
class Inputs:
    """One set of tensors for a problem."""

    x: Tensor
    """[B, N, d_in]"""
    linears: tuple[LoRAMoEWeights, ...]
    base_gates: Tensor
    """[G]"""
    expert_gates: Tensor
    """[G, E]"""
    tokens_per_row: int
    dys: tuple[Tensor, ...]
    """Gradients of the outputs, [B, N, d_out]."""

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that want a gradient, by the names used for errors."""
        named = {"x": self.x, "base_gates": self.base_gates, "expert_gates": self.expert_gates}
        for place, linear in enumerate(self.linears):
            named |= {f"{place}.{name}": getattr(linear, name) for name in ADAPTER}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def for_mode(self, mode: Mode) -> Inputs:
        """The same storage, as leaves that want exactly the gradients of the mode."""
        trained = tuple(
            linear._replace(
                **{name: getattr(linear, name).detach().requires_grad_(mode.backward) for name in ADAPTER}
            )
            for linear in self.linears
        )
        gates = mode.backward and mode.gate_grad
        return replace(
            self,
            x=self.x.detach().requires_grad_(mode.backward and mode.input_grad),
            linears=trained,
            base_gates=self.base_gates.detach().requires_grad_(gates),
            expert_gates=self.expert_gates.detach().requires_grad_(gates),
        )

    def persistent(self) -> list[Tensor]:
        """Weights, adapters and gates: in memory whatever is saved."""
        tensors = [tensor for linear in self.linears for tensor in linear[:6] if tensor is not None]
        return [*tensors, self.base_gates, self.expert_gates]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.x, *self.dys, *self.persistent()))


ADAPTER = ("base_down", "base_up", "expert_down", "expert_up")


def make_inputs(problem: Problem, *, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random tensors, never zeros: x and the base product are of size 1, each adapter's output of size 0.05.

    x, weight and bias have `dtype`; adapters and gates are fp32 (fp64 for fp64) masters.
    """
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, size: float, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=kind).mul_(size)

    linears = []
    for d_in, d_out, rank in problem.parts:
        scale = 4.0 / rank
        small = 1 / math.sqrt(d_in)
        up = _DELTA / scale / math.sqrt(rank)
        linears.append(
            LoRAMoEWeights(
                draw(d_out, d_in, size=small),
                draw(d_out, size=0.1),
                draw(rank, d_in, size=small, kind=wide),
                draw(d_out, rank, size=up, kind=wide),
                draw(problem.experts, rank, d_in, size=small, kind=wide),
                # A gate is about 1 / E.
                draw(problem.experts, d_out, rank, size=up * problem.experts, kind=wide),
                scale,
                scale,
            )
        )
    rows = problem.gate_rows
    expert_gates = _expert_gates(problem, rows, generator, device).to(wide)
    base_gates = torch.rand(rows, generator=generator, device=device).add_(0.5).to(wide)
    clips, tokens = problem.clips, problem.tokens
    return Inputs(
        draw(clips, tokens, problem.parts[0].d_in, size=1.0),
        tuple(linears),
        base_gates,
        expert_gates,
        clips * tokens // rows,
        tuple(draw(clips, tokens, part.d_out, size=1.0) for part in problem.parts),
    )


def _expert_gates(problem: Problem, rows: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """[G, E], each row summing to 1."""
    gates = torch.rand(rows, problem.experts, generator=generator, device=device).add_(0.2)
    keep = {"one-hot": 1, "top-2": 2, "one zero": problem.experts - 1}.get(problem.gates, problem.experts)
    border = gates.topk(keep, dim=1).values[:, -1:]
    gates = torch.where(gates >= border, gates, torch.zeros_like(gates))
    return gates / gates.sum(1, keepdim=True)


def _frames(tokens: int) -> int:
    """Latent frames that N tokens divide into: 21 where it goes, otherwise the least divisor above 1."""
    if tokens % _FRAMES == 0:
        return _FRAMES
    return next((n for n in range(2, tokens + 1) if tokens % n == 0), 1)
