"""What a folder of shards must hold: the fields of its manifest and index, and the tensors and facts of a
sample's parts.

Letters: F, H, W latent frames, height, width; n tokens of the caption; D width of the text encoder.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from tarfile import BLOCKSIZE
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from .shards import FLOW, LATENT, META, ROI, TEXT, TEXTS

_HALVES = (torch.float16, torch.bfloat16)
_BYTES = (torch.uint8,)
_Name = Annotated[str, Field(pattern=r"^[^./\\]+$")]
_ShardName = Annotated[str, Field(pattern=r"^[^/\\]+\.tar$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Place(_Strict):
    offset: int = Field(ge=BLOCKSIZE, multiple_of=BLOCKSIZE)
    size: NonNegativeInt
    crc32: NonNegativeInt


class _Instrument(_Strict):
    name: str
    weight: float


class _TextRow(_Strict):
    key: _Name
    shard: _ShardName
    parts: dict[str, _Place]


class _SampleRow(_TextRow):
    split: str
    bucket: str = Field(pattern=r"^[1-9]\d*x[1-9]\d*x[1-9]\d*$")
    text: str
    instruments: list[_Instrument]
    region: bool | None = None


class _Shard(_Strict):
    name: _ShardName
    bytes: NonNegativeInt
    sha256: str
    n_samples: int


class _Prompts(_Strict):
    n: PositiveInt
    bytes: NonNegativeInt
    sha256: str


class _Manifest(_Strict):
    codec: dict[str, Any]
    text_encoder: dict[str, Any]
    text_dim: PositiveInt
    image_latents: bool
    n_samples: dict[str, int]
    n_texts: int
    histogram: dict[str, dict[str, float]]
    index: dict[str, Any] = Field(min_length=1)
    shards: list[_Shard]
    router_prompts: _Prompts | None = None


def manifest_fault(manifest: Mapping[str, Any]) -> str | None:
    """What of a manifest is missing or of a wrong kind; None where it is as it should be."""
    return _shape_fault(_Manifest, manifest)


def row_fault(row: Any) -> str | None:
    """What of a row of the index is missing or of a wrong kind; None where it is as it should be."""
    text = isinstance(row, dict) and row.get("split") == TEXTS
    if fault := _shape_fault(_TextRow if text else _SampleRow, row):
        return fault
    needed, known = ({TEXT}, {TEXT}) if text else ({LATENT, META}, {LATENT, ROI, FLOW, META})
    if missing := sorted(needed - row["parts"].keys()):
        return f"sample {row['key']} has no part {missing[0]}"
    if foreign := sorted(row["parts"].keys() - known):
        return f"sample {row['key']} has a part {foreign[0]!r}; parts are {', '.join(sorted(known))}"
    return None


def content_faults(
    row: Mapping[str, Any], parts: Mapping[str, bytes], manifest: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(part, what is wrong) of a sample or text, from the bytes of its parts."""
    if TEXT in parts:
        text = parts[TEXT]
        faults = _tensor_faults(text, {"context": (_HALVES, (None, manifest["text_dim"]))}, ())
        if hashlib.sha256(text).hexdigest()[:16] != row["key"]:
            faults.append("the text is not the one that its key says")
        return [(TEXT, fault) for fault in faults]
    size = frames, height, width = tuple(int(n) for n in row["bucket"].split("x"))
    latents: dict[str, Any] = {"latent": (_HALVES, (16, *size))}
    if manifest["image_latents"]:
        latents["image_latent"] = (_HALVES, (20, *size))
    masks = {"roi": (_BYTES, size), "picture": (_BYTES, (height, width))}
    motion = {
        "flow": (_HALVES, (frames - 1, 2, height, width)),
        "visible": (_BYTES, (frames - 1, height, width)),
    }
    found = [(LATENT, fault) for fault in _tensor_faults(parts[LATENT], latents, ())]
    if ROI in parts:
        found += [(ROI, fault) for fault in _tensor_faults(parts[ROI], masks, masks)]
    if FLOW in parts:
        found += [(FLOW, fault) for fault in _tensor_faults(parts[FLOW], motion, ())]
    return found + [(META, fault) for fault in _meta_faults(row, parts[META], manifest)]


def _tensor_faults(data: bytes, wanted: Mapping[str, Any], optional: Collection[str]) -> list[str]:
    """What is wrong with a safetensors part that should hold tensors of these dtypes and shapes."""
    try:
        tensors = load(data)
    except SafetensorError as error:
        return [f"not a safetensors file: {error}"]
    missing = [name for name in wanted if name not in tensors and name not in optional]
    faults = [f"holds no tensor {name!r}" for name in missing]
    faults += [f"holds a tensor {name!r}, which no part has" for name in sorted(tensors.keys() - wanted)]
    for name, (dtypes, shape) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or not _fits(tensor, shape):
            kind = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            sizes = ", ".join("n" if size is None else str(size) for size in shape)
            faults.append(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, "
                f"expected {kind} [{sizes}]"
            )
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            faults.append(f"{name} holds NaN or infinity")
    return faults


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    sizes = zip(tensor.shape, shape, strict=False)
    return tensor.ndim == len(shape) and all(
        has == wants or (wants is None and has > 0) for has, wants in sizes
    )


def _meta_faults(row: Mapping[str, Any], data: bytes, manifest: Mapping[str, Any]) -> list[str]:
    try:
        meta = json.loads(data)
    except ValueError as error:
        return [f"not JSON: {error}"]
    if not isinstance(meta, dict):
        return [f"is a JSON {type(meta).__name__}, not an object"]
    faults = [
        f"{name} is {meta.get(name)!r}, the index says {row.get(name)!r}"
        for name in ("key", "split", "bucket", "text", "instruments", "region")
        if meta.get(name) != row.get(name)
    ]
    faults += [
        f"encoded with another {name}: {meta.get(name)}, the manifest says {manifest[name]}"
        for name in ("codec", "text_encoder")
        if meta.get(name) != manifest[name]
    ]
    if not isinstance(meta.get("caption"), str):
        faults.append("has no caption")
    if meta.get("normalised") is not True:
        faults.append("the latent is not marked as normalised")
    return faults


def _shape_fault(model: type[BaseModel], value: Any) -> str | None:
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        return f"{where or 'the row'}: {first['msg']}; the value is {str(first['input'])[:60]!r}"
    return None
