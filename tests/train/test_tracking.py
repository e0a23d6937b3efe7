"""Figures land in metrics.jsonl and in MLflow."""

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from wanmoe.moe_lora import WanmoeError
from wanmoe.train.config import TrackingConfig
from wanmoe.train.tracking import Tracker, read_metrics


def test_metrics_params_and_artefacts_reach_sqlite(tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    tracker = Tracker(TrackingConfig(), run, {"train.steps": 3})
    tracker.log(1, {"train/loss": 2.0})
    tracker.log(2, {"train/loss": 1.5, "val/loss_t0.5": 1.0})
    tracker.artifact(run / "metrics.jsonl")
    tracker.close()
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    logged = client.get_run(tracker.run_id)
    assert logged.info.run_name == "a" and logged.info.status == "FINISHED"
    assert logged.data.params == {"train.steps": "3"}
    assert [m.value for m in client.get_metric_history(tracker.run_id, "train/loss")] == [2.0, 1.5]
    assert [f.path for f in client.list_artifacts(tracker.run_id)] == ["metrics.jsonl"]
    assert read_metrics(run)[1] == {"step": 2, "train/loss": 1.5, "val/loss_t0.5": 1.0}


def test_a_resume_goes_on_with_the_same_run_and_cuts_what_came_after_the_state(tmp_path):
    first = Tracker(TrackingConfig(), tmp_path, {})
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
    again = Tracker(TrackingConfig(), tmp_path, {}, start_step=2, run_id=first.run_id)
    assert again.run_id == first.run_id
    again.log(3, {"train/loss": 30.0})
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [1, 2, 30]


def test_a_last_line_that_a_crash_cut_is_left_out_and_a_damaged_one_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra')
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tra\n{"step": 2, "train/loss": 1.0}\n')
    with pytest.raises(WanmoeError, match="metrics.jsonl:1: damaged"):
        read_metrics(tmp_path)


def test_a_tracker_that_fails_on_the_way_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    tracker = Tracker(TrackingConfig(), tmp_path, {})

    def fail(*_arguments, **_more):
        raise MlflowException("server gone\nlong trace")

    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    for step in (1, 2):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    assert len(read_metrics(tmp_path)) == 2
    assert capsys.readouterr().err.count("MLflow failed (server gone)") == 1


def test_tracking_can_be_off(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    tracker = Tracker(TrackingConfig(enabled=False), run, {})
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert read_metrics(run) and not list(tmp_path.rglob("*.db"))


def test_an_unusable_store_is_one_clear_line(tmp_path):
    config = TrackingConfig(uri="nonsense://host")
    with pytest.raises(WanmoeError, match="nonsense://host: .*tracking.enabled = false") as caught:
        Tracker(config, tmp_path, {})
    assert "\n" not in str(caught.value)
