"""Who speaks when: expert gates from labels, hints, mixes, prompts or a learned router, shaped by noise
level.

Letters: B clips, F latent frames, E experts, G gate rows (B per clip, B * F per latent frame), L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from .errors import WanmoeError
from .instruments import ExpertSet
from .learned_router import LearnedRouter
from .time_gate import TimeGate, band, ramp

__all__ = [
    "Gates",
    "LearnedRouter",
    "RouterConfig",
    "RuleRouter",
    "TimeGate",
    "at_noise_level",
    "band",
    "cap",
    "ema_over_frames",
    "learned_gates",
    "pool_text",
    "top_k",
]

# What every expert's probability is taken for at least where an excess is shared: below it they share evenly.
_LEAST = 1e-12


class Gates(NamedTuple):
    """How much of each adapter a token gets; an argument of the forward, never state of a module.

    A tuple, since the hooks of ZeRO-3 look for tensors in tuples and not in dataclasses. Token i of a batch
    of clips, counted in (clip, frame, row, column) order, uses gate row i // tokens_per_row.
    """

    experts: Tensor
    """[G, E]: router output as `at_noise_level` shapes it x alpha_expert."""
    base: Tensor
    """[G]: alpha_base."""
    tokens_per_row: int

    def per_clip(self, clips: int, tokens: int) -> Gates:
        """The same gates for sequences that have no frames (text): mean over the frames, one row per clip."""
        rows = self.experts.shape[0]
        if rows % clips:
            raise ValueError(f"{rows} gate rows do not divide among {clips} clips")
        if rows == clips:
            return Gates(self.experts, self.base, tokens)
        experts = self.experts.view(clips, rows // clips, -1).mean(1)
        return Gates(experts, self.base.view(clips, rows // clips).mean(1), tokens)

    def part(self, clips: int, tokens: slice) -> Gates:
        """The gates of the same `tokens` of every clip, for ranks that share the clips; differentiable.

        Where a gate row ends inside of them, the new rows have as many tokens as divides every stretch of one
        row.
        """
        rows = self.experts.shape[0]
        if rows % clips or not 0 <= tokens.start < tokens.stop <= rows // clips * self.tokens_per_row:
            raise ValueError(
                f"{rows} gate rows of {self.tokens_per_row} tokens do not hold tokens {tokens.start} to "
                f"{tokens.stop} of each of {clips} clips"
            )
        first, last = tokens.start // self.tokens_per_row, -(-tokens.stop // self.tokens_per_row)
        ends = [row * self.tokens_per_row for row in range(first + 1, last)]
        stretches = [stop - start for start, stop in pairwise([tokens.start, *ends, tokens.stop])]
        group = math.gcd(*stretches)

        def spread(gates: Tensor) -> Tensor:
            """By whole rows: the backward of an index would add in the order of atomics."""
            by_row = gates.unflatten(0, (clips, -1))[:, first:last].split(1, dim=1)
            parts = zip(by_row, stretches, strict=True)
            return torch.cat([one.repeat_interleave(n // group, dim=1) for one, n in parts], 1).flatten(0, 1)

        return Gates(spread(self.experts), spread(self.base), group)


class RouterConfig(BaseModel):
    """Section `router`: how expert gates are made."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True)

    mode: Literal["rule", "learned"] = "rule"
    """rule: labels, hints, mixes and keywords; learned: a small network on the pooled text embedding."""
    top_k: int = Field(2, ge=1)
    """Experts kept per gate row; ties at the border are kept together."""
    temperature: float = Field(0.7, gt=0)
    """Of the softmax over keyword hits (rule) and over the network's logits (learned)."""
    hidden_dim: int = Field(64, ge=1)
    """Width of the learned router's hidden layer."""
    train_gates: Literal["straight_through", "soft"] = "straight_through"
    """How a learned router's gates act while it trains. straight_through: top_k and max_gate in the forward,
    the gradient as if all experts spoke by their probability. soft: so in the forward too, under max_gate.
    Outside of training top_k and max_gate hold."""
    max_gate: float = Field(1.0, gt=0, le=1)
    """No gate of a learned router lies above it; what is cut off goes to the other kept experts in proportion
    to their probability. At least 1 / top_k. Hints, mixes and labels are never cut."""
    logit_noise: float = Field(0.0, ge=0)
    """Standard deviation of normal noise on a learned router's logits in training, for exploration."""
    first_frame_classes: int = Field(0, ge=0)
    """Logits of a classifier of the first latent frame that the learned router reads beside the text, so many
    as the classifier has classes; 0: the text alone."""
    floor: float = Field(0.0, ge=0, lt=1)
    """Part of every expert's gate that is always on: a gate g of labels, hints, mixes or the network becomes
    floor + (1 - floor) g. 0: who is not routed is silent. Not under time_gate = "contrast"."""
    bands: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.2, 0.5), (0.6, 1.0))
    """(t from which it holds, factor on the expert gates) in rising t; the first must start at 0."""
    time_gate: Literal["bands", "contrast", "learned"] = "bands"
    """bands: the factor by `bands`. contrast: by `contrast`. learned: in place of the bands a smooth factor
    for each expert, sigmoid(slope (t - center)) from slope 12 and center 0.35 on, which trains with the
    experts; under any `mode`. Where neither this nor `bands` nor `floor` is given, here or in stage a, stage
    b trains with bands = [[0, 1]] and floor = 0.5, unless the base is frozen."""
    contrast: tuple[tuple[float, float], ...] = ((0.3, 0.0), (0.9, 0.25))
    """(t, width w), linear between, under time_gate = "contrast": a gate g becomes 1 + w (E g - sum of g). So
    all E experts speak, together always E: alike at little noise, the routed one louder towards noise."""
    ema: float = Field(0.5, ge=0, lt=1)
    """Weight of the past in the moving average of a schedule's gates along the latent frames, where a request
    does not say it."""

    @property
    def loudness(self) -> str:
        """In words, how loud the experts are at a noise level."""
        if self.time_gate == "contrast":
            return f"contrast {[list(pair) for pair in self.contrast]}"
        gate = "learned" if self.time_gate == "learned" else f"bands {[list(pair) for pair in self.bands]}"
        return f"{gate}, floor {self.floor:g}"

    @property
    def steady(self) -> bool:
        """Whether the experts are as loud at every noise level."""
        return self.time_gate == "bands" and len({factor for _, factor in self.bands}) == 1

    @property
    def unrouted(self) -> str:
        """In words, what speaks where no expert is routed: gates of zero still have a floor or a contrast."""
        alike = self.time_gate == "contrast" or self.floor > 0
        return "all experts alike" if alike else "the base adapter alone"

    @field_validator("bands")
    @classmethod
    def _rising_from_zero(cls, bands: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        starts = [start for start, _ in bands]
        if not bands or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"bands must start at t = 0 and rise, got {list(bands)}")
        return bands

    @field_validator("contrast")
    @classmethod
    def _widths_within_one(cls, contrast: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        levels = [t for t, _ in contrast]
        if not contrast or levels != sorted(set(levels)) or not all(0 <= w <= 1 for _, w in contrast):
            raise ValueError(f"contrast must rise in t with widths from 0 to 1, got {list(contrast)}")
        return contrast

    @model_validator(mode="after")
    def _cap_leaves_a_sum_of_one(self) -> RouterConfig:
        try:
            self.check()
        except WanmoeError as error:
            raise ValueError(str(error)) from error
        return self

    def check(self, experts: int | None = None) -> None:
        """Raises WanmoeError where the gates of a learned router could not sum to 1 under max_gate, and for a
        floor under a contrast."""
        kept = self.top_k if experts is None else min(self.top_k, experts)
        if self.max_gate < 1 and self.max_gate * kept < 1 - 1e-6:
            raise WanmoeError(
                f"router.max_gate = {self.max_gate} leaves less than 1 for {kept} experts together; set it "
                f"to at least {1 / kept:.3g}, or raise router.top_k"
            )
        if self.floor and self.time_gate == "contrast":
            raise WanmoeError(
                f"router.floor = {self.floor} does nothing under router.time_gate = 'contrast', which keeps "
                "all experts on by itself; set one of the two"
            )


def top_k(gates: Tensor, k: int) -> Tensor:
    """Keeps the k largest of gates [..., E] and rescales them to the same sum; ties at the border all
    stay."""
    if k >= gates.shape[-1]:
        return gates
    kept = torch.where(_strongest(gates, k), gates, torch.zeros_like(gates))
    total = kept.sum(-1, keepdim=True)
    return kept * (gates.sum(-1, keepdim=True) / torch.where(total > 0, total, torch.ones_like(total)))


def _strongest(gates: Tensor, k: int) -> Tensor:
    return gates >= gates.topk(min(k, gates.shape[-1]), dim=-1).values[..., -1:]


def cap(gates: Tensor, most: float, among: Tensor | None = None) -> Tensor:
    """Gates [..., E] that sum to 1 with none above `most`; the others share the excess as they stand to each
    other, and evenly where they vanish.

    among: mask of those that may share, which must hold all that is above 0; default: all. `most` x as many
    must reach 1. Has a gradient everywhere; that of a gate at its limit is 0.
    """
    if most >= 1:
        return gates
    among = torch.ones_like(gates, dtype=torch.bool) if among is None else among
    full = gates > most
    capped = gates
    for _ in range(int(1 / most)):  # no more than this can be full; each round but the last fills one
        weight = (gates + _LEAST) * (among & ~full)
        left = 1 - most * full.sum(-1, keepdim=True)
        shared = weight * (left / weight.sum(-1, keepdim=True).clamp_min(_LEAST))
        capped = torch.where(full, torch.full_like(gates, most), shared)
        full = full | (capped > most)
    return torch.where((gates > most).any(-1, keepdim=True), capped, gates)


def learned_gates(probs: Tensor, config: RouterConfig, training: bool) -> Tensor:
    """Gates [B, E] that the model gets of what a learned router says, probs [B, E]: the strongest top_k with
    none above max_gate.

    In training the gradient passes to all of probs, or all experts speak (`RouterConfig.train_gates`).
    """
    if training and config.train_gates == "soft":
        return cap(probs, config.max_gate)
    kept = cap(top_k(probs, config.top_k), config.max_gate, _strongest(probs, config.top_k))
    # In this order the value is that of `kept` to the bit.
    return kept.detach() + (probs - probs.detach()) if training else kept


def at_noise_level(gates: Tensor, t: Tensor, config: RouterConfig, learned: TimeGate | None = None) -> Tensor:
    """Gates [G, E] of labels, hints or a router as the model gets them at noise levels t [G]: by `contrast`,
    or by `floor` and the bands, in whose place a `learned` gate stands. A row of zeros, no evidence, has no
    contrast."""
    if config.time_gate == "contrast":
        width = ramp(t.float(), config.contrast).to(gates.dtype)[:, None]
        return 1 + width * (gates.shape[1] * gates - gates.sum(1, keepdim=True))
    if config.time_gate == "learned" and learned is None:
        raise ValueError("router.time_gate is learned: its gate must be given")
    factor: Tensor = band(t.float(), config.bands)[:, None] if learned is None else learned(t)
    return (config.floor + (1 - config.floor) * gates) * factor.to(gates.dtype)


def ema_over_frames(gates: Tensor, beta: float, k: int) -> Tensor:
    """Bias-corrected moving average of gates [B, F, E] along the frames of one clip, cut to the top k again.

    Frame f is sum_j beta^(f-j) g_j / sum_j beta^(f-j) over j <= f: a function of this request alone, so that
    nothing leaks from one call to the next.
    """
    frames = torch.arange(gates.shape[1], device=gates.device, dtype=gates.dtype)
    age = frames[:, None] - frames[None, :]
    weight = torch.where(age >= 0, beta ** age.clamp(min=0), torch.zeros_like(age))
    smooth = (weight / weight.sum(1, keepdim=True)) @ gates
    return top_k(smooth, k)


class RuleRouter:
    """Gates [E] from what is known of a clip: an explicit mix, a hint, labels, or the words of its prompt.

    The first that is given decides. A hint and a single label are exactly one-hot, a mix and several labels
    exactly proportional to their weights; a name of the other surgical taxonomy is taken for its members here
    (`ExpertSet.weights`). A prompt without any keyword is no evidence: the fallback expert of the set if
    it names one, otherwise all zero: no expert is routed.
    """

    def __init__(self, experts: ExpertSet, top_k: int = 2, temperature: float = 0.7) -> None:
        self.experts = experts
        self.top_k = top_k
        self.temperature = temperature

    def route(
        self,
        *,
        mix: Mapping[str, float] | None = None,
        hint: str | None = None,
        labels: Sequence[tuple[str, float]] | None = None,
        prompt: str | None = None,
    ) -> Tensor:
        """Gates [E], fp32, summing to 1 or all zero; raises WanmoeError on an unknown name or a bad
        weight."""
        if mix:
            return self._proportional(list(mix.items()), "mix")
        if hint:
            return self._proportional([(hint, 1.0)], "hint")
        if labels:
            return self._proportional(list(labels), "labels")
        hits = self.experts.find(prompt or "")
        if hits:
            return self._from_hits(hits)
        gates = torch.zeros(len(self.experts))
        if self.experts.fallback is not None:
            gates[self.experts.index(self.experts.fallback)] = 1.0
        return gates

    def _proportional(self, weights: Sequence[tuple[str, float]], what: str) -> Tensor:
        gates = torch.zeros(len(self.experts))
        for name, weight in weights:
            if not (weight >= 0 and weight < float("inf")):
                raise WanmoeError(f"{what}: weight of {name!r} must be finite and not negative, got {weight}")
        for member, share in self.experts.shares(weights).items():
            gates[self.experts.index(member)] = share
        if not gates.sum() > 0:
            raise WanmoeError(
                f"{what}: the weights {dict(weights)} sum to zero; give at least one above zero"
            )
        return gates / gates.sum()

    def _from_hits(self, hits: Mapping[str, int]) -> Tensor:
        logits = torch.full((len(self.experts),), float("-inf"))
        for name, count in hits.items():
            logits[self.experts.index(name)] = count / self.temperature
        return top_k(logits.softmax(0), self.top_k)


def pool_text(context: Sequence[Tensor]) -> Tensor:
    """Mean over the real tokens of each prompt: list of [n, D] -> [B, D]."""
    return torch.stack([tokens.float().mean(0) for tokens in context])
