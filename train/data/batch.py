"""The batch of one forward: clips of one size, with their gates by label.

Letters: B clips, C latent channels, F, H, W latent frames, height, width, E experts, D text width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...moe_lora import ExpertSet, RouterConfig, WanmoeError
from ...moe_lora.routing import RuleRouter, pool_text
from .shards import Sample, ShardIndex


class Fault(NamedTuple):
    """A sample that could not be read, and why, in one line."""

    key: str
    reason: str


class Batch(NamedTuple):
    """Clips of one forward on one rank, on the host."""

    positions: list[int]
    """Place of each clip in the endless sample order: the seed of its noise and t."""
    keys: list[str]
    latent: Tensor
    """[B, C, F, H, W], as stored: fp16 or bf16."""
    context: list[Tensor]
    """B x [n, D]"""
    pooled: Tensor
    """[B, D]"""
    rule: Tensor
    """[B, E]: gates by label."""
    image_latent: Tensor | None
    """[B, 20, F, H, W] for i2v."""
    roi: Tensor | None
    """[B, F, H, W], 1 = instrument; a clip that says nothing of it is 1 all over, None where none says."""
    picture: Tensor | None
    """[B, H, W], 0 = the endoscope's border; 1 and None likewise."""
    flow: Tensor | None
    """[B, F - 1, 2, H, W]: (x, y) in latent pixels from latent frame k + 1 back to k; None unless all have
    it, and `visible` with it."""
    visible: Tensor | None
    """[B, F - 1, H, W], 1 = seen in both."""
    faults: list[Fault]
    """Samples that could not be read and have been replaced."""


class LabelGates:
    """Gates [E] of a sample by its labels, which `wanmoe prepare` took from the clip list or the caption.

    Args:
        needed: whether a sample without any label is an error (stages that route by label).
    """

    def __init__(self, experts: ExpertSet, router: RouterConfig, needed: bool) -> None:
        self.rule = RuleRouter(experts, router.top_k, router.temperature)
        self.needed = needed

    def __call__(self, key: str, instruments: Sequence[tuple[str, float]]) -> Tensor:
        try:
            gates = self.rule.route(labels=instruments)
        except WanmoeError as error:
            if not self.needed:
                return torch.zeros(len(self.rule.experts))
            raise WanmoeError(
                f"sample {key}: {error}; name the instruments of your clips under adapter.experts"
            ) from error
        if self.needed and not gates.sum() > 0:
            raise WanmoeError(
                f"sample {key} has no instrument label, but this stage routes by label; label the clip (or "
                "add keywords under adapter.experts) and prepare again, or set adapter.fallback"
            )
        return gates


def check_labels(dataset: ShardIndex, gates: LabelGates, every: bool = True) -> list[str]:
    """Experts that no clip of a dataset shows; raises WanmoeError for a label that no expert has.

    Args:
        every: a clip without a label is an error too.
    """
    total = torch.zeros(len(gates.rule.experts))
    for index, key in enumerate(dataset.keys):
        if every or dataset.instruments(index):
            total += gates(key, dataset.instruments(index))
    return [name for name, weight in zip(gates.rule.experts.names, total, strict=True) if weight == 0]


def collate(
    samples: Sequence[Sample], positions: Sequence[int], gates: LabelGates, faults: Sequence[Fault] = ()
) -> Batch:
    """Stacks samples of one size."""
    size = samples[0].latent.shape[1:]
    return Batch(
        positions=list(positions),
        keys=[sample.key for sample in samples],
        latent=torch.stack([sample.latent for sample in samples]),
        context=[sample.context for sample in samples],
        pooled=pool_text([sample.context for sample in samples]),
        rule=torch.stack([gates(s.key, s.instruments) for s in samples]),
        image_latent=_stack([sample.image_latent for sample in samples]),
        roi=_masks([sample.roi for sample in samples], size),
        picture=_masks([sample.picture for sample in samples], size[1:]),
        flow=_stack([sample.flow for sample in samples]),
        visible=_stack([sample.visible for sample in samples]),
        faults=list(faults),
    )


def _masks(values: Sequence[Tensor | None], size: Sequence[int]) -> Tensor | None:
    """Stacked, with ones where a clip says nothing, so that no clip depends on those beside it."""
    if all(value is None for value in values):
        return None
    return torch.stack([torch.ones(*size) if value is None else value for value in values])


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    given = [value for value in values if value is not None]
    return torch.stack(given) if len(given) == len(values) else None


def main_instrument(dataset: ShardIndex, index: int) -> str:
    """Name of the instrument with the largest weight of a sample; "" without any."""
    return max(dataset.instruments(index), key=lambda pair: pair[1], default=("", 0.0))[0]


def instrument_weights(dataset: ShardIndex) -> list[float]:
    """Sampling weights that draw every instrument equally often: 1 / clips of its main instrument."""
    main = [main_instrument(dataset, index) for index in range(len(dataset))]
    counts = Counter(main)
    return [1 / counts[name] for name in main]
