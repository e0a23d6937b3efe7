"""Where figures go: `metrics.jsonl` in the run folder, and MLflow."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..moe_lora import WanmoeError
from ..moe_lora.files import write_atomic
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
        write_atomic(self.path, lambda path: _write_lines(path, kept))
        self._client: Any = None
        self.run_id = run_id
        if config.enabled:
            self._start(config, run, params)

    def _start(self, config: TrackingConfig, run: Path, params: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        # Its notes about making tables would stand between the lines of the run.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
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
                logged = [Param(key, str(value)[:6000]) for key, value in params.items()]
                client.log_batch(self.run_id, params=logged)
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
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise WanmoeError(f"{self.path}: could not be written ({error.strerror})") from error
        if self._client is not None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
            self._try(lambda client: client.log_batch(self.run_id, metrics=metrics))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copies a file to the MLflow run, into a folder of its artifacts."""
        self._try(lambda client: client.log_artifact(self.run_id, str(path), folder))

    def close(self, status: str = "FINISHED") -> None:
        self._try(lambda client: client.set_terminated(self.run_id, status=status))

    def _try(self, action: Callable[[Any], Any]) -> None:
        """A tracker that fails on the way must not end the run: said once, then the file alone goes on."""
        if self._client is None:
            return
        from mlflow.exceptions import MlflowException

        try:
            action(self._client)
        except (MlflowException, OSError) as error:
            self._client = None
            first = str(error).splitlines()[0]
            sys.stderr.write(f"MLflow failed ({first}); metrics go on in {self.path} alone\n")


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    return _lines(run / "metrics.jsonl")


def _lines(path: Path) -> list[dict[str, float]]:
    """The whole lines of a metrics file; a last one that a crash cut short is left out."""
    if not path.exists():
        return []
    lines: list[dict[str, float]] = []
    texts = path.read_text().splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise WanmoeError(f"{path}:{number}: damaged ({error}); move the file away") from error
    return lines


def _write_lines(path: Path, lines: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
            )
    return flat
