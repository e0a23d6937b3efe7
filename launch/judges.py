"""`wanmoe train-classifier` and `wanmoe train-detector`: small nets that judge clips, trained in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..moe_lora.errors import WanmoeError
from .options import Device, chosen_device

Shards = Annotated[str, typer.Option(help="Folder of labelled shards, or its URL.")]
Out = Annotated[Path, typer.Option(help="File to write, *.safetensors; a report lies beside it.")]
Steps = Annotated[int, typer.Option(help="Batches to train on.")]
BatchSize = Annotated[int, typer.Option(help="Clips in a batch.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]


def train_classifier(
    shards: Shards,
    out: Out,
    config: Annotated[
        Path | None, typer.Option(help="Config whose adapter.experts are the classes. Default: the families.")
    ] = None,
    space: Annotated[str, typer.Option(help="What it judges: latent, or pixels (needs --vae).")] = "latent",
    vae: Annotated[
        str | None,
        typer.Option(help="Codec that made the latents, for --space pixels (or `haar`)."),
    ] = None,
    steps: Steps = 400,
    batch: BatchSize = 16,
    lr: Rate = 4e-3,
    seed: int = 0,
    device: Device = None,
) -> None:
    """Train a small net that names the instrument of a clip, and say how often it is right."""
    from ..moe_lora.wan.codec import load_vae
    from ..train.judges import Recipe
    from ..train.judges import train_classifier as run
    from ..train.judges.report import classifier_summary
    from .config import load_experts

    recipe = Recipe(steps, batch, lr, seed)
    if vae is not None and space == "latent":
        raise WanmoeError("--vae is for --space pixels alone; latents are judged as the shards hold them")
    place = chosen_device(device)
    codec = None if vae is None else load_vae(vae, device=place)
    experts = load_experts(config)
    judge = run(shards, out, experts=experts, space=space, codec=codec, recipe=recipe, device=place)
    _say(classifier_summary(judge.info), out)


def train_detector(
    shards: Shards,
    out: Out,
    steps: Steps = 400,
    batch: BatchSize = 16,
    lr: Rate = 4e-3,
    seed: int = 0,
    device: Device = None,
) -> None:
    """Train a small net that finds the tip of the instrument, and say how often it does."""
    from ..train.judges import Recipe
    from ..train.judges import train_detector as run
    from ..train.judges.report import detector_summary

    judge = run(shards, out, recipe=Recipe(steps, batch, lr, seed), device=chosen_device(device))
    _say(detector_summary(judge.info), out)


def _say(lines: list[str], out: Path) -> None:
    for line in lines:
        typer.echo(line)
    typer.echo(f"wrote {out}; report: {out.with_suffix('.html')}")
