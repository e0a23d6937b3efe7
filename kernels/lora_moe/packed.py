"""The op by library matrix products: one shrink to the packed rank, gates, one expand onto the base product.

Runs on every device and is what CUDA falls back to where no measured form is better.
Letters: N tokens, G gate rows, R packed rank of one linear, W packed width of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import Layout, Packed

# With the gates folded into `up`, the gate gradient needs no pass over the tokens, but each gate row keeps
# its own [d_out, R] product. Gates per clip are few rows; gates per latent frame are many.
_FOLDED_ROWS = 8


def folds(rows: int, want_gates: bool, want_adapter: bool) -> bool:
    """Whether the backward folds the gates into `up`: d_gate = sum(up * d_up'), d_up = d_up' * gate."""
    return want_gates and want_adapter and rows <= _FOLDED_ROWS


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    packs: Packed,
    columns: Layout,
    tokens_per_row: int,
) -> tuple[list[Tensor], Tensor]:
    """x [N, d_in] -> y of each linear [N, d_out], and h = x down^T [N, W] for the backward."""
    h = x @ packs.down.t()
    u = gated(h, packs.gates, tokens_per_row)
    ys = []
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        # In place: y is fresh, and nothing keeps it.
        ys.append(F.linear(x, weight, bias).addmm_(u[:, columns.columns(j)], packs.ups[j].t()))
    return ys, h


def gated(h: Tensor, gates: Tensor, tokens_per_row: int) -> Tensor:
    """h [N, R] x gates [G, R] of each token's row: multiplied in the dtype of the gates, rounded to that of
    h."""
    rows = h.view(gates.shape[0], tokens_per_row, -1)
    return (rows * gates[:, None]).to(h.dtype).flatten(0, 1)


def up_backward(
    dy: Tensor,
    up: Tensor,
    h: Tensor,
    gates: Tensor,
    dh: Tensor,
    tokens_per_row: int,
    *,
    want_gates: bool,
    want_adapter: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Backward of the gated expand of one linear; writes dh [N, R].

    dy [N, d_out], up [d_out, R], h [N, R], gates [G, R] -> d_up [d_out, R] wide, d_gates [G, R].
    """
    rows = gates.shape[0]
    du = dy @ up
    d_up = d_gates = None
    if folds(rows, want_gates, want_adapter):
        by_row = dy.view(rows, tokens_per_row, -1).transpose(1, 2)
        unscaled = wide_matmul(by_row, h.reshape(rows, tokens_per_row, -1))
        d_up = (unscaled * gates[:, None]).sum(0)
        d_gates = (unscaled * up).sum(1)
    else:
        if want_adapter:
            d_up = wide_matmul(dy.t(), gated(h, gates, tokens_per_row))
        if want_gates:
            d_gates = (du.to(gates.dtype) * h).view(rows, tokens_per_row, -1).sum(1)
    dh.copy_(gated(du, gates, tokens_per_row))
    return d_up, d_gates


def down_backward(dh: Tensor, x: Tensor) -> Tensor:
    """dh [N, W], x [N, d_in] -> d_down [W, d_in], wide."""
    return wide_matmul(dh.t(), x)


def input_backward(dys: list[Tensor], weights: list[Tensor], dh: Tensor, down: Tensor) -> Tensor:
    """dx = dh down + sum_j dy_j W_j in one buffer: the low-rank part first, so that it is written only."""
    dx = dh @ down
    for dy, weight in zip(dys, weights, strict=True):
        dx.addmm_(dy, weight)
    return dx


class Products(NamedTuple):
    """What a backward is made of, each by the library or by a kernel with the same arguments."""

    up: Callable[..., tuple[Tensor | None, Tensor | None]] = up_backward
    down: Callable[[Tensor, Tensor], Tensor] = down_backward
    dx: Callable[[list[Tensor], list[Tensor], Tensor, Tensor], Tensor] = input_backward


LIBRARY = Products()


def backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    h: Tensor,
    packs: Packed,
    columns: Layout,
    tokens_per_row: int,
    want_x: bool,
    want_gates: bool,
    want_adapter: bool,
    products: Products = LIBRARY,
) -> list[Tensor]:
    """The adapter's part of the backward, of it what is wanted: dx, d_gates [G, W], d_down [W, d_in] and d_up
    of each linear."""
    dh = torch.empty_like(h)
    end = columns.starts[-1] + columns.widths[-1]
    if end < columns.width:
        dh[:, end:].zero_()
    d_gates = torch.zeros_like(packs.gates)
    d_ups = []
    for j, dy in enumerate(dys):
        at = columns.columns(j)
        d_up, of_gates = products.up(
            dy,
            packs.ups[j],
            h[:, at],
            packs.gates[:, at],
            dh[:, at],
            tokens_per_row,
            want_gates=want_gates,
            want_adapter=want_adapter,
        )
        if d_up is not None:
            d_ups.append(d_up)
        if of_gates is not None:
            d_gates[:, at] = of_gates
    out = [products.dx(dys, weights, dh, packs.down)] if want_x else []
    if want_gates:
        out.append(d_gates)
    if want_adapter:
        out += [products.down(dh, x), *d_ups]
    return out


def wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, accumulated and returned in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        product = torch.mm if a.dim() == 2 else torch.bmm
        return product(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)
