"""`wanmoe data`: what is in a folder of shards, whether it is sound, and what of it can be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..moe_lora.errors import WanmoeError
from .options import Device, chosen_device

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Look at a folder of shards: verify, repair, stats, show.",
)

# As text: a path would fold the slashes of a URL.
Shards = Annotated[str, typer.Argument(help="Folder of shards.")]
ShardsOrUrl = Annotated[str, typer.Argument(help="Folder of shards, or its URL.")]


@app.command()
def verify(shards: ShardsOrUrl) -> None:
    """Read every byte of a folder of shards and name every fault; exit code 1 where there is one."""
    from ..train import verify_shards

    report = verify_shards(shards)
    typer.echo(str(report))
    if not report.ok:
        typer.echo(f"`wanmoe data repair {shards}` says what of it can be saved", err=True)
        raise typer.Exit(1)


@app.command()
def repair(
    shards: Shards,
    apply: Annotated[
        bool, typer.Option("--apply", help="Do it; without, only say what would be done.")
    ] = False,
) -> None:
    """Save the intact samples of damaged shards; what is damaged is set aside, and nothing deleted."""
    from ..train.data.repair import repair as run

    typer.echo(str(run(shards, apply=apply)))


@app.command()
def stats(
    shards: ShardsOrUrl,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file as JSON.")] = None,
) -> None:
    """Samples, instruments, hours, captions and sizes in a folder of shards, and the spread of latents."""
    from ..moe_lora.files import write_atomic
    from ..train.data.stats import shard_stats

    if json is not None and not json.absolute().parent.is_dir():
        raise WanmoeError(f"--json {json}: the folder {json.parent} does not exist; make it first")
    found = shard_stats(shards)
    typer.echo(str(found))
    if json is not None:
        text = found.to_json()
        write_atomic(json, lambda partial: partial.write_text(text, encoding="utf-8"))


@app.command()
def show(
    shards: ShardsOrUrl,
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    vae: Annotated[
        str | None, typer.Option(help="VAE weights that decode; not needed for shards of the stand-in haar.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="How many, evenly spread over the split.")] = 8,
    key: Annotated[list[str] | None, typer.Option(help="A sample to show; may be given again.")] = None,
    any_codec: Annotated[
        bool, typer.Option("--any-codec", help="Decode with a VAE of other weights.")
    ] = False,
    device: Device = None,
) -> None:
    """A contact sheet: frames of some samples with region, tips, boxes, border and motion drawn in."""
    from ..moe_lora.wan.codec import load_vae
    from ..train.data.sheet import show as draw

    codec = None if vae is None else load_vae(vae, device=chosen_device(device))
    notes = draw(shards, out, codec, split=split, samples=samples, keys=key or (), any_codec=any_codec)
    typer.echo("\n".join([*(f"note: {note}" for note in notes), f"wrote {out}"]))
