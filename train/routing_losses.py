"""Losses of the router: near its teacher, as decided as wanted, and every expert in use.

How even the load is and how decided the router is are said of many clips, not of one: here, of the window,
all clips of one optimizer step over data-parallel ranks and accumulated forwards. The loss is a function of
means over the window, while the backward pass sees one micro-batch at a time. So each rank sums what its
clips say before the first forward (`window_sums`, no graph), the ranks add these sums, and each micro-batch
then has the window's value and its own part of the gradient (`routing_terms`).

Letters: B clips of a micro-batch, E experts. `probs` [B, E] is what the router says (softmax, before cap and
top-k); `teacher` [B, E] the gates of the rules, a row of zeros where they have no evidence.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import at_least_fp32

_LEAST = 1e-30  # of a probability under a logarithm; its gradient, 1e30 times another, stays finite in fp32


class Window(NamedTuple):
    """What the router says of all clips of one optimizer step; 0-d tensors where no shape is given."""

    clips: Tensor
    taught: Tensor
    """Clips for which the teacher has evidence."""
    load: Tensor
    """[E]: mean probability of each expert."""
    entropy: Tensor
    """Mean over the clips of the entropy of their probabilities, in nats."""


def window_sums(probs: Tensor, teacher: Tensor) -> Tensor:
    """[E + 3]: sums over the clips, which micro-batches and ranks add up; `window_of` reads them."""
    probs = at_least_fp32(probs)
    counts = torch.stack([probs.new_full((), probs.shape[0]), _taught(teacher).sum().to(probs)])
    return torch.cat([probs.sum(0), entropy(probs).sum()[None], counts])


def window_of(sums: Tensor) -> Window:
    """The window whose sums [E + 3] these are."""
    clips, taught = sums[-2], sums[-1]
    return Window(clips, taught, sums[:-3] / clips, sums[-3] / clips)


def load_balance(load: Tensor) -> Tensor:
    """Squared coefficient of variation of the mean load [E], which sums to 1: 0 when even, E - 1 when one
    expert has all (Shazeer et al., 2017, equation 7)."""
    return load.shape[-1] * load.pow(2).sum(-1) - 1


def entropy(probs: Tensor) -> Tensor:
    """[B]: entropy in nats, with finite gradients at probability 0 too."""
    probs = at_least_fp32(probs)
    return -(probs * probs.clamp_min(_LEAST).log()).sum(-1)


def entropy_term(mean_entropy: Tensor, target: float) -> Tensor:
    """Squared distance of the window's mean entropy from the target, in nats and below log(E)."""
    return (mean_entropy - target) ** 2


def teacher_divergence(probs: Tensor, teacher: Tensor) -> Tensor:
    """[B]: KL(teacher || probs); 0 where the teacher has no evidence."""
    probs = at_least_fp32(probs)
    teacher = teacher.to(probs)
    divergence = (torch.xlogy(teacher, teacher) - teacher * probs.clamp_min(_LEAST).log()).sum(-1)
    return torch.where(_taught(teacher), divergence, torch.zeros_like(divergence))


def routing_terms(
    wanted: Collection[str],
    probs: Tensor,
    teacher: Tensor,
    window: Window,
    share: float,
    target_entropy: float,
) -> dict[str, Tensor]:
    """One micro-batch's part of the router's losses: of the scalars `teacher_kl`, `entropy` and `balance`
    those that are wanted.

    Added up over all micro-batches of the window, each times `share`, they have value and gradient of the
    losses of the joined batch, also where micro-batches differ in size. `entropy` and `balance` have the
    window's value on each of them; `teacher_kl` has its own, so that the mean of all is the joined one.

    Args:
        window: over all ranks and forwards of this step, these clips among them.
        share: part of a micro-batch in the step's loss: 1 / (accumulation x world size), by which the engine
            divides.
        target_entropy: in nats.
    """
    # A mean over the window moves with a clip of it by 1 / clips; the engine's share is undone.
    terms: dict[str, Tensor] = {}
    if "entropy" in wanted:
        mean = _moving(window.entropy, entropy(probs).sum() / (window.clips * share))
        terms["entropy"] = entropy_term(mean, target_entropy)
    if "balance" in wanted:
        load = _moving(window.load, at_least_fp32(probs).sum(0) / (window.clips * share))
        terms["balance"] = load_balance(load)
    if "teacher_kl" in wanted:
        taught = window.taught.clamp_min(1)
        terms["teacher_kl"] = teacher_divergence(probs, teacher).sum() / (taught * share)
    return terms


def _moving(value: Tensor, own: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `own`."""
    return value.detach() + (own - own.detach())


def _taught(teacher: Tensor) -> Tensor:
    """[B], bool: the teacher has evidence."""
    return teacher.sum(-1) > 0
