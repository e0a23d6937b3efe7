"""The CUDA library of csrc/: how it is built, where it lies, how it is loaded, what its kernels need.

nvcc compiles the kernels and the binding and links them; a torch without CUDA is enough for that. The library
uses torch's stable ABI and has a CUDA runtime of its own: one file serves torch 2.10 and newer, any Python
and any CUDA that torch was built with. This module imports neither torch nor wanmoe; setup.py loads it by
path.

    python -m wanmoe.kernels.cuda_library        builds it in place, for an editable checkout
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "LIBRARY",
    "KernelResources",
    "LibraryError",
    "architectures",
    "build",
    "load",
    "obstacle",
    "ops",
    "resident_warps",
    "resources",
]

LIBRARY = Path(__file__).resolve().with_name("libwanmoe_cuda.so")
SOURCES = LIBRARY.parent.parent / "csrc" / "norms"
ARCHITECTURES = "80;89;90"
OLDEST = 80
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
FIX = "in a checkout, with nvcc on PATH, run: python -m wanmoe.kernels.cuda_library"

# Warps and CTAs of one multiprocessor, CUDA C++ programming guide, "Compute capabilities". All have 64 Ki
# registers, a quarter for each scheduler, given to a warp in steps of 256.
_SM_LIMITS = {80: (64, 32), 86: (48, 16), 89: (48, 24), 90: (64, 32), 100: (64, 32), 120: (48, 24)}


class LibraryError(RuntimeError):
    """The CUDA library is missing, stale, or cannot be built or loaded; the message says what to do."""


# ---- building ----


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH, else of /usr/local/cuda."""
    homes = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    for candidate in (*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found:
            return found
    return None


def find_torch() -> Path | None:
    """The folder of the installed torch package, which is not imported."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def architectures() -> list[int]:
    """Compute capabilities to compile for, from WANMOE_CUDA_ARCHS ("80;90", also "8.0 9.0"), oldest first."""
    text = os.environ.get("WANMOE_CUDA_ARCHS") or ARCHITECTURES
    words = re.split(r"[;, ]+", text.strip())
    if not all(re.fullmatch(r"\d+\.?\d", word) for word in words):
        raise LibraryError(f"WANMOE_CUDA_ARCHS is {text!r}; expected compute capabilities such as 80;89;90")
    found = sorted({int(word.replace(".", "")) for word in words})
    if found[0] < OLDEST:
        raise LibraryError(
            f"WANMOE_CUDA_ARCHS has {found[0]}; the kernels need {OLDEST} (A100) or newer, for bfloat16"
        )
    return found


def obstacle() -> str | None:
    """Why the library cannot be built here, or None."""
    if not SOURCES.is_dir():
        return f"its sources are not at {SOURCES}: build it in a checkout"
    if find_nvcc() is None:
        return "nvcc was not found: put it on PATH or set CUDA_HOME"
    if find_torch() is None:
        return "torch is not importable here; with pip: pip install --no-build-isolation"
    return None


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build; torch is not imported."""
    torch = find_torch()
    return torch is not None and (torch / "lib" / "libtorch_cuda.so").exists()


def fingerprint() -> str:
    """Of the sources, for the library to carry."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commands(target: Path, folder: Path, archs: list[int]) -> list[list[str]]:
    """What makes the library `target`, with intermediate files in `folder`."""
    nvcc, torch = find_nvcc(), find_torch()
    common = [f"{nvcc}", "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"]
    codes = [(f"compute_{arch}", f"sm_{arch}") for arch in archs]
    # Newer GPUs translate the newest PTX at the first start.
    codes.append((f"compute_{archs[-1]}",) * 2)
    targets = [f"-gencode=arch={virtual},code={real}" for virtual, real in codes]
    stable = [
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f'-DWANMOE_SOURCES="{fingerprint()}"',
    ]
    include = ["-isystem", f"{torch}/include"]
    return [
        [*common, "-Xptxas", "-v", *targets, f"{SOURCES}/norms.cu", "-o", f"{folder}/norms.o"],
        [*common, *stable, *include, f"{SOURCES}/binding.cpp", "-o", f"{folder}/binding.o"],
        # libtorch.so brings libtorch_cuda.so, with the CUDA part of the shim, wherever torch has it. The CUDA
        # runtime is static: torch's may be of another major version, and the runtimes of a process share the
        # device's primary context, hence streams, memory and the current device.
        [
            *(f"{nvcc}", "-shared", "-cudart", "static", f"{folder}/norms.o", f"{folder}/binding.o"),
            *("-Xlinker", "--no-as-needed", "-L", f"{torch}/lib", "-ltorch"),
            *("-Xlinker", "--exclude-libs,ALL", "-o", f"{target}"),
        ],
    ]


def build(target: Path = LIBRARY) -> str:
    """Compiles and links the library `target` for `architectures()`; returns what the compiler said.

    Raises LibraryError when something it needs is missing, or with the compiler's message.
    """
    missing = obstacle()
    if missing:
        raise LibraryError(f"the CUDA library cannot be built: {missing}")
    said = []
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wanmoe-cuda-") as name:
        folder = Path(name)
        for command in commands(folder / target.name, folder, architectures()):
            done = subprocess.run(command, capture_output=True, text=True)
            said.append(done.stdout + done.stderr)
            if done.returncode:
                raise LibraryError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{said[-1]}")
        # A process that has the old file mapped keeps it.
        staged = target.with_name(f"{target.name}.new")
        shutil.copy2(folder / target.name, staged)
        staged.replace(target)
    return "".join(said)


# ---- loading ----


@lru_cache(maxsize=1)
def load() -> Path:
    """Loads the library into torch, once; returns its path. Raises LibraryError that says how to mend it."""
    import torch

    if not LIBRARY.exists():
        raise LibraryError(f"{LIBRARY} is not built; {FIX}")
    if SOURCES.is_dir() and f"wanmoe-sources:{fingerprint()}".encode() not in LIBRARY.read_bytes():
        raise LibraryError(f"{LIBRARY} was built from other sources than those at {SOURCES}; {FIX}")
    if torch.version.cuda is None:
        raise LibraryError(f"torch {torch.__version__} is a build without CUDA; install one with it")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        reason = error.__cause__ or error
        raise LibraryError(
            f"{LIBRARY} does not load into torch {torch.__version__}: {reason}; {FIX}"
        ) from error
    return LIBRARY


@lru_cache(maxsize=1)
def ops() -> Any:
    """`torch.ops.wanmoe_cuda`, loaded."""
    import torch

    load()
    return torch.ops.wanmoe_cuda


# ---- resources ----


class KernelResources(NamedTuple):
    """What one kernel takes, from its machine code."""

    kernel: str
    access: str
    """float32, float16, bfloat16: all tensors of that dtype, 16 bytes at a time; any: mixed dtypes, any D."""
    arch: int
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread; a spill shows here."""
    spills: int
    """Instructions that move registers to and from local memory."""
    shared: int
    """Bytes of static shared memory per CTA; on sm_90 and newer 1024 of them are the system's."""
    loads: int
    """Load instructions from global memory, `loads_128` of them of 16 bytes."""
    loads_128: int
    stores: int
    stores_128: int
    threads: int
    """Per CTA at D = 5120."""
    warps: int
    """That fit on a multiprocessor at that size, computed from the registers and the limits of the arch."""


def resident_warps(arch: int, registers: int, threads: int) -> int:
    """Warps of CTAs of `threads` threads that fit on one multiprocessor, by registers, warps and CTAs."""
    most_warps, most_blocks = _SM_LIMITS.get(arch, (48, 16))
    per_block = threads // 32
    # Four schedulers share the registers alike, so whole warps per scheduler count.
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // per_block
    return min(by_registers, most_warps // per_block, most_blocks) * per_block


def find_cuobjdump() -> str | None:
    """cuobjdump next to nvcc or on PATH, else the one in the triton package."""
    spec = importlib.util.find_spec("triton")
    bundled = [f"{Path(spec.origin).parent}/backends/nvidia/bin/cuobjdump"] if spec and spec.origin else []
    nvcc = find_nvcc()
    beside = [str(Path(nvcc).resolve().with_name("cuobjdump"))] if nvcc else []
    return next(filter(None, map(shutil.which, (*beside, "cuobjdump", *bundled))), None)


def resources(library: Path | None = None) -> list[KernelResources]:
    """Every kernel's resources in `library`: the one that is built, else one that is compiled for this call.

    Raises LibraryError where there is neither a library nor nvcc, or no cuobjdump.
    """
    tool = find_cuobjdump()
    if tool is None:
        raise LibraryError("cuobjdump was not found: it comes with the CUDA toolkit and with triton")
    with tempfile.TemporaryDirectory(prefix="wanmoe-cuda-") as folder:
        if library is None and LIBRARY.exists():
            library = LIBRARY
        elif library is None:
            library = Path(folder) / LIBRARY.name
            build(library)
        usage, code = (_cuobjdump(tool, flag, library) for flag in ("--dump-resource-usage", "--dump-sass"))
    return _table(usage, code)


def _cuobjdump(tool: str, flag: str, library: Path) -> str:
    # It calls nvdisasm, which lies beside it.
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [tool, flag, str(library)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        raise LibraryError(f"{tool} {flag} {library} failed: {done.stderr.strip()}")
    return done.stdout


def _table(usage: str, code: str) -> list[KernelResources]:
    """From cuobjdump's two listings; both name the architecture before its functions."""
    numbers: dict[tuple[int, str], dict[str, int]] = {}
    arch, name = 0, ""
    for line in usage.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.search(r"Function (\w+):", line):
            name = found[1]
        elif "REG:" in line:
            numbers[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    texts: dict[tuple[int, str], list[str]] = {}
    for line in code.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.search(r"Function : (\w+)", line):
            texts[arch, found[1]] = lines = []
        elif "/*" in line and texts:
            lines.append(line)
    rows = [_row(arch, name, used, texts[arch, name]) for (arch, name), used in numbers.items()]
    return sorted(rows, key=lambda row: (row.kernel, row.access, row.arch))


def _row(arch: int, mangled: str, used: dict[str, int], text: list[str]) -> KernelResources:
    # _ZN6wanmoe13adaln_forwardINS_4FastILNS_5DtypeE2EEEEEv...
    found = re.match(r"_ZN6wanmoe\d+([a-z_]+)INS_(?:4FastILNS_5DtypeE(\d)E|3Any)", mangled)
    if found is None:
        raise LibraryError(f"{mangled} is no kernel of csrc/norms")
    access = ("float32", "float16", "bfloat16")[int(found[2])] if found[2] else "any"
    threads = 128 if found[1].endswith("_grad") or found[1].endswith("_grads") else 160

    def count(pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in text)

    return KernelResources(
        kernel=found[1],
        access=access,
        arch=arch,
        registers=used["REG"],
        stack=used["STACK"],
        spills=count(r"\b(STL|LDL)\b"),
        shared=used["SHARED"],
        loads=count(r"\bLDG\b"),
        loads_128=count(r"\bLDG\.[\w.]*128\b"),
        stores=count(r"\bSTG\b"),
        stores_128=count(r"\bSTG\.[\w.]*128\b"),
        threads=threads,
        warps=resident_warps(arch, used["REG"], threads),
    )


def main() -> None:
    """Builds the library in place."""
    started = time.monotonic()
    try:
        build()
    except LibraryError as error:
        sys.exit(str(error))
    names = ", ".join(f"sm_{arch}" for arch in architectures())
    print(f"built {LIBRARY} for {names} and newer in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
