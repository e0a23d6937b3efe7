"""What each stage trains and how its clips are routed: one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from ..moe_lora import Adapter, WanmoeError
from ..moe_lora.adapter import Part

if TYPE_CHECKING:
    from ..moe_lora.wan.dit import WanDiT
    from .config import TrainerConfig

Routing = Literal["frozen", "base", "labels", "router"]


@dataclass(frozen=True)
class StageSpec:
    """One row: parts that train, where expert gates come from, and the defaults of the seed for this
    stage."""

    trains: tuple[Part, ...]
    routing: Routing
    """frozen: no adapter at all; base: base adapter alone; labels: rule gates; router: learned gates."""
    lr: float
    schedule: Literal["constant", "cosine"]
    t_range: tuple[float, float] = (0.0, 1.0)


STAGES: dict[str, StageSpec] = {
    "pretrain": StageSpec((), "frozen", 1e-3, "cosine"),
    "a": StageSpec(("base",), "base", 1e-4, "constant"),
    "b": StageSpec(("experts",), "labels", 5e-5, "cosine", (0.2, 1.0)),
    "b+router": StageSpec(("experts", "router"), "router", 5e-5, "cosine", (0.2, 1.0)),
    "c": StageSpec(("router",), "router", 1e-3, "cosine"),
}


def stage_name(config: TrainerConfig) -> str:
    """The row of the table that a config asks for."""
    joint = config.train.stage == "b" and config.train.train_router
    return "b+router" if joint else config.train.stage


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
    wanted = adapter.train_only(spec.trains)
    if not wanted:
        raise WanmoeError(
            f"nothing to train: the adapter has no {' and '.join(spec.trains)}; set router.mode"
        )
    live = {id(p) for p in dit.parameters() if p.requires_grad}
    if adapter.router is not None:
        live |= {id(p) for p in adapter.router.parameters() if p.requires_grad}
    if live != {id(p) for p in wanted.values()}:
        raise WanmoeError("the parameters that require a gradient are not those of the stage; this is a bug")
    return wanted
