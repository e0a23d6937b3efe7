"""What each stage trains, how its clips are routed and what its losses weigh: one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from ..moe_lora import Adapter, WanmoeError
from ..moe_lora.adapter import Part

if TYPE_CHECKING:
    from ..moe_lora.wan.dit import WanDiT
    from .config import TrainerConfig

Routing = Literal["frozen", "base", "labels", "router"]
Term = Literal[
    "diffusion", "roi", "identity", "temporal", "entropy", "balance", "teacher_kl", "orthogonality"
]
TERMS: tuple[Term, ...] = get_args(Term)
ROUTER_TERMS: tuple[Term, ...] = ("entropy", "balance", "teacher_kl")


@dataclass(frozen=True)
class StageSpec:
    """One row: parts that train, where expert gates come from, and the defaults of the seed for this
    stage."""

    trains: tuple[Part, ...]
    routing: Routing
    """frozen: no adapter at all; base: base adapter alone; labels: rule gates; router: learned gates."""
    lr: float
    schedule: Literal["constant", "cosine"]
    epochs: float
    warmup: int
    t_range: tuple[float, float] = (0.0, 1.0)
    rank_dropout: float = 0.0
    weights: Mapping[Term, float] = field(default_factory=dict)
    """Of the losses; what is not named weighs 0."""
    loudness: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the router for experts that begin to train here, where the config says nothing of how loud they
    are."""


_SHAPE: dict[Term, float] = {"diffusion": 1.0, "roi": 3.0, "identity": 0.5, "temporal": 0.5}
_ROUTER: dict[Term, float] = {"entropy": 0.01, "balance": 0.05, "teacher_kl": 1.0}

STAGES: dict[str, StageSpec] = {
    "pretrain": StageSpec((), "frozen", 1e-3, "cosine", 20, 100, weights={"diffusion": 1.0}),
    "a": StageSpec(("base",), "base", 1e-4, "constant", 10, 100, weights={"diffusion": 1.0, "roi": 3.0}),
    "b": StageSpec(("experts",), "labels", 5e-5, "cosine", 15, 50, (0.2, 1.0), 0.05, _SHAPE),
    "b+router": StageSpec(
        ("experts", "router"), "router", 5e-5, "cosine", 20, 100, (0.2, 1.0), 0.05, _SHAPE | _ROUTER
    ),
    "c": StageSpec(
        ("router",),
        "router",
        1e-3,
        "cosine",
        5,
        20,
        weights={"diffusion": 1.0, "roi": 1.0, "entropy": 0.05, "balance": 0.1, "teacher_kl": 1.0},
    ),
}
# With the base beside the experts all noise levels train; they did best with half of every expert always on
# and at one rate (docs/recipes.md).
for _name in ("b", "b+router"):
    _spec = STAGES[_name]
    STAGES[_name.replace("b", "b+base", 1)] = replace(
        _spec,
        trains=("base", *_spec.trains),
        lr=STAGES["a"].lr,
        epochs=STAGES["a"].epochs + _spec.epochs,
        t_range=(0.0, 1.0),
        loudness={"bands": ((0.0, 1.0),), "floor": 0.5},
    )


def stage_name(config: TrainerConfig) -> str:
    """The row of the table that a config asks for."""
    if config.train.stage != "b":
        return config.train.stage
    return "b" + "+base" * (not config.train.freeze_base) + "+router" * config.train.train_router


def loss_weights(config: TrainerConfig, spec: StageSpec) -> dict[Term, float]:
    """The weights above 0 of a stage's losses, as configured or by the stage.

    A term of the router counts where a router trains, orthogonality where experts do: one `objective` section
    serves all stages. Identity that is not asked for is left out without a classifier.

    Raises:
        WanmoeError: nothing is left.
    """
    asked: dict[Term, float | None] = {term: getattr(config.objective, term) for term in TERMS}
    weights = {
        term: spec.weights.get(term, 0.0) if given is None else given
        for term, given in asked.items()
        if ("router" in spec.trains or term not in ROUTER_TERMS)
        and ("experts" in spec.trains or term != "orthogonality")
    }
    if config.objective.identity is None and config.objective.classifier is None:
        weights.pop("identity")
    weights = {term: weight for term, weight in weights.items() if weight > 0}
    if not weights:
        raise WanmoeError("every weight under [objective] is 0: nothing to train on")
    return weights


def part_of(name: str) -> str:
    """The part that a trainable parameter belongs to, by its name; "model" in stage pretrain."""
    if name.startswith("router."):
        return "time_gate" if name.startswith("router.time_") else "router"
    leaf = name.rsplit(".", 1)[-1]
    return {"base_down": "base", "base_up": "base", "expert_down": "experts", "expert_up": "experts"}.get(
        leaf, "model"
    )


def total_steps(config: TrainerConfig, spec: StageSpec, clips: int, global_batch: int) -> int:
    """Optimizer steps of a run: as configured, or what its epochs over `clips` make."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil((config.train.epochs or spec.epochs) * clips / global_batch))


def with_accumulation(config: TrainerConfig, world: int) -> TrainerConfig:
    """The config with the forwards per step that `train.global_batch` asks for on this many ranks."""
    wanted, at_once = config.train.global_batch, world * config.data.batch
    if wanted is None:
        return config
    if wanted % at_once:
        raise WanmoeError(
            f"train.global_batch = {wanted} does not divide among {world} ranks of data.batch = "
            f"{config.data.batch}; take a multiple of {at_once}"
        )
    train = config.train.model_copy(update={"accumulation": wanted // at_once})
    return config.model_copy(update={"train": train})


def select_trainable(spec: StageSpec, dit: WanDiT, adapter: Adapter | None) -> dict[str, nn.Parameter]:
    """Sets requires_grad for a stage and returns what trains by name; verified against the live model.

    Raises:
        WanmoeError: the model holds a trainable parameter that the stage should not train, or lacks one.
    """
    if spec.routing == "frozen":
        dit.requires_grad_(True)
        return dict(dit.named_parameters())
    if adapter is None:
        raise ValueError("every stage but pretrain needs an adapter")
    if "base" in spec.trains:
        adapter.config.check_base_trains(len(dit.blocks))
    wanted = adapter.train_only(spec.trains)
    if not wanted:
        raise WanmoeError(
            f"nothing to train: the adapter has no {' and '.join(spec.trains)}; set router.mode"
        )
    modules = [dit, *(module for module in (adapter.router, adapter.time_gate) if module is not None)]
    live = {id(p) for module in modules for p in module.parameters() if p.requires_grad}
    if live != {id(p) for p in wanted.values()}:
        raise WanmoeError("the parameters that require a gradient are not those of the stage; this is a bug")
    return wanted
