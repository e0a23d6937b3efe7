"""Rotary embedding over the (frame, row, column) grid of video tokens, as in Wan.

Letters: B clips, L tokens, K head width, P = K / 2 rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rope_tables"]

_THETA = 10000.0


def rope_tables(
    grid: tuple[int, int, int], head_dim: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's rotation angles, each [L, P], tokens in F, H, W order.

    The P pairs are split into P - 2 * (P // 3) for time and P // 3 each for height and width. Angles are
    computed in float64, since a frame index times a float32 frequency is off by more than bf16 can hide.
    """
    pairs = head_dim // 2
    third = pairs // 3
    angles = []
    for axis, (size, count) in enumerate(zip(grid, (pairs - 2 * third, third, third), strict=True)):
        exponents = torch.arange(count, dtype=torch.float64, device=device) / max(count, 1)
        positions = torch.arange(size, dtype=torch.float64, device=device)
        shape = [1, 1, 1, count]
        shape[axis] = size
        angles.append(torch.outer(positions, _THETA**-exponents).view(shape).expand(*grid, count))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)
