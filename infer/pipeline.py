"""Generation: prompt, instrument and image in, mp4 out.

F frames and H, W pixels of the video; f, h, w frames and sizes of its latent; D text width, E experts.
"""

from __future__ import annotations

import difflib
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..moe_lora.adapter import Adapter
from ..moe_lora.adapter_file import has_router, load_adapter, read_adapter
from ..moe_lora.errors import WanmoeError
from ..moe_lora.routing import Gates, RuleRouter, pool_text, top_k
from ..moe_lora.video import read_image, to_frames, to_model, write_video
from ..moe_lora.wan.codec import CHANNELS, SPACE_STRIDE, image_condition, latent_shape, load_vae
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.sampling import sample
from ..moe_lora.wan.text import encode_prompts, load_text_encoder
from ..moe_lora.wan.weights import dit_hash, load_dit

_log = logging.getLogger(__name__)

FPS = 16
# Pixels of a patch: the codec halves three times, every Wan DiT takes 2 x 2 of its cells.
SPACE_STEP = 2 * SPACE_STRIDE
TASKS = ("t2v-A14B", "i2v-A14B", "t2v-1.3B", "tiny", "t2v", "i2v")

# Official (Wan2.2 wan/configs/shared_config.py).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

PathLike = str | Path


class Route(NamedTuple):
    """Which experts speak for a request, and why."""

    gates: dict[str, float]
    """Weight of every expert by name, before the timestep band; all zero leaves the base adapter alone."""
    source: str
    """mix, hint, router, prompt, fallback or none."""


@dataclass
class Side:
    """One DiT with its adapter, if it has one: a noise expert, or the whole model."""

    dit: WanDiT
    adapter: Adapter | None


@dataclass
class _Denoiser:
    """A side as the sampler calls it. Its own gates: the adapters of two sides may have other bands."""

    side: Side
    experts: Tensor
    """[1, E]."""
    tokens: int
    alpha_base: float
    alpha_expert: float

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | Sequence[Tensor],
        gates: Gates | None = None,
        image_latent: Tensor | None = None,
    ) -> Tensor:
        if self.side.adapter is not None:
            alphas = {"alpha_base": self.alpha_base, "alpha_expert": self.alpha_expert}
            gates = self.side.adapter.gates(self.experts, t, tokens=self.tokens, **alphas)
        return self.side.dit(x, t, context, gates, image_latent)


class LoRAMoEInference:
    """Video generation with a frozen Wan DiT (or its two noise experts) and a LoRA-MoE adapter.

    Args:
        task: "t2v" or "i2v", or the name of a preset of that task; checked against the model.
        dit_path: the low-noise model, or the one model for every noise level.
        vae_path: codec, as `load_vae` takes it; "haar" is the stand-in.
        t5_path: text encoder, as `load_text_encoder` takes it; "hash" is the stand-in.
        lora_moe_weights: an adapter file, or a pair (low, high); None generates with the frozen model. A
            single file goes to the noise expert it was trained on, or to both if it says "both". One of the
            high-noise expert needs `dit_high_noise_path`.
        dit_high_noise_path: the high-noise model; None runs `dit_path` at every noise level.
        clip_path: accepted and not used, since Wan2.2 has no image encoder.
        alpha_base, alpha_expert: strength of the base adapter and of the experts.
        device: where the DiTs and the codec run; None is cuda where there is one. The text encoder runs on
            the CPU, once a prompt.
        dtype: of the DiT's weights; None keeps the file's.
        tokenizer_path: folder of the umT5 tokeniser, where it does not lie beside the encoder.
        any_base: take an adapter of another base model or noise expert.

    Raises `WanmoeError` that names the file and what does not fit.
    """

    def __init__(
        self,
        task: str,
        dit_path: PathLike,
        *,
        vae_path: PathLike,
        t5_path: PathLike,
        lora_moe_weights: PathLike | tuple[PathLike | None, PathLike | None] | None = None,
        dit_high_noise_path: PathLike | None = None,
        clip_path: PathLike | None = None,
        alpha_base: float = 0.7,
        alpha_expert: float = 1.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokenizer_path: PathLike | None = None,
        any_base: bool = False,
    ) -> None:
        if clip_path is not None:
            _log.info("clip_path is not used: Wan2.2 has no image encoder")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.alpha_base = alpha_base
        self.alpha_expert = alpha_expert
        paths = {"low": Path(dit_path)}
        if dit_high_noise_path is not None:
            paths["high"] = Path(dit_high_noise_path)
        adapters = _adapter_paths(lora_moe_weights, "high" in paths, any_base)
        self.sides = {
            name: _load_side(name, path, adapters.get(name), task, self.device, dtype, any_base)
            for name, path in paths.items()
        }
        self.config = self.sides["low"].dit.config
        self.codec = load_vae(vae_path, device=self.device)
        self.encoder = load_text_encoder(
            t5_path, tokenizer_path=tokenizer_path, dim=self.config.text_dim, max_length=self.config.text_len
        )
        self._facts = {
            "dit": ", ".join(f"{name} {path}" for name, path in paths.items()),
            "adapter": ", ".join(f"{name} {path}" for name, path in adapters.items()) or "none",
            "codec": self.codec.name + (" (stand-in)" if self.codec.stand_in else ""),
            "text_encoder": self.encoder.name + (" (stand-in)" if self.encoder.stand_in else ""),
        }

    def generate(
        self,
        prompt: str,
        instrument_hint: str | None = None,
        image_path: PathLike | None = None,
        num_frames: int = 81,
        video_size: tuple[int, int] = (256, 256),
        num_steps: int = 40,
        guidance_scale: float | tuple[float, float] = 7.5,
        flow_shift: float = 7.0,
        seed: int | None = None,
        output_path: PathLike | None = None,
        *,
        mix: Mapping[str, float] | None = None,
        solver: str = "unipc",
        negative_prompt: str | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Tensor:
        """Generates a clip, writes it as mp4 if `output_path` is given, returns uint8 frames `[F, H, W, 3]`.

        The same seed gives the same noise on every device.

        Args:
            instrument_hint: name of the expert to use alone.
            image_path: first frame; needed by i2v, refused by t2v.
            num_frames: 4n + 1.
            video_size: height and width, multiples of 16.
            guidance_scale: one value, or (low, high) for the two noise experts; 1 is no guidance.
            seed: None draws one and logs it.
            mix: weights of experts by name; goes before the hint, the learned router and the prompt's words.
            solver: unipc, dpm++ or euler (also called vanilla).
            negative_prompt: None is Wan's own, or "" where the text encoder is a stand-in.
            progress: called as (step, steps, side) after every step.

        Raises `WanmoeError` that names the value and the nearest valid one.
        """
        shape = self._latent_shape(num_frames, video_size)
        output = None if output_path is None else _checked_output(Path(output_path))
        image_latent = self._image_latent(image_path, num_frames, video_size)
        if negative_prompt is None:
            negative_prompt = "" if self.encoder.stand_in else NEGATIVE_PROMPT
        seed = secrets.randbelow(2**31) if seed is None else seed
        guidance = _pair(guidance_scale)
        context, null_context = ([row.to(self.device)] for row in self._encode(prompt, negative_prompt))
        routes = self.route(prompt, instrument_hint, mix)
        denoisers = self._denoisers(routes, shape)
        noise = torch.randn(1, CHANNELS, *shape, generator=torch.Generator().manual_seed(seed))
        start = time.perf_counter()
        latent = sample(
            denoisers.get("high", denoisers["low"]),
            denoisers["low"],
            noise.to(self.device),
            context,
            null_context,
            steps=num_steps,
            shift=flow_shift,
            solver="euler" if solver == "vanilla" else solver,
            boundary=self.config.boundary,
            guidance=guidance,
            image_latent=image_latent,
            progress=progress,
        )
        with torch.no_grad():
            frames = to_frames(self.codec.decode(latent)[0])
        _log.info("%d frames in %.1f s, seed %d", num_frames, time.perf_counter() - start, seed)
        if output is not None:
            settings = {
                "num_steps": num_steps,
                "guidance_scale": list(guidance),
                "flow_shift": flow_shift,
                "solver": solver,
                "negative_prompt": negative_prompt,
                "image": None if image_path is None else str(image_path),
            }
            write_video(output, frames, FPS, self._metadata(prompt, seed, routes, settings))
            _log.info("wrote %s", output)
        return frames

    def route(
        self, prompt: str, instrument_hint: str | None = None, mix: Mapping[str, float] | None = None
    ) -> dict[str, Route]:
        """Which experts a request would use, by side ("low", "high"); sides without an adapter are left out.

        The first of these decides: an explicit mix, a hint, the learned router of the adapter, the words of
        the prompt, the adapter's fallback expert. Raises `WanmoeError` on a name that no expert has.
        """
        adapters = {name: side.adapter for name, side in self.sides.items() if side.adapter is not None}
        if (instrument_hint or mix) and not adapters:
            raise WanmoeError("a hint or a mix was given, but no adapter: give lora_moe_weights")
        return {
            name: _route(adapter, self._encode, prompt, instrument_hint, mix)
            for name, adapter in adapters.items()
        }

    def _encode(self, *prompts: str) -> list[Tensor]:
        return encode_prompts(self.encoder, prompts)

    def _denoisers(self, routes: Mapping[str, Route], shape: tuple[int, int, int]) -> dict[str, _Denoiser]:
        _, rows, columns = self.config.patch_size
        tokens = shape[0] * (shape[1] // rows) * (shape[2] // columns)
        denoisers: dict[str, _Denoiser] = {}
        for name, side in self.sides.items():
            route = routes.get(name)
            weights = [] if route is None else list(route.gates.values())
            experts = torch.tensor([weights], device=self.device)
            denoisers[name] = _Denoiser(side, experts, tokens, self.alpha_base, self.alpha_expert)
            _log.info("%s noise: %s", name, _describe(route))
        return denoisers

    def _metadata(
        self, prompt: str, seed: int, routes: Mapping[str, Route], settings: Mapping[str, Any]
    ) -> dict[str, str]:
        """What a written file says of its making."""
        gates = {name: route._asdict() for name, route in routes.items()}
        alphas = {"alpha_base": self.alpha_base, "alpha_expert": self.alpha_expert}
        return {
            "prompt": prompt,
            "seed": str(seed),
            "gates": json.dumps(gates, ensure_ascii=False),
            "settings": json.dumps({**settings, **alphas}, ensure_ascii=False),
            **self._facts,
        }

    def _latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        check_size(frames, size)
        return latent_shape(frames, *size)

    def _image_latent(self, path: PathLike | None, frames: int, size: tuple[int, int]) -> Tensor | None:
        if self.config.task != "i2v":
            if path is not None:
                raise WanmoeError(
                    f"image_path {path}: a {self.config.task} model takes no image; leave it out"
                )
            return None
        if path is None:
            raise WanmoeError("an i2v model needs image_path, the first frame of the clip")
        image = to_model(read_image(path, size)[None])[:, 0]
        return image_condition(self.codec, image.to(self.device), frames)


def check_size(frames: int, size: tuple[int, int]) -> None:
    """Raises `WanmoeError`, naming the nearest valid value, for a clip that no Wan model makes."""
    if frames < 1 or (frames - 1) % 4:
        near = max(0, round((frames - 1) / 4)) * 4 + 1
        raise WanmoeError(f"num_frames {frames} must be 4n+1; nearest is {near}")
    near_size = [max(1, round(side / SPACE_STEP)) * SPACE_STEP for side in size]
    if list(size) != near_size:
        raise WanmoeError(
            f"video_size {size[0]}x{size[1]} (height x width) must be multiples of {SPACE_STEP}; "
            f"nearest is {near_size[0]}x{near_size[1]}"
        )


def check_request(
    frames: int,
    size: tuple[int, int],
    output: Path,
    adapters: Sequence[Path],
    hint: str | None,
    mix: Mapping[str, float] | None,
) -> None:
    """Raises `WanmoeError` for a request that cannot be met, by its arguments and the adapter files alone."""
    check_size(frames, size)
    _checked_output(output)
    if (hint or mix) and not adapters:
        raise WanmoeError("a hint or a mix was given, but no adapter: give lora_moe_weights")
    for path in adapters:
        RuleRouter(read_adapter(path)[0].adapter.expert_set).route(mix=mix, hint=hint)


def _adapter_paths(
    given: PathLike | tuple[PathLike | None, PathLike | None] | None, two_sides: bool, any_base: bool
) -> dict[str, Path]:
    """Adapter file of each side."""
    if given is None:
        return {}
    if isinstance(given, tuple):
        paths = {n: Path(path) for n, path in zip(("low", "high"), given, strict=True) if path is not None}
    else:
        path = Path(given)
        side = read_adapter(path)[0].noise_expert if two_sides else "low"
        paths = {name: path for name in ("low", "high") if side in (name, "both")}
    if two_sides:
        return paths
    if "high" in paths:
        raise WanmoeError(
            f"adapter {paths['high']} is for a high-noise model, and there is only one model: give "
            "dit_high_noise_path (--dit_high_noise) too"
        )
    for path in paths.values():
        if read_adapter(path)[0].noise_expert == "high" and not any_base:
            raise WanmoeError(
                f"adapter {path} belongs to the high noise expert, and there is only one model: give that "
                "expert as dit_high_noise_path (--dit_high_noise), or pass any_base (--any_base) to load it "
                "all the same"
            )
    return paths


def _load_side(
    name: str,
    path: Path,
    adapter_path: Path | None,
    task: str,
    device: torch.device,
    dtype: torch.dtype | None,
    any_base: bool,
) -> Side:
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)[0]
        raise WanmoeError(f"unknown task {task!r}; nearest is {near!r}, known are: {', '.join(TASKS)}")
    dit = load_dit(path, dtype=dtype, device=device)
    wanted = "i2v" if task.startswith("i2v") else "t2v"
    if dit.config.task != wanted:
        raise WanmoeError(f"{path}: this is a {dit.config.task} model, but the task is {task}")
    if adapter_path is None:
        return Side(dit, None)
    info, tensors = read_adapter(adapter_path)
    if info.router.mode == "learned" and not has_router(tensors):
        raise WanmoeError(
            f"{adapter_path}: it says routing is learned, but holds no router; "
            'train stage c from it, or set router.mode = "rule"'
        )
    base = None if any_base or not info.base_sha256 else dit_hash(path)
    adapter = load_adapter(adapter_path, dit, noise_expert=name, base_sha256=base, any_base=any_base)
    return Side(dit, adapter)


def _route(
    adapter: Adapter,
    encode: Callable[[str], list[Tensor]],
    prompt: str,
    hint: str | None,
    mix: Mapping[str, float] | None,
) -> Route:
    config, experts = adapter.router_config, adapter.experts
    rules = RuleRouter(experts, config.top_k, config.temperature)
    if mix or hint:
        gates, source = rules.route(mix=mix, hint=hint), "mix" if mix else "hint"
    elif adapter.router is not None:
        with torch.no_grad():
            pooled = pool_text(encode(prompt)).to(adapter.router.out.weight.device)
            gates, source = top_k(adapter.router(pooled)[0], config.top_k), "router"
    else:
        otherwise = "fallback" if experts.fallback else "none"
        gates, source = rules.route(prompt=prompt), "prompt" if experts.find(prompt) else otherwise
    return Route(dict(zip(experts.names, gates.tolist(), strict=True)), source)


def _describe(route: Route | None) -> str:
    if route is None:
        return "no adapter, the frozen model runs"
    if route.source == "none":
        return "no instrument in the prompt and no hint, so the base adapter alone"
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in route.gates.items() if weight > 0)
    return f"experts from the {route.source}: {weights}"


def _pair(guidance: float | tuple[float, float]) -> tuple[float, float]:
    low, high = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    return float(low), float(high)


def _checked_output(path: Path) -> Path:
    if path.suffix.lower() != ".mp4":
        raise WanmoeError(f"output_path {path}: the file is an mp4; end its name in .mp4")
    if not path.parent.is_dir():
        raise WanmoeError(f"output_path {path}: the folder {path.parent} does not exist; make it first")
    return path
