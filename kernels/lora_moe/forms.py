"""The forms of the op on the Triton kernels: what `table.Plan` names, forward and backward.

Letters: N tokens, G gate rows, R packed columns of one linear, W packed width of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import packed, table
from . import triton_kernels as kernels
from .table import Launch
from .weights import Layout, Packed

__all__ = ["backward", "forward", "pack"]

# The kernels that finish a sum are small; one launch serves every card.
FINISH_TOKENS = 32
FINISH_OUTPUTS = 32
PACK_LANES, PACK_COLUMNS = 64, 32


def pack(
    columns: Layout,
    base_down: Sequence[Tensor],
    base_up: Sequence[Tensor],
    expert_down: Sequence[Tensor],
    expert_up: Sequence[Tensor],
    base_gates: Tensor,
    expert_gates: Tensor,
    scale_base: Sequence[float],
    scale_expert: Sequence[float],
    dtype: torch.dtype,
) -> Packed:
    """`weights.pack` in one launch per linear."""
    _refuse_bf16(dtype)
    d_in, rows = base_down[0].shape[1], base_gates.shape[0]
    end = columns.starts[-1] + columns.widths[-1]
    down = base_gates.new_empty(columns.width, d_in, dtype=dtype)
    gates = base_gates.new_empty(rows, columns.width, dtype=_wide(dtype))
    if end < columns.width:
        down[end:].zero_()
        gates[:, end:].zero_()
    ups = []
    for j, start in enumerate(columns.starts):
        d_out = base_up[j].shape[0]
        up = base_gates.new_empty(d_out, columns.widths[j], dtype=dtype)
        down_tiles, up_tiles = triton.cdiv(d_in, PACK_LANES), triton.cdiv(d_out, PACK_LANES)
        block = min(columns.widths[j], PACK_COLUMNS)
        kernels.pack_linear[(down_tiles + up_tiles + rows, columns.widths[j] // block)](
            base_down[j].contiguous(),
            base_up[j].contiguous(),
            expert_down[j].contiguous(),
            expert_up[j].contiguous(),
            base_gates.contiguous(),
            expert_gates.contiguous(),
            down[start:],
            up,
            gates[:, start:],
            d_in,
            d_out,
            columns.base[j],
            columns.expert[j],
            columns.experts,
            scale_base[j],
            scale_expert[j],
            down_tiles,
            up_tiles,
            columns.width,
            columns.widths[j],
            BR=block,
            BN=PACK_LANES,
        )
        ups.append(up)
    return Packed(down, ups, gates)


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    packs: Packed,
    columns: Layout,
    tokens_per_row: int,
    save: bool,
) -> tuple[list[Tensor], Tensor]:
    """x [N, d_in] -> y of each linear, and h [N, W] (empty unless `save`)."""
    plan = table.plan_for(x, [weight.shape[0] for weight in weights], columns.width)
    if plan.form == "library":
        return packed.forward(x, weights, biases, packs, columns, tokens_per_row)
    if plan.form == "single_pass" and len(weights) == 1:
        y = F.linear(x, weights[0], biases[0])
        return [y], _single_pass(x, y, packs, tokens_per_row, plan.launches["single_pass"], save)
    h, u = _shrink(x, packs, tokens_per_row, plan.launches["shrink"], save)
    ys = []
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        part, up = u[:, columns.columns(j)], packs.ups[j]
        if plan.form == "single_pass":
            ys.append(_expand(part, up, None, F.linear(x, weight, bias), plan.launches["expand"], add=True))
        elif plan.form == "delta_first":
            y = x.new_empty(x.shape[0], weight.shape[0])
            # beta = 1 in place: the base product reads the delta in its epilogue and rounds once.
            ys.append(_expand(part, up, bias, y, plan.launches["expand"], add=False).addmm_(x, weight.t()))
        else:
            ys.append(_gemm(x, weight.t(), part, up.t(), bias, plan.launches["gemm"]))
    return ys, h


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
) -> list[Tensor]:
    """`packed.backward` with the kernels that the plan names in the place of library products."""
    plan = table.plan_for(x, [weight.shape[0] for weight in weights], columns.width)
    down, dx = plan.launch("down_grad", columns.width), plan.launch("dx", columns.width)

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
        parts = dy, up, h, gates, dh, tokens_per_row
        launch = plan.launch("up_grad", up.shape[1])
        if launch is None or not want_adapter:
            return packed.up_backward(*parts, want_gates=want_gates, want_adapter=want_adapter)
        return _up_grad(*parts, launch, want_gates)

    products = packed.Products(
        up_backward,
        packed.down_backward if down is None else partial(_down_grad, launch=down),
        packed.input_backward if dx is None else partial(_input_grad, launch=dx),
    )
    wanted = want_x, want_gates, want_adapter
    return packed.backward(dys, x, weights, h, packs, columns, tokens_per_row, *wanted, products)


def _shrink(
    x: Tensor, packs: Packed, tokens_per_row: int, launch: Launch, save: bool
) -> tuple[Tensor, Tensor]:
    n, k, width = x.shape[0], x.shape[1], packs.down.shape[0]
    u = x.new_empty(n, width)
    h = torch.empty_like(u) if save else u.new_empty(0)
    planes = x.new_empty(launch.split, n, width, dtype=_wide(x.dtype)) if launch.split > 1 else h
    options: dict[str, Any] = {"W": width, "SPLIT": launch.split, "SAVE": save, "ACC": _acc(x.dtype)}
    chunk = triton.cdiv(triton.cdiv(k, launch.split), launch.bk) * launch.bk
    kernels.shrink[(triton.cdiv(n, launch.bm), launch.split)](
        x,
        packs.down,
        packs.gates,
        h,
        u,
        planes,
        n,
        k,
        chunk,
        tokens_per_row,
        BM=launch.bm,
        BK=launch.bk,
        EVEN=k % launch.bk == 0,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **options,
    )
    if launch.split > 1:
        kernels.finish_shrink[(triton.cdiv(n, FINISH_TOKENS),)](
            planes, packs.gates, h, u, n, tokens_per_row, BM=FINISH_TOKENS, **options
        )
    return h, u


def _single_pass(
    x: Tensor, y: Tensor, packs: Packed, tokens_per_row: int, launch: Launch, save: bool
) -> Tensor:
    """Adds the adapter's part to y in place; returns h."""
    n, k = x.shape
    h = x.new_empty(n, packs.down.shape[0]) if save else x.new_empty(0)
    kernels.single_pass[(triton.cdiv(n, launch.bm),)](
        x,
        packs.down,
        packs.ups[0],
        packs.gates,
        h,
        y,
        n,
        k,
        y.shape[1],
        tokens_per_row,
        R=packs.down.shape[0],
        BM=launch.bm,
        BN=launch.bn,
        BK=launch.bk,
        EVEN=k % launch.bk == 0,
        SAVE=save,
        ACC=_acc(x.dtype),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return h


def _expand(u: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, launch: Launch, *, add: bool) -> Tensor:
    """y = u up^T + bias, or y += u up^T; in place."""
    n, m = y.shape
    kernels.expand[(triton.cdiv(n, launch.bm), triton.cdiv(m, launch.bn))](
        u,
        up,
        y if bias is None else bias,
        y,
        n,
        m,
        u.stride(0),
        R=up.shape[1],
        BM=launch.bm,
        BN=launch.bn,
        ADD=add,
        BIAS=bias is not None,
        ACC=_acc(y.dtype),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return y


def _gemm(a: Tensor, b: Tensor, u: Tensor, low: Tensor, bias: Tensor | None, launch: Launch) -> Tensor:
    """a [N, K] b [K, M] + u [N, R] low [R, M] + bias."""
    (n, k), m = a.shape, b.shape[1]
    y = a.new_empty(n, m)
    kernels.gemm_lowrank[(triton.cdiv(n, launch.bm) * triton.cdiv(m, launch.bn),)](
        a,
        b,
        u,
        low,
        y if bias is None else bias,
        y,
        n,
        m,
        k,
        *b.stride(),
        u.stride(0),
        *low.stride(),
        R=low.shape[0],
        BM=launch.bm,
        BN=launch.bn,
        BK=launch.bk,
        EVEN=k % launch.bk == 0,
        BIAS=bias is not None,
        ACC=_acc(a.dtype),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return y


def _up_grad(
    dy: Tensor,
    up: Tensor,
    h: Tensor,
    gates: Tensor,
    dh: Tensor,
    tokens_per_row: int,
    launch: Launch,
    want_gates: bool,
) -> tuple[Tensor, Tensor | None]:
    """d_up and d_gates of one linear; writes its columns of dh."""
    (n, m), rows, r, width = dy.shape, gates.shape[0], up.shape[1], h.stride(0)
    wide, fold = _wide(dy.dtype), packed.folds(rows, want_gates, True)
    spans, span = (rows, tokens_per_row) if fold else (1, n)
    parts = max(1, launch.split // spans)
    chunk = triton.cdiv(triton.cdiv(span, parts), launch.bm) * launch.bm
    tiles = triton.cdiv(m, launch.bn)
    du_planes = dy.new_empty(tiles, n, r, dtype=wide)
    up_planes = dy.new_empty(spans * parts, m, r, dtype=wide)
    options: dict[str, Any] = {"R": r, "ACC": _acc(dy.dtype)}
    kernels.up_grad[(tiles, spans * parts)](
        dy,
        up,
        h,
        gates,
        du_planes,
        up_planes,
        n,
        m,
        span,
        chunk,
        parts,
        tokens_per_row,
        width,
        BM=launch.bm,
        BN=launch.bn,
        FOLD=fold,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **options,
    )
    by_token = want_gates and not fold
    blocks = triton.cdiv(tokens_per_row, FINISH_TOKENS)
    gate_planes = dy.new_empty((rows, blocks, r) if by_token else 0, dtype=wide)
    kernels.finish_down[(blocks * rows,)](
        du_planes, h, gates, dh, gate_planes, n, tiles, blocks, tokens_per_row, width, BM=FINISH_TOKENS,
        GATES=by_token, **options,
    )  # fmt: skip
    d_up = dy.new_empty(m, r, dtype=wide)
    out_tiles = triton.cdiv(m, FINISH_OUTPUTS)
    up_gates = dy.new_empty((out_tiles, rows, r) if fold else 0, dtype=wide)
    kernels.finish_up[(out_tiles,)](
        up_planes, up, gates, d_up, up_gates, m, spans, parts, width, BN=FINISH_OUTPUTS, FOLD=fold,
        **options,
    )  # fmt: skip
    if not want_gates:
        return d_up, None
    return d_up, up_gates.sum(0) if fold else gate_planes.sum(1)


def _down_grad(dh: Tensor, x: Tensor, *, launch: Launch) -> Tensor:
    """dh^T x, [W, d_in] wide."""
    (n, k), width = x.shape, dh.shape[1]
    chunk = triton.cdiv(triton.cdiv(n, launch.split), launch.bm) * launch.bm
    planes = x.new_empty(launch.split, width, k, dtype=_wide(x.dtype))
    kernels.down_grad[(triton.cdiv(k, launch.bn), launch.split)](
        dh,
        x,
        planes,
        n,
        k,
        chunk,
        W=width,
        BM=launch.bm,
        BN=launch.bn,
        ACC=_acc(x.dtype),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return planes.sum(0)


def _input_grad(
    dys: list[Tensor], weights: list[Tensor], dh: Tensor, down: Tensor, *, launch: Launch
) -> Tensor:
    """dx = dh down + sum_j dy_j W_j."""
    dx = _gemm(dys[0], weights[0], dh, down, None, launch)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _refuse_bf16(dtype: torch.dtype) -> None:
    """Triton's interpreter multiplies the bit patterns of bf16 (triton-lang/triton#11584)."""
    if dtype == torch.bfloat16 and not isinstance(kernels.shrink, triton.JITFunction):
        raise ValueError(
            "backend 'triton' computes bf16 wrongly in Triton's interpreter (TRITON_INTERPRET=1); "
            "use float16 or float32 there, or backend='packed'"
        )
