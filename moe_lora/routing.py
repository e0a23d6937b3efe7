"""Who speaks when: expert gates from labels, hints, mixes, prompts or a learned router, shaped by noise
level.

Letters: B clips, F latent frames, E experts, G gate rows (B per clip, B * F per latent frame), L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from .errors import WanmoeError
from .instruments import ExpertSet


class Gates(NamedTuple):
    """How much of each adapter a token gets; an argument of the forward, never state of a module.

    A tuple, since the hooks of ZeRO-3 look for tensors in tuples and not in dataclasses. Token i of a batch
    of clips, counted in (clip, frame, row, column) order, uses gate row i // tokens_per_row.
    """

    experts: Tensor
    """[G, E]: router output x band(t) x alpha_expert."""
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
    bands: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.2, 0.5), (0.6, 1.0))
    """(t from which it holds, factor on the expert gates) in rising t; the first must start at 0."""

    @field_validator("bands")
    @classmethod
    def _rising_from_zero(cls, bands: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        starts = [start for start, _ in bands]
        if not bands or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"bands must start at t = 0 and rise, got {list(bands)}")
        return bands


def band(t: Tensor, bands: Sequence[tuple[float, float]]) -> Tensor:
    """Piecewise constant factor of the expert gates at noise level t [B] -> [B]; no host sync."""
    factor = torch.full_like(t, bands[0][1])
    for start, value in bands[1:]:
        factor = torch.where(t >= start, torch.full_like(t, value), factor)
    return factor


def top_k(gates: Tensor, k: int) -> Tensor:
    """Keeps the k largest of gates [..., E] and rescales them to the same sum; ties at the border all
    stay."""
    if k >= gates.shape[-1]:
        return gates
    border = gates.topk(k, dim=-1).values[..., -1:]
    kept = torch.where(gates >= border, gates, torch.zeros_like(gates))
    total = kept.sum(-1, keepdim=True)
    return kept * (gates.sum(-1, keepdim=True) / torch.where(total > 0, total, torch.ones_like(total)))


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
    it names one, otherwise all zero, which leaves the clip to the base adapter.
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
            for member, part in self.experts.weights(name).items():
                gates[self.experts.index(member)] += weight * part
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


class LearnedRouter(nn.Module):
    """Softmax gates [B, E] from the pooled text embedding [B, text_dim] by one hidden layer.

    The embedding is normalised first: pooled umT5 features are small and their scale says nothing about the
    tool.
    """

    def __init__(self, text_dim: int, experts: int, hidden_dim: int = 64, temperature: float = 0.7) -> None:
        super().__init__()
        self.temperature = temperature
        self.hidden = nn.Linear(text_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, experts)

    def forward(self, pooled: Tensor) -> Tensor:
        pooled = F.layer_norm(pooled.float(), pooled.shape[-1:]).to(self.hidden.weight.dtype)
        logits = self.out(F.silu(self.hidden(pooled)))
        return (logits.float() / self.temperature).softmax(-1)


def pool_text(context: Sequence[Tensor]) -> Tensor:
    """Mean over the real tokens of each prompt: list of [n, D] -> [B, D]."""
    return torch.stack([tokens.float().mean(0) for tokens in context])


def teacher_kl(probs: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || probs), mean over the rows [B, E] whose teacher has evidence (sums above zero)."""
    rows = (teacher.sum(-1) > 0).to(probs.dtype)
    per_row = (torch.xlogy(teacher, teacher) - teacher * probs.clamp_min(1e-9).log()).sum(-1)
    return (per_row * rows).sum() / rows.sum().clamp_min(1.0)
