"""The commands of docs/tracking.md, run as they stand but for their ports."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tomli_w
from mlflow import MlflowClient

from wanmoe.train.mlflow_store import QUICK
from wanmoe.train.sender import PAUSES, TRIES
from wanmoe.train.tracking import DIGEST_LENGTH, PARAM_LENGTH

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def shell(tmp_path):
    """Starts a block of the page; what still runs at the end is killed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", *QUICK)}
    ours |= {"PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    started: list[subprocess.Popen] = []

    def start(block: str) -> subprocess.Popen:
        log = (tmp_path / f"{len(started)}.log").open("w")
        words = ["bash", "-euo", "pipefail", "-c", block]
        started.append(
            subprocess.Popen(words, cwd=tmp_path, env=ours, stdout=log, stderr=log, start_new_session=True)
        )
        started[-1].log = Path(log.name)
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_commands_of_the_page(shell, tmp_path, config, launcher):
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    ports = {name: launcher.free_port() for name in ("5000", "5001")}
    ui, server, train = (re.sub("500[01]", lambda found: str(ports[found[0]]), block) for block in blocks)
    assert PAGE.count("5000") == 1 and "--host 127.0.0.1" in ui and "--host 127.0.0.1" in server
    config |= {"tracking": {"system_metrics_every": 0.1}, "launch": {"ranks": 1}}
    (tmp_path / "a.toml").write_text(tomli_w.dumps(config))
    (tmp_path / "runs").mkdir()

    deadline = time.monotonic() + 180
    for process, port in [(shell(server), ports["5001"]), (shell(ui), ports["5000"])]:
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, process.log.read_text()[-2000:]
            time.sleep(0.1)
    trained = shell(train)
    assert trained.wait(300) == 0, trained.log.read_text()[-3000:]
    client = MlflowClient(f"http://127.0.0.1:{ports['5001']}")
    (run,) = client.search_runs([client.get_experiment_by_name("wanmoe").experiment_id])
    assert run.info.status == "FINISHED" and "system/cpu_utilization_percentage" in run.data.metrics
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    lines = (tmp_path / "runs" / "served" / "metrics.jsonl").read_text().splitlines()
    assert steps == [line["step"] for line in map(json.loads, lines) if "train/loss" in line]


def test_the_figures_of_the_page_are_those_of_the_code():
    assert f"cut at {PARAM_LENGTH} characters" in PAGE and f"first {DIGEST_LENGTH} digits" in PAGE
    assert f"after {PAUSES[0]:g} s, {2 * PAUSES[0]:g} s, ... {PAUSES[1]:g} s" in PAGE
    assert f"fails {TRIES} times" in PAGE
    assert f"`MLFLOW_HTTP_REQUEST_MAX_RETRIES` is {QUICK['MLFLOW_HTTP_REQUEST_MAX_RETRIES']} and" in PAGE
    assert f"`MLFLOW_HTTP_REQUEST_TIMEOUT` {QUICK['MLFLOW_HTTP_REQUEST_TIMEOUT']} s" in PAGE


def test_the_installed_mlflow_has_the_app_and_the_settings_that_the_page_names():
    """The app itself needs a package that only servers want."""
    from mlflow import environment_variables

    assert "basic-auth" in {point.name for point in importlib.metadata.entry_points(group="mlflow.app")}
    extras = importlib.metadata.metadata("mlflow").get_all("Provides-Extra")
    assert "auth" in extras
    for name in set(re.findall(r"`(MLFLOW_\w+)", PAGE)):
        assert hasattr(environment_variables, name), name


def test_every_relative_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGE)
    assert links and [link for link in links if not (ROOT / "docs" / link).exists()] == []
