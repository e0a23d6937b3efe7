"""The ranks of a job: how they find each other, and how they decide and fail together."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist

from ..moe_lora import WanmoeError
from ..moe_lora.errors import CommonError

# Below this a NaN on one rank poisons bf16 ZeRO-3, and below 0.19.3 checkpointing fails with frozen
# parameters.
DEEPSPEED_FLOOR = (0, 19, 8)

Result = TypeVar("Result")


def check_versions() -> None:
    """Refuses a DeepSpeed below the floor, with the command that mends it."""
    found = importlib.metadata.version("deepspeed")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3]) < DEEPSPEED_FLOOR:
        floor = ".".join(map(str, DEEPSPEED_FLOOR))
        raise WanmoeError(f"deepspeed {found} is too old; run: pip install 'deepspeed>={floor}'")


def init_distributed(
    backend: str | None = None, timeout: datetime.timedelta = datetime.timedelta(minutes=30)
) -> tuple[int, int, torch.device]:
    """(rank, world size, device) after joining the process group that the launcher described.

    Args:
        backend: "gloo" where only a few names go between the ranks; default: nccl on GPUs.
    """
    import deepspeed

    # DeepSpeed 0.19 calls collectives under names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", r".*_tensor` is deprecated", FutureWarning)
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise WanmoeError(
            f"{', '.join(missing)} not set: start with `wanmoe train` or the deepspeed launcher"
        )
    check_versions()
    gpus = torch.cuda.is_available()
    backend = backend or ("nccl" if gpus else "gloo")
    if gpus:
        # Slurm may show each task its own card alone.
        alone = torch.cuda.device_count() == 1
        torch.cuda.set_device(0 if alone else int(os.environ["LOCAL_RANK"]))
    if backend == "gloo":
        _compile_collectives()
    rank, world, local = (os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE"))
    if os.environ["LOCAL_RANK"] == "0" and "0" != local != world:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        minutes = timeout.total_seconds() / 60
        sys.stderr.write(f"rank {rank} waits for all {world} at {where}, up to {minutes:g} minutes\n")
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    if backend == "gloo":
        _drop_shared_buffer(dist.get_rank())
    device = torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def _compile_collectives() -> None:
    """Compiles DeepSpeed's CPU collectives at the first start on a machine, and loads them, rank by rank.

    torch guards a compilation by a file, which a process that is killed meanwhile leaves behind: every later
    start would wait for it for ever. Our own guard, which goes with its process, comes before torch's.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.name, False):
        return
    with alone_in(Path(_get_build_directory(builder.name, verbose=False))):
        builder.load(verbose=False)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process of a machine at a time builds in `folder`; what a killed one left locked is freed first."""
    guard = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        lock = folder / "lock"
        if lock.exists() and not _is_open(lock):
            lock.unlink(missing_ok=True)
            sys.stderr.write(f"removed {lock}: the process that compiled there is gone\n")
        yield
    finally:
        os.close(guard)


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has a file open, as who compiles has its lock; those of other users
    do not say, and count as not."""
    wanted = str(path.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(file.path == wanted for file in process.open_files()):
                return True
    return False


def _drop_shared_buffer(rank: int) -> None:
    """Takes the name from the buffer of DeepSpeed's CPU collectives, which would outlive the job: 66 MB a
    rank.

    Every rank has mapped it when all have come through the initialisation; it goes with the last of them.
    """
    dist.barrier()
    port = os.environ.get("MASTER_PORT", "")
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_{rank}"):
        left.unlink(missing_ok=True)


def together(action: Callable[[], Result]) -> Result:
    """Does `action` on every rank; where it raises WanmoeError on any, all raise CommonError, and none
    waits."""
    result, fault = None, None
    try:
        result = action()
    except WanmoeError as error:
        fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    for rank, text in enumerate(faults):
        if text is not None:
            raise CommonError(text if all(one == text for one in faults) else f"on rank {rank}: {text}")
    return cast("Result", result)


def agree(what: Mapping[str, Any]) -> None:
    """Raises CommonError on every rank, naming the values, unless all ranks hold the same `what`."""
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, dict(what))
    for key in what:
        values = [rank.get(key) for rank in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            shown = ", ".join(f"rank {rank}: {str(values[rank])[:80]}" for rank in (0, other))
            raise CommonError(
                f"the ranks disagree on {key} ({shown}); nodes must share the run folder, the shards and "
                "the weights"
            )
