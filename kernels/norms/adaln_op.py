"""The opaque op behind `adaln`, `layer_norm` and their residual forms, and its backward.

Letters: B clips, L tokens, D width. y = n * (offset + scale) + shift with n = norm(x); the offset is 1 for a
modulation, 0 for a weight and a bias. With g = dy * (offset + scale) and r = 1 / sqrt(var + eps):

    dx = r * (g - mean(g) - n * mean(g * n)),  means over D
    dscale = sum of dy * n,  dshift = sum of dy,  sums over tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda_library
from .backend import partial_sums, sum_to_clips, wide
from .gated_residual import cuda_gate_grad, gated_residual_reference

__all__ = ["fused_adaln"]


def fused_adaln(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    offset: float,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(x + h * gate, or an empty tensor without h; its modulated norm). Arguments as in `residual_adaln`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate = None if gate is None else gate.to(dtype)
    scale, shift = scale.to(dtype), shift.to(dtype)
    x_new, y, _, _ = _adaln(x, h, gate, scale, shift, offset, eps, out_dtype or x.dtype)
    return x_new, y


@torch.library.custom_op("wanmoe::adaln", mutates_args=())
def _adaln(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    offset: float,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new or an empty tensor, y, and the mean and reciprocal deviation [B, L] of each row, wide."""
    x_new = x.new_empty(0) if h is None else gated_residual_reference(x, h, gate).contiguous()
    rows = wide(x if h is None else x_new)
    mean = rows.mean(dim=-1, keepdim=True)
    centred = rows - mean
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = (centred * rstd * (offset + scale) + shift).to(out_dtype).contiguous()
    return x_new, y, mean[..., 0].contiguous(), rstd[..., 0].contiguous()


@_adaln.register_fake
def _(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    offset: float,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = scale.new_empty(x.shape[:2])
    x_new = x.new_empty(0 if h is None else x.shape)
    return x_new, x.new_empty(x.shape, dtype=out_dtype), rows, torch.empty_like(rows)


@_adaln.register_kernel("cuda")
def _adaln_cuda(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    offset: float,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, h = x.contiguous(), None if h is None else h.contiguous()
    x_new = x.new_empty(0 if h is None else x.shape)
    y = torch.empty_like(x, dtype=out_dtype)
    mean, rstd = (scale.new_empty(x.shape[:2]) for _ in range(2))
    sum_out = None if h is None else x_new
    cuda_library.ops().adaln_forward(x, h, gate, scale, shift, sum_out, y, mean, rstd, offset, eps)
    return x_new, y, mean, rstd


@torch.library.custom_op("wanmoe::adaln_backward", mutates_args=())
def _adaln_backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    dh_dtype: torch.dtype | None,
    want_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx; dh if there is a gate and a dtype for it; dgate if h is given; dscale, dshift if wanted.

    What is not asked for is empty.

    x is what the norm read, the sum where there was one; dx_new is the gradient that reaches the sum itself.
    Without a gate dh is dx.
    """
    norm = (wide(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dy = dy.to(norm.dtype)
    g = dy * (offset + scale)
    dx = g - g.mean(dim=-1, keepdim=True) - norm * (g * norm).mean(dim=-1, keepdim=True)
    dx = rstd.unsqueeze(-1) * dx + (0 if dx_new is None else dx_new)
    empty = [scale.new_empty(0) for _ in range(4)]
    return (
        dx.to(x.dtype).contiguous(),
        empty[0] if gate is None or dh_dtype is None else (dx * gate).to(dh_dtype).contiguous(),
        empty[1] if gate is None or h is None else sum_to_clips(dx * h, gate),
        sum_to_clips(dy * norm, scale) if want_params else empty[2],
        # Times one: the sum over one token is dy itself, and outputs of an op share no memory with inputs.
        sum_to_clips(dy * 1, scale) if want_params else empty[3],
    )


@_adaln_backward.register_fake
def _(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    dh_dtype: torch.dtype | None,
    want_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dh_shape = (0,) if gate is None or dh_dtype is None else x.shape
    dscale = scale.new_empty(scale.shape if want_params else (0,))
    return (
        x.new_empty(x.shape),
        scale.new_empty(dh_shape, dtype=dh_dtype if gate is not None else None),
        scale.new_empty((0,) if gate is None or h is None else gate.shape),
        dscale,
        torch.empty_like(dscale),
    )


@_adaln_backward.register_kernel("cuda")
def _adaln_backward_cuda(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    dh_dtype: torch.dtype | None,
    want_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ops = cuda_library.ops()
    dy, x = dy.contiguous(), x.contiguous()
    dx_new = None if dx_new is None else dx_new.contiguous()
    dx = torch.empty_like(x)
    dh, dgate, dscale, dshift = (scale.new_empty(0) for _ in range(4))
    want_dh = gate is not None and dh_dtype is not None
    if want_dh:
        dh = torch.empty_like(x, dtype=dh_dtype)
    ops.adaln_backward(dy, dx_new, x, gate, scale, mean, rstd, dx, dh if want_dh else None, offset)
    if gate is not None and h is not None:
        dgate = cuda_gate_grad(dx, h.contiguous(), gate)
    if want_params:
        sums = partial_sums(dy), partial_sums(dy)
        ops.adaln_param_grads(dy, x, mean, rstd, *sums)
        dscale, dshift = (sum_to_clips(partial, scale) for partial in sums)
    return dx, dh, dgate, dscale, dshift


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h, gate, scale, _, ctx.offset, _, _ = inputs
    x_new, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.h_dtype = None if h is None else h.dtype
    # A frozen gate, as in adapter training, does not keep h alive.
    kept_h = h if gate is not None and gate.requires_grad else None
    ctx.save_for_backward(x if h is None else x_new, kept_h, gate, scale, mean, rstd)


def _backward(ctx: Any, dx_new: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, h, gate, scale, mean, rstd = ctx.saved_tensors
    _, need_h, need_gate, need_scale, need_shift = ctx.needs_input_grad[:5]
    dx, dh, dgate, dscale, dshift = _adaln_backward(
        torch.zeros_like(x) if dy is None else dy,
        None if ctx.h_dtype is None else dx_new,
        x,
        h,
        gate,
        scale,
        mean,
        rstd,
        ctx.offset,
        ctx.h_dtype if need_h else None,
        need_scale or need_shift,
    )
    if need_h and gate is None:
        dh = dx.to(ctx.h_dtype)
    wanted = zip((dh, dgate, dscale, dshift), (need_h, need_gate, need_scale, need_shift), strict=True)
    return (dx, *(grad if need else None for grad, need in wanted), None, None, None)


_adaln.register_autograd(_backward, setup_context=_setup)
