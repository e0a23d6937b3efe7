"""The `wanmoe` command. Each subcommand checks its arguments, then hands over to the room that does the
work."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..moe_lora.errors import CommonError, WanmoeError
from .ablate import ablate
from .bench import app as bench_app
from .clips import clips
from .convert import convert, inspect
from .data import app as data_app
from .evaluate import evaluate
from .generate import generate
from .judges import train_classifier, train_detector
from .launch_command import app as launch_app
from .options import Size
from .plan import plan
from .prepare import PrepareCommand, prepare
from .report import report

_log = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LoRA mixture-of-experts for Wan2.2: clips to shards, training under DeepSpeed, generation.",
)

app.command()(clips)
app.command(cls=PrepareCommand)(prepare)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.command()(train_classifier)
app.command()(train_detector)
app.command()(generate)
app.command()(evaluate)
app.command()(ablate)
app.command()(report)
app.command()(convert)
app.command()(inspect)
app.add_typer(launch_app, name="launch")
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(plan)


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="Folder for clips.jsonl, videos and masks.")],
    clips: Annotated[int, typer.Option(min=1, help="Training clips.")] = 160,
    val: Annotated[int, typer.Option(min=1, help="Held-out clips.")] = 48,
    size: Size = (96, 96),
    frames: Annotated[int, typer.Option(help="Frames per clip, 4 n + 1.")] = 17,
    seed: int = 0,
    instruments: Annotated[
        int, typer.Option(min=0, max=2, help="In a scene; 0 draws the background alone.")
    ] = 1,
    background: Annotated[
        Path | None, typer.Option(help="Video to draw on instead of procedural tissue.")
    ] = None,
) -> None:
    """Draw synthetic scenes: four kinds of instrument over moving tissue, with exact tips, masks, boxes and
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="TOML config; any key is set by --section.key value.")],
    machine: Annotated[str | None, typer.Option(help="Preset of a machine, e.g. a100-80g.")] = None,
) -> None:
    """Train one stage under DeepSpeed; the same command on a CPU, on N GPUs and on several nodes."""
    from .train import start

    start(config, context.args, machine)


@app.command()
def track_sync(
    run: Annotated[Path, typer.Option(help="Run folder whose run has ended.")],
) -> None:
    """Send to MLflow what it was away for."""
    from ..train.tracking import sync

    typer.echo(f"{run}: {sync(run)} operations sent")


@app.command()
def validate(
    dit: Annotated[Path, typer.Option(help="Base weights.")],
    shards: Annotated[
        str, typer.Option(help="Folder of shards, or its URL; its held-out split is measured.")
    ],
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
        if not (isinstance(error, CommonError) and os.environ.get("LOCAL_RANK", "0") != "0"):
            # A progress bar may stand in the line of a rank.
            line, rank = ("\n", f" [rank {os.environ['RANK']}]") if "RANK" in os.environ else ("", "")
            sys.stderr.write(f"{line}wanmoe: error{rank}: {error}\n")
        sys.exit(error.exit_code)


def dashed(word: str) -> str:
    """--num_frames as --num-frames; values and --section.key options stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return word if "." in name else name.replace("_", "-") + equals + value
