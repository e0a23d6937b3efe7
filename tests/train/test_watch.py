"""Figures of a validation, the alarm that is said once, and the end when nothing gets better."""

import json
import math

import pytest
import torch

from wanmoe.moe_lora import WanmoeError
from wanmoe.train.config import TrackingConfig, TrainConfig
from wanmoe.train.stages import STAGES
from wanmoe.train.tracking import Tracker
from wanmoe.train.validate import HeldOut
from wanmoe.train.watch import Watch, main_experts

NAMES = ["Scissors", "Suction"]


def held_out(loss):
    """Three clips: the second has no region, the third could not be read."""
    roi = torch.tensor([[3.0, 5.0], [0.0, 0.0], [0.0, 0.0]])
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    read, region = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    return HeldOut(torch.tensor([[loss, 2.0], [3.0, 4.0], [0.0, 0.0]]), roi, gates, read, region)


def watch(tmp_path, said=None, best=None, **keys):
    config = TrainConfig(stage="b", run=tmp_path, val_every=1, **keys)
    tracker = Tracker(TrackingConfig(enabled=False), tmp_path, {})
    say = (said if said is not None else []).append
    return Watch(config, STAGES["b"], NAMES, [0, 1, 0], tracker, say, best)


def test_a_validation_by_level_and_instrument(tmp_path):
    assert not watch(tmp_path).validated(4, held_out(1.0), (0.1, 0.9))
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 4
    assert line["val/loss"] == 2.5 and line["val/loss_t0.1"] == 2.0 and line["val/loss_t0.9"] == 3.0
    assert line["val/loss/Scissors"] == 1.5 and line["val/loss_t0.9/Suction"] == 4.0
    assert line["val/roi"] == 4.0 and line["val/roi/Scissors"] == 4.0
    assert "val/roi/Suction" not in line  # its clip has no region
    assert (tmp_path / "plots" / "gates-000004.png").stat().st_size > 5000


def test_the_terminal_tells_terms_load_and_held_out_loss_by_instrument(tmp_path):
    said = []
    own = watch(tmp_path, said)
    figures = {"train/loss": 2.0, "train/diffusion": 0.5, "train/roi": 0.25, "train/diffusion/high": 9.0}
    own.log(3, figures)
    load = {"load/Scissors": 0.6, "load/Suction": 0.4, "load/entropy": 0.673, "gates/entropy": 0.2}
    own.log(4, figures | load)
    own.validated(4, held_out(1.0), (0.1, 0.9))
    assert said == [
        "step 3: loss 2 (diffusion 0.5, roi 0.25)",
        "step 4: loss 2 (diffusion 0.5, roi 0.25); load Scissors 60%, Suction 40%, entropy 0.67 (of a "
        "clip's gates 0.20)",
        "step 4: held-out loss 2.5000, in the region 4.0000 (Scissors 1.5000, Suction 3.5000)",
    ]


def test_an_early_stop_keeps_the_best_and_ends_after_its_patience(tmp_path):
    said: list[str] = []
    own = watch(tmp_path, said, early_stop="val/loss", patience=2)
    found = [own.validated(step, held_out(loss), (0.1, 0.9)) for step, loss in enumerate([5.0, 3.0, 4.0])]
    assert found == [True, True, False]
    assert own.writes(1) and not own.writes(2) and not own.ended
    # The state goes into the resume state, and a resumed run goes on counting.
    again = watch(tmp_path, said, best=json.loads(json.dumps(own.best)), early_stop="val/loss", patience=2)
    assert not again.ended and not again.validated(3, held_out(3.0), (0.1, 0.9)) and again.ended
    assert "val/loss has not fallen below 3.0000 of step 1 in 2 validations; training ends" in said[-1]


def test_a_model_that_says_nan_is_never_the_best_and_does_not_hide_behind_the_other_clips(tmp_path):
    own = watch(tmp_path, early_stop="val/loss", patience=3)
    found = [
        own.validated(step, held_out(loss), (0.1, 0.9)) for step, loss in enumerate([math.nan, 3.0, math.nan])
    ]
    # The first is the best there is, and any number is better.
    assert found == [True, True, False] and own.best["step"] == 1
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["val/loss" in line for line in lines] == [False, True, False]


def test_without_early_stop_every_step_writes_and_nothing_ends(tmp_path):
    own = watch(tmp_path)
    for step in range(9):
        assert not own.validated(step, held_out(5.0), (0.1, 0.9))
    assert own.writes(3) and not own.ended


def test_a_metric_that_validation_does_not_have_is_named_with_those_it_has(tmp_path):
    with pytest.raises(WanmoeError, match=r"'val/rio': validation has no such figure; it has .*val/roi"):
        watch(tmp_path, early_stop="val/rio").validated(0, held_out(1.0), (0.1, 0.9))


def test_an_alarm_is_said_once_until_it_has_passed(tmp_path):
    said: list[str] = []
    own = watch(tmp_path, said)
    bad = {"load/Scissors": 0.9, "load/Suction": 0.1, "load/entropy": 0.325}
    good = {"load/Scissors": 0.5, "load/Suction": 0.5, "load/entropy": 0.69}
    for step, figures in enumerate([bad, bad, good, bad]):
        own.log(step, figures)
    assert [text.split(":")[0] for text in said] == ["step 0", "step 3"]


def test_a_clip_belongs_to_its_largest_gate_or_to_none():
    assert main_experts([torch.tensor([0.3, 0.7]), torch.zeros(2), torch.tensor([1.0, 0.0])]) == [1, -1, 0]
