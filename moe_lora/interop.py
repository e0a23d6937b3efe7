"""Any known adapter file attached to a DiT: ours, the seed fork's, or a plain LoRA as its base.

Letters: E experts, r rank. dW is what a file adds to the weight of one linear.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter, AdapterConfig, LoRAMoELinear, attach
from .adapter_file import is_adapter, load_adapter
from .errors import WanmoeError
from .fork_file import ForkFile, is_fork, read_fork
from .instruments import known_experts
from .lora_file import LoRAFile, image_layers, read_lora
from .low_rank import check_finite, relative_error, truncate
from .routing import RouterConfig

if TYPE_CHECKING:
    from .wan.dit import WanDiT

__all__ = ["import_adapter"]

Device: TypeAlias = str | torch.device | None

_logger = logging.getLogger(__name__)

FORK_TIMESTEP_GATE = 0.7876
"""What the fork multiplied its experts by at every noise level: its timestep gate never learned."""

_LISTED = 4
_ADAPTABLE = re.compile(r"^blocks\.(?P<block>\d+)\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.[02])$")


def import_adapter(
    path: str | Path,
    dit: WanDiT,
    *,
    config: AdapterConfig | None = None,
    base: Literal["keep", "svd"] = "keep",
    noise_expert: str | None = None,
    fold_timestep: bool = False,
    any_base: bool = False,
    config_file: Path | None = None,
    device: Device = None,
) -> Adapter:
    """Attaches the adapter of any known file to a DiT: ours, the seed fork's, or a plain LoRA as its base.

    Args:
        config: experts and ranks that a plain LoRA gets beside it; the experts are fresh and change nothing
            yet. Ours and the fork's files bring their own.
        base: what becomes of a plain LoRA: "keep" carries it whole, at its own ranks, on every linear that it
            has; "svd" cuts it to the linears and ranks of `config` and logs what that loses.
        noise_expert: "high", "low" or "both", what `dit` serves; a file of one side goes to that side alone.
        fold_timestep: multiply the fork's experts by the constant that its timestep gate was (0.7876), and
            switch our bands over t off: what the fork computed. Otherwise the bands take the gate's place.
        any_base: load in spite of another noise expert, or of one that is none; for our files also another
            task or base.
        config_file: the fork's config file, for files of it whose metadata says too little.
        device: where a foreign file's adapter lies, by default beside the linears; lets `dit` be on the meta
            device, for a conversion that never reads the model.

    Raises:
        WanmoeError: names the file and what does not fit.
    """
    path = Path(path)
    if is_adapter(path):
        return load_adapter(path, dit, noise_expert=noise_expert, any_base=any_base)
    if is_fork(path):
        fork = read_fork(path, config_file, noise_expert if any_base else None)
        _check_side(path, fork.noise_expert, noise_expert, any_base)
        return _from_fork(fork, path, dit, fold_timestep, device)
    file = read_lora(path, noise_expert if any_base else None)
    _check_side(path, file.noise_expert, noise_expert, any_base)
    if not dit.config.image_dim and (dropped := image_layers(file.deltas)):
        _logger.info(
            "%s: %d of its %d layers are of an image encoder, which this model has not; left out",
            *(path, len(dropped), len(file.deltas)),
        )
        file = file._replace(deltas={n: delta for n, delta in file.deltas.items() if n not in dropped})
    dense = [name for name, delta in file.deltas.items() if delta.diff or delta.diff_b]
    if dense:
        raise WanmoeError(
            f"{path}: changes weights or biases by full differences ({_names(dense)}), which no adapter can "
            f"hold; merge it into the model instead: --lora {path}"
        )
    _check_blocks(file.label, file.deltas, dit)
    config = config or AdapterConfig()
    return (_kept if base == "keep" else _truncated)(file, dit, config, device)


def _check_side(path: Path, stated: str | None, wanted: str | None, any_base: bool) -> None:
    if wanted and stated not in (None, "both", wanted) and not any_base:
        raise WanmoeError(
            f"{path}: it belongs to the {stated} noise expert, this model is {wanted}; pass any_base "
            "(--any_base) to load it all the same"
        )


def _check_blocks(label: str, linears: Iterable[str], dit: WanDiT) -> None:
    inside = (name for name in linears if name.startswith("blocks."))
    beyond = [name for name in inside if int(name.split(".")[1]) >= len(dit.blocks)]
    if beyond:
        raise WanmoeError(
            f"{label}: changes {_names(beyond)}, but this model has {len(dit.blocks)} blocks; is it for "
            "another Wan?"
        )


def _names(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _from_fork(fork: ForkFile, path: Path, dit: WanDiT, fold_timestep: bool, device: Device) -> Adapter:
    config = _fork_config(fork, path)
    _check_blocks(fork.label, fork.linears, dit)
    router = RouterConfig(bands=((0.0, 1.0),)) if fold_timestep else RouterConfig()
    adapter = attach(dit, config, router, device=device)
    for name, module in adapter.modules.items():
        if name not in fork.linears:
            _logger.info("%s: does not adapt %s; it stays without an adapter's effect", path, name)
            continue
        linear = fork.linears[name]
        if linear.base_down is not None and linear.base_up is not None:
            scale = config.alpha / linear.base_down.shape[0] / module.scale_base
            _fill(module, "base", linear.base_down, linear.base_up * scale, f"{path}: {name}")
        scale = config.alpha / linear.expert_down.shape[1] / module.scale_expert
        scale *= FORK_TIMESTEP_GATE if fold_timestep else 1.0
        _fill(module, "expert", linear.expert_down, linear.expert_up * scale, f"{path}: {name}")
    for note in fork.notes:
        _logger.info("%s: %s", path, note)
    return adapter


def _fork_config(fork: ForkFile, path: Path) -> AdapterConfig:
    """The smallest config of ours that covers a fork file; where it has a smaller rank, ours is padded."""
    ranks = {"q": 1, "k": 1, "v": 1, "o": 1, "ffn": 1}
    ffn = {name.partition(".ffn.")[2] for name in fork.linears if ".ffn." in name}
    blocks, ffn_blocks = set(), set()
    base_ranks = {}
    for name, linear in fork.linears.items():
        match = _ADAPTABLE.match(name)
        if match is None:
            raise WanmoeError(f"{path}: adapts {name}, which no adapter of ours can")
        projection = "ffn" if ".ffn." in name else name[-1]
        ranks[projection] = max(ranks[projection], linear.expert_down.shape[1])
        blocks.add(int(match["block"]))
        if projection == "ffn":
            ffn_blocks.add(int(match["block"]))
        if linear.base_down is not None:
            base_ranks[name] = linear.base_down.shape[0]
    own = {name: ranks["ffn" if ".ffn." in name else name[-1]] for name in base_ranks}
    return AdapterConfig(
        experts=known_experts(fork.expert_names),
        **{f"rank_{projection}": rank for projection, rank in ranks.items()},
        base_ranks={name: rank for name, rank in base_ranks.items() if rank != own[name]},
        blocks=tuple(sorted(blocks)),
        ffn_blocks=sum(block >= min(ffn_blocks) for block in blocks) if ffn_blocks else 0,
        ffn_layers=tuple(layer for layer in ("ffn.0", "ffn.2") if layer.removeprefix("ffn.") in ffn)
        or ("ffn.0",),
        alpha=fork.alpha,
    )


def _kept(file: LoRAFile, dit: WanDiT, config: AdapterConfig, device: Device) -> Adapter:
    """The LoRA as it is: the base adapter at its own ranks, on every linear that it has."""
    outside = [name for name in file.deltas if _ADAPTABLE.match(name) is None]
    if outside:
        raise WanmoeError(
            f"{file.label}: changes {_names(outside)}, where an adapter cannot sit; merge it into the model "
            f"instead (--lora {file.label}), or leave those out with base = 'svd'"
        )
    own = {name: config.rank_base or rank for name, rank in config.ranks(len(dit.blocks)).items()}
    ranks = {name: delta.rank for name, delta in file.deltas.items() if own.get(name) != delta.rank}
    adapter = attach(dit, config.model_copy(update={"base_ranks": ranks}), device=device)
    for name, delta in file.deltas.items():
        down, up = delta.factors()
        module = adapter.modules[name]
        _fill(module, "base", down, up.float() * (delta.scale / module.scale_base), f"{file.label}: {name}")
    return adapter


def _truncated(file: LoRAFile, dit: WanDiT, config: AdapterConfig, device: Device) -> Adapter:
    """The LoRA cut to the linears and ranks of `config`; says how much of dW that loses."""
    adapter = attach(dit, config, device=device)
    lost = total = outside = 0.0
    for name, delta in file.deltas.items():
        down, up = (factor.float() for factor in delta.factors())
        check_finite(f"{file.label}: {name}", down, up)
        module = adapter.modules.get(name)
        rank = 0 if module is None else module.base_down.shape[0]
        cut = truncate(down, up * delta.scale, rank)
        total += cut.total
        if module is None:
            outside += cut.total
            continue
        lost += cut.lost
        _fill(module, "base", cut.down, cut.up / module.scale_base, f"{file.label}: {name}")
        error = relative_error(cut.lost, cut.total)
        _logger.info("%s: %s: rank %d to %d, error %.3g of |dW|", file.label, name, delta.rank, rank, error)
    _logger.info(
        "%s: cut to the adapter's ranks: error %.3g of |dW| in the linears that it adapts; %.1f %% of |dW|^2 "
        "is in linears that it does not adapt and was left out",
        file.label,
        relative_error(lost, total - outside),
        100 * (outside / total if total else 0.0),
    )
    return adapter


def _fill(
    module: LoRAMoELinear, part: Literal["base", "expert"], down: Tensor, up: Tensor, label: str
) -> None:
    """Copies factors [.., r, in], [.., out, r] into a part of an adapted linear, padded to its rank."""
    check_finite(label, down, up)
    own_down, own_up = module.get_parameter(f"{part}_down"), module.get_parameter(f"{part}_up")
    missing = max(0, own_down.shape[-2] - down.shape[-2])
    down, up = F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
    if down.shape != own_down.shape or up.shape != own_up.shape:
        raise WanmoeError(
            f"{label}: the file has {down.shape[-1]} -> {up.shape[-2]}, this model {own_down.shape[-1]} -> "
            f"{own_up.shape[-2]}; is it for another Wan?"
        )
    own_down.data.copy_(down)
    own_up.data.copy_(up)
