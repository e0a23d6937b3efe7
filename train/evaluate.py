"""Held-out figures of a base and an adapter, outside of training: one process, no DeepSpeed.

Letters: E experts, N held-out clips, T noise levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe_lora import Adapter, load_adapter
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import dit_hash, load_dit
from .batch import Batch, LabelGates
from .engine import RoutedDiT
from .shards import ShardDataset
from .stages import STAGES, StageSpec
from .validate import LEVELS, held_out_losses


def evaluate_files(
    dit_path: Path, shards: Path, adapter_path: Path | None, wrong_expert: bool
) -> dict[str, Any]:
    """Loads a base and an adapter and measures them on the held-out split; see `evaluate`."""
    dit = load_dit(dit_path)
    adapter = None
    stage = "frozen"
    if adapter_path is not None:
        from ..moe_lora.adapter_file import read_adapter

        stage = read_adapter(adapter_path)[0].stage
        adapter = load_adapter(adapter_path, dit, base_sha256=dit_hash(dit_path))
    return evaluate(dit, adapter, ShardDataset(shards, "val"), stage, wrong_expert)


def evaluate(
    dit: WanDiT, adapter: Adapter | None, dataset: ShardDataset, stage: str, wrong_expert: bool = False
) -> dict[str, Any]:
    """Mean loss, loss per noise level and per instrument; with `wrong_expert` also a [label][expert] matrix.

    Args:
        stage: how the adapter was trained ("a", "b", "c"), which says where its gates come from; "frozen" for none.
        wrong_expert: measure every clip with each expert alone: row = the clip's instrument, column = the expert.
    """
    spec = STAGES["pretrain" if adapter is None else stage]
    labels = [
        max(dataset.instruments(i), key=lambda pair: pair[1], default=("", 0.0))[0]
        for i in range(len(dataset))
    ]
    losses = _losses(dit, adapter, dataset, spec)
    figures: dict[str, Any] = {
        "loss": float(losses.mean()),
        "clips": len(dataset),
        "by_t": {str(t): float(x) for t, x in zip(LEVELS, losses.mean(0), strict=True)},
        "by_instrument": _by_label(losses, labels),
    }
    if adapter is not None and wrong_expert:
        names = adapter.experts.names
        columns = [
            _by_label(_losses(dit, adapter, dataset, STAGES["b"], one_hot=index), labels)
            for index in range(len(names))
        ]
        figures["by_expert"] = {
            label: {name: column[label] for name, column in zip(names, columns, strict=True)}
            for label in columns[0]
        }
    return figures


def _losses(
    dit: WanDiT, adapter: Adapter | None, dataset: ShardDataset, spec: StageSpec, one_hot: int | None = None
) -> Tensor:
    module = RoutedDiT(dit, adapter, spec).eval()

    def predict(x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        rule = batch.rule
        if one_hot is not None:
            rule = torch.zeros_like(rule)
            rule[:, one_hot] = 1.0
        v: Tensor = module(x_t, t, batch.context, batch.pooled, rule, batch.image_latent)[0]
        return v

    from ..moe_lora import ExpertSet, RouterConfig

    experts = adapter.experts if adapter is not None else ExpertSet()
    router = adapter.router_config if adapter is not None else RouterConfig()
    needed = adapter is not None and spec.routing == "labels" and one_hot is None
    return held_out_losses(predict, dataset, LabelGates(experts, router, needed))


def _by_label(losses: Tensor, labels: list[str]) -> dict[str, float]:
    return {
        name: float(losses[[i for i, label in enumerate(labels) if label == name]].mean())
        for name in sorted(set(labels))
    }
