"""Choosing implementations as on a card, for fake tensors that stand in for those of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["as_on_card", "is_dry", "on_card"]

_dry = False


@contextmanager
def as_on_card() -> Iterator[None]:
    """Inside, ops take the way that they take for CUDA tensors; their tensors must be fake ones."""
    global _dry
    before, _dry = _dry, True
    try:
        yield
    finally:
        _dry = before


def is_dry() -> bool:
    """Whether this is a dry run of a card."""
    return _dry


def on_card(x: Tensor) -> bool:
    """Whether x lies on a CUDA card, or stands in for one that does."""
    return x.is_cuda or _dry
