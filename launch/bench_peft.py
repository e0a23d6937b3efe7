"""PEFT as a peer in the benchmark: a LoRA adapter for the base and one per expert, all active on each linear.

PEFT scales an adapter by a Python float per layer: it has no gates per clip, no gradient to a gate, and a
gate that a router computes would have to be read back by the host. Where all gate rows are alike, a scaling
of alpha / rank * gate makes it compute exactly what `lora_moe_linear` does; elsewhere there is no peer.

PEFT itself keeps adapters in fp32 on a bf16 base, and then casts x for each of them. Here they have the dtype
of the base: its fastest form, although such adapters lose small updates.

Letters: G gate rows, E experts, r rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.lora_moe import LoRAMoEWeights

__all__ = ["LinearPeer", "PeftAdapters", "linear_peers", "why_no_peft"]


def why_no_peft(base_gates: Tensor, expert_gates: Tensor) -> str | None:
    """None, or why PEFT cannot be the peer for these gates, [G] and [G, E]."""
    if find_spec("peft") is None:
        return "peft is not installed (pip install peft)"
    if not bool((base_gates == base_gates[:1]).all() and (expert_gates == expert_gates[:1]).all()):
        return (
            "PEFT has one scaling per adapter and layer: it cannot mix experts differently per clip or frame"
        )
    return None


class PeftAdapters:
    """PEFT adapters put on linears of a module, in place; everything else in the module is frozen.

    Args:
        module: holds the linears.
        weights: the adapters' values and scales by the name of the linear in the module.
        base_gate, expert_gates: the one gate row, as floats.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, LoRAMoEWeights],
        base_gate: float,
        expert_gates: list[float],
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        module.requires_grad_(False)
        gates = {"base": base_gate} | {f"expert{e}": gate for e, gate in enumerate(expert_gates)}
        for adapter in gates:
            ranks = {name: _factors(w, adapter)[0].shape[0] for name, w in weights.items()}
            config = LoraConfig(target_modules=list(weights), rank_pattern=ranks, lora_dropout=0.0)
            with warnings.catch_warnings():
                # It warns of a second adapter, and several are what is wanted here.
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                inject_adapter_in_model(config, module, adapter)
        self._layers: dict[str, Any] = {name: module.get_submodule(name) for name in weights}
        for name, layer in self._layers.items():
            given = weights[name]
            for adapter, gate in gates.items():
                down, up = _factors(given, adapter)
                layer.lora_A[adapter].weight = _copy(down, given.weight)
                layer.lora_B[adapter].weight = _copy(up, given.weight)
                layer.scaling[adapter] = gate * (
                    given.scale_base if adapter == "base" else given.scale_expert
                )
            layer.set_adapter(list(gates))
        self._experts = [adapter for adapter in gates if adapter != "base"]

    def leaves(self) -> list[nn.Parameter]:
        """Every parameter that trains."""
        return [p for layer in self._layers.values() for p in layer.parameters() if p.requires_grad]

    def grads(self) -> dict[tuple[str, str], Tensor]:
        """After a backward, by linear and by the name that the part has with us, in our layout.

        `base_down` [r, d_in], `base_up` [d_out, r], `expert_down` [E, r, d_in], `expert_up` [E, d_out, r].
        """
        out: dict[tuple[str, str], Tensor] = {}
        for name, layer in self._layers.items():
            for part, modules in (("down", layer.lora_A), ("up", layer.lora_B)):
                out[name, f"base_{part}"] = modules["base"].weight.grad.clone()
                experts = [modules[adapter].weight.grad for adapter in self._experts]
                out[name, f"expert_{part}"] = torch.stack(experts)
        return out


def _copy(factor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(factor.detach().to(device=like.device, dtype=like.dtype, copy=True))


def _factors(weights: LoRAMoEWeights, adapter: str) -> tuple[Tensor, Tensor]:
    """Down [r, d_in] and up [d_out, r] of the adapter called "base" or "expert<e>"."""
    if adapter == "base":
        return weights.base_down, weights.base_up
    e = int(adapter.removeprefix("expert"))
    return weights.expert_down[e], weights.expert_up[e]


@dataclass(frozen=True)
class LinearPeer:
    """One linear with its adapters, called with x [..., d_in]; only where `why_not` is None."""

    run: Callable[[Tensor], Tensor] | None = None
    adapters: PeftAdapters | None = None
    why_not: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]; raises ValueError where there is no peer."""
        if self.run is None:
            raise ValueError(f"this peer cannot run: {self.why_not}")
        return self.run(x)

    def leaves(self) -> list[nn.Parameter]:
        """Every parameter that trains."""
        return self.adapters.leaves() if self.adapters else []

    def grads(self) -> dict[str, Tensor]:
        """After a backward: `base_down` [r_b, d_in], `base_up`, `expert_down` [E, r, d_in], `expert_up`."""
        found = self.adapters.grads() if self.adapters else {}
        return {part: grad for (_, part), grad in found.items()}


def linear_peers(
    weights: LoRAMoEWeights, base_gates: Tensor, expert_gates: Tensor, *, compiler: str = "inductor"
) -> dict[str, LinearPeer]:
    """One adapted linear as PEFT runs it: "PEFT" and "PEFT compiled", on the same parameters.

    Args:
        weights: the frozen linear, whose storage is shared, and the adapters, which are copied.
        base_gates, expert_gates: [G], [G, E]; rows that differ have no peer, and `why_not` says so.
        compiler: backend of torch.compile.
    """
    why_not = why_no_peft(base_gates, expert_gates)
    if why_not is not None:
        return {name: LinearPeer(why_not=why_not) for name in ("PEFT", "PEFT compiled")}
    d_out, d_in = weights.weight.shape
    linear = nn.Linear(d_in, d_out, bias=weights.bias is not None, device="meta")
    linear.weight = nn.Parameter(weights.weight.detach(), requires_grad=False)
    if weights.bias is not None:
        linear.bias = nn.Parameter(weights.bias.detach(), requires_grad=False)
    holder = nn.ModuleDict({"linear": linear})
    adapters = PeftAdapters(holder, {"linear": weights}, base_gates[0].item(), expert_gates[0].tolist())
    adapted = holder["linear"]
    compiled = torch.compile(adapted, backend=compiler, dynamic=False)
    return {"PEFT": LinearPeer(adapted, adapters), "PEFT compiled": LinearPeer(compiled, adapters)}
