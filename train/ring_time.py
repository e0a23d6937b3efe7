"""How long a step takes whose blocks stream: the ring itself, on clocks instead of a card."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..moe_lora.block_store import BlockStore, Memory
from ..moe_lora.ring import BlockRing

_META = torch.device("meta")


class Clocks:
    """Copies that take as long as their bytes, beside a computation that takes as long as it says.

    The host is ahead of both, as it is of a card.
    """

    def __init__(self, rate: float) -> None:
        self._rate, self._copied, self._held = rate, 0.0, 0.0
        self.now = 0.0
        """Seconds that the computation has come to."""

    def start(self, slot: Tensor, source: Tensor, after: Any) -> float:
        self._copied = max(self._copied, after or 0.0) + source.nbytes / self._rate
        return self._copied

    def mark(self) -> float:
        return self.now

    def wait(self, event: float) -> None:
        self._held += max(event - self.now, 0.0)
        self.now = max(event, self.now)

    def stall(self) -> float:
        held, self._held = self._held, 0.0
        return held

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class StepTime:
    """Of one step, once the ring has warmed up."""

    seconds: float
    stall: float
    """Of it, in which the computation waits for a block."""
    copied: int
    """Bytes."""


def step_time(
    block: int,
    blocks: int,
    tail: int,
    streamed: Collection[int],
    slots: int,
    rate: float,
    forward: float,
    backward: float,
) -> StepTime:
    """A step of `blocks` blocks of so many bytes each.

    Args:
        tail: the first block that has a graph; `blocks` for a forward alone.
        streamed: those that come from the host.
        rate: bytes a second of the copies.
        forward, backward: seconds that one block computes; what is computed again counts as backward.
    """
    clocks = Clocks(rate)
    ring = BlockRing(_META, slots, clocks)
    modules = [_OneTensor(block) for _ in range(blocks)]
    resident = set(range(blocks)) - set(streamed)
    store = BlockStore(_META, resident=resident, memory=_no_memory)
    store.lay_out(modules, lambda name: torch.uint8)
    for index, module in enumerate(modules):
        parameter = store.put(f"blocks.{index}.bytes", lambda module=module: module.bytes.data)  # type: ignore[misc]
        module.bytes = parameter
    model = ring.add(store, modules, tail)
    began, copied = 0.0, 0
    for _ in range(2):
        began, copied = clocks.now, ring.moved
        clocks.stall()
        for index in range(blocks):
            model.visit(index, turns=tail < blocks and index >= tail)
            clocks.now += forward
        for index in reversed(range(tail, blocks)):
            model.visit(index, back=True)
            clocks.now += backward
    return StepTime(clocks.now - began, clocks.stall(), ring.moved - copied)


class _OneTensor(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.bytes: Any = nn.Parameter(
            torch.empty(size, dtype=torch.uint8, device=_META), requires_grad=False
        )


def _no_memory(size: int) -> Memory:
    return Memory(torch.empty(size, dtype=torch.uint8, device=_META))
