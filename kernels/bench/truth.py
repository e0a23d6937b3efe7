"""Errors against fp64, of the adapters' part alone: computed from the formulas, not by the code under test.

    h = x A^T, u = g h, y = W x + b + u B^T;  du = dy B, dB = dy^T u, dh = g du, dA = dh^T x, dx = dy W + dh A

with A, B and g packed over the base adapter and the experts. An output's error is divided by the norm of what
the adapters added to it, since beside the base product's norm even a missing adapter would look small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora_moe import LoRAMoEWeights
from .linear import Inputs

__all__ = ["LIMIT", "Truth", "Verdict", "judge"]

LIMIT = 1.2
"""Error that is wanted at most, in units of the eager loop's error."""
_CHUNK = 8192
"""Tokens in fp64 at a time."""
_OUTPUT_FLOOR = {torch.bfloat16: 0.4, torch.float16: 0.4, torch.float32: 16.0, torch.float64: 64.0}
"""An output's error below this many eps of the whole output is rounding, whatever the loop's error is: one
rounding to bf16 is 0.21 eps, two are 0.3; a sum of 5000 products in fp32 is a few."""
_GRADIENT_FLOOR = {torch.bfloat16: 1.3, torch.float16: 2.0, torch.float32: 1000.0, torch.float64: 1e5}
"""The same for a gradient that is a sum over tokens, where small ones (a gate's) vary by chance."""
_EAGER_CAP = 12.0
"""The loop itself may be this many floors off; beyond, it is no yardstick."""


class Verdict(NamedTuple):
    """The tensor that comes nearest to its limit, or passes it furthest."""

    tensor: str
    error: float
    eager: float | None
    ok: bool

    @property
    def ratio(self) -> float | None:
        return self.error / self.eager if self.eager else None


class Truth:
    """Outputs and gradients of one set of inputs in fp64, kept in fp32 where the inputs are 16 bits wide."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.dtype = inputs.x.dtype
        wide = self.dtype in (torch.float32, torch.float64)
        self._kept = torch.float64 if wide else torch.float32
        self._packs = [_pack(linear, inputs) for linear in inputs.linears]
        self.outputs: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        self._delta: dict[str, float] = {}
        """Norm of the adapters' part of each output and of dx."""
        self._whole: dict[str, float] = {}
        with torch.no_grad():
            self._compute()

    def _compute(self) -> None:
        x = self.inputs.x.flatten(0, -2)
        dx = torch.zeros(x.shape, dtype=self._kept, device=x.device)
        dx_delta = torch.zeros_like(dx)
        rows, experts = self.inputs.expert_gates.shape
        gates = [x.new_zeros(rows, 1 + experts, dtype=torch.float64)]
        for place, (linear, pack) in enumerate(zip(self.inputs.linears, self._packs, strict=True)):
            y = torch.empty(x.shape[0], linear.weight.shape[0], dtype=self._kept, device=x.device)
            dy = self.inputs.dys[place].flatten(0, -2)
            weight = linear.weight.double()
            d_down, d_up = torch.zeros_like(pack.down), torch.zeros_like(pack.up)
            d_gates = torch.zeros_like(pack.gates)
            delta = 0.0
            for part in _chunks(x.shape[0]):
                row = torch.arange(part.start, part.stop, device=x.device) // self.inputs.tokens_per_row
                gate = pack.gates[row]
                some, some_dy = x[part].double(), dy[part].double()
                h = some @ pack.down.t()
                u = gate * h
                low = u @ pack.up.t()
                delta += float(low.square().sum())
                y[part] = _base(some, weight, linear.bias).add_(low)
                du = some_dy @ pack.up
                dh = gate * du
                low_dx = dh @ pack.down
                dx_delta[part] += low_dx
                dx[part] += low_dx.addmm_(some_dy, weight)
                d_up += some_dy.t() @ u
                d_down += dh.t() @ some
                d_gates.index_add_(0, row, du * h)
            self.outputs.append(y)
            self._delta[f"y{place}"] = math.sqrt(delta)
            self._whole[f"y{place}"] = float(torch.linalg.vector_norm(y, dtype=torch.float64))
            self._adapter_gradients(place, linear, d_down, d_up)
            gates.append(_gate_gradient(linear, d_gates))
        total = torch.stack(gates).sum(0)
        self.gradients |= {"base_gates": total[:, 0], "expert_gates": total[:, 1:], "x": dx}
        self._delta["x"] = float(torch.linalg.vector_norm(dx_delta, dtype=torch.float64))
        self._whole["x"] = float(torch.linalg.vector_norm(dx, dtype=torch.float64))

    def _adapter_gradients(self, place: int, linear: LoRAMoEWeights, d_down: Tensor, d_up: Tensor) -> None:
        base, (experts, r, d_in) = linear.base_down.shape[0], linear.expert_down.shape
        self.gradients[f"{place}.base_down"] = d_down[:base]
        self.gradients[f"{place}.base_up"] = d_up[:, :base]
        self.gradients[f"{place}.expert_down"] = d_down[base:].view(experts, r, d_in)
        self.gradients[f"{place}.expert_up"] = d_up[:, base:].unflatten(1, (experts, r)).transpose(0, 1)

    @torch.no_grad()
    def output_errors(self, outputs: Sequence[Tensor], *, adapted: bool = True) -> dict[str, float]:
        """Error of each output over the norm of what adapters add; adapted=False: of the frozen linear."""
        errors = {}
        for place, found in enumerate(outputs):
            name, linear = f"y{place}", self.inputs.linears[place]
            found = found.detach().flatten(0, -2)
            if not bool(found.isfinite().all()) or found.shape != self.outputs[place].shape:
                errors[name] = math.inf
                continue
            weight = linear.weight.double()
            square = 0.0
            for part in _chunks(found.shape[0]):
                true = self.outputs[place][part].double()
                if not adapted:
                    true = _base(self.inputs.x.flatten(0, -2)[part].double(), weight, linear.bias)
                square += float((found[part].double() - true).square().sum())
            errors[name] = _share(math.sqrt(square), self._delta[name])
        return errors

    @torch.no_grad()
    def gradient_errors(self, gradients: Mapping[str, Tensor], *, adapted: bool = True) -> dict[str, float]:
        """Error of each gradient over its own norm, dx over the norm of the adapters' part of it."""
        return {name: self._gradient_error(name, found, adapted) for name, found in gradients.items()}

    def _gradient_error(self, name: str, found: Tensor, adapted: bool) -> float:
        true = self.gradients[name]
        found = found.detach().reshape(true.shape) if found.numel() == true.numel() else found.detach()
        if not bool(found.isfinite().all()) or found.shape != true.shape:
            return math.inf
        if name != "x":
            return _share(float((found.double() - true.double()).norm()), float(true.double().norm()))
        square = 0.0
        for part in _chunks(found.shape[0]):
            some = true[part].double()
            if not adapted:
                some = _frozen_dx(self.inputs, part)
            square += float((found[part].double() - some).square().sum())
        return _share(math.sqrt(square), self._delta["x"])

    def floor(self, name: str) -> float:
        """Error of a tensor that is rounding, whatever the eager loop's error is."""
        eps = torch.finfo(self.dtype).eps
        if name in self._delta:
            return _OUTPUT_FLOOR[self.dtype] * eps * self._whole[name] / self._delta[name]
        return _GRADIENT_FLOOR[self.dtype] * eps


def judge(errors: Mapping[str, float], eager: Mapping[str, float] | None, truth: Truth) -> Verdict:
    """The worst of a variant's tensors against the eager loop's; eager None: this is the loop itself."""

    def limit(name: str) -> float:
        if eager is None:
            return _EAGER_CAP * truth.floor(name)
        return max(LIMIT * eager[name], truth.floor(name))

    name = max(errors, key=lambda name: errors[name] / limit(name))
    return Verdict(name, errors[name], eager[name] if eager else None, errors[name] <= limit(name))


def _share(error: float, norm: float) -> float:
    """Never NaN: against nothing at all, any error is infinite."""
    if norm > 0 and math.isfinite(error):
        return error / norm
    return 0.0 if error == 0 else math.inf


class _Pack(NamedTuple):
    down: Tensor
    """[R, d_in]"""
    up: Tensor
    """[d_out, R]"""
    gates: Tensor
    """[G, R], scales included."""


def _pack(linear: LoRAMoEWeights, inputs: Inputs) -> _Pack:
    base, r = linear.base_down.shape[0], linear.expert_down.shape[1]
    down = torch.cat([linear.base_down, *linear.expert_down]).double().detach()
    up = torch.cat([linear.base_up, *linear.expert_up], dim=1).double().detach()
    gates = torch.cat(
        [
            linear.scale_base * inputs.base_gates.double()[:, None].expand(-1, base),
            linear.scale_expert * inputs.expert_gates.double().repeat_interleave(r, dim=1),
        ],
        dim=1,
    ).detach()
    return _Pack(down, up, gates)


def _gate_gradient(linear: LoRAMoEWeights, per_rank: Tensor) -> Tensor:
    """[G, R] -> [G, 1 + E]."""
    base, (experts, r, _) = linear.base_down.shape[0], linear.expert_down.shape
    mine = linear.scale_base * per_rank[:, :base].sum(1, keepdim=True)
    others = linear.scale_expert * per_rank[:, base:].unflatten(1, (experts, r)).sum(2)
    return torch.cat([mine, others], dim=1)


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.t()
    return y if bias is None else y.add_(bias.double())


def _frozen_dx(inputs: Inputs, part: slice) -> Tensor:
    pairs = zip(inputs.dys, inputs.linears, strict=True)
    products = [dy.flatten(0, -2)[part].double() @ linear.weight.double() for dy, linear in pairs]
    return torch.stack(products).sum(0)


def _chunks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, _CHUNK):
        yield slice(start, min(start + _CHUNK, tokens))
