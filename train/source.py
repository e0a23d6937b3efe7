"""Where a run came from, as tags by MLflow's names: user, command line, commit of the working tree."""

from __future__ import annotations

import contextlib
import getpass
import shlex
import subprocess
import sys
from pathlib import Path

from ..kernels.bench.provenance import checkout
from .mlflow_store import without_password


def source_tags() -> dict[str, str]:
    """Tags of this process; those of the commit only where it runs from a working tree of git."""
    words = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": without_password(shlex.join(words)),
    }
    with contextlib.suppress(KeyError, OSError):  # a container's user has no name
        tags["mlflow.user"] = getpass.getuser()
    return tags | _commit_tags(checkout())


def _commit_tags(root: Path | None) -> dict[str, str]:
    told = None if root is None else _git(root, "rev-parse", "--show-toplevel", "HEAD")
    # The tree of this code alone: not that of a project which holds a virtual environment or a copy.
    if root is None or told is None or Path(told.splitlines()[0]) != root:
        return {}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD")
    tags = {
        "mlflow.source.git.commit": told.splitlines()[1],
        "wanmoe.git.changed": str(bool(changed)).lower(),
    }
    return tags if branch in (None, "HEAD") else tags | {"mlflow.source.git.branch": str(branch)}


def _git(root: Path, *words: str) -> str | None:
    # --no-optional-locks: a status that writes nothing.
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
