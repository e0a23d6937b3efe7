"""The `wanmoe` command. Each subcommand checks its arguments, then hands over to the room that does the
work."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..moe_lora.errors import WanmoeError
from .bench import app as bench_app
from .convert import convert, inspect
from .generate import generate
from .options import Device, Size, Text, Tokenizer, Vae, chosen_device

if TYPE_CHECKING:
    pass

_log = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LoRA mixture-of-experts for Wan2.2: clips to shards, training under DeepSpeed, generation.",
)

app.add_typer(bench_app, name="bench")
app.command()(generate)
app.command()(convert)
app.command()(inspect)


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
    from ..train.data.clip_list import clips_from_folder, read_clip_list
    from ..train.data.prepare import prepare as run
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
