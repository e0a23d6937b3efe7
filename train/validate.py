"""Held-out errors at fixed noise levels: the same clips, noise and t for every model that is compared.

Letters: B clips, E experts, N held-out clips, T noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe_lora import WanmoeError
from .data.batch import Batch, Fault, LabelGates, collate
from .data.shards import Sample, ShardDataset, ShardError
from .losses import flow_matching_loss, roi_error, squared_error
from .noise import noised, sample_generator

if TYPE_CHECKING:
    from .routed import Routed

# Quantiles of t within the side that a model serves.
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Not the seed of the run: runs of different seeds are compared on the same noise.
NOISE_SEED = 0

Predict = Callable[[Tensor, Tensor, Batch], "Routed"]


class HeldOut(NamedTuple):
    """Errors of every held-out clip; one that could not be read is 0 all along. A NaN is the model's own."""

    loss: Tensor
    """[N, T]: flow-matching error."""
    roi: Tensor
    """[N, T]: its mean inside the instruments' region; 0 for clips without one."""
    gates: Tensor
    """[N, E]: what the model got of each expert, before band and alpha."""
    read: Tensor
    """[N], bool"""
    has_region: Tensor
    """[N], bool"""


def levels_within(side: tuple[float, float]) -> tuple[float, ...]:
    """The nine fixed quantiles of one side of the boundary."""
    return tuple(round(side[0] + (side[1] - side[0]) * share, 4) for share in LEVELS)


@torch.no_grad()
def held_out_errors(
    predict: Predict,
    dataset: ShardDataset,
    gates: LabelGates,
    *,
    levels: Sequence[float] = LEVELS,
    batch: int = 8,
    device: torch.device | str = "cpu",
    faults: list[Fault] | None = None,
    shared_by: int = 1,
) -> HeldOut:
    """Errors per clip and noise level, whole on every rank of the process group if there is one.

    Args:
        predict: (x_t [B, ...], t [B], batch) -> v and gates. Called equally often on all ranks, as ZeRO-3
            needs.
        faults: takes the clips that this rank could not read; without it the first of them is raised as
            ShardError.
        shared_by: consecutive ranks that share each clip (`WanDiT.sequence`) and find the same.
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    counts = rank % shared_by == 0
    rank, world = rank // shared_by, world // shared_by
    experts, columns = len(gates.rule.experts), len(levels)
    # Per clip: the error at each level, that of its region, its gates, and whether it was read and has one.
    figures = torch.zeros(len(dataset), 2 * columns + experts + 2, device=device)
    for indices, spare in _rounds(list(dataset.buckets.values()), batch, rank, world):
        samples = _read(dataset, indices, faults)
        own = list(samples)
        # A rank that has nothing to count repeats a clip, so that all ranks do the same forwards.
        samples = samples or _first(dataset, spare)
        indices = list(samples)
        clips = collate(list(samples.values()), indices, gates)
        latent = clips.latent.to(device, torch.float32)
        picture = None if clips.picture is None else clips.picture.to(device)
        for column, level in enumerate(levels):
            t = torch.full((len(indices),), level, device=device)
            x_t, target = noised(latent, _noise(clips, level).to(device), t)
            routed = predict(x_t, t, clips)
            if own:
                error = squared_error(routed.v, target)
                figures[own, column] = flow_matching_loss(error, picture)
                for index, one in zip(own, error, strict=True):
                    if (roi := samples[index].roi) is not None:
                        figures[index, columns + column] = roi_error(one[None], roi[None].to(error))[0]
                figures[own, 2 * columns : -2] = routed.kept.float()
        for index in own:
            figures[index, -2] = 1
            region = samples[index].roi
            figures[index, -1] = float(region is not None and bool(region.any()))
    if distributed:
        dist.all_reduce(figures.mul_(float(counts)))
    loss, roi, kept, read, region = figures.cpu().split([columns, columns, experts, 1, 1], dim=1)
    return HeldOut(loss, roi, kept, read[:, 0] > 0, region[:, 0] > 0)


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
