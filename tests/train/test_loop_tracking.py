"""Two ranks train against a real MLflow server that dies on the way and comes back: nothing is missing."""

import time

from mlflow import MlflowClient

from wanmoe.train.tracking import read_metrics

# Each step asks for the server's fate first: what happens is the same however fast the machine is.
PACED = """
from pathlib import Path
import time
step = trainer.train_step
def paced(side):
    wanted = {4: "killed", 12: "restarted"}.get(trainer.step)
    if wanted and trainer.rank == 0:
        Path(FOLDER, "at-%d" % trainer.step).touch()
        while not Path(FOLDER, wanted).exists():
            time.sleep(0.02)
    return step(side)
trainer.train_step = paced
trainer.fit()
"""


def wait_for(path, processes):
    until = time.monotonic() + 180
    while not path.exists():
        assert all(process.is_alive() for process in processes), processes[0].log.read_text()[-3000:]
        assert time.monotonic() < until
        processes[0].join(timeout=0.05)


def test_a_server_that_is_killed_and_started_again_has_every_step(ranks, config, tmp_path, mlflow_server):
    mlflow_server.start()
    config["tracking"] = {
        "enabled": True,
        "uri": mlflow_server.uri,
        "registered_model": "surgery",
        "close_wait": 120,
        "system_metrics_every": 1,
    }
    config["train"] |= {"steps": 20, "global_batch": 2, "save_every": 5}
    started = ranks.start(config, 2, code=PACED.replace("FOLDER", repr(str(tmp_path))))
    wait_for(tmp_path / "at-4", started)
    mlflow_server.kill()
    (tmp_path / "killed").touch()
    wait_for(tmp_path / "at-12", started)  # eight steps without it
    mlflow_server.start()
    (tmp_path / "restarted").touch()
    codes, text = ranks.join(started)
    assert codes == [0, 0], text[-3000:]
    client = MlflowClient(mlflow_server.uri, registry_uri=mlflow_server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("wanmoe").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["world_size"] == "2"
    for key in ("train/loss", "train/lr", "val/loss"):
        sent = {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)}
        assert sent == {(line["step"], line[key]) for line in read_metrics(tmp_path / "run") if key in line}
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 20
    assert client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    assert [data.dataset.digest for data in run.inputs.dataset_inputs]
    (version,) = client.search_model_versions("name='surgery'")
    assert version.run_id == run.info.run_id
    assert text.count("MLflow at") >= 2  # gone, and back
