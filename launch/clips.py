"""`wanmoe clips`: annotations, clip lists and folders of videos, cut into windows for `wanmoe prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..moe_lora.errors import WanmoeError

if TYPE_CHECKING:
    from ..train.data.clips import Clip
    from ..train.data.segment import Segment


def clips(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help="Annotations (files or folders), a clips.jsonl, or a folder of videos.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The clips.jsonl to write.")],
    videos: Annotated[
        Path | None, typer.Option(help="Folder of the annotated videos. Default: where the annotations lie.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="Form of the annotations; auto looks into them.")
    ] = "auto",
    times: Annotated[
        str,
        typer.Option(
            help="What times such as 1.50 are: decimal (minutes), mm.ss or seconds; auto refuses to guess."
        ),
    ] = "auto",
    video: Annotated[
        str | None, typer.Option(help="Name of the annotated video, where the file has another one.")
    ] = None,
    frames: Annotated[
        list[int] | None,
        typer.Option(help="Frames per window, 4 n + 1; repeat it for shorter ones. Default: 81."),
    ] = None,
    fps: Annotated[float, typer.Option(help="Rate at which frames are counted.")] = 16.0,
    seconds: Annotated[
        tuple[float, float], typer.Option(help="Shortest and longest segment that is kept.")
    ] = (2.0, 20.0),
    experts: Annotated[
        Path | None, typer.Option(help="Config whose adapter.experts name the labels.")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the videos held out.")
    ] = 0.2,
    seed: int = 0,
    licence: Annotated[str | None, typer.Option(help="Licence, where the source says none.")] = None,
) -> None:
    """Cut annotated videos into windows: scene cuts, lengths, black pictures, copies, labels and splits."""
    from ..train.data.clip_list import write_clip_list
    from ..train.data.cut import cut_segments
    from .config import load_experts

    _check_out(out, sources)
    segments: list[Segment | Clip] = [
        one for source in sources for one in _read(source, form, video, times, seconds[1])
    ]
    if licence is not None:
        segments = [replace(one, licence=one.licence or licence) for one in segments]
    report = cut_segments(
        segments,
        [videos] if videos else [source if source.is_dir() else source.parent for source in sources],
        frames=frames or [81],
        fps=fps,
        seconds=seconds,
        experts=load_experts(experts),
        val_fraction=val_fraction,
        seed=seed,
    )
    write_clip_list(out, report.clips)
    typer.echo("\n".join(report.lines()), err=True)
    typer.echo(f"wrote {out}")


def _check_out(out: Path, sources: Sequence[Path]) -> None:
    if not out.absolute().parent.is_dir():
        raise WanmoeError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise WanmoeError(
            f"--out {out}: this is a folder; name a file in it, for example {out / 'clips.jsonl'}"
        )
    for source in sources:
        # In a folder that is read, whatever is there already may be what was read.
        if out.exists() and source.resolve() in (out.resolve(), *out.resolve().parents):
            raise WanmoeError(
                f"--out {out}: it would replace a file of the source {source}; name another file"
            )


def _read(source: Path, form: str, video: str | None, times: str, longest: float) -> Sequence[Segment | Clip]:
    """What a source holds: a list of clips, annotations, or videos that are a clip each."""
    from ..train.data.annotations import read_annotations
    from ..train.data.annotations.formats import detect_all
    from ..train.data.clip_list import SUFFIXES, clips_from_folder, read_clip_list

    if source.suffix.lower() == ".jsonl":
        return read_clip_list(source)
    if source.is_file() and source.suffix.lower() in SUFFIXES:
        raise WanmoeError(f"{source}: this is a video; give the folder that it lies in, or its annotations")
    if not source.is_dir() or form != "auto":
        return read_annotations(source, form, video, times=times, max_seconds=longest)
    if (source / "clips.jsonl").is_file():
        return clips_from_folder(source)
    files = (path for path in source.rglob("*") if not path.name.startswith("."))
    filmed = {path.with_suffix("") for path in files if path.suffix.lower() in SUFFIXES}
    forms = detect_all(source)
    texts = [path for path, known in forms.items() if known is not None]
    beside = [path for path in texts if path.suffix.lower() == ".txt" and path.with_suffix("") in filmed]
    if beside and len(beside) == len(texts) and video is None:
        raise WanmoeError(
            f"{beside[0]}: it has the name of a video beside it and speaks of times; --format times reads "
            "the times in that video, and a text of one line without times is its caption"
        )
    if filmed and not texts:
        return clips_from_folder(source)
    return read_annotations(source, form, video, times=times, max_seconds=longest, forms=forms)
