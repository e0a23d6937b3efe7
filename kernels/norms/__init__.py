"""The memory-bound ops of a transformer block: modulated norms, gated residual sums, RMS norm with RoPE.

Each has a plain PyTorch reference, which `backend="auto"` runs on the CPU, and a fused form: on a GPU the
kernels of csrc/, elsewhere their formulas, forward and backward, in PyTorch.
"""

from .adaln import (
    adaln,
    adaln_reference,
    layer_norm,
    layer_norm_reference,
    residual_adaln,
    residual_adaln_reference,
    residual_layer_norm,
    residual_layer_norm_reference,
)
from .backend import wide
from .gated_residual import gated_residual, gated_residual_reference
from .rms_norm_rope import rms_norm_rope, rms_norm_rope_reference

__all__ = [
    "adaln",
    "adaln_reference",
    "gated_residual",
    "gated_residual_reference",
    "layer_norm",
    "layer_norm_reference",
    "residual_adaln",
    "residual_adaln_reference",
    "residual_layer_norm",
    "residual_layer_norm_reference",
    "rms_norm_rope",
    "rms_norm_rope_reference",
    "wide",
]
