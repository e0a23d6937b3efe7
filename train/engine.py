"""The DeepSpeed engine of one model: what it updates, at which rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from .optimizer_state import allocate_moments
from .ranks import check_versions
from .routed import RoutedDiT
from .stages import StageSpec, part_of
from .zero import Stage, check_resident, deepspeed_config

if TYPE_CHECKING:
    from .config import TrainerConfig


def uses_bf16(config: TrainerConfig, device: torch.device) -> bool:
    """Whether the model computes in bf16: as configured, else on accelerators."""
    return config.train.precision == "bf16" or (config.train.precision == "auto" and device.type == "cuda")


def make_engine(
    config: TrainerConfig,
    module: RoutedDiT,
    trainable: Mapping[str, nn.Parameter],
    spec: StageSpec,
    *,
    stage: Stage,
    device: torch.device,
    shards: Any = None,
) -> Any:
    """A DeepSpeed engine over `module` whose optimizer holds exactly `trainable`; the loop sets the rates.

    Args:
        shards: under ZeRO-3 the readers of the base that is not loaded yet (`sliced.Sliced`).
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    from ..moe_lora.wan.block import WanBlock

    check_versions()
    bf16 = uses_bf16(config, device)
    settings = deepspeed_config(
        config, module.dit, trainable, stage=stage, bf16=bf16, world=dist.get_world_size()
    )
    if module.overlap:
        check_resident(module.dit, settings)
    if stage == 3:
        set_z3_leaf_modules(module, [WanBlock])
    groups: list[dict[str, Any]] = []
    for part, peak in peak_rates(config, spec).items():
        parameters = [p for name, p in trainable.items() if part_of(name) == part]
        if parameters:
            groups.append({"params": parameters, "lr": 0.0, "peak_lr": peak})
            if part == "time_gate":  # zero is no place for a center or the logarithm of a slope
                groups[-1]["weight_decay"] = 0.0
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    if shards is not None:
        shards.partition(module, settings)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    allocate_moments(engine, 0)
    return engine


def peak_rates(config: TrainerConfig, spec: StageSpec) -> dict[str, float]:
    """Peak learning rate of each part that a stage trains; the first is the one that a log line tells."""
    asked = config.optimizer
    lr = asked.lr or spec.lr
    joint = len(spec.trains) > 1
    rates = {
        "model": lr,
        "experts": lr,
        "base": (asked.base_lr or lr) if joint else lr,
        "router": (asked.router_lr or 1e-4) if joint else lr,
    }
    trained = {part: rate for part, rate in rates.items() if part in (spec.trains or ("model",))}
    return trained | ({"time_gate": asked.time_gate_lr} if "experts" in trained else {})


def lr_factor(step: int, steps: int, config: TrainerConfig, spec: StageSpec) -> float:
    """Factor on the peak learning rate at a step of `steps`: linear warm-up, then constant or cosine to
    zero."""
    warmup = config.optimizer.warmup_steps
    if warmup is None:
        warmup = min(spec.warmup, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    if (config.optimizer.schedule or spec.schedule) == "constant":
        return 1.0
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_lr(engine: Any, factor: float) -> float:
    """Sets every group to factor x its peak; returns the first group's rate."""
    groups = engine.optimizer.param_groups
    for group in groups:
        group["lr"] = factor * group["peak_lr"]
    return float(groups[0]["lr"])
