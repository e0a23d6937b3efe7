"""The figures of one row of an ablation: held-out errors, and what is seen in clips that it made again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..infer.evaluation.distance import kernel
from ..infer.evaluation.evaluate import Judges, evaluate
from ..infer.evaluation.features import EFFICIENTNET, load_backbone
from ..infer.evaluation.scene import Scene
from ..moe_lora import Adapter, ExpertSet, RouterConfig, load_adapter, load_dit
from ..moe_lora.adapter import Part
from ..moe_lora.adapter_file import read_adapter
from ..moe_lora.video import to_frames
from ..train.data.batch import Batch, LabelGates
from ..train.data.shards import ShardDataset
from ..train.judges.judge import Classifier, Detector, load_classifier, load_detector
from ..train.judges.measures import pad_tips, tip_errors, true_tips
from ..train.model import side_of
from ..train.objective import open_codec
from ..train.regenerate import regenerate
from ..train.routed import Routed, RoutedDiT
from ..train.stages import STAGES, StageSpec
from ..train.validate import LEVELS, HeldOut, held_out_errors, levels_within
from .evaluation_run import decoded_scene, first_frame

SCENE_FIGURES = ("warped_psnr", "warped_ssim", "fds", "gatc")
_RADII = {"pck": 8.0, "tip_pck@5px": 5.0, "tip_pck@10px": 10.0, "tip_pck@20px": 20.0}
TIP_FIGURES = tuple(_RADII)


class Figure(NamedTuple):
    """A figure of a row with one seed."""

    value: float
    each: list[float] | None = None
    """By held-out clip, NaN where it has none; None for a figure of the whole set."""


class Measured(NamedTuple):
    """What a row is measured on, and by whom."""

    shards: Path
    pairs: Path | None
    classifier: Path
    asked: Path
    """The classifier that the row was trained with, whose word on the first frame its router may read."""
    detector: Path | None
    vae: str
    device: torch.device


def measure(
    figures: Sequence[str],
    base: Path,
    adapter_path: Path | None,
    on: Measured,
    trained: Iterable[Part],
) -> dict[str, Figure]:
    """One row by the keys of `FIGURES` that are asked for and that it has: without an adapter there is no
    wrong expert, and without a tip in any clip no share of tips.

    loss, roi: flow-matching error over nine noise levels, of the picture and of the instruments' region;
    withheld: `loss` with the encoding of no caption in place of the caption; pairs: `roi` of clips that show
    two instruments, each with half of the gates; wrong: by how much `loss` rises with a wrong expert, which
    of them takes turns from clip to clip; identity, tip PCK: of the held-out clips noised to t = 0.8 and made
    again (`regenerate`), how many the classifier takes for what they are, and how many tips lie within so
    many pixels of the true ones; the others as in `wanmoe evaluate`, of the same clips decoded;
    router_agreement: held-out clips whose strongest expert, as the stage routes, is that of the label.
    """
    model = Model(base, adapter_path, on)
    wanted = set(figures)
    count = 0 if model.adapter is None else model.adapter.count(tuple(trained))
    found = {"parameters": Figure(float(count))}
    errors = model.errors()
    found |= {"loss": _mean(errors.loss.mean(1)), "roi": _in_region(errors)}
    if on.pairs is not None and "pairs" in wanted:
        found["pairs"] = _in_region(model.errors(ShardDataset(on.pairs, "val")))
    if "withheld" in wanted:
        with model.without_captions():
            found["withheld"] = _mean(model.errors().loss.mean(1))
    routes = model.spec.routing in ("labels", "router") and model.adapter is not None
    if routes and "wrong" in wanted:
        right = errors.loss.mean(1) if model.spec.routing == "labels" else model.with_expert("right")
        found["wrong"] = _mean(model.with_expert("wrong") - right)
    if routes and "router_agreement" in wanted and model.spec.routing == "router":
        found["router_agreement"] = _mean(model.agreement(errors))
    judge = load_classifier(on.classifier, on.device)
    finder = None if on.detector is None else load_detector(on.detector, on.device)
    if wanted & {"identity", *TIP_FIGURES, *SCENE_FIGURES, "kid"}:
        found |= model.made_again(judge, finder, wanted)
    if "identity_withheld" in wanted:
        with model.without_captions():
            found["identity_withheld"] = model.made_again(judge, None, {"identity"})["identity"]
    # Not finite: no held-out clip has what the figure needs (a region, a tip, an instrument).
    return {key: found[key] for key in figures if key in found and math.isfinite(found[key].value)}


def _mean(each: Tensor) -> Figure:
    return Figure(float(each.mean()), each.tolist())


def _in_region(errors: HeldOut) -> Figure:
    each = errors.roi.mean(1)
    each[~errors.has_region] = torch.nan
    return Figure(float(errors.roi[errors.has_region].mean()), each.tolist())


class _Switch:
    def __init__(self, model: Model) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.withheld = True

    def __exit__(self, *_: object) -> None:
        self.model.withheld = False


class Model:
    """A base with an adapter, as `held_out_errors` and `regenerate` call it."""

    def __init__(self, base: Path, adapter_path: Path | None, on: Measured) -> None:
        self.device, self.vae = on.device, on.vae
        dit = load_dit(base, device=on.device)
        self.levels: tuple[float, ...] = LEVELS
        self.adapter: Adapter | None = None
        self.spec: StageSpec = STAGES["pretrain"]
        if adapter_path is not None:
            self.adapter = load_adapter(adapter_path, dit)
            info = read_adapter(adapter_path)[0]
            self.spec = STAGES[info.stage]
            self.levels = levels_within(side_of(info.noise_expert, dit.config.boundary))
        self.data = ShardDataset(on.shards, "val")
        experts = ExpertSet() if self.adapter is None else self.adapter.experts
        router = RouterConfig() if self.adapter is None else self.adapter.router_config
        self.gates = LabelGates(experts, router, needed=self.spec.routing == "labels")
        self.dtype = next(dit.parameters()).dtype
        self.routed = RoutedDiT(dit, self.adapter, self.spec).eval().to(on.device)
        self.evidence = first_frame(on.asked, router, on.device)
        self.by_label = RoutedDiT(dit, self.adapter, STAGES["b"]).eval().to(on.device)
        self.withheld = False
        """Whether the caption is taken away: then the gates alone say which instrument it is."""
        self.expert: Literal["right", "wrong"] | None = None
        """The experts of the labels, or others; None: as the stage routes."""

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Routed:
        texts = batch.context
        if self.withheld:
            assert self.data.null_context is not None
            texts = [self.data.null_context] * len(texts)
        context = [tokens.to(self.device, self.dtype) for tokens in texts]
        x_t, t = x_t.to(self.device, self.dtype), t.to(self.device)
        image = None if batch.image_latent is None else batch.image_latent.to(self.device, self.dtype)
        pooled, gates = batch.pooled.to(self.device), batch.rule.to(self.device)
        routed: Routed
        if self.expert is None:
            seen = self.evidence(batch.latent)
            routed = self.routed(x_t, t, context, pooled, gates, image, evidence=seen)
        else:
            if self.expert == "wrong":
                others = gates.shape[1] - 1
                turned = [
                    row.roll(1 + index % others) for row, index in zip(gates, batch.positions, strict=True)
                ]
                gates = torch.stack(turned)
            routed = self.by_label(x_t, t, context, pooled, gates, image)
        return routed

    def errors(self, data: ShardDataset | None = None) -> HeldOut:
        """Held-out errors, of other clips where they are given."""
        data = self.data if data is None else data
        return held_out_errors(self, data, self.gates, levels=self.levels, device=self.device)

    def without_captions(self) -> _Switch:
        """A block in which captions are withheld."""
        return _Switch(self)

    def with_expert(self, expert: Literal["right", "wrong"]) -> Tensor:
        """Loss [N] with the experts of the labels, or with the next, the one after it, ... in turn."""
        self.expert = expert
        loss = self.errors().loss.mean(1)
        self.expert = None
        return loss

    def agreement(self, errors: HeldOut) -> Tensor:
        """[N]: 1 where the strongest gate that the model got is that of the label."""
        labels = torch.stack(
            [self.gates(key, self.data.instruments(index)) for index, key in enumerate(self.data.keys)]
        )
        return (labels.gather(1, errors.gates.argmax(1)[:, None])[:, 0] >= labels.amax(1)).float()

    def made_again(self, judge: Classifier, finder: Detector | None, wanted: set[str]) -> dict[str, Figure]:
        """What is seen in held-out clips that were made again."""
        seen: list[Tensor] = []
        apart: list[Tensor] = []
        made: dict[int, Tensor] = {}
        places = [index for indices in self.data.buckets.values() for index in indices]
        order = iter(places)
        for _, latents in regenerate(lambda x, t, b: self(x, t, b).v.cpu(), self.data, self.gates):
            for latent in latents:
                made[next(order)] = latent
        for index in range(len(self.data)):
            sample, latent = self.data[index], made[index][None].to(self.device)
            target = judge.targets(sample.instruments)
            seen.append((target[judge.predict(latent).cpu()] >= target.max()).float()[0])
            if finder is not None:
                truth = true_tips(sample.meta, latent.shape[2])
                apart.append(tip_errors(finder.tips(latent).cpu(), pad_tips([truth])))
        out = {"identity": _mean(torch.stack(seen))}
        if finder is not None:
            for key, radius in _RADII.items():
                each = [float((errors <= radius).float().mean()) for errors in apart]
                out[key] = Figure(float((torch.cat(apart) <= radius).float().mean()), each)
        if wanted & {*SCENE_FIGURES, "kid"}:
            out |= self._decoded(made, wanted)
        return out

    def _decoded(self, made: dict[int, Tensor], wanted: set[str]) -> dict[str, Figure]:
        """Figures of the decoded clips beside the true ones."""
        codec = open_codec(self.vae, self.data, self.device)
        backbone = load_backbone(EFFICIENTNET, self.device) if "kid" in wanted else None
        features: dict[str, list[np.ndarray]] = {"made": [], "real": []}

        def scenes() -> Iterator[tuple[Scene, Scene]]:
            for index in range(len(self.data)):
                sample = self.data[index]
                pair = []
                for side, latent in (("made", made[index]), ("real", sample.latent.float())):
                    with torch.no_grad():
                        frames = to_frames(codec.decode(latent[None].to(self.device))[0])
                    pair.append(decoded_scene(sample, frames, marked=side == "real"))
                    if backbone is not None:
                        features[side].append(backbone(frames).double().numpy())
                yield pair[0], pair[1]

        result = evaluate(scenes(), Judges(device=self.device))
        out = {}
        for key in (key for key in SCENE_FIGURES if key in result.rows):
            each = [result.each[name].get(key, float("nan")) for name in self.data.keys]
            out[key] = Figure(result.rows[key].made.value, each)
        if backbone is not None:
            out["kid"] = Figure(kernel(np.stack(features["made"]), np.stack(features["real"])))
        return out


def judged(classifier: Path, detector: Path | None) -> dict[str, Any]:
    """How well the judges did on true held-out clips: the ceiling of what they say of others."""
    found = {"classifier": load_classifier(classifier).info.held_out}
    return found if detector is None else found | {"detector": load_detector(detector).info.held_out}
