"""fp32 masters and Adam moments of what trains, read and set whole whatever the ZeRO stage.

DeepSpeed keeps them in other places in each stage: in shards of each parameter (3), in a flat partition of
all of them (1, 2), or, without ZeRO, in the parameters and the optimizer themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

# Per-parameter state of AdamW beside its step count.
MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_parameters(engine: Any, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """fp32 masters on the host by name; a collective, and what is frozen is not touched."""
    return {name: _get(engine, p, None) for name, p in trainable.items()}


def gather_state(engine: Any, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Masters and moments by `param/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`; a collective."""
    state = {f"param/{name}": value for name, value in gather_parameters(engine, trainable).items()}
    for name, parameter in trainable.items():
        for key in MOMENTS:
            state[f"{key}/{name}"] = _get(engine, parameter, key)
    return state


def restore_state(
    engine: Any, trainable: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], updates: int
) -> None:
    """Puts gathered masters and moments, as after `updates` updates, into a fresh engine, at any world size
    and stage."""
    allocate_moments(engine, updates)
    set_masters(engine, trainable, {name: state[f"param/{name}"] for name in trainable})
    for name, parameter in trainable.items():
        for key in MOMENTS:
            _set(engine, parameter, state[f"{key}/{name}"], key)


def set_masters(engine: Any, trainable: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Sets the fp32 masters: in bf16 the engine makes them of rounded parameters."""
    for name, parameter in trainable.items():
        _set(engine, parameter, values[name], None)


def allocate_moments(engine: Any, updates: int) -> None:
    """Zero moments, as after so many updates, for all that this rank updates: AdamW makes them late."""
    wrapper = engine.optimizer
    optimizer = getattr(wrapper, "optimizer", wrapper)
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO-3
        updated = list(wrapper.fp32_partitioned_groups_flat)
    else:
        updated = [p for group in optimizer.param_groups for p in group["params"]]
    for tensor in updated:
        moments = {key: torch.zeros_like(tensor) for key in MOMENTS}
        optimizer.state[tensor] = {"step": torch.tensor(float(updates)), **moments}
    if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
        # ZeRO-1 and 2 find a parameter's moments by a table, made at the first step and never again.
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def _get(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    value: Tensor | None
    if _is_plain(parameter):
        value = parameter if key is None else engine.optimizer.state[parameter][key]
    elif key is None:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, key)
    if value is None:
        raise ValueError("a parameter is not in the engine's optimizer")
    # A copy: DeepSpeed may hand out a view of its live buffer.
    return value.detach().to("cpu", torch.float32, copy=True).view(shape)


def _set(engine: Any, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    if _is_plain(parameter):
        into = parameter.data if key is None else engine.optimizer.state[parameter][key]
        into.copy_(value)
    elif hasattr(parameter, "ds_id"):
        # ZeRO-3 pads a parameter that does not divide by the world size; its own setter for whole values
        # does not.
        local = safe_get_local_fp32_param(parameter)
        size, rank = local.numel(), torch.distributed.get_rank()
        part = value.flatten()[size * rank : size * (rank + 1)].to(local.device)
        part = torch.nn.functional.pad(part, (0, size - part.numel()))
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether the parameter is its own master: there is no ZeRO."""
    return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")
