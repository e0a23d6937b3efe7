"""Which experts speak in a request: by schedule, mix, hint, learned router, or the words of the prompt.

E experts, F latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe_lora.adapter import Adapter
from ..moe_lora.errors import WanmoeError
from ..moe_lora.instruments import ExpertSet
from ..moe_lora.routing import RuleRouter, learned_gates, pool_text
from .timeline import EMA, parse_schedule, timeline


@dataclass(frozen=True)
class Wish:
    """What a request says about experts: a schedule goes before a mix, a mix before a hint."""

    hint: str | None = None
    """Expert to route to, in either taxonomy."""
    mix: Mapping[str, float] | None = None
    """Weights by name."""
    schedule: str | None = None
    """`0:Hook, 40:Suction`: who speaks from which frame of the video on."""
    ema: float | None = None
    """Weight of the past in the moving average of a schedule's gates along the latent frames; None: as the
    adapter says."""

    def __bool__(self) -> bool:
        return bool(self.hint or self.mix or self.schedule)

    def check(self, experts: ExpertSet, num_frames: int) -> None:
        """Raises WanmoeError for names, weights or frames that do not exist."""
        if self.schedule:
            self.over_frames(experts, num_frames, len(experts))
        elif self:
            RuleRouter(experts).route(mix=self.mix, hint=self.hint)

    def over_frames(self, experts: ExpertSet, num_frames: int, kept: int, ema: float = EMA) -> Tensor:
        """The schedule as gates [F, E], at most `kept` experts a frame; `ema` where the request has none."""
        assert self.schedule is not None
        ema = ema if self.ema is None else self.ema
        return timeline(parse_schedule(self.schedule), experts, num_frames, ema, kept)


class Route(NamedTuple):
    """Which experts speak for a request, and why."""

    gates: dict[str, float]
    """Weight of every expert by name, before the time gate; the mean over the frames of a schedule. All zero
    routes none of them."""
    source: str
    """schedule, mix, hint, router, prompt, fallback or none."""
    frames: Tensor | None = None
    """[F, E] of a schedule."""
    asked: str = ""
    """What a hint or a mix named, which may be a name of the other taxonomy."""
    blind: bool = False
    """The router reads the first frame too, and was not given it."""
    unrouted: str = ""
    """What speaks where all weights are zero."""

    @property
    def experts(self) -> Tensor:
        """[E], or [F, E] of a schedule."""
        return torch.tensor(list(self.gates.values())) if self.frames is None else self.frames

    def describe(self) -> str:
        """One line for the log."""
        if self.source == "none":
            return f"no instrument in the prompt and no hint, so {self.unrouted}"
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in self.gates.items() if weight > 0)
        how = {"schedule": " (mean over the clip)"}.get(self.source, f" ({self.asked})" if self.asked else "")
        unread = "; it reads the first frame too, which it was not given" if self.blind else ""
        return f"experts from the {self.source}{how}: {weights}{unread}"


def acting(names: Sequence[str], gates: Tensor) -> str:
    """The experts that gates [F, E] of a step raise above the others, in words."""
    if not gates.any():
        return "no expert"
    raised = (gates > gates.amin(1, keepdim=True)).any(0).tolist()
    return " + ".join(name for name, acts in zip(names, raised, strict=True) if acts) or "all experts alike"


def route(
    adapter: Adapter,
    pooled: Callable[[], Tensor],
    prompt: str,
    wish: Wish,
    num_frames: int,
    evidence: Tensor | None = None,
) -> Route:
    """The first of schedule, mix, hint, learned router, prompt and fallback that there is decides.

    pooled: the embedding [n, D] of the prompt, asked for by a learned router alone. evidence [K]: logits of
    the classifier of the first latent frame that the router was trained with; one that reads the text alone
    leaves them. Raises WanmoeError for other classes than it reads.
    """
    config, experts = adapter.router_config, adapter.experts
    wish.check(experts, num_frames)
    frames, asked, blind = None, "", False
    if wish.schedule:
        frames = wish.over_frames(experts, num_frames, config.top_k, config.ema)
        gates, source = frames.mean(0), "schedule"
    elif wish:
        gates = RuleRouter(experts).route(mix=wish.mix, hint=wish.hint)
        source = "mix" if wish.mix else "hint"
        asked = ", ".join(wish.mix) if wish.mix else str(wish.hint)
    elif adapter.router is not None:
        gates, source = _by_router(adapter, pooled(), evidence), "router"
        blind = adapter.router.classes > 0 and evidence is None
    else:
        rules = RuleRouter(experts, config.top_k, config.temperature)
        otherwise = "fallback" if experts.fallback else "none"
        gates, source = rules.route(prompt=prompt), "prompt" if experts.find(prompt) else otherwise
    weights = dict(zip(experts.names, gates.tolist(), strict=True))
    return Route(weights, source, frames, asked, blind, config.unrouted)


@torch.no_grad()
def _by_router(adapter: Adapter, text: Tensor, evidence: Tensor | None) -> Tensor:
    """Gates [E] of the learned router for an embedding [n, D] and logits [K] of the first frame."""
    router = adapter.router
    assert router is not None
    place = router.out.weight.device
    seen = None
    if router.classes and evidence is not None:
        if evidence.shape != (router.classes,):
            raise WanmoeError(
                f"the router reads {router.classes} classes of the first frame, the classifier gives "
                f"{list(evidence.shape)}; give the classifier that it was trained with"
            )
        seen = evidence[None].to(place)
    probs = router(pool_text([text]).to(place), evidence=seen)
    return learned_gates(probs, adapter.router_config, training=False)[0].cpu()
