"""Where t is drawn, and the noised latent with its target.

Letters: B clips, C latent channels, F, H, W latent frames, height, width. t is sigma in [0, 1], 1 is pure
noise.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..moe_lora.seeding import seeded_generator
from .config import ObjectiveConfig


def draw_t(u: Tensor, config: ObjectiveConfig, t_range: tuple[float, float]) -> Tensor:
    """Maps uniform u in [0, 1) to t, distributed as configured and sliced exactly to t_range.

    Every distribution is a rising function of u, so its slice is a slice of u: no rejection, no rescaling,
    and the shape inside the range stays that of the whole distribution.
    """
    low, high = (_quantile_of(bound, config) for bound in t_range)
    t = _t_of(low + (high - low) * u.double(), config)
    return t.clamp(*t_range).float()


def share_above(boundary: float, config: ObjectiveConfig, t_range: tuple[float, float]) -> float:
    """What lies above a noise level of the distribution of t within a range."""
    low, middle, high = (_quantile_of(t, config) for t in (t_range[0], boundary, t_range[1]))
    return min(max((high - middle) / (high - low), 0.0), 1.0)


def _t_of(u: Tensor, config: ObjectiveConfig) -> Tensor:
    if config.t_sampling in ("logit_normal", "sigmoid", "shift"):
        mean = config.t_mean if config.t_sampling == "logit_normal" else 0.0
        u = torch.sigmoid(mean + config.t_std * torch.special.ndtri(u))
    elif config.t_sampling == "mode":
        u = _mode(u, config.t_mode)
    return config.t_shift * u / (1 + (config.t_shift - 1) * u)


def _mode(u: Tensor, scale: float) -> Tensor:
    """Mode sampling with heavy tails (Esser et al. 2024, section 3.1), turned so that it rises with u."""
    down = 1 - u
    return 1 - down - scale * (torch.cos(math.pi / 2 * down) ** 2 - 1 + down)


def _quantile_of(t: float, config: ObjectiveConfig) -> float:
    """Inverse of `_t_of`."""
    return _quantile(t, config.t_sampling, config.t_shift, config.t_mean, config.t_std, config.t_mode)


@lru_cache
def _quantile(t: float, sampling: str, shift: float, mean: float, std: float, mode: float) -> float:
    u = t / (shift - (shift - 1) * t)
    if sampling in ("logit_normal", "sigmoid", "shift") and 0 < u < 1:
        z = (math.log(u / (1 - u)) - (mean if sampling == "logit_normal" else 0.0)) / std
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))
    if sampling == "mode" and 0 < u < 1:
        low, high = 0.0, 1.0
        for _ in range(60):  # it has no closed inverse; 60 halvings are all bits of a double
            middle = (low + high) / 2
            below = float(_mode(torch.tensor(middle, dtype=torch.float64), mode)) < u
            low, high = (middle, high) if below else (low, middle)
        return (low + high) / 2
    return u


def sample_generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """The random stream of one sample: a function of (run seed, position in the sample order, purpose) alone.

    So noise and t do not depend on rank, world size or what came before, and there is no stream to restore.
    """
    return seeded_generator(seed, position, purpose)


def strata(seed: int, position: int, global_batch: int) -> tuple[float, float]:
    """The share (first, width) of [0, 1) that the clip at `position` of the sample order draws from.

    Each clip of a global batch has another of as many equal shares, so a step sees the whole distribution
    whatever its number of ranks and forwards.
    """
    step, place = divmod(position, global_batch)
    order = torch.randperm(global_batch, generator=seeded_generator(seed, step, "strata"))
    return float(order[place]) / global_batch, 1 / global_batch


def noised(latent: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, target v) of clean latents [B, C, F, H, W] at t [B]: x_t = (1 - t) x0 + t noise, v = noise -
    x0."""
    s = t.view(-1, 1, 1, 1, 1).to(latent.dtype)
    return (1 - s) * latent + s * noise, noise - latent
