"""Generation: prompt, instrument and image in, mp4 out.

F frames and H, W pixels of the video; f, h, w frames and sizes of its latent; D text width, E experts.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe_lora.adapter import Adapter
from ..moe_lora.block_store import BlockStore
from ..moe_lora.errors import WanmoeError
from ..moe_lora.formats import PLAIN, format_of
from ..moe_lora.lora_merge import LoRASpec
from ..moe_lora.needs import base_of, spread
from ..moe_lora.ring import BlockRing
from ..moe_lora.video import read_image, to_frames, to_model, write_video
from ..moe_lora.wan.codec import CHANNELS, image_condition, latent_shape, load_vae
from ..moe_lora.wan.sampling import sample
from ..moe_lora.wan.text import load_text_encoder
from ..moe_lora.wan.weights import dit_hash, read_dit_config
from .load import (
    PathLike,
    PromptEncoder,
    adapter_paths,
    check_loras,
    check_stored,
    check_task,
    clip_of,
    decode_anyhow,
    facts,
    load_model,
    on_device,
)
from .memory import needs
from .request import Job, check_job, check_model, gates_picture, make_job
from .route import Route, Wish, acting, route
from .side import Cast, Denoiser, Side
from .timeline import draw_gates

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
        loras: LoRAs to merge into the base while it is read, e.g. for few-step sampling; as `LoRASpec` or as
            `file[:strength][:high|low]`.
        alpha_base, alpha_expert: strength of the base adapter and of the experts.
        device: where everything runs; None is cuda where there is one. The text encoder's blocks stream to
            it, and it is released after use; the codec is there for its turn alone.
        dtype: of the DiT's weights; None keeps the file's.
        tokenizer_path: folder of the umT5 tokeniser, where it does not lie beside the encoder.
        any_base: take an adapter of another base model or noise expert.
        merged: run W + dW in the dtype of W instead of the adapter op; the error against it is logged. For
            gates that are the same all over a clip.
        compiled: run the blocks through `torch.compile`.
        stream: so many blocks of each DiT wait in host memory and stream to the device for their turn; the
            rest of both DiTs stays there. None: all blocks are there, those of two DiTs in turns.
        quantised: hold the large weights of the blocks in "fp8", "int8" or "nf4", unpacked for their turn;
            their error is logged.
        vae_tiling: encode and decode in tiles that overlap: less memory, a picture that differs a little.
        fold_timestep: of a fork file, as in `import_adapter`.
        prompts: what will be asked for, as `prepare` takes it; the text encoder is then read only once.
        first_frame: classifier of the first latent frame [1, 16, 1, h, w] -> logits [1, K] on the device, for
            the learned router of an i2v adapter that was trained to read them.

    Raises `WanmoeError` that names the file and what does not fit.
    """

    def __init__(
        self,
        task: str | None,
        dit_path: PathLike,
        *,
        vae_path: PathLike,
        t5_path: PathLike,
        lora_moe_weights: PathLike | Sequence[PathLike | None] | None = None,
        dit_high_noise_path: PathLike | None = None,
        clip_path: PathLike | None = None,
        lora_moe_config_file: PathLike | None = None,
        loras: Sequence[LoRASpec | str] = (),
        alpha_base: float = 0.7,
        alpha_expert: float = 1.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokenizer_path: PathLike | None = None,
        any_base: bool = False,
        merged: bool = False,
        compiled: bool = False,
        stream: int | None = None,
        quantised: str | None = None,
        vae_tiling: bool = False,
        fold_timestep: bool = False,
        prompts: Sequence[str | None] = (),
        first_frame: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for name, alpha in (("alpha_base", alpha_base), ("alpha_expert", alpha_expert)):
            if not math.isfinite(alpha):
                raise WanmoeError(f"{name} {alpha} must be finite")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.alpha_base = alpha_base
        self.alpha_expert = alpha_expert
        self._merged = merged
        self._first_frame = first_frame
        paths = {"low": Path(dit_path)}
        if dit_high_noise_path is not None:
            paths["high"] = Path(dit_high_noise_path)
        config_file = None if lora_moe_config_file is None else Path(lora_moe_config_file)
        adapters = adapter_paths(lora_moe_weights, "high" in paths, any_base, config_file)
        merges = [LoRASpec.parse(lora) if isinstance(lora, str) else lora for lora in loras]
        # Everything that is small is read before the DiTs, so that what is wrong shows at once.
        for name, path in paths.items():
            config = read_dit_config(path)[0]
            check_task(task, config.task, path)
            check_model(config, path)
            if name == "low":
                self.config = config
        check_loras(merges, paths)
        self._stream, self._format = stream or 0, format_of(quantised or "bf16")
        stored = self._stream > 0 or self._format is not PLAIN
        check_stored(self.config, self._stream, stored, merged, compiled)
        self.codec = load_vae(vae_path, tile=_TILE if vae_tiling else None)
        self.clip = clip_of(self.config, clip_path, paths["low"])
        self._text = PromptEncoder(
            partial(
                load_text_encoder,
                t5_path,
                tokenizer_path=tokenizer_path,
                dim=self.config.text_dim,
                max_length=self.config.text_len,
            ),
            self.device,
        )
        # The text encoder is 11 GB: it is gone before the DiTs come.
        self.prepare([*prompts, None])
        self.sides: dict[str, Side] = {}
        ring = BlockRing(self.device) if stored else None
        # Of two whole DiTs one waits in host memory.
        self._swapped = len(paths) > 1 and self.device.type != "cpu" and not stored and stream is None
        for name, path in paths.items():
            store = self._store() if stored else None
            model = load_model(
                name,
                path,
                adapters.get(name),
                dtype=dtype,
                any_base=any_base,
                loras=merges,
                config_file=config_file,
                fold_timestep=fold_timestep,
                store=store,
            )
            if ring is not None and store is not None:
                model[0].streamed = ring.add(store, list(model[0].blocks), self.config.num_layers)
                if self._stream:
                    told = (name, self._stream, self.config.num_layers)
                    _log.info("%s-noise model: %d of %d blocks stream from host memory", *told)
                if store.errors:
                    _log.info("%s-noise model %s", name, store.describe_error())
            side = Side(
                name, *model, self.device, resident=not self._swapped, merged=merged, compiled=compiled
            )
            if side.untrained:
                names = ", ".join(side.untrained)
                _log.warning("%s: never trained, so without effect: %s", adapters[name], names)
            self.sides[name] = side
        hashes = {file: dit_hash(file) for file in (*adapters.values(), *(lora.path for lora in merges))}
        self._facts = {
            **facts(paths, adapters, hashes, merges),
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
        ema: float | None = None,
        last_image_path: PathLike | None = None,
        solver: str = "unipc",
        negative_prompt: str | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Tensor:
        """Generates a clip, writes it as mp4 if `output_path` is given, returns uint8 frames `[F, H, W, 3]`.

        Where there is an adapter, a picture of the gates over steps and frames goes beside the mp4:
        `<name>.gates.png`. The same seed gives the same noise on every device.

        Args:
            instrument_hint: name of the expert to route to, in either taxonomy.
            image_path, last_image_path: first and last frame; an i2v model needs the first, t2v refuses both.
            num_frames: 4n + 1.
            video_size: height and width, multiples of 16.
            num_steps, guidance_scale, flow_shift: None is the model's own (`sampling_defaults`).
                guidance_scale is one value, or (low, high) for the two noise experts; 1 is no guidance.
            seed: None draws one and logs it.
            mix: weights of experts by name; goes before the hint, the learned router and the prompt's words.
            schedule: `0:Hook, 40:Suction`: the expert, or `40:Hook=0.6+Suction=0.4`, from a frame of the
                video on; goes before all others.
            ema: weight of the past in the moving average of a schedule's gates along the latent frames; 0
                changes at once, None is the adapter's own.
            solver: unipc, dpm++ or euler (also called vanilla).
            negative_prompt: None is Wan's own, or "" where the text encoder is a stand-in.
            progress: called as (step, steps, side and experts in words) after every step.

        Raises `WanmoeError` that names the value and the nearest valid one.
        """
        job = make_job(
            self.config,
            len(self.sides) > 1,
            prompt=prompt,
            wish=Wish(instrument_hint, mix, schedule, ema),
            num_frames=num_frames,
            video_size=video_size,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            solver=solver,
            seed=secrets.randbelow(2**31) if seed is None else seed,
            negative_prompt=self._negative() if negative_prompt is None else negative_prompt,
            image_path=image_path,
            last_image_path=last_image_path,
            output_path=output_path,
        )
        experts = {name: adapter.experts for name, adapter in self._adapters().items()}
        check_job(job, self.config, experts, self._merged)
        self._text.prepare([prompt, job.negative_prompt])
        pictures = self._pictures(job)
        routes = self._routes(prompt, job.wish, job.frames, self._evidence(pictures[0]))
        cast = Cast(len(next(iter(experts.values()), ())))
        _log.info("seed %d", job.seed)
        start = time.perf_counter()
        frames = self._run(job, pictures, routes, cast, progress)
        _log.info("%d frames in %.1f s", job.frames, time.perf_counter() - start)
        if job.output is not None:
            write_video(job.output, frames, FPS, self._metadata(job, routes, cast))
            _log.info("wrote %s", job.output)
            if routes:
                names = next(iter(experts.values())).names
                picture = gates_picture(job.output)
                draw_gates(picture, cast.records, names, job.frames, job.output.name)
                _log.info("wrote %s, its gates over steps and frames", picture)
        return frames

    def _run(
        self,
        job: Job,
        pictures: tuple[Tensor | None, Tensor | None],
        routes: Mapping[str, Route],
        cast: Cast,
        progress: Callable[[int, int, str], None] | None,
    ) -> Tensor:
        """uint8 frames [F, H, W, 3] of a job, whose pictures `_pictures` has encoded."""
        assert job.seed is not None
        shape = latent_shape(job.frames, *job.size)
        image_latent, image_context = pictures
        noise = torch.randn(1, CHANNELS, *shape, generator=torch.Generator().manual_seed(job.seed))
        denoisers = self._denoisers(cast, routes, shape)
        context, null_context = ([self._text[p].to(self.device)] for p in (job.prompt, job.negative_prompt))
        try:
            latent = sample(
                denoisers.get("high", denoisers["low"]),
                denoisers["low"],
                noise.to(self.device),
                context,
                null_context,
                steps=job.steps,
                shift=job.shift,
                solver=job.solver,
                boundary=self.config.boundary,
                guidance=job.guidance,
                image_latent=image_latent,
                image_context=image_context,
                batched=self._fits_batched(job),
                progress=self._counted(progress, cast, routes),
            )
        finally:
            cast.clear()
        with torch.no_grad(), on_device(self.codec, self.device) as codec:
            return to_frames(decode_anyhow(codec, latent, _TILE)[0])

    def prepare(self, prompts: Sequence[str | None]) -> None:
        """Encodes prompts ahead, so that the text encoder is read once for all of them.

        None is the negative prompt that `generate` takes by default.
        """
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
        wish = Wish(instrument_hint, mix, schedule)
        if wish and not self._adapters():
            raise WanmoeError("a hint, a mix or a schedule was given, but no adapter: give lora_moe_weights")
        return self._routes(prompt, wish, num_frames)

    def _adapters(self) -> dict[str, Adapter]:
        return {name: side.adapter for name, side in self.sides.items() if side.adapter is not None}

    def _routes(
        self, prompt: str, wish: Wish, num_frames: int, evidence: Tensor | None = None
    ) -> dict[str, Route]:
        return {
            name: route(adapter, lambda: self._text[prompt], prompt, wish, num_frames, evidence)
            for name, adapter in self._adapters().items()
        }

    @torch.no_grad()
    def _evidence(self, image_latent: Tensor | None) -> Tensor | None:
        """Logits [K] of the classifier, where there is one, for the first frame of an image condition."""
        if self._first_frame is None or image_latent is None:
            return None
        return self._first_frame(image_latent[:, -CHANNELS:, :1])[0].float().cpu()

    def _negative(self) -> str:
        return "" if self._text.stand_in else NEGATIVE_PROMPT

    def _fits_batched(self, job: Job) -> bool:
        """Says what the card has to hold; True where both passes of guidance fit in one forward on it."""
        if self.device.type != "cuda":
            return False
        dtype = next(iter(self.sides.values())).dit.head.head.weight.dtype
        adapters = self._adapters().values()
        given: dict[str, Any] = {
            "adapters": sum(p.nbytes for one in adapters for p in one.parameters().values()),
            "codec": sum(p.nbytes for p in getattr(self.codec, "parameters", tuple)()),
            "frames": job.frames,
            "size": job.size,
            "dtype": dtype,
            "swapped": self._swapped,
            "stream": self._stream,
        }
        sides = [base_of(self.config, dtype, self._format)] * len(self.sides)
        adapter = next((one.config for one in adapters), None)
        one, two = (needs(self.config, adapter, sides, clips=clips, **given) for clips in (1, 2))
        free, total = torch.cuda.mem_get_info(self.device)
        # What torch keeps for itself is free for it.
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        there = one.stays
        _log.info("%s; %.1f of %.0f GB are free", one.describe(), (free + there) / 1e9, total / 1e9)
        if one.peak - there > free:
            raise WanmoeError(
                f"{one.describe()}, but {(free + there) / 1e9:.1f} of {total / 1e9:.0f} GB are free; let "
                "(more) blocks --stream, or take --quantised fp8, --dtype bf16, --vae_tiling, or fewer or "
                "smaller frames"
            )
        return two.peak - there < free and job.guidance != (1.0, 1.0)

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
            # A model that stands alone runs at every noise level.
            _log.info("%s: %s", f"{name} noise" if len(self.sides) > 1 else "all noise levels", words)
        return denoisers

    def _counted(
        self,
        progress: Callable[[int, int, str], None] | None,
        cast: Cast,
        routes: Mapping[str, Route],
    ) -> Callable[[int, int, str], None]:
        """`progress` as `sample` calls it: counts the steps, and says which side and experts acted."""
        names = list(next(iter(routes.values())).gates) if routes else []

        def call(step: int, steps: int, side: str) -> None:
            words = acting(names, cast.records[-1].gates)
            cast.step = step + 1
            if progress is not None:
                progress(step, steps, f"{side} noise, {words}" if len(self.sides) > 1 else words)

        return call

    def _metadata(self, job: Job, routes: Mapping[str, Route], cast: Cast) -> dict[str, str]:
        """What a written file says of its making."""
        gates = {
            name: {
                "gates": chosen.gates,
                "source": chosen.source,
                **({} if chosen.frames is None else {"frames": chosen.frames.tolist()}),
            }
            for name, chosen in routes.items()
        }
        side = self.sides["low"]
        own = {name: adapter.router_config.ema for name, adapter in self._adapters().items()}
        settings = {
            "num_steps": job.steps,
            "guidance_scale": job.guidance,
            "flow_shift": job.shift,
            "solver": job.solver,
            "negative_prompt": job.negative_prompt,
            "image": None if job.first is None else str(job.first),
            "last_image": None if job.last is None else str(job.last),
            "schedule": job.wish.schedule,
            "ema": own if job.wish.ema is None else job.wish.ema,
            "alpha_base": self.alpha_base,
            "alpha_expert": self.alpha_expert,
            "dtype": str(side.dit.head.head.weight.dtype).removeprefix("torch."),
            "merged_error": cast.errors if self._merged else None,
            "untrained": {name: side.untrained for name, side in self.sides.items() if side.untrained},
        }
        return {
            "prompt": job.prompt,
            "seed": str(job.seed),
            "gates": json.dumps(gates, ensure_ascii=False),
            "settings": json.dumps(settings, ensure_ascii=False),
            **self._facts,
        }

    def _pictures(self, job: Job) -> tuple[Tensor | None, Tensor | None]:
        """(image latent, CLIP tokens) of the given frames; CLIP sees the pictures whole, as in Wan2.1."""
        files = [path for path in (job.first, job.last) if path is not None]
        if not files:
            return None, None
        cut = [to_model(read_image(path, job.size)[None])[:, 0].to(self.device) for path in files]
        tokens = None
        if self.clip is not None:
            self.clip.to(self.device)
            whole = [to_model(read_image(path)[None])[:, 0].to(self.device) for path in files]
            tokens = torch.cat([self.clip(picture[None]) for picture in whole], dim=1)
            self.clip.to("cpu")
        with on_device(self.codec, self.device) as codec:
            return image_condition(codec, cut[0], job.frames, *cut[1:]), tokens

    def _store(self) -> BlockStore:
        blocks = self.config.num_layers
        resident = set(range(blocks)) - spread(self._stream, blocks, blocks)
        return BlockStore(self.device, self._format, resident)
