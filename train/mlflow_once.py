"""A run of MLflow that is written at once, when its figures are known: of evaluations and ablations."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..moe_lora.errors import WanmoeError
from .mlflow_store import MlflowStore, clean_name, reason
from .source import source_tags

_PARAM_LENGTH = 6000
_BATCH = 90  # parameters of a call; MLflow takes 100


def record(
    uri: str,
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    folder: Path,
) -> str:
    """Writes a finished run; returns its id.

    Args:
        parent: id of the run that it is shown under.
        folder: where a database keeps artefacts: `mlartifacts` in it.

    Raises WanmoeError where MLflow is not there or takes nothing: unlike a training run, this one is not
    kept for later, but its figures are in files already.
    """
    from mlflow.exceptions import MlflowException

    store, began = MlflowStore(uri), int(time.time() * 1000)
    op = {
        "run": secrets.token_hex(8),
        "start": began,
        "experiment": experiment,
        "artifacts": (folder.resolve() / "mlartifacts").as_uri(),
        "name": name,
        "tags": source_tags() | dict(tags or {}) | ({"mlflow.parentRunId": parent} if parent else {}),
    }
    try:
        run, _ = store.begin(op)
        pairs = [(clean_name(key), str(value)[:_PARAM_LENGTH]) for key, value in params.items()]
        for start in range(0, len(pairs), _BATCH):
            store.params(run, pairs[start : start + _BATCH])
        now = int(time.time() * 1000)
        rows = [(clean_name(key), float(value), now, 0) for key, value in metrics.items()]
        for start in range(0, len(rows), 900):
            store.metrics(run, rows[start : start + 900])
        for path in artifacts:
            store.artifact(run, path, None)
        store.end(run, "FINISHED", now)
    except (MlflowException, OSError) as error:
        raise WanmoeError(f"MLflow at {store.name}: {reason(error)}; the figures are in {folder}") from error
    return run
