"""What a run logs is on a real MLflow server afterwards, whatever happened to the server meanwhile."""

import threading
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from wanmoe.train import sender
from wanmoe.train.config import TrackingConfig
from wanmoe.train.tracking import Tracker, read_metrics, sync


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(sender, "PAUSES", (0.05, 0.2))
    monkeypatch.setattr(sender, "LINGER", 0.05)


def until(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Trained:
    """A run of made-up figures: two a step, and a file every tenth."""

    def __init__(self, server, folder, **more):
        self.said: list[str] = []
        self.folder, self.server = folder, server
        folder.mkdir(exist_ok=True)
        self.config = TrackingConfig(uri=server.uri, system_metrics_every=0, experiment=folder.name, **more)
        self.tracker = Tracker(self.config, folder, {"train.steps": 90}, say=self.said.append)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.tracker.log(step, {"train/loss": step / 7, "train/lr": step / 11})
            if step % 10 == 0:
                (self.folder / f"picture-{step}.png").write_text(str(step))
                self.tracker.artifact(self.folder / f"picture-{step}.png", "pictures")

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.server.uri)

    def arrived(self, name: str) -> list[tuple[int, float]]:
        if self.tracker.run_id is None:
            return []
        found = self.client.get_metric_history(self.tracker.run_id, name)
        return sorted((m.step, m.value) for m in found)

    def check(self, steps: int, status: str = "FINISHED") -> None:
        """Exactly these figures and files, once, in one run."""
        assert self.arrived("train/loss") == [(step, step / 7) for step in range(steps)]
        assert self.arrived("train/lr") == [(step, step / 11) for step in range(steps)]
        assert [line["step"] for line in read_metrics(self.folder)] == list(range(steps))
        experiment = self.client.get_experiment_by_name(self.folder.name)
        (run,) = self.client.search_runs([experiment.experiment_id])
        assert run.info.run_id == self.tracker.run_id and run.info.status == status
        assert run.data.params == {"train.steps": "90"}
        files = {
            file.path: file.file_size for file in self.client.list_artifacts(run.info.run_id, "pictures")
        }
        assert files == {f"pictures/picture-{s}.png": len(str(s)) for s in range(0, steps, 10)}


def test_a_server_that_comes_late_is_killed_and_comes_back_has_everything(mlflow_server, tmp_path):
    mlflow_server.kill()
    run = Trained(mlflow_server, tmp_path / "late")
    run.steps(0, 30)
    until(lambda: run.said)
    assert run.tracker.run_id is None
    mlflow_server.start()
    until(lambda: run.arrived("train/loss"))

    # It dies while the run logs.
    killer = threading.Thread(target=mlflow_server.kill)
    killer.start()
    run.steps(30, 60)
    killer.join()
    run.steps(60, 80)
    until(lambda: len(run.said) == 3)
    mlflow_server.launch()
    run.steps(80, 90)
    until(lambda: len(run.said) == 4)
    run.tracker.close()
    run.check(90)
    assert ["the run goes on" in line for line in run.said] == [True, False] * 2
    assert ["back after" in line for line in run.said] == [False, True] * 2
    # All of it is gone from the folder.
    assert (run.folder / "tracking" / "spool.jsonl").read_text() == ""
    assert list((run.folder / "tracking" / "files").iterdir()) == []


def test_a_run_that_ends_while_the_server_is_away_is_completed_by_a_sync(mlflow_server, tmp_path):
    mlflow_server.start()
    run = Trained(mlflow_server, tmp_path / "ends")
    run.steps(0, 20)
    until(lambda: run.tracker.run_id)
    mlflow_server.kill()
    run.steps(20, 40)
    run.tracker.close("KILLED")
    assert "operations of this run" in run.said[-1]
    mlflow_server.start()
    assert sync(run.folder) > 0
    run.check(40, "KILLED")


def test_a_model_is_logged_and_registered_on_a_server(mlflow_server, tmp_path, monkeypatch):
    mlflow_server.start()
    run = Trained(mlflow_server, tmp_path / "model", registered_model="surgery")
    (tmp_path / "adapter.safetensors").write_bytes(b"weights")
    run.tracker.model(tmp_path / "adapter.safetensors", "adapter", 90, {"stage": "b", "noise_expert": "both"})
    run.tracker.close()
    (version,) = run.client.search_model_versions("name = 'surgery'")
    assert version.run_id == run.tracker.run_id and version.tags["stage"] == "b"
    model = run.client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.name == "adapter" and model.tags["step"] == "90"
    (output,) = run.client.get_run(run.tracker.run_id).outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 90)
    (file,) = run.client.list_logged_model_artifacts(model.model_id)
    assert (file.path, file.file_size) == ("adapter.safetensors", 7)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    folder = mlflow.artifacts.download_artifacts("models:/surgery/1")
    assert (Path(folder) / "adapter.safetensors").read_bytes() == b"weights"


def test_the_server_takes_what_the_tracker_makes_of_it(mlflow_server, tmp_path):
    mlflow_server.start()
    (tmp_path / "odd").mkdir()
    said: list[str] = []
    config = TrackingConfig(uri=mlflow_server.uri, system_metrics_every=0)
    params = {f"key {n}": "漢" * 7000 for n in range(120)} | {"a(b)/../c\n": "x", "钩" * 300: "y"}
    tracker = Tracker(config, tmp_path / "odd", params, say=said.append)
    tracker.log(1, {f"{n}/" + "漢" * 300: float(n) for n in range(600)} | {"../x": 1.0})
    tracker.close()
    logged = MlflowClient(mlflow_server.uri).get_run(tracker.run_id)
    assert said == [] and logged.info.status == "FINISHED"
    assert len(logged.data.params) == 122 and len(logged.data.metrics) == 601
    assert {len(value) for key, value in logged.data.params.items() if key.startswith("key")} == {6000}
