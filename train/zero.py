"""Which ZeRO stage a job runs under, and DeepSpeed's settings, derived from the model and the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import nn

from ..moe_lora import WanmoeError
from ..moe_lora.needs import Base, on_card

if TYPE_CHECKING:
    from ..moe_lora.wan.dit import WanDiT
    from .config import TrainerConfig

Stage = Literal[0, 1, 2, 3]

# One bucket of at most this many gradient elements: DeepSpeed's default of 5e8 allocates 2 GB for any model.
MAX_BUCKET = 200_000_000
# Share of a card (of the host, on the CPU) that whole copies of the models may take; the rest is for
# activations, gradients and buffers.
SHARE = 0.6
# The same where there is no other way than to try.
MOST = 0.85
# Share that all of it may take, where all of it is known: memory is cut up as it is used.
FULL = 0.95
# Blocks that ZeRO-3 holds whole at once: the one that computes and those on their way.
GATHERED = 3
# Bytes per trainable parameter beside its weight: gradient, master and two moments, fp32 each.
STATE_BYTES = 16


@dataclass(frozen=True)
class Plan:
    """How the models of a job are held."""

    stage: Stage
    why: str
    """In words, for the first line of a run."""
    park: bool = False
    """Whether of two models the one that does not train in a step waits in host memory."""
    stream: int = 0
    """How many blocks of each model stream from host memory."""


def local_world() -> int:
    """Ranks of this job on this machine, as the launcher says."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(told or os.environ.get("WORLD_SIZE", "1"))


def room(device: torch.device) -> int:
    """Bytes of memory of one rank: its card's, or its part of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total) // local_world()


def make_plan(
    asked: Literal["auto"] | Stage,
    models: Sequence[Base],
    trainable: int,
    world: int,
    memory: int,
    mixed: bool = False,
    ring: Literal["auto"] | int = "auto",
    slots: int = 2,
    shardable: bool = True,
    beside: Callable[[], int] | None = None,
) -> Plan:
    """The stage of a job: as asked, or whole copies where they fit, which is several times faster than
    gathering, and shards where they do not.

    Args:
        models: each model of the job; two where both noise experts train.
        trainable: parameters that train, of all models.
        world: ranks.
        memory: bytes that one rank has (`room`).
        mixed: the base itself trains, in bf16, and so needs the masters that ZeRO keeps.
        ring: how many blocks of each model stream, as asked.
        slots: of the ring.
        shardable: whether ZeRO-3 can hold the base: not if it is quantised.
        beside: bytes that a step takes beside weights and optimizer, which then decides with them. None: not
            known; shares of the memory decide.

    Raises:
        WanmoeError: stage 0 is asked for where it has no masters, or nothing fits.
    """
    if asked == 0 and mixed:
        raise WanmoeError(
            'deepspeed.zero = 0 keeps no fp32 masters of a base that trains in bf16; set it to 1, or "auto"'
        )
    replicated: Stage = 1 if world > 1 or mixed else 0
    state = STATE_BYTES * trainable
    blocks = min(model.blocks for model in models)
    if ring != "auto" and ring > 0:
        if ring > blocks:
            raise WanmoeError(f"ring.blocks = {ring}: the model has {blocks} blocks")
        return _streamed(replicated if asked == "auto" else asked, models, state, ring, slots)
    if asked != "auto":
        return Plan(asked, f"ZeRO-{asked}, as configured")
    whole = on_card(models, 0, 0) + state
    step = None if beside is None else beside()
    # What weights and optimizer may take: all that a step leaves, or shares of the card, where it is unknown
    usual, most = (SHARE * memory, MOST * memory) if step is None else (FULL * memory - step,) * 2
    told = f"{whole / 1e9:.3g} GB of weights and optimizer in {memory / 1e9:.3g} GB a rank"
    if step is not None:
        told = f"{whole / 1e9:.3g} GB of weights and optimizer and {step / 1e9:.3g} of a step in "
        told += f"{FULL * memory / 1e9:.3g} GB a rank"
    if whole <= usual:
        return Plan(replicated, f"ZeRO-{replicated}, whole copies: {told}")
    if world == 1:  # the only shard is the whole
        largest = max(model.whole for model in models)
        if len(models) > 1 and shardable and largest + state <= most:
            return Plan(0, f"ZeRO-0, the idle model in host memory: {told}", park=True)
        if whole <= most:
            return Plan(replicated, f"ZeRO-{replicated}, the one copy: {told}")
    within = f", and once more within each node of {node} ranks" if (node := node_size(world)) else ""
    twice = (whole - state) / node if node else 0
    gathered = 0 if step is None else GATHERED * max(model.block for model in models)
    if world > 1 and shardable and whole / world + twice + gathered <= most:
        return Plan(3, f"ZeRO-3, shards{within}: {told}")
    if ring == "auto" and not mixed:
        for stream in range(1, blocks + 1):
            if on_card(models, stream, slots) + state <= usual:
                return _streamed(replicated, models, state, stream, slots)
    raise WanmoeError(
        f"{told} do not fit: take train.checkpointing = true, or other settings that `wanmoe plan --fit` "
        f"proposes, or at least {max(math.ceil(whole / (SHARE * memory)), 2)} such cards (launch.ranks, or "
        "more nodes)"
    )


def _streamed(stage: Stage, models: Sequence[Base], state: int, stream: int, slots: int) -> Plan:
    waits, here = sum(stream * model.block for model in models), on_card(models, stream, slots) + state
    why = (
        f"ZeRO-{stage}, {stream} of {models[0].blocks} blocks stream from {waits / 1e9:.3g} GB of the host; "
        f"{here / 1e9:.3g} GB of weights and optimizer on a card"
    )
    return Plan(stage, why, stream=stream)


def node_size(world: int, local: int | None = None) -> int | None:
    """Ranks of each node, where there are several nodes of several ranks, all alike as far as this one can
    tell; else None."""
    local = local or local_world()
    return local if 1 < local < world and world % local == 0 else None


def deepspeed_config(
    config: TrainerConfig,
    dit: WanDiT,
    trainable: Mapping[str, nn.Parameter],
    *,
    stage: Stage,
    bf16: bool,
    world: int,
    local: int | None = None,
) -> dict[str, Any]:
    """DeepSpeed's own config, derived from the model; `deepspeed.config` is merged over it.

    Args:
        local: ranks on each machine; default: as the launcher says.

    Raises:
        WanmoeError: `deepspeed.config` names another stage than `deepspeed.zero`.
    """
    total = sum(p.numel() for p in trainable.values())
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = min(MAX_BUCKET, max(total, 1))
    if stage == 3:
        zero |= _sharding(dit, node_size(world, local))
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.batch,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "steps_per_print": 10**9,
        # What trains stays fp32 beside a bf16 base, and its gradients too, where the engine casts nothing:
        # but for shards, of one dtype, and a base that trains.
        "bf16": {"enabled": bf16 and (stage == 3 or config.train.stage == "pretrain")},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
    merged = _merge(derived, config.deepspeed.config)
    found = merged["zero_optimization"]["stage"]
    if found != stage:
        raise WanmoeError(
            f"deepspeed.config.zero_optimization.stage = {found}: the stage is chosen by deepspeed.zero; set "
            f"deepspeed.zero = {found}"
        )
    return merged


def _sharding(dit: WanDiT, node: int | None) -> dict[str, Any]:
    block = sum(p.numel() for p in dit.blocks[0].parameters())
    # Between nodes a base that is sharded over all ranks would be gathered at each block; a second set of
    # shards within the node serves all but the first time, since what is frozen never changes.
    hpz = {"zero_hpz_partition_size": node} if node else {}
    return {
        # One block ahead; every adapter tensor stays resident, the base is sharded.
        "stage3_prefetch_bucket_size": block,
        "stage3_max_live_parameters": max(3 * block, 1_000_000),
        "stage3_param_persistence_threshold": largest_adapter_tensor(dit),
        **hpz,
    }


def check_resident(dit: WanDiT, settings: Mapping[str, Any]) -> None:
    """Raises WanmoeError where adapter tensors would be gathered by layer: the overlap reads them outside of
    their own modules."""
    zero = settings["zero_optimization"]
    if zero["stage"] < 3:
        return
    needed = largest_adapter_tensor(dit)
    lower = zero["stage3_param_persistence_threshold"] < needed
    if lower or "stage3_model_persistence_threshold" in zero:
        raise WanmoeError(
            "objective.orthogonality needs every adapter tensor resident: under deepspeed.config leave "
            f"stage3_param_persistence_threshold at {needed} or above, and the model's threshold out"
        )


def largest_adapter_tensor(dit: WanDiT) -> int:
    """Elements of the largest tensor of an adapter; 0 without one."""
    adapter = [p.numel() for name, p in dit.named_parameters() if name.endswith(("_down", "_up"))]
    return max(adapter, default=0)


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
