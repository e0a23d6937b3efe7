"""The gated residual sum x + h * gate.

Letters: B clips, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda_library
from .backend import check_clip_vector, check_tokens, chosen, partial_sums, sum_to_clips, wide

__all__ = ["cuda_gate_grad", "gated_residual", "gated_residual_reference"]


def gated_residual_reference(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """The definition of `gated_residual`, in plain PyTorch."""
    return (wide(x) + (h if gate is None else h * gate)).to(x.dtype)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor | None, *, backend: str = "auto") -> Tensor:
    """x + h * gate, summed wide and rounded once; without a gate x + h.

    Args:
        x, h: [B, L, D], floating.
        gate: [B, 1, D] or [1, 1, D], or None.
        backend: "auto", "reference" or "fused".

    Returns: [B, L, D] in the dtype of x.

    Raises: ValueError for shapes, devices or a backend that do not fit.
    """
    check_tokens(x=x, h=h)
    check_clip_vector(x, gate=gate)
    if chosen(backend, x) == "reference":
        return gated_residual_reference(x, h, gate)
    return _gated_residual(x, h, None if gate is None else gate.to(wide(x[:0]).dtype))


@torch.library.custom_op("wanmoe::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    return gated_residual_reference(x, h, gate).contiguous()


@_gated_residual.register_fake
def _(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_gated_residual.register_kernel("cuda")
def _gated_residual_cuda(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    x, h = x.contiguous(), h.contiguous()
    y = torch.empty_like(x)
    cuda_library.ops().gated_sum(x, h, gate, y)
    return y


@torch.library.custom_op("wanmoe::gated_residual_backward", mutates_args=())
def _gated_residual_backward(
    dy: Tensor, h: Tensor | None, gate: Tensor, dh_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dh, and dgate if h is given, else an empty tensor."""
    dy = wide(dy)
    dh = (dy * gate).to(dh_dtype).contiguous()
    return dh, gate.new_empty(0) if h is None else sum_to_clips(dy * h, gate)


@_gated_residual_backward.register_fake
def _(dy: Tensor, h: Tensor | None, gate: Tensor, dh_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape, dtype=dh_dtype), gate.new_empty((0,) if h is None else gate.shape)


@_gated_residual_backward.register_kernel("cuda")
def _gated_residual_backward_cuda(
    dy: Tensor, h: Tensor | None, gate: Tensor, dh_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    dh = torch.empty_like(dy, dtype=dh_dtype)
    cuda_library.ops().gated_sum(None, dy, gate, dh)
    return dh, gate.new_empty(0) if h is None else cuda_gate_grad(dy, h.contiguous(), gate)


def cuda_gate_grad(dy: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """The sum over tokens of dy * h, both contiguous [B, L, D], in the shape of gate."""
    sums = partial_sums(dy)
    cuda_library.ops().gate_grad(dy, h, sums)
    return sum_to_clips(sums, gate)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, h, gate = inputs
    ctx.h_dtype = h.dtype
    # A frozen gate, as in adapter training, does not keep h alive.
    ctx.save_for_backward(h if gate is not None and gate.requires_grad else None, gate)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, gate = ctx.saved_tensors
    _, need_h, need_gate = ctx.needs_input_grad
    if gate is None:
        return dy, dy.to(ctx.h_dtype), None
    if not (need_h or need_gate):
        return dy, None, None
    dh, dgate = _gated_residual_backward(dy, h, gate, ctx.h_dtype)
    return dy, dh, dgate if need_gate else None


_gated_residual.register_autograd(_backward, setup_context=_setup)
