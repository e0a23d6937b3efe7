"""What one adapted linear is made of, and how the adapters of linears that read the same x are packed.

Letters: N tokens, G gate rows, E experts, r rank, R packed rank of one linear, W packed width of the group.

Packed layout `wanmoe/1`: a linear's columns are its base ranks, then expert 0's ranks, expert 1's, ...; the
linears of a group follow each other. For the Triton kernels each linear's columns are padded with zeros to a
power of two, at least 16, and so is the group: `tl.arange` needs the one and the tensor cores the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoRAMoEWeights(NamedTuple):
    """A frozen linear with its base LoRA and E expert LoRAs; shapes as in `lora_moe_linear`."""

    weight: Tensor
    """[d_out, d_in]"""
    bias: Tensor | None
    """[d_out]"""
    base_down: Tensor
    """[r_b, d_in]"""
    base_up: Tensor
    """[d_out, r_b]"""
    expert_down: Tensor
    """[E, r, d_in]"""
    expert_up: Tensor
    """[E, d_out, r]"""
    scale_base: float
    scale_expert: float


class Layout(NamedTuple):
    """Where the columns of each linear of a group lie."""

    base: tuple[int, ...]
    """Base rank of each linear."""
    expert: tuple[int, ...]
    """Rank of one expert of each linear."""
    experts: int
    starts: tuple[int, ...]
    """First column of each linear."""
    widths: tuple[int, ...]
    """Columns of each linear, padding included."""
    width: int
    """Columns of the group, padding included."""

    def columns(self, j: int) -> slice:
        """Columns of linear j, padding included."""
        return slice(self.starts[j], self.starts[j] + self.widths[j])

    def rank(self, j: int) -> int:
        """Packed rank R of linear j, without padding."""
        return self.base[j] + self.experts * self.expert[j]


class Packed(NamedTuple):
    """The adapters of a group in the dtype of x, and their gates per column in fp32 (fp64 for fp64)."""

    down: Tensor
    """[W, d_in]"""
    ups: list[Tensor]
    """Of each linear, [d_out, columns]."""
    gates: Tensor
    """[G, W]: scale x gate of each column; zero in the padding."""


def layout(base: Sequence[int], expert: Sequence[int], experts: int, *, padded: bool) -> Layout:
    """The columns of linears with these ranks."""
    widths = [b + experts * r for b, r in zip(base, expert, strict=True)]
    if padded:
        widths = [max(16, _power_of_two(width)) for width in widths]
    starts = [sum(widths[:j]) for j in range(len(widths))]
    total = sum(widths)
    return Layout(
        tuple(base),
        tuple(expert),
        experts,
        tuple(starts),
        tuple(widths),
        _power_of_two(total) if padded else total,
    )


def pack(
    columns: Layout,
    base_down: Sequence[Tensor],
    base_up: Sequence[Tensor],
    expert_down: Sequence[Tensor],
    expert_up: Sequence[Tensor],
    base_gates: Tensor,
    expert_gates: Tensor,
    scale_base: Sequence[float],
    scale_expert: Sequence[float],
    dtype: torch.dtype,
) -> Packed:
    """Packs by plain copies, on any device; `forms.pack` is the same in one launch per linear."""
    device, rows = base_gates.device, base_gates.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    down = torch.zeros(columns.width, base_down[0].shape[1], dtype=dtype, device=device)
    gates = torch.zeros(rows, columns.width, dtype=wide, device=device)
    ups = []
    for j, start in enumerate(columns.starts):
        experts, r, _ = expert_down[j].shape
        middle, end = start + columns.base[j], start + columns.rank(j)
        down[start:middle] = base_down[j]
        down[middle:end] = expert_down[j].flatten(0, 1)
        up = torch.zeros(base_up[j].shape[0], columns.widths[j], dtype=dtype, device=device)
        up[:, : columns.base[j]] = base_up[j]
        up[:, columns.base[j] : columns.rank(j)].unflatten(1, (experts, r)).copy_(
            expert_up[j].transpose(0, 1)
        )
        ups.append(up)
        gates[:, start:middle] = scale_base[j] * base_gates.to(wide)[:, None]
        gates[:, middle:end].unflatten(1, (experts, r)).copy_(
            (scale_expert[j] * expert_gates.to(wide))[:, :, None].expand(-1, -1, r)
        )
    return Packed(down, ups, gates)


def unpack_gates(
    columns: Layout,
    grad: Tensor,
    scale_base: Sequence[float],
    scale_expert: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Gradient per column [G, W] to gradients of base_gates [G] and expert_gates [G, E]."""
    base = grad.new_zeros(grad.shape[0])
    experts = grad.new_zeros(grad.shape[0], columns.experts)
    for j, start in enumerate(columns.starts):
        middle, end = start + columns.base[j], start + columns.rank(j)
        base = base + scale_base[j] * grad[:, start:middle].sum(1)
        if columns.experts:
            per_rank = grad[:, middle:end].unflatten(1, (columns.experts, columns.expert[j]))
            experts = experts + scale_expert[j] * per_rank.sum(2)
    return base, experts


def unpack_down(columns: Layout, grad: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """Gradient of the packed down [W, d_in] to those of linear j: [r_b, d_in] and [E, r, d_in]."""
    middle = columns.starts[j] + columns.base[j]
    experts = grad[middle : columns.starts[j] + columns.rank(j)]
    return grad[columns.starts[j] : middle], experts.unflatten(0, (columns.experts, columns.expert[j]))


def unpack_up(columns: Layout, grad: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """Gradient of linear j's packed up [d_out, columns] to [d_out, r_b] and [E, d_out, r]."""
    experts = grad[:, columns.base[j] : columns.rank(j)]
    return grad[:, : columns.base[j]], experts.unflatten(1, (columns.experts, columns.expert[j])).transpose(
        0, 1
    )


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
