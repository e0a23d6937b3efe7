"""The Triton kernels of the op.

Letters: N tokens, K inputs, M outputs, G gate rows, R packed columns of one linear, W packed width of the
group (R and W powers of two, 16 or more); BM tokens, BN outputs, BK inputs of a tile. `gates` is [G, W],
scale x gate of each column.

Every sum over tokens or tiles that crosses programs goes through planes that are added in a fixed order: no
atomics, so that two runs give the same bits. ACC is fp32, or fp64 for fp64 inputs. Row offsets are 64 bits
wide: 75600 tokens x 13824 x 3 clips do not fit 31.
"""

# What Triton takes are pointers and constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "down_grad",
    "expand",
    "finish_down",
    "finish_shrink",
    "finish_up",
    "gemm_lowrank",
    "pack_linear",
    "shrink",
    "single_pass",
    "up_grad",
]


@triton.jit
def _gate_tile(gates, rows, cols, valid, tokens_per_row, W, ACC: tl.constexpr):
    """Gates of a tile of tokens: [BM, R]; row of a token is token // tokens_per_row."""
    return tl.load(gates + (rows // tokens_per_row)[:, None] * W + cols[None, :], valid[:, None], 0.0).to(ACC)


@triton.jit
def _tokens_by(x, down, rows, valid, first, last, K, WIDTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
               EVEN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """x[rows, first:last] down[:, first:last]^T: [BM, WIDTH], accumulated in ACC."""
    cols = tl.arange(0, WIDTH)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, WIDTH), dtype=ACC)
    x_tile = x + rows.to(tl.int64)[:, None] * K + (first + inner)[None, :]
    down_tile = down + cols[None, :] * K + (first + inner)[:, None]
    for k in range(first, last, BK):
        if EVEN:
            a = tl.load(x_tile, valid[:, None], 0.0)
            b = tl.load(down_tile)
        else:
            inside = (k + inner) < last
            a = tl.load(x_tile, valid[:, None] & inside[None, :], 0.0)
            b = tl.load(down_tile, inside[:, None], 0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
        x_tile += BK
        down_tile += BK
    return acc


@triton.jit
def shrink(x, down, gates, h, u, planes, N, K, chunk, tokens_per_row, W: tl.constexpr, BM: tl.constexpr,
           BK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
           ACC: tl.constexpr):  # fmt: skip
    """h = x down^T and u = gates * h, both [N, W]; with SPLIT > 1 the partial sums go to planes [SPLIT, N, W]
    and `finish_shrink` makes h and u of them. Program (i, s): tokens i, inputs s * chunk up to the next."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < N
    first = part * chunk
    acc = _tokens_by(x, down, rows, valid, first, tl.minimum(first + chunk, K), K, W, BM, BK, EVEN, ACC)
    cols = tl.arange(0, W)
    at = rows.to(tl.int64)[:, None] * W + cols[None, :]
    if SPLIT == 1:
        g = _gate_tile(gates, rows, cols, valid, tokens_per_row, W, ACC)
        tl.store(u + at, (acc * g).to(u.dtype.element_ty), valid[:, None])
        if SAVE:
            tl.store(h + at, acc.to(h.dtype.element_ty), valid[:, None])
    else:
        tl.store(planes + part.to(tl.int64) * N * W + at, acc, valid[:, None])


@triton.jit
def finish_shrink(planes, gates, h, u, N, tokens_per_row, W: tl.constexpr, BM: tl.constexpr,
                  SPLIT: tl.constexpr, SAVE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums planes [SPLIT, N, W] in order: h, and u = gates * h."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < N
    cols = tl.arange(0, W)
    at = rows.to(tl.int64)[:, None] * W + cols[None, :]
    acc = tl.zeros((BM, W), dtype=ACC)
    for _ in tl.static_range(SPLIT):
        acc += tl.load(planes + at, valid[:, None], 0.0)
        at += N * W
    at = rows.to(tl.int64)[:, None] * W + cols[None, :]
    g = _gate_tile(gates, rows, cols, valid, tokens_per_row, W, ACC)
    tl.store(u + at, (acc * g).to(u.dtype.element_ty), valid[:, None])
    if SAVE:
        tl.store(h + at, acc.to(h.dtype.element_ty), valid[:, None])


@triton.jit
def single_pass(x, down, up, gates, h, y, N, K, M, tokens_per_row, R: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
                ACC: tl.constexpr):  # fmt: skip
    """y [N, M] += (gates * (x down^T)) up^T: x is read once, h stays on chip, y is read and written once.

    down [R, K], up [M, R]. Program i: tokens i, all outputs.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < N
    cols = tl.arange(0, R)
    acc = _tokens_by(x, down, rows, valid, 0, K, K, R, BM, BK, EVEN, ACC)
    if SAVE:
        at = rows.to(tl.int64)[:, None] * R + cols[None, :]
        tl.store(h + at, acc.to(h.dtype.element_ty), valid[:, None])
    u = (acc * _gate_tile(gates, rows, cols, valid, tokens_per_row, R, ACC)).to(x.dtype.element_ty)
    outs = tl.arange(0, BN)
    y_rows = y + rows.to(tl.int64)[:, None] * M
    for m in range(0, M, BN):
        there = (m + outs) < M
        b = tl.load(up + (m + outs)[None, :] * R + cols[:, None], there[None, :], 0.0)
        here = valid[:, None] & there[None, :]
        out = tl.load(y_rows + (m + outs)[None, :], here, 0.0).to(ACC)
        out = tl.dot(u, b, out, input_precision="ieee", out_dtype=ACC)
        tl.store(y_rows + (m + outs)[None, :], out.to(y.dtype.element_ty), here)


@triton.jit
def expand(u, up, bias, y, N, M, u_stride, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           ADD: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """y [N, M] = u up^T (+ bias), or += with ADD. u [N, R] with rows u_stride apart, up [M, R]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    cols = tl.arange(0, R)
    valid, there = rows < N, outs < M
    a = tl.load(u + rows.to(tl.int64)[:, None] * u_stride + cols[None, :], valid[:, None], 0.0)
    b = tl.load(up + outs[None, :] * R + cols[:, None], there[None, :], 0.0)
    here = valid[:, None] & there[None, :]
    at = rows.to(tl.int64)[:, None] * M + outs[None, :]
    out = tl.zeros((BM, BN), dtype=ACC)
    if ADD:
        out += tl.load(y + at, here, 0.0).to(ACC)
    if BIAS:
        out += tl.load(bias + outs, there, 0.0).to(ACC)[None, :]
    out = tl.dot(a, b, out, input_precision="ieee", out_dtype=ACC)
    tl.store(y + at, out.to(y.dtype.element_ty), here)


@triton.jit
def gemm_lowrank(a, b, u, low, bias, y, N, M, K, b_k, b_m, u_stride, low_r, low_m, R: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
                 BIAS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """y [N, M] = a [N, K] b [K, M] + u [N, R] low [R, M] + bias: the base product with the adapter in it.

    b and low are given by strides: (b_k, b_m) = (1, K) reads a weight [M, K] (forward), (M, 1) the weight
    [K, M] itself (dx = dy W + dh down). Rows of u lie u_stride apart.
    """
    tiles_n, tiles_m = tl.cdiv(N, BM), tl.cdiv(M, BN)
    # Eight rows of tiles go through the outputs together, so that their part of b stays in L2.
    group = 8 * tiles_m
    first = (tl.program_id(0) // group) * 8
    height = tl.minimum(tiles_n - first, 8)
    rows = (first + (tl.program_id(0) % group) % height) * BM + tl.arange(0, BM)
    outs = ((tl.program_id(0) % group) // height) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    cols = tl.arange(0, R)
    valid, there = rows < N, outs < M
    acc = tl.zeros((BM, BN), dtype=ACC)
    a_tile = a + rows.to(tl.int64)[:, None] * K + inner[None, :]
    b_tile = b + inner.to(tl.int64)[:, None] * b_k + outs.to(tl.int64)[None, :] * b_m
    for k in range(0, K, BK):
        if EVEN:
            left = tl.load(a_tile, valid[:, None], 0.0)
            right = tl.load(b_tile, there[None, :], 0.0)
        else:
            inside = (k + inner) < K
            left = tl.load(a_tile, valid[:, None] & inside[None, :], 0.0)
            right = tl.load(b_tile, inside[:, None] & there[None, :], 0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=ACC)
        a_tile += BK
        b_tile += BK * b_k
    # After the loop, when the tiles of its pipeline are free again.
    lanes = tl.load(u + rows.to(tl.int64)[:, None] * u_stride + cols[None, :], valid[:, None], 0.0)
    low_tile = tl.load(low + cols[:, None] * low_r + outs.to(tl.int64)[None, :] * low_m, there[None, :], 0.0)
    acc = tl.dot(lanes, low_tile, acc, input_precision="ieee", out_dtype=ACC)
    if BIAS:
        acc += tl.load(bias + outs, there, 0.0).to(ACC)[None, :]
    at = rows.to(tl.int64)[:, None] * M + outs[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), valid[:, None] & there[None, :])


@triton.jit
def up_grad(dy, up, h, gates, du_planes, up_planes, N, M, span, chunk, parts, tokens_per_row, W,
            R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FOLD: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """One read of dy [N, M] for both du = dy up and d_up = dy^T u.

    Program (i, s): outputs i, and part s % parts of the tokens of span s // parts. It writes its outputs'
    share of du to du_planes [tiles, N, R] and its tokens' share of d_up to up_planes [spans * parts, M, R].
    With FOLD a span is a gate row and h stands for u (the gates are applied when the planes are summed);
    otherwise one span holds all tokens and u = gates * h. h and gates have rows W apart.
    """
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    piece = tl.program_id(1)
    cols = tl.arange(0, R)
    there = outs < M
    start = (piece // parts) * span + (piece % parts) * chunk
    stop = tl.minimum(start + chunk, (piece // parts + 1) * span)
    b = tl.load(up + outs[:, None] * R + cols[None, :], there[:, None], 0.0)
    acc = tl.zeros((BN, R), dtype=ACC)
    plane = du_planes + tl.program_id(0).to(tl.int64) * N * R
    for token in range(start, stop, BM):
        rows = token + tl.arange(0, BM)
        valid = rows < stop
        long = rows.to(tl.int64)[:, None]
        d = tl.load(dy + long * M + outs[None, :], valid[:, None] & there[None, :], 0.0)
        u = tl.load(h + long * W + cols[None, :], valid[:, None], 0.0)
        if not FOLD:
            u = (u.to(ACC) * _gate_tile(gates, rows, cols, valid, tokens_per_row, W, ACC)).to(d.dtype)
        share = tl.dot(d, b, input_precision="ieee", out_dtype=ACC)
        tl.store(plane + long * R + cols[None, :], share, valid[:, None])
        acc = tl.dot(tl.trans(d), u, acc, input_precision="ieee", out_dtype=ACC)
    at = piece.to(tl.int64) * M * R + outs[:, None] * R + cols[None, :]
    tl.store(up_planes + at, acc, there[:, None])


@triton.jit
def finish_down(du_planes, h, gates, dh, gate_planes, N, tiles, parts, tokens_per_row, W, R: tl.constexpr,
                BM: tl.constexpr, GATES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums du_planes [tiles, N, R] in order; dh = gates * du; with GATES, the tile's share of d_gates.

    Program i: tokens i % parts of gate row i // parts. gate_planes [G, parts, R]; h, gates and dh have rows W
    apart.
    """
    part, row = tl.program_id(0) % parts, tl.program_id(0) // parts
    local = part * BM + tl.arange(0, BM)
    valid = local < tokens_per_row
    rows = (row.to(tl.int64) * tokens_per_row + local)[:, None]
    cols = tl.arange(0, R)
    du = tl.zeros((BM, R), dtype=ACC)
    plane = du_planes + rows * R + cols[None, :]
    for _ in range(0, tiles):
        du += tl.load(plane, valid[:, None], 0.0)
        plane += N * R
    g = tl.load(gates + row.to(tl.int64) * W + cols).to(ACC)
    tl.store(dh + rows * W + cols[None, :], (du * g[None, :]).to(dh.dtype.element_ty), valid[:, None])
    if GATES:
        share = du * tl.load(h + rows * W + cols[None, :], valid[:, None], 0.0).to(ACC)
        tl.store(gate_planes + tl.program_id(0).to(tl.int64) * R + cols, tl.sum(share, 0))


@triton.jit
def finish_up(up_planes, up, gates, d_up, gate_planes, M, rows, parts, W, R: tl.constexpr, BN: tl.constexpr,
              FOLD: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums up_planes [rows * parts, M, R] in order to d_up [M, R].

    With FOLD each of the `rows` spans is a gate row: d_up = sum_row gates[row] * d_up'[row], and the tile's
    share of d_gates[row] = sum over outputs of up * d_up'[row] goes to gate_planes [tiles, rows, R].
    """
    tile = tl.program_id(0)
    outs = tile * BN + tl.arange(0, BN)
    cols = tl.arange(0, R)
    there = outs[:, None] < M
    at = outs[:, None] * R + cols[None, :]
    plane = up_planes + at
    total = tl.zeros((BN, R), dtype=ACC)
    for row in range(0, rows):
        share = tl.zeros((BN, R), dtype=ACC)
        for _ in range(0, parts):
            share += tl.load(plane, there, 0.0)
            plane += M * R
        if FOLD:
            b = tl.load(up + at, there, 0.0).to(ACC)
            tl.store(gate_planes + (tile * rows + row) * R + cols, tl.sum(b * share, 0))
            share *= tl.load(gates + row * W + cols).to(ACC)[None, :]
        total += share
    tl.store(d_up + at, total, there)


@triton.jit
def down_grad(dh, x, planes, N, K, chunk, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """One read of x [N, K]: this part's share of d_down = dh^T x to planes [parts, W, K].

    Program (i, s): inputs i, tokens s * chunk up to the next.
    """
    ins = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    cols = tl.arange(0, W)
    there = ins < K
    start = part * chunk
    stop = tl.minimum(start + chunk, N)
    acc = tl.zeros((W, BN), dtype=ACC)
    for token in range(start, stop, BM):
        rows = token + tl.arange(0, BM)
        valid = rows < stop
        long = rows.to(tl.int64)
        d = tl.load(dh + long[:, None] * W + cols[None, :], valid[:, None], 0.0)
        b = tl.load(x + long[:, None] * K + ins[None, :], valid[:, None] & there[None, :], 0.0)
        acc = tl.dot(tl.trans(d), b, acc, input_precision="ieee", out_dtype=ACC)
    at = part.to(tl.int64) * W * K + cols[:, None] * K + ins[None, :]
    tl.store(planes + at, acc, there[None, :])


@triton.jit
def pack_linear(base_down, base_up, expert_down, expert_up, base_gates, expert_gates, down, up, gates, K, M,
                base_rank, rank, experts, scale_base, scale_expert, down_tiles, up_tiles, W, R,
                BR: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Packs one linear: its rows of down [R, K], up [M, R], its columns of gates (rows W apart).

    Programs (i, c): i < down_tiles copy inputs, the next up_tiles outputs, the rest one gate row each; c is
    which BR of the R columns. Padding is written as zeros.
    """
    pid = tl.program_id(0)
    cols = tl.program_id(1) * BR + tl.arange(0, BR)
    is_base = cols < base_rank
    used = cols < base_rank + experts * rank
    local = cols - base_rank
    is_expert = used & (local >= 0)
    lane = tl.arange(0, BN)
    if pid < down_tiles:
        ins = pid * BN + lane
        inside = (ins < K)[None, :]
        at = cols[:, None] * K + ins[None, :]
        a = tl.load(base_down + at, is_base[:, None] & inside, 0.0)
        a += tl.load(expert_down + local[:, None] * K + ins[None, :], is_expert[:, None] & inside, 0.0)
        tl.store(down + at, a.to(down.dtype.element_ty), inside)
    elif pid < down_tiles + up_tiles:
        outs = (pid - down_tiles) * BN + lane
        there = (outs < M)[:, None]
        b = tl.load(base_up + outs[:, None] * base_rank + cols[None, :], is_base[None, :] & there, 0.0)
        index = local // rank
        source = (index[None, :] * M + outs[:, None]) * rank + (local - index * rank)[None, :]
        b += tl.load(expert_up + source, is_expert[None, :] & there, 0.0)
        tl.store(up + outs[:, None] * R + cols[None, :], b.to(up.dtype.element_ty), there)
    else:
        row = pid - down_tiles - up_tiles
        wide: tl.constexpr = gates.dtype.element_ty
        of_base = tl.load(base_gates + row + cols * 0, is_base, 0.0).to(wide) * scale_base
        of_expert = tl.load(expert_gates + row * experts + local // rank, is_expert, 0.0).to(wide)
        tl.store(gates + row * W + cols, of_base + of_expert * scale_expert)
