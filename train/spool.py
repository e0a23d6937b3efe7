"""Operations that wait to be sent to a server, in files that outlive the process.

A folder holds `spool.jsonl` (one operation a line, numbered by `n`), `sent.jsonl` (the number up to which all
is sent, and the runs that the server knows), `refused.jsonl` (what the server would not take, and why),
`files/` (what the files that operations name held when they were logged) and `lock`. Both lists are appended
to, and made short when the folder is opened or closed, and when all is sent and they have grown long; a last
line that a crash cut is left out, since nobody was told of it. Lines are handed to the system at once: they
outlive a killed process, not a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..moe_lora import WanmoeError
from ..moe_lora.files import write_atomic

Operation = dict[str, Any]

LONG = 4 << 20
"""Bytes of a list from which on it is made short while the folder is open, once all is sent."""

LEASE = 120.0
"""Seconds for which a server of files may keep the lock of a machine that is gone."""

_open_here: set[Path] = set()
"""Folders that this process has locked: record locks keep processes apart, not two openings by one."""


class FolderLock:
    """Keeps a folder to one process until `close`, by a lock on its file `lock`.

    Forked children do not inherit it, and a dead process loses it; one of another machine is waited for,
    since that may be gone.

    Args:
        use: what who has it does there, and the way out, for the error.

    Raises WanmoeError where another has it, OSError where the file cannot be written.
    """

    def __init__(self, folder: Path, use: str) -> None:
        self.folder = folder.resolve()
        # Asked for before the file is opened: to close it would free what this process has locked.
        if self.folder in _open_here:
            raise WanmoeError(f"{self.folder}: this process {use}")
        self._file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        until = time.monotonic() + LEASE
        told = False
        while (holder := self._holder()) is not None:
            if holder.endswith(f" on {socket.gethostname()}") or time.monotonic() > until:
                os.close(self._file)
                raise WanmoeError(f"{self.folder}: {holder} {use}")
            if not told:
                sys.stderr.write(f"{self.folder}: waiting for {holder}, {LEASE:.0f} s at most\n")
            told = True
            time.sleep(1.0)
        try:
            os.ftruncate(self._file, 0)
            os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError:
            os.close(self._file)
            raise
        _open_here.add(self.folder)

    def _holder(self) -> str | None:
        """Who has the lock; None where that is now this process."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some cluster file systems have no locks: nothing keeps two processes apart there.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return os.pread(self._file, 200, 0).decode(errors="replace") or "another process"
        return None

    def close(self) -> None:
        """Gives the folder free."""
        os.close(self._file)
        _open_here.discard(self.folder)


class Spool:
    """A queue on disk: `append` and `keep` for any thread; `peek`, `done`, `begun`, `refuse` for the sender.

    An operation is a JSON object with `op`, its kind, and `run`, the key of the run that it belongs to. The
    kind "run" begins a run or goes on with it, "status" ends it.

    Raises WanmoeError where the folder cannot be written, or is already open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.refused = self.folder / "refused.jsonl"
        """File of what the server would not take."""
        self.runs: dict[str, Operation] = {}
        """The "run" operation of each run that the server knows, by key; its id there is under `id`, all that
        it ever had under `ids`."""
        self.current: Operation | None = None
        """The latest "run" operation, sent or not."""
        self.ended = True
        """Whether the latest run has got its status, sent or not."""
        self._spooled, self._acknowledged = self.folder / "spool.jsonl", self.folder / "sent.jsonl"
        self._guard = threading.Lock()
        self._sent = 0
        self.touched: int | None = None
        """When the last operation before this opening came, in ms since the epoch."""
        try:
            (self.folder / "files").mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder, "still logs or sends from here; wait until it ends")
        except OSError as error:
            raise _closed(folder, error) from error
        try:
            if self._spooled.exists():
                self.touched = int(self._spooled.stat().st_mtime * 1000)
            waiting = self._shorten()
            self._file = self._spooled.open("ab", buffering=0)
        except OSError as error:
            self._lock.close()
            raise _closed(folder, error) from error
        self.waiting = len(waiting)
        """How many operations are not sent yet."""
        self._next = max([self._sent, *(op["n"] for op in waiting)]) + 1
        self._head, self._end = 0, self._spooled.stat().st_size

    def append(self, op: Operation) -> None:
        """Writes down an operation; raises WanmoeError where that fails, and leaves nothing half written."""
        with self._guard:
            # What is sent once more keeps the name by which the server may know it.
            op = {"key": f"{op['run']}-{self._next}", **op, "n": self._next}
            line = (json.dumps(op) + "\n").encode()
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._file.truncate(self._end)
                raise WanmoeError(f"{self._spooled}: could not be written ({error.strerror})") from error
            self._end += len(line)
            self._next += 1
            self.waiting += 1
            self._follow(op)

    def keep(self, path: Path, replaced_whole: bool, clean: Callable[[str], str] | None = None) -> str:
        """Keeps what a file holds now; returns its path within the folder.

        Args:
            replaced_whole: whoever writes the file again puts a new one in its place (`write_atomic`). It is
                then linked, which takes no time and no space; otherwise it is copied.
            clean: takes what a text holds and returns what is kept of it.
        """
        name = Path("files") / secrets.token_hex(6) / path.name
        target = self.folder / name
        try:
            target.parent.mkdir()
            if clean is not None:
                text = path.read_text(encoding="utf-8", errors="replace")
                target.write_text(clean(text), encoding="utf-8")
            elif not replaced_whole or not _linked(path, target):
                shutil.copyfile(path, target)
        except OSError as error:
            raise WanmoeError(f"{path}: could not be kept in {self.folder} ({error.strerror})") from error
        return str(name)

    def peek(self, count: int) -> list[Operation]:
        """The next operations to send, at most `count`; `done` takes them off."""
        with self._guard:
            end = self._end
        ops: list[Operation] = []
        with self._spooled.open("rb") as file:
            file.seek(self._head)
            while len(ops) < count and file.tell() < end:
                ops.append(json.loads(file.readline()) | {"end": file.tell()})
        return ops

    def done(self, ops: list[Operation]) -> None:
        """Takes off the operations that `peek` returned, or the first of them; their files go too."""
        _append(self._acknowledged, {"n": ops[-1]["n"]})
        self._head = ops[-1]["end"]
        with self._guard:
            self.waiting -= len(ops)
            if not self.waiting:
                # What fails is done the next time; nothing waits for it.
                with contextlib.suppress(OSError, WanmoeError):
                    self._empty(ops[-1]["n"])
        for op in ops:
            if "file" in op:
                shutil.rmtree((self.folder / op["file"]).parent, ignore_errors=True)

    def begun(self, op: Operation, run_id: str) -> None:
        """Writes down by which id the server knows a run."""
        before = self.runs.get(op["run"], {}).get("ids", [])
        ids = before if run_id in before else [*before, run_id]
        self.runs[op["run"]] = _stored(op) | {"id": run_id, "ids": ids}
        _append(self._acknowledged, {"run": self.runs[op["run"]]})

    def refuse(self, op: Operation, reason: str) -> None:
        """Sets an operation aside, with its file; `done` has to take it off."""
        op = _stored(op)
        if "file" in op and (self.folder / op["file"]).is_file():
            op["file"] = self.keep(self.folder / op["file"], replaced_whole=True)
        _append(self.refused, {"reason": reason, "op": op})

    def retry_refused(self) -> None:
        """Appends what was refused once more; what is damaged stays in the file."""
        damaged = []
        for fact in _lines(self.refused):
            op = fact.get("op", {})
            if "run" in op and op.get("op") != "damaged":
                self.append(op)
            else:
                damaged.append(fact)
        if damaged:
            _rewrite(self.refused, damaged)
        else:
            self.refused.unlink(missing_ok=True)

    def close(self) -> None:
        """Makes the lists short and gives the folder free."""
        with self._guard:
            self._file.close()
            self._shorten()
            self._lock.close()

    def _shorten(self) -> list[Operation]:
        """Reads both lists, writes them again without what is sent, and returns what waits."""
        for fact in _lines(self._acknowledged):
            self._sent = max(self._sent, fact.get("n", 0))
            if "run" in fact:
                self.runs[fact["run"]["run"]] = fact["run"]
            if "current" in fact:
                self.current, self.ended = fact["current"], fact["ended"]
        waiting = []
        for op in _lines(self._spooled):
            if not {"n", "op", "run"} <= op.keys():
                self.refuse({"op": "damaged"} | op, "damaged on disk")
                continue
            self._follow(op)
            if op["n"] > self._sent:
                waiting.append(op)
        # In this order: a crash in between leaves lines that are known to be sent.
        self._rewrite_acknowledged()
        _rewrite(self._spooled, waiting)
        self._sweep(waiting)
        return waiting

    def _empty(self, sent: int) -> None:
        """Makes lists that are long short, where nothing waits after operation `sent`."""
        if max(self._end, self._acknowledged.stat().st_size) < LONG:
            return
        self._sent = sent
        self._rewrite_acknowledged()
        self._file.truncate(0)
        self._head = self._end = 0

    def _rewrite_acknowledged(self) -> None:
        facts: list[dict[str, Any]] = [{"n": self._sent, "current": self.current, "ended": self.ended}]
        _rewrite(self._acknowledged, facts + [{"run": op} for op in self.runs.values()])

    def _sweep(self, waiting: list[Operation]) -> None:
        """Removes kept files that no operation names: those of a crash between two writes."""
        ops = [*waiting, *(fact.get("op", {}) for fact in _lines(self.refused))]
        named = {Path(op["file"]).parent.name for op in ops if "file" in op}
        for place in (self.folder / "files").iterdir():
            if place.name not in named:
                shutil.rmtree(place, ignore_errors=True)

    def _follow(self, op: Operation) -> None:
        if op["op"] == "run":
            self.current, self.ended = _stored(op), False
        if op["op"] == "status" and self.current is not None and op["run"] == self.current["run"]:
            self.ended = True


def _closed(folder: Path, error: OSError) -> WanmoeError:
    return WanmoeError(f"{folder}: could not be opened ({error.strerror})")


def _stored(op: Operation) -> Operation:
    """An operation without the place where it lies."""
    return {key: value for key, value in op.items() if key != "end"}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a list; one that is not a JSON object comes as {"damaged": text}."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        yield line if isinstance(line, dict) else {"damaged": text}


def append_bytes(path: Path, text: bytes) -> None:
    """Appends to a file; raises OSError where not all of it could be, and leaves nothing half written."""
    with path.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            if file.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _rewrite(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _linked(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        return False
    return True
