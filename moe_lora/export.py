"""Adapters and LoRAs as files of other tools: plain LoRAs, and whole models with them merged in.

dW is what a file adds to the weight of one linear.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .adapter_file import AdapterInfo, read_adapter
from .errors import WanmoeError
from .files import file_sha256
from .lora_file import Delta, noise_expert_of_name, read_lora, write_lora
from .lora_merge import LoRAMerge, LoRASpec
from .low_rank import check_finite, concatenate, relative_error, truncate
from .routing import RuleRouter, TimeGate, at_noise_level
from .wan.config import BOUNDARIES
from .wan.weights import dit_hash, load_dit, read_dit_config, save_dit

__all__ = [
    "ExportReport",
    "LoRAFormat",
    "export_lora",
    "export_merged",
    "gates_of",
    "merge_lora",
    "rewrite_lora",
]

LoRAFormat: TypeAlias = Literal["comfyui", "diffusers", "peft"]

_LISTED = 4

_logger = logging.getLogger(__name__)


class ExportReport(NamedTuple):
    """What was written by `export_lora`."""

    format: str
    rank: int
    """The one rank of all linears."""
    linears: int
    error: float
    """|dW written - dW| / |dW| over all linears, before rounding to the dtype; 0 for an exact export."""
    dtype: torch.dtype
    """Of the written factors; they are computed in float32."""


def export_lora(
    adapter_path: str | Path,
    out: str | Path,
    *,
    format: LoRAFormat = "comfyui",
    gates: Mapping[str, float] | None = None,
    alpha_base: float = 1.0,
    alpha_expert: float = 1.0,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> ExportReport:
    """Writes the base and a fixed mix of the experts of an adapter file as a plain LoRA.

    A LoRA has no gates: the mix is the same for every prompt, frame and noise level. Ranks are concatenated,
    which is exact, then padded with zeros to one rank for all linears.

    Args:
        gates: weight per expert, by a name of either taxonomy, used as it is: what the expert's change is
            multiplied by, of any sign and sum. `gates_of` says what generation has of an instrument or a
            mix. None: the base adapter alone.
        alpha_base: strength of the base adapter; `wanmoe generate` uses 0.7 where nothing is said.
        rank: cut to this rank by singular values where the sum has more.
        dtype: of the written factors; None: that of the adapter file.

    Raises:
        WanmoeError: unknown expert, a weight that is not finite, nothing to write, a target that cannot be.
    """
    if rank is not None and rank < 1:
        raise WanmoeError(f"export to rank {rank}: it must be at least 1")
    info, tensors = read_adapter(adapter_path)
    factors = _summed(adapter_path, info, tensors, gates, alpha_base, alpha_expert)
    lost = total = 0.0
    for name, (down, up) in factors.items():
        if rank is None or down.shape[0] <= rank:
            total += float(((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum())
            continue
        cut = truncate(down, up, rank)
        factors[name] = (cut.down, cut.up)
        lost, total = lost + cut.lost, total + cut.total
    error = relative_error(lost, total)
    stored = dtype or next(iter(tensors.values())).dtype
    source = _source(adapter_path, info, gates, alpha_base, alpha_expert, error)
    return _write(out, factors, format, stored, source, error)


def gates_of(
    adapter_path: str | Path, *, instrument: str | None = None, mix: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What each expert's change is multiplied by, by name, when `wanmoe generate` is asked for an instrument
    or a mix, or its prompt names none, at the highest noise level that the file serves; who has 0 is left
    out.

    Raises WanmoeError for an unknown instrument, or a file that is none.
    """
    info, tensors = read_adapter(adapter_path)
    experts = info.adapter.expert_set
    routed = RuleRouter(experts).route(hint=instrument, mix=mix)
    learned = None
    if info.router.time_gate == "learned":
        learned = TimeGate(len(experts))
        learned.load_state_dict(
            {name: tensors[f"router.time_{name}"].float() for name in learned.state_dict()}
        )
    t = torch.tensor([BOUNDARIES[info.task] if info.noise_expert == "low" else 1.0])
    with torch.no_grad():
        shaped = at_noise_level(routed[None], t, info.router, learned)[0].tolist()
    return {name: round(gate, 6) for name, gate in zip(experts.names, shaped, strict=True) if gate}


def rewrite_lora(
    path: str | Path,
    out: str | Path,
    *,
    format: LoRAFormat = "comfyui",
    noise_expert: str | None = None,
    dtype: torch.dtype | None = None,
) -> ExportReport:
    """Writes a plain LoRA of any layout under the names of another tool, its scale folded into the factors.

    `noise_expert` is what the file is for, whatever it says itself; dtype=None keeps that of the file. Raises
    WanmoeError for what the other tool cannot be told: full differences, convolutions.
    """
    file = read_lora(path, noise_expert)
    # Their layers for a convolution need its kernel in the factors.
    odd = [name for name, delta in file.deltas.items() if delta.diff or delta.diff_b]
    odd += [name for name in file.deltas if name == "patch_embedding" and name not in odd]
    if odd:
        raise WanmoeError(
            f"{path}: changes {', '.join(odd[:_LISTED])} by full differences or as a convolution, which is "
            "not written for other tools; merge it into the model (--to merged)"
        )
    pairs = {name: delta.factors() for name, delta in file.deltas.items()}
    stored = dtype or next(iter(pairs.values()))[0].dtype
    factors = {
        name: (down.float(), up.float() * file.deltas[name].scale) for name, (down, up) in pairs.items()
    }
    for name, pair in factors.items():
        check_finite(f"{path}: {name}", *pair)
    kept = {key: file.metadata[key] for key in ("gates", "wanmoe_source") if key in file.metadata}
    side = {"noise_expert": file.noise_expert} if file.noise_expert else {}
    return _write(out, factors, format, stored, kept | side, 0.0)


def _write(
    out: str | Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    format: LoRAFormat,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    error: float,
) -> ExportReport:
    rounded = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in factors.items()}
    for name, pair in rounded.items():
        check_finite(f"{out}: {name} in {str(dtype).removeprefix('torch.')}", *pair)
    rank = write_lora(out, rounded, format=format, metadata=metadata)
    return ExportReport(format, rank, len(factors), error, dtype)


def export_merged(
    adapter_path: str | Path,
    dit_path: str | Path,
    out: str | Path,
    *,
    gates: Mapping[str, float] | None = None,
    alpha_base: float = 1.0,
    alpha_expert: float = 1.0,
    dtype: torch.dtype | None = None,
    any_base: bool = False,
) -> int:
    """Writes the whole model with a fixed mix of an adapter file added to its weights; how many it changed.

    One safetensors file under original names, whose header says what was merged. Gates and alphas as in
    `export_lora`; dtype=None keeps that of the model; any_base merges in spite of another task or base.
    Raises WanmoeError for what does not fit or cannot be written.
    """
    info, tensors = read_adapter(adapter_path)
    if not any_base:
        _check_base(adapter_path, info, dit_path)
    factors = _summed(adapter_path, info, tensors, gates, alpha_base, alpha_expert)
    merge = LoRAMerge()
    merge.add({name: Delta.of(down, up) for name, (down, up) in factors.items()}, str(adapter_path))
    dit = load_dit(dit_path, dtype=dtype)
    parameters = dict(dit.named_parameters())
    merge.check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        parameter.data = merge.apply(name, parameter.data)
    save_dit(dit, out, _source(adapter_path, info, gates, alpha_base, alpha_expert, 0.0))
    return len(factors)


def _check_base(adapter_path: str | Path, info: AdapterInfo, dit_path: str | Path) -> None:
    problems = []
    side = noise_expert_of_name(dit_path)
    if side and info.noise_expert not in ("both", side):
        problems.append(
            f"it belongs to the {info.noise_expert} noise expert, {dit_path} is {side} by its name"
        )
    if not info.base_sha256:
        _logger.warning(
            "%s: does not say its base, so whether %s is it was not checked", adapter_path, dit_path
        )
    if info.task != (task := read_dit_config(dit_path)[0].task):
        problems.append(f"it was trained for {info.task}, {dit_path} is a {task} model")
    if info.base_sha256 and info.base_sha256 != (base := dit_hash(dit_path)):
        problems.append(f"it was trained on base {info.base_sha256[:12]}, {dit_path} is {base[:12]}")
    if problems:
        raise WanmoeError(
            f"{adapter_path}: {'; '.join(problems)}; pass any_base (--any_base) to merge it all the same"
        )


def merge_lora(
    spec: LoRASpec, dit_path: str | Path, out: str | Path, *, dtype: torch.dtype | None = None
) -> int:
    """Writes the whole model with a plain LoRA merged into it; how many layers the LoRA has.

    As `export_merged` writes it. Raises WanmoeError for what does not fit or cannot be written.
    """
    file = read_lora(spec.path, spec.side)
    source = {"lora": spec.path.name, "sha256": dit_hash(spec.path), "strength": spec.strength}
    side = {"noise_expert": file.noise_expert} if file.noise_expert else {}
    save_dit(
        load_dit(dit_path, dtype=dtype, loras=[spec]), out, {"wanmoe_source": json.dumps(source), **side}
    )
    return len(file.deltas)


def _summed(
    path: str | Path,
    info: AdapterInfo,
    tensors: Mapping[str, Tensor],
    gates: Mapping[str, float] | None,
    alpha_base: float,
    alpha_expert: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) of a_b s_b B_b A_b + sum_e g_e a_e s_e B_e A_e, float32, per linear where that is not 0."""
    _check_whole(path, info, tensors)
    for what, strength in (("alpha_base", alpha_base), ("alpha_expert", alpha_expert)):
        if not math.isfinite(strength):
            raise WanmoeError(f"{what} must be finite, got {strength}")
    weights = _expert_weights(info, gates)
    alpha = info.adapter.alpha
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith("_down")):
        base_down, base_up = tensors[f"{name}.base_down"].float(), tensors[f"{name}.base_up"].float()
        parts = [(base_down, base_up * (alpha_base * alpha / base_down.shape[0]))]
        if f"{name}.expert_down" in tensors:
            downs, ups = tensors[f"{name}.expert_down"].float(), tensors[f"{name}.expert_up"].float()
            scale = alpha_expert * alpha / downs.shape[1]
            parts += [(downs[e], ups[e] * (weight * scale)) for e, weight in enumerate(weights)]
        # What changes nothing (gate 0, never trained) would only widen the rank.
        parts = [(down, up) for down, up in parts if up.any()]
        check_finite(f"{path}: {name}", *(factor for part in parts for factor in part))
        if parts:
            factors[name] = concatenate(parts)
    if not factors:
        raise WanmoeError(
            f"{path}: this mix changes nothing: its parts are untrained or weighted 0 (gates "
            f"{dict(gates or {})}, alpha_base {alpha_base}, alpha_expert {alpha_expert}); name other experts"
        )
    return factors


def _check_whole(path: str | Path, info: AdapterInfo, tensors: Mapping[str, Tensor]) -> None:
    """Compares the linears of an adapter file with those that its description names.

    How many blocks the model has is not in the file, but the last one that it names is adapted.
    """
    adapted = info.adapter.blocks
    named = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
    last = max([*named, *([adapted - 1] if isinstance(adapted, int) else adapted)])
    missing = [
        f"{linear}.{leaf}"
        for linear, (_, rank) in info.adapter.linears(last + 1).items()
        for leaf in ("base_down", "base_up", *(() if rank is None else ("expert_down", "expert_up")))
        if f"{linear}.{leaf}" not in tensors
    ]
    if missing:
        raise WanmoeError(
            f"{path}: {len(missing)} tensors that it says it has are missing: "
            f"{', '.join(missing[:_LISTED])}; is it whole?"
        )


def _expert_weights(info: AdapterInfo, gates: Mapping[str, float] | None) -> list[float]:
    """[E], in the order of the file."""
    experts = info.adapter.expert_set
    weights = [0.0] * len(experts)
    for name, gate in (gates or {}).items():
        if not math.isfinite(gate):
            raise WanmoeError(f"gates: the weight of {name!r} must be finite, got {gate}")
        for member, part in experts.weights(name).items():
            weights[experts.index(member)] += gate * part
    return weights


def _source(
    path: str | Path,
    info: AdapterInfo,
    gates: Mapping[str, float] | None,
    alpha_base: float,
    alpha_expert: float,
    error: float,
) -> dict[str, str]:
    """Metadata of an export: where it comes from and what it stands for."""
    source = {
        "adapter": Path(path).name,
        "sha256": file_sha256(path),
        "alpha_base": alpha_base,
        "alpha_expert": alpha_expert,
        "error": error,
        **info.model_dump(include={"task", "stage", "step", "base_sha256"}),
    }
    return {
        "noise_expert": info.noise_expert,
        "gates": json.dumps(dict(gates or {}), ensure_ascii=False),
        "wanmoe_source": json.dumps(source),
    }
