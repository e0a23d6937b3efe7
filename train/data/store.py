"""Where the files of a folder of shards lie: on a disk, or behind a URL that fsspec opens."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import fsspec
from fsspec.registry import known_implementations
from fsspec.utils import get_protocol

from ...moe_lora.errors import WanmoeError

PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each new try of a request that failed for a cause that may pass."""

TIME_LIMITS = {"total": 300.0, "sock_connect": 30.0, "sock_read": 60.0}
"""Seconds of one try over HTTP: in all, until connected, and between two pieces of an answer."""

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING_STATUS = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)

_HTTP_FAULTS: tuple[type[Exception], ...] = (aiohttp.ClientError, asyncio.TimeoutError)

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Store(Protocol):
    """Reads files of one folder by name; a failed read is an `OSError`."""

    def path(self, name: str) -> str:
        """The file's full path or URL."""

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` on, or all that follow; fewer where the file ends before."""

    def size(self, name: str) -> int:
        """Bytes of the file."""


class LocalStore:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        with (self.root / _checked(name)).open("rb") as file:
            left = max(os.fstat(file.fileno()).st_size - offset, 0)
            file.seek(offset)
            # `read` reserves what it is asked for, and an index may ask for anything.
            return file.read(left if size is None else min(size, left))

    def size(self, name: str) -> int:
        return (self.root / _checked(name)).stat().st_size


class RemoteStore:
    """A folder behind a URL; parts of a file are read by byte ranges.

    A request that fails for a cause that may pass (no connection, no answer in time, a status such as 503) is
    made again, at most `len(PAUSES)` times, each time logged.
    """

    def __init__(self, url: str) -> None:
        self._http = get_protocol(url) in ("http", "https")
        if self._http and (mark := next((one for one in url if one in "?#"), "")):
            # What follows may be a secret, so the message leaves it out.
            raise WanmoeError(
                f"{url.partition(mark)[0]}: a root takes no query or fragment, got one after {mark!r}; give "
                "the folder's plain URL, or s3:// or gs:// where reading needs a key"
            )
        self.url = url.rstrip("/")
        self._process = 0
        try:
            self._connected()
        except ImportError as error:
            package = known_implementations[get_protocol(self.url)]["class"].split(".")[0]
            raise WanmoeError(f"{url}: cannot be opened: {error}: pip install {package}") from error
        except ValueError as error:
            raise WanmoeError(f"{url}: cannot be opened: {error}") from error

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        limits: dict[str, int] = {}
        if offset or size is not None:
            limits["start"] = offset
        if size is not None:
            limits["end"] = offset + size
        file = self._file(name)

        def request() -> bytes:
            try:
                return bytes(self._connected().cat_file(file, **limits))
            except aiohttp.ClientResponseError as error:
                if error.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise
                return b""  # the file ends before `offset`

        data = self._tried(name, request)
        if size is not None and len(data) > size:
            raise OSError(f"asked for {size} bytes, got {len(data)}: the server does not serve byte ranges")
        return data

    def size(self, name: str) -> int:
        file = self._file(name)
        size = self._tried(name, lambda: self._connected().size(file))
        if size is None:
            raise OSError("the server does not say how large the file is")
        return int(size)

    @staticmethod
    def pause(seconds: float) -> None:
        """Wait before a request is made again."""
        time.sleep(seconds)

    def _tried(self, name: str, request: Callable[[], _T]) -> _T:
        for number, seconds in enumerate(PAUSES, 1):
            try:
                with _as_os_errors():
                    return request()
            except OSError as error:
                if not _may_pass(error):
                    raise
                facts = (self.path(name), error, number, len(PAUSES), seconds)
                _log.warning("%s: %s; try again (%d of %d) in %g s", *facts)
            self.pause(seconds)
        with _as_os_errors():
            return request()

    def _connected(self) -> Any:
        # A connection does not survive a fork: each reader process makes its own.
        if self._process != os.getpid():
            options: dict[str, Any] = {}
            if self._http:
                options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(**TIME_LIMITS)}
            self._system, self._folder = fsspec.url_to_fs(self.url, **options)
            self._process = os.getpid()
        return self._system

    def _file(self, name: str) -> str:
        return f"{self._folder}/{_checked(name)}"


def open_store(root: str | Path) -> Store:
    """The store of a folder or URL; `WanmoeError` where no library opens such a URL."""
    return RemoteStore(str(root)) if is_url(root) else LocalStore(Path(root))


def is_url(root: str | Path) -> bool:
    """Whether a root is a URL; `pathlib` folds the two slashes of one, so it must come as text."""
    return "://" in str(root)


def _checked(name: str) -> str:
    """A file's name as given, if it names one in the folder: an index may hold any text."""
    if not name.strip(".") or "/" in name or "\\" in name:
        raise OSError(f"{name!r} is no name of a file in this folder")
    return name


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Errors of the libraries behind fsspec as `OSError` with a text, which not all of them are or have."""
    try:
        yield
    except FileNotFoundError as error:
        # fsspec says so of any failure to learn a size.
        cause = error.__cause__
        if not isinstance(cause, _HTTP_FAULTS) or getattr(cause, "status", None) == HTTPStatus.NOT_FOUND:
            raise
        raise OSError(f"{type(cause).__name__}: {cause}") from cause
    except TimeoutError as error:
        raise TimeoutError(str(error) or "no answer in time") from error
    except OSError:
        raise
    except _HTTP_FAULTS + _s3_faults() as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _s3_faults() -> tuple[type[Exception], ...]:
    # botocore comes with s3fs, which only who reads from S3 has.
    botocore = sys.modules.get("botocore.exceptions")
    return () if botocore is None else (botocore.BotoCoreError,)


def _may_pass(error: OSError) -> bool:
    """Whether a failed request is worth another try."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.ClientResponseError):
        return cause.status >= HTTPStatus.INTERNAL_SERVER_ERROR or cause.status in _PASSING_STATUS
    # s3fs has made its own tries before it lets an error through.
    return not isinstance(error, _LASTING) and not isinstance(cause, (aiohttp.InvalidURL, *_s3_faults()))
