"""The `wanmoe` command. Each subcommand checks its arguments, then hands over to the room that does the
work."""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..moe_lora.errors import WanmoeError
from .bench import app as bench_app

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LoRA mixture-of-experts for Wan2.2: clips to shards, training under DeepSpeed, generation.",
)

app.add_typer(bench_app, name="bench")

Size = Annotated[tuple[int, int], typer.Option(help="Height and width in pixels, multiples of 16.")]
Vae = Annotated[
    str, typer.Option(help="VAE weights (diffusers folder, .pth, .safetensors); `haar` is a stand-in.")
]
Text = Annotated[str, typer.Option(help="Text encoder (HF folder, .pth); `hash` is a stand-in.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Tokenizer folder, for a .pth text encoder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")]


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="Folder for clips.jsonl, videos and masks.")],
    clips: Annotated[int, typer.Option(min=1, help="Training clips.")] = 160,
    val: Annotated[int, typer.Option(min=1, help="Held-out clips.")] = 48,
    size: Size = (96, 96),
    frames: Annotated[int, typer.Option(help="Frames per clip, 4 n + 1.")] = 17,
    seed: int = 0,
    instruments: Annotated[bool, typer.Option(help="Draw instruments, or the background alone.")] = True,
    background: Annotated[
        Path | None, typer.Option(help="Video to draw on instead of procedural tissue.")
    ] = None,
) -> None:
    """Draw synthetic scenes: four instruments over moving tissue, with exact tips, masks, boxes and
    captions."""
    from ..train.synth import synth_clips

    path = synth_clips(
        out,
        clips=clips,
        val=val,
        height=size[0],
        width=size[1],
        frames=frames,
        seed=seed,
        instruments=instruments,
        background=background,
    )
    typer.echo(f"wrote {path}")


@app.command()
def prepare(
    clips: Annotated[Path, typer.Option(help="clips.jsonl, or a folder of videos.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    vae: Vae,
    text: Text,
    tokenizer: Tokenizer = None,
    size: Size = (480, 832),
    frames: Annotated[int, typer.Option(help="Frames per sample, 4 n + 1.")] = 81,
    fps: Annotated[float, typer.Option(help="Resample to this rate; 0 keeps the clip's own.")] = 16.0,
    stride: Annotated[int | None, typer.Option(help="Frames between the windows of one clip.")] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the sources held out.")
    ] = 0.2,
    task: Annotated[str, typer.Option(help="t2v or i2v.")] = "t2v",
    experts: Annotated[
        Path | None, typer.Option(help="Config whose adapter.experts name the labels.")
    ] = None,
    seed: int = 0,
    device: Device = None,
) -> None:
    """Encode clips into latent shards: latent, text, ROI and labels, verified by checksums."""
    from ..moe_lora.wan.codec import load_vae
    from ..moe_lora.wan.text import load_text_encoder
    from ..train.clips import clips_from_folder, read_clip_list
    from ..train.prepare import prepare as run
    from .config import load_experts

    place = chosen_device(device)
    listed = clips_from_folder(clips) if clips.is_dir() else read_clip_list(clips)
    run(
        listed,
        out,
        codec=load_vae(vae, device=place),
        text_encoder=load_text_encoder(text, tokenizer_path=tokenizer, device=place),
        experts=load_experts(experts),
        size=size,
        frames=frames,
        fps=fps or None,
        window_stride=stride,
        val_fraction=val_fraction,
        seed=seed,
        task=task,
    )


@app.command()
def verify(shards: Annotated[Path, typer.Argument(help="Folder of shards.")]) -> None:
    """Read every sample of a folder of shards, check sums, shapes and labels, and print what is there."""
    from ..train import verify_shards

    report = verify_shards(shards)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="TOML config; any key is set by --section.key value.")],
) -> None:
    """Train one stage under DeepSpeed; the same command on a CPU, on N GPUs and on several nodes."""
    from .config import load_config
    from .launcher import launch, under_launcher

    loaded = load_config(config, context.args)
    if under_launcher():
        from ..train.loop import train as run

        run(loaded)
        return
    from .preflight import preflight

    preflight(loaded)
    raise typer.Exit(launch(loaded.launch, ["train", "--config", str(config), *context.args]))


@app.command()
def evaluate(
    dit: Annotated[Path, typer.Option(help="Base weights.")],
    shards: Annotated[Path, typer.Option(help="Folder of shards; its held-out split is measured.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter file; none measures the frozen base.")] = None,
    wrong_expert: Annotated[bool, typer.Option(help="Also each clip with every expert in turn.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Held-out loss at fixed noise levels, per level and instrument, as JSON on standard output."""
    from ..moe_lora.files import write_atomic
    from ..train.evaluate import evaluate_files

    if wrong_expert and adapter is None:
        raise WanmoeError("--wrong-expert measures the experts of an adapter; give --adapter too")

    if out is not None and not out.absolute().parent.is_dir():
        raise WanmoeError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    figures = evaluate_files(dit, shards, adapter, wrong_expert)
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    if out is not None:
        write_atomic(out, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    typer.echo(text)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to show; Chinese or English.")],
    dit: Annotated[Path, typer.Option(help="DiT weights: the low-noise model, or the only one.")],
    vae: Vae,
    text: Text,
    output_path: Annotated[Path, typer.Option(help="mp4 to write.")] = Path("output.mp4"),
    task: Annotated[str, typer.Option(help="t2v-A14B, i2v-A14B, t2v or i2v.")] = "t2v",
    dit_high_noise: Annotated[Path | None, typer.Option(help="High-noise DiT weights.")] = None,
    tokenizer: Tokenizer = None,
    lora_moe_weights: Annotated[
        list[Path] | None, typer.Option(help="Adapter file; twice for low and high noise, in this order.")
    ] = None,
    instrument_hint: Annotated[str | None, typer.Option(help="Expert to use alone.")] = None,
    mix: Annotated[list[str] | None, typer.Option(help="NAME=WEIGHT, several times.")] = None,
    image_path: Annotated[Path | None, typer.Option(help="First frame, for i2v.")] = None,
    num_frames: Annotated[int, typer.Option(help="4 n + 1.")] = 81,
    video_size: Size = (256, 256),
    num_steps: Annotated[int, typer.Option(min=1, help="Solver steps.")] = 40,
    guidance_scale: Annotated[float, typer.Option(help="1 is no guidance.")] = 7.5,
    flow_shift: float = 7.0,
    solver: Annotated[str, typer.Option(help="unipc, dpm++ or euler.")] = "unipc",
    negative_prompt: Annotated[str | None, typer.Option(help="Default: Wan's own.")] = None,
    alpha_base: Annotated[float, typer.Option(help="Strength of the base adapter.")] = 0.7,
    alpha_expert: Annotated[float, typer.Option(help="Strength of the experts.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Default: drawn, and printed.")] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the DiT: fp32, bf16 or file (as stored). Default: bf16 on cuda, else file."),
    ] = None,
    any_base: Annotated[bool, typer.Option(help="Take an adapter of another base or side.")] = False,
) -> None:
    """Generate a video from a prompt, with the experts of a hint, a mix, the learned router or the prompt."""
    from tqdm import tqdm

    from ..infer import LoRAMoEInference
    from ..infer.pipeline import check_request

    logging.basicConfig(format="%(message)s")
    logging.getLogger("wanmoe").setLevel(logging.INFO)
    place = chosen_device(device)
    weights = chosen_dtype(dtype, place)
    mixture = parse_mix(mix or [])
    # Before any weights are read: with the real model that takes minutes.
    check_request(num_frames, video_size, output_path, lora_moe_weights or [], instrument_hint, mixture)
    adapters: list[Path | None] = [*lora_moe_weights] if lora_moe_weights else [None]
    if len(adapters) > 2:
        raise WanmoeError(
            f"--lora_moe_weights was given {len(adapters)} times; give one file, or low and high"
        )
    pipeline = LoRAMoEInference(
        task,
        dit,
        vae_path=vae,
        t5_path=text,
        lora_moe_weights=adapters[0] if len(adapters) == 1 else (adapters[0], adapters[1]),
        dit_high_noise_path=dit_high_noise,
        alpha_base=alpha_base,
        alpha_expert=alpha_expert,
        device=place,
        dtype=weights,
        tokenizer_path=tokenizer,
        any_base=any_base,
    )
    bar: tqdm[Any] | None = None

    def progress(step: int, steps: int, side: str) -> None:
        nonlocal bar
        bar = bar or tqdm(total=steps, desc="generate")
        if dit_high_noise is not None:
            bar.set_postfix_str(f"{side} noise")
        bar.update(step - bar.n)

    try:
        pipeline.generate(
            prompt,
            instrument_hint,
            image_path,
            num_frames,
            video_size,
            num_steps,
            guidance_scale,
            flow_shift,
            seed,
            output_path,
            mix=mixture,
            solver=solver,
            negative_prompt=negative_prompt,
            progress=progress,
        )
    finally:
        if bar is not None:
            bar.close()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    clips: Annotated[Path | None, typer.Option(help="Folder of your own videos (and captions).")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 2,
    seed: int = 0,
) -> None:
    """The whole way on a small model: clips, shards, stages A, B, C, one video per instrument, a report."""
    from .demo import run_demo

    run_demo(out, clips, ranks, seed)


def main() -> None:
    """Entry point: a fault in what the user gave is one line on standard error and exit code 2."""
    try:
        # Users of the seed type --num_frames, users of click --num-frames: both are the same.
        sys.argv[1:] = [dashed(word) for word in sys.argv[1:]]
        app()
    except WanmoeError as error:
        rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
        sys.stderr.write(f"wanmoe: error{rank}: {error}\n")
        sys.exit(2)


def dashed(word: str) -> str:
    """--num_frames as --num-frames; values and --section.key options stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return word if "." in name else name.replace("_", "-") + equals + value


def chosen_device(name: str | None) -> torch.device:
    """The device of --device, checked to be there; None is cuda where there is one."""
    import torch

    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WanmoeError(f"--device {name!r} is no device; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise WanmoeError(f"--device {name!r} is not supported; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise WanmoeError(f"--device {name!r} is not there: torch finds {count} CUDA devices; give cpu")
    return device


def chosen_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype of --dtype; None keeps the file's. The default, bf16 on cuda, is said once."""
    import torch

    if name is None and device.type == "cuda":
        _log.info("the DiT runs in bf16, the default on cuda; --dtype file keeps the dtype of the file")
        return torch.bfloat16
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "file": None}
    if (name or "file") not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise WanmoeError(f"--dtype {name!r} is unknown; nearest is {near!r}, known are: {', '.join(known)}")
    return known[name or "file"]


def parse_mix(words: list[str]) -> dict[str, float] | None:
    """["Scissors=0.6", "Suction=0.4"] -> weights by name."""
    mix: dict[str, Any] = {}
    for word in words:
        name, equals, weight = word.rpartition("=")
        try:
            mix[name] = float(weight)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise WanmoeError(f"--mix {word!r}: expected NAME=WEIGHT, for example Scissors=0.6")
    return mix or None
