"""One group of rows: each variant is checked against fp64 on poisoned memory, then all are timed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import model
from .ceilings import Ceilings
from .linear import Inputs, Mode, Problem, make_inputs
from .memory import peak_bytes, poisoned, saved_bytes
from .record import Row
from .suites import Group
from .timing import Protocol, Timed, graph_times, input_sets, interleaved, summary
from .truth import Truth, Verdict, judge
from .variants import FROZEN, LOOP, Prepared, Variant

__all__ = ["FAULTS", "Subject", "measure_group", "reason", "timed_rows"]

FAULTS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
)
"""What a variant that does not work may raise: its row says so, and the others are still measured."""

_MODELLED = {
    LOOP: ("loop", "loop"),
    "PEFT": ("PEFT", None),
    "packed": ("packed", "packed"),
    "library": ("packed", "packed"),
    "single_pass": ("single_pass", "fused du+dB"),
    "delta_first": ("delta_first", "fused du+dB"),
    "epilogue": ("epilogue", "fused du+dB, dx in the epilogue"),
    "merged per call": ("merged per call", None),
}
"""The implementations of `model` that a variant is, forward and backward; `auto` is what the table says."""
_SHARES_X = ("packed", "library", "single_pass", "delta_first", "epilogue")


def _no_model(name: str) -> float | None:
    return None


@dataclass(frozen=True)
class Subject:
    """One variant that ran, or the row that says why it did not."""

    name: str
    adapted: bool = True
    timed: Timed | None = None
    absent: Row | None = None
    verdict: Verdict | None = None
    note: str = ""
    peak: int | None = None
    saved: int | None = None


def measure_group(
    group: Group,
    variants: Sequence[Variant],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    protocol: Protocol,
) -> list[Row]:
    """The rows of a group, mode after mode, in the order of `variants`."""
    first = make_inputs(group.problem, dtype=dtype, device=device, seed=0)
    count = input_sets(first.nbytes, device)
    sets = [first] + [
        make_inputs(group.problem, dtype=dtype, device=device, seed=seed) for seed in range(1, count)
    ]
    truth = Truth(first)
    cuda = device.type == "cuda"
    taken = [variant for variant in variants if group.takes(variant.name)]
    rows: list[Row] = []
    for mode in group.modes:
        blank = blank_row(group.problem, mode, dtype)
        subjects = _subjects(taken, sets, mode, truth, blank)
        rows += timed_rows(
            subjects,
            blank,
            device=device,
            sets=len(sets),
            ceilings=ceilings,
            protocol=protocol,
            graph=group.graph and mode.forward,
            # On the CPU the branch's arithmetic is no smaller a matter than its bytes.
            model_ms=partial(modelled_ms, group.problem, mode, ceilings, dtype) if cuda else _no_model,
        )
    return rows


def blank_row(problem: Problem, mode: Mode, dtype: torch.dtype) -> Callable[[bool], Row]:
    """Rows of a problem and mode with nothing measured yet; the argument says whether adapters take part."""
    sizes = " + ".join(f"{s.d_in} -> {s.d_out} R {s.rank}" for s in problem.shapes)
    clips = f"{problem.clips} clips x " if problem.clips > 1 else ""
    title = f"{problem.linear}: {sizes}, {clips}{problem.tokens} tokens, gates: {problem.gates}"

    def blank(adapted: bool) -> Row:
        return Row(
            problem.slug,
            title,
            mode.name,
            "",
            "absent",
            linear=problem.linear,
            tokens=problem.tokens,
            clips=problem.clips,
            gates=problem.gates,
            flops=problem.flops(mode, adapted=adapted),
            moved=problem.bytes(mode, dtype.itemsize, adapted=adapted),
        )

    return blank


def timed_rows(
    subjects: Sequence[Subject],
    blank: Callable[[bool], Row],
    *,
    device: torch.device,
    sets: int,
    ceilings: Ceilings | None,
    protocol: Protocol,
    graph: bool = False,
    model_ms: Callable[[str], float | None] = _no_model,
    frozen: str = FROZEN,
) -> list[Row]:
    """Times all subjects that run, interleaved, and makes a row of each; `frozen`: what to compare with."""
    timed = [subject.timed for subject in subjects if subject.timed is not None]
    samples = interleaved(timed, device=device, sets=sets, protocol=protocol) if timed else {}
    graphs: dict[str, list[float]] = {}
    why_no_graph: dict[str, str] = {}
    if graph and device.type == "cuda":
        graphs, why_no_graph = graph_times(timed, device=device, sets=sets, protocol=protocol)
    base = summary(samples[frozen])["median"] if frozen in samples else None
    rows = []
    for subject in subjects:
        if subject.timed is None:
            rows.append(subject.absent or replace(blank(subject.adapted), variant=subject.name))
            continue
        row = _row(subject, blank(subject.adapted), samples[subject.name], base, ceilings)
        added = model_ms(subject.name) if base else None
        replay = graphs.get(subject.name)
        rows.append(
            replace(
                row,
                model_pct=100 * added / base if added is not None and base else None,
                graph_ms=summary(replay)["median"] if replay else None,
                note="; ".join(filter(None, (row.note, why_no_graph.get(subject.name)))),
            )
        )
    return rows


def _row(
    subject: Subject, blank: Row, samples: Sequence[float], base: float | None, ceilings: Ceilings | None
) -> Row:
    ms = summary(samples)
    verdict = subject.verdict
    return replace(
        blank,
        variant=subject.name,
        status="ok" if verdict is None or verdict.ok else "FAILED",
        note=subject.note,
        ms=ms,
        samples=tuple(samples),
        ratio=ms["median"] / base if base else None,
        overhead_pct=100 * (ms["median"] / base - 1) if base else None,
        gbps=blank.moved / ms["median"] / 1e6 if blank.moved else None,
        floor_pct=100 * ceilings.floor_ms(blank.flops, blank.moved) / ms["median"] if ceilings else None,
        peak_bytes=subject.peak,
        saved_bytes=subject.saved,
        tensor=verdict.tensor if verdict else "",
        error=verdict.error if verdict else None,
        eager_error=verdict.eager if verdict else None,
        error_ratio=verdict.ratio if verdict else None,
    )


def _subjects(
    variants: Sequence[Variant],
    sets: Sequence[Inputs],
    mode: Mode,
    truth: Truth,
    blank: Callable[[bool], Row],
) -> list[Subject]:
    """Checks every variant; the eager loop first, since the others' errors are measured by its own."""
    moded = [inputs.for_mode(mode) for inputs in sets]
    eager: Mapping[str, float] | None = None
    found: dict[str, Subject] = {}
    for variant in sorted(variants, key=lambda variant: variant.name != LOOP):
        empty = replace(blank(variant.adapted), variant=variant.name)
        why_not = variant.why_not or variant.refuses.get(mode.name)
        if why_not is not None:
            found[variant.name] = Subject(variant.name, absent=replace(empty, note=why_not))
            continue
        try:
            subject, errors = _checked(variant, moded, mode, truth, eager)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found[variant.name] = Subject(variant.name, absent=replace(empty, note="out of memory"))
            continue
        except _faults() as error:
            failed = replace(empty, status="FAILED", note=reason(error))
            found[variant.name] = Subject(variant.name, absent=failed)
            continue
        if variant.name == LOOP:
            eager = errors
        found[variant.name] = subject
    return [found[variant.name] for variant in variants]


def _checked(
    variant: Variant, moded: Sequence[Inputs], mode: Mode, truth: Truth, eager: Mapping[str, float] | None
) -> tuple[Subject, Mapping[str, float]]:
    """Runs a variant on poisoned memory and compares; raises whatever it raises."""
    device = truth.inputs.x.device
    prepared = [variant.prepare(inputs) for inputs in moded]
    first, dys = prepared[0], moded[0].dys
    with _context(variant, mode):
        # Compiles, and tells how much memory to poison.
        _call(first, mode, dys)
        peak = peak_bytes(lambda: _call(first, mode, dys), device)
        with poisoned(device, peak or 0):
            outputs, gradients = _call(first, mode, dys)
        saved = saved_bytes(first.forward, moded[0].persistent()) if mode.backward else None
    errors: dict[str, float] = {}
    if mode.forward:
        errors |= truth.output_errors(outputs, adapted=variant.adapted)
    if gradients:
        errors |= truth.gradient_errors(gradients, adapted=variant.adapted)
        _all_there(gradients, moded[0], adapted=variant.adapted)
    yardstick = None if variant.name == LOOP else eager
    if yardstick is None and variant.name != LOOP:
        raise RuntimeError("the eager loop, which errors are measured by, did not run")
    verdict = judge(errors, yardstick, truth) if errors else None
    note = "" if verdict is None or verdict.ok else f"wrong: {verdict.tensor}"
    timed = _timed(variant, prepared, [inputs.dys for inputs in moded], mode)
    return Subject(variant.name, variant.adapted, timed, None, verdict, note, peak, saved), errors


def _all_there(gradients: Mapping[str, Tensor], inputs: Inputs, *, adapted: bool) -> None:
    wanted = {name for name in inputs.leaves() if adapted or name == "x"}
    if missing := wanted - gradients.keys():
        raise RuntimeError(f"no gradient of {', '.join(sorted(missing))}")


def _call(
    prepared: Prepared, mode: Mode, dys: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
    """Outputs, and gradients under our names."""
    outputs = prepared.forward()
    if not mode.backward or not prepared.leaves:
        return outputs, {}
    found = torch.autograd.grad(outputs, list(prepared.leaves.values()), dys)
    named = dict(zip(prepared.leaves, found, strict=True))
    return [y.detach() for y in outputs], prepared.gradients(named) if prepared.gradients else named


def _timed(
    variant: Variant, prepared: Sequence[Prepared], dys: Sequence[Sequence[Tensor]], mode: Mode
) -> Timed:
    def backward(outputs: Sequence[Tensor], index: int) -> object:
        leaves = list(prepared[index].leaves.values())
        return torch.autograd.grad(outputs, leaves, dys[index]) if leaves else None

    def with_graph(index: int) -> tuple[Sequence[Tensor], int]:
        return prepared[index].forward(), index

    def whole(index: int) -> object:
        outputs = prepared[index].forward()
        return backward(outputs, index) if mode.backward else outputs

    def entered() -> AbstractContextManager[Any]:
        return _context(variant, mode)

    if mode.forward:
        return Timed(variant.name, lambda index: index, whole, entered)
    return Timed(variant.name, with_graph, lambda given: backward(*given), entered)


@contextmanager
def _context(variant: Variant, mode: Mode) -> Iterator[None]:
    with ExitStack() as stack:
        if not mode.backward:
            stack.enter_context(torch.no_grad())
        stack.enter_context(variant.context())
        yield


def modelled_ms(
    problem: Problem, mode: Mode, ceilings: Ceilings, dtype: torch.dtype, name: str
) -> float | None:
    """Milliseconds that the byte model adds to the frozen linear at these ceilings; None: not modelled."""
    forms = _MODELLED.get(name)
    if forms is None or mode.gate_grad or (mode.backward and not mode.input_grad):
        return None
    passes = [model.FORWARD[forms[0]]] if mode.forward and forms[0] else []
    if mode.backward:
        if forms[1] is None:
            return None
        passes.append(model.BACKWARD[forms[1]])
    total = 0.0
    for one in passes:
        for place, shape in enumerate(problem.shapes):
            mine = one._replace(x=0) if place and name in _SHARES_X else one
            flops, moved = model.added(mine, shape, problem.all_tokens, dtype.itemsize)
            total += 1e3 * (flops / (ceilings.tflops * 1e12) + moved / (ceilings.copy_tbps * 1e12))
    return total


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _faults() -> tuple[type[Exception], ...]:
    try:
        from triton.errors import TritonError
    except ImportError:
        return FAULTS
    return (*FAULTS, TritonError)
