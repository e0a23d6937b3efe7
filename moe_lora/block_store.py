"""The frozen weights of a model's blocks: in one piece of host memory, from which they stream to a card, or
on the card to stay.

A block is one run of bytes: weights, biases, norms and modulation, each where any vector load may begin. The
processes of a machine can share the host memory, and where there is a card it is pinned.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import re
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch import Tensor, nn

from .errors import WanmoeError
from .formats import PLAIN, Format

__all__ = ["BlockStore", "Memory", "private_memory"]

_log = logging.getLogger(__name__)

_ALIGN = 256
_NAME = re.compile(r"^blocks\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Piece:
    """One tensor within the bytes of a block."""

    offset: int
    size: int
    """Bytes, as stored."""
    shape: torch.Size
    dtype: torch.dtype
    """That it is computed in."""
    format: Format
    unpacked: int
    """Where it begins among the block's unpacked bytes; -1 where it is computed in as it is stored."""

    def stored(self, flat: Tensor) -> Tensor:
        """uint8 [size] of a block's bytes."""
        return flat[self.offset : self.offset + self.size]

    def view(self, flat: Tensor, work: Tensor | None) -> Tensor:
        """The tensor, in a block's bytes or in those that were unpacked from them."""
        if self.unpacked < 0:
            return self.stored(flat).view(self.dtype).view(self.shape)
        assert work is not None
        size = self.shape.numel() * self.dtype.itemsize
        return work[self.unpacked : self.unpacked + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """The bytes of a block."""

    pieces: dict[str, Piece]
    """By name within the block."""
    size: int
    unpacked: int
    """Bytes of its quantised weights once they are unpacked."""


@dataclass(frozen=True)
class Memory:
    """Host memory, and which part of the blocks this process is to fill in it."""

    flat: Tensor
    """uint8 [bytes]."""
    part: int = 0
    parts: int = 1
    filled: Callable[[], None] = lambda: None
    """Returns once every process has filled its part."""


def private_memory(size: int) -> Memory:
    """Memory of this process alone, pinned where there is a card."""
    check_room(size)
    flat = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)
    pin(flat)
    return Memory(flat)


def check_room(size: int) -> None:
    """Raises WanmoeError where the host has less memory left: it would kill the process later."""
    left = psutil.virtual_memory().available
    if size > left:
        raise WanmoeError(
            f"{size / 1e9:.3g} GB of host memory for the blocks that stream, of which {left / 1e9:.3g} GB "
            "are left; let fewer stream, or quantise the base"
        )


def pin(flat: Tensor) -> bool:
    """Pins memory where there is a card, to the byte: torch's own pinned memory is rounded up to a power of
    two. Where the system forbids it, which is told, copies wait for the host and are right all the same."""
    if not (torch.cuda.is_initialized() and flat.nbytes):  # a run on the CPU of a machine with a card
        return False
    error = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)
    if int(error):
        with contextlib.suppress(RuntimeError):  # CUDA keeps the error for the next call that asks
            torch.ones(1, device="cuda").sum().item()
        _log.warning(
            "%.1f GB of host memory could not be pinned (%s): copies to the card go slower and overlap with "
            "nothing; raise `ulimit -l`",
            flat.nbytes / 1e9,
            error,
        )
        return False
    # Another mapping may come to lie there.
    gone = weakref.finalize(flat.untyped_storage(), torch.cuda.cudart().cudaHostUnregister, flat.data_ptr())
    gone.atexit = False
    return True


class BlockStore:
    """The frozen tensors of a model's blocks.

    Laid out before the values are read (`lay_out`), filled one tensor at a time (`put`), and taken out of the
    modules' parameters (`take_over`), so that nothing else moves, shards or broadcasts them.

    Args:
        format: of the large weights; biases, norms and modulation stay as they are.
        resident: blocks that lie on `device`; the others wait in host memory.
        memory: of so many bytes of the host.
    """

    def __init__(
        self,
        device: torch.device,
        format: Format = PLAIN,
        resident: Collection[int] = (),
        memory: Callable[[int], Memory] = private_memory,
    ) -> None:
        self.device, self.format, self._memory = device, format, memory
        self.resident = frozenset(resident)
        self.layouts: list[Layout] = []
        self.errors: list[tuple[str, float]] = []
        """(name, relative error) of each weight that this process has packed."""
        self._blocks: list[Tensor] = []
        self._placed: dict[int, tuple[int, Piece]] = {}

    def lay_out(self, blocks: Sequence[nn.Module], dtype_of: Callable[[str], torch.dtype]) -> None:
        """Takes memory for all parameters of a model's blocks, of which shapes are enough; `dtype_of` says in
        what a tensor is computed, by its name in the model."""
        for index, block in enumerate(blocks):
            here = f"blocks.{index}."
            self.layouts.append(lay_out(block, partial(_within, dtype_of, here), self.format))
        sizes = [layout.size for layout in self.layouts]
        self.memory = self._memory(sum(size for i, size in enumerate(sizes) if i not in self.resident))
        start = 0
        for index, size in enumerate(sizes):
            if index in self.resident:
                self._blocks.append(torch.empty(size, dtype=torch.uint8, device=self.device))
            else:
                self._blocks.append(self.memory.flat[start : start + size])
                start += size

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def unpacked(self) -> int:
        """Bytes of the quantised weights of a block once they are unpacked; 0 where none is quantised."""
        return max(layout.unpacked for layout in self.layouts)

    def bytes_of(self, block: int) -> Tensor:
        """uint8 [bytes] of one block, where it waits or stays."""
        return self._blocks[block]

    def put(self, name: str, read: Callable[[], Tensor]) -> nn.Parameter | None:
        """Stores a tensor of a model by its name there, such as `blocks.3.ffn.0.weight`, and returns the
        parameter that stands for it; None for a tensor of no block.

        `read` is asked only where this process fills that block.
        """
        if (match := _NAME.match(name)) is None:
            return None
        block = int(match[1])
        piece = self.layouts[block].pieces[match[2]]
        flat = self.bytes_of(block)
        if block in self.resident or block % self.memory.parts == self.memory.part:
            self._fill(name, read(), piece, piece.stored(flat))
        if piece.unpacked < 0:
            standing = piece.view(flat, None)
        else:  # a full shape that takes no memory
            standing = torch.zeros(1, dtype=piece.dtype, device=flat.device).expand(piece.shape)
        parameter = nn.Parameter(standing, requires_grad=False)
        self._placed[id(parameter)] = (block, piece)
        return parameter

    def _fill(self, name: str, value: Tensor, piece: Piece, stored: Tensor) -> None:
        if piece.format is PLAIN:
            piece.format.pack(value.to(stored.device, piece.dtype), stored)
            return
        # A card quantises 14 B weights in seconds, a CPU in minutes.
        value = value.to(self.device, piece.dtype)
        packed = stored if stored.device == value.device else torch.empty_like(stored, device=self.device)
        piece.format.pack(value, packed)
        self.errors.append((name, _error(value, piece, packed)))
        if packed is not stored:
            stored.copy_(packed)

    def describe_error(self) -> str:
        """What its format costs the weights that this process has packed, in words."""
        worst, error = max(self.errors, key=lambda one: one[1])
        mean = sum(error for _, error in self.errors) / len(self.errors)
        return (
            f"in {self.format.name}: relative error of its weights {mean:.2%}, at most {error:.2%} ({worst})"
        )

    def take_over(self, blocks: Sequence[nn.Module]) -> list[list[tuple[nn.Module, str, Piece]]]:
        """(module, attribute, piece) of every tensor, by block; from now on they are plain attributes, and no
        parameters of their modules. Waits until all processes have filled their part."""
        places: list[list[tuple[nn.Module, str, Piece]]] = [[] for _ in blocks]
        for index, block in enumerate(blocks):
            for module in block.modules():
                for leaf, parameter in list(module.named_parameters(recurse=False)):
                    if (placed := self._placed.get(id(parameter))) is None:
                        continue
                    delattr(module, leaf)
                    setattr(module, leaf, parameter.data)
                    places[index].append((module, leaf, placed[1]))
        self._placed.clear()
        self.memory.filled()
        return places


def lay_out(block: nn.Module, dtype_of: Callable[[str], torch.dtype], format: Format) -> Layout:
    """Where the parameters of a block go, of which shapes are enough; `dtype_of` says in what a tensor is
    computed, by its name in the block."""
    pieces: dict[str, Piece] = {}
    size = unpacked = 0
    for name, parameter in block.named_parameters():
        dtype = dtype_of(name)
        own = format if name.endswith(".weight") and parameter.dim() == 2 else PLAIN
        stored = own.size(parameter.shape, dtype)
        place = -1 if own is PLAIN else unpacked
        pieces[name] = Piece(size, stored, parameter.shape, dtype, own, place)
        size += _aligned(stored)
        if own is not PLAIN:
            unpacked += _aligned(parameter.numel() * dtype.itemsize)
    return Layout(pieces, size, unpacked)


def _within(dtype_of: Callable[[str], torch.dtype], here: str, name: str) -> torch.dtype:
    return dtype_of(here + name)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _error(value: Tensor, piece: Piece, packed: Tensor) -> float:
    back = torch.empty_like(value)
    piece.format.unpack(packed, back)
    wide = value.float()
    return float((back.float() - wide).norm() / wide.norm().clamp_min(1e-30))
