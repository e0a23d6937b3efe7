"""Root-mean-square norm over the full width, then rotary positions within each head.

Letters: B clips, L tokens, D width, N heads, P = D / N / 2 rotated pairs per head. With n = x * r rounded to
the dtype of x, r = 1 / sqrt(mean(x^2) + eps), R the rotation and g = weight * R^T dy, means over D:

    y = R(n * weight),  dx = r * (g - x * r^2 * mean(g * x)),  dweight = sum over tokens of (R^T dy) * n
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda_library
from .backend import check_tokens, chosen, partial_sums, wide

__all__ = ["rms_norm_rope", "rms_norm_rope_reference"]


def rms_norm_rope_reference(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, eps: float
) -> Tensor:
    """The definition of `rms_norm_rope`, in plain PyTorch."""
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    y = (y.to(x.dtype) * weight).to(x.dtype)
    return y if cos is None or sin is None else _rotated(y, cos, sin, num_heads).to(x.dtype)


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """x over its root mean square, times weight; each head's pairs (2i, 2i + 1) rotated to its position.

    Args:
        x: [B, L, D], floating; normalised wide, rounded to its dtype, scaled, rounded and rotated.
        weight: [D] of any floating dtype.
        cos, sin: [L, P] wide, or None for no rotation.
        num_heads: heads that D is split into, D / num_heads even.
        eps: added to the mean square.
        backend: "auto", "reference" or "fused".

    Returns: [B, L, D] in the dtype of x.

    Raises: ValueError for shapes, devices or a backend that do not fit.
    """
    _check(x, weight, cos, sin, num_heads)
    if chosen(backend, x) == "reference":
        return rms_norm_rope_reference(x, weight, cos, sin, num_heads, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if cos is not None and sin is not None:
        cos, sin = cos.to(dtype), sin.to(dtype)
    return _rms_norm_rope(x, weight.to(dtype), cos, sin, num_heads, eps)[0]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    even, odd = x.to(cos.dtype).unflatten(-1, (num_heads, -1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-3)


def _check(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> None:
    check_tokens(x=x)
    _, tokens, d = x.shape
    if num_heads < 1 or d % (2 * num_heads):
        raise ValueError(f"D = {d} does not split into {num_heads} heads of an even width")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin are given together or not at all")
    pairs = d // num_heads // 2
    expected = {"weight": (weight, (d,)), "cos": (cos, (tokens, pairs)), "sin": (sin, (tokens, pairs))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != x.device):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}; expected {shape} on {x.device}"
            )


@torch.library.custom_op("wanmoe::rms_norm_rope", mutates_args=())
def _rms_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """y, and the reciprocal root mean square [B, L] of each row."""
    x_wide = wide(x)
    rstd = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    y = ((x_wide * rstd).to(x.dtype) * weight).to(x.dtype)
    if cos is not None and sin is not None:
        y = _rotated(y, cos, sin, num_heads).to(x.dtype)
    return y.contiguous(), rstd[..., 0].contiguous()


@_rms_norm_rope.register_fake
def _(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(x.shape[:2])


@_rms_norm_rope.register_kernel("cuda")
def _rms_norm_rope_cuda(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    x, weight, cos, sin = _contiguous(x, weight, cos, sin)
    y, rstd = torch.empty_like(x), weight.new_empty(x.shape[:2])
    cuda_library.ops().rms_norm_rope_forward(x, weight, cos, sin, y, rstd, num_heads, eps)
    return y, rstd


@torch.library.custom_op("wanmoe::rms_norm_rope_backward", mutates_args=())
def _rms_norm_rope_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rstd: Tensor,
    num_heads: int,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and dweight if wanted, else an empty tensor."""
    x_wide, r = wide(x), rstd.unsqueeze(-1)
    dy = dy.to(x_wide.dtype)
    if cos is not None and sin is not None:
        dy = _rotated(dy, cos, -sin, num_heads)
    g = dy * weight
    dx = r * (g - x_wide * (r.square() * (g * x_wide).mean(dim=-1, keepdim=True)))
    dweight = (dy * (x_wide * r).to(x.dtype)).sum(dim=(0, 1)) if want_weight else weight.new_empty(0)
    return dx.to(x.dtype).contiguous(), dweight


@_rms_norm_rope_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rstd: Tensor,
    num_heads: int,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if want_weight else (0,))


@_rms_norm_rope_backward.register_kernel("cuda")
def _rms_norm_rope_backward_cuda(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rstd: Tensor,
    num_heads: int,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    ops = cuda_library.ops()
    dy = dy.contiguous()
    x, weight, cos, sin = _contiguous(x, weight, cos, sin)
    dx = torch.empty_like(x)
    ops.rms_norm_rope_backward(dy, x, weight, cos, sin, rstd, dx, num_heads)
    if not want_weight:
        return dx, weight.new_empty(0)
    sums = partial_sums(x)
    ops.rms_norm_rope_weight_grad(dy, x, cos, sin, rstd, sums, num_heads)
    return dx, sums.sum(dim=(0, 1))


def _contiguous(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    cos, sin = (None if angles is None else angles.contiguous() for angles in (cos, sin))
    return x.contiguous(), weight.contiguous(), cos, sin


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, cos, sin, ctx.num_heads, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, cos, sin, output[1])


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    need_weight = ctx.needs_input_grad[1]
    dx, dweight = _rms_norm_rope_backward(dy, *ctx.saved_tensors, ctx.num_heads, need_weight)
    return dx, dweight if need_weight else None, None, None, None, None


_rms_norm_rope.register_autograd(_backward, setup_context=_setup)
