"""How loud the experts are at a noise level: by bands, by a ramp, or by a smooth factor of each that is
learned.

Letters: B clips, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

# Close to the default bands: 0.05 at t = 0.1, 0.65 at 0.4, above 0.95 from 0.6 on.
CENTER, SLOPE = 0.35, 12.0


def band(t: Tensor, bands: Sequence[tuple[float, float]]) -> Tensor:
    """Piecewise constant factor of the expert gates at noise level t [B] -> [B]; no host sync."""
    factor = torch.full_like(t, bands[0][1])
    for start, value in bands[1:]:
        factor = torch.where(t >= start, torch.full_like(t, value), factor)
    return factor


def ramp(t: Tensor, points: Sequence[tuple[float, float]]) -> Tensor:
    """Piecewise linear through (t, value) points, constant before the first and after the last: t [B] -> [B];
    no host sync."""
    value = torch.full_like(t, points[0][1])
    for (start, low), (stop, high) in pairwise(points):
        value = value + (high - low) * ((t - start) / (stop - start)).clamp(0, 1)
    return value


class TimeGate(nn.Module):
    """sigmoid(slope (t - center)) of each expert, in (0, 1): t [B] -> [B, E]; starts close to the bands.

    It holds the logarithm of the slope: louder towards noise is what it can learn, never the reverse.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.full((experts,), CENTER))
        self.slope = nn.Parameter(torch.full((experts,), math.log(SLOPE)))

    def forward(self, t: Tensor) -> Tensor:
        wide = torch.promote_types(self.center.dtype, torch.float32)
        return torch.sigmoid(self.slope.to(wide).exp() * (t.to(wide)[:, None] - self.center.to(wide)))
