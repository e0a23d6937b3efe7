"""One thread that sends what waits in a spool to MLflow, in order, and pauses while MLflow is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from ..moe_lora import WanmoeError
from .mlflow_store import Metric, MlflowStore, answer, reason
from .spool import Operation, Spool

BATCH = 500
"""Metrics of one call at most; MLflow takes 1000."""
LINGER = 1.0
"""Seconds between two calls while all goes well: what comes meanwhile goes together."""
AHEAD = 64
"""Operations that are looked at for one call."""
PAUSES = (0.5, 60.0)
"""Seconds before the first new try while MLflow is away, and at most; each pause is twice the one before."""
TRIES = 12
"""How often an operation that fails while MLflow answers everything else is tried before it is set aside."""
TOLD = 5
"""Refusals that are told one by one; all of them are in the file."""

_T = TypeVar("_T")


class Sender:
    """Empties a spool in the background.

    Args:
        say: is given one line when MLflow goes away, when it is back, and for an operation that it refuses.
    """

    def __init__(self, spool: Spool, store: MlflowStore, say: Callable[[str], object]) -> None:
        self.spool, self.store, self.say = spool, store, say
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="mlflow", daemon=True)
        self._away_since: float | None = None
        self._tries = 0
        self._refusals = 0

    def start(self) -> None:
        """Starts the thread; nothing that it meets stops the process."""
        self._thread.start()

    def wake(self) -> None:
        """Says that something was appended."""
        self._news.set()

    def close(self, seconds: float) -> int:
        """Sends what is left, for so many seconds at most and not while MLflow is away; returns the rest.

        The spool is closed when the thread ends, which a call that hangs may put off.
        """
        self._closing.set()
        self._news.set()
        self._thread.join(seconds)
        return self.spool.waiting

    def drain(self) -> Exception | None:
        """Sends what waits now; returns what stopped it."""
        left = self.spool.waiting
        while left > 0:
            sent, error = self._send_some()
            if error is not None:
                return error
            left -= sent
        return None

    def _live(self) -> None:
        self._work()
        self.spool.close()

    def _work(self) -> None:
        pause = PAUSES[0]
        while True:
            closing = self._closing.is_set()
            if not self.spool.waiting:
                if closing:
                    return
                self._news.wait()
                self._news.clear()
                continue
            error = self.drain()
            if error is None:
                pause = PAUSES[0]
                self._closing.wait(LINGER)
            elif closing:
                return
            else:
                self._closing.wait(pause)
                pause = min(2 * pause, PAUSES[1])

    def _send_some(self) -> tuple[int, Exception | None]:
        """Sends the next operation, or the next metrics together; (how many, what went wrong, said once)."""
        ops: list[Operation] = []
        with _Caught() as caught:
            ops = _batch(self.spool.peek(AHEAD))
            self._send(ops)
            self.spool.done(ops)
            self._tries = 0
        if isinstance(caught.error, _BegunAnew):
            return 0, None
        if caught.error is not None:
            if self._away_since is None:
                self._away_since = time.monotonic()
                why = reason(caught.error)
                if self._thread.is_alive():  # else the caller is told
                    self._tell(f"{why}; the run goes on, what it logs waits in {self.spool.folder}")
            return 0, caught.error
        if self._away_since is not None:
            gone = time.monotonic() - self._away_since
            self._away_since = None
            self._tell(f"back after {gone:.0f} s; {self.spool.waiting} operations follow")
        return len(ops), None

    def _send(self, ops: list[Operation]) -> None:
        op = ops[0]
        if op["op"] == "run":
            self._begin(op)
            return
        if op["run"] not in self.spool.runs:
            raise WanmoeError(f"{self.spool.folder} does not say which run {op['run']} is; move it away")
        run_id = str(self.spool.runs[op["run"]]["id"])
        if op["op"] == "metrics":
            self._send_metrics(run_id, ops)
        elif "file" in op and not (self.spool.folder / op["file"]).is_file():
            self._refuse(op, "its copy is gone")
        else:
            for _, why in self._divide(run_id, [op], lambda items: self._perform(run_id, items[0])):
                self._refuse(op, why)

    def _perform(self, run_id: str, op: Operation) -> None:
        kind = op["op"]
        if kind == "params":
            self.store.params(run_id, list(op["params"].items()))
        elif kind == "artifact":
            self.store.artifact(run_id, self.spool.folder / op["file"], op["folder"])
        elif kind == "dataset":
            self.store.dataset(run_id, op)
        elif kind == "model":
            self.store.model(run_id, op, self.spool.folder / op["file"])
        elif kind == "status":
            self.store.end(run_id, op["status"], op["time"])
        else:
            raise WanmoeError(f"{self.spool.folder}: nothing is known of operations {kind!r}")

    def _begin(self, op: Operation) -> None:
        known = self.spool.runs.get(op["run"], op).get("id")
        run_id, new = self.store.begin(op | {"id": known})
        if known is not None and run_id != known:
            self._tell(f"has no active run {known}; a new one is begun")
        if new:
            params = list(op["params"].items())
            for (name, value), why in self._divide(run_id, params, lambda p: self.store.params(run_id, p)):
                self._refuse({"op": "params", "run": op["run"], "params": {name: value}}, why)
        self.spool.begun(op, run_id)

    def _send_metrics(self, run_id: str, ops: list[Operation]) -> None:
        items = [(op, name) for op in ops for name in op["values"]]

        def send(some: Sequence[tuple[Operation, str]]) -> None:
            metrics: list[Metric] = [(name, op["values"][name], op["time"], op["step"]) for op, name in some]
            self.store.metrics(run_id, metrics)

        for (op, name), why in self._divide(run_id, items, send):
            self._refuse(op | {"values": {name: op["values"][name]}}, why)

    def _divide(
        self, run_id: str, items: Sequence[_T], send: Callable[[Sequence[_T]], None]
    ) -> list[tuple[_T, str]]:
        """Sends items together, or by halves where one of them is refused; returns the refused and why."""
        if not items:
            return []
        with _Caught() as caught:
            send(items)
        if caught.error is None:
            return []
        if not self._is_refusal(run_id, caught.error):
            raise caught.error
        if len(items) == 1:
            # Once more: what was in its way may have gone before MLflow was asked for something else.
            with _Caught() as again:
                send(items)
            return [] if again.error is None else [(items[0], reason(again.error))]
        half = len(items) // 2
        return self._divide(run_id, items[:half], send) + self._divide(run_id, items[half:], send)

    def _is_refusal(self, run_id: str, error: Exception) -> bool:
        """Whether a call failed for what it asked, since MLflow takes something else on the same run.

        Raises what that other call meets, where it is MLflow, or the run, that is not there.
        """
        state = self.store.state(run_id)
        if state == "deleted":
            raise WanmoeError(f"run {run_id} is deleted there; restore it") from error
        if state == "unknown":
            lost = [op for op in self.spool.runs.values() if op["id"] == run_id]
            if not lost:  # one that was made just now
                raise error
            self._begin(lost[0])
            raise _BegunAnew from error
        self.store.touch(run_id)
        status = answer(error)
        if status is not None and 400 <= status < 500 and status not in (408, 409, 429):
            return True
        # Not the server's word, but nothing may hold up everything behind it for ever.
        self._tries += 1
        return self._tries >= TRIES

    def _refuse(self, op: Operation, why: str) -> None:
        self.spool.refuse(op, why)
        self._refusals += 1
        if self._refusals > TOLD:
            return
        more = "; of further ones only that file tells" if self._refusals == TOLD else ""
        self._tell(f"refused {_described(op)} ({why}); it is set aside in {self.spool.refused}{more}")

    def _tell(self, line: str) -> None:
        with _Caught():  # a closed terminal is no reason to stop sending
            self.say(f"MLflow at {self.store.name}: {line}")


class _BegunAnew(Exception):
    """The server had lost the run, and has it again under another id."""


class _Caught:
    """Holds any exception of its block instead of raising it.

    Stores of artefacts are plug-ins (S3, GCS, ...) whose errors have no base in common, and none of them may
    end the thread that keeps a run's record.
    """

    error: Exception | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _batch(ops: list[Operation]) -> list[Operation]:
    """The first operation, and where it is metrics those that follow on the same run, `BATCH` at most."""
    taken: list[Operation] = []
    count = 0
    for op in ops:
        count += len(op.get("values", ()))
        alike = op["op"] == "metrics" and op["run"] == ops[0]["run"]
        if taken and (not alike or ops[0]["op"] != "metrics" or count > BATCH):
            break
        taken.append(op)
    return taken


def _described(op: Operation) -> str:
    if op["op"] == "metrics":
        return f"metric {', '.join(op['values'])!r} of step {op['step']}"
    if op["op"] == "params":
        return f"parameter {', '.join(op['params'])!r}"
    if "file" in op:
        return f"{op['op']} {op['file'].rsplit('/', 1)[-1]!r}"
    return f"the {op['op']}"
