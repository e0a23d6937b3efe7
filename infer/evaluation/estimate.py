"""Figures of clips brought together: a value, its interval, and how many clips it is of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .tips import Share

DRAWS = 2000


class Estimate(NamedTuple):
    """A figure of a set of clips."""

    value: float
    low: float
    high: float
    """95 % interval over draws of clips with replacement; NaN for fewer than 3."""
    clips: int


def as_share(value: float) -> Share:
    """A figure of a clip that counts once."""
    return Share(value, 1.0)


def estimate(clips: Sequence[Share], seed: int = 0) -> Estimate:
    """The sum of totals over the sum of counts. Its interval draws whole clips: the marks of one clip are not
    independent of each other."""
    return _over_clips(len(clips), seed, _ratio(clips))


def difference(one: Mapping[str, Share], other: Mapping[str, Share], seed: int = 0) -> Estimate | None:
    """`estimate` of `one` less that of `other`, over the clips, by id, that both have; None without any."""
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    first, second = (_ratio([side[key] for key in shared]) for side in (one, other))
    return _over_clips(len(shared), seed, lambda drawn: first(drawn) - second(drawn))


def _ratio(clips: Sequence[Share]) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Places of clips [..., N] -> the sum of their totals over that of their counts [...]."""
    totals, counts = (np.array(column, dtype=float) for column in zip(*clips, strict=True))
    return lambda drawn: np.asarray(totals[drawn].sum(-1) / counts[drawn].sum(-1))


def _over_clips(
    clips: int, seed: int, figure: Callable[[NDArray[np.int64]], NDArray[np.float64]]
) -> Estimate:
    value = float(figure(np.arange(clips)))
    if clips < 3:
        return Estimate(value, math.nan, math.nan, clips)
    drawn = np.random.default_rng(seed).integers(clips, size=(DRAWS, clips))
    low, high = np.quantile(figure(drawn), [0.025, 0.975])
    return Estimate(value, float(low), float(high), clips)
