"""`wanmoe prepare`: clips to shards on every GPU or the CPU, and the caches of musubi-tuner as they are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

from ..moe_lora.errors import WanmoeError
from .options import Device, Tokenizer, chosen_device

if TYPE_CHECKING:
    from ..moe_lora.instruments import ExpertSet
    from ..train.data.clips import Clip
    from ..train.data.router_prompts import RouterPrompt


class PrepareCommand(TyperCommand):
    """Takes `--size H W` several times; a repeated option has single words as values in typer."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, join_sizes(args))


def prepare(
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    clips: Annotated[Path | None, typer.Option(help="clips.jsonl, or a folder of videos.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of musubi-tuner's caches, taken as they are; --clips then gives labels."),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="VAE weights (diffusers folder, .pth, .safetensors); `haar` is a stand-in."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text encoder (HF folder, .pth); `hash` is a stand-in.")
    ] = None,
    tokenizer: Tokenizer = None,
    size: Annotated[
        list[str],
        typer.Option(
            metavar="H W",
            help="Height and width in pixels, multiples of 16. Given several times, a video takes the one of "
            "the nearest shape.",
        ),
    ] = ["480x832"],  # noqa: B006
    frames: Annotated[
        list[int],
        typer.Option(help="Frames per sample, 4 n + 1. Given several times, the longest that fits first."),
    ] = [81],  # noqa: B006
    fps: Annotated[float, typer.Option(help="Resample to this rate; 0 keeps the clip's own.")] = 16.0,
    stride: Annotated[int | None, typer.Option(help="Frames between the windows of one clip.")] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the sources held out.")
    ] = 0.2,
    task: Annotated[str, typer.Option(help="t2v or i2v.")] = "t2v",
    experts: Annotated[
        Path | None, typer.Option(help="Config whose adapter.experts name the labels.")
    ] = None,
    router_prompts: Annotated[
        str,
        typer.Option(
            metavar="auto|none|FILE",
            help="Text-only prompts that teach a learned router: made from the experts' keywords, none, or "
            'lines {"prompt": ..., "instruments": [names] or {name: weight}}.',
        ),
    ] = "auto",
    seed: int = 0,
    device: Device = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that encode together. Default: one per GPU; one with --device."),
    ] = None,
) -> None:
    """Encode clips into latent shards: latent, text, ROI and labels, verified by checksums. After a kill the
    same command goes on where it was."""
    from ..moe_lora.wan.codec import load_vae
    from ..moe_lora.wan.text import load_text_encoder
    from ..train.data.plan import Settings
    from ..train.data.prepare import Ranks, join_ranks
    from ..train.data.prepare import prepare as run
    from .config import LaunchConfig, load_experts
    from .launcher import launch, under_launcher

    if cache is not None:
        import_folder(cache, out, clips, vae, text, tokenizer, experts, val_fraction, seed)
        return
    if clips is None:
        raise WanmoeError("--clips must be given (clips.jsonl, or a folder of videos); or --cache")
    if vae is None or text is None:
        raise WanmoeError(f"--{'text' if vae else 'vae'} must be given: the weights that encode the clips")
    sizes = [parse_size(word) for word in size]
    Settings(tuple(sizes), tuple(frames), task=task)  # what cannot be is told before weights are read
    listed = read_clips(clips)
    count = rank_count(ranks, device)
    if count > 1 and not under_launcher():
        raise typer.Exit(launch(LaunchConfig(ranks=count), sys.argv[1:]))
    team = join_ranks() if under_launcher() else Ranks()
    try:
        known = load_experts(experts)
        prompts = team.together(lambda: chosen_prompts(router_prompts, known, seed, listed))
        if prompts and not team.rank:
            typer.echo(f"{len(prompts)} prompts for a learned router are encoded too (--router-prompts none)")
        place = team.together(lambda: chosen_device(device))
        run(
            listed,
            out,
            codec=partial(load_vae, vae, device=place),
            text_encoder=partial(load_text_encoder, text, tokenizer_path=tokenizer, device=place),
            experts=known,
            size=sizes,
            frames=frames,
            fps=fps or None,
            window_stride=stride,
            val_fraction=val_fraction,
            seed=seed,
            task=task,
            router_prompts=prompts,
            ranks=team,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; what is encoded lies in {out}.work, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    except WanmoeError:
        if not team.rank:  # all ranks fail together, and one of them says why
            raise


def import_folder(
    cache: Path,
    out: Path,
    clips: Path | None,
    vae: str | None,
    text: str | None,
    tokenizer: Path | None,
    experts: Path | None,
    val_fraction: float,
    seed: int,
) -> None:
    """Write musubi-tuner's caches as shards; the weights, where given, are named, not used on the clips."""
    from ..moe_lora.wan.codec import load_vae
    from ..moe_lora.wan.text import load_text_encoder
    from ..train.data.musubi import import_caches
    from .config import load_experts

    import_caches(
        cache,
        out,
        experts=load_experts(experts),
        clips=read_clips(clips) if clips else (),
        codec=load_vae(vae) if vae else None,
        text_encoder=load_text_encoder(text, tokenizer_path=tokenizer) if text else None,
        val_fraction=val_fraction,
        seed=seed,
    )


def chosen_prompts(word: str, experts: ExpertSet, seed: int, clips: Sequence[Clip]) -> list[RouterPrompt]:
    """What `--router-prompts` asks for; auto is none where no clip has a label, and so no router learns."""
    from ..train.data.plan import label
    from ..train.data.router_prompts import router_prompts
    from ..train.data.stored_prompts import read_prompt_list

    if word == "none" or (word == "auto" and not any(label(clip, experts) for clip in clips)):
        return []
    return router_prompts(experts, seed) if word == "auto" else read_prompt_list(word, experts)


def read_clips(clips: Path) -> list[Clip]:
    """The clips of a list or folder."""
    from ..train.data.clip_list import clips_from_folder, read_clip_list

    return clips_from_folder(clips) if clips.is_dir() else read_clip_list(clips)


def rank_count(ranks: int | None, device: str | None) -> int:
    """Processes to run: as given, else one per GPU, or one where a device is named or there is no GPU."""
    import torch

    cards = torch.cuda.device_count()
    if ranks is None:
        return 1 if device else max(cards, 1)
    if device is not None and device != "cpu" and ranks > 1:
        raise WanmoeError(
            f"--device {device} is one device, but --ranks {ranks} takes one each; leave it out"
        )
    if device is None and cards and ranks > cards:
        raise WanmoeError(f"--ranks {ranks}, but there are {cards} GPUs, and each rank takes one")
    return ranks


def join_sizes(words: list[str]) -> list[str]:
    """`--size 480 832` as `--size 480x832`."""
    joined = list(words)
    for place in range(len(joined) - 3, -1, -1):
        if joined[place] == "--size" and joined[place + 1].isdecimal() and joined[place + 2].isdecimal():
            joined[place + 1 : place + 3] = [f"{joined[place + 1]}x{joined[place + 2]}"]
    return joined


def parse_size(word: str) -> tuple[int, int]:
    """ "480x832" -> (480, 832)."""
    height, _, width = word.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise WanmoeError(f"--size {word!r}: expected height and width in pixels, for example --size 480 832")
    return int(height), int(width)
