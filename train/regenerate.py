"""Clips that a model makes again out of held-out ones, so that it can be seen what is still in them.

A held-out clip is noised to `start` (0.8) and integrated back to 0. A small model cannot draw an instrument
out of noise alone; at 0.8 a hint of the true clip is left, so that what comes back can be held against it.

Letters: B clips, C latent channels, F, H, W latent frames, height, width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..moe_lora import WanmoeError
from .data.batch import Batch, LabelGates, collate
from .data.shards import ShardDataset
from .noise import noised, sample_generator
from .validate import NOISE_SEED

START, STEPS = 0.8, 8

Velocity = Callable[[Tensor, Tensor, Batch], Tensor]


@torch.no_grad()
def regenerate(
    velocity: Velocity,
    dataset: ShardDataset,
    gates: LabelGates,
    *,
    batch: int = 8,
    steps: int = STEPS,
    start: float = START,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch of held-out clips and the latents [B, C, F, H, W] that came back, one by one; with the same
    noise for every model.

    Args:
        velocity: (x_t [B, ...], t [B], batch) -> v.
        steps: of Euler's method from `start` to 0, equal in t.
        start: noise level; 1 is noise alone.
    """
    if steps < 1:
        raise WanmoeError(f"regenerate: steps is {steps}; it must be at least 1")
    if not 0 < start <= 1:
        raise WanmoeError(f"regenerate: start is {start}; it must be above 0 and at most 1")
    for indices in dataset.buckets.values():
        for first in range(0, len(indices), batch):
            chosen = indices[first : first + batch]
            clips = collate([dataset[index] for index in chosen], chosen, gates)
            streams = [sample_generator(NOISE_SEED, index, "regenerate") for index in chosen]
            noise = torch.stack([torch.randn(clips.latent.shape[1:], generator=stream) for stream in streams])
            x, _ = noised(clips.latent.float(), noise, torch.full((len(chosen),), start))
            for step in range(steps):
                t = start * (1 - step / steps)
                x = x - start / steps * velocity(x, torch.full((len(chosen),), t), clips).float()
            yield clips, x
