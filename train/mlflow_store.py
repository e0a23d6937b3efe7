"""What is logged as calls of MLflow's client. Every call may be made twice: what arrived is not doubled.

MLflow drops a metric whose key, step, time and value it has, and a parameter or a data set that it has. A
run, a logged model and a version of a registered model carry the key of their operation in the tag
`wanmoe.key`, by which they are found before they would be made again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from ..moe_lora import WanmoeError
from .spool import Operation

KEY = "wanmoe.key"
DATABASES = ("sqlite", "mysql", "postgresql", "mssql")
QUICK = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client where the user has none: it would try again for minutes, which the sender does
anyway; its lines on stdout would stand between those of the run."""

Metric = tuple[str, float, int, int]
"""Name, value, time in ms since the epoch, step."""


class MlflowStore:
    """A tracking server or database by its URI; each method raises what MLflow raises.

    Raises WanmoeError for a URI that MLflow does not know. Nothing is connected before the first call.
    """

    def __init__(self, uri: str) -> None:
        path = uri.removeprefix("sqlite:///")
        self._file = None if path == uri else Path(path).absolute()
        self.uri = uri if self._file is None else f"sqlite:///{self._file}"
        self.name = without_password(self.uri)
        for name, value in QUICK.items():
            os.environ.setdefault(name, value)
        # It logs a traceback whenever a database is locked, and tells of every table it makes.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self._opened: Any = None
        self._check()

    def _check(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy import create_engine
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self._database:
                create_engine(self.uri).dispose()
            else:
                MlflowClient(self.uri)
        except (MlflowException, SQLAlchemyError, ImportError) as error:
            raise WanmoeError(
                f"MLflow at {self.name}: {reason(error)}; check tracking.uri, or set tracking.enabled = false"
            ) from error

    @property
    def _database(self) -> bool:
        return re.split("[:+]", self.uri)[0] in DATABASES

    @property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        if self._opened is None:
            if self._file is not None and not self._file.exists():
                _make_database(self._file)
            registry = os.environ.get("MLFLOW_REGISTRY_URI", self.uri)
            self._opened = MlflowClient(self.uri, registry)
        return self._opened

    def begin(self, op: Operation) -> tuple[str, bool]:
        """Makes the run of an operation, or goes on with it; (its id, whether it is new to the caller).

        A run that the server does not know is made anew: the server is another one, or has lost it.
        """
        known = op.get("id")
        if known is not None and self.state(known) == "active":
            self._client.update_run(known, status="RUNNING")
            return str(known), False
        experiment = self._experiment(op["experiment"], op["artifacts"])
        tags = op["tags"] | {KEY: op["run"]}
        made = self._client.search_runs([experiment], f"tags.`{KEY}` = '{op['run']}'")
        run = made[0] if made else self._client.create_run(experiment, op["start"], tags, op["name"])
        return str(run.info.run_id), True

    def _experiment(self, name: str, artifacts: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            # A server knows where it puts artefacts; a database does not.
            place = artifacts if self._database else None
            return str(self._client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return str(self._client.get_experiment_by_name(name).experiment_id)

    def state(self, run_id: str) -> Literal["active", "deleted", "unknown"]:
        """What the server says of a run; raises where it does not answer."""
        from mlflow.exceptions import MlflowException

        try:
            stage = self._client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return "unknown"
        return "active" if stage == "active" else "deleted"

    def touch(self, run_id: str) -> None:
        """Writes what a run holds already: raises where MLflow takes nothing at all."""
        self._client.set_tag(run_id, KEY, self._client.get_run(run_id).data.tags.get(KEY, ""))

    def params(self, run_id: str, params: Sequence[tuple[str, str]]) -> None:
        """Settings of a run, which never change."""
        from mlflow.entities import Param

        self._client.log_batch(run_id, params=[Param(name, value) for name, value in params])

    def metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Figures of a run, at most 1000."""
        from mlflow import entities

        self._client.log_batch(run_id, metrics=[entities.Metric(*metric) for metric in metrics])

    def artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """A file, which replaces one of the same name."""
        self._client.log_artifact(run_id, str(path), folder)

    def dataset(self, run_id: str, op: Operation) -> None:
        """The data as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        facts = (op["name"], op["digest"], op["source_type"], json.dumps({"uri": op["source"]}))
        dataset = Dataset(*facts, profile=json.dumps(op["profile"]))
        self._client.log_inputs(
            run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        )

    def model(self, run_id: str, op: Operation, path: Path) -> None:
        """A logged model that holds one file, and a version of a registered model where one is named."""
        from mlflow.entities import LoggedModelOutput

        run = self._client.get_run(run_id)
        wanted = f"tags.`{KEY}` = '{op['key']}'"
        made = self._client.search_logged_models([run.info.experiment_id], wanted)
        tags = op["tags"] | {KEY: op["key"], "step": str(op["step"])}
        kind = {"source_run_id": run_id, "tags": tags, "model_type": "wanmoe-adapter"}
        model = (
            made[0]
            if made
            else self._client.create_logged_model(run.info.experiment_id, name=op["name"], **kind)
        )
        self._client.log_model_artifact(model.model_id, str(path))
        self._client.finalize_logged_model(model.model_id, "READY")
        outputs = run.outputs.model_outputs if run.outputs is not None else []
        if model.model_id not in {output.model_id for output in outputs}:
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, op["step"])])
        if op["registered"] is not None:
            self._register(op["registered"], run_id, model, op["key"], tags)

    def _register(self, name: str, run_id: str, model: Any, key: str, tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if not self._client.search_model_versions(f"name = '{name}' and tag.`{KEY}` = '{key}'"):
            # A database resolves models:/ through MLflow's global address, which is not ours.
            source = model.artifact_location if self._database else f"models:/{model.model_id}"
            self._client.create_model_version(
                name, source, run_id, tags=tags, await_creation_for=0, model_id=model.model_id
            )

    def end(self, run_id: str, status: str, time: int) -> None:
        """The status of a run: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status, time)


def _make_database(path: Path) -> None:
    """Makes an empty database, whole or not at all.

    MLflow makes its tables one by one, and never goes on with a file in which that was cut short.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.partial*"):  # of processes that were killed here
        if time.time() - old.stat().st_mtime > 600:
            old.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        store = SqlAlchemyStore(f"sqlite:///{partial}", (path.parent / "mlartifacts").as_uri())
        store.engine.dispose()
        try:
            os.link(partial, path)
        except OSError:  # a file system without links, or another run that was faster
            if not path.exists():
                os.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def answer(error: Exception) -> int | None:
    """HTTP status of what a server answered, None where nothing says that it did.

    500 is None too: MLflow's client uses it for a server that is not there.
    """
    from mlflow.exceptions import MlflowException

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    return None if status == 500 else status


def reason(error: Exception) -> str:
    """One short line on why a call failed: what the system said, where it is at the bottom of it."""
    bottom: BaseException = error
    while (below := bottom.__cause__ or bottom.__context__) is not None:
        bottom = below
    told = (bottom.strerror or str(bottom)) if isinstance(bottom, OSError) else str(error)
    told = re.sub(r"^API request to \S+ failed with exception ", "", told)
    lines = told.strip().splitlines() or [type(error).__name__]
    return without_password(lines[0][:300])


_SECRETS = "pass|token|secret|sig|key|credential|auth"


def without_password(text: str) -> str:
    """Text without the user and password of every URL, and without what a query gives as a secret.

    A password may hold `@` and `/` as it stands: what looks like a user ends at the last `@` of its word.
    """
    text = re.sub(rf"([?&][^\s=&]*(?:{_SECRETS})[^\s=&]*=)[^\s&'\"]+", r"\1***", text, flags=re.IGNORECASE)
    text = re.sub(r"://[^\s/:@]*:\S*@", "://", text)
    return re.sub(r"://[^\s/@]+@", "://", text)


def clean_name(name: str) -> str:
    r"""A name as MLflow takes it: `[/\w.\- :]` only, no part of a path empty or of dots, at most 250 long.

    One that has to be changed gets four hex digits of its hash, so that two never become one.
    """
    parts = [re.sub(r"[^\w.\- :]", "_", part) for part in name.split("/")]
    cleaned = "/".join("_" * max(len(part), 1) if part in ("", ".", "..") else part for part in parts)
    if cleaned == name and len(name) <= 250:
        return name
    return f"{cleaned[:245]}-{sha256(name.encode(errors='replace')).hexdigest()[:4]}"
