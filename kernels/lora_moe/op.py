"""The public op: checks what it is given and picks the backend."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ..dry_run import on_card
from . import autograd  # noqa: F401  registers the ops
from .reference import lora_moe_linear_reference
from .weights import LoRAMoEWeights

_log = logging.getLogger(__name__)

_HAS_TRITON = find_spec("triton") is not None
if torch.version.cuda and not _HAS_TRITON:
    _log.warning("triton is not installed: adapters run as library matrix products; pip install triton")

BACKENDS = ("packed", "triton", "reference")


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
        expert_down, expert_up: [E, r, d_in], [E, d_out, r]; E of 0 leaves the base alone.
        base_gates, expert_gates: [G], [G, E]; differentiable.
        scale_base, scale_expert: alpha / rank of each part.
        backend: "auto" (triton on CUDA, packed elsewhere), "packed" (library matrix products), "triton" (the
            form that the stored table names for this card and shape, library products where it names none; on
            the CPU in Triton's interpreter) or "reference".

    Returns: [..., d_out] in the dtype of x.

    Raises: ValueError with the offending shape, dtype, device or backend.
    """
    linear = LoRAMoEWeights(
        weight, bias, base_down, base_up, expert_down, expert_up, scale_base, scale_expert
    )
    (y,) = lora_moe_linears(x, [linear], base_gates, expert_gates, tokens_per_row, backend=backend)
    return y


def lora_moe_linears(
    x: Tensor,
    linears: Sequence[LoRAMoEWeights],
    base_gates: Tensor,
    expert_gates: Tensor,
    tokens_per_row: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """`lora_moe_linear` for linears that read the same x: q, k and v, or k and v of cross-attention.

    Args:
        linears: one `LoRAMoEWeights` each, of one d_in and one number of experts; ranks and d_out may differ.
        x, base_gates, expert_gates, tokens_per_row, backend: as in `lora_moe_linear`.

    One shrink serves all of them, and in the backward one pass over x and one dx that is accumulated in the
    dtype of x, linear after linear.

    Returns: [..., d_out] of each linear. Raises: ValueError as `lora_moe_linear`.
    """
    if not linears:
        raise ValueError("linears is empty; give at least one")
    for j, linear in enumerate(linears):
        where = f" (linear {j + 1} of {len(linears)})" if len(linears) > 1 else ""
        if not isinstance(linear, LoRAMoEWeights):
            raise ValueError(f"linears holds a {type(linear).__name__}{where}; expected LoRAMoEWeights")
        _check(x, linear, base_gates, expert_gates, tokens_per_row, where)
    name = _backend(backend, x)
    if name == "reference":
        return tuple(
            lora_moe_linear_reference(
                x,
                *linear[:6],
                base_gates,
                expert_gates,
                tokens_per_row,
                scale_base=linear.scale_base,
                scale_expert=linear.scale_expert,
            )
            for linear in linears
        )
    adapters = [list(part) for part in zip(*linears, strict=True)]
    gates = [base_gates, expert_gates]
    trained = [x, *gates, *(tensor for part in adapters[:6] for tensor in part if tensor is not None)]
    biases = [x.new_empty(0) if bias is None else bias for bias in adapters[1]]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.ops.wanmoe.lora_moe(
        tokens,
        adapters[0],
        biases,
        *adapters[2:6],
        *gates,
        tokens_per_row,
        adapters[6],
        adapters[7],
        name,
        save,
    )
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in out[: len(linears)])


def _backend(asked: str, x: Tensor) -> str:
    if asked != "auto":
        if asked not in BACKENDS:
            raise ValueError(f"backend {asked!r} is unknown; choose from auto, {', '.join(BACKENDS)}")
        if asked == "triton" and not _HAS_TRITON:
            raise ValueError("backend 'triton' needs the package triton: pip install triton")
        if asked == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend 'triton' needs a CUDA tensor and x is on {x.device}; TRITON_INTERPRET=1, set "
                "before Python starts, runs it in Triton's interpreter; backend='packed' runs anywhere"
            )
        return asked
    return "triton" if on_card(x) and _HAS_TRITON else "packed"


def _check(
    x: Tensor,
    linear: LoRAMoEWeights,
    base_gates: Tensor,
    expert_gates: Tensor,
    tokens_per_row: int,
    where: str,
) -> None:
    if not isinstance(tokens_per_row, (int, torch.SymInt)):
        raise ValueError(f"tokens_per_row is {tokens_per_row!r}, expected an integer")
    weight, bias, base_down, base_up, expert_down, expert_up = linear[:6]
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
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}{where}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating dtype{where}")
        if name in ("weight", "bias") and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, x is {x.dtype}; convert one to the other")
    if not rank or not base_down.shape[0]:
        raise ValueError(
            f"base_down {tuple(base_down.shape)} and expert_down {tuple(expert_down.shape)} must have a rank "
            "of 1 or more"
        )
    tokens = math.prod(x.shape[:-1])
    if not tokens or tokens_per_row < 1:
        raise ValueError(
            f"x {tuple(x.shape)} has {tokens} tokens, {tokens_per_row} per gate row; both must be 1 or more"
        )
    if rows * tokens_per_row != tokens:
        raise ValueError(f"{rows} gate rows x {tokens_per_row} tokens per row do not make {tokens} tokens")
