"""Which resume state a run goes on from, and whether it is its own."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
import torch.distributed as dist
from torch import Tensor

from ..kernels.lora_moe import table
from ..moe_lora import WanmoeError
from . import checkpoint
from .config import TrainerConfig
from .model import local_files
from .ranks import agree, together
from .stages import stage_name
from .tracking import flatten
from .zero import node_size

if TYPE_CHECKING:
    from .data.loader import TrainBatches
    from .side import Side
    from .zero import Plan

# Settings that change what is learned: a resume with others is another run.
LEARNING: dict[str, Any] = {
    "adapter": True,
    "router": True,
    "objective": True,
    "optimizer": True,
    "data": {"reader", "balanced", "caption_dropout"},
    "train": {"train_router", "freeze_base", "precision", "early_stop"},
}
# Told by their contents (`model.file_hashes`): a folder may move.
PLACES = {"classifier", "vae", "lpips"}
CHOOSE = (
    "choose another train.run, or set train.resume = false to start afresh there (the earlier states are "
    "kept aside)"
)


def find(
    run: Path, resume: bool, rank: int, say: Callable[[str], object]
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """(tensors, trainer.json) of the newest state that verifies, or nothing for a fresh start.

    A collective. Raises WanmoeError where there are states and none can be resumed from.
    """
    folder = run / "resume"
    together(lambda: checkpoint.clear_leftovers(run) if rank == 0 else None)
    if not resume:
        if aside := together(lambda: checkpoint.set_aside(folder) if rank == 0 else None):
            say(f"starting afresh; the states of the earlier run are in {aside}")
        return None, {}
    path, complaints = together(lambda: checkpoint.latest(folder))
    for complaint in complaints:
        say(complaint)
    # Who has a state reads it with the others: nodes that do not share the folder would part here.
    agree({"the resume state": path and path.name})
    return (None, {}) if path is None else together(lambda: checkpoint.read(path))


def write_config(config: TrainerConfig, run: Path, steps: int) -> dict[str, Any]:
    """Writes `config.toml` into a run folder and returns what it holds."""
    dump = config.model_dump(mode="json", exclude_none=True)
    dump["train"]["steps"] = steps
    # A config that is given back says one of each two.
    dump["train"].pop("epochs", None)
    if config.train.global_batch is not None:
        dump["train"].pop("accumulation")
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(tomli_w.dumps(dump))
    return dump


def identity(config: TrainerConfig, **facts: Any) -> dict[str, Any]:
    """What must not change between a run and its resume; `facts` are those that the config does not hold."""
    dump = config.model_dump(mode="json", include=LEARNING, exclude={"objective": PLACES})
    stops = {"train.val_every": config.train.val_every} if config.train.early_stop else {}
    learned = flatten(dump) | stops
    return {"stage": stage_name(config), "seed": config.train.seed, **facts, **learned}


def agree_on_start(config: TrainerConfig, sides: Sequence[Side], batches: TrainBatches, plan: Plan) -> None:
    """Raises WanmoeError on every rank unless all would start alike; a collective.

    Paths may differ between nodes; what lies there may not, as far as a quick look tells.
    """
    paths: dict[str, Any] = {
        "model": {"dit", "adapter", "dit_high_noise", "adapter_high_noise"},
        "data": {"shards"},
        "train": {"run"},
        "objective": PLACES,
        "launch": True,
    }
    dump = flatten(config.model_dump(mode="json", exclude=paths))
    settings = {f"the config's {key}": value for key, value in dump.items()} | {
        "the tuned table of the kernels": table.digest(sides[0].device),
        "the order of the samples": [batches.order.batch(step) for step in range(16)],
        "how the models are held": plan.stage,
        "the number of ranks of a node": node_size(dist.get_world_size()),
        **{f"the version of {name}": importlib.metadata.version(name) for name in ("torch", "deepspeed")},
    }
    files = {side.prefix + key: value for side in sides for key, value in local_files(side.config).items()}
    agree(settings | files)


def check(
    run: Path,
    state: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    own: Mapping[str, Any],
    trainable: Collection[str],
) -> None:
    """Raises WanmoeError unless a state belongs to this run: same identity, same parameters."""
    for key, value in own.items():
        if trainer.get(key) != value:
            named = f"train.{key}" if key in ("stage", "seed", "steps") else key
            was, now = ("not set" if one is None else repr(one) for one in (trainer.get(key), value))
            raise WanmoeError(f"{run}/resume: belongs to another run ({named} was {was}, is {now}); {CHOOSE}")
    kinds = ("param/", "exp_avg/", "exp_avg_sq/")
    found = {name.replace(kind, "", 1) for name in state for kind in kinds if kind in name}
    other = sorted(found ^ set(trainable))
    if other:
        raise WanmoeError(
            f"{run}/resume: {len(other)} parameters differ from this config's, e.g. {other[0]}; {CHOOSE}"
        )
