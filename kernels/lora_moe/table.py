"""Which form of the op runs on which card: a stored table, never a measurement at run time.

An autotuner inside a training run would choose differently from rank to rank and from a forward to its
recompute. So the choice is data: `tables/<arch>.json` here, or the user's own, written by `wanmoe bench
tune`. A card or shape without a row runs the library's matrix products, which are right everywhere; so does
one whose table cannot be read, with a warning. No table ships before it was measured.
"""

from __future__ import annotations

import hashlib
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
_NEAR = 2.0
"""A row serves numbers of tokens up to this much larger or smaller than its own."""
_NEEDS = {
    "library": (),
    "single_pass": ("single_pass", "shrink", "expand"),
    "delta_first": ("shrink", "expand"),
    "epilogue": ("shrink", "gemm"),
}
"""Kernels of the forward; single_pass: the first for one linear, the others for a group."""
FORMAT = "wanmoe-table/1"

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
    backward = ("up_grad", "down_grad", *(("dx",) if form == "epilogue" else ()))
    return Plan(form, {kernel: CANDIDATES[kernel][0].launch for kernel in (*_NEEDS[form], *backward)})


def candidates(kernel: str, width: int, arch: str) -> list[Launch]:
    """The launches of a kernel that fit this packed width on this card; an unknown card gets the smallest
    one's."""
    known = arch if arch in SHARED_MEMORY else "sm_86"
    found = CANDIDATES.get(kernel, ())
    return [each.launch for each in found if width <= each.widest and known in each.archs]


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

    width is the group's packed width W. Says once per card and shape class why the library runs.
    """
    if _forced:
        return _forced[-1]
    if not x.is_cuda:
        return default_plan("single_pass")
    arch, (tokens, d_in) = architecture(x.device), x.shape
    if x.element_size() != 2:
        reason = f"the kernels are sized for bf16 and fp16, x is {x.dtype}"
    elif width > _WIDEST:
        reason = f"the kernels take {_WIDEST} columns"
    else:
        plan = lookup(arch, d_in, d_out, width, tokens)
        if plan is not None:
            return plan
        reason = f"no tuned row for {arch} near {tokens} tokens; `wanmoe bench tune` writes one"
    _say_library(d_in, tuple(d_out), width, reason)
    return Plan()


def lookup(arch: str, d_in: int, d_out: Sequence[int], width: int, tokens: int) -> Plan | None:
    """The stored plan of this shape class with the nearest number of tokens; None without one within 2 x."""
    rows = [row for row in _rows(arch) if (row.d_in, row.d_out, row.width) == (d_in, tuple(d_out), width)]
    if not rows:
        return None
    row = min(rows, key=lambda row: abs(math.log(row.tokens / tokens)))
    return row.plan if abs(math.log(row.tokens / tokens)) <= math.log(_NEAR) else None


def digest(device: torch.device) -> str:
    """Of the rows that this card would use: all ranks of a job must have the same."""
    if device.type != "cuda":
        return ""
    return hashlib.sha256(repr(_rows(architecture(device))).encode()).hexdigest()[:16]


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


class Row(NamedTuple):
    """One line of a table."""

    d_in: int
    d_out: tuple[int, ...]
    width: int
    tokens: int
    plan: Plan


def to_json(plan: Plan) -> dict[str, Any]:
    """As plain lists and strings, for a table."""
    return {"form": plan.form, "launches": {kernel: list(launch) for kernel, launch in plan.launches.items()}}


def read_table(path: Path, arch: str) -> list[Row]:
    """The rows of a table file; raises ValueError, naming file and row, for anything that could not run."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no table of kernels: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("rows"), list):
        raise ValueError(f"{path} is no table of the format {FORMAT}; tune again with `wanmoe bench tune`")
    rows = []
    for number, row in enumerate(data["rows"]):
        try:
            rows.append(_read_row(row, arch))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__} {error}" if not isinstance(error, ValueError) else error
            raise ValueError(f"{path}, row {number}: {what}; tune again with `wanmoe bench tune`") from error
    return rows


def _read_row(row: dict[str, Any], arch: str) -> Row:
    d_out = tuple(map(int, row["d_out"]))
    d_in, width, tokens = (int(row[key]) for key in ("d_in", "width", "tokens"))
    if min(d_in, width, tokens, *d_out) < 1 or width > _WIDEST:
        raise ValueError(f"d_in, d_out, width and tokens must be 1 or more, and width at most {_WIDEST}")
    form, launches = row["plan"]["form"], row["plan"]["launches"]
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose from {', '.join(FORMS)}")
    needed = set(_NEEDS[form])
    if form == "single_pass":
        needed = {"single_pass"} if len(d_out) == 1 else {"shrink", "expand"}
    if missing := needed - launches.keys():
        raise ValueError(f"form {form} has no launch of {', '.join(sorted(missing))}")
    plan = Plan(form, {kernel: Launch(*map(int, sizes)) for kernel, sizes in launches.items()})
    for kernel, launch in plan.launches.items():
        # Of the backward, what does not fit a linear's width is left to the library when it runs.
        if launch not in candidates(kernel, 1, arch):
            raise ValueError(f"{kernel} {tuple(launch)} is nothing that this version compiles for {arch}")
    return Row(d_in, d_out, width, tokens, plan)


@cache
def _rows(arch: str) -> tuple[Row, ...]:
    """Of the tables that come with wanmoe and of the user's own, which replaces their rows."""
    found: dict[tuple[Any, ...], Row] = {}
    for folder in (shipped_folder(), user_folder()):
        path = folder / f"{arch}.json"
        if not path.exists():
            continue
        try:
            rows = read_table(path, arch)
        except ValueError as error:
            _log.warning("%s; left out: its shapes run library products", error)
            continue
        found |= {row[:4]: row for row in rows}
        _log.info("LoRA-MoE kernels: %d rows of %s", len(rows), path)
    return tuple(found.values())


@cache
def _say_library(d_in: int, d_out: tuple[int, ...], width: int, reason: str) -> None:
    names = "+".join(map(str, d_out))
    _log.info("LoRA-MoE %d -> %s, packed width %d: library products, since %s", d_in, names, width, reason)
