"""A tar file that is the same, byte for byte, whoever writes it and when."""

import hashlib
import math
import os
from io import BufferedWriter
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarInfo


class TarFile:
    """A USTAR file written member by member with all dates and owners zero; knows its offsets and SHA-256."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.size = 0
        self.samples = 0
        self._file: BufferedWriter = path.open("wb")
        self._sha = hashlib.sha256()

    def append(self, name: str, data: bytes) -> int:
        """Write one member; returns the offset of its data."""
        info = TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        self._write(info.tobuf(USTAR_FORMAT, encoding="utf-8", errors="strict"))
        offset = self.size
        self._write(data)
        self._write(b"\0" * (-len(data) % BLOCKSIZE))
        return offset

    def close(self) -> str:
        """End the archive; returns its SHA-256."""
        self._write(b"\0" * (math.ceil((self.size + 2 * BLOCKSIZE) / RECORDSIZE) * RECORDSIZE - self.size))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha.hexdigest()

    def abandon(self) -> None:
        """Close the file after a failure; what its buffer still holds is not wanted."""
        try:
            self._file.close()
        except OSError:
            self._file.raw.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.size += len(data)
