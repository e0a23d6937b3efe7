"""The op as PyTorch sees it: `wanmoe::lora_moe` and `wanmoe::lora_moe_backward`, opaque to the compiler.

Both are functional, and their outputs alias neither their inputs nor each other. What the backward needs is
returned by the forward, so that a recompute under checkpointing makes it anew; the base weights are saved as
the parameters themselves, since ZeRO-3 releases and gathers their storage between the passes.

Letters: N tokens, G gate rows, W packed width of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import packed
from .weights import Layout, Packed, layout, pack, unpack_down, unpack_gates, unpack_up


def _layout(base_down: Sequence[Tensor], expert_down: Sequence[Tensor], backend: str) -> Layout:
    return layout(
        [down.shape[0] for down in base_down],
        [down.shape[1] for down in expert_down],
        expert_down[0].shape[0],
        padded=backend == "triton",
    )


@torch.library.custom_op("wanmoe::lora_moe", mutates_args=())
def lora_moe(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    base_down: list[Tensor],
    base_up: list[Tensor],
    expert_down: list[Tensor],
    expert_up: list[Tensor],
    base_gates: Tensor,
    expert_gates: Tensor,
    tokens_per_row: int,
    scale_base: list[float],
    scale_expert: list[float],
    backend: str,
    save: bool,
) -> list[Tensor]:
    """x [N, d_in] -> y of each linear; with `save` then h [N, W], down [W, d_in], gates [G, W] and the ups.

    A missing bias is an empty tensor, since the gradient of an optional element of a list is lost.
    """
    added = [bias if bias.numel() else None for bias in biases]
    x = x.contiguous()
    columns = _layout(base_down, expert_down, backend)
    adapters = (base_down, base_up, expert_down, expert_up, base_gates, expert_gates)
    if backend == "triton":
        from . import forms

        with torch.cuda.device_of(x):  # Triton launches on the current device
            packs = forms.pack(columns, *adapters, scale_base, scale_expert, x.dtype)
            ys, h = forms.forward(x, weights, added, packs, columns, tokens_per_row, save)
    else:
        packs = pack(columns, *adapters, scale_base, scale_expert, x.dtype)
        ys, h = packed.forward(x, weights, added, packs, columns, tokens_per_row)
    return [*ys, h, packs.down, packs.gates, *packs.ups] if save else ys


@lora_moe.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    base_down: list[Tensor],
    base_up: list[Tensor],
    expert_down: list[Tensor],
    expert_up: list[Tensor],
    base_gates: Tensor,
    expert_gates: Tensor,
    tokens_per_row: int,
    scale_base: list[float],
    scale_expert: list[float],
    backend: str,
    save: bool,
) -> list[Tensor]:
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    if not save:
        return ys
    columns = _layout(base_down, expert_down, backend)
    wide = torch.promote_types(x.dtype, torch.float32)
    return [
        *ys,
        x.new_empty(x.shape[0], columns.width),
        x.new_empty(columns.width, x.shape[1]),
        x.new_empty(base_gates.shape[0], columns.width, dtype=wide),
        *(x.new_empty(weight.shape[0], width) for weight, width in zip(weights, columns.widths, strict=True)),
    ]


@torch.library.custom_op("wanmoe::lora_moe_backward", mutates_args=())
def lora_moe_backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    h: Tensor,
    down: Tensor,
    gates: Tensor,
    ups: list[Tensor],
    base_ranks: list[int],
    expert_ranks: list[int],
    experts: int,
    tokens_per_row: int,
    backend: str,
    want_x: bool,
    want_gates: bool,
    want_adapter: bool,
    want_weight: list[bool],
    want_bias: list[bool],
) -> list[Tensor]:
    """What is wanted, in this order: dx [N, d_in]; d_gates [G, W]; d_down [W, d_in] and d_up of each linear,
    packed and wide; then dW and db of each linear that wants them."""
    columns = layout(base_ranks, expert_ranks, experts, padded=backend == "triton")
    packs = Packed(down, ups, gates)
    x, dys = x.contiguous(), [dy.contiguous() for dy in dys]
    if backend == "triton":
        from . import forms

        with torch.cuda.device_of(x):
            out = forms.backward(
                dys, x, weights, h, packs, columns, tokens_per_row, want_x, want_gates, want_adapter
            )
    else:
        out = packed.backward(
            dys, x, weights, h, packs, columns, tokens_per_row, want_x, want_gates, want_adapter
        )
    for dy, weight_wanted, bias_wanted in zip(dys, want_weight, want_bias, strict=True):
        if weight_wanted:
            out.append(dy.t() @ x)
        if bias_wanted:
            out.append(dy.sum(0))
    return out


@lora_moe_backward.register_fake
def _(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    h: Tensor,
    down: Tensor,
    gates: Tensor,
    ups: list[Tensor],
    base_ranks: list[int],
    expert_ranks: list[int],
    experts: int,
    tokens_per_row: int,
    backend: str,
    want_x: bool,
    want_gates: bool,
    want_adapter: bool,
    want_weight: list[bool],
    want_bias: list[bool],
) -> list[Tensor]:
    out = [torch.empty_like(x, memory_format=torch.contiguous_format)] if want_x else []
    if want_gates:
        out.append(torch.empty_like(gates))
    if want_adapter:
        out += [torch.empty_like(tensor, dtype=gates.dtype) for tensor in (down, *ups)]
    for weight, weight_wanted, bias_wanted in zip(weights, want_weight, want_bias, strict=True):
        if weight_wanted:
            out.append(torch.empty_like(weight))
        if bias_wanted:
            out.append(weight.new_empty(weight.shape[0]))
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, _, base_down, _, expert_down = inputs[:6]
    ctx.tokens_per_row, ctx.scale_base, ctx.scale_expert, ctx.backend, save = inputs[9:]
    if not save:
        raise RuntimeError("wanmoe::lora_moe was called with save=False and then asked for a gradient")
    ctx.columns = _layout(base_down, expert_down, ctx.backend)
    saved = output[len(weights) :]
    ctx.save_for_backward(x, *weights, *saved)
    # Only the ys get a gradient; what is saved needs no zeros in its place.
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    n = len(ctx.columns.base)
    x, *rest = ctx.saved_tensors
    weights, (h, down, gates), ups = rest[:n], rest[n : n + 3], rest[n + 3 :]
    # (x, weights, biases, 4 x adapter, base_gates, expert_gates)
    need = ctx.needs_input_grad
    want_weight = _each(need[1], n)
    want_bias = _each(need[2], n)
    want_adapter = any(any(_each(flag, n)) for flag in need[3:7])
    want_gates = need[7] or need[8]
    dys = [
        x.new_zeros(x.shape[0], weight.shape[0]) if dy is None else dy
        for dy, weight in zip(grads[:n], weights, strict=True)
    ]
    out = torch.ops.wanmoe.lora_moe_backward(
        dys,
        x,
        weights,
        h,
        down,
        gates,
        ups,
        ctx.columns.base,
        ctx.columns.expert,
        ctx.columns.experts,
        ctx.tokens_per_row,
        ctx.backend,
        need[0],
        want_gates,
        want_adapter,
        want_weight,
        want_bias,
    )
    found = iter(out)
    dx = next(found) if need[0] else None
    d_base_gates = d_expert_gates = None
    if want_gates:
        d_base_gates, d_expert_gates = unpack_gates(
            ctx.columns, next(found), ctx.scale_base, ctx.scale_expert
        )
    adapters: list[list[Tensor | None]] = [[None] * n for _ in range(4)]
    if want_adapter:
        d_down = next(found)
        for j in range(n):
            adapters[0][j], adapters[2][j] = unpack_down(ctx.columns, d_down, j)
            adapters[1][j], adapters[3][j] = unpack_up(ctx.columns, next(found), j)
    d_weights: list[Tensor | None] = [None] * n
    d_biases: list[Tensor | None] = [None] * n
    for j in range(n):
        d_weights[j] = next(found) if want_weight[j] else None
        d_biases[j] = next(found) if want_bias[j] else None
    return (dx, d_weights, d_biases, *adapters, d_base_gates, d_expert_gates, *([None] * 5))


def _each(flag: Any, n: int) -> list[bool]:
    """needs_input_grad of a list argument, which is one flag per element or one for all."""
    return list(flag) if isinstance(flag, (list, tuple)) else [bool(flag)] * n


lora_moe.register_autograd(_backward_of_forward, setup_context=_save)
