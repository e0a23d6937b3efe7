"""What a weights file is: every format that wanmoe reads or writes, told from its headers.

Of the tensors only the up projections of adapters are read: all zero marks an expert that never trained.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ..moe_lora.adapter_file import is_adapter, read_adapter_info
from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import file_sha256
from ..moe_lora.fork_file import is_fork, read_fork, survey_fork
from ..moe_lora.lora_file import noise_expert_of_name, read_lora
from ..moe_lora.wan.codec import CHANNELS
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.model_folder import find_parts
from ..moe_lora.wan.weight_files import Weights, open_weights, weight_files
from ..moe_lora.wan.weights import dit_hash, read_dit_config
from .file_report import ExpertState, FileReport

HASHED_BYTES = 2 << 30
"""Larger files are hashed only when that is asked for: it means reading all of them."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".safetensors.index.json")

_SHARDS_FORMAT = "wanmoe-shards/2"  # of train/data/shards.py, which this room does not import
_LORA_FORMATS = {
    "kohya": "LoRA, kohya/musubi names",
    "comfyui": "LoRA, ComfyUI names",
    "original": "LoRA, original Wan names",
    "diffusers": "LoRA, diffusers names",
    "peft": "LoRA, PEFT",
}
_LORA_KEY = re.compile(r"lora_(A|B|down|up|mid|magnitude)|\.diff(_b|_m)?$|\.(hada|lokr|oft)_|\.dora_scale$")
_SHOWN_METADATA = ("modelspec.title", "modelspec.architecture", "ss_output_name", "ss_base_model_version")
_PROJECTIONS = ("q", "k", "v", "o", "k_img", "v_img", "ffn.0", "ffn.2")
_LATENT_KEY = re.compile(r"^latents_(?P<image>image_)?(?P<f>\d+)x(?P<h>\d+)x(?P<w>\d+)_")
_TEXT_KEY = "varlen_t5_"


class _Component(NamedTuple):
    """A part of a Wan model that is no DiT."""

    name: str
    layout: str
    marks: tuple[str, str]
    """Tensors that it has and no other kind has."""
    blocks: str
    """What stands before the numbers of its blocks."""


_UMT5, _CLIP = "umT5 text encoder", "CLIP image encoder"
_T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q.weight"
_PATCHES, _CLASS = "embeddings.patch_embedding.weight", "embeddings.class_embedding"
_COMPONENTS = (
    _Component("Wan VAE", "original", ("encoder.conv1.weight", "conv2.weight"), ""),
    _Component("Wan VAE", "diffusers", ("encoder.conv_in.weight", "post_quant_conv.weight"), ""),
    _Component(_UMT5, "original", ("token_embedding.weight", "blocks.0.attn.q.weight"), "blocks."),
    _Component(_UMT5, "transformers", ("shared.weight", _T5_LAYER), "encoder.block."),
    _Component(
        _CLIP, "original", ("visual.patch_embedding.weight", "visual.cls_embedding"), "visual.transformer."
    ),
    # transformers has dropped the prefix from what it saves; the files in circulation have it.
    *(
        _Component(_CLIP, "transformers", (f"{at}{_PATCHES}", f"{at}{_CLASS}"), f"{at}encoder.layers.")
        for at in ("vision_model.", "")
    ),
)
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


def inspect_file(
    path: str | Path, *, hash_large: bool = False, config_file: Path | None = None
) -> FileReport:
    """Says what a file or folder of weights, latents or adapters is.

    Args:
        hash_large: compute the sha256 of more than `HASHED_BYTES` too.
        config_file: the fork's config file, for files of it that do not carry their own.

    Raises:
        WanmoeError: there is nothing, it is damaged, or it is of no known kind.
    """
    path = Path(path)
    if not path.exists():
        raise WanmoeError(f"{path}: no such file or folder")
    if (path / "manifest.json").is_file():
        return _shards(path)
    if path.is_dir() and (report := _model_folder(path)):
        return report
    if path.is_file() and not path.name.lower().endswith(SUFFIXES):
        raise WanmoeError(
            f"{path}: not a file that wanmoe reads; it knows {', '.join(SUFFIXES)} and folders of them"
        )
    facts = _facts(path, config_file)
    size = sum(file.stat().st_size for file in weight_files(path))
    digest = dit_hash(path) if hash_large or size <= HASHED_BYTES else None
    return FileReport(**{"path": str(path), "bytes": size, "sha256": digest, **facts})


def _facts(path: Path, config_file: Path | None) -> dict[str, Any]:
    """Fields of the report that depend on the kind."""
    if is_fork(path):
        return _fork(path, config_file)
    if config_file is not None:
        raise WanmoeError(f"{path}: is no LoRA-MoE file of the fork; leave --lora_moe_config_file out")
    if is_adapter(path):
        return _adapter(path)
    weights = open_weights(path)
    names = weights.tensors.keys()
    stored = _stored(path, weights)
    if any(_LATENT_KEY.match(name) or name.startswith(_TEXT_KEY) for name in names):
        return stored | _musubi_cache(weights)
    if any(_LORA_KEY.search(name) for name in names):
        return stored | _lora(path)
    if component := _component(weights):
        return stored | component
    if any(name.endswith("patch_embedding.weight") for name in names):
        return stored | _dit(path)
    first = ", ".join(sorted(names)[:4]) or "no tensors"
    raise WanmoeError(
        f"{path}: none of the models, adapters and caches that wanmoe knows; it holds {first}"
        + (f" and {len(names) - 4} more tensors" if len(names) > 4 else "")
    )


def _stored(path: Path, weights: Weights) -> dict[str, Any]:
    """Values in all, and by dtype."""
    dtypes: Counter[str] = Counter()
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    dtype = handle.get_slice(name).get_dtype()
                    dtypes[_DTYPES.get(dtype, dtype)] += math.prod(weights.tensors[name].shape)
        else:  # mapped: asking for a tensor reads nothing
            for tensor in weights.tensors.values():
                dtypes[str(tensor.read().dtype).removeprefix("torch.")] += math.prod(tensor.shape)
    return {"parameters": dtypes.total(), "dtypes": dict(dtypes.most_common())}


def _adapter(path: Path) -> dict[str, Any]:
    info = read_adapter_info(path)
    weights = open_weights(path)
    ranks: dict[str, list[tuple[str, int]]] = {"base": [], "experts": []}
    trained = torch.zeros(len(info.adapter.experts), dtype=torch.bool)
    base_trained = False
    for name, tensor in weights.tensors.items():
        linear, _, leaf = name.rpartition(".")
        if leaf in ("base_up", "expert_up"):
            ranks["base" if leaf == "base_up" else "experts"].append((linear, tensor.shape[-1]))
        if leaf == "base_up":
            base_trained = base_trained or bool(tensor.read().any())
        if leaf == "expert_up":
            trained |= tensor.read().flatten(1).any(1)
    experts = zip(info.adapter.experts, trained.tolist(), strict=True)
    return _stored(path, weights) | {
        "format": f"adapter of wanmoe ({weights.metadata['format']})",
        "task": info.task,
        "noise_expert": info.noise_expert,
        "linears": _linears(linear for linear, _ in ranks["base"]),
        "ranks": _by_projection(ranks),
        "experts": [ExpertState(name=expert.name, trained=done) for expert, done in experts],
        "details": {
            **{"stage": info.stage, "step": info.step, "alpha": info.adapter.alpha},
            **{"router": info.router.mode, "time_gate": info.router.loudness},
            "fallback": info.adapter.fallback or f"none ({info.router.unrouted})",
            "base_sha256": info.base_sha256 or "not known",
        },
        "notes": [] if base_trained else ["the base adapter is all zero: it was never trained"],
    }


def _fork(path: Path, config_file: Path | None) -> dict[str, Any]:
    unnamed = ""
    try:
        fork = read_fork(path, config_file)
    except WanmoeError as error:
        if config_file is not None:
            raise
        fork, unnamed = survey_fork(path), str(error).removeprefix(f"{path}: ")
    tensors = [(part, linear) for linear in fork.linears.values() for part in linear if part is not None]
    dtypes: Counter[str] = Counter()
    for part, _ in tensors:
        dtypes[str(part.dtype).removeprefix("torch.")] += part.numel()
    ranks = {
        "base": [
            (name, linear.base_down.shape[0])
            for name, linear in fork.linears.items()
            if linear.base_down is not None
        ],
        "experts": [(name, linear.expert_down.shape[1]) for name, linear in fork.linears.items()],
    }
    return {
        "format": "LoRA-MoE of the musubi-tuner fork",
        "noise_expert": fork.noise_expert,
        "linears": f"{len(fork.linears)}, not named" if unnamed else _linears(fork.linears),
        "ranks": _by_projection(ranks),
        "experts": [ExpertState(name=name, trained=name not in fork.untrained) for name in fork.expert_names],
        "parameters": dtypes.total(),
        "dtypes": dict(dtypes.most_common()),
        "details": {"alpha": "not stated" if math.isnan(fork.alpha) else fork.alpha},
        "notes": [
            *fork.notes,
            *([f"names of linears and experts need --lora_moe_config_file: {unnamed}"] if unnamed else []),
        ],
    }


def _lora(path: Path) -> dict[str, Any]:
    lora = read_lora(path)
    pairs = {name: delta for name, delta in lora.deltas.items() if delta.rank}
    clip = any(name.endswith(("k_img", "v_img")) for name in lora.deltas)
    source = _stated(lora.metadata, "wanmoe_source", path)
    details: dict[str, Any] = {
        "alpha_/_rank": sorted({round(delta.scale, 6) for delta in pairs.values()}),
        "model_width": sorted(
            {d.down.shape[1] for name, d in pairs.items() if d.down and ".self_attn." in name}
        ),
        "gates": _stated(lora.metadata, "gates", path),
        "exported_from": source,
        **{key: lora.metadata.get(key) for key in _SHOWN_METADATA},
    }
    notes = ["it changes attention to CLIP features: made for a Wan2.1 i2v model"] if clip else []
    if full := [name for name, delta in lora.deltas.items() if delta.diff or delta.diff_b]:
        notes.append(
            f"{len(full)} layers have differences in full ({full[0]}): it can be merged into a model, but "
            "not kept as an adapter"
        )
    return {
        "format": _LORA_FORMATS[lora.format],
        "task": source.get("task") or ("i2v" if clip else None),
        "noise_expert": lora.noise_expert,
        "linears": _linears(lora.deltas),
        "ranks": _by_projection({"lora": [(name, delta.rank) for name, delta in pairs.items()]}),
        "details": {key: value for key, value in details.items() if value},
        "notes": notes,
    }


def _stated(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    """A JSON object in the metadata, as our own exports write them; empty without one."""
    try:
        stated = json.loads(metadata.get(key, "{}"))
    except ValueError as error:
        raise WanmoeError(f"{path}: metadata {key!r} is not JSON ({error})") from error
    return stated if isinstance(stated, dict) else {key: stated}


def _dit(path: Path) -> dict[str, Any]:
    config, layout = read_dit_config(path)
    named = (name for name in ("t2v-A14B", "i2v-A14B", "i2v-14B", "t2v-1.3B", "tiny"))
    sizes = next((name for name in named if WanConfig.preset(name) == config), None)
    folders = (path, path.parent)
    metadata = open_weights(path).metadata
    side = metadata.get("noise_expert")
    side = side or next(filter(None, map(noise_expert_of_name, folders)), None)
    if side is None and layout == "diffusers":  # a pipeline of A14B: the second one is the low one
        folder = path if path.is_dir() else path.parent
        if (folder.parent / "transformer_2").is_dir():
            side = {"transformer": "high", "transformer_2": "low"}.get(folder.name)
    return {
        "format": f"Wan DiT, {layout} names",
        "task": config.task,
        "noise_expert": side,
        "details": {
            **({} if side is None or "noise_expert" in metadata else {"side_told_by": "its place or name"}),
            "sizes_of": sizes or "no preset",
            "config": asdict(config),
            **({"merged_from": source} if (source := _stated(metadata, "wanmoe_source", path)) else {}),
            **({"gates": gates} if (gates := _stated(metadata, "gates", path)) else {}),
        },
    }


def _model_folder(folder: Path) -> FileReport | None:
    """A folder that holds a DiT and other parts of a Wan model; None for one of a DiT alone."""
    try:
        parts = find_parts(folder)
    except WanmoeError:
        return None
    found = {name: str(part.relative_to(folder)) for name, part in parts._asdict().items() if part}
    if len(found) < 2:
        return None
    report = _dit(parts.dit or parts.dit_high_noise or folder)
    return FileReport(
        path=str(folder),
        format=f"whole Wan model ({report['format']})",
        task=report["task"],
        noise_expert="both" if parts.dit and parts.dit_high_noise else report["noise_expert"],
        details=found | report["details"],
    )


def _component(weights: Weights) -> dict[str, Any] | None:
    """VAE, text encoder or image encoder, told by tensors that no other kind has; None for something else."""
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    kind = next((kind for kind in _COMPONENTS if all(mark in shapes for mark in kind.marks)), None)
    if kind is None:
        return None
    first, last = (shapes[mark] for mark in kind.marks)
    details: dict[str, Any]
    notes = []
    if kind.name == "Wan VAE":
        details = {"latent_channels": last[0]}
        if last[0] != CHANNELS:
            notes.append(f"not the Wan2.1 VAE of {CHANNELS} channels, which the A14B models use")
    elif kind.name == _UMT5:
        details = {"width": first[1], "layers": _depth(shapes, kind.blocks), "vocabulary": first[0]}
    else:
        details = {"width": first[0], "layers": _depth(shapes, kind.blocks), "patch": first[-1]}
    return {"format": f"{kind.name}, {kind.layout} names", "details": details, "notes": notes}


def _musubi_cache(weights: Weights) -> dict[str, Any]:
    latents = [match for name in weights.tensors if (match := _LATENT_KEY.match(name))]
    metadata = {
        key: weights.metadata[key] for key in ("caption1", "format_version") if key in weights.metadata
    }
    if not latents:
        rows = [tensor.shape for name, tensor in weights.tensors.items() if name.startswith(_TEXT_KEY)]
        return {
            "format": "text cache of musubi-tuner",
            "details": {"tokens_x_width": list(rows[0]), **metadata},
        }
    shape = [int(latents[0][letter]) for letter in "fhw"]
    return {
        "format": "latent cache of musubi-tuner",
        "task": "i2v" if any(match["image"] for match in latents) else "t2v",
        "details": {"latent_frames_x_height_x_width": shape, **metadata},
    }


def _shards(folder: Path) -> FileReport:
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WanmoeError(f"{file}: not readable JSON ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found != _SHARDS_FORMAT:
        raise WanmoeError(f"{file}: format is {found!r}; of such folders only {_SHARDS_FORMAT!r} is known")
    coders = {part: manifest.get(part) for part in ("codec", "text_encoder")}
    shards, task = manifest.get("shards"), manifest.get("task")
    faults = [part for part, facts in coders.items() if not isinstance(facts, dict)]
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict) and isinstance(shard.get("bytes"), int) for shard in shards
    ):
        faults.append("shards")
    if not isinstance(task, str):
        faults.append("task")
    if faults:
        raise WanmoeError(
            f"{file}: {', '.join(faults)} missing or not as `wanmoe prepare` writes it; is it damaged?"
        )
    names = {part: facts.get("name") for part, facts in coders.items() if isinstance(facts, dict)}
    return FileReport(
        path=str(folder),
        format=f"shards of wanmoe ({found})",
        task=task,
        bytes=sum(shard["bytes"] for shard in shards),
        sha256=file_sha256(file),
        details={"samples": manifest.get("n_samples", {}), "shards": len(shards), **names},
        notes=["the hash is that of manifest.json, which holds those of the shards"],
    )


def _linears(names: Iterable[str]) -> str:
    """'67 in blocks 32-39', and how many stand outside the blocks."""
    names = list(names)
    blocks = sorted({int(name.split(".")[1]) for name in names if name.startswith("blocks.")})
    outside = sum(not name.startswith("blocks.") for name in names)
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block - 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    where = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    inside = f"{len(names) - outside} in blocks {where}" if blocks else ""
    return ", ".join(filter(None, (inside, f"{outside} outside the blocks" if outside else ""))) or "none"


def _by_projection(
    parts: Mapping[str, Iterable[tuple[str, int]]],
) -> dict[str, dict[str, list[int]]]:
    """Ranks of each part by projection (q, ffn.0, ...), whatever the block and the attention."""
    table: dict[str, dict[str, list[int]]] = {}
    for part, pairs in parts.items():
        found: dict[str, set[int]] = {}
        for name, rank in pairs:
            match = re.match(r"^(?:blocks\.\d+\.(?:\w+_attn\.)?(.+)|(lora_moe)_\d+)$", name)
            found.setdefault((match[1] or match[2]) if match else name, set()).add(rank)
        order = [name for name in _PROJECTIONS if name in found]
        order += [name for name in found if name not in _PROJECTIONS]
        if found:
            table[part] = {name: sorted(found[name]) for name in order}
    return table


def _depth(names: Iterable[str], prefix: str) -> int:
    """Number of blocks that are numbered behind a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
