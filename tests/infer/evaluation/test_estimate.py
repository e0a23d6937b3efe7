"""Figures of clips brought together."""

import math

import numpy as np
import pytest

from wanmoe.infer.evaluation.estimate import as_share, difference, estimate
from wanmoe.infer.evaluation.tips import Share


def test_marks_weigh_the_same_whatever_clip_they_are_of() -> None:
    found = estimate([Share(1, 1), Share(0, 3), Share(2, 4)])
    assert found.value == pytest.approx(3 / 8) and found.clips == 3 and found.low <= found.value <= found.high
    few = estimate([Share(1, 1), Share(0, 3)])
    assert few.value == 0.25 and math.isnan(few.low) and math.isnan(few.high)


def test_the_interval_covers_and_narrows_with_clips() -> None:
    """Clips of four marks that are all alike: it is the clips that must be counted."""
    rng = np.random.default_rng(0)
    inside, widths = 0, []
    for _ in range(100):
        hits = rng.random(40) < 0.7
        found = estimate([Share(4 * float(hit), 4) for hit in hits])
        inside += found.low <= 0.7 <= found.high
        widths.append(found.high - found.low)
    assert inside >= 85
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 40), rel=0.1)


def test_a_difference_is_of_the_same_clips() -> None:
    one = {str(n): as_share(n + 1.0) for n in range(5)}
    other = {str(n): Share(2.0 * n, 2) for n in range(3, 9)}
    found = difference(one, other)
    assert found is not None and found.value == 1 and found.clips == 2
    assert difference({"a": as_share(1)}, {"b": as_share(1)}) is None
