"""Layer norm with a scale and a shift, alone or of a gated residual sum made in the same pass.

Letters: B clips, L tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .adaln_op import fused_adaln
from .backend import check_clip_vector, check_tokens, chosen, wide
from .gated_residual import gated_residual_reference

__all__ = [
    "adaln",
    "adaln_reference",
    "layer_norm",
    "layer_norm_reference",
    "residual_adaln",
    "residual_adaln_reference",
    "residual_layer_norm",
    "residual_layer_norm_reference",
]


def adaln_reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The definition of `adaln`, in plain PyTorch."""
    norm = F.layer_norm(wide(x), x.shape[-1:], None, None, eps)
    return (norm * (1 + scale) + shift).to(out_dtype or x.dtype)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The definition of `layer_norm`, in plain PyTorch."""
    x_wide = wide(x)
    weight, bias = weight.to(x_wide.dtype), bias.to(x_wide.dtype)
    return F.layer_norm(x_wide, x.shape[-1:], weight, bias, eps).to(out_dtype or x.dtype)


def residual_adaln_reference(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `residual_adaln`, in plain PyTorch."""
    x = gated_residual_reference(x, h, gate)
    return x, adaln_reference(x, scale, shift, eps, out_dtype)


def residual_layer_norm_reference(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `residual_layer_norm`, in plain PyTorch."""
    x = gated_residual_reference(x, h, gate)
    return x, layer_norm_reference(x, weight, bias, eps, out_dtype)


def adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Layer norm of x, modulated: norm(x) * (1 + scale) + shift, computed wide and rounded once.

    Args:
        x: [B, L, D], floating.
        scale, shift: [B, 1, D] or [1, 1, D], wide.
        eps: added to the variance.
        out_dtype: of the result; that of x by default.
        backend: "auto", "reference" or "fused".

    Returns: [B, L, D].

    Raises: ValueError for shapes, devices or a backend that do not fit.
    """
    check_tokens(x=x)
    check_clip_vector(x, scale=scale, shift=shift)
    if chosen(backend, x) == "reference":
        return adaln_reference(x, scale, shift, eps, out_dtype)
    return fused_adaln(x, None, None, scale, shift, 1.0, eps, out_dtype)[1]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Layer norm of x with a weight and a bias [D] of any dtype; all else as in `adaln`."""
    check_tokens(x=x)
    weight_row, bias_row = _rows(x, weight, bias)
    if chosen(backend, x) == "reference":
        return layer_norm_reference(x, weight, bias, eps, out_dtype)
    return fused_adaln(x, None, None, weight_row, bias_row, 0.0, eps, out_dtype)[1]


def residual_adaln(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_residual(x, h, gate)` and the `adaln` of it, which the fused pass does not read again.

    Arguments as there. Returns (sum in the dtype of x, modulated norm in out_dtype).
    """
    check_tokens(x=x, h=h)
    check_clip_vector(x, gate=gate, scale=scale, shift=shift)
    if chosen(backend, x) == "reference":
        return residual_adaln_reference(x, h, gate, scale, shift, eps, out_dtype)
    return fused_adaln(x, h, gate, scale, shift, 1.0, eps, out_dtype)


def residual_layer_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_residual(x, h, gate)` and the `layer_norm` of it; all else as in `residual_adaln`."""
    check_tokens(x=x, h=h)
    check_clip_vector(x, gate=gate)
    weight_row, bias_row = _rows(x, weight, bias)
    if chosen(backend, x) == "reference":
        return residual_layer_norm_reference(x, h, gate, weight, bias, eps, out_dtype)
    return fused_adaln(x, h, gate, weight_row, bias_row, 0.0, eps, out_dtype)


def _rows(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    for name, vector in (("weight", weight), ("bias", bias)):
        if tuple(vector.shape) != (x.shape[-1],) or vector.device != x.device:
            raise ValueError(
                f"{name} is {tuple(vector.shape)} on {vector.device}; expected [{x.shape[-1]}] on {x.device}"
            )
    return weight.view(1, 1, -1), bias.view(1, 1, -1)
