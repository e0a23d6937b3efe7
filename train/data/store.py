"""Where the files of a folder of shards lie: on a disk, or behind a URL that fsspec opens."""

from pathlib import Path
from typing import Protocol

import fsspec

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
        with (self.root / name).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size


class RemoteStore:
    """A folder behind a URL; parts of a file are read by byte ranges."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.system, _ = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise WanmoeError(f"{url}: cannot be opened: {error}") from error

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        if size is None and not offset:
            return bytes(self.system.cat_file(self.path(name)))
        end = None if size is None else offset + size
        return bytes(self.system.cat_file(self.path(name), start=offset, end=end))

    def size(self, name: str) -> int:
        return int(self.system.size(self.path(name)))


def open_store(root: str | Path) -> Store:
    """The store of a folder or URL; `WanmoeError` where no library opens such a URL."""
    return RemoteStore(str(root)) if is_url(root) else LocalStore(Path(root))


def is_url(root: str | Path) -> bool:
    """Whether a root is a URL; `pathlib` folds the two slashes of one, so it must come as text."""
    return "://" in str(root)
