"""Any module whose blocks run one after the other, such as a text encoder, through a ring: forward alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .block_store import BlockStore
from .ring import BlockRing

__all__ = ["stream_blocks"]


def stream_blocks(blocks: Sequence[nn.Module], after: nn.Module, ring: BlockRing) -> None:
    """From now on every block runs on the ring's device, its tensors copied there for its turn.

    Whatever a block is called with is taken to the device, and what `after`, the module that comes behind the
    last block, is called with to where that one lies.
    """
    store = BlockStore(ring.device)
    dtypes = {
        f"blocks.{i}.{name}": p.dtype
        for i, block in enumerate(blocks)
        for name, p in block.named_parameters()
    }
    store.lay_out(blocks, dtypes.__getitem__)
    for i, block in enumerate(blocks):
        block.requires_grad_(False)
        for name, parameter in list(block.named_parameters()):
            # One at a time: what is copied is released before the next.
            standing = store.put(f"blocks.{i}.{name}", lambda p=parameter: p.data)  # type: ignore[misc]
            module, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(module), leaf, standing)
    model = ring.add(store, blocks, len(blocks))
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(_entering(lambda i=i: model.visit(i), ring.device), with_kwargs=True)  # type: ignore[misc]
    home = next(after.parameters()).device
    after.register_forward_pre_hook(_entering(lambda: None, home), with_kwargs=True)


def _entering(visit: Callable[[], None], device: torch.device) -> Callable[..., tuple[Any, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def enter(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        visit()
        return tree_map(move, args), tree_map(move, kwargs)

    return enter
