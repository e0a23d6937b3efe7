"""What a low-rank branch should cost, from passes over memory: the model behind every "modelled" figure.

The base product is bound by arithmetic and the branch by memory, so the branch's overhead hardly depends on
the number of tokens: count how often it reads or writes x, y and h, and divide by the base product's time.
Backward: x stands for x and dx, y for dy.

Letters: N tokens, R packed rank of one linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BACKWARD", "CARDS", "FORWARD", "Card", "Passes", "Shape", "added", "overhead", "table"]

_SPLITS = 8
"""Token splits of a fixed-order dA: each writes an fp32 partial, which is read once."""


_TILE = 256
"""Outputs of a tile of up_grad."""


class Card(NamedTuple):
    """Rates of one device: of a datasheet and one measurement, or this run's ceilings."""

    name: str
    tflops: float
    tbps: float


CARDS = (Card("A100", 312, 2.0), Card("H100", 800, 3.0), Card("4090", 165, 1.0))
"""bf16; the H100's rates were measured once, the others are the makers'."""


class Shape(NamedTuple):
    """One linear and its packed rank."""

    name: str
    d_in: int
    d_out: int
    rank: int

    @property
    def padded(self) -> int:
        """Rank that the matrix units work on: a multiple of 16."""
        return 16 * math.ceil(self.rank / 16)

    @property
    def power_of_two(self) -> int:
        """Columns that the Triton kernels work on."""
        return max(16, 1 << (self.rank - 1).bit_length())


SHAPES = (
    Shape("q", 5120, 5120, 40),
    Shape("k", 5120, 5120, 20),
    Shape("ffn.0", 5120, 13824, 20),
    Shape("ffn.2", 13824, 5120, 20),
)


class Passes(NamedTuple):
    """What one implementation adds to the base product."""

    x: float = 0
    """Passes over [N, d_in]."""
    y: float = 0
    """Passes over [N, d_out]."""
    h: float = 0
    """Passes over [N, R], padded."""
    weight: float = 0
    """Passes over [d_out, d_in]."""
    partials: bool = False
    """Whether dA goes through fp32 partials."""
    planes: bool = False
    """Whether du goes through fp32 planes, one per tile of outputs, as in `up_grad`."""
    into_x: float = 0
    """Products of rank R and width d_in that the base product's own kernel does as well."""
    into_y: float = 0
    """The same of width d_out."""
    efficiency: float = 1.0
    """Speed of the base product's kernel relative to the library's."""


def loop(adapters: int, multiplies: int = 2) -> Passes:
    """Each adapter: read x, write its y, read and write it per factor, add it to y: read two, write one."""
    return Passes(x=adapters, y=adapters * (1 + 2 * multiplies + 3))


FORWARD = {
    "loop, 3 active": loop(3),
    "loop": loop(5),
    "PEFT": loop(5, multiplies=1),
    "packed": Passes(x=1, y=2, h=4),
    "single_pass": Passes(x=1, y=2),
    "delta_first": Passes(x=1, y=1),
    "epilogue": Passes(x=1, h=2, into_y=1),
    "epilogue at 95 %": Passes(x=1, h=2, into_y=1, efficiency=0.95),
    "floor": Passes(into_x=1, into_y=1),
    "merged per call": Passes(weight=2),
}
"""loop: all five adapters of four experts, zero gates included; PEFT: five adapters, one factor each."""

BACKWARD = {
    "loop, 3 active": loop(3),
    "loop": loop(5),
    "packed": Passes(x=3, y=2, h=4),
    "fused du+dB": Passes(x=3, y=1, h=4, partials=True),
    "fused du+dB, dx in the epilogue": Passes(x=1, y=1, h=4, partials=True, into_x=1),
    "up_grad": Passes(x=3, y=1, h=4, partials=True, planes=True),
    "up_grad, dx in the epilogue": Passes(x=1, y=1, h=4, partials=True, planes=True, into_x=1),
}
"""fused du+dB: one read of dy and nothing else, which no kernel here reaches; up_grad: ours, with planes."""


def added(passes: Passes, shape: Shape, tokens: int, itemsize: int = 2) -> tuple[float, float]:
    """FLOP inside the base product's kernel, and bytes of memory traffic, that `passes` adds for N tokens."""
    flops = 2.0 * tokens * shape.padded * (passes.into_x * shape.d_in + passes.into_y * shape.d_out)
    per_token = passes.x * shape.d_in + passes.y * shape.d_out + passes.h * shape.padded
    moved = itemsize * (per_token * tokens + passes.weight * shape.d_in * shape.d_out)
    if passes.planes:
        moved += 2 * 4 * tokens * math.ceil(shape.d_out / _TILE) * shape.power_of_two
    if passes.partials:
        moved += 2 * 4 * _SPLITS * shape.padded * shape.d_in
    return flops, moved


def overhead(
    passes: Passes,
    shapes: Sequence[Shape],
    card: Card,
    tokens: int,
    *,
    shared: bool = False,
    itemsize: int = 2,
) -> float:
    """Time added, as a share of the base products' time; shared: the linears read one x, in one pass."""
    base = time = 0.0
    for place, shape in enumerate(shapes):
        mine = passes._replace(x=0) if shared and place else passes
        gemm = 2.0 * tokens * shape.d_in * shape.d_out
        flops, moved = added(mine, shape, tokens, itemsize)
        base += gemm / (card.tflops * 1e12)
        time += (gemm + flops) / (card.tflops * 1e12 * passes.efficiency) + moved / (card.tbps * 1e12)
    return time / base - 1


def table(cards: Sequence[Card] = CARDS, tokens: int = 5376) -> list[tuple[str, str, list[str]]]:
    """(pass, implementation, overhead of each linear on each card as "9.3 / 15.9 / 9.8") for printing."""
    rows = []
    for direction, forms in (("forward", FORWARD), ("backward", BACKWARD)):
        for name, passes in forms.items():
            cells = [
                " / ".join(f"{100 * overhead(passes, [shape], card, tokens):.3g}" for card in cards)
                for shape in SHAPES
            ]
            rows.append((direction, name, cells))
    return rows
