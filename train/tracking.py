"""Where figures go: `metrics.jsonl` in the run folder, and MLflow."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..moe_lora import WanmoeError
from .config import TrackingConfig


class Tracker:
    """Writes metrics of one run to `metrics.jsonl` and to MLflow; used on rank 0 alone.

    Args:
        run: run folder; its name is the MLflow run's unless the config says otherwise.
        params: flat settings, logged once.
        start_step: step that the run (re)starts from; later lines of an earlier attempt are cut off.
        run_id: MLflow run to go on with.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run: Path,
        params: Mapping[str, Any],
        start_step: int = 0,
        run_id: str | None = None,
    ) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] <= start_step] if start_step else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._client: Any = None
        self.run_id = run_id
        if config.enabled:
            self._start(config, run, params)

    def _start(self, config: TrackingConfig, run: Path, params: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        uri = config.uri or f"sqlite:///{(run.parent / 'mlflow.db').resolve()}"
        try:
            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name(config.experiment)
            if experiment is None:
                location = (
                    (run.parent / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite") else None
                )
                experiment_id = client.create_experiment(config.experiment, artifact_location=location)
            else:
                experiment_id = experiment.experiment_id
            if self.run_id is None:
                created = client.create_run(experiment_id, run_name=config.name or run.name)
                self.run_id = created.info.run_id
                for key, value in params.items():
                    client.log_param(self.run_id, key, str(value)[:6000])
            else:
                client.update_run(self.run_id, status="RUNNING")
        except MlflowException as error:
            raise WanmoeError(
                f"MLflow at {uri}: {str(error).splitlines()[0]}; check tracking.uri, or set "
                "tracking.enabled = false"
            ) from error
        self._client = client

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics for one step."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._client is not None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
            self._client.log_batch(self.run_id, metrics=metrics)

    def artifact(self, path: Path) -> None:
        """Copies a file to the MLflow run."""
        if self._client is not None:
            self._client.log_artifact(self.run_id, str(path))

    def close(self, status: str = "FINISHED") -> None:
        if self._client is not None:
            self._client.set_terminated(self.run_id, status=status)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    return _lines(run / "metrics.jsonl")


def _lines(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
