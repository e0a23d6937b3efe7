"""Where the files of a folder of shards lie: on a disk, or behind a URL that fsspec opens."""

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import fsspec
from fsspec.registry import known_implementations
from fsspec.utils import get_protocol

from ...moe_lora.errors import WanmoeError


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
    """A folder behind a URL; parts of a file are read by byte ranges."""

    def __init__(self, url: str) -> None:
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
        with _as_os_errors():
            try:
                data = bytes(self._connected().cat_file(self._file(name), **limits))
            except aiohttp.ClientResponseError as error:
                if error.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise
                return b""  # the file ends before `offset`
        if size is not None and len(data) > size:
            raise OSError(f"asked for {size} bytes, got {len(data)}: the server does not serve byte ranges")
        return data

    def size(self, name: str) -> int:
        with _as_os_errors():
            size = self._connected().size(self._file(name))
        if size is None:
            raise OSError("the server does not say how large the file is")
        return int(size)

    def _connected(self) -> Any:
        # A connection does not survive a fork: each reader process makes its own.
        if self._process != os.getpid():
            self._system, self._folder = fsspec.url_to_fs(self.url)
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
    """Errors of the libraries behind fsspec as `OSError`, which not all of them are."""
    try:
        yield
    except OSError:
        raise
    except _other_faults() as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _other_faults() -> tuple[type[Exception], ...]:
    # botocore comes with s3fs, which only who reads from S3 has.
    botocore = sys.modules.get("botocore.exceptions")
    s3 = () if botocore is None else (botocore.BotoCoreError,)
    return aiohttp.ClientError, asyncio.TimeoutError, *s3
