"""The one module that an engine owns: the DiT with its router and time gate, and gates made from arguments.

Letters: B clips, C latent channels, F, H, W latent frames, height, width, E experts, D text width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..moe_lora import Adapter
from ..moe_lora.adapter import make_router
from ..moe_lora.routing import LearnedRouter, learned_gates
from .stages import StageSpec

if TYPE_CHECKING:
    from ..moe_lora.wan.dit import WanDiT


class Routed(NamedTuple):
    """What one forward gives; gates are those before band and alpha, zero where there are no experts."""

    v: Tensor
    """[B, C, F, H, W]"""
    probs: Tensor
    """[B, E]: what the router says, or the labels."""
    kept: Tensor
    """[B, E]: what the model got of it."""
    prompt_probs: Tensor | None
    """[K, E]: what the router says of text-only prompts."""
    overlap: Tensor | None
    """How far the experts' down projections lie in the space of the base's, 0 to 1."""


class RoutedDiT(nn.Module):
    """The DiT, and router and time gate where they are learned, as the one module that an engine owns.

    Gates are made inside the forward from its arguments, so that ZeRO-3 gathers the router like any layer and
    no module holds state between calls.

    Args:
        overlap: also measure the overlap of experts and base, for a loss on it.
    """

    def __init__(self, dit: WanDiT, adapter: Adapter | None, spec: StageSpec, overlap: bool = False) -> None:
        super().__init__()
        self.dit = dit
        self.router = None if adapter is None else adapter.router
        self.time_gate = None if adapter is None else adapter.time_gate
        self.adapter = adapter
        self.spec = spec
        self.overlap = overlap

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: list[Tensor],
        pooled: Tensor,
        rule: Tensor,
        image_latent: Tensor | None = None,
        noise: Tensor | None = None,
        evidence: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> Routed:
        """x [B, C, F, H, W] at t [B]; context: text of each clip; pooled [B, D]: its mean, which a learned
        router reads; rule [B, E]: gates by label; noise [B, E] on the logits of a learned router; evidence
        [B, K]: logits of a classifier of the first frame, where the router reads it; prompts [N, D]: pooled
        text that the router is asked about too, without a clip.
        """
        probs, of_prompts = self.expert_gates(pooled, rule, noise, evidence, prompts)
        if self.adapter is None or self.spec.routing == "frozen":
            return Routed(self.dit(x, t, context, None, image_latent), probs, probs, of_prompts, None)
        # Labels and mixes are exact; only what a network says is cut to its strongest experts.
        learned = self.spec.routing == "router" and self.router is not None
        kept = learned_gates(probs, self.adapter.router_config, self.training) if learned else probs
        # The base alone is the base alone, whatever floor the experts have.
        loud = 0.0 if self.spec.routing == "base" else 1.0
        gates = self.adapter.gates(kept, t, tokens=self.tokens(x), alpha_expert=loud)
        v = self.dit(x, t, context, gates, image_latent)
        overlap = self.adapter.overlap() if self.overlap and self.training else None
        return Routed(v, probs, kept, of_prompts, overlap)

    def expert_gates(
        self,
        pooled: Tensor,
        rule: Tensor,
        noise: Tensor | None = None,
        evidence: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, E] by label, by the learned router, or all zero where the stage has no experts yet; and [N, E]
        of the prompts."""
        if self.spec.routing != "router" or self.router is None:
            return rule if self.spec.routing == "labels" else torch.zeros_like(rule), None
        probs: Tensor
        if prompts is None:
            probs = self.router(pooled, noise, evidence)
            return probs, None
        # One call for both: a module runs once a forward, as the hooks of ZeRO-3 like it.
        clips, extra = len(pooled), len(prompts)
        read = torch.cat([pooled, prompts.to(pooled)])
        noise = None if noise is None else torch.cat([noise, noise.new_zeros(extra, noise.shape[1])])
        if evidence is not None:
            evidence = torch.cat([evidence, evidence.new_zeros(extra, evidence.shape[1])])
        probs = self.router(read, noise, evidence)
        return probs[:clips], probs[clips:]

    def tokens(self, x: Tensor) -> int:
        """Tokens of one clip."""
        p, q, r = self.dit.config.patch_size
        return (x.shape[2] // p) * (x.shape[3] // q) * (x.shape[4] // r)


def whole_router(adapter: Adapter | None) -> LearnedRouter | None:
    """A copy of the learned router outside of the engine, whole on every rank; a collective under ZeRO-3."""
    if adapter is None or adapter.router is None:
        return None
    import deepspeed

    live = adapter.router
    with torch.device("meta"):
        copy = make_router(adapter.router_config, adapter.dit.config.text_dim, len(adapter.experts))
    with deepspeed.zero.GatheredParameters(list(live.parameters())):
        whole = {name: value.detach().clone() for name, value in live.named_parameters()}
    copy.load_state_dict(whole, assign=True)
    return copy.requires_grad_(False)
