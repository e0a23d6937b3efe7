"""All experts in two matrix products: one shrink to the packed rank, gates, one expand onto the base
product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_moe_linear_packed(
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
    """As `lora_moe_linear_reference`; cost does not depend on the gates, and no gate is read by the host."""
    experts, rank, _ = expert_down.shape
    rows = expert_gates.shape[0]
    tokens = x.reshape(-1, x.shape[-1])
    down = torch.cat([base_down, expert_down.flatten(0, 1)]).to(x.dtype)
    up = torch.cat([base_up, expert_up.transpose(0, 1).flatten(1)], dim=1).to(x.dtype)
    # Gates are applied in fp32 (fp64 for fp64 inputs), whatever the dtype of x.
    wide = torch.promote_types(x.dtype, torch.float32)
    gates = torch.cat(
        [
            (scale_base * base_gates.to(wide))[:, None].expand(rows, base_down.shape[0]),
            (scale_expert * expert_gates.to(wide))[:, :, None].expand(rows, experts, rank).flatten(1),
        ],
        dim=1,
    )
    h = (tokens @ down.t()).view(rows, tokens_per_row, -1)
    h = (h * gates[:, None]).to(x.dtype)
    y = F.linear(tokens, weight, bias)
    # In place: y is fresh here and the backward of a linear does not need its output.
    y = y.addmm_(h.flatten(0, 1), up.t())
    return y.view(*x.shape[:-1], weight.shape[0])
