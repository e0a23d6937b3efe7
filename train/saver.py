"""Writes that go on while training does, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Saver:
    """Runs one write at a time in a thread of its own, in order; used on rank 0."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Starts a write once the one before has ended; raises what that one raised."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Waits for the write that is under way; raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    @property
    def failed(self) -> bool:
        """Whether the last write has ended with an error that nobody was told of."""
        return self._last is not None and self._last.done() and self._last.exception() is not None
