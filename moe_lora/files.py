"""Files that appear whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import logging
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
REMEMBERED_BYTES = 1_000_000_000
"""From this size on, `remembered_sha256` keeps what it found."""

_log = logging.getLogger(__name__)


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
        # safetensors makes its files readable by their owner alone.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
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


def remembered_sha256(path: str | Path) -> str:
    """`file_sha256`, which for a large file is read again from the user's cache while the file is unchanged.

    Hashing a model takes as long as loading it. Unchanged is: same path, size and time of change to the
    nanosecond. Raises OSError where the file cannot be read.
    """
    path = Path(path).resolve()
    state = path.stat()
    if state.st_size < REMEMBERED_BYTES:
        return file_sha256(path)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    record = home / "wanmoe" / "sha256" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    known = {"path": str(path), "bytes": state.st_size, "changed": state.st_mtime_ns}
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
        if isinstance(stored, dict) and "sha256" in stored and {**stored, **known} == stored:
            return str(stored["sha256"])
    except (OSError, ValueError):
        pass  # nothing remembered yet, or not readably
    digest = file_sha256(path)
    text = json.dumps(known | {"sha256": digest})
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, lambda partial: partial.write_text(text, encoding="utf-8"))
    except (OSError, WanmoeError) as error:
        _log.info("the sha256 of %s is not remembered: %s", path, error)
    return digest


def feed(digest: _Hash, path: str | Path) -> None:
    """Adds the bytes of a file to a digest, piece by piece; raises OSError where it cannot be read."""
    with Path(path).open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
