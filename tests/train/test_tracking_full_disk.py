"""Figures on a disk that is full for a while: none is lost, and no step fails."""

import contextlib
import resource

import pytest

from wanmoe.moe_lora import WanmoeError
from wanmoe.train.config import TrackingConfig
from wanmoe.train.spool import Spool
from wanmoe.train.tracking import Tracker, read_metrics


@contextlib.contextmanager
def room(left):
    """No file may become longer than `left` bytes: a write over it is cut, as at the end of a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


def test_lines_that_did_not_fit_come_with_the_next(run):
    said = []
    tracker = Tracker(TrackingConfig(enabled=False), run, {}, say=said.append)
    tracker.log(1, {"train/loss": 1.0})
    whole = tracker.path.read_bytes()
    with room(len(whole) + 10):
        tracker.log(2, {"train/loss": 2.0})
        tracker.log(3, {"train/loss": 3.0})
        assert tracker.path.read_bytes() == whole  # no half line
    tracker.log(4, {"train/loss": 4.0})
    tracker.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(run)] == [
        (n, n) for n in (1, 2, 3, 4)
    ]
    (line,) = said
    assert line.startswith("figures wait in memory until they can be written: ") and "metrics.jsonl" in line


def test_what_is_lost_in_the_end_is_said(run):
    said = []
    tracker = Tracker(TrackingConfig(enabled=False), run, {}, say=said.append)
    with room(0):
        tracker.log(1, {"train/loss": 1.0})
        tracker.close()
    assert said[1:] == [f"{run}: the last 1 lines of figures could not be written and are lost"]


def test_mlflow_gets_what_waited(run, monkeypatch):
    said = []
    tracker = Tracker(TrackingConfig(close_wait=60, system_metrics_every=0), run, {}, say=said.append)
    append = Spool.append

    def full(self, op):
        raise WanmoeError("spool.jsonl: could not be written (No space left on device)")

    monkeypatch.setattr(Spool, "append", full)
    tracker.log(1, {"train/loss": 1.0})
    tracker.log(2, {"train/loss": 2.0})
    monkeypatch.setattr(Spool, "append", append)
    tracker.log(3, {"train/loss": 3.0})
    tracker.close()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    history = client.get_metric_history(tracker.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in history) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(said) == 1 and "No space left on device" in said[0]
