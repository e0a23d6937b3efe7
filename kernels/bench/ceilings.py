"""What this machine can do at all, measured in the same run: a large copy, and products at our shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .timing import Protocol, Timed, interleaved, percentile


@dataclass(frozen=True)
class MatmulCeiling:
    """torch.mm of [tokens, d_in] and [d_in, d_out]."""

    tokens: int
    d_in: int
    d_out: int
    tflops: float


@dataclass(frozen=True)
class Ceilings:
    """Of one device and dtype."""

    dtype: str
    copy_tbps: float
    """TB/s of a device-to-device copy, bytes read and bytes written both counted."""
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
    """shapes: (tokens, d_in, d_out); copy_bytes: of the buffer; by default far above any cache."""
    copy_tbps = _copy_tbps(copy_bytes or (1 << 30 if device.type == "cuda" else 256 << 20), device, protocol)
    matmuls = []
    for tokens, d_in, d_out in sorted(set(shapes)):
        pairs = [
            (
                torch.randn(tokens, d_in, device=device, dtype=dtype),
                torch.randn(d_in, d_out, device=device, dtype=dtype),
            )
            for _ in range(2)
        ]
        product = Timed("mm", pairs.__getitem__, lambda pair: torch.mm(*pair))
        samples = interleaved([product], device=device, sets=2, protocol=protocol)["mm"]
        tflops = 2 * tokens * d_in * d_out / percentile(samples, 0.5) / 1e9
        matmuls.append(MatmulCeiling(tokens, d_in, d_out, tflops))
    return Ceilings(str(dtype).removeprefix("torch."), copy_tbps, tuple(matmuls))


def _copy_tbps(size: int, device: torch.device, protocol: Protocol) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Timed("copy", lambda index: None, lambda given: target.copy_(source))
    samples = interleaved([copy], device=device, sets=1, protocol=protocol)["copy"]
    return 2 * size / percentile(samples, 0.5) / 1e9
