"""The LoRA-MoE linear in plain PyTorch: the specification that every faster form is compared with.

Letters: N tokens, G gate rows, E experts, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lora_moe_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_down: Tensor,
    base_up: Tensor,
    expert_down: Tensor,
    expert_up: Tensor,
    base_gates: Tensor,
    expert_gates: Tensor,
    tokens_per_row: int,
    *,
    scale_base: float,
    scale_expert: float,
) -> Tensor:
    """y = W x + b + s_base g_base B_b A_b x + sum_e s_expert g_e B_e A_e x, one expert at a time, rounded
    once.

    Shapes as in `lora_moe_linear`. Computed in fp32 (fp64 for fp64 inputs) and returned in the dtype of x.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens = x.reshape(-1, x.shape[-1]).to(wide)
    row = torch.arange(tokens.shape[0], device=x.device) // tokens_per_row
    y = tokens @ weight.to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    base = tokens @ base_down.to(wide).t() @ base_up.to(wide).t()
    y = y + scale_base * base_gates.to(wide)[row, None] * base
    for e in range(expert_down.shape[0]):
        delta = tokens @ expert_down[e].to(wide).t() @ expert_up[e].to(wide).t()
        y = y + scale_expert * expert_gates.to(wide)[row, e, None] * delta
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
