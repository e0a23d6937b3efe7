"""Where figures go: `metrics.jsonl` in the run folder, and MLflow.

What goes to MLflow is first written down in the folder `tracking` of the run, and sent from there by a thread
of its own: MLflow may be slow, locked or away without a step waiting for it, and what a killed process has
not sent the next one sends.
"""

from __future__ import annotations

import json
import math
import secrets
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..moe_lora import WanmoeError
from ..moe_lora.files import write_atomic
from .config import TrackingConfig
from .mlflow_store import MlflowStore, clean_name, reason, without_password
from .sender import Sender
from .source import source_tags
from .spool import Operation, Spool, append_bytes
from .system_metrics import SystemMetrics

SPOOL = "tracking"
"""Folder within a run folder for what MLflow does not have yet."""
PARAM_LENGTH = 6000
"""Characters of a parameter's value that MLflow takes."""
DIGEST_LENGTH = 36
"""Characters of a data set's digest that MLflow takes."""

_name = lru_cache(maxsize=4096)(clean_name)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


class Tracker:
    """Writes metrics of one run to `metrics.jsonl` and to MLflow; used on rank 0 alone.

    No method waits for MLflow but `close`, which does for `config.close_wait` seconds at most.

    Args:
        run: run folder; its name is the MLflow run's unless the config says otherwise.
        params: flat settings, logged once.
        start_step: step that the run (re)starts from; later lines of an earlier attempt are cut off.
        run_id: MLflow run to go on with. Without one, a restart goes on with the folder's latest run, a fresh
            start begins a new one.
        say: is given one line when MLflow goes away, is back, or refuses something.

    Raises WanmoeError where the address is none that MLflow knows, or the run folder cannot be written.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run: Path,
        params: Mapping[str, Any],
        start_step: int = 0,
        run_id: str | None = None,
        *,
        say: Callable[[str], object] = _to_stderr,
    ) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] <= start_step] if start_step else []
        self._config, self._run, self._say = config, run, say
        # What is not written down yet, by both threads that log.
        self._lines: list[str] = []
        self._ops: deque[Operation] = deque()
        self._full, self._guard = False, threading.Lock()
        self._spool: Spool | None = None
        self._sender: Sender | None = None
        self._system: SystemMetrics | None = None
        if config.enabled:
            store = MlflowStore(config.uri or f"sqlite:///{run.parent.resolve() / 'mlflow.db'}")
            self._spool = Spool(run / SPOOL)
            self._sender = Sender(self._spool, store, say)
        # Only now: where another process logs to the run, its lines stay as they are.
        write_atomic(self.path, lambda path: _write_lines(path, kept))
        if self._sender is not None:
            self._start(self._sender, params, start_step, run_id)

    def _start(self, sender: Sender, params: Mapping[str, Any], start_step: int, run_id: str | None) -> None:
        config, spool = self._config, sender.spool
        earlier = _earlier(spool, start_step, run_id)
        if earlier is None:
            _end_as_killed(spool)
        self._key = secrets.token_hex(8) if earlier is None else str(earlier["run"])
        self._began = _now() if earlier is None else int(earlier["start"])
        op = {
            "op": "run",
            "run": self._key,
            "id": run_id,
            "start": self._began,
            "uri": sender.store.uri,
            "experiment": config.experiment,
            "artifacts": (self._run.parent.resolve() / "mlartifacts").as_uri(),
            "name": config.name or self._run.resolve().name,
            "params": {_name(key): without_password(str(v))[:PARAM_LENGTH] for key, v in params.items()},
            "tags": source_tags(),
        }
        self._append(op)
        spool.retry_refused()
        sender.start()
        if config.system_metrics_every:
            self._system = SystemMetrics(config.system_metrics_every, self._log_system)

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, None until MLflow has made it."""
        if self._spool is None or self._key not in self._spool.runs:
            return None
        return str(self._spool.runs[self._key]["id"])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics for one step; figures that are not finite are left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._lines.append(json.dumps({"step": step, **finite}) + "\n")
        self._write_down()
        self._metrics(step, finite)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Logs a file as it is now, into a folder of the run's artefacts; a config without its passwords."""
        clean = without_password if path.suffix == ".toml" else None
        self._with_file({"op": "artifact", "folder": folder}, path, clean=clean)

    def model(self, path: Path, name: str, step: int, tags: Mapping[str, Any]) -> None:
        """Logs a weights file as a model of its own, registered where `tracking.registered_model` says so.

        Args:
            path: a safetensors file, as it is now; whoever writes it again must put a new file in its place.
            name: of the logged model, such as "adapter-high".
            tags: what tells it apart: stage, noise expert, base model.
        """
        if self._sender is None:
            return
        named = _name(name).translate(str.maketrans("/:.", "___"))
        op = {
            "op": "model",
            # Logged again, by a run that is started after its end, it is the same model.
            "key": f"{self._key}-{named}-{step}",
            "name": named,
            "step": step,
            "tags": {_name(key): str(value) for key, value in tags.items()},
            "registered": self._config.registered_model,
        }
        self._with_file(op, path, replaced_whole=True)

    def dataset(self, root: str, manifest: Mapping[str, Any], fingerprint: str) -> None:
        """Logs a folder of shards, or its URL, as the input of the run, with its counts by split.

        Takes `root`, `manifest` and `fingerprint` of a `ShardIndex`.
        """
        root = without_password(root)
        scheme, found, rest = root.partition("://")
        profile = {key: manifest[key] for key in ("n_samples", "n_texts", "histogram") if key in manifest}
        self._append(
            {
                "op": "dataset",
                "name": root.partition("?")[0].rstrip("/").rsplit("/", 1)[-1] or root,
                "digest": fingerprint[:DIGEST_LENGTH],
                "source_type": scheme if found else "local",
                "source": f"{scheme}://{rest}" if found else str(Path(root).resolve()),
                "profile": profile,
            }
        )

    def close(self, status: str = "FINISHED") -> None:
        """Ends the MLflow run: FINISHED, FAILED or KILLED; a second call does nothing."""
        if self._system is not None:
            self._system.close()
        self._append({"op": "status", "status": status, "time": _now()})
        self._write_down()
        if lost := len(self._lines) + len(self._ops):
            self._say(f"{self._run}: the last {lost} lines of figures could not be written and are lost")
            self._lines.clear()
            self._ops.clear()
        if self._sender is None:
            return
        sender, self._sender = self._sender, None
        left = sender.close(self._config.close_wait)
        if left:
            self._say(
                f"MLflow at {sender.store.name} lacks {left} operations of this run, kept in "
                f"{sender.spool.folder}; the run's next start sends them, or "
                f"`wanmoe track-sync --run {shlex.quote(str(self._run))}`"
            )

    def _write_down(self) -> None:
        """Writes what waits for it; on a full disk it waits for the next time, which is said once."""
        with self._guard:
            try:
                if self._lines:
                    append_bytes(self.path, "".join(self._lines).encode())
                    self._lines.clear()
                while self._sender is not None and self._ops:
                    self._sender.spool.append(self._ops[0])
                    self._ops.popleft()
            except (OSError, WanmoeError) as error:
                if not self._full:
                    told = error if isinstance(error, WanmoeError) else f"{self.path}: {error.strerror}"
                    self._say(f"figures wait in memory until they can be written: {told}")
                self._full = True
            else:
                self._full = False

    def _metrics(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            named = {_name(name): value for name, value in values.items()}
            self._append({"op": "metrics", "step": step, "time": _now(), "values": named})

    def _log_system(self, values: Mapping[str, float]) -> None:
        # There is no step here: seconds since the run began go on in a resumed one.
        self._metrics(max(0, _now() - self._began) // 1000, values)

    def _with_file(
        self,
        op: Operation,
        path: Path,
        replaced_whole: bool = False,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        if self._spool is None:
            return
        try:
            self._append(op | {"file": self._spool.keep(path, replaced_whole, clean)})
        except WanmoeError as error:
            self._say(f"not logged: {error}")

    def _append(self, op: Operation) -> None:
        if self._sender is not None:
            self._ops.append({"run": self._key, **op})
            self._write_down()
            self._sender.wake()


def sync(run: Path, say: Callable[[str], object] = _to_stderr) -> int:
    """Sends to MLflow what a run that has ended left in its folder; returns how many operations that were.

    What MLflow refused is tried again. Raises WanmoeError where the run was not tracked, MLflow is away, or a
    process still logs to the run.
    """
    if not (run / SPOOL / "spool.jsonl").exists():
        raise WanmoeError(f"{run}: no run folder that was tracked; it has no {SPOOL}/spool.jsonl")
    spool = Spool(run / SPOOL)
    try:
        if spool.current is None:
            return 0
        _end_as_killed(spool)
        spool.retry_refused()
        waiting = spool.waiting
        store = MlflowStore(spool.current["uri"])
        error = Sender(spool, store, say).drain()
        if error is not None:
            raise WanmoeError(
                f"MLflow at {store.name}: {reason(error)}; {spool.waiting} operations stay in {spool.folder}"
            ) from error
        return waiting
    finally:
        spool.close()


def _earlier(spool: Spool, start_step: int, run_id: str | None) -> Operation | None:
    """The "run" operation that a start goes on with."""
    if run_id is not None:
        known = [op for op in spool.runs.values() if run_id in op["ids"]]
        return known[0] if known else {"run": secrets.token_hex(8), "start": _now()}
    return spool.current if start_step else None


def _end_as_killed(spool: Spool) -> None:
    """Ends the folder's latest run where the process that logged it did not live to do so."""
    if spool.current is not None and not spool.ended:
        op = {"op": "status", "run": spool.current["run"], "status": "KILLED"}
        spool.append(op | {"time": spool.touched or _now()})


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


def _now() -> int:
    """Milliseconds since the epoch."""
    return int(time.time() * 1000)
