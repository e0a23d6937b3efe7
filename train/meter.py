"""Means of what a log line tells, over all ranks and forwards since the last one, whole and by group.

Letters: B clips, E experts, N groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .objective import Loss
from .routing_losses import entropy

BINS = 10
# The load of few clips is uneven by chance: it is told when each expert could have had so many.
CLIPS = 16
# The remedies are those of docs/training.md, "When experts collapse".
MAX_SHARE, MIN_ENTROPY = 0.7, 0.5


class Meter:
    """Sums of one rank, kept on the device: adding to them waits for nothing.

    Args:
        experts: names in the order of the gate columns; () where there are none.
        boundary: t from which a clip counts as of the high-noise side.
    """

    def __init__(self, experts: Sequence[str], boundary: float, device: torch.device) -> None:
        self.experts, self.boundary, self.device = list(experts), boundary, device
        self._terms: dict[str, Tensor] = {}
        self._t = torch.zeros(BINS, device=device)
        self._gates = torch.zeros(len(self.experts) + 2, device=device)
        """Sum of the gates of all clips [E], of their entropy, and how many they are."""

    @torch.no_grad()
    def add(self, loss: Loss) -> None:
        """Counts the clips of one forward."""
        high = (loss.t >= self.boundary).float()
        groups = [high, 1 - high]
        if self.experts:
            # A clip belongs to its main instrument; without evidence to none.
            main = torch.zeros_like(loss.rule).scatter_(1, loss.rule.argmax(1, keepdim=True), 1.0)
            main = main * (loss.rule.sum(1, keepdim=True) > 0)
            groups += list(main.unbind(1))
            count = torch.full((1,), float(len(main)), device=self.device)
            self._gates += torch.cat([loss.kept.float().sum(0), loss.entropy.sum()[None], count])
        member = torch.stack(groups)  # [N, B]
        for name, values in loss.per_clip.items():
            sums = torch.stack([member @ values.float(), member.sum(1)])
            self._terms[name] = self._terms.get(name, torch.zeros_like(sums)) + sums
        self._t += torch.histc(loss.t.float(), BINS, 0.0, 1.0)

    def reduce(self) -> dict[str, float]:
        """The figures over all ranks, by the names of the log, and a fresh start; a collective.

        Groups that were not seen are left out; the load is told, and begun anew, once enough clips were seen.
        """
        packed = torch.cat([value.flatten() for value in self._terms.values()] + [self._gates, self._t])
        dist.all_reduce(packed)
        flat = packed.cpu()
        figures: dict[str, float] = {}
        names = ["high", "low", *self.experts]
        for name in self._terms:
            (sums, counts), flat = flat[: 2 * len(names)].view(2, -1), flat[2 * len(names) :]
            for group, total, count in zip(names, sums.tolist(), counts.tolist(), strict=True):
                if count:
                    figures[f"train/{name}/{group}"] = total / count
        gates, drawn = flat[:-BINS], flat[-BINS:]
        if self.experts and float(gates[-1]) >= CLIPS * len(self.experts):
            figures |= self._load(gates)
            self._gates = torch.zeros_like(self._gates)
        total = max(float(drawn.sum()), 1.0)
        figures |= {f"t/{n / BINS:.1f}": float(count) / total for n, count in enumerate(drawn)}
        self._terms, self._t = {}, torch.zeros_like(self._t)
        return figures

    def _load(self, gates: Tensor) -> dict[str, float]:
        total = gates[:-2].sum()
        if not float(total) > 0:
            return {}
        load = gates[:-2] / total
        shares = {f"load/{name}": share for name, share in zip(self.experts, load.tolist(), strict=True)}
        return shares | {"load/entropy": float(entropy(load)), "gates/entropy": float(gates[-2] / gates[-1])}


def collapse(figures: dict[str, float], experts: Sequence[str], learned: bool) -> str | None:
    """What is wrong with the load of the experts, and what helps; None where nothing is.

    One expert with more than 70 % of the load, or an entropy of the load below 0.5 nats, is a collapse.
    """
    if len(experts) < 2 or "load/entropy" not in figures:
        return None
    load = {name: figures[f"load/{name}"] for name in experts}
    most = max(load, key=lambda name: load[name])
    entropy = figures["load/entropy"]
    if load[most] <= MAX_SHARE and entropy >= MIN_ENTROPY:
        return None
    what = f"{most} takes {load[most]:.0%} of the load (entropy {entropy:.2f} of {math.log(len(load)):.2f})"
    if learned:
        return (
            f"experts collapse: {what}; raise objective.balance (0.05 to 0.1) or objective.teacher_kl, set "
            "router.max_gate = 0.9, or raise router.temperature"
        )
    return (
        f"the experts are fed unevenly: {what}; set data.balanced = true, or prepare more clips of the others"
    )
