"""MLflow may refuse, fail, hang, be locked or be away: a run goes on, and what it logged arrives."""

import json
import socket
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from wanmoe.train import sender
from wanmoe.train.config import TrackingConfig
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


def test_a_store_that_is_away_is_said_once_and_nothing_is_lost(run, unreachable):
    said: list[str] = []
    tracker = Tracker(config(uri=unreachable), run, {"a": 1}, say=said.append)
    for step in range(50):
        tracker.log(step, {"train/loss": float(step)})
    tracker.artifact(run / "metrics.jsonl", "files")
    until(lambda: said)
    assert tracker.run_id is None
    tracker.close()
    away, left = said
    assert away.startswith(
        f"MLflow at {unreachable}: Connection refused; the run goes on, what it logs waits in"
    )
    # The run, 50 lines, the file and the status.
    assert "lacks 53 operations" in left and f"wanmoe track-sync --run {run}" in left
    assert len(read_metrics(run)) == 50
    # The address is that of the next start: another one gets everything.
    again = Tracker(config(), run, {"a": 1}, start_step=49, say=said.append)
    again.close()
    steps = history(client(run.parent), again.run_id, "train/loss")
    assert steps == [(step, float(step)) for step in range(50)]
    assert [file.path for file in client(run.parent).list_artifacts(again.run_id, "files")] == [
        "files/metrics.jsonl"
    ]
    assert len(client(run.parent).search_runs(["1"])) == 1 and len(said) == 2


def test_a_store_that_never_answers_holds_up_nothing(run):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = Tracker(config(uri=uri, close_wait=0.1), run, {}, say=lambda line: None)
        asked, _ = silent.accept()
        with asked:
            assert asked.recv(100)
            for step in range(20):
                tracker.log(step, {"train/loss": 1.0})
            tracker.close()
            # The first call still waits for its answer.
            asked.setblocking(False)
            with pytest.raises(BlockingIOError):
                while asked.recv(4096):
                    pass
    assert len(read_metrics(run)) == 20


def test_a_locked_database_holds_up_nothing(run):
    said: list[str] = []
    first = Tracker(config(), run, {})
    first.close()
    lock = sqlite3.connect(run.parent / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    tracker = Tracker(config(close_wait=0.1), run, {}, start_step=1, say=said.append)
    for step in range(2, 20):
        tracker.log(step, {"train/loss": 1.0})
    assert len(read_metrics(run)) == 18
    lock.execute("ROLLBACK")
    until(lambda: len(history(client(run.parent), first.run_id, "train/loss")) == 18)
    tracker.close()


def test_what_the_store_refuses_is_told_and_set_aside_and_the_rest_goes_on(run, monkeypatch, capsys):
    """Names are cleaned before, so a store that takes fewer names than today's stands in for a refusal."""
    tracker = Tracker(config(), run, {"ok": 1, "bad": 2})
    taken = MlflowClient.log_batch

    def picky(self, run_id, metrics=(), params=(), **more):
        if any(item.key == "bad" for item in [*metrics, *params]):
            raise MlflowException("bad is bad\nlong trace", error_code=1000)
        taken(self, run_id, metrics, params, **more)

    assert MlflowException("x", error_code=1000).error_code == "INVALID_PARAMETER_VALUE"
    monkeypatch.setattr(MlflowClient, "log_batch", picky)
    for step in range(10):
        tracker.log(step, {"train/loss": float(step), "bad": 1.0})
    tracker.close()
    logged = client(run.parent).get_run(tracker.run_id)
    assert logged.info.status == "FINISHED" and set(logged.data.metrics) == {"train/loss"}
    assert len(history(client(run.parent), tracker.run_id, "train/loss")) == 10
    said = capsys.readouterr().err.splitlines()
    assert len(said) == sender.TOLD and "of further ones only that file tells" in said[-1]
    assert "refused metric 'bad' of step" in said[-1] and "(bad is bad)" in said[-1]
    refused = [json.loads(line) for line in (run / "tracking" / "refused.jsonl").read_text().splitlines()]
    assert {fact["reason"] for fact in refused} == {"bad is bad"}
    assert len([fact for fact in refused if fact["op"].get("values") == {"bad": 1.0}]) == 10
    monkeypatch.setattr(MlflowClient, "log_batch", taken)
    assert sync(run) == len(refused)
    assert len(history(client(run.parent), tracker.run_id, "bad")) == 10


def test_a_file_that_fails_for_ever_does_not_hold_up_what_follows(run, monkeypatch):
    """As where the store of artefacts is away, or was never set up, while the figures arrive."""
    monkeypatch.setattr(sender, "PAUSES", (0.001, 0.001))
    said: list[str] = []
    tracker = Tracker(config(), run, {}, say=said.append)

    def fail(*arguments):
        raise RuntimeError("no credentials")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", fail)
        (run / "a.txt").write_text("a")
        tracker.artifact(run / "a.txt")
        tracker.log(1, {"train/loss": 1.0})
        until(lambda: any("back after" in line for line in said))
        (run / "a.txt").unlink()
    tracker.close()
    assert (
        "no credentials; the run goes on" in said[0]
        and "refused artifact 'a.txt' (no credentials)" in said[1]
    )
    assert history(client(run.parent), tracker.run_id, "train/loss") == [(1, 1.0)]
    assert client(run.parent).list_artifacts(tracker.run_id) == []
    assert sync(run) == 1
    (sent,) = client(run.parent).list_artifacts(tracker.run_id)
    assert (sent.path, sent.file_size) == ("a.txt", 1)
    assert list((run / "tracking" / "files").iterdir()) == []


def test_a_run_that_is_deleted_meanwhile_waits_until_it_is_restored(run, monkeypatch):
    monkeypatch.setattr(sender, "PAUSES", (0.01, 0.01))
    said: list[str] = []
    tracker = Tracker(config(), run, {}, say=said.append)
    until(lambda: tracker.run_id)
    client(run.parent).delete_run(tracker.run_id)
    tracker.log(1, {"train/loss": 1.0})
    until(lambda: said)
    assert f"run {tracker.run_id} is deleted there; restore it" in said[0]
    client(run.parent).restore_run(tracker.run_id)
    until(lambda: len(said) == 2)
    tracker.close()
    assert history(client(run.parent), tracker.run_id, "train/loss") == [(1, 1.0)]


def test_a_server_that_wants_another_password_refuses_nothing_for_good(run, monkeypatch):
    """The server is a stand-in that answers everything with 401."""
    asked: list[str | None] = []

    class Guard(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as guard:
        threading.Thread(target=guard.serve_forever, daemon=True).start()
        said: list[str] = []
        uri = f"http://127.0.0.1:{guard.server_address[1]}"
        tracker = Tracker(config(uri=uri), run, {}, say=said.append)
        tracker.log(1, {"train/loss": 1.0})
        tracker.close()
        guard.shutdown()
    assert "401" in said[0] and "the run goes on" in said[0] and "lacks 3 operations" in said[1]
    assert {word.split()[0] for word in asked} == {"Basic"}
    assert not (run / "tracking" / "refused.jsonl").exists() and "secret" not in "".join(said)
