"""Held-out figures of a base and an adapter, outside of training: one process, no DeepSpeed.

Letters: E experts, N held-out clips, T noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe_lora import Adapter, ExpertSet, RouterConfig, load_adapter
from ..moe_lora.adapter_file import read_adapter, router_of
from ..moe_lora.routing import RuleRouter, learned_gates, pool_text
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import dit_hash, load_dit
from .data.batch import Batch, LabelGates, main_instrument
from .data.shards import ShardDataset
from .model import side_of
from .routed import Routed, RoutedDiT
from .stages import STAGES, StageSpec
from .validate import LEVELS, HeldOut, held_out_errors, levels_within


def evaluate_files(
    dit_path: Path, shards: str | Path, adapter_path: Path | None, wrong_expert: bool
) -> dict[str, Any]:
    """Loads a base and an adapter and measures them on the held-out split; see `evaluate`."""
    dit = load_dit(dit_path)
    dataset = ShardDataset(shards, "val")
    if adapter_path is None:
        return evaluate(dit, None, dataset, "pretrain")
    info, _ = read_adapter(adapter_path)
    adapter = load_adapter(adapter_path, dit, base_sha256=dit_hash(dit_path))
    levels = levels_within(side_of(info.noise_expert, dit.config.boundary))
    return evaluate(dit, adapter, dataset, info.stage, wrong_expert, levels)


def evaluate(
    dit: WanDiT,
    adapter: Adapter | None,
    dataset: ShardDataset,
    stage: str,
    wrong_expert: bool = False,
    levels: Sequence[float] = LEVELS,
) -> dict[str, Any]:
    """Mean loss, loss per noise level, per instrument and in the region; with `wrong_expert` also a
    [label][expert] matrix.

    Args:
        stage: row of the stage table that says where gates come from: "a", "b", "c", "pretrain" for no
        adapter.
        wrong_expert: measure every clip with each expert routed: row = the clip's instrument, column = the
        expert.
    """
    labels = [main_instrument(dataset, index) for index in range(len(dataset))]
    errors = _errors(dit, adapter, dataset, STAGES[stage], levels)
    figures: dict[str, Any] = {
        "loss": float(errors.loss.mean()),
        "clips": len(dataset),
        "by_t": {str(t): float(x) for t, x in zip(levels, errors.loss.mean(0), strict=True)},
        "by_instrument": _by_label(errors.loss, labels),
    }
    if errors.has_region.any():
        figures["roi"] = float(errors.roi[errors.has_region].mean())
    if adapter is not None and wrong_expert:
        names = adapter.experts.names
        columns = [
            _by_label(_errors(dit, adapter, dataset, STAGES["b"], levels, one_hot=index).loss, labels)
            for index in range(len(names))
        ]
        figures["by_expert"] = {
            label: {name: column[label] for name, column in zip(names, columns, strict=True)}
            for label in columns[0]
        }
    return figures


@torch.no_grad()
def held_out_gates(adapter_path: Path, dataset: ShardDataset) -> dict[str, dict[str, list[float]]]:
    """Mean gates per instrument on the held-out captions: {"router": learned, "rule": by the words}.

    Needs the adapter file alone: the router reads text, and no first frame where it knows one.
    """
    info, tensors = read_adapter(adapter_path)
    router = router_of(info, tensors, adapter_path)
    rule = RuleRouter(info.adapter.expert_set, info.router.top_k, info.router.temperature)
    rows: dict[str, dict[str, list[Tensor]]] = {"router": {}, "rule": {}}
    for index in range(len(dataset)):
        sample, label = dataset[index], main_instrument(dataset, index)
        learned = learned_gates(router(pool_text([sample.context])), info.router, training=False)[0]
        rows["router"].setdefault(label, []).append(learned)
        rows["rule"].setdefault(label, []).append(rule.route(prompt=sample.caption))
    return {
        kind: {label: torch.stack(gates).mean(0).tolist() for label, gates in by_label.items()}
        for kind, by_label in rows.items()
    }


def _errors(
    dit: WanDiT,
    adapter: Adapter | None,
    dataset: ShardDataset,
    spec: StageSpec,
    levels: Sequence[float],
    one_hot: int | None = None,
) -> HeldOut:
    module = RoutedDiT(dit, adapter, spec).eval()

    def predict(x_t: Tensor, t: Tensor, batch: Batch) -> Routed:
        rule = batch.rule
        if one_hot is not None:
            rule = torch.zeros_like(rule)
            rule[:, one_hot] = 1.0
        context = [tokens.float() for tokens in batch.context]
        image = None if batch.image_latent is None else batch.image_latent.float()
        routed: Routed = module(x_t, t, context, batch.pooled, rule, image)
        return routed

    experts = adapter.experts if adapter is not None else ExpertSet()
    router = adapter.router_config if adapter is not None else RouterConfig()
    needed = spec.routing == "labels" and one_hot is None
    return held_out_errors(predict, dataset, LabelGates(experts, router, needed), levels=levels)


def _by_label(losses: Tensor, labels: list[str]) -> dict[str, float]:
    return {
        name: float(losses[[i for i, label in enumerate(labels) if label == name]].mean())
        for name in sorted(set(labels))
    }
