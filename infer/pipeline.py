"""Generation: prompt, instrument and image in, mp4 out.

F frames and H, W pixels of the video; f, h, w frames and sizes of its latent; D text width, E experts.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import file_sha256
from ..moe_lora.lora_merge import LoRASpec
from ..moe_lora.video import read_image, to_frames, to_model, write_video
from ..moe_lora.wan.clip import load_clip
from ..moe_lora.wan.codec import CHANNELS, image_condition, latent_shape, load_vae
from ..moe_lora.wan.sampling import TASK_DEFAULTS, sample
from ..moe_lora.wan.text import load_text_encoder
from ..moe_lora.wan.weights import read_dit_config
from .load import PathLike, PromptEncoder, adapter_paths, check_task, facts, load_model
from .memory import Needs, needs
from .request import check_size, checked_output
from .route import Route, Wish, route
from .side import Cast, Denoiser, Side
from .timeline import EMA, draw_gates

_log = logging.getLogger(__name__)

FPS = 16
_TILE = 256
"""Pixels of a side of a tile of the codec."""

# Official (Wan2.2 wan/configs/shared_config.py).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class _Settings(NamedTuple):
    """How a video is made, defaults filled in; JSON in the file's metadata."""

    num_steps: int
    guidance_scale: tuple[float, float]
    """(low, high)."""
    flow_shift: float
    solver: str
    negative_prompt: str
    image: str | None
    last_image: str | None
    schedule: str | None


class LoRAMoEInference:
    """Video generation with a frozen Wan DiT (or its two noise experts) and a LoRA-MoE adapter.

    Args:
        task: "t2v" or "i2v", or the name of a preset of that task, checked against the model; None takes it
            from the model.
        dit_path: the low-noise model, or the one model for every noise level.
        vae_path: codec, as `load_vae` takes it; "haar" is the stand-in.
        t5_path: text encoder, as `load_text_encoder` takes it; "hash" is the stand-in.
        lora_moe_weights: an adapter file, or a pair (low, high); None generates with the frozen model. A
            single file goes to the noise expert it was trained on, or to both if it says "both". One of the
            high-noise expert needs `dit_high_noise_path`. Files of the seed's fork and plain LoRAs are
            imported as `import_adapter` does.
        dit_high_noise_path: the high-noise model; None runs `dit_path` at every noise level.
        clip_path: image encoder of a Wan2.1 i2v model, as `load_clip` takes it; Wan2.2 has none.
        lora_moe_config_file: the config of a fork file that does not carry its own.
        loras: LoRAs to merge into the base while it is read, e.g. for few-step sampling.
        alpha_base, alpha_expert: strength of the base adapter and of the experts.
        device: where the DiTs and the codec run; None is cuda where there is one. The text encoder runs on
            the CPU, and is released after use. With two DiTs the inactive one waits in host memory.
        dtype: of the DiT's weights; None keeps the file's.
        tokenizer_path: folder of the umT5 tokeniser, where it does not lie beside the encoder.
        any_base: take an adapter of another base model or noise expert.
        merged: run W + dW in the dtype of W instead of the adapter op; the error against it is logged. For
            gates that are the same all over a clip.
        compiled: run the blocks through `torch.compile`.
        vae_tiling: encode and decode in tiles that overlap: less memory, a picture that differs a little.

    Raises `WanmoeError` that names the file and what does not fit.
    """

    def __init__(
        self,
        task: str | None,
        dit_path: PathLike,
        *,
        vae_path: PathLike,
        t5_path: PathLike,
        lora_moe_weights: PathLike | tuple[PathLike | None, PathLike | None] | None = None,
        dit_high_noise_path: PathLike | None = None,
        clip_path: PathLike | None = None,
        lora_moe_config_file: PathLike | None = None,
        loras: Sequence[LoRASpec] = (),
        alpha_base: float = 0.7,
        alpha_expert: float = 1.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokenizer_path: PathLike | None = None,
        any_base: bool = False,
        merged: bool = False,
        compiled: bool = False,
        vae_tiling: bool = False,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.alpha_base = alpha_base
        self.alpha_expert = alpha_expert
        paths = {"low": Path(dit_path)}
        if dit_high_noise_path is not None:
            paths["high"] = Path(dit_high_noise_path)
        adapters = adapter_paths(lora_moe_weights, "high" in paths, any_base)
        # Everything that is small is read before the DiTs, so that what is wrong shows at once.
        configs = {name: read_dit_config(path)[0] for name, path in paths.items()}
        for name, path in paths.items():
            check_task(task, configs[name].task, path)
        self.config = configs["low"]
        _check_loras(loras, paths)
        self.codec = load_vae(vae_path, device=self.device, tile=_TILE if vae_tiling else None)
        self.clip = None
        if self.config.image_dim:
            if clip_path is None:
                raise WanmoeError(f"{dit_path}: a Wan2.1 i2v model needs clip_path (--clip)")
            self.clip = load_clip(clip_path, device=self.device)
        elif clip_path is not None:
            _log.info("clip_path is not used: this model has no image encoder")
        self._text = PromptEncoder(
            partial(
                load_text_encoder,
                t5_path,
                tokenizer_path=tokenizer_path,
                dim=self.config.text_dim,
                max_length=self.config.text_len,
            )
        )
        self.sides = {}
        for name, path in paths.items():
            model = load_model(
                name,
                path,
                adapters.get(name),
                dtype=dtype,
                any_base=any_base,
                loras=loras,
                config_file=None if lora_moe_config_file is None else Path(lora_moe_config_file),
            )
            one = len(paths) == 1 or self.device.type == "cpu"
            self.sides[name] = Side(name, *model, self.device, resident=one, merged=merged, compiled=compiled)
        self._facts = {
            **facts(paths, adapters, {n: file_sha256(path) for n, path in adapters.items()}, loras),
            "codec": self.codec.name + (" (stand-in)" if self.codec.stand_in else ""),
            "text_encoder": self._text.name + (" (stand-in)" if self._text.stand_in else ""),
        }

    def generate(
        self,
        prompt: str,
        instrument_hint: str | None = None,
        image_path: PathLike | None = None,
        num_frames: int = 81,
        video_size: tuple[int, int] = (256, 256),
        num_steps: int | None = None,
        guidance_scale: float | tuple[float, float] | None = None,
        flow_shift: float | None = None,
        seed: int | None = None,
        output_path: PathLike | None = None,
        *,
        mix: Mapping[str, float] | None = None,
        schedule: str | None = None,
        ema: float = EMA,
        last_image_path: PathLike | None = None,
        solver: str = "unipc",
        negative_prompt: str | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Tensor:
        """Generates a clip, writes it as mp4 if `output_path` is given, returns uint8 frames `[F, H, W, 3]`.

        Where there is an adapter, a picture of the gates over steps and frames goes beside the mp4:
        `<name>.gates.png`. The same seed gives the same noise on every device.

        Args:
            instrument_hint: name of the expert to use alone, in either taxonomy.
            image_path, last_image_path: first and last frame; an i2v model needs the first, t2v refuses both.
            num_frames: 4n + 1.
            video_size: height and width, multiples of 16.
            num_steps, guidance_scale, flow_shift: None is the model's own (`TASK_DEFAULTS`). guidance_scale
                is one value, or (low, high) for the two noise experts; 1 is no guidance.
            seed: None draws one and logs it.
            mix: weights of experts by name; goes before the hint, the learned router and the prompt's words.
            schedule: `0:Hook, 40:Suction`: the expert, or `40:Hook=0.6+Suction=0.4`, from a frame of the
                video on; goes before all others.
            ema: weight of the past in the moving average of a schedule's gates along the latent frames; 0
                changes at once.
            solver: unipc, dpm++ or euler (also called vanilla).
            negative_prompt: None is Wan's own, or "" where the text encoder is a stand-in.
            progress: called as (step, steps, side and experts in words) after every step.

        Raises `WanmoeError` that names the value and the nearest valid one.
        """
        check_size(num_frames, video_size)
        output = None if output_path is None else checked_output(Path(output_path))
        settings = self._settings(
            num_steps,
            guidance_scale,
            flow_shift,
            solver,
            negative_prompt,
            image_path,
            last_image_path,
            schedule,
        )
        wish = Wish(instrument_hint, mix, schedule, ema)
        self._text.prepare([prompt, settings.negative_prompt])
        routes = self._routes(prompt, wish, num_frames)
        image_latent, image_context = self._pictures(image_path, last_image_path, num_frames, video_size)
        shape = latent_shape(num_frames, *video_size)
        batched = self._plan(num_frames, video_size, settings)
        seed = secrets.randbelow(2**31) if seed is None else seed
        _log.info("seed %d", seed)
        noise = torch.randn(1, CHANNELS, *shape, generator=torch.Generator().manual_seed(seed))
        names = _common_experts(routes)
        cast, start = Cast(len(names)), time.perf_counter()
        denoisers = self._denoisers(cast, routes, shape)
        context, null_context = ([self._text[p].to(self.device)] for p in (prompt, settings.negative_prompt))
        try:
            latent = sample(
                denoisers.get("high", denoisers["low"]),
                denoisers["low"],
                noise.to(self.device),
                context,
                null_context,
                steps=settings.num_steps,
                shift=settings.flow_shift,
                solver=settings.solver,
                boundary=self.config.boundary,
                guidance=settings.guidance_scale,
                image_latent=image_latent,
                image_context=image_context,
                batched=batched,
                progress=None if progress is None else self._in_words(progress, cast, names),
            )
        finally:
            cast.clear()
        with torch.no_grad():
            frames = to_frames(self.codec.decode(latent)[0])
        _log.info("%d frames in %.1f s", num_frames, time.perf_counter() - start)
        if output is not None:
            write_video(output, frames, FPS, self._metadata(prompt, seed, routes, settings, cast))
            _log.info("wrote %s", output)
            if names:
                picture = output.with_suffix(".gates.png")
                draw_gates(picture, cast.records, names, num_frames, output.name)
                _log.info("wrote %s, its gates over steps and frames", picture)
        return frames

    def prepare(self, prompts: Sequence[str | None]) -> None:
        """Encodes prompts ahead, so that the text encoder is read once for all of them; None is the negative
        prompt that `generate` takes by default."""
        self._text.prepare([self._negative() if prompt is None else prompt for prompt in prompts])

    def route(
        self,
        prompt: str,
        instrument_hint: str | None = None,
        mix: Mapping[str, float] | None = None,
        schedule: str | None = None,
        num_frames: int = 81,
    ) -> dict[str, Route]:
        """Which experts a request would use, by side ("low", "high"); sides without an adapter are left out.

        The first of these decides: a schedule, a mix, a hint, the learned router of the adapter, the words of
        the prompt, the adapter's fallback expert. Raises `WanmoeError` on a name that no expert has.
        """
        self._text.prepare([prompt])
        return self._routes(prompt, Wish(instrument_hint, mix, schedule), num_frames)

    def _routes(self, prompt: str, wish: Wish, num_frames: int) -> dict[str, Route]:
        adapters = {name: side.adapter for name, side in self.sides.items() if side.adapter is not None}
        if wish and not adapters:
            raise WanmoeError("a hint, a mix or a schedule was given, but no adapter: give lora_moe_weights")
        if wish.schedule and any(side.merged for side in self.sides.values()):
            raise WanmoeError(
                "merged weights hold one mix of experts, a schedule changes it along the clip; leave one out"
            )
        return {
            name: route(adapter, lambda: self._text[prompt], prompt, wish, num_frames)
            for name, adapter in adapters.items()
        }

    def _settings(
        self,
        num_steps: int | None,
        guidance: float | tuple[float, float] | None,
        flow_shift: float | None,
        solver: str,
        negative_prompt: str | None,
        image: PathLike | None,
        last_image: PathLike | None,
        schedule: str | None,
    ) -> _Settings:
        own = TASK_DEFAULTS[self.config.task]
        scale = own.guidance if guidance is None else guidance
        low, high = scale if isinstance(scale, tuple) else (scale, scale)
        return _Settings(
            own.steps if num_steps is None else num_steps,
            (float(low), float(high)),
            own.shift if flow_shift is None else flow_shift,
            "euler" if solver == "vanilla" else solver,
            self._negative() if negative_prompt is None else negative_prompt,
            None if image is None else str(image),
            None if last_image is None else str(last_image),
            schedule,
        )

    def _negative(self) -> str:
        return "" if self._text.stand_in else NEGATIVE_PROMPT

    def _plan(self, frames: int, size: tuple[int, int], settings: _Settings) -> bool:
        """Says what the card has to hold; True where both passes of guidance fit in one forward on it."""
        if self.device.type != "cuda":
            return False
        parameters = [p for side in self.sides.values() for p in side.dit.parameters()]
        weights = sum(p.numel() * p.itemsize for p in parameters) // len(self.sides)
        free, total = torch.cuda.mem_get_info(self.device)
        one, two = (
            needs(self.config, weights, frames, size, clips, parameters[0].itemsize) for clips in (1, 2)
        )
        _log.info("%s of %.0f GB, %.0f GB free", _in_words(one), total / 1e9, free / 1e9)
        if one.peak > total:
            raise WanmoeError(
                f"{_in_words(one)}, the card has {total / 1e9:.0f} GB; use a larger card, "
                "--dtype bf16, or fewer or smaller frames"
            )
        resident = weights if len(self.sides) == 1 else 0
        return two.peak - resident < free and settings.guidance_scale != (1.0, 1.0)

    def _denoisers(
        self, cast: Cast, routes: Mapping[str, Route], shape: tuple[int, int, int]
    ) -> dict[str, Denoiser]:
        _, rows, columns = self.config.patch_size
        tokens = shape[0] * (shape[1] // rows) * (shape[2] // columns)
        denoisers: dict[str, Denoiser] = {}
        for name, side in self.sides.items():
            chosen = routes.get(name)
            experts = torch.zeros(0) if chosen is None else chosen.experts
            denoisers[name] = Denoiser(cast, side, experts, tokens, self.alpha_base, self.alpha_expert)
            words = "no adapter, the frozen model runs" if chosen is None else chosen.describe()
            _log.info("%s noise: %s", name, words)
        return denoisers

    def _in_words(
        self, progress: Callable[[int, int, str], None], cast: Cast, names: Sequence[str]
    ) -> Callable[[int, int, str], None]:
        """`progress` as `sample` calls it; the words say which side ran and which experts acted in it."""

        def call(step: int, steps: int, side: str) -> None:
            acting = cast.records[-1].gates.any(0).tolist()
            words = " + ".join(name for name, acts in zip(names, acting, strict=True) if acts) or "no expert"
            progress(step, steps, f"{side} noise, {words}" if len(self.sides) > 1 else words)

        return call

    def _metadata(
        self, prompt: str, seed: int, routes: Mapping[str, Route], settings: _Settings, cast: Cast
    ) -> dict[str, str]:
        """What a written file says of its making."""
        gates = {
            name: {
                "gates": chosen.gates,
                "source": chosen.source,
                **({} if chosen.frames is None else {"frames": chosen.frames.tolist()}),
            }
            for name, chosen in routes.items()
        }
        more: dict[str, Any] = {"alpha_base": self.alpha_base, "alpha_expert": self.alpha_expert}
        if cast.errors:
            more["merged_error"] = cast.errors
        return {
            "prompt": prompt,
            "seed": str(seed),
            "gates": json.dumps(gates, ensure_ascii=False),
            "settings": json.dumps(settings._asdict() | more, ensure_ascii=False),
            **self._facts,
        }

    def _pictures(
        self, first: PathLike | None, last: PathLike | None, frames: int, size: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(image latent, CLIP tokens) of the given frames."""
        if self.config.task != "i2v":
            if first is not None or last is not None:
                raise WanmoeError(
                    f"image_path {first or last}: a {self.config.task} model takes no image; leave it out"
                )
            return None, None
        if first is None:
            raise WanmoeError("an i2v model needs image_path, the first frame of the clip")
        pictures = [
            to_model(read_image(path, size)[None])[:, 0].to(self.device)
            for path in (first, last)
            if path is not None
        ]
        tokens = None
        if self.clip is not None:
            tokens = self.clip(torch.stack(pictures)).flatten(0, 1)[None]
        return image_condition(self.codec, pictures[0], frames, *pictures[1:]), tokens


def _common_experts(routes: Mapping[str, Route]) -> list[str]:
    """Names of the experts; two adapters that differ in them cannot take part in one request."""
    sets = {tuple(chosen.gates) for chosen in routes.values()}
    if len(sets) > 1:
        low, high = (", ".join(names) for names in sorted(sets))
        raise WanmoeError(f"the adapters of the two sides have different experts: {low} and {high}")
    return list(next(iter(sets), ()))


def _check_loras(loras: Sequence[LoRASpec], sides: Iterable[str]) -> None:
    for lora in loras:
        if not any([lora.serves(side) for side in sides]):  # a list: each side is checked
            raise WanmoeError(
                f"lora {lora.path} is for the high-noise model, and there is only one model: give "
                "dit_high_noise_path (--dit_high_noise) too, or write :low behind its name"
            )


def _in_words(need: Needs) -> str:
    return (
        f"modelled need on the card {need.peak / 1e9:.1f} GB: weights of one side {need.weights / 1e9:.1f}, "
        f"then {need.denoise / 1e9:.1f} to denoise and {need.decode / 1e9:.1f} to decode"
    )
