"""Reading and writing the weights of a DiT in the layouts that users have.

The original Wan names are ours. ComfyUI puts `model.diffusion_model.` before them; diffusers renames them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import WanmoeError
from ..files import remembered_sha256, write_atomic
from .config import WanConfig
from .dit import WanDiT
from .weight_files import StoredTensor, Weights, WeightsError, check_tensors, open_weights, weight_files

if TYPE_CHECKING:
    from ..block_store import BlockStore
    from ..lora_merge import LoRAMerge, LoRASpec

__all__ = [
    "CONFIG_KEY",
    "OpenDiT",
    "WeightsError",
    "check_computable",
    "dit_hash",
    "load_dit",
    "open_dit",
    "read_dit_config",
    "save_dit",
    "to_diffusers",
    "to_original",
]

CONFIG_KEY = "wanmoe_config"
"""Metadata key under which `save_dit` stores the WanConfig as JSON."""

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.")

# Original name -> diffusers name, of the modules outside the blocks and inside one.
_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
_PROJECTIONS = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_IMAGE_PROJECTIONS = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # the norm before cross-attention; what diffusers calls norm3 has no weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    **{
        f"cross_attn.{ours}": f"attn2.{theirs}"
        for ours, theirs in (_PROJECTIONS | _IMAGE_PROJECTIONS).items()
    },
}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in _BLOCK.items()}
_BLOCK_NAME = re.compile(r"^blocks\.\d+\.")
_IMAGE_CHANNELS = 20
_HEAD_DIM = 128
# What the original config.json calls a model of first and last frame is i2v with another mask.
_TASKS = {"flf2v": "i2v"}
_UNUSED = ".attn2.norm_added_q.weight"
_NAME = re.compile(r"^(?P<block>blocks\.\d+\.)?(?P<stem>.+?)(?P<leaf>\.weight|\.bias)?$")


def to_diffusers(name: str) -> str:
    """The diffusers name of an original parameter name; a name that is not known stays as it is."""
    return _rename(name, _TOP, _BLOCK)


def to_original(name: str) -> str:
    """The original name of a diffusers parameter name; a name that is not known stays as it is."""
    return _rename(name, _TOP_BACK, _BLOCK_BACK)


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = _NAME.match(name)
    if match is None:
        return name
    where, stem, leaf = match["block"] or "", match["stem"], match["leaf"] or ""
    return where + (block if where else top).get(stem, stem) + leaf


def load_dit(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: WanConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    loras: Sequence[LoRASpec] = (),
    store: BlockStore | None = None,
) -> WanDiT:
    """A frozen WanDiT from a file, a folder of shards, an index or a state dict.

    Names may be original, diffusers' or ComfyUI's. Without `config` the sizes are read from the tensors, and
    what those do not show (heads, text length, task) from the file's metadata or the `config.json` beside it;
    heads are dim / 128 if neither says. `dtype=None` keeps the stored dtype. Tensors are read one at a time,
    so no second copy of the model is held; `loras` are merged into them on the way. The blocks go to `store`,
    if it is given, and the rest to `device`. Raises WeightsError that names the file and lists the keys at
    fault, WanmoeError for a LoRA that does not fit.
    """
    dit, named, label, _ = open_dit(source, config)
    expected = {name: tuple(p.shape) for name, p in dit.state_dict().items()}
    merge = _merge(loras, expected) if loras else None
    if store is not None and not len(store):
        store.lay_out(list(dit.blocks), lambda name: dtype or named[name].part(0, 1).dtype)

    def read(name: str) -> Tensor:
        tensor = named[name].read()
        check_computable(name, tensor, dtype, label)
        return tensor if merge is None else merge.apply(name, tensor.to(device), dtype)

    for name in expected:
        parameter = None if store is None else store.put(name, partial(read, name))
        if parameter is None:
            # A copy even where nothing changes: a mapped file may be replaced under a running job.
            tensor = read(name).to(device=device, dtype=dtype, copy=True)
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(dit.get_submodule(module), leaf, parameter)
    return dit.eval()


class OpenDiT(NamedTuple):
    """A DiT whose weights are still on disk."""

    dit: WanDiT
    """On the meta device."""
    named: dict[str, StoredTensor]
    """By original name, just those of the model."""
    label: str
    whole: str | None
    """A file that could only be opened by reading all of it, if there is one."""


def open_dit(
    source: str | os.PathLike[str] | Mapping[str, Tensor], config: WanConfig | None = None
) -> OpenDiT:
    """The model that `source` holds, checked against it, without its values; arguments and errors as in
    `load_dit`."""
    weights = open_weights(source)
    named = _original_names(weights)
    if config is None:
        config = _config_of(named, weights)
    with torch.device("meta"):
        dit = WanDiT(config)
    expected = {name: tuple(p.shape) for name, p in dit.state_dict().items()}
    check_tensors(expected, named, weights.label)
    return OpenDiT(dit, named, weights.label, weights.whole)


def check_computable(name: str, tensor: Tensor, dtype: torch.dtype | None, label: str) -> None:
    """Raises WeightsError where a stored tensor cannot be computed in and no dtype to convert to is given."""
    if dtype is None and (not tensor.is_floating_point() or tensor.itemsize == 1):
        raise WeightsError(
            f"{label}: {name} is stored as {tensor.dtype}, which cannot be computed in; "
            "give a dtype to convert to, e.g. bfloat16"
        )


def _merge(loras: Sequence[LoRASpec], expected: Mapping[str, tuple[int, ...]]) -> LoRAMerge:
    # Not at the top: reading a LoRA takes the tables of names from this module.
    from ..lora_merge import LoRAMerge

    merge = LoRAMerge(loras)
    merge.check(expected)
    return merge


def read_dit_config(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[WanConfig, str]:
    """The WanConfig of a DiT and its layout ("original", "diffusers", "comfyui"), from headers alone.

    What is read from where is as in `load_dit`. Raises WeightsError for what is no Wan DiT.
    """
    weights = open_weights(source)
    config = _config_of(_original_names(weights), weights)
    prefix = _prefix(weights)
    if _is_diffusers(name.removeprefix(prefix) for name in weights.tensors):
        return config, "diffusers"
    return config, "comfyui" if "diffusion_model." in prefix else "original"


def save_dit(dit: WanDiT, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's own weights, original names, as one safetensors file with its WanConfig as metadata.

    `metadata` goes into the header beside that. An attached adapter is left out. The file appears whole or
    not at all; raises WanmoeError if it cannot.
    """
    with torch.device("meta"):
        names = WanDiT(dit.config).state_dict().keys()
    state = dit.state_dict()
    tensors = {name: state[name].detach().to("cpu").contiguous() for name in names}
    header = {**(metadata or {}), "format": "pt", CONFIG_KEY: json.dumps(asdict(dit.config))}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=header), (SafetensorError,))


def dit_hash(dit_path: str | os.PathLike[str]) -> str:
    """sha256 of the weights at a path, as hex: of the file, or of its shards' hashes in the order of names.

    One file gives what `sha256sum file` prints. Raises WeightsError when there is nothing to read.
    """
    digests = [remembered_sha256(file) for file in sorted(weight_files(dit_path))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _original_names(weights: Weights) -> dict[str, StoredTensor]:
    """The tensors under original names, whichever layout they came in."""
    prefix = _prefix(weights)
    stripped = {name.removeprefix(prefix): tensor for name, tensor in weights.tensors.items()}
    if _is_diffusers(stripped):
        named = {to_original(name): tensor for name, tensor in stripped.items()}
        # Early conversions of Wan2.1 i2v hold a norm that no forward reads; diffusers leaves it out too.
        return {name: tensor for name, tensor in named.items() if not name.endswith(_UNUSED)}
    return stripped


def _prefix(weights: Weights) -> str:
    return next((p for p in _PREFIXES if any(name.startswith(p) for name in weights.tensors)), "")


def _is_diffusers(names: Iterable[str]) -> bool:
    return any(name.startswith("condition_embedder.") for name in names)


def _config_of(named: Mapping[str, StoredTensor], weights: Weights) -> WanConfig:
    """The WanConfig that the file states, or that its shapes and the config.json beside it imply."""
    if CONFIG_KEY in weights.metadata:
        return _stated_config(weights.metadata[CONFIG_KEY], weights.label)
    shape = {name: tensor.shape for name, tensor in named.items()}
    marks = {
        "patch_embedding.weight": 5,
        "text_embedding.0.weight": 2,
        "time_embedding.0.weight": 2,
        "blocks.0.ffn.0.weight": 2,
        "head.head.weight": 2,
    }
    absent = [name for name, ndim in marks.items() if len(shape.get(name, ())) != ndim]
    if absent:
        found = ", ".join(sorted(shape)[:4]) or "no tensors"
        raise WeightsError(f"{weights.label}: not a Wan DiT: no {absent[0]}; it holds {found}, ...")
    dim, in_dim, *patch = shape["patch_embedding.weight"]
    out_dim = shape["head.head.weight"][0] // math.prod(patch)
    sizes: dict[str, Any] = {
        "dim": dim,
        "ffn_dim": shape["blocks.0.ffn.0.weight"][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shape if _BLOCK_NAME.match(name)),
        "in_dim": in_dim,
        "out_dim": out_dim,
        "text_dim": shape["text_embedding.0.weight"][1],
        "freq_dim": shape["time_embedding.0.weight"][1],
        "image_dim": (*shape.get("img_emb.proj.1.weight", ()), 0, 0)[1],
        "image_positions": (*shape.get("img_emb.emb_pos", ()), 0, 0)[1],
    }
    if in_dim - out_dim not in (0, _IMAGE_CHANNELS):
        raise WeightsError(
            f"{weights.label}: reads {in_dim} channels and predicts {out_dim}: neither t2v (as many) nor "
            f"i2v ({_IMAGE_CHANNELS} more); this kind of model is not supported"
        )
    stated = _read_config_json(weights)
    for name, size in sizes.items():
        if stated.get(name, size) != size:
            raise WeightsError(
                f"{weights.label}: {name} is {size} in the tensors but {stated[name]} in config.json"
            )
    if "num_heads" not in stated and dim % _HEAD_DIM:
        raise WeightsError(
            f"{weights.label}: the number of heads is not stated and width {dim} is no multiple of "
            f"{_HEAD_DIM}; give a config"
        )
    shown = {"task": "t2v" if in_dim == out_dim else "i2v", "num_heads": dim // _HEAD_DIM}
    try:
        return WanConfig(**{**shown, **stated, **sizes, "patch_size": tuple(patch)})
    except WanmoeError as error:
        raise WeightsError(f"{weights.label}: {error}") from error


def _stated_config(text: str, label: str) -> WanConfig:
    try:
        stated = json.loads(text)
        return WanConfig(**{**stated, "patch_size": tuple(stated["patch_size"])})
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{label}: metadata {CONFIG_KEY!r} is not a WanConfig ({error!r})") from error


def _read_config_json(weights: Weights) -> dict[str, Any]:
    """WanConfig fields that a `config.json` states, be it the original's or diffusers'."""
    raw = weights.config
    stated = {field.name: raw[field.name] for field in fields(WanConfig) if field.name in raw}
    renamed = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
    stated |= {ours: raw[theirs] for ours, theirs in renamed.items() if theirs in raw}
    heads = stated.get("num_heads")
    if isinstance(heads, int) and isinstance(raw.get("attention_head_dim"), int):
        stated["dim"] = heads * raw["attention_head_dim"]
    if "model_type" in raw:
        stated["task"] = _TASKS.get(raw["model_type"], raw["model_type"])
    if "pos_embed_seq_len" in raw:
        stated["image_positions"] = raw["pos_embed_seq_len"] or 0
    if "image_dim" in raw:
        stated["image_dim"] = raw["image_dim"] or 0
    stated.pop("patch_size", None)
    return stated
