"""What can be found wrong before any process is started: cheap, and said once instead of once per rank."""

from __future__ import annotations

from ..moe_lora import WanmoeError
from ..moe_lora.adapter_file import read_adapter
from ..train import ShardDataset
from ..train.engine import check_versions
from .config import Config


def preflight(config: Config) -> None:
    """Raises WanmoeError for missing files, damaged shards or a stage that lacks what it needs."""
    check_versions()
    stage, model = config.train.stage, config.model
    if model.dit is not None and not model.dit.exists():
        raise WanmoeError(f"model.dit: {model.dit} does not exist")
    if stage == "pretrain" and model.adapter is not None:
        raise WanmoeError("model.adapter: stage pretrain trains the base and takes no adapter")
    if stage != "pretrain" and model.dit is None:
        raise WanmoeError(
            f"model.dit is missing: stage {stage} adapts a trained base; run stage pretrain first"
        )
    if stage in ("b", "c") and model.adapter is None:
        before = "a" if stage == "b" else "b"
        raise WanmoeError(
            f"model.adapter is missing: stage {stage} starts from the adapter of stage {before}"
        )
    if (stage == "c" or config.train.train_router) and config.router.mode != "learned":
        raise WanmoeError("router.mode = 'rule' but a router is to be trained; set router.mode = 'learned'")
    if model.adapter is not None:
        read_adapter(model.adapter)
    for split in ("train", "val"):
        ShardDataset(config.data.shards, split)
