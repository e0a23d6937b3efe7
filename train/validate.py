"""Held-out loss at fixed noise levels: the same clips, noise and t for every model that is compared.

Letters: B clips, E experts, N held-out clips, T noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .data.batch import Batch, LabelGates, collate
from .data.shards import ShardDataset
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
) -> Tensor:
    """Flow-matching loss per clip and noise level, [N, T], whole on every rank of the process group if there
    is one.

    Args:
        predict: (x_t [B, ...], t [B], batch) -> v. Called equally often on all ranks, as ZeRO-3 needs.
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    losses = torch.zeros(len(dataset), len(levels), device=device)
    for indices, counted in _rounds(list(dataset.buckets.values()), batch, rank, world):
        own = indices if counted else []
        clips = collate([dataset[index] for index in indices], indices, gates)
        latent = clips.latent.to(device, torch.float32)
        for column, level in enumerate(levels):
            t = torch.full((len(indices),), level, device=device)
            x_t, target = noised(latent, _noise(clips, level).to(device), t)
            loss = flow_matching_loss(predict(x_t, t, clips), target)
            if own:
                losses[own, column] = loss
    if distributed:
        dist.all_reduce(losses)
    return losses.cpu()


def _rounds(
    buckets: Sequence[Sequence[int]], batch: int, rank: int, world: int
) -> Iterator[tuple[list[int], bool]]:
    """The samples of each forward of this rank, of one size, and whether they count.

    A rank that has run out repeats a clip, uncounted, so that all ranks do the same forwards.
    """
    for bucket in buckets:
        for first in range(0, len(bucket), batch * world):
            own = list(bucket[first + rank * batch : first + (rank + 1) * batch])
            yield own or [bucket[0]], bool(own)


def _noise(clips: Batch, level: float) -> Tensor:
    return torch.stack(
        [
            torch.randn(latent.shape, generator=sample_generator(NOISE_SEED, index, f"held-out/{level}"))
            for index, latent in zip(clips.positions, clips.latent, strict=True)
        ]
    )
