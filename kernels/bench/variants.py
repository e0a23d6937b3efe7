"""The ways to compute an adapted linear that are measured against each other, losing ones included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lora_moe import LoRAMoEWeights, lora_moe_linears
from .linear import MODES, Inputs, Problem

__all__ = ["FROZEN", "LOOP", "Prepared", "Variant", "linear_variants"]

FROZEN, FROZEN_AGAIN, LOOP = "frozen", "frozen again", "loop"
_MOST_MERGED = 4
"""Gate rows that a merged weight each is made for."""
_NO_TRAINING = {mode.name: "a merged weight is for inference" for mode in MODES.values() if mode.backward}


class Prepared(NamedTuple):
    """A variant on one set of inputs."""

    forward: Callable[[], Sequence[Tensor]]
    """One output per linear."""
    leaves: Mapping[str, Tensor]
    """What gets a gradient, under the variant's own names."""
    gradients: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    """From gradients of the leaves to gradients under the names of `Inputs.leaves`; None: they are those."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a linear, or why it can not run."""

    name: str
    prepare: Callable[[Inputs], Prepared]
    """Given inputs whose leaves want the gradients of the mode."""
    adapted: bool = True
    why_not: str | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Why not, by mode."""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def linear_variants(problem: Problem, device: torch.device) -> list[Variant]:
    """All variants for a problem, in the order in which they are shown; peers come from outside."""
    no_triton = None if device.type == "cuda" else "needs a CUDA device"
    if no_triton is None and find_spec("triton") is None:
        no_triton = "triton is not installed"
    too_many = None
    if problem.gate_rows > _MOST_MERGED:
        too_many = f"{problem.gate_rows} gate rows would need a merged weight each"
    variants = [
        Variant(FROZEN, _frozen, adapted=False),
        Variant(FROZEN_AGAIN, _frozen, adapted=False),
        Variant(LOOP, _looped(loop)),
        # A fresh compile per problem: shapes are constants, as in training.
        Variant("loop compiled", _looped(torch.compile(loop, dynamic=False))),
        Variant("packed", _ours("packed")),
        *(_form(name, no_triton) for name in ("library", "single_pass", "delta_first", "epilogue")),
        Variant("auto", _ours("auto")),
        Variant("merged per call", _merged(cached=False), why_not=too_many, refuses=_NO_TRAINING),
        Variant("merged cached", _merged(cached=True), why_not=too_many, refuses=_NO_TRAINING),
    ]
    if len(problem.parts) > 1:
        place = next(i for i, variant in enumerate(variants) if variant.name == "merged per call")
        variants.insert(place, Variant("auto one by one", _one_by_one))
    return variants


def _frozen(inputs: Inputs) -> Prepared:
    weights = [(linear.weight, linear.bias) for linear in inputs.linears]
    x = {"x": inputs.x} if inputs.x.requires_grad else {}
    return Prepared(lambda: [F.linear(inputs.x, *pair) for pair in weights], x)


def loop(
    x: Tensor, linear: LoRAMoEWeights, base_gates: Tensor, expert_gates: Tensor, tokens_per_row: int
) -> Tensor:
    """One adapter after the other in the dtype of x, as most LoRA code has it: product, scale, gate, add."""
    y = F.linear(x, linear.weight, linear.bias)
    downs = [linear.base_down, *linear.expert_down.unbind()]
    ups = [linear.base_up, *linear.expert_up.unbind()]
    gates = [base_gates, *expert_gates.unbind(1)]
    scales = [linear.scale_base, *[linear.scale_expert] * (len(downs) - 1)]
    for down, up, gate, scale in zip(downs, ups, gates, scales, strict=True):
        out = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * scale
        rows = out.view(gate.shape[0], tokens_per_row, -1)
        y = y + (rows * gate.to(x.dtype)[:, None, None]).view(y.shape)
    return y


def _looped(run: Callable[..., Tensor]) -> Callable[[Inputs], Prepared]:
    def prepare(inputs: Inputs) -> Prepared:
        rest = (inputs.base_gates, inputs.expert_gates, inputs.tokens_per_row)
        return Prepared(lambda: [run(inputs.x, linear, *rest) for linear in inputs.linears], inputs.leaves())

    return prepare


def _ours(backend: str) -> Callable[[Inputs], Prepared]:
    def prepare(inputs: Inputs) -> Prepared:
        rest = (inputs.base_gates, inputs.expert_gates, inputs.tokens_per_row)
        return Prepared(
            lambda: lora_moe_linears(inputs.x, inputs.linears, *rest, backend=backend), inputs.leaves()
        )

    return prepare


def _one_by_one(inputs: Inputs) -> Prepared:
    rest = (inputs.base_gates, inputs.expert_gates, inputs.tokens_per_row)
    return Prepared(
        lambda: [lora_moe_linears(inputs.x, [linear], *rest)[0] for linear in inputs.linears], inputs.leaves()
    )


def _form(name: str, why_not: str | None) -> Variant:
    """The Triton backend with one form forced, whatever the stored table says."""

    def forced() -> AbstractContextManager[Any]:
        from ..lora_moe.table import default_plan, override

        return override(default_plan(name))

    return Variant(name, _ours("triton"), why_not=why_not, context=forced)


def _merged(cached: bool) -> Callable[[Inputs], Prepared]:
    """W + s_base g_base B_b A_b + sum_e s_e g_e B_e A_e as one weight per gate row, then the plain linear."""

    def prepare(inputs: Inputs) -> Prepared:
        rows = inputs.expert_gates.shape[0]
        x = inputs.x.reshape(rows, inputs.tokens_per_row, -1)
        shape = inputs.x.shape[:-1]
        kept = [merged(linear, inputs) for linear in inputs.linears] if cached else None

        def forward() -> list[Tensor]:
            outputs = []
            for place, linear in enumerate(inputs.linears):
                weights = kept[place] if kept else merged(linear, inputs)
                ys = [F.linear(some, weight, linear.bias) for some, weight in zip(x, weights, strict=True)]
                outputs.append((torch.stack(ys) if rows > 1 else ys[0]).view(*shape, -1))
            return outputs

        return Prepared(forward, {})

    return prepare


def merged(linear: LoRAMoEWeights, inputs: Inputs) -> list[Tensor]:
    """One weight [d_out, d_in] per gate row: a library product onto W, summed in fp32, rounded once."""
    dtype = linear.weight.dtype
    down = torch.cat([linear.base_down, *linear.expert_down])
    up = torch.cat([linear.base_up, *linear.expert_up], dim=1)
    ranks = linear.expert_down.shape[1]
    gates = torch.cat(
        [
            linear.scale_base * inputs.base_gates[:, None].expand(-1, linear.base_down.shape[0]),
            linear.scale_expert * inputs.expert_gates.repeat_interleave(ranks, dim=1),
        ],
        dim=1,
    )
    return [torch.addmm(linear.weight, (up * gate).to(dtype), down.to(dtype)) for gate in gates]
