"""What the compiler makes of every kernel and launch that a table can choose, without the card.

Triton compiles ahead of time for a named architecture, and the disassembler that it ships reads the result:
registers, stack (spills), shared memory, tensor-core instructions. Its interpreter cannot say any of this,
and accepts what the hardware refuses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .table import CANDIDATES, SHARED_MEMORY, Launch, candidates

__all__ = ["WIDTHS", "Resources", "compile_all", "compile_apart", "configurations", "measure"]

WIDTHS = (32, 64, 128)
"""Packed widths that are compiled: k, v, o and ffn; q; the group of q, k and v."""


# Kernels with one launch, and the widest columns that they run with: those of up_grad for what finishes its
# sums; pack_linear takes 32 columns at a time.
_SMALL = {"finish_shrink": 128, "finish_down": 64, "finish_up": 64, "pack_linear": 32}


class Resources(NamedTuple):
    """One kernel, launch, width and architecture."""

    kernel: str
    launch: Launch | None
    """None for the small kernels that finish a sum, which have one launch."""
    width: int
    arch: str
    registers: int
    stack: int
    """Bytes of a thread's stack; spilled registers lie there."""
    spills: int
    """Instructions that store to it."""
    shared: int
    """Bytes of a block."""
    tensor_core: int
    """HMMA or HGMMA instructions."""

    def fault(self) -> str | None:
        """Why this configuration must not be chosen, None when it may."""
        if self.stack or self.spills:
            return f"spills: {self.stack} bytes of stack, {self.spills} stores to it"
        if self.shared > SHARED_MEMORY[self.arch]:
            return f"{self.shared} bytes of shared memory, the card has {SHARED_MEMORY[self.arch]}"
        if self.launch is not None and not self.tensor_core:
            return "no tensor-core instruction"
        return None


Configuration = tuple[str, "Launch | None", int, str]


def configurations(archs: Sequence[str]) -> Iterator[Configuration]:
    """Kernel, launch, width and architecture of everything that `table` may choose."""
    for arch in archs:
        for width in WIDTHS:
            for kernel in CANDIDATES:
                for launch in candidates(kernel, width, arch):
                    yield kernel, launch, width, arch
            for kernel, widest in _SMALL.items():
                if width <= widest:
                    yield kernel, None, width, arch


def compile_all(archs: Sequence[str], workers: int) -> list[Resources]:
    """Compiles all `configurations`, half a second to a second each."""
    wanted = list(configurations(archs))
    # Only shrink is compiled for its split; the others get it as an argument.
    same_code = {each: _without_split(each) for each in wanted}
    distinct = list(dict.fromkeys(same_code.values()))
    with ProcessPoolExecutor(workers) as pool:
        found = dict(zip(distinct, pool.map(_measure, distinct, chunksize=4), strict=True))
    return [found[same_code[each]]._replace(launch=each[1]) for each in wanted]


def _without_split(configuration: Configuration) -> Configuration:
    kernel, launch, width, arch = configuration
    return (kernel, launch if launch is None or kernel == "shrink" else launch._replace(split=1), width, arch)


def _measure(configuration: Configuration) -> Resources:
    return measure(*configuration)


def measure(kernel: str, launch: Launch | None, width: int, arch: str) -> Resources:
    """Compiles one configuration for bf16 and reads the machine code.

    Raises: RuntimeError in a process where Triton interprets (TRITON_INTERPRET=1).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import triton_kernels

    name = "gemm_lowrank" if kernel in ("gemm", "dx") else kernel
    function = getattr(triton_kernels, name)
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("Triton interprets in this process (TRITON_INTERPRET=1); compile in another one")
    constants = _constants(kernel, launch, width)
    signature, attributes = {}, {}
    for index, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = _kind(argument)
        if argument not in _ODD:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages} if launch else {}
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    return Resources(kernel, launch, width, arch, *_read(compiled.asm["cubin"], compiled.metadata.shared))


# Arguments whose value is not a multiple of 16 at the sizes of Wan.
_ODD = {"parts", "tiles", "rows", "base_rank", "rank", "experts", "scale_base", "scale_expert", "down_tiles",
        "up_tiles", "tokens_per_row", "N", "span"}  # fmt: skip
_POINTERS = {
    "bf16": ("x", "down", "h", "u", "up", "y", "bias", "a", "b", "low", "dy", "dh"),
    "fp32": ("gates", "planes", "du_planes", "up_planes", "gate_planes", "d_up", "base_down", "base_up",
             "expert_down", "expert_up", "base_gates", "expert_gates"),
}  # fmt: skip


def _kind(argument: str) -> str:
    for dtype, names in _POINTERS.items():
        if argument in names:
            return f"*{dtype}"
    return "fp32" if argument.startswith("scale") else "i32"


def _constants(kernel: str, launch: Launch | None, width: int) -> dict[str, Any]:
    """Compile-time arguments as `forms` gives them, with every option on."""
    import triton.language as tl

    from . import forms, triton_kernels

    tokens, outputs = forms.FINISH_TOKENS, forms.FINISH_OUTPUTS
    sizes = (
        launch
        or {
            "finish_shrink": Launch(tokens, 0, 0, 4, 4, 1),
            "finish_down": Launch(tokens, 0, 0, 1, 4, 1),
            "finish_up": Launch(0, outputs, 0, 1, 4, 1),
            "pack_linear": Launch(0, forms.PACK_LANES, 0, 1, 4, 1),
        }[kernel]
    )
    every: dict[str, Any] = {
        "BM": sizes.bm, "BN": sizes.bn, "BK": sizes.bk, "SPLIT": sizes.split, "R": width, "ACC": tl.float32,
        "EVEN": True, "SAVE": True, "BIAS": kernel != "dx", "ADD": True, "FOLD": kernel == "finish_up",
        "GATES": True, "BR": min(width, forms.PACK_COLUMNS),
    }  # fmt: skip
    if kernel in ("shrink", "finish_shrink", "down_grad"):
        every["W"] = width
    if kernel in ("gemm", "dx"):
        every.update({"b_k": 1, "low_r": 1} if kernel == "gemm" else {"b_m": 1, "low_m": 1})
    name = "gemm_lowrank" if kernel in ("gemm", "dx") else kernel
    return {key: value for key, value in every.items() if key in getattr(triton_kernels, name).arg_names}


def _read(cubin: bytes, shared: int) -> tuple[int, int, int, int, int]:
    """Registers, stack, spill stores, shared memory, tensor-core instructions."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
        code = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"\bSTL\b", code)), shared, len(re.findall(r"\bHG?MMA\b", code))


def compile_apart(archs: Sequence[str], workers: int) -> list[Resources]:
    """`compile_all` in a process where Triton compiles, whatever it does in this one.

    Raises: RuntimeError with what that process said when it fails.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = (
        "import json, sys\n"
        "from wanmoe.kernels.lora_moe import resources\n"
        "if __name__ == '__main__':\n"
        "    json.dump(resources.compile_all(json.loads(sys.argv[1]), int(sys.argv[2])), sys.stdout)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(archs)), str(workers)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"Triton did not compile the kernels: {done.stderr[-2000:]}")
    rows = json.loads(done.stdout)
    return [
        Resources(kernel, None if launch is None else Launch(*launch), *rest)
        for kernel, launch, *rest in rows
    ]
