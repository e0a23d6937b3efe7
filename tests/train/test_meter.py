"""What a log line says of terms by side and instrument, of the gates, and when the experts have collapsed."""

import math

import pytest
import torch

from wanmoe.train import meter as meter_module
from wanmoe.train.meter import Meter, collapse
from wanmoe.train.objective import Loss

NAMES = ["Scissors", "Hook/Electrocautery"]


pytestmark = pytest.mark.usefixtures("lone_group")


def loss(t, diffusion, rule, kept):
    t, diffusion, rule, kept = (torch.tensor(value) for value in (t, diffusion, rule, kept))
    entropy = -torch.xlogy(kept, kept).sum(1)
    return Loss(diffusion.mean(), {}, {"diffusion": diffusion}, t, kept, rule, entropy)


@pytest.fixture
def few(monkeypatch):
    """The load is told after two clips for each expert."""
    monkeypatch.setattr(meter_module, "CLIPS", 2)


def test_terms_by_side_and_instrument_and_gates_over_several_forwards(few):
    meter = Meter(NAMES, 0.875, torch.device("cpu"))
    meter.add(loss([0.9, 0.1], [1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.2], [0.4, 0.6]]))
    # A clip without evidence counts for its side, and for no instrument.
    meter.add(loss([0.5, 0.95], [4.0, 5.0], [[0.7, 0.3], [0.0, 0.0]], [[1.0, 0.0], [0.5, 0.5]]))
    figures = meter.reduce()
    assert figures["train/diffusion/high"] == pytest.approx(3.0)
    assert figures["train/diffusion/low"] == pytest.approx(3.0)
    assert figures["train/diffusion/Scissors"] == pytest.approx(2.5)
    assert figures["train/diffusion/Hook/Electrocautery"] == pytest.approx(2.0)
    assert figures["load/Scissors"] == pytest.approx(2.7 / 4)
    load = 2.7 / 4
    assert figures["load/entropy"] == pytest.approx(-load * math.log(load) - (1 - load) * math.log(1 - load))
    rows = torch.tensor([[0.8, 0.2], [0.4, 0.6], [1.0, 0.0], [0.5, 0.5]])
    assert figures["gates/entropy"] == pytest.approx(float(-torch.xlogy(rows, rows).sum(1).mean()))
    assert [figures[f"t/{edge / 10:.1f}"] for edge in range(10)] == [0, 0.25, 0, 0, 0, 0.25, 0, 0, 0, 0.5]
    assert not any(key.startswith(("train/", "load/")) for key in meter.reduce())


def test_the_load_waits_for_enough_clips_over_several_lines(few):
    meter = Meter(NAMES, 0.875, torch.device("cpu"))
    one = loss([0.1], [2.0], [[0.0, 1.0]], [[0.0, 1.0]])
    told = []
    for _ in range(8):
        meter.add(one)
        told.append("load/entropy" in meter.reduce())
    assert told == [False, False, False, True] * 2


def test_groups_that_were_not_seen_are_left_out():
    meter = Meter(NAMES, 0.875, torch.device("cpu"))
    meter.add(loss([0.1], [2.0], [[0.0, 1.0]], [[0.0, 1.0]]))
    figures = meter.reduce()
    assert "train/diffusion/high" not in figures and "train/diffusion/Scissors" not in figures


def test_a_run_without_experts_has_terms_and_t_alone():
    meter = Meter([], 0.875, torch.device("cpu"))
    meter.add(loss([0.1, 0.2], [1.0, 3.0], [[], []], [[], []]))
    figures = meter.reduce()
    assert figures["train/diffusion/low"] == 2.0
    assert not any(key.startswith(("load/", "gates/")) for key in figures)


def load_of(*shares):
    names = [f"tool {n}" for n in range(len(shares))]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return {f"load/{n}": s for n, s in zip(names, shares, strict=True)} | {"load/entropy": entropy}, names


@pytest.mark.parametrize(
    ("shares", "collapsed"),
    [
        ((0.25, 0.25, 0.25, 0.25), False),
        ((0.69, 0.11, 0.1, 0.1), False),
        ((0.71, 0.10, 0.1, 0.09), True),
        ((0.0, 1.0), True),
        ((0.82, 0.18, 0.0, 0.0), True),
        ((1.0,), False),  # one expert cannot collapse
    ],
)
def test_a_collapse_is_named_with_its_remedy(shares, collapsed):
    figures, names = load_of(*shares)
    found = {learned: collapse(figures, names, learned) for learned in (True, False)}
    assert all((text is not None) == collapsed for text in found.values())
    if collapsed:
        most = names[max(range(len(shares)), key=lambda n: shares[n])]
        assert most in found[True] and "objective.balance" in found[True] and "router.max_gate" in found[True]
        assert "data.balanced = true" in found[False]


def test_a_low_entropy_is_a_collapse_too():
    figures, names = load_of(0.5, 0.5)
    assert collapse(figures | {"load/entropy": 0.49}, names, True) is not None
