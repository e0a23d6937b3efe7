"""On what a run was made: device, versions, commit, environment. Nothing is set, only read."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["checkout", "device_name", "gpu_state", "provenance"]

_ENVIRONMENT = re.compile(
    r"(CUDA_(VISIBLE_DEVICES|LAUNCH_BLOCKING|DEVICE_MAX_CONNECTIONS|MODULE_LOADING)|CUBLAS_\w+|CUBLASLT_\w+"
    r"|NVIDIA_TF32_OVERRIDE|PYTORCH_\w*ALLOC_CONF|TORCH_(ALLOW|BLAS|CUDNN|LOGS)\w*|TORCHINDUCTOR_(?!CACHE)\w+"
    r"|TRITON_(?!\w*(DIR|PATH|HOME))\w+|OMP_\w+|MKL_\w+|ATEN_CPU_CAPABILITY|KMP_\w+)"
)
"""Variables that change what is measured; folders are nobody's business."""
_STATE = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,"
    "clocks_event_reasons.active"
)


def provenance(device: torch.device, argv: list[str]) -> dict[str, Any]:
    """What a reader needs to run it again. argv: the command, program first."""
    packages = ("triton", "diffusers", "peft", "numpy")
    return {
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(argv[0]).name, *argv[1:]]) if argv else "",
        "device": device_name(device),
        "gpu": _gpu(device),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cublas": _cublas() if device.type == "cuda" else None,
            "platform": platform.platform(),
            "wanmoe": _version("wanmoe"),
            **{name: _version(name) for name in packages},
        },
        "commit": _commit(),
        "environment": {name: value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)},
        "settings": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "allow_bf16_reduced_precision_reduction": str(
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
            ),
        },
    }


def device_name(device: torch.device) -> str:
    """NVIDIA's name of a GPU, or "CPU" and its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {_cpu_model()}"


def gpu_state(device: torch.device) -> dict[str, str] | None:
    """Clocks, power, temperature and why clocks are held down, as nvidia-smi reads them; None without it."""
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    # The last field was renamed between drivers: without it if need be.
    for asked in (_STATE, _STATE.rpartition(",")[0]):
        line = _output(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "-i", uuid])
        if line is not None:
            return dict(zip(asked.split(","), (value.strip() for value in line.split(",")), strict=False))
    return None


def checkout() -> Path | None:
    """The folder of the sources when this runs from them, None in an installed package."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "kernels" / "bench").is_dir() else None


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"sm_{found.major}{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cublas() -> str | None:
    """Version of the cuBLAS library that is loaded, asked of itself."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.is_file():
        return None
    match = re.search(r"(/\S*libcublas\.so\S*)", maps.read_text())
    if match is None:
        return None
    library = ctypes.CDLL(match[1])
    numbers = []
    for part in range(3):
        value = ctypes.c_int()
        if library.cublasGetProperty(part, ctypes.byref(value)):
            return None
        numbers.append(str(value.value))
    return ".".join(numbers)


def _commit() -> dict[str, Any] | None:
    root = checkout()
    if root is None:
        return None
    # --no-optional-locks: a status that writes nothing.
    git = ["git", "--no-optional-locks", "-C", str(root)]
    commit = _output([*git, "rev-parse", "HEAD"])
    if commit is None:
        return None
    return {"hash": commit, "dirty": bool(_output([*git, "status", "--porcelain", "--untracked-files=no"]))}


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
