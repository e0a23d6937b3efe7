"""Peak memory, bytes kept for the backward, and memory that is full of NaN before it is handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

_SMALL = 512 << 10
"""Allocations below 1 MiB come from pools of their own in the caching allocator."""


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory allocated at once during `run`, above what was allocated before it; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def saved_bytes(run: Callable[[], object], persistent: Iterable[Tensor]) -> int:
    """Bytes of the storages that the graph of `run` keeps for its backward, each counted once.

    persistent: weights and parameters, which stay whether saved or not and are left out.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in persistent}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            # Two storages with one address can only be told apart while both live.
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


@contextmanager
def poisoned(device: torch.device, size: int) -> Iterator[None]:
    """Inside, fresh memory starts as NaN: a value that nothing wrote shows.

    On CUDA the caching allocator is emptied, and given back `size` bytes and some small blocks of ones, which
    is NaN in every floating type; it hands them out next. On the CPU PyTorch's own fill is switched on.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        size = min(max(size, 2 << 20), int(0.8 * free))
        blocks = [torch.empty(size, dtype=torch.uint8, device=device)]
        blocks += [torch.empty(_SMALL, dtype=torch.uint8, device=device) for _ in range(16)]
        for block in blocks:
            block.fill_(255)
        del blocks, block
        yield
        return
    settings: Any = deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)
