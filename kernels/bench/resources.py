"""`wanmoe bench resources`: what the compilers make of the Triton and the CUDA kernels, as one table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import cuda_library
from ..lora_moe import resources as triton_resources
from ..lora_moe.table import SHARED_MEMORY

__all__ = ["resources_run"]


def resources_run(archs: Sequence[str], out: Path | None, say: Callable[[str], object]) -> int:
    """Compiles everything for these architectures and prints it; 1 when a kernel spills or does not fit.

    Raises: ValueError for an unknown architecture.
    """
    if unknown := [arch for arch in archs if arch not in SHARED_MEMORY]:
        raise ValueError(f"architecture {unknown[0]!r} is unknown; choose from {', '.join(SHARED_MEMORY)}")
    say(f"compiling the Triton kernels for {', '.join(archs)}: about a minute each")
    rows = triton_resources.compile_apart(archs, workers=os.cpu_count() or 1)
    say(f"{'kernel':<14} {'bm  bn  bk split warps stages':<31} {'width':>5} arch  {'regs':>4} {'stack':>5} "
        f"{'spills':>6} {'shared':>7} {'mma':>4}")  # fmt: skip
    for row in rows:
        sizes = row.launch or ("",) * 6
        launch = "{:>3} {:>3} {:>3} {:>5} {:>5} {:>6}".format(*sizes)
        fault = f"  {row.fault()}" if row.fault() else ""
        say(f"{row.kernel:<14} {launch:<31} {row.width:>5} {row.arch} {row.registers:>4} {row.stack:>5} "
            f"{row.spills:>6} {row.shared:>7} {row.tensor_core:>4}{fault}")  # fmt: skip
    faults = sum(row.fault() is not None for row in rows)
    cuda = _cuda(archs, say)
    faults += sum(row.stack > 0 or row.spills > 0 for row in cuda)
    say(f"{len(rows)} Triton and {len(cuda)} CUDA compilations, {faults} with a fault")
    if out is not None:
        table = {"triton": [row._asdict() for row in rows], "cuda": [row._asdict() for row in cuda]}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        say(f"wrote {out}")
    return int(faults > 0)


def _cuda(archs: Sequence[str], say: Callable[[str], object]) -> list[cuda_library.KernelResources]:
    """The rows of csrc/; none, with the reason, where there is neither a library nor a compiler."""
    # The 3090 (sm_86) runs the code of sm_80.
    wanted = {"sm_80" if arch == "sm_86" else arch for arch in archs}
    try:
        rows = [row for row in cuda_library.resources() if f"sm_{row.arch}" in wanted]
    except cuda_library.LibraryError as error:
        say(f"the CUDA kernels are left out: {error}")
        return []
    say(f"{'CUDA kernel':<28} {'access':<10} arch  {'regs':>4} {'stack':>5} {'spills':>6} {'shared':>6} "
        f"{'16-byte loads':>13} {'stores':>6} {'warps':>5}")  # fmt: skip
    for row in rows:
        wide = f"{row.loads_128} of {row.loads}"
        say(f"{row.kernel:<28} {row.access:<10} sm_{row.arch} {row.registers:>4} {row.stack:>5} "
            f"{row.spills:>6} {row.shared:>6} {wide:>13} {row.stores_128:>6} {row.warps:>5}")  # fmt: skip
    return rows
