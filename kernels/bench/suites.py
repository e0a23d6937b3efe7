"""What runs: the full product of shapes, gates, modes and variants would take days, so a table says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from .linear import GATES, LINEARS, MODES, TEXT_TOKENS, Mode, Problem
from .timing import CPU, GPU, QUICK, Protocol

__all__ = ["SUITES", "Group", "Suite", "chosen"]

COMPILED = ("loop compiled", "PEFT compiled")
"""Half a minute each per shape and mode."""
ON_CPU = (
    "frozen",
    "frozen again",
    "loop",
    "PEFT",
    "packed",
    "auto one by one",
    "merged per call",
    "merged cached",
)
"""On the CPU auto is packed."""


@dataclass(frozen=True)
class Group:
    """One problem, in some modes, with all variants but those named, or with only those named."""

    problem: Problem
    modes: tuple[Mode, ...]
    only: tuple[str, ...] | None = None
    without: tuple[str, ...] = COMPILED
    graph: bool = False
    """Also time CUDA-graph replays."""

    def takes(self, variant: str) -> bool:
        return variant not in self.without and (self.only is None or variant in self.only)


@dataclass(frozen=True)
class Suite:
    """Named groups and how often each call is repeated."""

    name: str
    groups: tuple[Group, ...]
    protocol: Protocol


def group(
    linear: str,
    tokens: int,
    *modes: str,
    clips: int = 1,
    gates: str = "clip",
    without: tuple[str, ...] = COMPILED,
    graph: bool = False,
) -> Group:
    """A group of one of the named linears at full size."""
    problem = Problem(linear, LINEARS[linear], tokens, clips, gates)
    return Group(problem, tuple(MODES[mode] for mode in modes), without=without, graph=graph)


def _quick() -> tuple[Group, ...]:
    """In the order of what is wanted first, for a run that is stopped."""
    train = ("fwd", "fwd+bwd")
    return (
        group("qkv", 5376, *train),
        group("q", 5376, *train, graph=True),
        *(group(linear, 5376, *train) for linear in ("k", "ffn.0", "ffn.2")),
        *(group(linear, 21504, "fwd+bwd") for linear in ("qkv", "k")),
        group("q", 5376, "router", "no dx"),
        group("k", 5376, "fwd+bwd", gates="frame"),
        *(group("k", tokens, "fwd+bwd", graph=True) for tokens in (17, 5377)),
    )


def _full() -> tuple[Group, ...]:
    train = ("fwd", "bwd", "fwd+bwd")
    linears = tuple(linear for linear in LINEARS if linear != "kv")
    large, ragged = (5376, 21504, 32760, 75600), (1, 17, 127, 5377)
    every: list[Group] = [group("kv", TEXT_TOKENS, *train, graph=True)]
    for tokens in large:
        without = COMPILED if tokens == 75600 else ()
        every += [group(linear, tokens, *train, without=without, graph=tokens == 5376) for linear in linears]
    every += [group(linear, tokens, "fwd", "fwd+bwd", graph=True) for tokens in ragged for linear in linears]
    for tokens in (5376, 32760):
        every += [group(linear, tokens, "no dx", "router") for linear in ("q", "k", "qkv")]
        for gates in GATES:
            if gates != "clip":
                every += [group(linear, tokens, *train, gates=gates) for linear in ("q", "k", "qkv")]
        every.append(group("q", tokens, "router", gates="frame"))
    for tokens in (5376, 21504):
        every += [
            group(linear, tokens, "fwd", "fwd+bwd", "router", clips=2, gates=gates)
            for gates in ("clip", "frame")
            for linear in ("k", "qkv")
        ]
    return tuple(every)


def _cpu() -> tuple[Group, ...]:
    def small(linear: str, tokens: int, *modes: str, gates: str = "clip") -> Group:
        problem = Problem(linear, LINEARS[linear], tokens, 1, gates)
        return Group(problem, tuple(MODES[mode] for mode in modes), only=ON_CPU)

    return (
        small("q", 1024, "fwd", "fwd+bwd"),
        small("q", 127, "fwd+bwd", gates="frame"),
        small("qkv", 256, "fwd+bwd"),
    )


SUITES = {
    suite.name: suite
    for suite in (Suite("quick", _quick(), QUICK), Suite("full", _full(), GPU), Suite("cpu", _cpu(), CPU))
}
"""quick: what tells the forms apart, two minutes on a large card; full: the whole picture;
cpu: fp32, small."""


def chosen(suite: Suite, rows: str | None) -> tuple[Group, ...]:
    """The groups and modes that match a pattern, of several with commas, over names as "q-n5376-b1-clip/fwd".

    A pattern needs no star at its end. Raises ValueError with the names when nothing matches.
    """
    if rows is None:
        return suite.groups
    patterns = [pattern.strip() + "*" for pattern in rows.split(",") if pattern.strip()]
    kept: list[Group] = []
    for one in suite.groups:
        names = {mode: f"{one.problem.slug}/{mode.name}" for mode in one.modes}
        modes = tuple(m for m, name in names.items() if any(fnmatchcase(name, p) for p in patterns))
        if modes:
            kept.append(replace(one, modes=modes))
    if not kept:
        names_all = [f"{one.problem.slug}/{mode.name}" for one in suite.groups for mode in one.modes]
        raise ValueError(
            f"--rows {rows}: nothing in suite {suite.name} matches; it has {', '.join(names_all)}"
        )
    return tuple(kept)
