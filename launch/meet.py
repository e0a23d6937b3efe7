"""One rank of the doctor's dry run: joins the others as a run does, and adds up numbers with them."""

from __future__ import annotations

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

from ..train.ranks import init_distributed
from . import slurm

MEGABYTES = 64
MEET = 240
"""Seconds for all ranks to meet."""


def main() -> None:
    """Rank 0 prints who met, and how fast 64 MB are added up."""
    slurm.take_place()
    # Soon over: ranks that still wait when the doctor has given up would meet those of the next job.
    rank, world, device = init_distributed(timeout=datetime.timedelta(seconds=MEET))
    numbers = torch.full((MEGABYTES * 250_000,), float(rank), device=device)
    dist.all_reduce(numbers[:1].clone())
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    dist.all_reduce(numbers)
    total = numbers[-1].item()
    seconds = time.perf_counter() - began
    if total != world * (world - 1) / 2:
        sys.exit(f"rank {rank}: the sum of all ranks is {total}, not {world * (world - 1) / 2}")
    if rank == 0:
        nodes = world // int(os.environ.get("LOCAL_SIZE", world))
        # Of a ring: each rank sends and receives 2 (n - 1) / n of it.
        rate = 2 * (world - 1) / world * numbers.nbytes / seconds / 1e9
        sys.stdout.write(
            f"ranks: {world} on {nodes} {'node' if nodes == 1 else 'nodes'} ({dist.get_backend()}), "
            f"{MEGABYTES} MB added up in {seconds * 1e3:.0f} ms, {rate:.2f} GB/s a rank\n"
        )
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
