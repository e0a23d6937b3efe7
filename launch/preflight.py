"""What can be found wrong before any process is started: cheap, and said once instead of once per rank."""

from __future__ import annotations

from importlib.util import find_spec

from ..moe_lora import AdapterConfig, WanmoeError
from ..moe_lora.adapter_file import is_adapter, read_adapter
from ..moe_lora.wan.weights import read_dit_config
from ..train import ShardDataset
from ..train.config import TrainerConfig
from ..train.data.batch import LabelGates, check_labels
from ..train.model import check_router, side_configs, wan_config_of
from ..train.ranks import check_versions
from ..train.stages import STAGES, stage_name
from .config import Config


def preflight(config: Config) -> None:
    """Raises WanmoeError for missing files, damaged shards or a stage that lacks what it needs."""
    check_versions()
    experts = config.adapter
    for name, one in side_configs(config).items():
        experts = _check_model(one, "_high_noise" if name == "high" and config.model.dit_high_noise else "")
    _check_data(config, experts)


def _check_model(config: TrainerConfig, suffix: str) -> AdapterConfig:
    """Checks the files of one model, whose keys end in `suffix`; returns the adapter that will train."""
    stage, model = config.train.stage, config.model
    if model.dit is not None and not model.dit.exists():
        raise WanmoeError(f"model.dit{suffix}: {model.dit} does not exist")
    if model.dit is not None and is_adapter(model.dit):
        raise WanmoeError(
            f"model.dit{suffix}: {model.dit} is an adapter; it goes under model.adapter{suffix}"
        )
    if stage == "pretrain" and model.adapter is not None:
        raise WanmoeError("model.adapter: stage pretrain trains the base and takes no adapter")
    if stage != "pretrain" and model.dit is None:
        raise WanmoeError(
            f"model.dit is missing: stage {stage} adapts a trained base; run stage pretrain first"
        )
    if model.adapter is None and (stage == "c" or config.train.freeze_base):
        before = "a" if stage == "b" else "b"
        raise WanmoeError(
            f"model.adapter{suffix} is missing: stage {stage} starts from the adapter of stage {before}"
            + (", or trains a base of its own without train.freeze_base" if stage == "b" else "")
        )
    experts = config.adapter
    if model.adapter is not None:
        info = read_adapter(model.adapter)[0]
        if stage == "c" and info.stage == "a":
            raise WanmoeError(
                f"model.adapter{suffix}: {model.adapter} is of stage a, whose experts are all zero; stage c "
                "starts from the adapter of stage b"
            )
        experts = info.adapter
    if stage != "pretrain":
        check_router(config)
    _check_held(config)
    spec = STAGES[stage_name(config)]
    if "base" in spec.trains and model.dit is not None:
        experts.check_base_trains(read_dit_config(model.dit)[0].num_layers)
    return experts


def _check_held(config: TrainerConfig) -> None:
    """How the base is to be held, as far as it can be told before ranks start."""
    blocks = wan_config_of(config).num_layers
    if config.ring.blocks != "auto" and config.ring.blocks > blocks:
        raise WanmoeError(f"ring.blocks = {config.ring.blocks}: the model has {blocks} blocks")
    if config.model.quantised == "nf4" and find_spec("bitsandbytes") is None:
        raise WanmoeError("model.quantised = \"nf4\" needs bitsandbytes: pip install 'wanmoe[nf4]'")


def _check_data(config: Config, experts: AdapterConfig) -> None:
    stage, spec = config.train.stage, STAGES[stage_name(config)]
    if config.data.reader == "streaming" and config.data.balanced and spec.routing in ("labels", "router"):
        raise WanmoeError(
            "data.balanced: a stream cannot be balanced over the instruments; set data.balanced = false, or "
            'data.reader = "indexed"'
        )
    for split in ("train", "val"):
        dataset = ShardDataset(config.data.shards, split)
        if stage != "pretrain":
            # Stage a needs no labels, but the experts of its file must be those that the labels speak of.
            gates = LabelGates(experts.expert_set, config.router, needed=True)
            check_labels(dataset, gates, every=spec.routing in ("labels", "router"))
        by_region = split == "val" and (config.train.early_stop or "").startswith("val/roi")
        if by_region and not any(dataset.has_region(index) for index in range(len(dataset))):
            raise WanmoeError(
                f"train.early_stop = {config.train.early_stop!r}: no held-out clip of {config.data.shards} "
                'has a region; set it to "val/loss"'
            )
        if "router" not in spec.trains and config.data.caption_dropout and dataset.null_context is None:
            raise WanmoeError(
                f"{config.data.shards}: prepared without the encoding of an empty caption; prepare the clips "
                "again or set data.caption_dropout = 0"
            )
