"""Which experts speak in a request: by schedule, mix, hint, learned router, or the words of the prompt.

E experts, F latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe_lora.adapter import Adapter
from ..moe_lora.instruments import ExpertSet
from ..moe_lora.routing import RuleRouter, pool_text, top_k
from .timeline import EMA, parse_schedule, timeline


@dataclass(frozen=True)
class Wish:
    """What a request says about experts: a schedule goes before a mix, a mix before a hint."""

    hint: str | None = None
    """Expert to use alone, in either taxonomy."""
    mix: Mapping[str, float] | None = None
    """Weights by name."""
    schedule: str | None = None
    """`0:Hook, 40:Suction`: who speaks from which frame of the video on."""
    ema: float = EMA
    """Weight of the past in the moving average of a schedule's gates along the latent frames."""

    def __bool__(self) -> bool:
        return bool(self.hint or self.mix or self.schedule)

    def check(self, experts: ExpertSet, num_frames: int) -> None:
        """Raises WanmoeError for names, weights or frames that do not exist."""
        if self.schedule:
            self.over_frames(experts, num_frames, len(experts))
        elif self:
            RuleRouter(experts).route(mix=self.mix, hint=self.hint)

    def over_frames(self, experts: ExpertSet, num_frames: int, kept: int) -> Tensor:
        """The schedule as gates [F, E], at most `kept` experts a frame."""
        assert self.schedule is not None
        return timeline(parse_schedule(self.schedule), experts, num_frames, self.ema, kept)


class Route(NamedTuple):
    """Which experts speak for a request, and why."""

    gates: dict[str, float]
    """Weight of every expert by name, before the timestep band; the mean over the frames of a schedule. All
    zero leaves the base adapter alone."""
    source: str
    """schedule, mix, hint, router, prompt, fallback or none."""
    frames: Tensor | None = None
    """[F, E] of a schedule."""
    asked: str = ""
    """What a hint or a mix named, which may be a name of the other taxonomy."""

    @property
    def experts(self) -> Tensor:
        """[E], or [F, E] of a schedule."""
        return torch.tensor(list(self.gates.values())) if self.frames is None else self.frames

    def describe(self) -> str:
        """One line for the log."""
        if self.source == "none":
            return "no instrument in the prompt and no hint, so the base adapter alone"
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in self.gates.items() if weight > 0)
        how = {"schedule": " (mean over the clip)"}.get(self.source, f" ({self.asked})" if self.asked else "")
        return f"experts from the {self.source}{how}: {weights}"


def route(
    adapter: Adapter,
    pooled: Callable[[], Tensor],
    prompt: str,
    wish: Wish,
    num_frames: int,
) -> Route:
    """The first of schedule, mix, hint, learned router, prompt and fallback that there is decides.

    pooled: the embedding [n, D] of the prompt, asked for by a learned router alone.
    """
    config, experts = adapter.router_config, adapter.experts
    wish.check(experts, num_frames)
    frames, asked = None, ""
    if wish.schedule:
        frames = wish.over_frames(experts, num_frames, config.top_k)
        gates, source = frames.mean(0), "schedule"
    elif wish:
        gates = RuleRouter(experts).route(mix=wish.mix, hint=wish.hint)
        source = "mix" if wish.mix else "hint"
        asked = ", ".join(wish.mix) if wish.mix else str(wish.hint)
    elif adapter.router is not None:
        with torch.no_grad():
            tokens = pool_text([pooled()]).to(adapter.router.out.weight.device)
            gates, source = top_k(adapter.router(tokens)[0], config.top_k).cpu(), "router"
    else:
        rules = RuleRouter(experts, config.top_k, config.temperature)
        otherwise = "fallback" if experts.fallback else "none"
        gates, source = rules.route(prompt=prompt), "prompt" if experts.find(prompt) else otherwise
    return Route(dict(zip(experts.names, gates.tolist(), strict=True)), source, frames, asked)
