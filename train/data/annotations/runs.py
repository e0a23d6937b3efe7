"""From labelled frames to segments: runs of one set of instruments inside one phase, with weights and a
caption."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ....moe_lora.errors import WanmoeError
from ..clips import Box, Polygon
from ..segment import Moment, Segment

MAX_SECONDS = 20.0  # longer segments are dropped when clips are cut
GAP = 1.0  # seconds between neighbouring frames of a run, at most
ACTIVE_SHARE = 0.7  # of the weight, for the instruments that do more than hold
_IDLE = ("", "null verb")
_HOLDING = (*_IDLE, "grasp", "retract")
_ROUNDING = 1e-6


class Frame(NamedTuple):
    """What an annotation says of one frame: instruments as (name, weight), weights summing to 1."""

    seconds: float
    instruments: tuple[tuple[str, float], ...]
    phase: str | None = None
    triplets: tuple[str, ...] = ()
    marks: tuple[Box | Polygon, ...] = ()


def weighted(names: Iterable[str], active: Iterable[str] = ()) -> tuple[tuple[str, float], ...]:
    """Weights of the instruments of a frame: those at work get 0.7, the others the rest; equal where all or
    none are."""
    known, at_work = list(dict.fromkeys(names)), set(active)
    working = [name for name in known if name in at_work]
    idle = len(known) - len(working)
    if not working or not idle:
        return tuple((name, 1 / len(known)) for name in known)
    return tuple(
        (name, ACTIVE_SHARE / len(working) if name in working else (1 - ACTIVE_SHARE) / idle)
        for name in known
    )


def is_active(verb: str) -> bool:
    """Whether a verb of a triplet is work of its own, not holding or idling."""
    return spoken(verb) not in _HOLDING


def spoken(name: str) -> str:
    """A label as words: "CalotTriangleDissection" and "calot-triangle-dissection" alike."""
    return re.sub(r"[-_\s]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)).strip().lower()


def segments_of(
    frames: Iterable[Frame],
    *,
    video: str,
    path: Path,
    period: float,
    max_seconds: float,
    lone: float = 0.0,
    split: str | None = None,
    licence: str | None = None,
) -> list[Segment]:
    """Segments of the runs of `frames`; a run longer than `max_seconds` is cut into equal parts.

    A run goes on while set of instruments and phase are the same and its frames are at most 1 s apart (one
    `period` where that is longer).

    Args:
        path: what the frames were read from, for messages.
        period: seconds for which a frame speaks.
        lone: seconds for which a run of a single frame speaks, unless another comes before; 0: as others.
    """
    if not max_seconds > 0:
        raise WanmoeError(f"the longest segment is {max_seconds:g} s, but it must be longer than 0")
    runs = list(_runs(sorted(frames, key=lambda frame: frame.seconds), max(GAP, period)))
    starts = [*(run[0].seconds for run in runs), math.inf]
    made = []
    for run, following in zip(runs, starts[1:], strict=True):
        end = run[-1].seconds + period
        if len(run) == 1:
            end = max(end, min(run[0].seconds + lone, following))
        for start, stop, part in _parts(run, end, max_seconds):
            made.append(
                Segment(
                    video=video,
                    start=start,
                    end=stop,
                    caption=_caption(part),
                    origin=f"{path} at {start:g} s",
                    instruments=_mean(part),
                    phase=part[0].phase,
                    triplets=tuple(dict.fromkeys(triplet for frame in part for triplet in frame.triplets)),
                    moments=tuple(Moment(frame.seconds, mark) for frame in part for mark in frame.marks),
                    licence=licence,
                    split=split,
                )
            )
    return made


def _runs(frames: list[Frame], gap: float) -> Iterator[list[Frame]]:
    run: list[Frame] = []
    for frame in frames:
        if run and (frame.seconds - run[-1].seconds > gap + _ROUNDING or _kind(frame) != _kind(run[-1])):
            yield run
            run = []
        run.append(frame)
    if run:
        yield run


def _kind(frame: Frame) -> tuple[frozenset[str], str | None]:
    return frozenset(name for name, _ in frame.instruments), frame.phase


def _parts(run: list[Frame], end: float, longest: float) -> Iterator[tuple[float, float, list[Frame]]]:
    start = run[0].seconds
    count = max(1, math.ceil((end - start) / longest - _ROUNDING))
    edges = [start + index * (end - start) / count for index in range(count)] + [end]
    last = run[0]
    for left, right in pairwise(edges):
        # A part between two key frames is what the earlier one says, without its marks.
        inside = [frame for frame in run if left <= frame.seconds < right] or [last._replace(marks=())]
        last = inside[-1]
        yield left, right, inside


def _mean(part: list[Frame]) -> tuple[tuple[str, float], ...]:
    weights = [dict(frame.instruments) for frame in part]
    names = [name for name, _ in part[0].instruments]
    mean = {name: math.fsum(one[name] for one in weights) / len(part) for name in names}
    return tuple(sorted(mean.items(), key=lambda item: -item[1]))


def _caption(part: list[Frame]) -> str:
    """ "hook dissects gallbladder; grasper retracts gallbladder": work first, then what is seen most."""
    seen = Counter(triplet for frame in part for triplet in frame.triplets)
    if not seen:
        names = [name for name, _ in _mean(part)]
        listed = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "no instrument"
        phase = part[0].phase
        return f"{listed} in view" + (f" during {spoken(phase)}" if phase else "")
    words = {triplet: ([spoken(word) for word in triplet.split(",")] + ["", ""])[:3] for triplet in seen}
    acting = {subject for subject, verb, _ in words.values() if verb not in _IDLE}
    clauses = [
        (_clause(*words[triplet]), not is_active(words[triplet][1]), -count)
        for triplet, count in seen.items()
        if words[triplet][0] not in acting or words[triplet][1] not in _IDLE
    ]
    named = {subject for subject, _, _ in words.values()}
    clauses += [(f"{name} in view", True, 0) for name, _ in _mean(part) if name not in named]
    return "; ".join(clause for clause, *_ in sorted(clauses, key=lambda clause: clause[1:]))


def _clause(subject: str, verb: str, target: str) -> str:
    if verb in _IDLE:
        return f"{subject} in view"
    acts = verb if subject.endswith("s") else f"{verb}s"  # "scissors cut", "hook dissects"
    return f"{subject} {acts}" + (f" {target}" if target not in ("", "null target") else "")
