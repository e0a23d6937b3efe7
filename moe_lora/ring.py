"""Blocks of models that are larger than the card: their frozen weights stream from host memory through a few
slots on it, one way only.

A block is one flat copy on a stream of its own. Events keep it behind the last kernel that reads its slot,
and the first kernel of the block behind the copy. Which block comes next follows from the one that is there:
forward through all of them, back through those that have a graph, and from the start again.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .block_store import BlockStore, Piece

__all__ = ["BlockRing", "Copies", "CudaCopies", "StreamedBlocks", "ThreadCopies", "Visit"]


# Waits of which the length is remembered, of steps that are never asked for it.
_KEPT = 4096


class Copies(Protocol):
    """Copies beside the computation, one after the other."""

    def start(self, slot: Tensor, source: Tensor, after: Any) -> Any:
        """Copies `source` to `slot` once the event `after` has happened (None: at once); returns the event of
        its end."""

    def mark(self) -> Any:
        """The event that all computation asked for so far has ended."""

    def wait(self, event: Any) -> None:
        """Holds the computation that is asked for from now on until the event."""

    def stall(self) -> float:
        """Seconds for which computation was held since the last call."""

    def close(self) -> None:
        """Returns once every copy has ended; none is started after it."""


class CudaCopies:
    """On a CUDA stream; the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Not without an end where nobody asks.
        self._held: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_KEPT)

    def start(self, slot: Tensor, source: Tensor, after: Any) -> Any:
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            slot.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: Any) -> None:
        stream = torch.cuda.current_stream(self._device)
        before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(event)
        behind.record(stream)
        self._held.append((before, behind))

    def stall(self) -> float:
        torch.cuda.synchronize(self._device)
        stalled = sum(before.elapsed_time(behind) for before, behind in self._held) / 1e3
        self._held.clear()
        return stalled

    def close(self) -> None:
        self._stream.synchronize()


class ThreadCopies:
    """On a thread, where the device is the CPU: what the ring costs there says nothing of a card.

    Computation has ended when the call that asked for it returns, so that a copy waits for nothing.
    """

    def __init__(self) -> None:
        self._held = 0.0
        self._jobs: queue.SimpleQueue[tuple[Tensor, Tensor, threading.Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="block copies", daemon=True)
        self._thread.start()

    def start(self, slot: Tensor, source: Tensor, after: Any) -> Any:
        done = threading.Event()
        self._jobs.put((slot, source, done))
        return done

    def mark(self) -> Any:
        return None

    def wait(self, event: Any) -> None:
        began = time.perf_counter()
        event.wait()
        self._held += time.perf_counter() - began

    def stall(self) -> float:
        held, self._held = self._held, 0.0
        return held

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()


def _work(jobs: queue.SimpleQueue[tuple[Tensor, Tensor, threading.Event] | None]) -> None:
    while (job := jobs.get()) is not None:
        slot, source, done = job
        slot.copy_(source)
        done.set()


class _Slot:
    """A place on the device, for one block at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.flat = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: tuple[StreamedBlocks, int] | None = None
        self.ready: Any = None
        """The event that the copy has ended."""
        self.free: Any = None
        """The event that the last computation with what it held has ended."""


class BlockRing:
    """Slots on a device for the blocks of one or several models, which take turns.

    Args:
        device: where the blocks are computed.
        slots: of the size of the largest block; one computes while the others fill.
    """

    def __init__(self, device: torch.device, slots: int = 2, copies: Copies | None = None) -> None:
        if slots < 2:
            raise ValueError(f"{slots} slots: a ring needs 2, one to compute and one to fill")
        self.device = device
        self.copies: Copies = copies or (CudaCopies(device) if device.type == "cuda" else ThreadCopies())
        self.moved = 0
        """Bytes copied so far."""
        self._count, self._slots = slots, list[_Slot]()
        self._work: Tensor | None = None
        self._current: tuple[StreamedBlocks, int] | None = None

    def add(self, store: BlockStore, blocks: Sequence[nn.Module], tail: int) -> StreamedBlocks:
        """Brings the tensors of a model's blocks from `store` when they are computed with.

        tail: the first block that has a graph; the backward goes down to it.
        """
        model = StreamedBlocks(self, store, store.take_over(blocks), tail)
        streamed = [store.bytes_of(i).nbytes for i in range(len(store)) if i not in store.resident]
        if streamed and (not self._slots or max(streamed) > self._slots[0].flat.nbytes):
            self._empty()
            self._slots = [_Slot(max(streamed), self.device) for _ in range(self._count)]
            for slot in self._slots:
                # Their memory may be that of tensors which computation still reads.
                slot.free = self.copies.mark()
        if store.unpacked and (self._work is None or store.unpacked > self._work.nbytes):
            self._leave()
            self._work = torch.empty(store.unpacked, dtype=torch.uint8, device=self.device)
        return model

    @property
    def nbytes(self) -> int:
        """Of the slots, and of the place where a quantised block is unpacked."""
        work = 0 if self._work is None else self._work.nbytes
        return work + sum(slot.flat.nbytes for slot in self._slots)

    def visit(self, model: StreamedBlocks, block: int, *, back: bool, turns: bool) -> None:
        """Makes a block's tensors ready for the computation that follows, and those of the next ones on
        their way."""
        key = (model, block)
        if self._current == key:
            return
        self._leave()
        flat = model.store.bytes_of(block)
        if block not in model.store.resident:
            slot = self._slot_of(key) or self._bring(key, keep=())
            self.copies.wait(slot.ready)
            flat = slot.flat
        self._current = key
        if self._work is not None and model.store.unpacked:
            model.unpack(block, flat, self._work)
        model.bind(block, flat, self._work)
        coming = [(model, i) for i in model.coming(block, back=back, turns=turns, count=self._count - 1)]
        for one in coming:
            if self._slot_of(one) is None:
                self._bring(one, keep=coming)

    def close(self) -> None:
        """Waits for its copies and lets go of slots and models, which computes with none of them any more.

        Without it they stay until Python finds the cycle, and what comes to lie in their place may be written
        to by a copy that is still under way.
        """
        self._leave()
        self.copies.close()
        self._slots, self._work = [], None

    def buffers(self) -> Iterator[Tensor]:
        """Where the tensors of a block lie that is not there to stay."""
        yield from (slot.flat for slot in self._slots)
        if self._work is not None:
            yield self._work

    def buffer_of(self, model: StreamedBlocks, block: int, unpacked: bool) -> Tensor:
        """Where a block that was visited lies now."""
        if unpacked:
            assert self._work is not None
            return self._work
        slot = self._slot_of((model, block))
        assert slot is not None
        return slot.flat

    def _leave(self) -> None:
        if self._current is None:
            return
        model, block = self._current
        if (slot := self._slot_of(self._current)) is not None:
            slot.free = self.copies.mark()
        model.unbind(block)
        self._current = None

    def _slot_of(self, key: tuple[StreamedBlocks, int]) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == key), None)

    def _bring(self, key: tuple[StreamedBlocks, int], keep: Collection[tuple[StreamedBlocks, int]]) -> _Slot:
        """Starts the copy of a block into a slot that holds neither the current one nor one of `keep`."""
        taken = {self._current, *keep}
        slot = next(slot for slot in self._slots if slot.holds is None or slot.holds not in taken)
        model, block = key
        source = model.store.bytes_of(block)
        slot.holds = key
        slot.ready = self.copies.start(slot.flat[: source.nbytes], source, slot.free)
        slot.free = None
        self.moved += source.nbytes
        return slot

    def _empty(self) -> None:
        """Before the slots are made anew."""
        self._leave()
        for slot in self._slots:
            if slot.ready is not None:
                self.copies.wait(slot.ready)
        self._slots = []


class _Saved(NamedTuple):
    """A tensor that the backward needs, by its place in a block."""

    unpacked: bool
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements."""


class StreamedBlocks:
    """The blocks of one model in a ring, as its forward asks for them."""

    def __init__(
        self, ring: BlockRing, store: BlockStore, places: list[list[tuple[nn.Module, str, Piece]]], tail: int
    ) -> None:
        self.ring, self.store, self.tail, self._places = ring, store, tail, places
        for block in range(len(store)):
            self.unbind(block)

    def visit(self, block: int, *, back: bool = False, turns: bool = False) -> None:
        """Before a block computes. back: in a backward. turns: a backward follows the last block."""
        if block not in self.store.resident or self.store.unpacked:
            self.ring.visit(self, block, back=back, turns=turns)

    def coming(self, block: int, *, back: bool, turns: bool, count: int) -> list[int]:
        """The streamed blocks that come after this one, at most so many, each once."""
        blocks = len(self.store)
        cycle = [*range(blocks), *(reversed(range(self.tail, blocks)) if back or turns else ())]
        at = len(cycle) - 1 - (block - self.tail) if back else block
        after = dict.fromkeys(cycle[at + 1 :] + cycle[:at])
        return [i for i in after if i != block and i not in self.store.resident][:count]

    def bind(self, block: int, flat: Tensor, work: Tensor | None) -> None:
        """Gives the modules of a block their tensors on the device."""
        for module, leaf, piece in self._places[block]:
            setattr(module, leaf, piece.view(flat, work))

    def unbind(self, block: int) -> None:
        """Those of the store again: who reads a block that has left the device must not read another's."""
        flat = self.store.bytes_of(block)
        for module, leaf, piece in self._places[block]:
            if piece.unpacked < 0:
                setattr(module, leaf, piece.view(flat, None))
            else:  # its shape alone
                nothing = torch.zeros(1, dtype=piece.dtype, device=flat.device)
                setattr(module, leaf, nothing.expand(piece.shape))

    def unpack(self, block: int, flat: Tensor, work: Tensor) -> None:
        """Computes the quantised weights of a block."""
        for _, _, piece in self._places[block]:
            if piece.unpacked >= 0:
                piece.format.unpack(piece.stored(flat), piece.view(flat, work))

    @contextlib.contextmanager
    def saving(self, block: int) -> Iterator[None]:
        """What autograd keeps of a block's tensors is their place: by the backward others lie there."""
        own = {buffer.untyped_storage().data_ptr(): buffer for buffer in self.ring.buffers()}

        def pack(tensor: Tensor) -> Tensor | _Saved:
            buffer = own.get(tensor.untyped_storage().data_ptr())
            if buffer is None:
                return tensor
            unpacked = buffer is self.ring._work
            return _Saved(
                unpacked, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset())
            )

        def unpack(saved: Tensor | _Saved) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            self.visit(block, back=True)
            flat = self.ring.buffer_of(self, block, saved.unpacked)
            return flat.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


class Visit:
    """`StreamedBlocks.visit` as a context, which checkpointing takes; it may be entered again."""

    def __init__(self, model: StreamedBlocks, block: int, *, back: bool = False, turns: bool = False) -> None:
        self._visit = partial(model.visit, block, back=back, turns=turns)

    def __enter__(self) -> None:
        self._visit()

    def __exit__(self, *error: object) -> None:
        pass
