"""What leaves this machine holds no passwords."""

import json
from pathlib import Path

import pytest

from wanmoe.train.config import TrackingConfig
from wanmoe.train.mlflow_store import without_password
from wanmoe.train.tracking import Tracker


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("http://me:hidden@host:5000/x", "http://host:5000/x"),
        ("http://me:hid@den@host/x", "http://host/x"),
        ("http://me:hid/den@host:80/x", "http://host:80/x"),
        ("postgresql+psycopg2://me:hid@d/en@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("https://hidden@host/x", "https://host/x"),
        (
            "train --tracking.uri 'http://me:hidden@h/x' --data.shards https://h/s?X-Amz-Signature=hidden&part=2",
            "train --tracking.uri 'http://h/x' --data.shards https://h/s?X-Amz-Signature=***&part=2",
        ),
        ("mysql://db/x?user=me&password=hidden", "mysql://db/x?user=me&password=***"),
        ("https://h/s?SAS_TOKEN=hidden", "https://h/s?SAS_TOKEN=***"),
    ],
)
def test_passwords_are_left_out(text, left):
    assert without_password(text) == left


@pytest.mark.parametrize(
    "text",
    ["http://host:5000/x", "s3://bucket/a@b/c", "a@b.c", "file:///home/a@b/x", "https://h/s?part=2&v=1"],
)
def test_what_is_no_password_stays(text):
    assert without_password(text) == text


def test_nothing_that_goes_to_mlflow_holds_one(tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    secret = "hid@d/en"
    (run / "config.toml").write_text(f'[tracking]\nuri = "http://me:{secret}@host"\n')
    params = {"tracking.uri": f"http://me:{secret}@host", "data.shards": f"https://h/s?token={secret}"}
    tracker = Tracker(TrackingConfig(close_wait=60, system_metrics_every=0), run, params)
    tracker.artifact(run / "config.toml")
    manifest = {"n_samples": {"train": 1}}
    tracker.dataset(f"https://me:{secret}@h/shards?token={secret}", manifest, "f" * 64)
    tracker.close()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    logged = client.get_run(tracker.run_id)
    assert logged.data.params["tracking.uri"] == "http://host"
    (used,) = logged.inputs.dataset_inputs
    assert used.dataset.name == "shards"
    everything = json.dumps(logged.to_dictionary(), default=lambda thing: vars(thing))
    assert secret not in everything and "hid" not in everything
    config = client.download_artifacts(tracker.run_id, "config.toml", str(tmp_path))
    assert Path(config).read_text() == '[tracking]\nuri = "http://host"\n'
