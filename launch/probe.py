"""What one machine says of itself, as JSON: run on every host by `wanmoe launch doctor`.

`python -m wanmoe.launch.probe '{"port": 29500, "first": true, "paths": [], "folders": [], "token": ""}'`;
needs nothing but what it asks after, so that a host that lacks something can say so.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("wanmoe", "torch", "deepspeed", "transformers", "safetensors", "webdataset")
MARK = "wanmoe-probe:"
"""Before the answer."""
VARIABLES = ("NCCL_", "GLOO_", "UCX_", "FI_")


def probe(ask: dict[str, Any]) -> dict[str, Any]:
    """The facts of this machine.

    Args:
        ask: `port`, tried where `first` is true, or null and this is the first task of Slurm; `paths` that
            must be there; `folders` to write to, with a `token` that tells whether all hosts see the same.
    """
    first = os.environ.get("SLURM_PROCID") == "0" if ask["first"] is None else ask["first"]
    began = time.time()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    facts = {
        "began": began,
        "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "versions": versions,
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        "interfaces": [name for _, name in socket.if_nameindex()],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "port_taken": first and _taken(ask["port"]),
        "paths": {path: _size(Path(path)) for path in ask["paths"]},
        "folders": {path: _folder(Path(path), ask["token"]) for path in ask["folders"]},
        **_cards(),
    }
    return facts | {"time": time.time()}


def _cards() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of CUDA that is not there
        return {"cards": [], "cuda": None, "nccl": None, "broken": f"torch: {error}"}
    if not torch.cuda.is_available():
        return {"cards": [], "cuda": torch.version.cuda, "nccl": None, "broken": None}
    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cards": [{"name": card.name, "memory": card.total_memory} for card in every],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "broken": None,
    }


def _taken(port: int) -> bool:
    with socket.socket() as here:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            here.bind(("", port))
        except OSError:
            return True
    return False


def _size(path: Path) -> int | None:
    """Bytes of a file, or of what lies in a folder; None where it cannot be read."""
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        return path.stat().st_size
    except OSError:
        return None


def _folder(path: Path, token: str) -> dict[str, Any]:
    """Whether a folder can be written to, whose tokens lie there, and its free bytes; the nearest that exists
    stands for one that does not."""
    while not path.exists():
        path = path.parent
    mine = path / f".wanmoe-doctor-{token}-{socket.gethostname()}-{os.getpid()}"
    try:
        mine.touch()
        seen = sorted(file.name for file in path.glob(f".wanmoe-doctor-{token}-*"))
        free = shutil.disk_usage(path).free
    except OSError as error:
        return {"fault": f"{path}: {error.strerror}", "own": "", "seen": [], "free": 0}
    return {"fault": None, "own": mine.name, "seen": seen, "free": free}


if __name__ == "__main__":
    sys.stdout.write(MARK + json.dumps(probe(json.loads(sys.argv[1]))) + "\n")
