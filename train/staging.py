"""A folder that appears whole or not at all: written beside its target, swapped in by rename."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..moe_lora.errors import WanmoeError


class Staging:
    """A hidden folder beside `target`; `publish` puts it in the target's place, `discard` removes it.

    `ours` says of a name directly inside an existing target whether a former run wrote it: a folder that
    holds anything else is never replaced (`WanmoeError`).
    """

    def __init__(self, target: str | Path, ours: Callable[[str], bool]) -> None:
        self.target = Path(target).absolute()
        if self.target.exists():
            if not self.target.is_dir():
                raise WanmoeError(f"{target}: is a file; name a folder to write to")
            foreign = sorted(entry.name for entry in self.target.iterdir() if not ours(entry.name))
            if foreign:
                raise WanmoeError(
                    f"{target}: holds other files ({', '.join(foreign[:3])}) and would be replaced; "
                    "name a new or empty folder"
                )
        prefix = f".{self.target.name}.partial-{socket.gethostname()}-"
        self.path = self.target.with_name(f"{prefix}{os.getpid()}")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.target.parent, prefix)
            self.path.mkdir()
        except OSError as error:
            raise WanmoeError(f"{target}: cannot be written: {error.strerror}") from error

    def publish(self) -> None:
        """Swap the folder in; a former target is removed after the new one is in its place."""
        old = self.path.with_name(self.path.name + "-old")
        if self.target.exists():
            os.rename(self.target, old)
        os.rename(self.path, self.target)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written; the target stays as it was."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def staged_folder(target: str | Path, ours: Callable[[str], bool]) -> Iterator[Path]:
    """The folder to write into; published when the block ends well, discarded when it raises.

    An `OSError` inside, such as no space left, becomes a `WanmoeError` that names the target.
    """
    staging = Staging(target, ours)
    try:
        yield staging.path
        staging.publish()
    except OSError as error:
        raise WanmoeError(
            f"{target}: could not be written, nothing was kept: {error.strerror or error}"
        ) from error
    finally:
        staging.discard()


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove what killed runs on this host left behind."""
    for entry in parent.iterdir():
        owner = entry.name.removeprefix(prefix).removesuffix("-old")
        if entry.name.startswith(prefix) and owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
