"""Times several variants of one thing against each other: CUDA events on a GPU, the clock on the CPU.

Every round runs every variant once, in a fresh random order, so that heat, clocks and neighbours meet all of
them alike; every call takes the next of several input sets, so that none finds its data in the cache.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Protocol", "Timed", "graph_times", "input_sets", "interleaved", "percentile"]


@dataclass(frozen=True)
class Protocol:
    """How often to run; the same for every variant of a comparison."""

    warmup: int = 25
    repeats: int = 100
    least: int = 5
    """Repeats that are made whatever the budget says."""
    budget_s: float | None = None
    """Seconds that the timed rounds may take together, and the warm-up a quarter of it; None: no limit."""


GPU = Protocol(least=9, budget_s=60.0)
QUICK = Protocol(least=9, budget_s=5.0)
"""All repeats on a large card; a slow one comes to an end."""
CPU = Protocol(warmup=3, repeats=25, least=9, budget_s=15.0)


@dataclass(frozen=True)
class Timed:
    """One variant: `run` is timed, and given what `before`, which is not, made of the input set's number."""

    name: str
    before: Callable[[int], Any]
    run: Callable[[Any], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around each of the two, outside the timed part."""


def interleaved(
    variants: Sequence[Timed], *, device: torch.device, sets: int, protocol: Protocol, seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of every call, by variant, in the order in which they were made."""
    draw = random.Random(seed)
    once = _once_cuda if device.type == "cuda" else _once_cpu
    count = 0

    def before(variant: Timed) -> Any:
        nonlocal count
        count += 1
        with variant.context():
            return variant.before((count - 1) % sets)

    def round_of(order: Sequence[Timed]) -> dict[str, Callable[[], float]]:
        read: dict[str, Callable[[], float]] = {}
        given = before(order[0])
        for variant, after in zip(order, [*order[1:], None], strict=True):
            # One ahead: between a forward and its timed backward lies another's forward on another input set.
            ahead = before(after) if after else None
            read[variant.name] = once(variant, given)
            given = ahead
        return read

    spent = _warm_up(lambda: round_of(variants), device, protocol)
    repeats = protocol.repeats
    if protocol.budget_s is not None:
        repeats = min(repeats, max(protocol.least, int(protocol.budget_s / max(spent, 1e-9))))
    rounds = [round_of(draw.sample(variants, len(variants))) for _ in range(repeats)]
    _finish(device)
    return {variant.name: [read[variant.name]() for read in rounds] for variant in variants}


def _warm_up(one_round: Callable[[], object], device: torch.device, protocol: Protocol) -> float:
    """Runs the rounds that do not count, within their share of the budget; returns seconds of the last."""
    began, spent = time.perf_counter(), 0.0
    for _ in range(protocol.warmup):
        last = time.perf_counter()
        one_round()
        _finish(device)
        spent = time.perf_counter() - last
        if protocol.budget_s is not None and time.perf_counter() - began > 0.25 * protocol.budget_s:
            break
    return spent


def _once_cuda(variant: Timed, given: Any) -> Callable[[], float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with variant.context():
        start.record()
        result = variant.run(given)
        end.record()
    del result
    return lambda: float(start.elapsed_time(end))


def _once_cpu(variant: Timed, given: Any) -> Callable[[], float]:
    with variant.context():
        began = time.perf_counter()
        result = variant.run(given)
        taken = 1e3 * (time.perf_counter() - began)
    del result
    return lambda: taken


def graph_times(
    variants: Sequence[Timed], *, device: torch.device, sets: int, protocol: Protocol
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The same from replays of CUDA graphs, one per variant and input set: what is left without the host.

    Returns: milliseconds by variant, and by variant why its calls could not be captured.
    """
    graphs: dict[str, list[torch.cuda.CUDAGraph]] = {}
    why_not: dict[str, str] = {}
    for variant in variants:
        # One pool per variant: what a failed capture leaves behind stays there.
        pool = torch.cuda.graph_pool_handle()
        try:
            graphs[variant.name] = [_captured(variant, index, device, pool) for index in range(sets)]
        except RuntimeError as error:
            why_not[variant.name] = f"not capturable: {str(error).splitlines()[0]}"
            torch.cuda.synchronize(device)
    replays = [_replayed(name, captured) for name, captured in graphs.items()]
    if not replays:
        return {}, why_not
    return interleaved(replays, device=device, sets=sets, protocol=protocol, seed=1), why_not


def _replayed(name: str, captured: Sequence[torch.cuda.CUDAGraph]) -> Timed:
    return Timed(name, lambda index: captured[index], lambda graph: graph.replay())


def _captured(variant: Timed, index: int, device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side), variant.context():
        for _ in range(3):
            variant.run(variant.before(index))
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with variant.context(), torch.cuda.graph(graph, pool=pool):
        variant.run(variant.before(index))
    return graph


def input_sets(set_bytes: int, device: torch.device, *, most: int = 24) -> int:
    """How many input sets of `set_bytes` to rotate over: more than twice the L2 cache, if memory allows."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    wanted = max(2, math.ceil(2 * cache / set_bytes) + 1)
    return max(1, min(wanted, most, int(0.25 * free / set_bytes)))


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` of the samples lie, interpolated between neighbours."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(samples: Sequence[float]) -> Mapping[str, float]:
    """Median, p20 and p80 of samples in ms."""
    return {
        "median": percentile(samples, 0.5),
        "p20": percentile(samples, 0.2),
        "p80": percentile(samples, 0.8),
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
