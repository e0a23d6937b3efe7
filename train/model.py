"""The model of a run: base, adapter and noise levels, checked against each other and the data."""

from __future__ import annotations

from pathlib import Path

import torch

from ..moe_lora import Adapter, WanmoeError, attach, load_adapter
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import dit_hash, load_dit
from .batch import LabelGates
from .config import TrainerConfig
from .shards import ShardDataset
from .stages import StageSpec


def load_model(config: TrainerConfig) -> tuple[WanDiT, Adapter | None, str]:
    """(frozen DiT with its adapter attached, the adapter, hash of the base) as a config asks for."""
    model = config.model
    if model.dit is None:
        torch.manual_seed(config.train.seed)
        dit, base = WanDiT(WanConfig.preset(str(model.preset))), ""
    else:
        dit, base = load_dit(model.dit), dit_hash(model.dit)
    if config.train.stage == "pretrain":
        return dit, None, base
    if model.adapter is None:
        adapter = attach(dit, config.adapter, config.router, seed=config.train.seed)
    else:
        adapter = load_adapter(
            model.adapter,
            dit,
            noise_expert=model.noise_expert,
            base_sha256=base,
            router=config.router,
            any_base=model.any_base,
        )
        check_same_adapter(config, adapter, model.adapter)
    return dit, adapter, base


def check_same_adapter(config: TrainerConfig, adapter: Adapter, path: Path) -> None:
    """A key that the config sets must agree with the adapter file that the stage starts from."""
    for key in config.adapter.model_fields_set:
        asked, found = getattr(config.adapter, key), getattr(adapter.config, key)
        if asked != found and not key.endswith("_dropout"):
            raise WanmoeError(f"adapter.{key} = {asked} but {path} has {found}; drop the key or start afresh")


def check_text_width(dit: WanDiT, dataset: ShardDataset) -> None:
    """Shards encoded for another text encoder or task are refused before the first step."""
    sample = dataset[0]
    if sample.context.shape[-1] != dit.config.text_dim:
        raise WanmoeError(
            f"{dataset.root}: text embeddings are {sample.context.shape[-1]} wide, the model reads "
            f"{dit.config.text_dim}; prepare the clips with this model's text encoder"
        )
    if (dit.config.task == "i2v") != (sample.image_latent is not None):
        raise WanmoeError(f"{dataset.root}: prepared for another task than {dit.config.task}; prepare again")


def unseen_experts(dataset: ShardDataset, gates: LabelGates) -> list[str]:
    """Experts that no labelled clip of a dataset gives any weight."""
    total = torch.zeros(len(gates.rule.experts))
    for index, key in enumerate(dataset.keys):
        if not dataset.instruments(index):
            return []  # routed by caption, which the index does not hold
        total += gates(key, dataset.instruments(index), "")
    return [name for name, weight in zip(gates.rule.experts.names, total, strict=True) if weight == 0]


def side_of(config: TrainerConfig, boundary: float) -> tuple[float, float]:
    """Noise levels that the model serves."""
    return {"high": (boundary, 1.0), "low": (0.0, boundary), "both": (0.0, 1.0)}[config.model.noise_expert]


def side_range(config: TrainerConfig, spec: StageSpec, boundary: float) -> tuple[float, float]:
    """Noise levels that are trained: the configured (or the stage's) range within the model's side."""
    side, asked = side_of(config, boundary), config.objective.t_range or spec.t_range
    low, high = max(side[0], asked[0]), min(side[1], asked[1])
    if not low < high:
        raise WanmoeError(
            f"objective.t_range {list(asked)} leaves nothing of [{side[0]}, {side[1]}], the side of the "
            f"{config.model.noise_expert} noise expert"
        )
    return low, high
