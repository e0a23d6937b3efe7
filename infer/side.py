"""A DiT with its adapter as the sampler calls it: on the card while it runs, exact or with merged weights.

B clips of a call, F latent frames, E experts, L tokens of one clip.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..moe_lora.adapter import Adapter
from ..moe_lora.errors import WanmoeError
from ..moe_lora.routing import Gates
from ..moe_lora.wan.dit import WanDiT
from .timeline import GateRecord

_log = logging.getLogger(__name__)


class Side:
    """One DiT with its adapter, if it has one: a noise expert, or the whole model.

    Args:
        name: "low" or "high".
        device: where it runs.
        resident: it stays on the device. Otherwise its weights wait in host memory and are copied to the
            device by `enter`; `leave` drops the copy, since nothing that is frozen need travel back.
        merged: run with W + dW in the dtype of W instead of the adapter op; the gates of a call must then be
            the same for all of its tokens.
        compiled: run every block through `torch.compile`.

    Raises WanmoeError for merged weights under a time gate that changes the gates at every step.
    """

    def __init__(
        self,
        name: str,
        dit: WanDiT,
        adapter: Adapter | None,
        device: torch.device,
        *,
        resident: bool = True,
        merged: bool = False,
        compiled: bool = False,
    ) -> None:
        self.name = name
        self.dit = dit
        self.adapter = adapter
        self.device = device
        self.merged = merged and adapter is not None
        kind = "bands" if adapter is None else adapter.router_config.time_gate
        if merged and kind != "bands":
            raise WanmoeError(
                f"merged weights hold one mix of experts, and the {name}-noise adapter has the time gate "
                f"{kind!r}, which changes it at every step; leave merged (--merged) out"
            )
        if adapter is not None and adapter.time_gate is not None:
            adapter.time_gate.to(device)  # two numbers an expert: it never leaves
        self._host: list[Tensor] | None = None if resident else [t.data for t in self._tensors()]
        # Frozen weights of the adapted linears, in host memory, of which merging makes others.
        self._plain: dict[str, Tensor] = {}
        if adapter is not None and not resident:
            self._plain = {name: linear.weight.data for name, linear in adapter.modules.items()}
        self._dirty = False
        self._merged_for: tuple[float, ...] | None = None
        self.untrained = () if adapter is None else untrained_experts(adapter)
        if resident:
            dit.to(device)
        if compiled:
            for block in dit.blocks:
                block.compile()

    def enter(self) -> None:
        """Brings the weights to the device."""
        if self._host is not None:
            for tensor in self._tensors():
                tensor.data = self._copy(tensor.data)

    def leave(self) -> None:
        """Frees the device; the weights are those in host memory again, without what was merged."""
        if self._host is not None:
            for tensor, host in zip(self._tensors(), self._host, strict=True):
                tensor.data = host
            self._dirty, self._merged_for = False, None

    def merge(self, base: float, experts: Sequence[float]) -> None:
        """Puts W + dW of these gates in place of W, where they are not there already."""
        assert self.adapter is not None
        wanted = (base, *experts)
        if self._merged_for == wanted:
            return
        # Said before the first change: what fails half-way is neither these weights nor those of before.
        self._dirty, self._merged_for = True, None
        for name, linear in self.adapter.modules.items():
            if name not in self._plain:  # on A14B the adapted linears are 3.8 GB in bf16
                self._plain[name] = linear.weight.data.cpu()
            plain = self._plain[name].to(linear.base_up.device)
            linear.weight.data = (plain.float() + linear.delta(base, experts)).to(plain.dtype)
        self._merged_for = wanted

    def unmerge(self) -> None:
        """Puts the frozen weights back, to the bit."""
        if self._dirty and self.adapter is not None:
            for name, plain in self._plain.items():
                linear = self.adapter.modules[name]
                linear.weight.data = plain.to(linear.base_up.device)
            self._dirty, self._merged_for = False, None

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.dit.parameters()
        yield from self.dit.buffers()


def untrained_experts(adapter: Adapter) -> tuple[str, ...]:
    """Names of the experts whose up projections are all zero: they change nothing."""
    ups = [linear.expert_up for linear in adapter.modules.values() if linear.experts]
    trained = torch.stack([up.flatten(1).any(1) for up in ups]).any(0).tolist()
    return tuple(
        name for name, any_value in zip(adapter.experts.names, trained, strict=True) if not any_value
    )


class Cast:
    """The sides of one request: brings the one that a step needs to the device and remembers its gates.

    experts: E, the width of the records of a side without an adapter.
    """

    def __init__(self, experts: int) -> None:
        self._silent = torch.zeros(1, experts)
        self.step = 1
        """The one that runs, counted from 1; the caller counts it on."""
        self.records: list[GateRecord] = []
        self.errors: dict[str, float] = {}
        """Relative error of v with merged weights, by side and gates."""
        self._on: Side | None = None

    def bring(self, side: Side) -> None:
        """Makes `side` the one that is on the device."""
        if self._on is not side:
            self.clear()
            self._on = side  # before it enters, so that a failure half-way is cleared too
            side.enter()

    def clear(self) -> None:
        """Takes whichever side is on the device off it."""
        if self._on is not None:
            self._on.leave()
            self._on = None

    def note(self, side: str, t: float, gates: Tensor | None) -> None:
        """Records a step; the second pass of guidance is the same step."""
        if not self.records or self.records[-1].step != self.step:
            kept = self._silent if gates is None else gates.detach().float().cpu()
            self.records.append(GateRecord(self.step, side, t, kept))


class Denoiser:
    """A side in one request, as the sampler calls it. Its own gates: two adapters may have other bands."""

    def __init__(
        self, cast: Cast, side: Side, experts: Tensor, tokens: int, alpha_base: float, alpha_expert: float
    ) -> None:
        """experts: [E] for the whole clip, or [F, E] by latent frame; tokens: L."""
        self.cast = cast
        self.side = side
        self.experts = experts
        self.tokens = tokens
        self.alphas = {"alpha_base": alpha_base, "alpha_expert": alpha_expert}

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | Sequence[Tensor],
        gates: Gates | None = None,
        image_latent: Tensor | None = None,
        image_context: Tensor | None = None,
    ) -> Tensor:
        """v of x [B, C, F, H, W] at t [B]; `gates` are made here and not taken."""
        self.cast.bring(self.side)
        gates = self._gates(t)
        rows = None if gates is None else gates.experts[: gates.experts.shape[0] // len(t)]
        self.cast.note(self.side.name, float(t[0]), rows)

        def run(gates: Gates | None) -> Tensor:
            v: Tensor = self.side.dit(x, t, context, gates, image_latent, image_context)
            return v

        if gates is None or not self.side.merged:
            return run(gates)
        assert rows is not None
        return self._run_merged(run, gates, rows[0].tolist())

    def _gates(self, t: Tensor) -> Gates | None:
        if self.side.adapter is None:
            return None
        experts = self.experts.to(t.device).expand(len(t), *self.experts.shape)
        return self.side.adapter.gates(experts, t, tokens=self.tokens, **self.alphas)

    def _run_merged(
        self, run: Callable[[Gates | None], Tensor], gates: Gates, experts: list[float]
    ) -> Tensor:
        """With merged weights; the first call under new gates is made both ways, to say what that costs."""
        label = f"{self.side.name} noise, gates {', '.join(f'{gate:.3g}' for gate in experts)}"
        exact = None
        if label not in self.cast.errors:
            self.side.unmerge()
            exact = run(gates)
        self.side.merge(self.alphas["alpha_base"], experts)
        v = run(None)
        if exact is not None:
            error = float((v - exact).norm() / exact.norm().clamp_min(1e-30))
            self.cast.errors[label] = error
            _log.info("merged weights (%s): v differs from the exact adapter by %.1e", label, error)
        return v
