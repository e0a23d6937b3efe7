"""Figures of clips brought together: a value, its interval, and how many clips it is of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

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
    totals, counts = (np.array(column, dtype=float) for column in zip(*clips, strict=True))
    value = float(totals.sum() / counts.sum())
    if len(clips) < 3:
        return Estimate(value, math.nan, math.nan, len(clips))
    drawn = np.random.default_rng(seed).integers(len(clips), size=(DRAWS, len(clips)))
    low, high = np.quantile(totals[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(clips))


def difference(one: Mapping[str, Share], other: Mapping[str, Share], seed: int = 0) -> Estimate | None:
    """The mean of `one` less `other` over the clips, by id, that both have; None without any."""
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    each = [as_share(_value(one[key]) - _value(other[key])) for key in shared]
    return estimate(each, seed)


def _value(share: Share) -> float:
    return share.hits / share.of
