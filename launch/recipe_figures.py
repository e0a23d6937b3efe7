"""The figures of one adapter in the table of recipes: held-out errors, and what is seen in clips that it
made again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..moe_lora import Adapter, ExpertSet, RouterConfig, load_adapter, load_dit
from ..moe_lora.adapter import Part
from ..moe_lora.adapter_file import read_adapter
from ..train.data.batch import Batch, LabelGates
from ..train.data.shards import ShardDataset
from ..train.judges.judge import Classifier, Detector, load_classifier, load_detector
from ..train.judges.measures import pad_tips, pck, true_tips
from ..train.regenerate import regenerate
from ..train.routed import Routed, RoutedDiT
from ..train.stages import STAGES, StageSpec
from ..train.validate import HeldOut, held_out_errors

RADIUS = 8.0
COLUMNS: dict[str, str] = {
    "parameters": "trained parameters",
    "loss": "held-out loss",
    "roi": "in the region",
    "withheld": "caption withheld",
    "pairs": "two instruments, in the region",
    "wrong": "wrong expert less right",
    "identity": "identity",
    "identity_withheld": "identity, caption withheld",
    "pck": f"tip PCK@{RADIUS:g}px",
}


def measure(
    base: Path,
    adapter_path: Path | None,
    shards: Path,
    pairs: Path,
    classifier: Path,
    detector: Path,
    trained: Iterable[Part],
) -> dict[str, float]:
    """One row of the table by the keys of COLUMNS; `wrong` only where the experts route.

    loss, roi: flow-matching error over nine noise levels, of the picture and of the instruments' region;
    withheld: `loss` with the encoding of no caption in place of the caption; pairs: `roi` of clips that show
    two instruments, each with half of the gates; wrong: by how much `loss` rises
    with a wrong expert, which of them takes turns from clip to clip; identity, pck: of the held-out clips
    noised to t = 0.8 and made again (`regenerate`), how many the classifier takes for what they are, and how
    many tips lie within RADIUS pixels of the true ones.
    """
    model = Model(base, adapter_path, shards)
    figures = {"parameters": float(0 if model.adapter is None else model.adapter.count(tuple(trained)))}
    errors = held_out_errors(model, model.data, model.gates)
    figures |= {"loss": float(errors.loss.mean()), "roi": _in_region(errors)}
    figures["pairs"] = _in_region(held_out_errors(model, ShardDataset(pairs, "val"), model.gates))
    model.withheld = True
    figures["withheld"] = float(held_out_errors(model, model.data, model.gates).loss.mean())
    model.withheld = False
    if model.spec.routing in ("labels", "router") and model.adapter is not None:
        right = figures["loss"] if model.spec.routing == "labels" else model.with_expert("right")
        figures["wrong"] = model.with_expert("wrong") - right
    judge, finder = load_classifier(classifier), load_detector(detector)
    figures["identity"], figures["pck"] = model.seen(judge, finder)
    model.withheld = True
    figures["identity_withheld"], _ = model.seen(judge, finder)
    return figures


def _in_region(errors: HeldOut) -> float:
    return float(errors.roi[errors.has_region].mean())


class Model:
    """A base with an adapter, as `held_out_errors` and `regenerate` call it."""

    def __init__(self, base: Path, adapter_path: Path | None, shards: Path) -> None:
        dit = load_dit(base)
        self.adapter: Adapter | None = None
        self.spec: StageSpec = STAGES["pretrain"]
        if adapter_path is not None:
            self.adapter = load_adapter(adapter_path, dit)
            self.spec = STAGES[read_adapter(adapter_path)[0].stage]
        self.data = ShardDataset(shards, "val")
        experts = ExpertSet() if self.adapter is None else self.adapter.experts
        router = RouterConfig() if self.adapter is None else self.adapter.router_config
        self.gates = LabelGates(experts, router, needed=True)
        self.routed = RoutedDiT(dit, self.adapter, self.spec).eval()
        self.by_label = RoutedDiT(dit, self.adapter, STAGES["b"]).eval()
        self.withheld = False
        """Whether the caption is taken away: then the gates alone say which instrument it is."""
        self.expert: Literal["right", "wrong"] | None = None
        """The experts of the labels, or others; None: as the stage routes."""

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Routed:
        context = [tokens.float() for tokens in batch.context]
        if self.withheld:
            assert self.data.null_context is not None
            context = [self.data.null_context.float()] * len(context)
        routed: Routed
        if self.expert is None:
            routed = self.routed(x_t, t, context, batch.pooled, batch.rule)
        else:
            gates = batch.rule
            if self.expert == "wrong":
                others = gates.shape[1] - 1
                turned = [
                    row.roll(1 + index % others) for row, index in zip(gates, batch.positions, strict=True)
                ]
                gates = torch.stack(turned)
            routed = self.by_label(x_t, t, context, batch.pooled, gates)
        return routed

    def with_expert(self, expert: Literal["right", "wrong"]) -> float:
        """Loss with the experts of the labels, or with the next, the one after it, ... in turn."""
        self.expert = expert
        loss = float(held_out_errors(self, self.data, self.gates).loss.mean())
        self.expert = None
        return loss

    def seen(self, judge: Classifier, finder: Detector) -> tuple[float, float]:
        """(accuracy of the classifier, PCK of the detector) on held-out clips that were made again."""
        right, found, truth = [], [], []
        metas = iter(self.data[index].meta for indices in self.data.buckets.values() for index in indices)
        for batch, latent in regenerate(lambda x, t, b: self(x, t, b).v, self.data, self.gates):
            right.append((judge.predict(latent) == batch.rule.argmax(1)).float())
            found.append(finder.tips(latent))
            truth += [true_tips(next(metas), latent.shape[2]) for _ in batch.keys]
        return float(torch.cat(right).mean()), pck(torch.cat(found), pad_tips(truth), RADIUS)


def judged(classifier: Path, detector: Path) -> dict[str, object]:
    """How well the two judges did on true held-out clips: the ceiling of what they say of others."""
    return {
        "classifier": load_classifier(classifier).info.held_out,
        "detector": load_detector(detector).info.held_out,
    }
