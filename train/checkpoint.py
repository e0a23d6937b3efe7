"""Resume states: what trains, its fp32 masters and moments, and where the run stood; committed whole or not
at all.

A state is a folder `resume/step_XXXXXXXX/{state.safetensors, trainer.json, manifest.json}`. It is written
under a temporary name, flushed, given a manifest of sha256 sums, renamed and read back, before older ones go;
a folder whose manifest does not verify is never resumed from. Nothing frozen is in it and it does not depend
on the world size.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..moe_lora import WanmoeError
from ..moe_lora.files import file_sha256

FORMAT = "wanmoe-resume/1"
FILES = ("state.safetensors", "trainer.json")
MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


def commit(
    folder: Path, tensors: dict[str, Tensor], trainer: dict[str, Any], keep: int, spare: Collection[int] = ()
) -> Path:
    """Writes one resume state (rank 0 only) and prunes the older ones to `keep`; those of the steps
    `spare` stay, those of later steps are set aside.

    Raises:
        WanmoeError: no space left, not writable, or not what was written when it is read back; earlier states
            are untouched and nothing half-written stays.
    """
    target = state_of(folder, trainer["step"])
    there = target in states(folder)
    if there and _verify(target) is None:
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
        (staging / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": sums}, indent=1))
        for path in staging.iterdir():
            _fsync(path)
        _fsync(staging)
        if there:  # a damaged one
            _put_aside(target)
        os.rename(staging, target)
        _fsync(folder)
        # The entries of `resume` and of the run folder, which may be as new; who may write in a folder may
        # not always open it, and not every file system flushes one.
        for place in (folder.parent, folder.parent.parent):
            with contextlib.suppress(OSError):
                _fsync(place)
    except (OSError, SafetensorError) as error:
        raise WanmoeError(
            f"{target}: could not be saved ({error}); earlier resume states are untouched: make room there "
            "(train.keep says how many stay), or choose another train.run"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if (problem := _verify(target)) is not None:
        raise WanmoeError(
            f"{target}: is not what was written there ({problem}); earlier resume states are untouched: "
            "check the storage, or choose another train.run"
        )
    try:
        _prune(folder, target, keep, spare)
    except (OSError, WanmoeError) as error:
        _log.warning("%s is saved, but what it replaces could not be removed (%s)", target, error)
    return target


def _prune(folder: Path, target: Path, keep: int, spare: Collection[int]) -> None:
    step, spared = _step(target), {state_of(folder, step) for step in spare}
    before = [state for state in states(folder) if _step(state) < step]
    for old in before[: max(len(before) + 1 - keep, 0)]:
        if old not in spared:
            # What is removed only half has no name of a state.
            going = folder / f".tmp-{uuid.uuid4().hex[:12]}"
            os.rename(old, going)
            shutil.rmtree(going)
    for later in states(folder):
        # Of an attempt that this one replaces; it was passed over, but nobody said that it is worthless.
        if _step(later) > step and later not in spared:
            _put_aside(later)


def _put_aside(state: Path) -> None:
    """Renames one state that is not to be resumed from."""
    aside = _unused(state.with_name(f"aside-{state.name}"))
    os.rename(state, aside)
    _log.warning("%s was not resumed from and is replaced; it is kept as %s", state, aside)


def state_of(folder: Path, step: int) -> Path:
    """Where the state of a step lies."""
    return folder / f"step_{step:08d}"


def _step(state: Path) -> int:
    return int(state.name.removeprefix("step_"))


def clear_leftovers(run: Path) -> None:
    """Removes what a kill in the middle of a write has left in a run folder: nothing of it was ever valid."""
    for folder in (run / "resume").glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed takes space and nothing else
    for file in run.glob(".*.partial"):
        with contextlib.suppress(OSError):
            file.unlink()


def set_aside(folder: Path) -> Path | None:
    """Renames a folder of states that a fresh start must not resume from; returns where it went.

    Raises WanmoeError where that fails.
    """
    if not states(folder):
        return None
    aside = _unused(folder.with_name(f"{folder.name}-before"))
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise WanmoeError(
            f"{folder}: could not be renamed to {aside.name} ({error.strerror}); move it away, or choose "
            "another train.run"
        ) from error
    return aside


def _unused(path: Path) -> Path:
    """The first of path-1, path-2, ... that is not there."""
    number = 1
    while (numbered := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return numbered


def states(folder: Path) -> list[Path]:
    """Committed states, oldest first. Raises WanmoeError where the folder cannot be listed."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    return sorted((folder / name for name in names if re.fullmatch(r"step_\d+", name)), key=_step)


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """(newest state that verifies, complaints about newer ones that do not); no state where there is none.

    Raises WanmoeError where there are states and none verifies, or one cannot be read for now.
    """
    problems: list[str] = []
    for path in reversed(states(folder)):
        problem = _verify(path)
        if problem is None:
            return path, [f"{one}; trying the one before" for one in problems]
        problems.append(f"{path}: {problem}")
    if problems:
        raise WanmoeError(
            f"no resume state can be read ({'; '.join(problems)}); put a copy of one there, or set "
            "train.resume = false to start afresh"
        )
    return None, []


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, trainer.json) of a state that `latest` has verified.

    Raises WanmoeError where it cannot be read.
    """
    try:
        with safe_open(path / FILES[0], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        trainer: dict[str, Any] = json.loads((path / FILES[1]).read_text())
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return tensors, trainer


def _verify(path: Path) -> str | None:
    """What is damaged in a state; None where nothing is.

    Raises WanmoeError where a file is there and cannot be read: storage that is away damages nothing.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of format {manifest['format']!r}, this version reads {FORMAT!r}"
        for name in FILES:
            if file_sha256(path / name) != manifest["sha256"][name]:
                return f"{name} does not match its checksum"
        # Hidden files are those of file systems and desktops.
        more = {name for name in os.listdir(path) if not name.startswith(".")} - {*FILES, MANIFEST}
        return f"{', '.join(sorted(more))} does not belong there" if more else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"incomplete ({error})"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | SafetensorError) -> WanmoeError:
    named = getattr(error, "filename", None) or path
    cause = getattr(error, "strerror", None) or error
    return WanmoeError(
        f"{named}: could not be read ({cause}); what is saved may be whole: see to the storage and start "
        "again, or set train.resume = false to start afresh"
    )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        # What is read back comes from the storage then, as far as this machine has a say.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
