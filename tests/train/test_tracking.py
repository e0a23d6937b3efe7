"""Figures land in metrics.jsonl and in MLflow: here in a database, in test_tracking_server.py on a server."""

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from wanmoe.moe_lora import WanmoeError
from wanmoe.train.config import TrackingConfig
from wanmoe.train.data.shards import ShardIndex
from wanmoe.train.tracking import Tracker, read_metrics, sync

QUIET = {"system_metrics_every": 0}


def config(**more) -> TrackingConfig:
    return TrackingConfig(**QUIET | more)


def client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/mlflow.db")


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))


def until(condition, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_metrics_params_and_artefacts_reach_a_database_that_is_made_for_them(run):
    (run.parent / "mlflow.db").unlink()
    tracker = Tracker(config(), run, {"train.steps": 3, "long": "漢" * 7000, "none": None, "empty": ""})
    tracker.log(1, {"train/loss": 2.0})
    tracker.log(2, {"train/loss": 1.5, "val/loss_t0.5": 1.0})
    tracker.artifact(run / "metrics.jsonl")
    tracker.close()
    logged = client(run.parent).get_run(tracker.run_id)
    assert logged.info.run_name == "a" and logged.info.status == "FINISHED"
    assert logged.data.params == {"train.steps": "3", "long": "漢" * 6000, "none": "None", "empty": ""}
    assert history(client(run.parent), tracker.run_id, "train/loss") == [(1, 2.0), (2, 1.5)]
    files = client(run.parent).list_artifacts(tracker.run_id)
    assert [(file.path, file.file_size) for file in files] == [
        ("metrics.jsonl", (run / "metrics.jsonl").stat().st_size)
    ]
    assert read_metrics(run)[1] == {"step": 2, "train/loss": 1.5, "val/loss_t0.5": 1.0}


def test_a_run_says_where_it_comes_from(run, monkeypatch):
    words = ["/opt/bin/python3", "/opt/bin/wanmoe", "train", "--tracking.uri", "https://me:secret@host/a b"]
    monkeypatch.setattr(sys, "orig_argv", words)
    tracker = Tracker(config(), run, {"tracking.uri": "https://me:secret@host/mlflow"})
    tracker.close()
    logged = client(run.parent).get_run(tracker.run_id).data
    assert logged.tags["mlflow.source.name"] == (
        "python3 /opt/bin/wanmoe train --tracking.uri 'https://host/a b'"
    )
    assert logged.tags["mlflow.source.type"] == "LOCAL"
    root = Path(__file__).resolve().parents[2]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert logged.tags.get("mlflow.source.git.commit", "") == head.stdout.strip()
    assert logged.params == {"tracking.uri": "https://host/mlflow"}


def test_a_resume_goes_on_with_the_same_run_and_cuts_what_came_after_the_state(run):
    first = Tracker(config(), run, {"a": 1})
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
    first.close("KILLED")
    # Params of a run never change: what a resume has of them is not sent.
    again = Tracker(config(), run, {"a": 2}, start_step=2, run_id=first.run_id)
    again.log(3, {"train/loss": 30.0})
    again.close()
    assert again.run_id == first.run_id
    assert [line["train/loss"] for line in read_metrics(run)] == [1, 2, 30]
    assert history(client(run.parent), first.run_id, "train/loss") == [(1, 1), (2, 2), (3, 3), (3, 30)]
    logged = client(run.parent).get_run(first.run_id)
    assert logged.info.status == "FINISHED" and logged.data.params == {"a": "1"}
    assert not (run / "tracking" / "refused.jsonl").exists()


def test_a_fresh_start_in_the_same_folder_is_another_run(run):
    first = Tracker(config(), run, {})
    first.log(1, {"train/loss": 1.0})
    first.close()
    second = Tracker(config(), run, {})
    second.log(1, {"train/loss": 2.0})
    second.close()
    assert second.run_id != first.run_id
    assert history(client(run.parent), second.run_id, "train/loss") == [(1, 2.0)]


def test_a_run_of_an_earlier_version_that_has_no_spool_goes_on(run):
    first = Tracker(config(), run, {})
    first.close()
    shutil.rmtree(run / "tracking")
    again = Tracker(config(), run, {}, start_step=1, run_id=first.run_id)
    again.log(2, {"train/loss": 2.0})
    again.close()
    assert again.run_id == first.run_id
    assert history(client(run.parent), first.run_id, "train/loss") == [(2, 2.0)]


def test_a_run_that_the_store_does_not_know_is_begun_anew(run, database, capsys):
    first = Tracker(config(), run, {"a": 1})
    first.close()
    other = shutil.copy(database, run / "other.db")
    moved = config(uri=f"sqlite:///{other}")
    again = Tracker(moved, run, {"a": 1}, start_step=1, run_id=first.run_id)
    again.log(2, {"train/loss": 2.0})
    again.close()
    assert again.run_id != first.run_id
    assert MlflowClient(moved.uri).get_run(again.run_id).data.params == {"a": "1"}
    assert f"has no active run {first.run_id}; a new one is begun" in capsys.readouterr().err


def test_a_last_line_that_a_crash_cut_is_left_out_and_a_damaged_one_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra')
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tra\n{"step": 2, "train/loss": 1.0}\n')
    with pytest.raises(WanmoeError, match="metrics.jsonl:1: damaged"):
        read_metrics(tmp_path)


def test_figures_that_are_not_finite_are_left_out(run):
    tracker = Tracker(config(), run, {})
    tracker.log(1, {"train/loss": math.nan, "train/lr": 0.1, "val/loss": math.inf})
    tracker.close()
    assert read_metrics(run) == [{"step": 1, "train/lr": 0.1}]
    assert client(run.parent).get_run(tracker.run_id).data.metrics == {"train/lr": 0.1}


def test_the_host_is_measured_while_the_run_goes_on(run):
    began = time.monotonic()
    tracker = Tracker(TrackingConfig(system_metrics_every=0.05), run, {})
    name = "system/cpu_utilization_percentage"
    until(lambda: tracker.run_id and len(history(client(run.parent), tracker.run_id, name)) > 1)
    tracker.close()
    # The file of the run's own figures has none of them.
    assert read_metrics(run) == []
    seconds = [step for step, _ in history(client(run.parent), tracker.run_id, name)]
    assert min(seconds) >= 0 and max(seconds) <= time.monotonic() - began


def test_tracking_can_be_off(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    tracker = Tracker(TrackingConfig(enabled=False), run, {})
    tracker.log(1, {"train/loss": 1.0})
    tracker.artifact(run / "metrics.jsonl")
    tracker.close()
    assert tracker.run_id is None and read_metrics(run)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]


@pytest.mark.parametrize(
    "uri", ["nonsense://host", "file:///tmp/mlruns", "mysql://host/database", "sqlite+x:///a"]
)
def test_an_unusable_store_is_one_clear_line(tmp_path, uri):
    with pytest.raises(WanmoeError, match=f"{uri}: .*tracking.enabled = false".replace("+", ".")) as caught:
        Tracker(config(uri=uri), tmp_path, {})
    assert "\n" not in str(caught.value) and not (tmp_path / "tracking").exists()


def test_a_wrong_registered_model_is_a_wrong_config():
    with pytest.raises(ValueError, match="registered_model"):
        config(registered_model="a/b")


def test_what_arrived_is_not_doubled_when_it_is_sent_again(run, unreachable, shards, monkeypatch):
    """A process may die after the server took something and before that is written down."""
    weights = run / "adapter-high.safetensors"
    weights.write_bytes(b"1" * 100)
    gone = config(uri=unreachable, registered_model="surgery")
    tracker = Tracker(gone, run, {"a": 1}, say=lambda line: None)
    index = ShardIndex(shards)
    tracker.dataset(index.root, index.manifest, index.fingerprint)
    for step in range(5):
        tracker.log(step, {"train/loss": float(step)})
    tags = {"stage": "a", "noise_expert": "high", "base_sha256": "0" * 64}
    tracker.model(weights, "adapter-high", 5, tags)
    weights.unlink()
    weights.write_bytes(b"2" * 100)
    for _ in range(2):  # as a run does that is started again when it is complete
        tracker.model(weights, "adapter-high", 6, tags)
    tracker.close()
    spool, copy = run / "tracking", run / "copy"
    sqlite = f"sqlite:///{run.parent}/mlflow.db"
    lines = (spool / "spool.jsonl").read_text()
    (spool / "spool.jsonl").write_text(lines.replace(json.dumps(unreachable), json.dumps(sqlite)))
    shutil.copytree(spool, copy)
    assert sync(run) == 11
    shutil.rmtree(spool)
    shutil.copytree(copy, spool)
    assert sync(run) == 11 and sync(run) == 0

    logged = client(run.parent)
    (found,) = logged.search_runs(["1"])
    assert history(logged, found.info.run_id, "train/loss") == [(step, float(step)) for step in range(5)]
    (used,) = found.inputs.dataset_inputs
    assert used.dataset.digest == index.fingerprint[:36] and used.dataset.name == "clips"
    assert json.loads(used.dataset.source) == {"uri": str(shards)}
    assert json.loads(used.dataset.profile)["n_samples"] == {"train": 12, "val": 4}
    models = sorted(logged.search_logged_models(["1"]), key=lambda model: int(model.tags["step"]))
    assert [(m.name, m.tags["step"], str(m.status), m.source_run_id) for m in models] == [
        ("adapter-high", step, "READY", found.info.run_id) for step in ("5", "6")
    ]
    assert tags.items() <= models[0].tags.items()
    outputs = {
        (output.model_id, output.step) for output in logged.get_run(found.info.run_id).outputs.model_outputs
    }
    assert outputs == {(models[0].model_id, 5), (models[1].model_id, 6)}
    versions = sorted(
        logged.search_model_versions("name = 'surgery'"), key=lambda version: int(version.version)
    )
    assert [(str(v.version), v.tags["step"], v.run_id) for v in versions] == [
        (number, step, found.info.run_id) for number, step in (("1", "5"), ("2", "6"))
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite)
    for number, content in ((1, b"1"), (2, b"2")):
        folder = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/surgery/{number}")
        assert (Path(folder) / "adapter-high.safetensors").read_bytes() == content * 100


KILLED = """
import sys
from pathlib import Path
from wanmoe.train.config import TrackingConfig
from wanmoe.train.tracking import Tracker

run = Path(sys.argv[1])
tracker = Tracker(TrackingConfig(system_metrics_every=0), run, {"a": 1})
for line in sys.stdin:
    first, last = map(int, line.split())
    for step in range(first, last):
        tracker.log(step, {"train/loss": float(step)})
        if step % 100 == 0:
            (run / f"{step}.txt").write_text(str(step))
            tracker.artifact(run / f"{step}.txt")
    print(tracker.run_id, flush=True)
"""


@pytest.fixture
def training(run):
    """A process that logs the steps that it is asked for, and answers with the id of its run."""
    words = [sys.executable, "-c", KILLED, str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as process:

        def log(first: int, last: int) -> str:
            process.stdin.write(f"{first} {last}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        process.log = log
        yield process
        process.kill()


def test_what_a_killed_process_has_not_sent_the_next_one_sends(run, training):
    training.log(0, 200)
    until(lambda: training.log(0, 0) != "None")
    run_id = training.log(0, 0)
    lock = sqlite3.connect(run.parent / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    training.log(200, 500)
    training.kill()
    training.wait()
    lock.execute("ROLLBACK")
    lock.close()
    assert len(history(client(run.parent), run_id, "train/loss")) < 500
    # No id: the state that is resumed may be older than the first answer of the store.
    tracker = Tracker(config(), run, {"a": 1}, start_step=499)
    tracker.log(500, {"train/loss": 500.0})
    tracker.close()
    assert tracker.run_id == run_id and len(client(run.parent).search_runs(["1"])) == 1
    steps = history(client(run.parent), run_id, "train/loss")
    assert steps == [(step, float(step)) for step in range(501)]
    files = {file.path for file in client(run.parent).list_artifacts(run_id)}
    assert files == {f"{step}.txt" for step in range(0, 500, 100)}


def test_a_run_that_was_killed_and_not_resumed_is_not_shown_as_running(run, training):
    until(lambda: training.log(0, 0) != "None")
    run_id = training.log(0, 0)
    training.kill()
    training.wait()
    assert client(run.parent).get_run(run_id).info.status == "RUNNING"
    with pytest.raises(WanmoeError, match="no run folder that was tracked"):
        sync(run.parent)
    assert sync(run) > 0
    ended = client(run.parent).get_run(run_id).info
    assert ended.status == "KILLED" and ended.start_time < ended.end_time <= time.time() * 1000
    assert sync(run) == 0


def test_a_live_run_is_not_sent_by_another_process(run):
    tracker = Tracker(config(), run, {})
    tracker.log(1, {"train/loss": 1.0})
    code = f"from pathlib import Path; from wanmoe.train.tracking import sync; sync(Path({str(run)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "still logs or sends from here" in other.stderr.splitlines()[-1]
    for second in (lambda: sync(run), lambda: Tracker(config(), run, {})):
        with pytest.raises(WanmoeError, match="this process still logs or sends from here"):
            second()
    assert len(read_metrics(run)) == 1
    tracker.close()
    assert sync(run) == 0


def test_a_sync_whose_store_is_away_says_so(run, unreachable):
    Tracker(config(uri=unreachable), run, {}, say=lambda line: None).close()
    with pytest.raises(WanmoeError, match="Connection refused; 2 operations stay in") as caught:
        sync(run)
    assert "\n" not in str(caught.value)


def test_odd_names_arrive_under_names_that_mlflow_takes(run):
    names = [
        "val/loss/Hook/Electrocautery",
        "钩/loss",
        "a/../b",
        "../x",
        "a//b",
        "new\nline",
        "a(b)",
        "a[b]",
        "n" * 300,
        "",
    ]
    tracker = Tracker(config(), run, {name: "1" for name in names})
    tracker.log(1, {name: float(n) for n, name in enumerate(names)})
    tracker.close()
    logged = client(run.parent).get_run(tracker.run_id).data
    by_value = {int(value): name for name, value in logged.metrics.items()}
    assert len(by_value) == len(names) == len(logged.params)
    assert by_value[0] == names[0] and by_value[1] == names[1]
    assert by_value[6].startswith("a_b_-") and by_value[7].startswith("a_b_-") and by_value[6] != by_value[7]
    assert list(read_metrics(run)[0])[1:] == names


def test_a_file_is_logged_as_it_was(run, unreachable):
    tracker = Tracker(config(uri=unreachable), run, {}, say=lambda line: None)
    (run / "config.toml").write_text("old")
    tracker.artifact(run / "config.toml")
    (run / "config.toml").write_text("new")
    (kept,) = (run / "tracking" / "files").rglob("config.toml")
    assert kept.read_text() == "old"
    tracker.close()


def test_a_file_that_is_missing_is_said_and_ends_nothing(run):
    said: list[str] = []
    tracker = Tracker(config(), run, {}, say=said.append)
    tracker.artifact(run / "none.png")
    tracker.close()
    assert len(said) == 1 and "none.png: could not be kept" in said[0]
    assert client(run.parent).get_run(tracker.run_id).info.status == "FINISHED"


def test_the_users_settings_of_the_client_stay(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    Tracker(config(uri="http://127.0.0.1:9", close_wait=0), run, {}, say=lambda line: None).close()
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (7, 0)
