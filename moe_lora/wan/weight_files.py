"""Finding weight files and opening them lazily: safetensors, shards with or without an index, torch files."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import WanmoeError

__all__ = [
    "StoredTensor",
    "Weights",
    "WeightsError",
    "check_tensors",
    "fill_module",
    "open_weights",
    "weight_files",
]

_log = logging.getLogger(__name__)

_LISTED = 8
"""Names of each kind that an error lists."""


_INDEX = ".safetensors.index.json"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
_WRAPPERS = ("state_dict", "model", "module")


class WeightsError(WanmoeError):
    """A weights file that cannot be read, or that does not hold the model it should."""


class StoredTensor(NamedTuple):
    """A tensor that is still on disk (or in the caller's state dict)."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    rows: Callable[[int, int], Tensor] | None = None
    """(first, stop) -> these rows of its first dimension, without reading the others."""

    def part(self, first: int, stop: int) -> Tensor:
        """Elements first .. stop - 1 in the order of memory, [stop - first]; rows are read whole."""
        width = math.prod(self.shape[1:])
        start = first // width
        end = -(-stop // width)
        rows = self.read()[start:end] if self.rows is None else self.rows(start, end)
        return rows.reshape(-1)[first - start * width : stop - start * width]


class Weights(NamedTuple):
    """The tensors of one model and what its files say about it."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    """Of the safetensors header."""
    config: dict[str, Any]
    """Of the `config.json` beside the file; empty without one."""
    label: str
    """The file or folder, as errors name it."""
    whole: str | None = None
    """A file that had to be read into memory whole to be opened, if there is one."""


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that hold the model at `path`: a file, one of its shards, an index, or a folder of these.

    Raises WeightsError when there is none, when a shard is missing, or when a folder holds several models.
    """
    path = Path(path)
    if path.is_dir():
        return _files_of_folder(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if path.name.endswith(_INDEX):
        return _files_of_index(path)
    return _shards(path) or [path]


def _files_of_folder(folder: Path) -> list[Path]:
    found = sorted(folder.glob(f"*{_INDEX}"))
    if not found:
        found = sorted(folder.glob("*.safetensors"))
        sets = {match["stem"] + match["count"] for file in found if (match := _SHARD.match(file.name))}
        if len(sets) == 1 and all(_SHARD.match(file.name) for file in found):
            found = found[:1]
    if not found:
        found = sorted(file for file in folder.iterdir() if file.suffix in _TORCH_SUFFIXES)
    if len(found) == 1:
        return weight_files(found[0])
    if found:
        names = ", ".join(file.name for file in found[:8])
        raise WeightsError(f"{folder}: holds {len(found)} weight files ({names}); name the one to load")
    inside = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
    advice = f"; did you mean one of its folders {', '.join(inside)}?" if inside else ""
    raise WeightsError(f"{folder}: no .safetensors or .pth file in this folder{advice}")


def _files_of_index(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: not a shard index: it has no 'weight_map'")
    return _existing([index.parent / name for name in sorted(set(weight_map.values()))], index)


def _shards(file: Path) -> list[Path]:
    match = _SHARD.match(file.name)
    if match is None:
        return []
    stem, count = match["stem"], match["count"]
    names = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    return _existing([file.with_name(name) for name in names], file.parent)


def _existing(files: list[Path], source: Path) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        listed = ", ".join(missing[:8])
        raise WeightsError(f"{source}: {len(missing)} of {len(files)} shards are missing: {listed}")
    return files


def open_weights(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Weights:
    """Names, shapes and lazy readers of every tensor in `source`, a path or a state dict.

    Raises WeightsError for what is no weights file, is cut short, or names a tensor twice.
    """
    if isinstance(source, Mapping):
        return Weights(_from_mapping(source, "state dict"), {}, {}, "state dict")
    files = weight_files(source)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    whole: str | None = None
    for file in files:
        if file.suffix in _TORCH_SUFFIXES:
            found = _from_torch(file)
            whole = whole if zipfile.is_zipfile(file) else str(file)
        else:
            found, header = _from_safetensors(file)
            metadata |= header
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise WeightsError(f"{file}: tensor {twice[0]} is in another shard too ({len(twice)} such)")
        tensors |= found
    config_file = files[0].with_name("config.json")
    config = _read_json(config_file) if config_file.is_file() else {}
    return Weights(tensors, metadata, config, str(Path(source)), whole)


def _from_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    try:
        handle = safe_open(str(file), framework="pt")
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{file}: not a whole safetensors file ({error}); download or copy it again"
        ) from error

    def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(
            shape,
            lambda: handle.get_tensor(name),
            lambda first, stop: handle.get_slice(name)[first:stop],
        )

    return {name: stored(name, shape) for name, shape in shapes.items()}, handle.metadata() or {}


def _from_torch(file: Path) -> dict[str, StoredTensor]:
    try:
        mapped = zipfile.is_zipfile(file)
        if not mapped:
            _log.info("%s is in the torch format of before 1.6 and is read into memory whole", file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:  # whose own text advises to run what the file holds
        raise WeightsError(
            f"{file}: not a whole torch file of plain tensors (it is cut short, or holds code, which is not "
            "run); convert it to safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{file}: not a whole torch file of plain tensors ({cause}); convert it to safetensors"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{file}: holds a {type(content).__name__}, not a dict of tensors")
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return _from_mapping(content, str(file))


def _from_mapping(content: Mapping[str, Any], label: str) -> dict[str, StoredTensor]:
    other = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise WeightsError(f"{label}: {other[0]!r} is not a tensor ({len(other)} such entries)")

    def stored(value: Tensor) -> StoredTensor:
        return StoredTensor(
            tuple(value.shape), lambda: value.detach(), lambda first, stop: value.detach()[first:stop]
        )

    return {name: stored(value) for name, value in content.items()}


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], named: Mapping[str, StoredTensor], label: str
) -> None:
    """Raises WeightsError that lists the tensors that are missing, of no use, or of another shape."""
    missing = [name for name in expected if name not in named]
    extra = [name for name in named if name not in expected]
    wrong = [
        f"{name} {named[name].shape} (expected {shape})"
        for name, shape in expected.items()
        if name in named and named[name].shape != shape
    ]
    faults = {"missing": missing, "extra": extra, "misshapen": wrong}
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
            for kind, names in faults.items()
            if names
        )
        raise WeightsError(f"{label}: does not hold this model ({len(expected)} tensors): {listed}")


def fill_module(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    label: str,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> None:
    """Reads the parameters of a module that was made on the meta device, one at a time, frozen.

    So no second copy of the model is held. Parameters that are one stay one and are read once. dtype=None
    keeps the stored dtype. Raises WeightsError where the names, shapes or dtypes do not fit.
    """
    empty = dict(module.named_parameters(remove_duplicate=False))
    check_tensors({name: tuple(p.shape) for name, p in empty.items()}, stored, label)
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in empty.items():
        if id(parameter) not in filled:
            tensor = stored[name].read()
            if dtype is None and (not tensor.is_floating_point() or tensor.itemsize == 1):
                raise WeightsError(
                    f"{label}: {name} is stored as {tensor.dtype}, which cannot be computed in; "
                    "give a dtype to convert to, e.g. bfloat16"
                )
            # A copy even where nothing changes: a mapped file may be replaced under a running job.
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
            filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, filled[id(parameter)])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content
