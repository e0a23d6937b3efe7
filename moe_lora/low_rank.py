"""Sums and truncations of low-rank products up @ down, without ever forming the dense matrix.

Letters: R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import WanmoeError

__all__ = ["Truncated", "check_finite", "concatenate", "relative_error", "truncate"]


class Truncated(NamedTuple):
    """The best product of a lower rank, and what it lost in squared Frobenius norm."""

    down: Tensor
    up: Tensor
    lost: float
    """|up @ down - original|^2."""
    total: float
    """|original|^2."""


def concatenate(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(down [R, in], up [out, R]) of the sum of the products of parts (down [r, in], up [out, r]); exact."""
    downs, ups = zip(*parts, strict=True)
    return torch.cat(downs), torch.cat(ups, dim=1)


def truncate(down: Tensor, up: Tensor, rank: int) -> Truncated:
    """The product of rank at most `rank` that is nearest to up [out, R] @ down [R, in] in Frobenius norm.

    Singular values come from the R x R core between the QR factors of the thin matrices, in float64, and are
    shared in equal parts by both factors. Results have the dtype of `up`.
    """
    up_basis, up_core = torch.linalg.qr(up.double())
    down_basis, down_core = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
    root = values[:rank].sqrt()
    new_up = up_basis @ (left[:, :rank] * root)
    new_down = (root[:, None] * right[:rank]) @ down_basis.T
    squares = values.square()
    return Truncated(
        new_down.to(up.dtype), new_up.to(up.dtype), float(squares[rank:].sum()), float(squares.sum())
    )


def relative_error(lost: float, total: float) -> float:
    """|error| / |original| from the squared norms that `truncate` gives; 0 for an original of zero."""
    return math.sqrt(lost / total) if total else 0.0


def check_finite(label: str, *values: Tensor) -> None:
    """Raises WanmoeError, which begins with `label`, unless all values are finite."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise WanmoeError(f"{label}: holds values that are not finite, so it cannot be used")
