"""LoRA files of other tools: reading the layouts that users have, and writing those that their tools read.

Linears go by their original Wan name here (`blocks.3.self_attn.q`), whatever a file calls them.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from .adapter_file import FORMAT, write_safetensors
from .errors import WanmoeError
from .files import write_atomic
from .wan.weight_files import StoredTensor, Weights, open_weights
from .wan.weights import to_diffusers, to_original

__all__ = [
    "Delta",
    "LoRAFile",
    "LoRALayout",
    "image_layers",
    "noise_expert_of_name",
    "read_lora",
    "stated_noise_expert",
    "write_lora",
]

_logger = logging.getLogger(__name__)

LoRALayout: TypeAlias = Literal["kohya", "comfyui", "original", "diffusers", "peft"]
"""original: names of the model itself, without a prefix."""

_LISTED = 4
"""Keys that an error lists."""

_PREFIXES: tuple[tuple[str, LoRALayout], ...] = (
    ("lora_unet_", "kohya"),
    ("model.diffusion_model.", "comfyui"),
    ("diffusion_model.", "comfyui"),
    ("transformer.", "diffusers"),
    ("transformer_2.", "diffusers"),  # the low-noise model of a pipeline
    ("base_model.model.", "peft"),
)
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"

# kohya calls the factors down and up, PEFT A and B, with an adapter's name behind while it is in use.
_KEY = re.compile(
    r"^(?P<module>.+?)\.(?:lora_(?P<factor>A|B|down|up)(?:\.[^.]+)?\.weight|(?P<other>alpha|diff|diff_b|diff_m))$"
)
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a middle factor",
    "oft_": "OFT",
}
_LINEARS = (
    *(f"{attention}.{letter}" for attention in ("self_attn", "cross_attn") for letter in "qkvo"),
    *("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"),
)
_NORMS = (
    *(f"{attention}.norm_{letter}" for attention in ("self_attn", "cross_attn") for letter in "qk"),
    *("cross_attn.norm_k_img", "norm3"),
)
_IN_BLOCK = {name.replace(".", "_"): name for name in (*_LINEARS, *_NORMS, "modulation")}
_TOP = {
    name.replace(".", "_"): name
    for name in (
        *("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
        *("time_projection.1", "head.head", "head.modulation"),
        *(f"img_emb.proj.{index}" for index in (0, 1, 3, 4)),
    )
}
_IMAGE = re.compile(r"^img_emb\.|\.cross_attn\.(k_img|v_img|norm_k_img)(\.|$)")
_BLOCK = re.compile(r"^blocks[._](?P<index>\d+)[._](?P<rest>.+)$")


@dataclass(frozen=True)
class Delta:
    """What a file adds to one layer: scale * up @ down and `diff` to its weight, `diff_b` to its bias.

    The tensors are still in the file. A layer `...modulation` is a parameter itself, which `diff` changes.
    """

    down: StoredTensor | None = None
    """[r, in], a convolution's kernel flattened."""
    up: StoredTensor | None = None
    """[out, r]."""
    scale: float = 1.0
    """alpha / r where the file has an alpha, otherwise 1."""
    diff: StoredTensor | None = None
    """In the shape of the weight."""
    diff_b: StoredTensor | None = None

    @classmethod
    def of(cls, down: Tensor, up: Tensor, scale: float = 1.0) -> Delta:
        """The delta of factors in memory, down [r, in] and up [out, r]."""
        return cls(_held(down), _held(up), scale)

    @property
    def rank(self) -> int:
        """r; 0 for a delta that has no factors."""
        return 0 if self.down is None else self.down.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down [r, in], up [out, r]) as stored, without the scale; for a delta whose rank is not 0."""
        if self.down is None or self.up is None:
            raise ValueError("this delta has no factors, but a difference of the weight or bias alone")
        return self.down.read(), self.up.read()


class LoRAFile(NamedTuple):
    """A LoRA file of another tool, read lazily."""

    format: LoRALayout
    deltas: dict[str, Delta]
    """By original name, in the order of the file."""
    metadata: dict[str, str]
    """Of the safetensors header."""
    noise_expert: str | None
    """high, low or both, as its metadata or else its name says; None if neither does."""
    label: str
    """The file or folder, as errors name it."""


@dataclass
class _Parts:
    """Tensors of one layer while the keys of a file are gathered."""

    layout: LoRALayout
    name: str
    """As the file has it, without prefix."""
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


def read_lora(path: str | Path, noise_expert: str | None = None) -> LoRAFile:
    """Reads names, shapes and scales of a LoRA: kohya/musubi, ComfyUI, original names, diffusers or PEFT.

    Args:
        noise_expert: what the file is for, whatever it says itself.

    Raises:
        WanmoeError: not there, cut short, half a pair of factors, or keys that are none of a LoRA on Wan.
    """
    path = Path(path)
    weights = open_weights(path)
    if weights.metadata.get("format") == FORMAT:
        raise WanmoeError(
            f"{path}: is an adapter of wanmoe, not a LoRA; give it as the adapter, or export it first"
        )
    side = _noise_expert(path, weights, noise_expert)
    layers = _gather(weights)
    layouts = {parts.layout for parts in layers.values()}
    if "diffusers" in layouts:  # some layers are called the same in both
        layouts.discard("original")
    if len(layouts) > 1:
        raise WanmoeError(f"{path}: mixes the names of {' and '.join(sorted(layouts))} LoRAs; split the file")
    layout = layouts.pop()
    stated = _stated_alphas(path, weights, layout)
    deltas = {name: _delta(name, parts, stated, weights.label) for name, parts in layers.items()}
    return LoRAFile(layout, deltas, weights.metadata, side, weights.label)


def _noise_expert(path: Path, weights: Weights, asked: str | None) -> str | None:
    """What is asked for, or else what the metadata, the names of the tensors or that of the file say."""
    stated = weights.metadata.get("noise_expert")
    prefixes = {name.partition(".")[0] for name in weights.tensors} & {"transformer", "transformer_2"}
    if len(prefixes) > 1:
        raise WanmoeError(
            f"{path}: holds a LoRA of each model of a pipeline (transformer, transformer_2); split the file"
        )
    if asked is None and stated:
        return stated_noise_expert(stated, path)
    found = stated or ("low" if "transformer_2" in prefixes else noise_expert_of_name(path))
    if asked is not None and found not in (None, "both", asked):
        _say_once(f"{path}: says that it is for {found!r}; it is taken for the {asked} noise expert, as told")
    return asked or found


@lru_cache
def _say_once(text: str) -> None:
    """Logs what comes up each time that the same file is opened."""
    _logger.info("%s", text)


def stated_noise_expert(value: object, path: Path) -> str:
    """high, low or both as a file says it, in any case; raises WanmoeError for anything else."""
    side = str(value).strip().lower()
    if side not in ("high", "low", "both"):
        raise WanmoeError(
            f"{path}: says that it is for noise expert {value!r}, which is none of high, low, both; say what "
            "it is for (--lora FILE:high, convert --noise_expert high)"
        )
    return side


def image_layers(names: Iterable[str]) -> list[str]:
    """Those of some layers or parameters that only a model with an image encoder (Wan2.1 i2v) has."""
    return [name for name in names if _IMAGE.search(name)]


def noise_expert_of_name(path: str | Path) -> str | None:
    """high or low where a file name says so (`..._high_noise...`, `..._low.safetensors`), else None."""
    path = Path(path)
    # PEFT's files all have one name; what they are stands in the name of their folder.
    stem = (path.parent.name if path.stem == "adapter_model" else path.stem).lower()
    sides = ("high", "low")
    found = [side for side in sides if re.search(rf"{side}[_-]?noise|(?:^|[_.-]){side}$", stem)]
    return found[0] if len(found) == 1 else None


def _gather(weights: Weights) -> dict[str, _Parts]:
    """The tensors of every layer by what they are: down, up, alpha, diff, diff_b."""
    layers: dict[str, _Parts] = {}
    unknown = []
    for key, tensor in weights.tensors.items():
        layout, rest = _strip(key)
        match = _KEY.match(rest)
        module = match["module"] if match else ""
        kind = {"A": "down", "B": "up"}.get(match["factor"], match["factor"]) if match else None
        kind = kind or (match["other"] if match else "")
        if kind == "diff_m":
            module, kind = f"{module}.modulation", "diff"
        name = _original(module, layout)
        if name is None:
            unknown.append(key)
            continue
        if layout == "original" and name != module:
            layout = "diffusers"  # as `save_lora_adapter` of a single model writes it
        parts = layers.setdefault(name, _Parts(layout, module))
        if kind in parts.tensors:
            raise WanmoeError(f"{weights.label}: {name} has two tensors that are its {kind}, one is {key}")
        parts.tensors[kind] = tensor
    if unknown or not layers:
        raise _not_understood(unknown, len(weights.tensors), weights.label)
    return layers


def _strip(key: str) -> tuple[LoRALayout, str]:
    for prefix, layout in _PREFIXES:
        if key.startswith(prefix):
            return layout, key.removeprefix(prefix)
    return "original", key


def _original(module: str, layout: LoRALayout) -> str | None:
    """The original name of a layer of Wan, or None for what is none."""
    if layout != "kohya":
        # No original name is also the diffusers name of another layer that has parameters.
        module = to_original(module)
    match = _BLOCK.match(module)
    rest = match["rest"] if match else module
    flat = rest if layout == "kohya" else rest.replace(".", "_")
    known = (_IN_BLOCK if match else _TOP).get(flat)
    if known is None or (layout != "kohya" and known != rest):
        return None
    return f"blocks.{match['index']}.{known}" if match else known


def _not_understood(unknown: list[str], total: int, label: str) -> WanmoeError:
    kinds = sorted({kind for key in unknown for mark, kind in _OTHER_KINDS.items() if mark in key})
    shown = ", ".join(unknown[:_LISTED]) + (", ..." if len(unknown) > _LISTED else "")
    if kinds:
        return WanmoeError(
            f"{label}: holds {' and '.join(kinds)}, which are not supported, only plain LoRA ({shown})"
        )
    what = f"{len(unknown)} of {total} tensors are none of a LoRA on Wan: {shown}" if unknown else "is empty"
    return WanmoeError(
        f"{label}: {what}; kohya/musubi, ComfyUI, diffusers and PEFT LoRAs for Wan 14B and 1.3B are read"
    )


class _Alphas(NamedTuple):
    """alpha as a LoraConfig states it, for files that have no alpha tensors."""

    default: float | None
    by_pattern: dict[str, float]
    sqrt_rank: bool

    def scale(self, module: str, rank: int) -> float:
        """Of the layer that the file calls `module`; patterns are regular expressions, as in PEFT."""
        patterns = (key for key in self.by_pattern if re.match(rf"(.*\.)?({key})$", module))
        key = next(patterns, None)
        alpha = self.default if key is None else self.by_pattern[key]
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.sqrt_rank else rank)


def _stated_alphas(path: Path, weights: Weights, layout: LoRALayout) -> _Alphas:
    if layout == "peft":
        file = (path if path.is_dir() else path.parent) / _PEFT_CONFIG
        if not file.is_file():
            raise WanmoeError(f"{path}: a PEFT LoRA needs {file.name} beside it, which holds its scale")
        return _read_alphas(file.read_text(encoding="utf-8", errors="replace"), str(file), required=True)
    if layout == "diffusers" and _DIFFUSERS_METADATA in weights.metadata:
        return _read_alphas(weights.metadata[_DIFFUSERS_METADATA], f"{path}: {_DIFFUSERS_METADATA}")
    return _Alphas(None, {}, False)


def _read_alphas(text: str, label: str, *, required: bool = False) -> _Alphas:
    try:
        stated = json.loads(text)
    except ValueError as error:
        raise WanmoeError(f"{label}: is not JSON ({error})") from error
    if not isinstance(stated, dict):
        raise WanmoeError(f"{label}: expected a JSON object, found a {type(stated).__name__}")
    # A pipeline's file states it per part, under the prefix of its keys.
    stated = {re.sub(r"^transformer(_2)?\.", "", key): value for key, value in stated.items()}
    if stated.get("use_dora"):
        raise WanmoeError(f"{label}: use_dora is set; DoRA is not supported, only plain LoRA")
    alpha, patterns = stated.get("lora_alpha"), stated.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_number, (*patterns.values(), alpha or 0))):
        raise WanmoeError(f"{label}: lora_alpha {alpha!r}, alpha_pattern {patterns!r} must hold numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise WanmoeError(
                f"{label}: alpha_pattern {pattern!r} is no regular expression ({error})"
            ) from error
    if required and alpha is None:
        raise WanmoeError(f"{label}: lora_alpha is missing; it is the scale times the rank")
    return _Alphas(alpha, patterns, bool(stated.get("use_rslora")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _delta(name: str, parts: _Parts, stated: _Alphas, label: str) -> Delta:
    tensors = parts.tensors
    down, up = tensors.get("down"), tensors.get("up")
    if (down is None) != (up is None):
        has, lacks = ("down (A)", "up (B)") if up is None else ("up (B)", "down (A)")
        raise WanmoeError(f"{label}: {name} has a {has} factor but no {lacks}; is the file whole?")
    scale = 1.0
    if down is not None and up is not None:
        down, up = _flat(down), _flat(up)
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
            raise WanmoeError(
                f"{label}: {name}: down {down.shape} and up {up.shape} are no pair [r, in], [out, r]"
            )
        if not down.shape[0]:
            raise WanmoeError(f"{label}: {name} has rank 0; is the file damaged?")
        scale = stated.scale(parts.name, down.shape[0])
        if "alpha" in tensors:
            # 0 is how some tools store that there is none.
            scale = (float(tensors["alpha"].read()) or down.shape[0]) / down.shape[0]
    elif "diff" not in tensors and "diff_b" not in tensors:
        raise WanmoeError(f"{label}: {name} has an alpha and no factors; is the file whole?")
    if not math.isfinite(scale):
        raise WanmoeError(f"{label}: {name} has alpha / rank = {scale}; is the file damaged?")
    return Delta(down, up, scale, tensors.get("diff"), tensors.get("diff_b"))


def _flat(stored: StoredTensor) -> StoredTensor:
    if len(stored.shape) <= 2:
        return stored
    first, *rest = stored.shape
    return StoredTensor((first, math.prod(rest)), lambda: stored.read().flatten(1))


def _held(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), lambda: tensor)


def write_lora(
    path: str | Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    format: Literal["comfyui", "diffusers", "peft"] = "comfyui",
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes W += up @ down for each linear, down [r, in] and up [out, r]; returns the one rank it has.

    Smaller ranks are padded with zeros: readers disagree on the scale of a file that mixes them. A scale
    must be in the factors, there is no alpha. comfyui and diffusers write a safetensors file, peft a folder
    for `PeftModel.from_pretrained`. Raises WanmoeError when it cannot be written.
    """
    path = Path(path)
    if format != "peft" and path.suffix != ".safetensors":
        raise WanmoeError(f"{path}: a {format} LoRA is one file, give a name that ends in .safetensors")
    # `mix-0.5` is a name of a folder as good as any.
    if format == "peft" and (re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) or path.is_file()):
        raise WanmoeError(
            f"{path}: a PEFT LoRA is a folder, give the name of one, without {path.suffix or 'a file there'}"
        )
    rank = max(down.shape[0] for down, _ in factors.values())
    prefix = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "peft": "base_model.model."}[format]
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        theirs = prefix + (name if format == "comfyui" else to_diffusers(name))
        missing = rank - down.shape[0]
        tensors[f"{theirs}.lora_A.weight"] = F.pad(down, (0, 0, 0, missing)).cpu().contiguous()
        tensors[f"{theirs}.lora_B.weight"] = F.pad(up, (0, missing)).cpu().contiguous()
    header = {"format": "pt", **(metadata or {})}
    if format != "peft":
        write_safetensors(path, tensors, header)
        return rank
    write_safetensors(path / "adapter_model.safetensors", tensors, header)
    config = _peft_config([to_diffusers(name) for name in factors], rank)
    text = json.dumps(config, indent=2) + "\n"
    write_atomic(path / _PEFT_CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return rank


def _peft_config(modules: list[str], rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
