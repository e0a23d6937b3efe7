"""From shards to the batches of one rank: which samples, in which order, with which gates by label.

Letters: B clips, C latent channels, F, H, W latent frames, height, width, E experts, D text width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...moe_lora import ExpertSet, RouterConfig, WanmoeError
from ...moe_lora.routing import RuleRouter, pool_text
from .order import batch_indices
from .shards import Sample, ShardDataset


class Batch(NamedTuple):
    """Clips of one forward on one rank, on the host."""

    positions: list[int]
    """Place of each clip in the endless sample order: the seed of its noise and t."""
    keys: list[str]
    latent: Tensor
    """[B, C, F, H, W]"""
    context: list[Tensor]
    """B x [n, D]"""
    pooled: Tensor
    """[B, D]"""
    rule: Tensor
    """[B, E]: gates by label."""
    image_latent: Tensor | None
    """[B, 20, F, H, W] for i2v."""


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


def check_labels(dataset: ShardDataset, gates: LabelGates, every: bool = True) -> list[str]:
    """Experts that no clip of a dataset shows; raises WanmoeError for a label that no expert has.

    Args:
        every: a clip without a label is an error too.
    """
    total = torch.zeros(len(gates.rule.experts))
    for index, key in enumerate(dataset.keys):
        if every or dataset.instruments(index):
            total += gates(key, dataset.instruments(index))
    return [name for name, weight in zip(gates.rule.experts.names, total, strict=True) if weight == 0]


def collate(samples: Sequence[Sample], positions: Sequence[int], gates: LabelGates) -> Batch:
    """Stacks samples of one size."""
    images = [sample.image_latent for sample in samples]
    return Batch(
        positions=list(positions),
        keys=[sample.key for sample in samples],
        latent=torch.stack([sample.latent for sample in samples]),
        context=[sample.context for sample in samples],
        pooled=pool_text([sample.context for sample in samples]),
        rule=torch.stack([gates(s.key, s.instruments) for s in samples]),
        image_latent=None if images[0] is None else torch.stack([i for i in images if i is not None]),
    )


def main_instrument(dataset: ShardDataset, index: int) -> str:
    """Name of the instrument with the largest weight of a sample; "" without any."""
    return max(dataset.instruments(index), key=lambda pair: pair[1], default=("", 0.0))[0]


def instrument_weights(dataset: ShardDataset) -> list[float]:
    """Sampling weights that draw every instrument equally often: 1 / clips of its main instrument."""
    main = [main_instrument(dataset, index) for index in range(len(dataset))]
    counts = Counter(main)
    return [1 / counts[name] for name in main]


class TrainBatches:
    """Endless batches of one rank from a given step on; the same samples for any number of ranks.

    The global batch of a step is batch x world x accumulation consecutive positions of the sample order;
    forward m of rank r takes the (m * world + r)-th run of `batch` positions.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        gates: LabelGates,
        *,
        batch: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        balanced: bool,
        workers: int,
        caption_dropout: float = 0.0,
    ) -> None:
        self.dataset, self.gates, self.workers = dataset, gates, workers
        self.batch, self.accumulation, self.rank, self.world, self.seed = (
            batch,
            accumulation,
            rank,
            world,
            seed,
        )
        self.weights = instrument_weights(dataset) if balanced else None
        dataset.bucket  # noqa: B018 - raises where the samples differ in size
        self.null_context = dataset.null_context
        if caption_dropout and self.null_context is None:
            raise WanmoeError(
                f"{dataset.root}: prepared without the encoding of an empty caption; prepare the clips again "
                "or set data.caption_dropout = 0"
            )

    @property
    def global_batch(self) -> int:
        return self.batch * self.world * self.accumulation

    def positions(self, step: int, micro: int) -> list[int]:
        """Positions in the sample order of one forward of this rank."""
        first = step * self.global_batch + (micro * self.world + self.rank) * self.batch
        return list(range(first, first + self.batch))

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        """accumulation batches for each of the steps start .. stop - 1."""
        planned = [
            self.positions(step, micro) for step in range(start, stop) for micro in range(self.accumulation)
        ]
        loader = DataLoader(
            _Positions(self.dataset, self.seed, self.weights),
            batch_sampler=planned,
            collate_fn=partial(_collate_positions, gates=self.gates),
            num_workers=self.workers,
        )
        return iter(loader)


def _collate_positions(pairs: Sequence[tuple[int, Sample]], gates: LabelGates) -> Batch:
    return collate([sample for _, sample in pairs], [position for position, _ in pairs], gates)


class _Positions(torch.utils.data.Dataset[tuple[int, Sample]]):
    """The dataset seen through the sample order: item p is (p, the sample at position p)."""

    def __init__(self, dataset: ShardDataset, seed: int, weights: list[float] | None) -> None:
        self.dataset, self.seed, self.weights = dataset, seed, weights

    def __getitem__(self, position: int) -> tuple[int, Sample]:
        (index,) = batch_indices(
            position, global_batch=1, n=len(self.dataset), seed=self.seed, weights=self.weights
        )
        return position, self.dataset[index]
