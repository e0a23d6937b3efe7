"""Finished samples on disk until all are there: what lets a killed `prepare` go on where it was.

The folder `<out>.work` beside the shards holds `plan.json` (all that decides the samples), a safetensors file
for each finished sample and each encoded caption, with its SHA-256, and `lock`, which the process that writes
there holds.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import write_atomic
from .router_prompts import RouterPrompt

_PLAN, _LOCK, _STOP = "plan.json", "lock", "stop"


class DamagedError(WanmoeError):
    """A file of the folder that cannot be read, or that is not what was written."""


class Spool:
    """The folder of finished samples of one `prepare`; as a context manager it is locked and put away.

    `with` is for the one process that `open`s the folder; others of the same job only read and write files.
    When its block ends well the folder is removed, and otherwise only if nothing in it is finished.
    """

    def __init__(self, out: str | Path) -> None:
        out = Path(out).absolute()
        self.folder = out.with_name(out.name + ".work")
        self._lock: IO[str] | None = None

    def open(self, recipe: Mapping[str, Any]) -> str | None:
        """Lock the folder and keep its samples if they were made by an equal `recipe` (JSON values).

        Returns why former samples were removed, None where none were. Raises `WanmoeError` where another
        process holds the folder.
        """
        try:
            self._lock = _locked(self.folder / _LOCK)
            found = self._read_plan()
            why = None if found is None else _difference(found, recipe)
            for left in self.folder.iterdir():
                stale = why is not None and left.name not in (_PLAN, _LOCK)
                # Half-written files of a killed process, and its wish to stop.
                if stale or left.name == _STOP or left.name.endswith(".partial"):
                    left.unlink()
        except OSError as error:
            raise WanmoeError(f"{self.folder}: cannot be written: {error.strerror}") from error
        if found is None or why is not None:
            text = json.dumps(recipe, ensure_ascii=False, indent=1) + "\n"
            write_atomic(self.folder / _PLAN, lambda partial: partial.write_text(text, "utf-8"))
        return why

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        if kind is None or not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        self._lock = None

    def put(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write a finished sample, whole or not at all; `meta` are JSON values."""
        text = json.dumps(meta, ensure_ascii=False)
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        data = save(whole, metadata={"meta": text, "sha256": tensors_sha256(whole, text)})
        write_atomic(self.path(name), lambda partial: partial.write_bytes(data))

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and `meta` of a finished sample; `DamagedError` where they are not what was written."""
        path = self.path(name)
        try:
            with safe_open(path, "pt") as file:
                head = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path}: cannot be read: {error}") from error
        text = head.get("meta", "")
        if head.get("sha256") != tensors_sha256(tensors, text):
            raise DamagedError(f"{path}: damaged: its checksum differs; run the same command again")
        return tensors, dict(json.loads(text))

    def sound(self, name: str) -> bool | None:
        """Whether a sample is finished and undamaged; None where it is not there."""
        if not self.path(name).is_file():
            return None
        try:
            self.get(name)
        except DamagedError:
            return False
        return True

    def count(self) -> int:
        """How many samples are there, of all processes of the job; captions do not count."""
        names = (entry.name for entry in os.scandir(self.folder))
        return sum("_" in name and name.endswith(".safetensors") for name in names)

    def path(self, name: str) -> Path:
        """The file of a sample."""
        return self.folder / f"{name}.safetensors"

    def stop(self) -> None:
        """Ask every process of the job to stop after the sample that it is at."""
        (self.folder / _STOP).touch()

    @property
    def stopping(self) -> bool:
        """Whether a process of the job asked to stop."""
        return (self.folder / _STOP).exists()

    def _read_plan(self) -> dict[str, Any] | None:
        path = self.folder / _PLAN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def text_name(caption: str) -> str:
    """The name under which an encoded caption is kept."""
    return f"text-{hashlib.sha256(caption.encode()).hexdigest()[:32]}"


def prompts_name(prompts: Sequence[RouterPrompt]) -> str:
    """The name under which the pooled embeddings of texts that are encoded together are kept."""
    texts = json.dumps([prompt.text for prompt in prompts])
    return f"prompts-{hashlib.sha256(texts.encode()).hexdigest()[:32]}"


def _locked(path: Path) -> IO[str]:
    """The lock's file, held until it is closed; the kernel lets go of it when the process dies."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read() or "another process"
            file.close()
            raise WanmoeError(
                f"{path.parent}: {owner} is preparing there; wait for it, or give another --out"
            ) from error
        # Who held it before may have removed the folder between the two calls: then this file is nowhere.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first thing in which two recipes differ, in words; None where they are the same."""
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if old == new:
            continue
        if key == "samples" and isinstance(old, dict) and isinstance(new, dict):
            changed = sum(old.get(name) != digest for name, digest in new.items())
            return f"the clips differ: {changed} new or changed, {len(old.keys() - new.keys())} gone"
        if isinstance(old, dict) and isinstance(new, dict):
            name = next(name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))
            return f"{key}.{name} is {new.get(name)}, it was {old.get(name)}"
        return f"{key} is {new}, it was {old}"
    return None if list(found.get("samples", ())) == list(wanted.get("samples", ())) else "another order"


def tensors_sha256(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of a text and of tensors on the CPU: of values, since files have no fixed order."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
