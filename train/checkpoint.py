"""Resume states: what trains, its fp32 masters and moments, and where the run stood; committed whole or not
at all.

A state is a folder `resume/step_XXXXXXXX/{state.safetensors, trainer.json, manifest.json}`. It is written
under a
temporary name, flushed, given a manifest of sha256 sums and renamed; a folder whose manifest does not verify
is never resumed from. Nothing frozen is in it and it does not depend on the world size.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..moe_lora import WanmoeError
from ..moe_lora.files import file_sha256
from .engine import MOMENTS, allocate_moments

FORMAT = "wanmoe-resume/1"
FILES = ("state.safetensors", "trainer.json")


def gather_parameters(trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """fp32 masters of the trainable parameters on the host; a collective, and the frozen ones are not
    touched."""
    return {name: _whole(p, safe_get_full_fp32_param(p)) for name, p in trainable.items()}


def gather_state(trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Masters and Adam moments by `param/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`; a collective."""
    state = {f"param/{name}": value for name, value in gather_parameters(trainable).items()}
    for name, parameter in trainable.items():
        for key in MOMENTS:
            state[f"{key}/{name}"] = _whole(parameter, safe_get_full_optimizer_state(parameter, key))
    return state


def _whole(parameter: nn.Parameter, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("a parameter is not in the engine's optimizer")
    shape = getattr(parameter, "ds_shape", parameter.shape)
    # A copy: DeepSpeed may hand out a view of its live buffer.
    return value.detach().to("cpu", torch.float32, copy=True).view(shape)


def restore_state(
    engine: Any, trainable: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], step: int
) -> None:
    """Puts gathered masters and moments back into a fresh engine, at any world size."""
    allocate_moments(engine, step)
    set_masters(trainable, {name: state[f"param/{name}"] for name in trainable})
    for name, parameter in trainable.items():
        for key in MOMENTS:
            _set(parameter, state[f"{key}/{name}"], key)


def set_masters(trainable: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Sets the fp32 masters: in bf16 the engine makes them of rounded parameters."""
    for name, parameter in trainable.items():
        _set(parameter, values[name], None)


def _set(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    # ZeRO-3 pads a parameter that does not divide by the world size; its own setter for whole values does
    # not.
    local = safe_get_local_fp32_param(parameter)
    size, rank = local.numel(), torch.distributed.get_rank()
    part = value.flatten()[size * rank : size * (rank + 1)].to(local.device)
    part = torch.nn.functional.pad(part, (0, size - part.numel()))
    if key is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)


def commit(
    folder: Path, tensors: dict[str, Tensor], trainer: dict[str, Any], keep: int, spare: int | None = None
) -> Path:
    """Writes one resume state (rank 0 only) and prunes the older ones to `keep`; that of step `spare` stays.

    Raises:
        WanmoeError: no space left or not writable; earlier states are untouched and nothing half-written
        stays.
    """
    target = state_of(folder, trainer["step"])
    staging = folder / f".tmp-{uuid.uuid4().hex[:12]}"
    try:
        staging.mkdir(parents=True)
        save_file(tensors, staging / FILES[0], metadata={"format": FORMAT})
        (staging / FILES[1]).write_text(json.dumps(trainer, indent=1))
        sums = {name: file_sha256(staging / name) for name in FILES}
        (staging / "manifest.json").write_text(json.dumps({"format": FORMAT, "sha256": sums}, indent=1))
        for path in staging.iterdir():
            _fsync(path)
        _fsync(staging)
        if target.exists():
            shutil.rmtree(target)
        os.rename(staging, target)
        _fsync(folder)
    except OSError as error:
        raise WanmoeError(
            f"{target}: could not be saved ({error}); earlier resume states are untouched"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    before = [state for state in states(folder) if state < target]
    # A later state belongs to an attempt that this one replaces.
    stale = [state for state in states(folder) if state > target]
    for old in (*before[: max(len(before) + 1 - keep, 0)], *stale):
        if spare is None or old != state_of(folder, spare):
            shutil.rmtree(old)
    return target


def state_of(folder: Path, step: int) -> Path:
    """Where the state of a step lies."""
    return folder / f"step_{step:08d}"


def set_aside(folder: Path) -> Path | None:
    """Renames a folder of states that a fresh start must not resume from; returns where it went."""
    if not states(folder):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}-before-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def states(folder: Path) -> list[Path]:
    """Committed states, oldest first."""
    return sorted(folder.glob("step_????????"))


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """(newest state that verifies, complaints about newer ones that do not)."""
    complaints: list[str] = []
    for path in reversed(states(folder)):
        problem = _verify(path)
        if problem is None:
            return path, complaints
        complaints.append(f"{path}: {problem}; trying the one before")
    return None, complaints


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, trainer.json) of a state that `latest` has verified."""
    with safe_open(path / FILES[0], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    trainer: dict[str, Any] = json.loads((path / FILES[1]).read_text())
    return tensors, trainer


def _verify(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        sums = manifest["sha256"]
        for name in FILES:
            if file_sha256(path / name) != sums[name]:
                return f"{name} does not match its checksum"
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        return f"incomplete ({error})"
    return None


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
