"""Host memory that the ranks of a machine share: one copy of a frozen model for all of them."""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
import torch.distributed as dist

from ..moe_lora import WanmoeError
from ..moe_lora.block_store import Memory, check_room, pin, private_memory
from .ranks import together
from .watchdog import machine


def node_memory(size: int) -> Memory:
    """So many bytes that the ranks of each machine share, each of which fills its part; a collective.

    A file without a name: it goes with the last of them. Raises WanmoeError where there is no room.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    places: list[Any] = [None] * world
    dist.all_gather_object(places, machine())
    peers = [other for other in range(world) if places[other] == places[rank]]
    size = max(size, 1)
    if len(peers) == 1 and all(places.count(place) == 1 for place in places):
        return private_memory(size)
    own = -1
    if rank == peers[0]:
        own = os.memfd_create("wanmoe-blocks")
    together(lambda: _reserve(own, size) if own >= 0 else None)
    where: list[Any] = [None] * world
    dist.all_gather_object(where, f"/proc/{os.getpid()}/fd/{own}")
    mapped = together(lambda: _map(where[peers[0]], size))
    dist.barrier()  # by now all have opened it
    if own >= 0:
        os.close(own)
    flat = torch.frombuffer(mapped, dtype=torch.uint8)
    pin(flat)
    return Memory(flat, peers.index(rank), len(peers), dist.barrier)


def _reserve(file: int, size: int) -> None:
    check_room(size)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise WanmoeError(
            f"{size / 1e9:.3g} GB of host memory for the streamed blocks: {error.strerror}; use a machine "
            "with more of it, or a quantised base"
        ) from error


def _map(path: str, size: int) -> mmap.mmap:
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        raise WanmoeError(
            f"{path}: the ranks of this machine cannot share memory ({error.strerror}); run them as one user"
        ) from error
    try:
        return mmap.mmap(file, size)
    finally:
        os.close(file)
