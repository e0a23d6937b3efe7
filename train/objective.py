"""Flow matching: where t is drawn, the noised latent, its target and loss.

Letters: B clips, C latent channels, F, H, W latent frames, height, width. t is sigma in [0, 1], 1 is pure
noise.
"""

from __future__ import annotations

import math

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


def _t_of(u: Tensor, config: ObjectiveConfig) -> Tensor:
    if config.t_sampling == "logit_normal":
        u = torch.sigmoid(config.t_mean + config.t_std * torch.special.ndtri(u))
    return config.t_shift * u / (1 + (config.t_shift - 1) * u)


def _quantile_of(t: float, config: ObjectiveConfig) -> float:
    """Inverse of `_t_of`."""
    u = t / (config.t_shift - (config.t_shift - 1) * t)
    if config.t_sampling == "logit_normal" and 0 < u < 1:
        z = (math.log(u / (1 - u)) - config.t_mean) / config.t_std
        u = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    return u


def sample_generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """The random stream of one sample: a function of (run seed, position in the sample order, purpose) alone.

    So noise and t do not depend on rank, world size or what came before, and there is no stream to restore.
    """
    return seeded_generator(seed, position, purpose)


def noised(latent: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, target v) of clean latents [B, C, F, H, W] at t [B]: x_t = (1 - t) x0 + t noise, v = noise -
    x0."""
    s = t.view(-1, 1, 1, 1, 1).to(latent.dtype)
    return (1 - s) * latent + s * noise, noise - latent


def flow_matching_loss(v: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per clip in fp32: [B, C, F, H, W] -> [B]."""
    return (v.float() - target.float()).pow(2).flatten(1).mean(1)
