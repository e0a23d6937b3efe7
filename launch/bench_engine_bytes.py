"""What a rank holds and what travels in a training step under each ZeRO stage: formulas, over modules that
stand on the meta device, so that A14B costs nothing. `bench_engine_rank` counts the same on real ranks.

Nothing is assumed of a size: parameters are those of the model with its adapter, the settings are those that
training gives DeepSpeed. Activations are not in it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..moe_lora import AdapterConfig, attach
from ..moe_lora.wan.block import WanBlock
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT
from ..train.config import TrainerConfig
from ..train.routed import RoutedDiT
from ..train.stages import STAGES, part_of, select_trainable, stage_name
from ..train.zero import Stage, deepspeed_config

ADAMW_MOMENTS = 2
FP32 = 4
# DeepSpeed's own where the config names none.
REUSE_DISTANCE = 1_000_000_000
# Elements to which ZeRO-1 and 2 pad a group, times the ranks.
ALIGNMENT = 2


@dataclass(frozen=True)
class Bytes:
    """Of one rank and one model; states at the end of the backward, when all of them are there."""

    frozen: int
    """The base: whole, or this rank's shards of it (with hpZ also those within the node)."""
    resident: int = 0
    """ZeRO-3: parameters that stay whole on every rank, the adapter and what is small of the base."""
    trained: int = 0
    """The adapter that computes, whole or in shards."""
    gradients: int = 0
    buckets: int = 0
    """Where gradients are laid side by side to be reduced."""
    masters: int = 0
    moments: int = 0
    gathered: int = 0
    """All-gathers of a step, as whole tensors."""
    all_reduced: int = 0
    """Gradients of a step that every rank gets the sum of, as whole tensors: ZeRO-0, 1 and 2."""
    scattered: int = 0
    """Gradients of which every rank gets the sum of its part alone: ZeRO-3."""
    peak: int = 0
    """Parameters of the base that are whole at the same time, for as long as they are needed."""
    gathered_in: Mapping[str, int] = field(default_factory=dict)
    """`gathered` by the ranks that take part: "world", or "node" with hpZ."""

    @property
    def states(self) -> int:
        """All that a rank keeps."""
        held = (self.frozen, self.resident, self.trained, self.gradients, self.buckets, self.masters)
        return sum(held) + self.moments

    def received(self, world: int, local: int) -> int:
        """What a rank gets from others in a step, in rings: its own part of a gather does not travel, and an
        all-reduce is a scatter and a gather."""
        ranks = {"world": world, "node": local}
        gathers = sum(size * (ranks[who] - 1) // ranks[who] for who, size in self.gathered_in.items())
        return gathers + (self.scattered + 2 * self.all_reduced) * (world - 1) // world

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the result."""
        return asdict(self) | {"states": self.states}


@dataclass(frozen=True)
class Model:
    """A DiT with its adapter as a stage of training has it, on the meta device."""

    module: RoutedDiT
    trainable: dict[str, nn.Parameter]
    config: TrainerConfig

    @property
    def base(self) -> int:
        """Elements of the frozen base."""
        trains = {id(p) for p in self.trainable.values()}
        return sum(p.numel() for p in self.module.parameters() if id(p) not in trains)

    @property
    def trains(self) -> int:
        """Elements that train."""
        return sum(p.numel() for p in self.trainable.values())


def meta_model(sizes: WanConfig, adapter: AdapterConfig, config: TrainerConfig) -> Model:
    """The model of `config.train.stage` without any values."""
    with torch.device("meta"):
        dit = WanDiT(sizes)
    spec = STAGES[stage_name(config)]
    attached = attach(dit, adapter, config.router)
    return Model(RoutedDiT(dit, attached, spec), select_trainable(spec, dit, attached), config)


def model_bytes(model: Model, stage: Stage, world: int, local: int, *, bf16: bool = True) -> Bytes:
    """What one rank of `world` holds and gathers, `local` of them on each node."""
    width = 2 if bf16 else FP32
    settings = deepspeed_config(
        model.config, model.module.dit, model.trainable, stage=stage, bf16=bf16, world=world, local=local
    )["zero_optimization"]
    if stage == 3:
        return _sharded(model, settings, world, local, width)
    if stage == 0:
        size = FP32 * model.trains
        return Bytes(
            frozen=width * model.base,
            trained=size,
            gradients=size,
            moments=ADAMW_MOMENTS * size,
            all_reduced=size if world > 1 else 0,
        )
    groups: dict[str, int] = defaultdict(int)
    for name, p in model.trainable.items():
        groups[part_of(name)] += p.numel()
    total = sum(_up(size, ALIGNMENT * world) for size in groups.values())
    part = FP32 * total // world
    return Bytes(
        frozen=width * model.base,
        trained=FP32 * total,
        gradients=part,
        buckets=FP32 * settings["reduce_bucket_size"],
        masters=part,
        moments=ADAMW_MOMENTS * part,
        gathered=FP32 * total,
        all_reduced=FP32 * model.trains,
        gathered_in={"world": FP32 * total},
    )


def _sharded(model: Model, settings: Mapping[str, Any], world: int, local: int, width: int) -> Bytes:
    parameters = list(model.module.parameters())
    trains = {id(p) for p in model.trainable.values()}
    threshold = settings["stage3_param_persistence_threshold"]
    node = "zero_hpz_partition_size" in settings
    stays = [p for p in parameters if p.numel() <= threshold]
    shards = sum(_up(p.numel(), world) for p in parameters if id(p) not in trains) // world
    second = shards * world // local if node else 0
    trained = sum(_up(p.numel(), world) for p in model.trainable.values())
    moved, peak = gathers(model, settings, world)
    again = sum(_up(p.numel(), world) for p in stays)  # after each update, what stays whole is gathered anew
    within = {"node": width * moved, "world": width * again} if node else {"world": width * (moved + again)}
    return Bytes(
        frozen=width * (shards + second),
        resident=width * again,
        trained=width * trained // world,
        gradients=FP32 * trained // world,
        buckets=width * settings["reduce_bucket_size"],
        masters=FP32 * trained // world,
        moments=ADAMW_MOMENTS * FP32 * trained // world,
        gathered=width * (moved + again),
        scattered=width * trained,
        peak=width * peak,
        gathered_in=within,
    )


class _Use:
    """A module at its turn in a step: its parameters, and those below it, as indices."""

    def __init__(self, module: nn.Module, index: Mapping[int, int]) -> None:
        self.leaf = isinstance(module, WanBlock)
        self.below = [index[id(p)] for p in module.parameters()]
        own = [index[id(p)] for p in module.parameters(recurse=False)]
        self.needs = self.below if self.leaf else own


def gathers(model: Model, settings: Mapping[str, Any], world: int) -> tuple[int, int]:
    """(elements gathered in a step, elements whole at once at most) of what ZeRO-3 does not keep whole.

    Goes through the modules of a step in their order and does with each what DeepSpeed does: fetch it, run
    ahead as far as the bucket reaches, release what is not used again within `stage3_max_reuse_distance`.

    Source: deepspeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py`. There a block is a leaf, and
    while one is released all parameters *below* each later module count as used by it: at the backward of the
    whole model that is all of them, so whatever is less than the distance before that point stays whole.
    """
    parameters = list(model.module.parameters())
    sizes = [p.numel() for p in parameters]
    keeps = [size <= settings["stage3_param_persistence_threshold"] for size in sizes]
    index = {id(p): place for place, p in enumerate(parameters)}
    forward, backward = _order(model.module, model.config.train.checkpointing)
    trace = [_Use(module, index) for module in (*forward, *backward)]
    first_back = len(forward)
    queue = deque((p, place) for place, use in enumerate(trace) for p in sorted(use.needs))
    bucket, most = settings["stage3_prefetch_bucket_size"], settings["stage3_max_live_parameters"]
    distance = settings.get("stage3_max_reuse_distance", REUSE_DISTANCE)
    fetched = [-1] * len(sizes)  # the turn for which it was fetched last
    here: set[int] = set()
    counted = moved = peak = 0

    def gather(wanted: Iterable[int]) -> None:
        nonlocal moved, peak, counted
        for p in wanted:
            if not keeps[p] and p not in here:
                here.add(p)
                counted += sizes[p]
                moved += _up(sizes[p], world)
        peak = max(peak, sum(sizes[p] for p in here))

    for turn, use in enumerate(trace):
        gather(use.needs)
        due = {p for p in use.needs if fetched[p] < turn}
        while queue and due:
            p, place = queue.popleft()
            fetched[p] = place
            due.discard(p)
        room = min(most - counted, bucket)
        ahead: list[int] = []
        while queue and sum(sizes[p] for p in ahead) < room:
            p, place = queue.popleft()
            fetched[p] = max(fetched[p], place)
            if not keeps[p] and p not in here and p not in ahead:
                ahead.append(p)
        if ahead:
            gather(ahead)
        # Under checkpointing a block comes twice in the backward, and goes after the second time.
        done = turn + 1 == len(trace) or turn < first_back or trace[turn + 1].needs != use.needs
        if done:
            for p in _released(trace, turn, use, sizes, fetched, distance) & here:
                if not keeps[p]:
                    here.remove(p)
                    counted -= sizes[p]
    return moved, peak


def _released(
    trace: Sequence[_Use], turn: int, use: _Use, sizes: Sequence[int], fetched: Sequence[int], distance: int
) -> set[int]:
    going = {p for p in use.needs if fetched[p] <= turn + 1}
    passed = 0
    for later in trace[turn + 1 :]:
        if passed >= distance:
            break
        used = later.below if use.leaf else later.needs
        going.difference_update(used)
        passed += sum(sizes[p] for p in used)
    return going


def _order(module: RoutedDiT, checkpointing: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules as a step calls them, forward and backward; what has no gradient has no backward."""
    dit = module.dit
    embeddings = (dit.patch_embedding, dit.time_embedding, dit.time_projection, dit.text_embedding)
    first = [inner for embedding in embeddings for inner in embedding.modules()]
    head = list(dit.head.modules())
    tail = list(dit.blocks)[dit.first_adapted :]
    again = 2 if checkpointing else 1
    back = [block for block in reversed(tail) for _ in range(again)]
    return [module, dit, *first, *dit.blocks, *head], [module, dit, *head, *back]


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
