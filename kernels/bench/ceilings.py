"""What this machine can do at all, measured in the same run: copies, and products at our shapes.

Each is the best of its repeats, since what happened once is possible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .timing import Protocol, Timed, interleaved


@dataclass(frozen=True)
class MatmulCeiling:
    """A product of [tokens, d_in] and [d_in, d_out]: the faster of both layouts of the latter."""

    tokens: int
    d_in: int
    d_out: int
    tflops: float


@dataclass(frozen=True)
class Ceilings:
    """Of one device and dtype."""

    dtype: str
    copy_tbps: float
    """TB/s of a device-to-device copy, bytes read and bytes written both counted; on the CPU, where a problem
    may lie in a cache, of the size that is copied fastest."""
    matmuls: tuple[MatmulCeiling, ...]

    @property
    def tflops(self) -> float:
        """The fastest matrix product that was measured."""
        return max(matmul.tflops for matmul in self.matmuls)

    def floor_ms(self, flops: float, moved: float) -> float:
        """No version runs much faster than this: the larger of arithmetic and bytes at their ceilings."""
        return 1e3 * max(flops / (self.tflops * 1e12), moved / (self.copy_tbps * 1e12))


def measure_ceilings(
    shapes: Iterable[tuple[int, int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    protocol: Protocol,
    copy_bytes: int | None = None,
) -> Ceilings:
    """shapes: (tokens, d_in, d_out); copy_bytes: of the buffer; by default far above any cache on a GPU, and
    several sizes on the CPU."""
    sizes = (1 << 30,) if device.type == "cuda" else (1 << 20, 16 << 20, 256 << 20)
    copy_tbps = max(_copy_tbps(size, device, protocol) for size in ((copy_bytes,) if copy_bytes else sizes))
    matmuls = []
    for tokens, d_in, d_out in sorted(set(shapes)):
        pairs = [
            (
                torch.randn(tokens, d_in, device=device, dtype=dtype),
                torch.randn(d_in, d_out, device=device, dtype=dtype),
            )
            for _ in range(2)
        ]
        # A linear's weight is [d_out, d_in]: forward and backward read it in one layout each.
        stored = [(x, weight.t().contiguous().t()) for x, weight in pairs]
        products = [
            Timed("rows", pairs.__getitem__, lambda pair: torch.mm(*pair)),
            Timed("columns", stored.__getitem__, lambda pair: torch.mm(*pair)),
        ]
        samples = interleaved(products, device=device, sets=2, protocol=protocol)
        tflops = 2 * tokens * d_in * d_out / min(map(min, samples.values())) / 1e9
        matmuls.append(MatmulCeiling(tokens, d_in, d_out, tflops))
    return Ceilings(str(dtype).removeprefix("torch."), copy_tbps, tuple(matmuls))


def _copy_tbps(size: int, device: torch.device, protocol: Protocol) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Timed("copy", lambda index: None, lambda given: target.copy_(source))
    samples = interleaved([copy], device=device, sets=1, protocol=protocol)["copy"]
    return 2 * size / min(samples) / 1e9
