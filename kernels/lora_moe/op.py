"""The public op: checks what it is given and picks the backend."""

from __future__ import annotations

import math

from torch import Tensor

from .packed import lora_moe_linear_packed
from .reference import lora_moe_linear_reference

BACKENDS = {"packed": lora_moe_linear_packed, "reference": lora_moe_linear_reference}


def lora_moe_linear(
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
    backend: str = "auto",
) -> Tensor:
    """A frozen linear, a base LoRA and E expert LoRAs, the experts mixed by a gate row per group of tokens.

    Args:
        x: [..., d_in], floating; its N tokens in order are split into G equal groups of tokens_per_row, one
            gate row each.
        weight, bias: [d_out, d_in], [d_out] or None, in the dtype of x; frozen or not.
        base_down, base_up: [r_b, d_in], [d_out, r_b], floating like the experts and the gates.
        expert_down, expert_up: [E, r, d_in], [E, d_out, r].
        base_gates, expert_gates: [G], [G, E]; differentiable.
        scale_base, scale_expert: alpha / rank of each part.
        backend: "auto" (packed), "packed" or "reference".

    Returns: [..., d_out] in the dtype of x.

    Raises: ValueError with the offending shape, dtype, device or backend.
    """
    _check(
        x, weight, bias, base_down, base_up, expert_down, expert_up, base_gates, expert_gates, tokens_per_row
    )
    name = "packed" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose from auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](
        x,
        weight,
        bias,
        base_down,
        base_up,
        expert_down,
        expert_up,
        base_gates,
        expert_gates,
        tokens_per_row,
        scale_base=scale_base,
        scale_expert=scale_expert,
    )


def _check(
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
) -> None:
    if weight.dim() != 2 or expert_down.dim() != 3 or base_down.dim() != 2 or expert_gates.dim() != 2:
        raise ValueError(
            f"weight {tuple(weight.shape)}, base_down {tuple(base_down.shape)}, "
            f"expert_down {tuple(expert_down.shape)} and expert_gates {tuple(expert_gates.shape)} "
            "must have 2, 2, 3 and 2 axes"
        )
    d_out, d_in = weight.shape
    experts, rank, _ = expert_down.shape
    rows = expert_gates.shape[0]
    expected = {
        "x": (x, (*x.shape[:-1], d_in)),
        "weight": (weight, (d_out, d_in)),
        "base_down": (base_down, (base_down.shape[0], d_in)),
        "base_up": (base_up, (d_out, base_down.shape[0])),
        "expert_down": (expert_down, (experts, rank, d_in)),
        "expert_up": (expert_up, (experts, d_out, rank)),
        "expert_gates": (expert_gates, (rows, experts)),
        "base_gates": (base_gates, (rows,)),
    }
    if bias is not None:
        expected["bias"] = (bias, (d_out,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating dtype")
        if name in ("weight", "bias") and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, x is {x.dtype}; convert one to the other")
    tokens = math.prod(x.shape[:-1])
    if not tokens or tokens_per_row < 1:
        raise ValueError(
            f"x {tuple(x.shape)} has {tokens} tokens, {tokens_per_row} per gate row; both must be 1 or more"
        )
    if rows * tokens_per_row != tokens:
        raise ValueError(f"{rows} gate rows x {tokens_per_row} tokens per row do not make {tokens} tokens")
