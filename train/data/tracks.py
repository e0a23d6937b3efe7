"""Tips and boxes between the frames where they are known, carried by the flow.

Marks may be known once a second; an instrument moves between. A mark is carried from the key frame before and
from the one after, and the two are blended by their distance in time; without flow that is a straight line.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...moe_lora.motion import ClipFlow, Floats
from .clips import INTERPOLATED, Box, Tip

REACH = 16  # frames, a second at 16 fps, that a mark is carried with no other to meet it
_TIP_PATCH = 5.0  # pixels: side of the square about a tip whose motion is taken for the tip's

Mark = TypeVar("Mark", Tip, Box)
Point = NDArray[np.float64]


def carry(marks: Sequence[Mark], flow: ClipFlow | None, frames: int) -> list[Mark]:
    """The marks of every frame of a window of `frames`, sorted by frame; what is added is INTERPOLATED.

    Marks are in pixels and frames of the window; those before frame 0 or after the last only help. Marks of
    one track belong together, and marks without one are matched between neighbouring key frames of their
    instrument, nearest first. A gap of more than two seconds (2 `REACH` frames) is not bridged. With flow a
    mark that has none after (or before) it is carried on for `REACH` frames, or up to the next frame where
    its instrument was marked and it was not.
    """
    out: list[Mark] = []
    for track, known in _tracks(marks):
        out += track
        if flow is not None:
            out += _carried(track[0], _first(track[0].frame, known), flow)
            out += _carried(track[-1], _last(track[-1].frame, known), flow)
        for left, right in pairwise(track):
            out += _between(left, right, flow)
    return sorted((mark for mark in out if 0 <= mark.frame < frames), key=lambda mark: mark.frame)


def motion(field: Floats, scale: int, centre: Point, size: Point) -> Point:
    """The median of a flow field [2, h, w] over a rectangle in pixels of the picture; 0 outside of it."""
    low = np.maximum(np.floor((centre - size / 2 + 0.5) / scale), 0).astype(int)
    high = np.ceil((centre + size / 2 + 0.5) / scale).astype(int)
    part = field[:, low[1] : max(high[1], 0), low[0] : max(high[0], 0)].reshape(2, -1)
    return np.median(part, axis=1).astype(np.float64) if part.shape[1] else np.zeros(2)


def _between(left: Mark, right: Mark, flow: ClipFlow | None) -> Iterator[Mark]:
    """The frames between two marks of one track."""
    span = right.frame - left.frame
    if span < 2:
        return
    onward = _path(left, right.frame, flow)
    back = _path(right, left.frame, flow)[::-1]
    for step in range(1, span):
        share = step / span
        centre = (1 - share) * onward[step] + share * back[step]
        yield _put(left, left.frame + step, centre, (1 - share) * _size(left) + share * _size(right))


def _carried(mark: Mark, stop: int, flow: ClipFlow) -> Iterator[Mark]:
    """The frames from a mark to `stop`, which may lie before it; the mark itself is left out.

    A mark outside the window is not carried into it: what it did until then was not seen.
    """
    if not 0 <= mark.frame <= len(flow.backward):
        return
    way = 1 if stop > mark.frame else -1
    for step, centre in enumerate(_path(mark, stop, flow)[1:], start=1):
        yield _put(mark, mark.frame + way * step, centre, _size(mark))


def _path(mark: Mark, stop: int, flow: ClipFlow | None) -> list[Point]:
    """Where a mark's centre is in each frame from its own to `stop`; it stays where there is no flow."""
    centres = [_centre(mark)]
    reach = _size(mark) if isinstance(mark, Box) else np.full(2, _TIP_PATCH)
    way = 1 if stop > mark.frame else -1
    for frame in range(mark.frame, stop, way):
        here = centres[-1]
        if flow is not None and 0 <= min(frame, frame + way) < len(flow.backward):
            here = here + motion(flow.field(frame, frame + way), flow.scale, here, reach)
        centres.append(here)
    return centres


def _centre(mark: Mark) -> Point:
    centre = np.array([mark.x, mark.y], np.float64)
    return centre + (_size(mark) - 1) / 2 if isinstance(mark, Box) else centre


def _size(mark: Mark) -> Point:
    return np.array([mark.width, mark.height] if isinstance(mark, Box) else [1, 1], np.float64)


def _put(mark: Mark, frame: int, centre: Point, size: Point) -> Mark:
    x, y = (float(value) for value in centre - (size - 1) / 2)
    new = mark._replace(frame=frame, x=x, y=y, kind=INTERPOLATED)
    return new._replace(width=float(size[0]), height=float(size[1])) if isinstance(new, Box) else new


def _tracks(marks: Sequence[Mark]) -> Iterator[tuple[list[Mark], set[int]]]:
    """Runs of marks of one instrument, by frame, with the frames where any mark of that name is known."""
    groups: dict[tuple[str, str], list[Mark]] = {}
    known: dict[str, set[int]] = {}
    for mark in sorted(marks, key=lambda mark: mark.frame):
        groups.setdefault((mark.instrument, mark.track), []).append(mark)
        known.setdefault(mark.instrument, set()).add(mark.frame)
    for (instrument, _), group in groups.items():
        for run in _matched(group):
            start = 0
            for end in range(1, len(run) + 1):
                if end == len(run) or run[end].frame - run[end - 1].frame > 2 * REACH:
                    yield run[start:end], known[instrument]
                    start = end


def _matched(group: Sequence[Mark]) -> list[list[Mark]]:
    """Marks by frame as runs, each frame once: the nearest pairs of neighbouring key frames are joined."""
    runs: list[list[Mark]] = []
    for frame in dict.fromkeys(mark.frame for mark in group):
        new = [mark for mark in group if mark.frame == frame]
        before = max((run[-1].frame for run in runs), default=frame)
        open_runs = [run for run in runs if run[-1].frame == before]
        pairs = sorted(
            (float(np.linalg.norm(_edges(run[-1]) - _edges(mark))), i, j)
            for i, run in enumerate(open_runs)
            for j, mark in enumerate(new)
        )
        taken: dict[int, int] = {}
        for _, i, j in pairs:
            if i not in taken and j not in taken.values():
                taken[i] = j
        for i, j in taken.items():
            open_runs[i].append(new[j])
        runs += [[mark] for j, mark in enumerate(new) if j not in taken.values()]
    return runs


def _edges(mark: Mark) -> Point:
    centre, half = _centre(mark), _size(mark) / 2
    return np.concatenate([centre - half, centre + half])


def _first(frame: int, known: set[int]) -> int:
    """How far back a track goes whose first mark is at `frame`: a second, or after the known frame before."""
    return max([frame - REACH, *(one + 1 for one in known if one < frame)])


def _last(frame: int, known: set[int]) -> int:
    return min([frame + REACH, *(one - 1 for one in known if one > frame)])
