"""Files of the seed fork of musubi-tuner (its "LoRA-MoE"): what they hold, by original Wan names.

Letters: E experts, r rank.
"""

from __future__ import annotations

import json
import math
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import WanmoeError
from .instruments import ExpertSet, known_experts
from .lora_file import noise_expert_of_name, stated_noise_expert
from .wan.config import WanConfig
from .wan.weight_files import StoredTensor, open_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEY = re.compile(r"^lora_moe_(?P<module>\d+)\.(?P<rest>.+)$")
_PART = re.compile(r"^(base_lora_(down|up)|expert_lora_(down|up)\.\d+)\.weight$")
_DROPPED = {
    "org_module.": "copies of frozen weights",
    "timestep_gate.": "timestep gates",
    "current_": "gates and times of the last step",
    "router.": "the fork's router (rules, or a router of ours, take its place)",
}
_MODULE_NAME = re.compile(
    r"^blocks\.(?P<block>\d+)\.(?:(?P<attn>attn[12])\.(?P<projection>[qkvo])|ffn\.(?P<ffn>fc[12]))$"
)
_ATTENTION = {"attn1": "self_attn", "attn2": "cross_attn"}
_FFN = {"fc1": "ffn.0", "fc2": "ffn.2"}
_LAST_N = re.compile(r"^last_([1-9]\d*)$")
_LISTED = 4
"""Names that an error lists."""


class ForkLinear(NamedTuple):
    """The adapter of one linear; scale of each part is alpha / r."""

    base_down: Tensor | None
    """[r, in]; None in a file without base adapter."""
    base_up: Tensor | None
    """[out, r]"""
    expert_down: Tensor
    """[E, r, in]"""
    expert_up: Tensor
    """[E, out, r]"""


class ForkFile(NamedTuple):
    """A file of the fork, read: the adapter and what is to be said about it."""

    label: str
    """The file, as errors name it."""
    expert_names: tuple[str, ...]
    alpha: float
    """nan where nothing says it, which `survey_fork` alone accepts."""
    linears: dict[str, ForkLinear]
    """By original name (`blocks.32.self_attn.q`), in the order of the file's modules."""
    untrained: tuple[str, ...]
    """Experts whose up projections are zero in every linear: they change nothing."""
    notes: tuple[str, ...]
    """What was left out and what is odd, a sentence each."""
    noise_expert: str | None
    """high or low where the file or its name says so."""


def is_fork(path: str | Path) -> bool:
    """Whether a file has the fork's keys; False for whatever cannot be read. Reads no tensor."""
    try:
        tensors, _ = _open(Path(path))
    except WanmoeError:
        return False
    return any(_KEY.match(name) for name in tensors)


def read_fork(path: str | Path, config_file: Path | None = None, noise_expert: str | None = None) -> ForkFile:
    """Reads a LoRA-MoE file of the fork: safetensors, or its nested torch.save variant.

    Its copies of frozen weights are never read; they, the timestep gates and the router are left out, and
    counted in the notes.

    Args:
        config_file: the fork's YAML, TOML or JSON; what it says counts where the file itself says nothing.
        noise_expert: what the file is for, whatever it says itself.

    Raises:
        WanmoeError: not such a file, or names, ranks or experts that are missing or disagree.
    """
    path = Path(path)
    tensors, stated = _open(path)
    if not any(_KEY.match(name) for name in tensors):
        first = ", ".join(list(tensors)[:_LISTED])
        raise WanmoeError(f"{path}: no LoRA-MoE file of the fork: no lora_moe_0.*, it holds {first}, ...")
    config = (_read_config(config_file) if config_file else {}) | stated
    modules, dropped = _split(tensors, path)
    names, notes = _module_names(modules, config, path)
    experts = _experts(modules, names, config, path)
    alpha = config.get("alpha", config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise WanmoeError(
            f"{path}: its config says alpha = {alpha!r}, which must be a number above 0; "
            "give the fork's config file with lora_alpha"
        )
    if noise_expert is None and config.get("noise_expert"):
        noise_expert = stated_noise_expert(config["noise_expert"], path)
    linears = {name: _linear(modules[index], name, path) for index, name in enumerate(names)}
    notes = [*_dropped_notes(dropped), *notes, *_rank_notes(linears, config)]
    return _described(path, experts, float(alpha), linears, notes, noise_expert)


def survey_fork(path: str | Path) -> ForkFile:
    """What the tensors of a LoRA-MoE file of the fork show by themselves, for a report on it.

    Linears are called lora_moe_0, ..., as in the file, experts by their number; alpha is not known. Raises
    WanmoeError where modules or experts are missing or disagree.
    """
    path = Path(path)
    modules, dropped = _split(_open(path)[0], path)
    names = [f"lora_moe_{index}" for index in sorted(modules)]
    count = sum(part.startswith("expert_lora_up.") for part in modules[0])
    experts = _experts(modules, names, {"expert_names": [f"expert {e}" for e in range(count)]}, path)
    linears = {name: _linear(modules[index], name, path) for index, name in enumerate(names)}
    return _described(path, experts, math.nan, linears, _dropped_notes(dropped), None)


def _described(
    path: Path,
    experts: tuple[str, ...],
    alpha: float,
    linears: dict[str, ForkLinear],
    notes: list[str],
    noise_expert: str | None,
) -> ForkFile:
    """The file, with what its values show: parts that are all zero."""
    untrained = tuple(
        expert
        for index, expert in enumerate(experts)
        if not any(linear.expert_up[index].any() for linear in linears.values())
    )
    notes = notes + [f"expert {expert!r} is all zero: it was never trained" for expert in untrained]
    ups = [linear.base_up for linear in linears.values() if linear.base_up is not None]
    if ups and not any(up.any() for up in ups):
        notes.append("the base adapter is all zero: it was never trained")
    side = noise_expert or noise_expert_of_name(path)
    return ForkFile(str(path), experts, alpha, linears, untrained, tuple(notes), side)


def _open(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Lazy tensors under flat names, and the config that the file carries."""
    if path.suffix == ".safetensors":
        weights = open_weights(path)
        return weights.tensors, _stated_config(weights.metadata, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WanmoeError(f"{path}: not a whole torch file of plain tensors ({cause})") from error
    if not isinstance(content, Mapping):
        raise WanmoeError(f"{path}: holds a {type(content).__name__}, not a dict of modules")
    flat = {name: part for name, part in content.items() if isinstance(part, Tensor)}
    for module, state in content.items():
        parts = state if isinstance(state, Mapping) else {}
        flat |= {f"{module}.{name}": part for name, part in parts.items() if isinstance(part, Tensor)}
    config = content.get("config")
    return open_weights(flat).tensors, dict(config) if isinstance(config, Mapping) else {}


def _stated_config(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError as error:
        raise WanmoeError(f"{path}: metadata 'config' is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise WanmoeError(f"{path}: metadata 'config' is a {type(config).__name__}, not an object")
    return config | {key: metadata[key] for key in ("noise_expert",) if key in metadata}


def _read_config(file: Path) -> dict[str, Any]:
    """The keys of a config file of the fork in one namespace: it ignores section names, so do we."""
    import yaml

    readers: dict[str, Any] = {
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".toml": tomllib.loads,
        ".json": json.loads,
    }
    if file.suffix.lower() not in readers:
        raise WanmoeError(f"{file}: the fork's config is a .yaml, .toml or .json file")
    try:
        tree = readers[file.suffix.lower()](file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())
        raise WanmoeError(f"{file}: cannot be read as {file.suffix[1:].upper()} ({first})") from error
    if not isinstance(tree, dict):
        raise WanmoeError(f"{file}: expected keys and values, found a {type(tree).__name__}")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, dict) and key not in ("module_ranks", "projection_ranks")
        flat |= value if is_section else {key: value}
    return flat


def _split(
    tensors: Mapping[str, StoredTensor], path: Path
) -> tuple[dict[int, dict[str, StoredTensor]], dict[str, list[int]]]:
    """Adapter tensors by module and name within it; sizes of what is dropped by the start of its name."""
    modules: dict[int, dict[str, StoredTensor]] = {}
    dropped: dict[str, list[int]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        rest = match["rest"] if match else name
        kind = next((start for start in _DROPPED if rest.startswith(start)), None)
        if match and _PART.match(rest) and len(tensor.shape) == 2:
            modules.setdefault(int(match["module"]), {})[rest] = tensor
        elif kind is not None:
            dropped.setdefault(kind, []).append(math.prod(tensor.shape))
        else:
            unknown.append(name)
    if unknown:
        listed = ", ".join(unknown[:_LISTED])
        raise WanmoeError(f"{path}: {len(unknown)} tensors that the fork does not write: {listed}")
    absent = sorted(set(range(max(modules, default=0) + 1)) - modules.keys())
    if absent:
        listed = ", ".join(f"lora_moe_{index}" for index in absent[:_LISTED])
        raise WanmoeError(f"{path}: {len(absent)} modules are missing: {listed}; is the file whole?")
    return modules, dropped


def _module_names(
    modules: Mapping[int, Mapping[str, StoredTensor]], config: Mapping[str, Any], path: Path
) -> tuple[list[str], list[str]]:
    """Original name of each module, in order, and notes on where the names come from."""
    ranks = config.get("module_ranks")
    notes = []
    if isinstance(ranks, Mapping) and ranks:
        hybrid = [str(name) for name in ranks]
    else:
        blocks, source = _blocks(modules, config, path)
        hybrid = _wrap_order(modules, blocks)
        notes.append(f"the config lists no module_ranks: linears are named in the fork's order, by {source}")
    names = []
    for name in hybrid:
        match = _MODULE_NAME.match(name)
        if match is None:
            raise WanmoeError(
                f"{path}: module_ranks names {name!r}, which is none of the fork's linears "
                "(blocks.N.attn1.q, blocks.N.attn2.o, blocks.N.ffn.fc1, ...)"
            )
        leaf = _FFN[match["ffn"]] if match["ffn"] else f"{_ATTENTION[match['attn']]}.{match['projection']}"
        names.append(f"blocks.{match['block']}.{leaf}")
    if len(names) != len(modules):
        raise WanmoeError(
            f"{path}: holds {len(modules)} modules where its config names {len(names)} linears "
            f"({names[0]} to {names[-1]}); is it the config of this file, and the file whole?"
        )
    return names, notes


def _blocks(
    modules: Mapping[int, Mapping[str, StoredTensor]], config: Mapping[str, Any], path: Path
) -> tuple[list[int], str]:
    """Adapted blocks as the config gives them, and the key that did."""
    for key in ("target_block_indices", "target_blocks"):
        value = config.get(key)
        if isinstance(value, str) and (last := _LAST_N.match(value)):
            width = next((part.shape[-1] for name, part in modules[0].items() if "_down." in name), None)
            layers = {size.dim: size.num_layers for size in map(WanConfig.preset, ("t2v-A14B", "t2v-1.3B"))}
            if width is not None and width in layers:
                return list(range(layers[width] - int(last[1]), layers[width])), f"{key} = {value!r}"
        elif isinstance(value, str) and re.fullmatch(r"\[[\d\s,]*\]", value):
            value = [int(block) for block in re.findall(r"\d+", value)]
        if isinstance(value, list | tuple) and value and all(isinstance(block, int) for block in value):
            return sorted(value), key
    raise WanmoeError(
        f"{path}: nothing says which linears its {len(modules)} modules belong to; give the fork's config "
        "file with module_ranks or target_block_indices"
    )


def _wrap_order(modules: Mapping[int, Mapping[str, StoredTensor]], blocks: list[int]) -> list[str]:
    """The fork's order: q, k, v, o of both attentions of a block, then its ffn where that was wrapped.

    The ffn is told by its shape, the one linear that is not square.
    """
    names: list[str] = []
    for block in blocks:
        names += [f"blocks.{block}.{attn}.{letter}" for attn in _ATTENTION for letter in "qkvo"]
        ffn = modules.get(len(names), {})
        down, up = ffn.get("expert_lora_down.0.weight"), ffn.get("expert_lora_up.0.weight")
        if down is not None and up is not None and down.shape[-1] != up.shape[0]:
            names.append(f"blocks.{block}.ffn.fc1")
    return names


def _experts(
    modules: Mapping[int, Mapping[str, StoredTensor]],
    names: list[str],
    config: Mapping[str, Any],
    path: Path,
) -> tuple[str, ...]:
    """Names of the experts, checked against every module."""
    counts: dict[int, str] = {}
    for index, name in enumerate(names):
        downs, ups = (
            {int(part.split(".")[1]) for part in modules[index] if part.startswith(f"expert_lora_{side}.")}
            for side in ("down", "up")
        )
        if ups != downs or ups != set(range(len(ups))) or not ups:
            raise WanmoeError(
                f"{path}: lora_moe_{index} ({name}) has downs of experts {sorted(downs)} and ups of "
                f"{sorted(ups)}; is the file whole?"
            )
        counts.setdefault(len(ups), name)
    if len(counts) > 1:
        listed = ", ".join(f"{count} in {name}" for count, name in counts.items())
        raise WanmoeError(f"{path}: linears disagree on the number of experts: {listed}")
    count = next(iter(counts))
    given = config.get("expert_names")
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise WanmoeError(
            f"{path}: does not name its {count} experts; give the fork's config file with expert_names"
        )
    stated = config.get("num_experts", count)
    if len(given) != count or stated != count:
        raise WanmoeError(
            f"{path}: holds {count} experts where its config says num_experts = {stated} and names "
            f"{len(given)} ({', '.join(given)}); is it the config of this file?"
        )
    ExpertSet(known_experts(given))  # says so where two have the same name
    return tuple(given)


def _linear(module: Mapping[str, StoredTensor], name: str, path: Path) -> ForkLinear:
    """Reads one module; every expert must have the shapes of the first."""
    experts = range(sum(part.startswith("expert_lora_up.") for part in module))
    downs = [module[f"expert_lora_down.{index}.weight"] for index in experts]
    ups = [module[f"expert_lora_up.{index}.weight"] for index in experts]
    (rank, d_in), (d_out, _) = downs[0].shape, ups[0].shape
    for index, (down, up) in enumerate(zip(downs, ups, strict=True)):
        if down.shape != (rank, d_in) or up.shape != (d_out, rank):
            raise WanmoeError(
                f"{path}: {name}: ranks disagree: expert {index} has down {down.shape} and up {up.shape}, "
                f"expert 0 has down {(rank, d_in)} and up {ups[0].shape}"
            )
    base_down = module.get("base_lora_down.weight")
    base_up = module.get("base_lora_up.weight")
    if (base_down is None) != (base_up is None):
        raise WanmoeError(f"{path}: {name} has half a base adapter; is the file whole?")
    if base_down and base_up:
        base_rank = base_down.shape[0]
        if base_down.shape != (base_rank, d_in) or base_up.shape != (d_out, base_rank):
            raise WanmoeError(
                f"{path}: {name}: ranks disagree: base has down {base_down.shape} and up {base_up.shape}, "
                f"the linear is {d_in} -> {d_out}"
            )
    return ForkLinear(
        base_down.read() if base_down else None,
        base_up.read() if base_up else None,
        torch.stack([down.read() for down in downs]),
        torch.stack([up.read() for up in ups]),
    )


def _dropped_notes(dropped: Mapping[str, list[int]]) -> list[str]:
    return [
        f"left out {_DROPPED[kind]}: {len(sizes)} tensors, {sum(sizes):,} values"
        for kind, sizes in dropped.items()
    ]


def _rank_notes(linears: Mapping[str, ForkLinear], config: Mapping[str, Any]) -> list[str]:
    """Where the config states other ranks than the tensors have: the fork did not apply all it was told."""
    stated = config.get("module_ranks") or {}
    pairs = zip(stated.values(), linears.items(), strict=True) if stated else ()
    wrong = [
        f"{rank} for {name}, which has {linear.expert_down.shape[1]}"
        for rank, (name, linear) in pairs
        if isinstance(rank, int) and rank != linear.expert_down.shape[1]
    ]
    return [f"module_ranks states {wrong[0]} ({len(wrong)} such); the tensors count"] if wrong else []
