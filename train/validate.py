"""Held-out loss at fixed noise levels: the same clips, noise and t for every model that is compared.

Letters: B clips, E experts, N held-out clips, T noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe_lora import WanmoeError
from .data.batch import Batch, Fault, LabelGates, collate
from .data.shards import Sample, ShardDataset, ShardError
from .objective import flow_matching_loss, noised, sample_generator

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Not the seed of the run: runs of different seeds are compared on the same noise.
NOISE_SEED = 0

Predict = Callable[[Tensor, Tensor, Batch], Tensor]


def levels_within(t_range: tuple[float, float]) -> tuple[float, ...]:
    """The fixed levels of one side of the boundary; its middle where none lies inside."""
    inside = tuple(t for t in LEVELS if t_range[0] <= t <= t_range[1])
    return inside or (round(sum(t_range) / 2, 3),)


@torch.no_grad()
def held_out_losses(
    predict: Predict,
    dataset: ShardDataset,
    gates: LabelGates,
    *,
    levels: Sequence[float] = LEVELS,
    batch: int = 8,
    device: torch.device | str = "cpu",
    faults: list[Fault] | None = None,
) -> Tensor:
    """Flow-matching loss per clip and noise level, [N, T], whole on every rank of the process group if there
    is one.

    Args:
        predict: (x_t [B, ...], t [B], batch) -> v. Called equally often on all ranks, as ZeRO-3 needs.
        faults: takes the clips that this rank could not read, whose losses are then NaN; without it the
            first of them is raised as ShardError.
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    losses = torch.zeros(len(dataset), len(levels), device=device)
    read = torch.zeros(len(dataset), 1, device=device)
    for indices, spare in _rounds(list(dataset.buckets.values()), batch, rank, world):
        samples = _read(dataset, indices, faults)
        own = list(samples)
        # A rank that has nothing to count repeats a clip, so that all ranks do the same forwards.
        samples = samples or _first(dataset, spare)
        indices = list(samples)
        clips = collate(list(samples.values()), indices, gates)
        latent = clips.latent.to(device, torch.float32)
        for column, level in enumerate(levels):
            t = torch.full((len(indices),), level, device=device)
            x_t, target = noised(latent, _noise(clips, level).to(device), t)
            loss = flow_matching_loss(predict(x_t, t, clips), target)
            if own:
                losses[own, column] = loss
        read[own] = 1
    if distributed:
        dist.all_reduce(losses)
        dist.all_reduce(read)
    return losses.masked_fill(read == 0, math.nan).cpu()


def _rounds(
    buckets: Sequence[Sequence[int]], batch: int, rank: int, world: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """The samples of each forward of this rank, of one size, and all that there are of this size."""
    for bucket in buckets:
        for first in range(0, len(bucket), batch * world):
            yield bucket[first + rank * batch : first + (rank + 1) * batch], bucket


def _read(dataset: ShardDataset, indices: Sequence[int], faults: list[Fault] | None) -> dict[int, Sample]:
    samples = {}
    for index in indices:
        try:
            samples[index] = dataset[index]
        except ShardError as error:
            if faults is None:
                raise
            faults.append(Fault(dataset.keys[index], str(error)))
    return samples


def _first(dataset: ShardDataset, indices: Sequence[int]) -> dict[int, Sample]:
    """The first of some samples that can be read."""
    unread: list[Fault] = []
    for index in indices:
        if found := _read(dataset, [index], unread):
            return found
    raise WanmoeError(f"{dataset.root}: no held-out clip of one size can be read: {unread[-1].reason}")


def _noise(clips: Batch, level: float) -> Tensor:
    return torch.stack(
        [
            torch.randn(latent.shape, generator=sample_generator(NOISE_SEED, index, f"held-out/{level}"))
            for index, latent in zip(clips.positions, clips.latent, strict=True)
        ]
    )
