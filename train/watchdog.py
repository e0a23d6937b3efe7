"""Who is still there: every rank leaves a sign of life in the run folder, and a rank that is dead or stuck
ends the job with its name instead of a hang.

`ranks/<rank>.json` holds host, process, step and a counter. A process of the same machine is asked after by
its number; one of another machine is gone when its counter has stood still, by the reader's own clock. Rank 0
holds `ranks/lock` for as long as the job lives.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from ..moe_lora import WanmoeError
from .config import TrainConfig
from .spool import FolderLock

# Exit code of a job that may be started again as it is: sysexits' EX_TEMPFAIL.
TRY_AGAIN = 75
INTERVAL = 1.0
"""Seconds between signs of life."""
SILENT = 60.0
"""Seconds without one, after which a rank of another machine is gone: folders are shared with a delay."""
GRACE = 2.0
"""Seconds that a rank has to end by itself once another is gone."""
SIZE = 4096
"""Bytes of a sign's file, which is written in place: that needs no room on a disk that is full by now."""
BOOT = Path("/proc/sys/kernel/random/boot_id")


class LostRankError(WanmoeError):
    """A rank died or is stuck; the same command goes on from the last save."""

    exit_code = TRY_AGAIN


@dataclass
class Sign:
    """What one rank says of itself."""

    rank: int
    host: str
    pid: int
    born: str | None
    """Of the process, as `birth` tells it."""
    machine: str
    """Where that process can be asked after (`machine`); names of hosts may be those of several."""
    attempt: str
    """Of the start of the job; files of earlier ones count for nothing."""
    count: int = 0
    step: int = 0
    at: str = ""
    """Where its main thread is."""
    ended: str | None = None
    """Why it has ended, "" where all is well; None while it runs."""
    wall: float = 0.0

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def alive(self) -> bool:
        """Of a process of this machine."""
        return self.born is not None and birth(self.pid) == self.born


def birth(pid: int) -> str | None:
    """What tells a process of this machine from a later one of the same number; None where it is gone.

    Boot and clock tick of its start where the system says so: a time of day moves when the clock is set.
    """
    if not BOOT.exists():
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
        except psutil.NoSuchProcess:
            return None
    try:
        # After the name, which may hold spaces: state, and 18 fields further on the tick (proc(5)).
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else f"{BOOT.read_text().strip()}/{fields[18]}"


def machine() -> str:
    """What tells this machine, or container, from others: boot and space of process numbers."""
    if not BOOT.exists():
        return socket.gethostname()
    return f"{BOOT.read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"


class Watchdog:
    """The sign of life of one rank, and its eye on the others.

    Args:
        folder: `ranks` in the run folder.
        attempt: the same on all ranks of this start of the job.
        timeout: seconds without a `beat` after which this rank ends itself, its stacks written beside the
            signs.
        give_up: takes what to say when the job cannot go on and is to end now.

    Raises WanmoeError where the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        attempt: str,
        timeout: float,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.world, self.timeout = folder, world, timeout
        self.give_up = give_up or _end
        pid = os.getpid()
        self.own = Sign(rank, socket.gethostname(), pid, birth(pid), machine(), attempt)
        self._main = threading.main_thread().ident
        self._beaten = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._path = folder / f"{rank}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Appended to: a restart keeps what the start before it has left.
            self._stacks = open(folder / f"{rank}-stacks.txt", "a")  # noqa: SIM115 - held for faulthandler
            # A new file, whole from the start; from then on it is written in place.
            partial = self._path.with_suffix(".partial")
            partial.write_bytes(self._text())
            os.replace(partial, self._path)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def start(self) -> None:
        """Begins to watch: what came before does not count."""
        self._beaten = time.monotonic()
        self._arm()
        self._thread.start()

    def beat(self, step: int) -> None:
        """The rank has got on, to this step."""
        self.own.step = step
        self._beaten = time.monotonic()
        self._arm()

    def close(self, why: str = "") -> None:
        """The rank ends, because of `why` if all is not well."""
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():
            self._thread.join()
        self.own.ended = why
        # A full disk hides neither this end nor its cause; the others notice that the process is gone.
        with contextlib.suppress(OSError):
            self._write()
        with contextlib.suppress(OSError):
            self._stacks.close()
            stacks = self.folder / f"{self.own.rank}-stacks.txt"
            if stacks.stat().st_size == 0:
                stacks.unlink()

    def lost(self) -> str | None:
        """Which other rank is gone, in words; None where all are there."""
        for sign in self._others():
            if sign.ended:
                return f"{sign.name} has ended: {sign.ended}"
            if sign.ended is None and self._gone(sign):
                far = sign.machine != self.own.machine
                silent = f", and has written nothing to {self.folder} for {SILENT:g} s" if far else ""
                return f"{sign.name} is gone; it was at step {sign.step}{silent}"
        return None

    def wait_for_lost(self) -> str | None:
        """As `lost`, a moment later if need be: a process that is being killed is there for a while."""
        until = time.monotonic() + GRACE
        while (told := self.lost()) is None and time.monotonic() < until:
            time.sleep(0.05)
        return told

    def _gone(self, sign: Sign) -> bool:
        if sign.machine == self.own.machine:
            return not sign.alive()
        count, since = self._seen.get(sign.rank, (-1, 0.0))
        now = time.monotonic()
        if sign.count != count:
            self._seen[sign.rank] = (sign.count, now)
            return False
        return now - since > SILENT

    def _others(self) -> list[Sign]:
        return [
            sign
            for rank in range(self.world)
            if rank != self.own.rank and (sign := read_sign(self.folder, rank)) is not None
            if sign.attempt == self.own.attempt
        ]

    def _watch(self) -> None:
        lost_since: float | None = None
        while not self._stop.wait(INTERVAL):
            self.own.count += 1
            self.own.at = self._where()
            with contextlib.suppress(OSError):  # a disk that fails is for those to tell who save
                self._write()
            told = self.lost()
            if told is None:
                lost_since = None
            elif lost_since is None:
                lost_since = time.monotonic()
            elif time.monotonic() - lost_since > GRACE:
                self._end(told)
            if time.monotonic() - self._beaten > self.timeout:
                faulthandler.dump_traceback(self._stacks, all_threads=True)
                self._end(self._stuck())

    def _end(self, why: str) -> None:
        # Those of other machines hear it at once, not when this one has been silent for long.
        self.own.ended = why
        with contextlib.suppress(OSError):
            self._write()
        self.give_up(why)

    def _stuck(self) -> str:
        signs = sorted(
            [self.own, *self._others()], key=lambda sign: (-_silent(sign), _waits(sign.at), sign.step)
        )
        told = "; ".join(
            f"{sign.name} at step {sign.step} in {sign.at}"
            + (f", silent for {_silent(sign)} s" if _silent(sign) else "")
            for sign in signs[:4]
        )
        return (
            f"no step for {self.timeout:g} s (train.timeout); first those that wait for nobody: {told}; "
            f"stacks in {self.folder}/*-stacks.txt"
        )

    def _where(self) -> str:
        """The innermost lines of the main thread."""
        frame = sys._current_frames().get(self._main or 0)
        places: list[str] = []
        while frame is not None and len(places) < 3:
            places.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
            frame = frame.f_back
        return " < ".join(places)

    def _arm(self) -> None:
        # A thread of C: it also works where one of Python never gets its turn.
        faulthandler.dump_traceback_later(self.timeout + 30, exit=True, file=self._stacks)

    def _write(self) -> None:
        # Opened each time: a shared folder shows others what was written once it is closed.
        with self._path.open("r+b", buffering=0) as file:
            file.write(self._text())

    def _text(self) -> bytes:
        self.own.wall = time.time()
        sign = asdict(self.own)
        text = json.dumps(sign)
        if len(text) > SIZE:  # an error of many words; its beginning tells
            sign |= {"at": "", "ended": sign["ended"] and sign["ended"][: SIZE // 8]}
            text = json.dumps(sign)
        return text.ljust(SIZE).encode()


@contextlib.contextmanager
def watch_over(config: TrainConfig, rank: int, world: int) -> Iterator[Watchdog]:
    """Takes the run folder for this start of a job and watches over its ranks, to whatever end it comes.

    A collective. Raises WanmoeError where another job is at work there, LostRankError where the error of this
    rank is that another has died.
    """
    signs = config.run / "ranks"
    with contextlib.ExitStack() as held:
        start: list[Any] = [uuid.uuid4().hex, None]
        if rank == 0:
            try:
                held.enter_context(take(signs))
            except WanmoeError as error:
                start[1] = error
        dist.broadcast_object_list(start)
        attempt, fault = start
        if fault is not None:
            raise fault
        with _watched(Watchdog(signs, rank, world, attempt, config.timeout)) as watchdog:
            yield watchdog


@contextlib.contextmanager
def _watched(watchdog: Watchdog) -> Iterator[Watchdog]:
    watchdog.start()
    why = "its main thread raised an error"
    try:
        yield watchdog
        why = ""
    except WanmoeError as error:
        why = str(error)
        raise
    except RuntimeError as error:
        # A collective fails at once where a rank has died, and says nothing of which.
        if told := watchdog.wait_for_lost():
            raise LostRankError(f"{told}; the same command goes on from the last save") from error
        raise
    finally:
        watchdog.close(why)


@contextlib.contextmanager
def take(folder: Path) -> Iterator[None]:
    """Holds the signs of a run folder for one job, which two that start at once do not both get.

    Raises WanmoeError.
    """
    use = "is at work there; wait for it, stop it, or choose another train.run"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder, use)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with contextlib.closing(lock):
        check_unused(folder)
        yield


def read_sign(folder: Path, rank: int) -> Sign | None:
    """The sign of a rank; None where it has left none, or none can be read for now."""
    try:
        return Sign(**json.loads((folder / f"{rank}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def check_unused(folder: Path) -> None:
    """Raises WanmoeError where another job is at work in this run folder.

    Waits for up to `SILENT` seconds where a rank of another machine has left without a word: by then it would
    have given a sign of life.
    """
    signs = [read_sign(folder, int(path.stem)) for path in folder.glob("*.json") if path.stem.isdigit()]
    open_ends = [sign for sign in signs if sign is not None and sign.ended is None]
    far = []
    for sign in open_ends:
        if sign.machine != machine():
            far.append(sign)
        elif sign.alive():
            raise _at_work(folder, sign)
    left = max((SILENT - abs(time.time() - sign.wall) for sign in far), default=0.0)
    if left > 0:
        sys.stderr.write(f"{far[0].name} has left {folder} without a word; watching it for {left:.0f} s\n")
    until = time.monotonic() + left
    while time.monotonic() < until:
        time.sleep(INTERVAL)
        for sign in far:
            now = read_sign(folder, sign.rank)
            if now is not None and (now.attempt, now.count) != (sign.attempt, sign.count):
                raise _at_work(folder, now)


def _at_work(folder: Path, sign: Sign) -> WanmoeError:
    return WanmoeError(
        f"{folder.parent}: {sign.name} is at work there; wait for it, stop it, or choose another train.run"
    )


def _unwritable(folder: Path, error: OSError) -> WanmoeError:
    room = "make room there or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return WanmoeError(f"{folder}: could not be written ({error.strerror}); {room}choose another train.run")


def _silent(sign: Sign) -> int:
    """Seconds since a sign of life that is overdue, else 0; clocks of machines agree as far as this goes."""
    late = int(time.time() - sign.wall)
    return late if late > 5 * INTERVAL else 0


def _waits(at: str) -> bool:
    """Whether a main thread is in a collective, as those that wait for another rank are."""
    return any(place in at for place in ("distributed_c10d.py", "comm.py", "partition_parameters.py"))


def _end(told: str) -> None:
    """Ends the process at once: its main thread hangs in a collective that will never return."""
    rank = os.environ.get("RANK", "?")
    sys.stderr.write(f"\nwanmoe: error [rank {rank}]: {told}; the same command goes on from the last save\n")
    sys.stderr.flush()
    os._exit(TRY_AGAIN)
