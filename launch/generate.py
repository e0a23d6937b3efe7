"""`wanmoe generate`: one video, or one for every line of a file of prompts, with one load of the model."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..moe_lora.errors import WanmoeError
from .options import Device, Size, Tokenizer, chosen_device, chosen_dtype, parse_mix

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..infer.prompts import Request

_log = logging.getLogger(__name__)


def generate(
    prompt: Annotated[str | None, typer.Option(help="What to show; Chinese or English.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts: .txt, or .jsonl with settings of their own.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a whole model (Wan's own or diffusers), for what is not given."),
    ] = None,
    dit: Annotated[
        Path | None, typer.Option(help="DiT weights: the low-noise model, or the only one.")
    ] = None,
    dit_high_noise: Annotated[Path | None, typer.Option(help="High-noise DiT weights.")] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="VAE (diffusers folder, .pth, .safetensors); `haar` is a stand-in."),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", "--t5", help="Text encoder (HF folder, .pth); `hash`: a stand-in.")
    ] = None,
    tokenizer: Tokenizer = None,
    clip: Annotated[Path | None, typer.Option(help="Image encoder, of a Wan2.1 i2v model alone.")] = None,
    task: Annotated[
        str | None, typer.Option(help="t2v-A14B, i2v-A14B, t2v or i2v. Default: what the DiT is.")
    ] = None,
    output_path: Annotated[
        Path, typer.Option(help="mp4 to write; with --prompts numbered: output-001.mp4, ...")
    ] = Path("output.mp4"),
    lora_moe_weights: Annotated[
        list[Path] | None, typer.Option(help="Adapter file; twice for low and high noise, in this order.")
    ] = None,
    lora_moe_config_file: Annotated[
        Path | None,
        typer.Option(
            envvar="LORA_MOE_CONFIG_FILE",
            help="Config of a file of the seed's fork that does not carry its own.",
        ),
    ] = None,
    fold_timestep: Annotated[
        bool, typer.Option(help="Keep the fork's constant timestep factor 0.7876 instead of our bands.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="FILE[:STRENGTH][:high|low] of a LoRA to merge into the base; several times."),
    ] = None,
    instrument_hint: Annotated[
        str | None, typer.Option(help="Expert to route to, of the four families or the six Cholec tools.")
    ] = None,
    mix: Annotated[list[str] | None, typer.Option(help="NAME=WEIGHT, several times.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help='Experts over the frames of the video: "0:Hook, 40:Suction".')
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            help="How softly a schedule changes: weight of the past per latent frame. Default: the adapter's."
        ),
    ] = None,
    image_path: Annotated[Path | None, typer.Option(help="First frame, for i2v.")] = None,
    last_image_path: Annotated[Path | None, typer.Option(help="Last frame, for i2v.")] = None,
    num_frames: Annotated[int, typer.Option(help="4 n + 1.")] = 81,
    video_size: Size = (256, 256),
    num_steps: Annotated[int | None, typer.Option(min=1, help="Solver steps. Default: the model's.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 is no guidance. Default: the model's, by noise expert.")
    ] = None,
    guidance_scale_high_noise: Annotated[
        float | None, typer.Option(help="Of the high-noise steps. Default: as --guidance-scale.")
    ] = None,
    flow_shift: Annotated[
        float | None, typer.Option(help="Default: the model's (Wan2.2 t2v 12, i2v 5).")
    ] = None,
    solver: Annotated[
        str, typer.Option("--solver", "--sample-solver", help="unipc, dpm++ or euler.")
    ] = "unipc",
    negative_prompt: Annotated[str | None, typer.Option(help="Default: Wan's own.")] = None,
    alpha_base: Annotated[float, typer.Option(help="Strength of the base adapter.")] = 0.7,
    alpha_expert: Annotated[float, typer.Option(help="Strength of the experts.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Default: drawn, and printed.")] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the DiT: fp32, bf16 or file (as stored). Default: bf16 on cuda, else file."),
    ] = None,
    merged: Annotated[
        bool, typer.Option(help="Merge the experts into the weights: faster, rounded; the error is printed.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the blocks.")] = False,
    stream: Annotated[
        str,
        typer.Option(
            help="So many blocks of each DiT wait in host memory and stream to the card; none: all are on "
            "it, of two DiTs that are not quantised one at a time. Default: what is fastest in the card's "
            "free memory."
        ),
    ] = "auto",
    quantised: Annotated[
        str | None, typer.Option(help="Hold the DiT's weights as fp8, int8 or nf4; the error is printed.")
    ] = None,
    vae_tiling: Annotated[bool, typer.Option(help="Encode and decode in tiles: less memory.")] = False,
    any_base: Annotated[bool, typer.Option(help="Take an adapter of another base or side.")] = False,
    classifier: Annotated[
        Path | None, typer.Option(help="Instrument classifier, for a router that reads the first frame.")
    ] = None,
) -> None:
    """Generate a video from a prompt, with the experts of a schedule, a mix, a hint, the learned router or
    the prompt."""
    from ..infer import LoRAMoEInference
    from ..infer.prompts import Request, read_prompts
    from ..moe_lora.formats import format_of
    from ..moe_lora.lora_merge import LoRASpec

    logging.basicConfig(format="%(message)s")
    logging.getLogger("wanmoe").setLevel(logging.INFO)
    if (prompt is None) == (prompts is None):
        raise WanmoeError("give --prompt TEXT or --prompts FILE, one of them")
    stated = {"dit": dit, "dit_high_noise": dit_high_noise, "tokenizer": tokenizer, "clip": clip}
    parts = _parts(model, stated | {"vae": Path(vae) if vae else None, "text": Path(text) if text else None})
    if lora_moe_weights and len(lora_moe_weights) > 2:
        raise WanmoeError(
            f"--lora_moe_weights was given {len(lora_moe_weights)} times; give one file, or low and high"
        )
    guidance = _guidance(guidance_scale, guidance_scale_high_noise)
    place = chosen_device(device)
    weights = chosen_dtype(dtype, place)
    own: dict[str, Any] = {
        "instrument_hint": instrument_hint,
        "mix": parse_mix(mix or []),
        "schedule": schedule,
        "image_path": image_path,
        "last_image_path": last_image_path,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "output_path": output_path,
        "num_frames": num_frames,
        "video_size": video_size,
        "num_steps": num_steps,
        "guidance_scale": guidance,
        "flow_shift": flow_shift,
    }
    if prompt is not None and not prompt.strip():
        raise WanmoeError("--prompt is empty; say what to show")
    listed = [Request(prompt=prompt)] if prompt is not None else read_prompts(Path(str(prompts)))
    requests = [_filled(request, own, number, len(listed)) for number, request in enumerate(listed, 1)]
    adapters = lora_moe_weights or []
    _check(requests, parts, adapters, lora_moe_config_file, solver, ema, merged)
    pair: list[Path | None] = [*adapters] or [None]
    if quantised is not None:
        format_of(quantised)
    streamed = _stream(stream, quantised, place, parts, requests, merged or compiled)
    pipeline = LoRAMoEInference(
        task,
        parts.dit,
        vae_path=parts.vae,
        t5_path=parts.text,
        lora_moe_weights=pair[0] if len(pair) == 1 else (pair[0], pair[1]),
        dit_high_noise_path=parts.dit_high_noise,
        clip_path=parts.clip,
        lora_moe_config_file=lora_moe_config_file,
        loras=[LoRASpec.parse(spec) for spec in lora or []],
        alpha_base=alpha_base,
        alpha_expert=alpha_expert,
        device=place,
        dtype=weights,
        tokenizer_path=parts.tokenizer,
        any_base=any_base,
        merged=merged,
        compiled=compiled,
        stream=streamed,
        quantised=quantised,
        vae_tiling=vae_tiling,
        fold_timestep=fold_timestep,
        first_frame=None if classifier is None else _classifier(classifier, place, adapters),
        prompts=[request[key] for request in requests for key in ("prompt", "negative_prompt")],
    )
    for number, request in enumerate(requests, 1):
        label = "generate" if len(requests) == 1 else f"{number} of {len(requests)}"
        _run(pipeline, request | {"solver": solver, "ema": ema}, label)


def _stream(
    asked: str,
    quantised: str | None,
    place: torch.device,
    parts: _Parts,
    requests: Sequence[Mapping[str, Any]],
    fixed: bool,
) -> int | None:
    """How many blocks stream: as asked, or what is fastest for the largest request in the card's free memory.

    fixed: the blocks have to stay on the card as they are.
    """
    import psutil
    import torch

    from ..moe_lora.adapter import AdapterConfig
    from ..moe_lora.wan.codec import latent_shape
    from ..moe_lora.wan.weights import read_dit_config
    from ..train.planner import Job, Planner, card_here

    if asked == "none":
        return None
    if asked != "auto":
        try:
            return int(asked)
        except ValueError:
            raise WanmoeError(f"--stream {asked!r}: give a number of blocks, none or auto") from None
    if place.type != "cuda" or fixed:
        return None
    latent = max((latent_shape(r["num_frames"], *r["video_size"]) for r in requests), key=math.prod)
    models = 1 if parts.dit_high_noise is None else 2
    config = read_dit_config(parts.dit)[0]
    blocks = min(AdapterConfig().blocks, config.num_layers)
    adapter = AdapterConfig(blocks=blocks, ffn_blocks=min(AdapterConfig().ffn_blocks, blocks))
    job = Job(str(parts.dit), config, models, adapter, (), latent, forwards=2)
    card = card_here(place)
    free = torch.cuda.mem_get_info(place)[0]
    # CUDA has taken its own part of what is free already.
    planner = Planner(job, replace(card, memory=min(card.memory, free)))
    try:
        chosen = planner.fit((quantised,), psutil.virtual_memory().available)[0].settings
    except WanmoeError as error:
        raise WanmoeError(f"{error}{'' if quantised else ', or --quantised fp8'}") from error
    _log.info("%s (the fastest in %.1f GB, modelled)", chosen.describe(job), free / 1e9)
    return None if chosen.park else chosen.stream


def _classifier(path: Path, place: torch.device, adapters: Sequence[Path]) -> Callable[[Tensor], Tensor]:
    """The classifier that the adapters' router was trained with, as far as its file tells."""
    from ..moe_lora.adapter_file import is_adapter, read_adapter_info
    from ..train.judges.judge import load_classifier

    infos = [read_adapter_info(adapter) for adapter in adapters if is_adapter(adapter)]
    readers = [info for info in infos if info.router.first_frame_classes]
    if not readers:
        raise WanmoeError(
            f"--classifier {path}: no adapter has a router that reads the first frame; leave it out"
        )
    judge = load_classifier(path, place)
    names = tuple(readers[0].adapter.expert_set.names)
    if judge.classes != names or judge.space != "latent":
        raise WanmoeError(
            f"--classifier {path}: judges {judge.space} for {', '.join(judge.classes)}; the router reads "
            f"latents for {', '.join(names)}"
        )
    return judge


def _check(
    requests: list[dict[str, Any]],
    parts: _Parts,
    adapters: list[Path],
    config_file: Path | None,
    solver: str,
    ema: float | None,
    merged: bool,
) -> None:
    """Every request, before any weights are read: with the real model that takes minutes."""
    from ..infer.load import experts_of
    from ..infer.request import check_job, make_job
    from ..infer.route import Wish
    from ..moe_lora.wan.weights import read_dit_config

    config = read_dit_config(parts.dit)[0]
    sides = ("low", "high") if len(adapters) > 1 else ("low",)
    experts = {side: experts_of(path, config_file) for side, path in zip(sides, adapters, strict=False)}
    for request in requests:
        wish = Wish(request["instrument_hint"], request["mix"], request["schedule"], ema)
        rest = {
            key: value for key, value in request.items() if key not in ("instrument_hint", "mix", "schedule")
        }
        rest["negative_prompt"] = rest["negative_prompt"] or ""
        job = make_job(config, parts.dit_high_noise is not None, wish=wish, solver=solver, **rest)
        check_job(job, config, experts, merged)
    outputs = [request["output_path"].resolve() for request in requests]
    for path in outputs:
        if outputs.count(path) > 1:
            raise WanmoeError(f"two of the prompts write {path}; give one of them another output_path")
        if not os.access(path.parent, os.W_OK):  # before minutes of denoising
            raise WanmoeError(f"{path}: nothing can be written to the folder {path.parent}")


def _run(pipeline: Any, request: dict[str, Any], label: str) -> None:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bar: tqdm[Any] | None = None

    def progress(step: int, steps: int, words: str) -> None:
        nonlocal bar
        bar = bar or tqdm(total=steps, desc=label)
        bar.set_postfix_str(words)
        bar.update(step - bar.n)

    try:
        with logging_redirect_tqdm():  # lines go above the bar, not into it
            pipeline.generate(**request, progress=progress)
    finally:
        if bar is not None:
            bar.close()


def _filled(request: Request, own: dict[str, Any], number: int, count: int) -> dict[str, Any]:
    """A request with the command's values where it has none of its own; its file numbered among several."""
    stated = ((name, getattr(request, name)) for name in request.model_fields_set)
    given = {name: value for name, value in stated if value is not None}
    if count > 1 and "output_path" not in given:
        path: Path = own["output_path"]
        width = max(3, len(str(count)))
        given["output_path"] = path.with_name(f"{path.stem}-{number:0{width}d}{path.suffix}")
    chosen = ("instrument_hint", "mix", "schedule")
    if any(given.get(name) for name in chosen):
        # What a line says of its experts replaces what the command says of them, whichever way it says it.
        own = own | dict.fromkeys(chosen)
    return own | given


class _Parts(NamedTuple):
    dit: Path
    dit_high_noise: Path | None
    vae: Path
    text: Path
    tokenizer: Path | None
    clip: Path | None


def _parts(model: Path | None, given: Mapping[str, Path | None]) -> _Parts:
    """The files of the model: what is given, then what the folder holds."""
    from ..moe_lora.wan.model_folder import find_parts

    found = {} if model is None else find_parts(model)._asdict()
    parts: dict[str, Any] = {
        name: path if path is not None else found.get(name) for name, path in given.items()
    }
    missing = [f"--{name}" for name in ("dit", "vae", "text") if parts[name] is None]
    if missing:
        where = "or --model FOLDER" if model is None else f"{model} holds none"
        raise WanmoeError(f"{', '.join(missing)} must be given ({where})")
    return _Parts(**parts)


def _guidance(low: float | None, high: float | None) -> float | tuple[float, float] | None:
    if high is None:
        return low
    if low is None:
        raise WanmoeError("--guidance_scale_high_noise needs --guidance_scale, that of the low-noise steps")
    return low, high
