"""The two small nets that judge a latent: which instrument it shows, and where the instrument's tip is.

Both are plain 3-D convolutions at the resolution of the latent, normalised at each cell over the channels
alone: no statistic runs over a batch or over the extent of a clip, so a crop is judged as the whole is, and
any F, H, W goes in.

Letters: B clips, C channels, D width of the net, F, H, W latent frames, height, width, K classes. A cell is
one place of the latent grid: 8 x 8 pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from ...moe_lora.wan.codec import CHANNELS, SPACE_STRIDE, TIME_STRIDE

WIDTH = 32
DILATIONS = (1, 2, 4)
"""Of the trunk's blocks. A cell sees 8 cells (64 pixels) around it."""
CROP = (6, 24, 24)
"""Latent frames, height and width of what is trained on at most: 21 frames of 192 x 192 pixels."""
PATCH = 3 * TIME_STRIDE * SPACE_STRIDE**2
_PRIOR = -4.0  # first logit of the heat: a tip is in one cell of fifty
_FLOOR = 1e-8  # share that a cell outside of the region keeps: its logarithm must be finite


class CellNorm(nn.Module):
    """Scales each cell to a root mean square of 1 over the channels, then by a learned weight per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, F, H, W] -> the same."""
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """A residual 3 x 3 x 3 convolution, `dilation` cells apart in height and width."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = CellNorm(width)
        apart = (1, dilation, dilation)
        self.conv = nn.Conv3d(width, width, 3, padding=apart, dilation=apart)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, F, H, W] -> the same."""
        y: Tensor = x + self.conv(fn.silu(self.norm(x)))
        return y


class Trunk(nn.Module):
    """Features of each cell: a convolution and one residual block per dilation."""

    def __init__(self, channels: int, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv3d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, dilation) for dilation in dilations))
        self.norm = CellNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, D, F, H, W]."""
        y: Tensor = fn.silu(self.norm(self.blocks(self.stem(x))))
        return y


class ClassifierNet(nn.Module):
    """Logits of the instrument, from a weighted mean of the features of the cells.

    The net gives each cell a weight (a softmax over all cells of the clip). With a region, widened by one
    cell, the input outside is 0 and so is its weight, so the scene cannot be read; without one, the weights
    are what it learned to be the instrument.

    Args:
        channels: of a cell: those of a latent, or `PATCH` pixels (`patches`), which are first made as few.
    """

    def __init__(self, classes: int, channels: int = CHANNELS, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = None if channels == CHANNELS else nn.Conv3d(channels, CHANNELS, 1)
        self.trunk = Trunk(CHANNELS, width, DILATIONS)
        self.score = nn.Conv3d(width, 1, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, cells: Tensor, roi: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cells [B, C, F, H, W] and region [B, F, H, W] -> logits [B, K], and the weights of the cells
        [B, F, H, W], which sum to 1 in each clip. A clip whose region is empty is judged as without one."""
        region = None if roi is None else widened(roi)[:, None]
        if region is not None:
            cells = cells * region
        features = self.trunk(cells if self.embed is None else self.embed(cells))
        score = self.score(features)
        if region is not None:
            score = score + torch.log(region.clamp(min=_FLOOR))
        weights = torch.softmax(score.flatten(1), 1)
        pooled = torch.einsum("bdn,bn->bd", features.flatten(2), weights)
        return self.head(pooled), weights.view(score[:, 0].shape)


class DetectorNet(nn.Module):
    """A heat map of tips and where in, or beside, its cell each one is."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.trunk = Trunk(CHANNELS, width, DILATIONS)
        self.head = nn.Conv3d(width, 3, 1)
        self.prior: Tensor
        self.register_buffer("prior", torch.tensor(_PRIOR), persistent=False)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 16, F, H, W] -> heat [B, F, H, W], logits; offsets [B, 2, F, H, W], (x, y) in cells from the
        middle of the cell."""
        out = self.head(self.trunk(latent))
        return out[:, 0] + self.prior, out[:, 1:]


def widened(roi: Tensor) -> Tensor:
    """A region [B, F, H, W] in [0, 1] grown by one cell in height and width; a clip without any is all 1."""
    grown = fn.max_pool2d(roi, 3, 1, 1)
    empty = roi.amax((1, 2, 3), keepdim=True) <= 0
    return torch.where(empty, torch.ones_like(grown), grown)


def patches(video: Tensor) -> Tensor:
    """Video [B, 3, F', H', W'] in [-1, 1] as cells [B, 768, F, H, W] of the latent grid.

    As the codecs group it: frame 0 alone, here four times, then groups of four; F = (F' - 1) / 4 + 1, H =
    H' / 8, W = W' / 8.
    """
    video = torch.cat([video[:, :, :1].expand(-1, -1, TIME_STRIDE - 1, -1, -1), video], 2)
    cells = video.unflatten(4, (-1, SPACE_STRIDE)).unflatten(3, (-1, SPACE_STRIDE))
    cells = cells.unflatten(2, (-1, TIME_STRIDE))  # [B, 3, F, 4, H, 8, W, 8]
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
