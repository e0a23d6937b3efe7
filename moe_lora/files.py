"""Files that appear whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import WanmoeError

if TYPE_CHECKING:
    from hashlib import _Hash

_PIECE = 1 << 22
"""Bytes hashed at a time."""


def write_atomic(
    path: str | Path, write: Callable[[Path], object], errors: tuple[type[Exception], ...] = ()
) -> None:
    """Lets `write` make a file under a temporary name, flushes it to disk, then renames it into place.

    The temporary file lies beside the target and is removed whatever happens.

    Args:
        write: is given the temporary path and writes the whole file there.
        errors: what `write` raises, besides OSError, when the file cannot be written.

    Raises:
        WanmoeError: names the target and the cause; a former file of that name is as it was.
    """
    path = Path(path)
    failures: tuple[type[Exception], ...] = (OSError, *errors)
    # Not mkstemp: that makes files which only their owner may read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except failures as error:
        cause = getattr(error, "strerror", None) or error
        raise WanmoeError(f"{path}: could not be written ({cause}); nothing was replaced") from error
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file as hex, what `sha256sum` prints; raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()


def feed(digest: _Hash, path: str | Path) -> None:
    """Adds the bytes of a file to a digest, piece by piece; raises OSError where it cannot be read."""
    with Path(path).open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
