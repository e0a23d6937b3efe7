"""What one rank of `wanmoe bench engine` runs: a real training under one ZeRO stage after the other.

`python -m wanmoe.launch.bench_engine_rank job.json` with RANK, WORLD_SIZE and the like set. What it counts is
taken from DeepSpeed's own state and from every collective that goes through it; no formula is used here.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..train.loop import Trainer
from ..train.ranks import init_distributed
from ..train.side import Side
from ..train.watchdog import watch_over
from .config import parse_config

WARM_STEPS = 3
"""ZeRO-3 records the order of the modules in its first steps, and runs ahead of it from then on."""
# Collectives of DeepSpeed's backend, and the argument that is whole after it, or was before.
WHOLE = {
    "all_gather_into_tensor": "output_tensor",
    "all_reduce": "tensor",
    "reduce_scatter_tensor": "input_tensor",
    "reduce": "tensor",
}
SMALL = 16
"""Elements: norms and flags, which the ranks exchange too, are no parameters."""


class Wire:
    """Every collective that DeepSpeed makes in this process, counted, and timed where that is asked for.

    Bytes are those of the whole tensor, as all ranks together hold it.
    """

    def __init__(self) -> None:
        from deepspeed.comm import comm

        self.side: Side | None = None
        """Whose gathered parameters and buckets are looked at."""
        self.reset()
        for name, whole in WHOLE.items():
            setattr(comm.cdb, name, self._watched(name, whole, getattr(comm.cdb, name)))

    def reset(self, *, timed: bool = False) -> None:
        """Forgets what was counted."""
        self.bytes = {"gather": 0, "gather in node": 0, "all-reduce": 0, "scatter": 0, "small": 0}
        self.seconds = dict.fromkeys(self.bytes, 0.0)
        self.peak = self.buckets = 0
        self.timed = timed

    def _watched(self, name: str, whole: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = kwargs[whole] if whole in kwargs else args[0]
            kind = "all-reduce" if name == "all_reduce" else "scatter"
            if tensor.numel() <= SMALL:
                kind = "small"
            elif name == "all_gather_into_tensor":
                ranks = dist.get_world_size(kwargs.get("group"))
                kind = "gather" if ranks == dist.get_world_size() else "gather in node"
            self.bytes[kind] += tensor.nbytes
            if self.side is not None and kind != "small":
                self.peak = max(self.peak, gathered(self.side.engine.module.parameters()))
                self.buckets = max(self.buckets, _nbytes(_buckets(self.side), set()))
            if not self.timed:
                return call(*args, **kwargs)
            # One after the other, so that each has a time of its own.
            began = now()
            handle = call(*args, **kwargs)
            if handle is not None:
                handle.wait()
            self.seconds[kind] += now() - began
            return handle

        return watched


def now() -> float:
    """Seconds, once the card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def gathered(parameters: Iterable[Any]) -> int:
    """Bytes of the parameters that are whole at the moment, or on their way, and will go again."""
    return sum(
        p.ds_numel * p.ds_tensor.element_size()
        for p in parameters
        if hasattr(p, "ds_id") and p.ds_status.name != "NOT_AVAILABLE" and not p.ds_persist
    )


def held(side: Side, before: list[Tensor]) -> dict[str, int]:
    """Bytes of each kind of model state on this rank, of the storages that it really has, and of all other
    tensors that live in this process (`rest`) but those that did `before`."""
    kinds: dict[str, list[Tensor]] = {"frozen": [], "resident": [], "trained": [], "gradients": []}
    passing: list[Tensor] = []
    optimizer, trains = side.engine.optimizer, {id(p) for p in side.trainable.values()}
    for p in side.engine.module.parameters():
        kind = "trained" if id(p) in trains else "frozen"
        if hasattr(p, "ds_id"):
            kinds[kind].append(p.ds_tensor)
            if p.ds_secondary_tensor is not None:
                kinds[kind].append(p.ds_secondary_tensor)
            (kinds["resident"] if p.ds_persist else passing).append(p.data)
        else:
            kinds[kind].append(p.data)
        if p.grad is not None:
            kinds["gradients"].append(p.grad)
    for parts in (getattr(optimizer, "averaged_gradients", None) or {}).values():
        kinds["gradients"] += [part for part in parts or () if part is not None]
    kinds["masters"] = [
        *getattr(optimizer, "fp32_partitioned_groups_flat", ()),
        *getattr(optimizer, "single_partition_of_fp32_groups", ()),
    ]
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    # The count of steps has no dimension.
    kinds["moments"] = [value for state in states for value in state.values() if value.dim()]
    seen: set[int] = set()
    found = {kind: _nbytes(tensors, seen) for kind, tensors in kinds.items()}
    _nbytes([*_buckets(side), *passing], seen)
    _nbytes(before, seen)
    return found | {"rest": _nbytes(living(), seen)}


def living() -> list[Tensor]:
    """Every tensor of this process."""
    gc.collect()
    # By type, not isinstance: that would wake modules which only load when they are looked at.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]


def _buckets(side: Side) -> list[Tensor]:
    buckets = getattr(side.engine.optimizer, "ipg_buckets", {}).values()
    buffers = [bucket.buffer for bucket in buckets]
    return [one for each in buffers for one in (each if isinstance(each, list) else [each])]


def _nbytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    """Bytes of the storages that are not in `seen` yet; a storage with many views counts once."""
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def measure(
    config: dict[str, Any], steps: int, wire: Wire, ranks: tuple[int, int, torch.device]
) -> dict[str, Any]:
    """Trains as configured under the run's watchdog (`_measured`)."""
    before = living()  # DeepSpeed keeps some of an engine that was destroyed
    parsed = parse_config(config, "bench engine")
    with watch_over(parsed.train, *ranks[:2]) as watchdog:
        trainer = Trainer(parsed, *ranks, watchdog)
        try:
            return _measured(trainer, steps, wire, before)
        finally:
            trainer.close()


def _measured(trainer: Trainer, steps: int, wire: Wire, before: list[Tensor]) -> dict[str, Any]:
    """Trains as configured; what two steps held and moved, and how long further ones took: `steps` as they
    are, and as many with gathers, reductions and loader one after the other."""
    (side,) = trainer.sides
    side.unseen_gradients.clear()  # as after the first epoch
    wire.side = side
    trainer.feed.start(0, WARM_STEPS + 2 + 2 * steps)
    for _ in range(WARM_STEPS):
        trainer.train_step(side)
    states: list[dict[str, int]] = []
    moved: list[dict[str, int]] = []
    update = side.update

    def watched_update() -> bool:
        states.append(held(side, before))
        return update()

    side.update = watched_update  # type: ignore[method-assign]
    for _ in range(2):
        wire.reset()
        trainer.train_step(side)
        moved.append(wire.bytes | {"peak": wire.peak, "buckets": wire.buckets})
    side.update = update  # type: ignore[method-assign]
    wire.side = None
    free, apart = [], []
    # In turn, so that both see the same machine.
    for _ in range(steps):
        wire.reset()
        began = now()
        trainer.train_step(side)
        free.append(now() - began)
        wire.reset(timed=True)
        trainer.feed.take_wait()
        began = now()
        trainer.train_step(side)
        gather = wire.seconds["gather"] + wire.seconds["gather in node"]
        reduce = wire.seconds["all-reduce"] + wire.seconds["scatter"]
        parts = {"gather": gather, "reduce": reduce, "loader": trainer.feed.take_wait()}
        apart.append({"whole": now() - began} | parts)
    side.engine.destroy()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"states": states, "moved": moved, "free_s": free, "apart_s": apart, "peak_memory": peak}


def main(path: Path) -> None:
    """Runs the cases of a job file and writes what it found to `<name>.<rank>.json` beside it."""
    cases = json.loads(path.read_text())
    ranks = init_distributed()
    wire = Wire()
    found = [measure(case["config"], case["steps"], wire, ranks) for case in cases]
    path.with_suffix(f".{ranks[0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
