"""The clips of a run for `wanmoe evaluate`: each held-out clip noised and made again by the run's models.

Letters: B clips, F, H, W frames, height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..infer.evaluation.estimate import Estimate, as_share, estimate
from ..infer.evaluation.evaluate import flips
from ..infer.evaluation.scene import Scene
from ..infer.evaluation.tips import Share
from ..moe_lora import Adapter, ExpertSet, RouterConfig, load_adapter, load_dit
from ..moe_lora.adapter_file import has_router, read_adapter, router_of
from ..moe_lora.errors import WanmoeError
from ..moe_lora.routing import RuleRouter, learned_gates, pool_text
from ..moe_lora.video import to_frames, write_video
from ..moe_lora.wan.codec import SPACE_STRIDE, TIME_STRIDE
from ..train.data.batch import Batch, LabelGates
from ..train.data.shards import Sample, ShardDataset
from ..train.judges.judge import load_classifier
from ..train.judges.measures import true_tips
from ..train.model import side_configs
from ..train.objective import open_codec
from ..train.regenerate import regenerate
from ..train.routed import Routed, RoutedDiT
from ..train.routing_losses import entropy
from ..train.stages import STAGES
from .config import Config, load_config


class Run(NamedTuple):
    """A run folder that is evaluated."""

    folder: Path
    config: Config
    adapters: dict[str, Path | None]
    """The adapter file of each model by its noise expert; None for stage pretrain, whose model is whole."""


def open_run(folder: Path) -> Run:
    """A run by its folder; WanmoeError where it has no config, or has not written what it trains yet."""
    if not (folder / "config.toml").is_file():
        raise WanmoeError(f"{folder}: no run: it has no config.toml; give the folder of `wanmoe train`")
    config = load_config(folder / "config.toml")
    adapters: dict[str, Path | None] = {}
    for side in side_configs(config):
        suffix = "" if side == "both" else f"-{side}"
        path = folder / f"adapter{suffix}.safetensors"
        if config.train.stage == "pretrain":
            adapters[side] = None
        elif not path.is_file():
            raise WanmoeError(f"{folder}: it has no {path.name}: the run has not ended well; resume it")
        else:
            adapters[side] = path
    return Run(folder, config, adapters)


def held_out(run: Run) -> int:
    """How many held-out clips its shards have."""
    return len(ShardDataset(run.config.data.shards, "val"))


def run_scenes(
    run: Run, vae: str, start: float, steps: int, out: Path, device: torch.device
) -> Iterator[tuple[Scene, Scene]]:
    """Each held-out clip made again (`regenerate`), with the true one as its shards hold it, both decoded.

    The files go to `out/made/<key>.mp4` and `out/real/<key>.mp4`. Raises WanmoeError for another codec than
    that of the shards.
    """
    dataset = ShardDataset(run.config.data.shards, "val")
    codec = open_codec(vae, dataset, device)
    models = _Models(run, device)
    for folder in ("made", "real"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    by_key = {key: index for index, key in enumerate(dataset.keys)}
    gates = LabelGates(models.experts, models.router, needed=False)
    for batch, latents in regenerate(models, dataset, gates, start=start, steps=steps):
        for key, latent in zip(batch.keys, latents, strict=True):
            sample = dataset[by_key[key]]
            scenes = []
            for folder, source in (("made", latent), ("real", sample.latent.float())):
                with torch.no_grad():
                    frames = to_frames(codec.decode(source[None].to(device))[0])
                write_video(out / folder / f"{key}.mp4", frames, _fps(sample), {"clip": key})
                scenes.append(decoded_scene(sample, frames, marked=folder == "real"))
            yield scenes[0], scenes[1]


def _fps(sample: Sample) -> float:
    """Frames a second; Wan's 16 where a shard does not say it."""
    return float(sample.meta.get("fps") or 16)


def decoded_scene(sample: Sample, frames: Tensor, marked: bool) -> Scene:
    """A decoded clip, with what its shard says of it."""
    tips: tuple[Tensor | None, ...] = ()
    where: tuple[Tensor | None, ...] = ()
    if marked and sample.roi is not None:
        # The shard's region, on the latent grid: a cell is 8 x 8 pixels and, after the first, 4 frames.
        cells = (sample.roi > 0.5).repeat_interleave(SPACE_STRIDE, 1).repeat_interleave(SPACE_STRIDE, 2)
        where = tuple(torch.cat([cells[:1], cells[1:].repeat_interleave(TIME_STRIDE, 0)]))
    if marked:
        own: list[Tensor | None] = [None] * len(frames)
        for place, known in enumerate(true_tips(sample.meta, sample.latent.shape[1])):
            seen = known[~known.isnan().any(1)].double()
            own[TIME_STRIDE * place] = seen if len(seen) else None
        tips = tuple(own) if any(one is not None for one in own) else ()
    label = tuple(sample.instruments)
    return Scene(sample.key, frames, _fps(sample), label, sample.caption, tips=tips, where=where)


class _Models:
    """The run's models, one or one for each noise expert, as `regenerate` calls them."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.device = device
        self.experts, self.router = ExpertSet(), RouterConfig()
        self.sides: dict[str, RoutedDiT] = {}
        for side, config in side_configs(run.config).items():
            path = run.adapters[side]
            base = run.folder / "model.safetensors" if path is None else config.model.dit
            assert base is not None
            dit = load_dit(base, device=device)
            self.boundary = dit.config.boundary
            adapter: Adapter | None = None
            spec = STAGES["pretrain"]
            if path is not None:
                adapter = load_adapter(path, dit, noise_expert=config.model.noise_expert)
                spec = STAGES[read_adapter(path)[0].stage]
                self.experts, self.router = adapter.experts, adapter.router_config
            self.sides[side] = RoutedDiT(dit, adapter, spec).eval().to(device)
        self.evidence = first_frame(run.config.objective.classifier, self.router, device)

    def __call__(self, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """v [B, ...] at t, which all clips share."""
        side = "high" if float(t[0]) >= self.boundary else "low"
        module = self.sides.get(side) or next(iter(self.sides.values()))
        first = next(module.dit.parameters())

        def here(tensor: Tensor) -> Tensor:
            return tensor.to(first.device, first.dtype)

        image = None if batch.image_latent is None else here(batch.image_latent)
        text = [here(tokens) for tokens in batch.context]
        routed: Routed = module(
            here(x),
            t.to(first.device),
            text,
            batch.pooled.to(first.device),
            batch.rule.to(first.device),
            image,
            evidence=self.evidence(batch.latent),
        )
        return routed.v.float().cpu()


def first_frame(
    classifier: Path | None, router: RouterConfig, device: torch.device
) -> Callable[[Tensor], Tensor | None]:
    """Latents [B, C, F, H, W] -> logits [B, K] of their first frame, for a router with
    `first_frame_classes`; None for one that reads the text alone."""
    if not router.first_frame_classes or classifier is None:
        return lambda latent: None
    judge = load_classifier(classifier, device)

    @torch.no_grad()
    def read(latent: Tensor) -> Tensor:
        logits: Tensor = judge(latent[:, :, :1].float().to(device))
        return logits

    return read


class Routing(NamedTuple):
    """What a router says of the held-out clips."""

    figures: dict[str, Estimate]
    load: dict[str, float]
    """Mean gate by expert."""
    by_label: dict[str, dict[str, float]]
    """The same of the clips of each label."""


@torch.no_grad()
def router_figures(run: Run, device: torch.device, seed: int = 0) -> Routing | None:
    """How the run's router reads the held-out clips: a learned one where the adapter has one, else the words
    of the caption. None without experts; of two models that of the lower noise is read.

    Figures are `router_agreement` and `router_entropy` of what a request would get, and where the router
    reads a frame `router_flips` and `router_flips_ema`, each latent frame being shown to it in turn.
    """
    path = run.adapters.get("low") or next(iter(run.adapters.values()))
    if path is None:
        return None
    info, tensors = read_adapter(path)
    dataset, experts = ShardDataset(run.config.data.shards, "val"), info.adapter.expert_set
    read: Callable[[Sample], Tensor]
    """Gates [f, E] of a clip by its moments, or [1, E]."""
    if has_router(tensors):
        router = router_of(info, tensors, path)
        evidence = first_frame(run.config.objective.classifier, info.router, device)

        def read(sample: Sample) -> Tensor:
            seen = evidence(sample.latent.transpose(0, 1)[:, :, None])
            text = pool_text([sample.context]).expand(1 if seen is None else len(seen), -1)
            probs = router(text, evidence=None if seen is None else seen.cpu())
            return learned_gates(probs, info.router, training=False)
    else:
        rule = RuleRouter(experts, info.router.top_k, info.router.temperature)

        def read(sample: Sample) -> Tensor:
            return rule.route(prompt=sample.caption)[None]

    label_gates = LabelGates(experts, info.router, needed=False)
    found: dict[str, list[Share]] = {}
    each: list[Tensor] = []
    by_label: dict[int, list[Tensor]] = {}
    for index in range(len(dataset)):
        sample = dataset[index]
        moments, label = read(sample), label_gates(sample.key, sample.instruments)
        gates = moments[0]
        values = {}
        if gates.sum() > 0:
            values["router_entropy"] = float(entropy((gates / gates.sum())[None]) / math.log(len(gates)))
        if label.sum() > 0:
            values["router_agreement"] = float(label[gates.argmax()] >= label.max())
            by_label.setdefault(int(label.argmax()), []).append(gates)
        if len(moments) > 1:
            seconds = (TIME_STRIDE * (len(moments) - 1) + 1) / _fps(sample)
            changes = flips(moments, seconds, info.router.ema)
            values |= dict(zip(("router_flips", "router_flips_ema"), changes, strict=True))
        for key, value in values.items():
            found.setdefault(key, []).append(as_share(value))
        each.append(gates)

    def mean(gates: list[Tensor]) -> dict[str, float]:
        return dict(zip(experts.names, torch.stack(gates).mean(0).tolist(), strict=True))

    return Routing(
        {key: estimate(shares, seed) for key, shares in found.items()},
        mean(each),
        {experts.names[label]: mean(by_label[label]) for label in sorted(by_label)},
    )
