"""Resume states: what trains, its fp32 masters and moments, and where the run stood; committed whole or not
at all.

A state is a folder `resume/step_XXXXXXXX/{state.safetensors, trainer.json, manifest.json}`. It is written
under a
temporary name, flushed, given a manifest of sha256 sums and renamed; a folder whose manifest does not verify
is never resumed from. Nothing frozen is in it and it does not depend on the world size.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..moe_lora import WanmoeError
from ..moe_lora.files import file_sha256

FORMAT = "wanmoe-resume/1"
FILES = ("state.safetensors", "trainer.json")


def commit(
    folder: Path, tensors: dict[str, Tensor], trainer: dict[str, Any], keep: int, spare: Collection[int] = ()
) -> Path:
    """Writes one resume state (rank 0 only) and prunes the older ones to `keep`; those of the steps
    `spare` stay.

    Raises:
        WanmoeError: no space left or not writable; earlier states are untouched and nothing half-written
        stays.
    """
    target = state_of(folder, trainer["step"])
    if target.exists() and _verify(target) is None:
        return target  # a finished run that was started again
    staging = folder / f".tmp-{uuid.uuid4().hex[:12]}"
    needed = sum(value.nbytes for value in tensors.values())
    try:
        staging.mkdir(parents=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free")
        save_file(tensors, staging / FILES[0], metadata={"format": FORMAT})
        (staging / FILES[1]).write_text(json.dumps(trainer, indent=1))
        sums = {name: file_sha256(staging / name) for name in FILES}
        (staging / "manifest.json").write_text(json.dumps({"format": FORMAT, "sha256": sums}, indent=1))
        for path in staging.iterdir():
            _fsync(path)
        _fsync(staging)
        if target.exists():  # a damaged one
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
    spared = [state_of(folder, step) for step in spare]
    # A later state belongs to an attempt that this one replaces.
    stale = [state for state in states(folder) if state > target]
    for old in (*before[: max(len(before) + 1 - keep, 0)], *stale):
        if old not in spared:
            shutil.rmtree(old)
    return target


def state_of(folder: Path, step: int) -> Path:
    """Where the state of a step lies."""
    return folder / f"step_{step:08d}"


def clear_leftovers(run: Path) -> None:
    """Removes what a kill in the middle of a write has left in a run folder: nothing of it was ever valid."""
    for folder in (run / "resume").glob(".tmp-*"):
        shutil.rmtree(folder)
    for file in run.glob(".*.partial"):
        file.unlink()


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
