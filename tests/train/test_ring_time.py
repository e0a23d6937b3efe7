"""Times of a ring by its own schedule, against what can be told by hand."""

import pytest

from wanmoe.train.ring_time import step_time

ALL = range(10)
SIZE = 1024


def test_copies_that_are_shorter_than_the_computation_hide_behind_it():
    found = step_time(SIZE, 10, 10, ALL, 2, rate=SIZE / 0.5, forward=1.0, backward=0.0)
    assert found.stall == pytest.approx(0) and found.seconds == pytest.approx(10)
    assert found.copied == 10 * SIZE


def test_copies_that_are_longer_set_the_pace():
    found = step_time(SIZE, 10, 10, ALL, 2, rate=SIZE / 3, forward=1.0, backward=0.0)
    assert found.seconds == pytest.approx(30) and found.stall == pytest.approx(20)


def test_every_second_block_has_the_time_of_two():
    found = step_time(SIZE, 10, 10, range(0, 10, 2), 2, rate=SIZE / 2, forward=1.0, backward=0.0)
    assert found.stall == pytest.approx(0) and found.copied == 5 * SIZE


def test_the_tail_turns_with_what_the_slots_hold():
    """Ten blocks forward, the last four back: two of those are in the slots still."""
    found = step_time(SIZE, 10, 6, ALL, 2, rate=1e9, forward=1.0, backward=2.0)
    assert found.copied == (10 + 4 - 2) * SIZE
    assert found.seconds == pytest.approx(10 + 8, rel=1e-3)


def test_nothing_that_stays_is_copied():
    found = step_time(SIZE, 10, 8, (), 2, rate=1.0, forward=1.0, backward=2.0)
    assert (found.copied, found.stall, found.seconds) == (0, 0.0, 14.0)
