"""Which form of the op runs on which card: a stored table, never a measurement at run time.

An autotuner inside a training run would choose differently from rank to rank and from a forward to its
recompute. So the choice is data: `tables/<arch>.json` here, or the user's own, written by `wanmoe bench
tune`. A card or shape without a row runs the library's matrix products, which are right everywhere.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

FORMS = ("library", "single_pass", "delta_first", "epilogue")


class Launch(NamedTuple):
    """Tile sizes and launch options of one kernel; a size that the kernel does not have is 0."""

    bm: int
    """Tokens."""
    bn: int
    """Outputs, or inputs for down_grad."""
    bk: int
    """Inputs of the inner loop."""
    split: int
    """Parts of the sum that run side by side and are added afterwards, in order."""
    warps: int
    stages: int


class Candidate(NamedTuple):
    """A launch that a table may name, and where it compiles without spilling."""

    launch: Launch
    widest: int = 128
    """Packed width."""
    archs: tuple[str, ...] = ("sm_80", "sm_86", "sm_89", "sm_90")


_LARGE = ("sm_80", "sm_90")  # 163 and 227 KB of shared memory a block; the others have 99

# What the tuner tries, by kernel; the first serves every card. The tests compile each for every card that it
# names: no spills, tensor-core instructions, shared memory under the card's limit.
CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "shrink": (
        Candidate(Launch(64, 0, 64, 1, 4, 4)),
        Candidate(Launch(64, 0, 64, 4, 4, 4)),
        Candidate(Launch(128, 0, 64, 1, 8, 3)),
        Candidate(Launch(128, 0, 64, 4, 8, 3)),
        Candidate(Launch(32, 0, 128, 2, 4, 3)),
    ),
    "single_pass": (
        Candidate(Launch(64, 128, 64, 1, 4, 3)),
        Candidate(Launch(64, 64, 64, 1, 4, 4)),
        Candidate(Launch(32, 128, 64, 1, 4, 3)),
    ),
    "expand": (
        Candidate(Launch(64, 128, 0, 1, 4, 2)),
        Candidate(Launch(128, 128, 0, 1, 8, 2)),
        Candidate(Launch(64, 256, 0, 1, 8, 2)),
    ),
    "gemm": (
        Candidate(Launch(128, 128, 64, 1, 8, 3)),
        Candidate(Launch(128, 256, 64, 1, 8, 3), archs=("sm_90",)),
        Candidate(Launch(128, 128, 32, 1, 4, 4)),
    ),
    "up_grad": (
        Candidate(Launch(32, 256, 0, 8, 8, 2), 64),
        Candidate(Launch(32, 256, 0, 16, 8, 2), 64),
        Candidate(Launch(64, 128, 0, 8, 8, 2), 64),
        Candidate(Launch(32, 512, 0, 16, 8, 2), 32),
    ),
    "down_grad": (
        Candidate(Launch(64, 128, 0, 4, 8, 3)),
        Candidate(Launch(64, 128, 0, 8, 8, 3)),
        Candidate(Launch(64, 256, 0, 8, 8, 3), archs=_LARGE),
    ),
}
CANDIDATES["dx"] = CANDIDATES["gemm"]

# Shared memory that one block may take, in bytes (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448}
_WIDEST = 128

_forced: list[Plan] = []


@dataclass(frozen=True)
class Plan:
    """How one group of linears runs, forward and backward."""

    form: str = "library"
    """Of the forward. library: matrix products; single_pass: one kernel after the base product, for a single
    linear (a group shares one shrink, then each adds its part); delta_first: the adapter's part is written
    first and the base product accumulates onto it; epilogue: both in one kernel."""
    launches: dict[str, Launch] = field(default_factory=dict)
    """By kernel. A kernel of the backward (up_grad, down_grad, dx) without an entry is a library product."""

    def launch(self, kernel: str, width: int) -> Launch | None:
        """The launch of a kernel at this packed width; None where the plan has none or it would spill."""
        launch = self.launches.get(kernel)
        fits = any(launch == each.launch and width <= each.widest for each in CANDIDATES[kernel])
        return launch if fits else None


def default_plan(form: str) -> Plan:
    """A plan of this form with the first launch of every kernel: what runs before anything is tuned.

    Raises: ValueError for a form that is not in FORMS.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose from {', '.join(FORMS)}")
    if form == "library":
        return Plan()
    forward = {
        "single_pass": ("shrink", "single_pass", "expand"),
        "delta_first": ("shrink", "expand"),
        "epilogue": ("shrink", "gemm", "dx"),
    }[form]
    return Plan(form, {kernel: CANDIDATES[kernel][0].launch for kernel in (*forward, "up_grad", "down_grad")})


def candidates(kernel: str, width: int, arch: str) -> list[Launch]:
    """The launches of a kernel that fit this packed width on this card."""
    found = CANDIDATES.get(kernel, ())
    return [each.launch for each in found if width <= each.widest and arch in each.archs]


@contextmanager
def override(plan: Plan) -> Iterator[None]:
    """Every call with the triton backend inside runs this plan, forward and backward."""
    _forced.append(plan)
    try:
        yield
    finally:
        _forced.pop()


def plan_for(x: Tensor, d_out: Sequence[int], width: int) -> Plan:
    """The plan of a group of linears on x [N, d_in]: a forced one, the table's, or the library products.

    width is the group's packed width W. Says once per card and shape class that there is no row.
    """
    if _forced:
        return _forced[-1]
    if not x.is_cuda:
        return default_plan("single_pass")
    if x.element_size() != 2 or width > _WIDEST:  # the launches are sized for bf16 and fp16
        return Plan()
    arch, (tokens, d_in) = architecture(x.device), x.shape
    plan = lookup(arch, d_in, d_out, width, tokens)
    if plan is None:
        _say_untuned(arch, d_in, tuple(d_out), width)
        return Plan()
    return plan


def lookup(arch: str, d_in: int, d_out: Sequence[int], width: int, tokens: int) -> Plan | None:
    """The stored plan of this shape class with the nearest number of tokens (by ratio), None without one."""
    rows = [
        row for row in _rows(arch) if (row["d_in"], row["d_out"], row["width"]) == (d_in, [*d_out], width)
    ]
    if not rows:
        return None
    row = min(rows, key=lambda row: abs(math.log(row["tokens"] / tokens)))
    return from_json(row["plan"])


def architecture(device: torch.device) -> str:
    """sm_90 and the like."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def user_folder() -> Path:
    """Where `wanmoe bench tune` writes: WANMOE_TABLES, or wanmoe/tables in the user's cache."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("WANMOE_TABLES") or Path(cache_home) / "wanmoe" / "tables")


def shipped_folder() -> Path:
    """Where the tables lie that come with wanmoe."""
    return Path(__file__).parent / "tables"


def to_json(plan: Plan) -> dict[str, Any]:
    """As plain lists and strings, for a table."""
    return {"form": plan.form, "launches": {kernel: list(launch) for kernel, launch in plan.launches.items()}}


def from_json(data: dict[str, Any]) -> Plan:
    """The inverse of `to_json`. Raises ValueError for a form, kernel or launch that is no candidate."""
    launches = {kernel: Launch(*sizes) for kernel, sizes in data["launches"].items()}
    for kernel, launch in launches.items():
        if launch not in [candidate.launch for candidate in CANDIDATES.get(kernel, ())]:
            raise ValueError(
                f"table names {kernel} {tuple(launch)}, which this version does not compile; tune again with "
                "`wanmoe bench tune`"
            )
    if data["form"] not in FORMS:
        raise ValueError(f"table names the form {data['form']!r}; choose from {', '.join(FORMS)}")
    return Plan(data["form"], launches)


@cache
def _rows(arch: str) -> list[dict[str, Any]]:
    for folder in (user_folder(), shipped_folder()):
        path = folder / f"{arch}.json"
        if path.exists():
            rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
            _log.info("LoRA-MoE kernels: %s", path)
            return rows
    return []


@cache
def _say_untuned(arch: str, d_in: int, d_out: tuple[int, ...], width: int) -> None:
    _log.info(
        "LoRA-MoE %d -> %s, packed width %d: no tuned row for %s, using library products; "
        "`wanmoe bench tune` writes one",
        d_in,
        "+".join(map(str, d_out)),
        width,
        arch,
    )
