"""The loss of one forward: what the model is given, and the weighted sum of the terms of the stage.

Letters: B clips, C latent channels, F, H, W latent frames, height, width, E experts, D text width, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe_lora import Adapter, WanmoeError, load_vae
from ..moe_lora.routing import LearnedRouter
from ..moe_lora.wan.codec import SPACE_STRIDE, Codec
from . import losses, losses_decoded
from .config import TrainerConfig
from .data.batch import Batch, LabelGates
from .data.shards import FLOW
from .data.stored_prompts import PromptSampler
from .judges.judge import Classifier, load_classifier
from .noise import draw_t, noised, sample_generator, strata
from .routing_losses import Window, entropy, routing_terms, teacher_divergence, window_of, window_sums
from .stages import ROUTER_TERMS, StageSpec, Term, loss_weights

if TYPE_CHECKING:
    from .data.shards import ShardIndex
    from .routed import Routed

# Text-only prompts that teach a router in one step, over all ranks and forwards.
PROMPTS = 256
# Cells of the latent around the region, 192 pixels, that are decoded for the temporal loss: with a graph,
# whole frames of a video would not fit on any card.
DECODED = (24, 24)


class Inputs(NamedTuple):
    """What the model sees of a batch, on the device."""

    x_t: Tensor
    """[B, C, F, H, W]"""
    t: Tensor
    """[B]"""
    context: list[Tensor]
    """B x [n, D]: the caption, or now and then that of no caption."""
    pooled: Tensor
    """[B, D]"""
    rule: Tensor
    """[B, E]: gates by label, softened while training begins."""
    image_latent: Tensor | None
    noise: Tensor | None
    """[B, E]: added to the logits of a learned router."""
    evidence: Tensor | None
    """[B, E]: what the classifier says of the first frame, to a router that reads it."""
    prompts: Tensor | None
    """[K, D]: pooled text-only prompts, as many for every clip."""


class Loss(NamedTuple):
    """`total` is what trains; the others are for the log and carry no graph."""

    total: Tensor
    terms: dict[str, Tensor]
    """Value of each term, its weight not applied; scalars. `teacher_kl_prompts` is that of the text-only
    prompts and weighs as `teacher_kl`."""
    per_clip: dict[str, Tensor]
    """[B] of the terms that have one for each clip."""
    t: Tensor
    """[B]"""
    kept: Tensor
    """[B, E]: gates that the model got, before band and alpha."""
    rule: Tensor
    """[B, E]: gates by label."""
    entropy: Tensor
    """[B]: of what the router says, in nats; of the labels where no router is."""


class Objective:
    """The terms of one run on one rank.

    Every random draw is a function of the run's seed and of the clip's position in the sample order, so the
    loss of a clip does not depend on the number of ranks.

    Args:
        adapter: None in stage pretrain.
        shards: the training clips, checked here for what the terms need of them.
        t_range: noise levels that are trained.
        global_batch: clips of one optimizer step.
        steps: of the whole run.

    Raises:
        WanmoeError: a clip lacks what a term needs, or a file that judges does not fit.
    """

    def __init__(
        self,
        config: TrainerConfig,
        spec: StageSpec,
        adapter: Adapter | None,
        shards: ShardIndex,
        gates: LabelGates,
        *,
        t_range: tuple[float, float],
        global_batch: int,
        steps: int,
        caption_dropout: float,
        device: torch.device,
    ) -> None:
        self.config, self.spec, self.adapter, self.device = config.objective, spec, adapter, device
        self.seed, self.accumulation = config.train.seed, config.train.accumulation
        self.t_range, self.global_batch, self.steps = t_range, global_batch, steps
        self.weights = loss_weights(config, spec)
        self.caption_dropout, self.null_context = caption_dropout, shards.null_context
        _check_parts(shards, self.weights)
        self.router_config = None if adapter is None else adapter.router_config
        self.learns = "router" in spec.trains
        self.router_terms = [name for name in ROUTER_TERMS if name in self.weights]
        self.classifier = self._load_classifier(shards)
        self.codec = self._load_codec(shards)
        self.lpips = self._load_lpips(shards)
        self.prompts = self._router_prompts(shards, gates)
        self.window: Window | None = None

    def describe(self) -> str:
        """The sum of the terms, for the first line of a run."""
        terms = {term: f"{weight:g} {term}" for term, weight in self.weights.items()}
        if "identity" in terms and self.classifier is not None:
            right = self.classifier.info.held_out.get("accuracy")
            # One at chance teaches chance.
            terms["identity"] += "" if right is None else f" (its classifier is right for {right:.0%})"
        return " + ".join(terms.values())

    # ------------------------------------------------------------------------------------------- the forward

    def inputs(
        self, batch: Batch, step: int, dtype: torch.dtype, prompts: Tensor | None = None
    ) -> tuple[Inputs, Tensor, Tensor]:
        """(what the model sees, target v, clean latent) of a batch; `dtype` is that of the text."""
        streams = [sample_generator(self.seed, p, "noise") for p in batch.positions]
        u = torch.cat([torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams])
        if self.config.t_stratified:
            shares = [strata(self.seed, p, self.global_batch) for p in batch.positions]
            first, width = torch.tensor(shares, dtype=torch.float64).unbind(1)
            u = first + width * u
        noise = torch.stack([torch.randn(batch.latent.shape[1:], generator=stream) for stream in streams])
        t = draw_t(u, self.config, self.t_range).to(self.device)
        # First to the card, then to fp32: the other way round the host would convert, out of pinned memory.
        latent = batch.latent.to(self.device, non_blocking=True).float()
        x_t, target = noised(latent, noise.to(self.device), t)
        image = batch.image_latent
        inputs = Inputs(
            x_t,
            t,
            self._context(batch, dtype),
            batch.pooled.to(self.device),
            self._softened(batch.rule.to(self.device), step),
            None if image is None else image.to(self.device, non_blocking=True).float(),
            self._logit_noise(batch),
            self.evidence(latent),
            prompts,
        )
        return inputs, target, latent

    def as_it_is(self, batch: Batch, dtype: torch.dtype) -> Inputs:
        """What the model sees of a held-out batch, nothing drawn or dropped; x_t and t are to be set."""
        context = [tokens.to(self.device, dtype) for tokens in batch.context]
        latent, image = batch.latent.to(self.device).float(), self._to(batch.image_latent)
        return Inputs(
            latent,
            torch.zeros(0),
            context,
            batch.pooled.to(self.device),
            batch.rule.to(self.device),
            None if image is None else image.float(),
            None,
            self.evidence(latent),
            None,
        )

    def __call__(
        self, batch: Batch, step: int, dtype: torch.dtype, predict: Callable[[Inputs], Routed]
    ) -> Loss:
        """The loss of one forward; `open_window` has seen the whole step before, where a term is the
        router's."""
        prompts, taught = self._draw_prompts(batch.positions)
        inputs, target, latent = self.inputs(batch, step, dtype, prompts)
        routed = predict(inputs)
        rule = batch.rule.to(self.device, non_blocking=True)
        per_clip = self._clip_terms(batch, inputs, routed.v, target, latent, rule)
        terms: dict[Term, Tensor] = {name: values.mean() for name, values in per_clip.items()}
        if self.router_terms:
            terms |= self._router_terms(routed, rule)
        extra: dict[str, Tensor] = {}
        if routed.prompt_probs is not None and taught is not None:
            extra["teacher_kl_prompts"] = teacher_divergence(routed.prompt_probs, taught).mean()
        if "orthogonality" in self.weights:
            assert routed.overlap is not None
            terms["orthogonality"] = routed.overlap
        total = torch.stack([self.weights[name] * terms[name] for name in self.weights]).sum()
        if extra:
            total = total + self.weights["teacher_kl"] * extra["teacher_kl_prompts"]
        with torch.no_grad():
            said = entropy(routed.probs if self.spec.routing == "router" else rule)
        return Loss(
            total,
            {str(name): value.detach() for name, value in (*terms.items(), *extra.items())},
            {str(name): values.detach() for name, values in per_clip.items()},
            inputs.t,
            routed.kept.detach(),
            rule,
            said,
        )

    def _clip_terms(
        self, batch: Batch, inputs: Inputs, v: Tensor, target: Tensor, latent: Tensor, rule: Tensor
    ) -> dict[Term, Tensor]:
        """Each per-clip term that has a weight, [B]."""
        temporal = "temporal" in self.weights
        roi, picture = self._to(batch.roi), self._to(batch.picture)
        flow, visible = (self._to(value) if temporal else None for value in (batch.flow, batch.visible))
        values: dict[Term, Tensor] = {}
        if "diffusion" in self.weights or "roi" in self.weights:
            error = losses.squared_error(v, target)
            if "diffusion" in self.weights:
                values["diffusion"] = losses.flow_matching_loss(error, picture)
            if "roi" in self.weights:
                assert roi is not None
                values["roi"] = losses.roi_loss(error, roi, picture)
        if "identity" not in self.weights and "temporal" not in self.weights:
            return values
        x0 = losses.predicted_x0(inputs.x_t, v.float(), inputs.t)
        if "identity" in self.weights:
            values["identity"] = losses.identity_loss(self._logits(x0, roi), rule, inputs.t)
        if "temporal" in self.weights:
            if flow is None or visible is None:  # clips of one frame: checked in `_check_parts`
                values["temporal"] = torch.zeros_like(inputs.t)
            elif self.codec is None or self.config.temporal_on == "latent":
                values["temporal"] = losses.temporal_loss(x0, latent, flow, visible, roi, picture)
            else:
                values["temporal"] = self._decoded_temporal(x0, latent, flow, visible, roi, picture)
        return values

    def _decoded_temporal(
        self,
        x0: Tensor,
        latent: Tensor,
        flow: Tensor,
        visible: Tensor,
        roi: Tensor | None,
        picture: Tensor | None,
    ) -> Tensor:
        assert self.codec is not None
        if roi is None:
            roi = latent.new_ones(len(latent), *latent.shape[2:])
        crop = losses_decoded.Crop(roi, DECODED)
        with torch.no_grad():
            truth = self.codec.decode(crop(latent))
        return losses_decoded.decoded_temporal_loss(
            self.codec.decode(crop(x0)),
            truth,
            crop(flow),
            crop(visible) * crop.still_inside(flow),
            crop(roi),
            None if picture is None else crop(picture),
            self.lpips,
        )

    def _logits(self, x0: Tensor, roi: Tensor | None) -> Tensor:
        assert self.classifier is not None
        if self.classifier.space == "latent":
            return self.classifier(x0, roi)
        assert self.codec is not None
        # Clamped, as the pictures were that it was trained on.
        if roi is None:
            return self.classifier(self.codec.decode(x0).clamp(-1, 1))
        crop = losses_decoded.Crop(roi, self.classifier.crop)
        return self.classifier(self.codec.decode(crop(x0)).clamp(-1, 1), crop(roi))

    # -------------------------------------------------------------------------------------------- the router

    def open_window(self, batches: Sequence[Batch], router: LearnedRouter | None) -> None:
        """Takes the statistics of a step's clips over all its forwards and ranks; a collective.

        Entropy and load balance are figures of the global batch. The router is small and does not change
        within a step, so a whole copy of it (`engine.whole_router`) is asked for all clips before the first
        forward, and each forward then adds its share of the exact gradient.
        """
        if not self.router_terms:
            return
        assert router is not None
        with torch.no_grad():
            sums = torch.stack([self._window_sums(router, batch) for batch in batches]).sum(0)
        dist.all_reduce(sums)
        self.window = window_of(sums)

    def _window_sums(self, router: LearnedRouter, batch: Batch) -> Tensor:
        latent = batch.latent.to(self.device).float() if self._reads_frame else None
        probs = router(
            batch.pooled.to(self.device),
            noise=self._logit_noise(batch),
            evidence=None if latent is None else self.evidence(latent),
        )
        return window_sums(probs.float(), batch.rule.to(self.device))

    def _router_terms(self, routed: Routed, rule: Tensor) -> dict[Term, Tensor]:
        assert self.window is not None
        share = 1 / (self.accumulation * dist.get_world_size())
        target = self.config.entropy_target * math.log(rule.shape[1])
        found = routing_terms(self.router_terms, routed.probs, rule, self.window, share, target)
        return {name: found[name] for name in self.router_terms}

    def _draw_prompts(self, positions: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """The text-only prompts [K, D] of a forward and what they should give [K, E].

        Drawn by the place of each clip, as all else: a step's prompts do not depend on the number of ranks.
        """
        if self.prompts is None:
            return None, None
        each = -(-PROMPTS // self.global_batch)
        drawn = [self.prompts(each, sample_generator(self.seed, p, "prompts")) for p in positions]
        pooled, taught = (torch.cat(part).to(self.device) for part in zip(*drawn, strict=True))
        return pooled, taught

    def _to(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self.device, non_blocking=True)

    def _logit_noise(self, batch: Batch) -> Tensor | None:
        if not self.learns or self.router_config is None or not self.router_config.logit_noise:
            return None
        streams = [sample_generator(self.seed, p, "logits") for p in batch.positions]
        drawn = torch.stack([torch.randn(batch.rule.shape[1], generator=stream) for stream in streams])
        return (self.router_config.logit_noise * drawn).to(self.device)

    @property
    def _reads_frame(self) -> bool:
        return self.router_config is not None and self.router_config.first_frame_classes > 0

    @torch.no_grad()
    def evidence(self, latent: Tensor) -> Tensor | None:
        """What the classifier says of the first latent frame, which an image-to-video request gives."""
        if not self._reads_frame:
            return None
        assert self.classifier is not None
        logits: Tensor = self.classifier(latent[:, :, :1], None)
        return logits

    # ------------------------------------------------------------------------------------------------- parts

    def _context(self, batch: Batch, dtype: torch.dtype) -> list[Tensor]:
        """The text of each clip, now and then that of an empty caption, which guidance subtracts later."""
        context = []
        for position, tokens in zip(batch.positions, batch.context, strict=True):
            draw = torch.rand(1, generator=sample_generator(self.seed, position, "caption"))
            if self.null_context is not None and float(draw) < self.caption_dropout:
                tokens = self.null_context
            context.append(tokens.to(self.device, non_blocking=True).to(dtype))
        return context

    def _softened(self, rule: Tensor, step: int) -> Tensor:
        """Gates by label, of which all experts have a share alike that falls to 0 over the run."""
        left = 1 - step / max(self.config.soft_until * self.steps, 1)
        share = self.config.soft_start * max(left, 0.0)
        if share == 0 or self.spec.routing != "labels":
            return rule
        return (1 - share) * rule + share * rule.sum(-1, keepdim=True) / rule.shape[1]

    def _load_classifier(self, shards: ShardIndex) -> Classifier | None:
        if "identity" not in self.weights and not self._reads_frame:
            return None
        if self._reads_frame and not shards.manifest["image_latents"]:
            raise WanmoeError(
                "router.first_frame_classes is for image-to-video, where a request gives the first frame; "
                f"{shards.root} is for text-to-video: set it to 0"
            )
        path = self.config.classifier
        if path is None:
            what = f"objective.identity = {self.weights.get('identity')}"
            what = what if "identity" in self.weights else "router.first_frame_classes"
            raise WanmoeError(
                f"{what} needs an instrument classifier: train one with `wanmoe train-classifier --shards "
                f"{shards.root} --out classifier.safetensors` and name it under objective.classifier, or set "
                f"{'objective.identity' if 'identity' in self.weights else 'router.first_frame_classes'} = 0"
            )
        classifier = load_classifier(path).to(self.device)
        classifier.check_fits(shards.manifest)
        names = None if self.adapter is None else tuple(self.adapter.experts.names)
        if names is not None and classifier.classes != names:
            raise WanmoeError(
                f"{path}: knows {', '.join(classifier.classes)}, but the experts are {', '.join(names)}; "
                "train it with the same [adapter] section"
            )
        if self._reads_frame and classifier.space != "latent":
            raise WanmoeError(f"{path}: judges pixels; the first frame's evidence is taken on latents")
        read = 0 if self.router_config is None else self.router_config.first_frame_classes
        if read not in (0, len(classifier.classes)):
            raise WanmoeError(
                f"router.first_frame_classes = {read}, but {path} tells {len(classifier.classes)} apart"
            )
        return classifier

    def _load_lpips(self, shards: ShardIndex) -> losses_decoded.Lpips | None:
        if "temporal" not in self.weights or self.config.temporal_on != "lpips":
            return None
        lpips = losses_decoded.load_lpips(str(self.config.lpips)).to(self.device)
        least = min(min(size[1:]) for size in shards.buckets) * SPACE_STRIDE
        if least < lpips.smallest:
            raise WanmoeError(
                f"{shards.root}: clips of {least} pixels a side; LPIPS needs {lpips.smallest}: set "
                'objective.temporal_on = "pixels"'
            )
        return lpips

    def _load_codec(self, shards: ShardIndex) -> Codec | None:
        on_pixels = "identity" in self.weights and self.classifier is not None
        on_pixels = on_pixels and self.classifier is not None and self.classifier.space == "pixels"
        if not on_pixels and not ("temporal" in self.weights and self.config.temporal_on != "latent"):
            return None
        if self.config.vae is None:
            raise WanmoeError(
                f"{self.config.classifier}: judges pixels, so a codec is needed: set objective.vae"
            )
        return open_codec(self.config.vae, shards, self.device)

    def _router_prompts(self, shards: ShardIndex, gates: LabelGates) -> PromptSampler | None:
        prompts = shards.router_prompts() if "teacher_kl" in self.weights else None
        if prompts is None or not prompts.texts:
            return None
        taught = [
            gates(f"{shards.root}: router prompt {text!r}", weights)
            for text, weights in zip(prompts.texts, prompts.weights, strict=True)
        ]
        return PromptSampler(prompts.pooled, torch.stack(taught))


def _check_parts(shards: ShardIndex, weights: dict[Term, float]) -> None:
    """Every training clip has what the terms need of it; `WanmoeError` names the first that has not."""
    clips = list(enumerate(shards.rows))
    has = {
        "roi": ([row["key"] for n, row in clips if not shards.has_region(n)], "region"),
        # A clip of one latent frame has no past to be compared with.
        "temporal": (
            [
                row["key"]
                for _, row in clips
                if FLOW not in row["parts"] and not row["bucket"].startswith("1x")
            ],
            "optical flow",
        ),
    }
    for term, (lacking, what) in has.items():
        if term in weights and lacking:
            way = "prepare them again, or"
            way = f"annotate them (tips, boxes or masks) and {way}" if term == "roi" else way
            raise WanmoeError(
                f"{shards.root}: {len(lacking)} of {len(shards.rows)} clips have no {what}, e.g. "
                f"{lacking[0]}, which objective.{term} = {weights[term]:g} needs; {way} set "
                f"objective.{term} = 0"
            )


def open_codec(path: str, shards: ShardIndex, device: torch.device) -> Codec:
    """The codec of `objective.vae`; raises WanmoeError unless the shards were made with it."""
    codec = load_vae(path, device=device)
    if codec.fingerprint != shards.manifest["codec"]["fingerprint"]:
        raise WanmoeError(
            f"objective.vae = {path}: another codec than that of {shards.root}, "
            f"{shards.manifest['codec']['name']}"
        )
    return codec
