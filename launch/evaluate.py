"""`wanmoe evaluate`: generated clips against real ones, a blind page for raters, and the tally of their
answers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
import typer
from tqdm import tqdm

from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import file_sha256, write_atomic
from .options import Device, chosen_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..infer.evaluation.evaluate import Evaluation
    from ..infer.evaluation.scene import Scene
    from ..train.data.clips import Clip
    from .evaluation_run import Run

FORMAT = "wanmoe-evaluation/1"
AnyPair = TypeVar("AnyPair", bound="tuple[Scene, Scene | None]")


def evaluate(
    real: Annotated[
        Path | None, typer.Option(help="Real clips: clips.jsonl, folder or video; their ids tell the pairs.")
    ] = None,
    generated: Annotated[
        list[Path] | None,
        typer.Option(help="Generated clips, named <id>.mp4 or listed; given twice for --blind."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder: its held-out clips, noised and made again, are measured.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for evaluation.json (evaluation, in the --run if any) or tally.json."),
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="File of `wanmoe train-classifier`, for identity.")
    ] = None,
    detector: Annotated[
        Path | None, typer.Option(help="File of `wanmoe train-detector`, for tips that nobody marked.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Codec of --run, and of judges of latents; `haar` is a stand-in.")
    ] = None,
    lpips: Annotated[
        Path | None, typer.Option(help="torchvision's AlexNet weights, for warped LPIPS.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="efficientnet-lite0, i3d_torchscript.pt (FVD) or a folder of VideoMAE."),
    ] = None,
    start: Annotated[
        float, typer.Option(help="With --run: noise level that clips are made again from; 1 is noise alone.")
    ] = 0.8,
    steps: Annotated[int, typer.Option(min=1, help="With --run: denoising steps.")] = 8,
    track: Annotated[
        str | None, typer.Option(help="MLflow tracking URI that the figures go to as a run.")
    ] = None,
    blind: Annotated[
        Path | None, typer.Option(help="Write a page on which raters compare two sets, and its key.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="With --blind: pairs on the page at most.")] = 30,
    question: Annotated[
        str, typer.Option(help="With --blind: what raters are asked.")
    ] = "Which clip looks more like real surgery?",
    tally: Annotated[
        list[Path] | None, typer.Option(help="Answer files of a blind page, or folders of them.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="With --tally: the key of the page.")] = None,
    seed: int = 0,
    device: Device = None,
) -> None:
    """Measure generated clips against real ones: place, identity, steadiness, distance of sets, router."""
    if tally:
        from .blind import say_tally

        return say_tally(tally, key, seed, out)
    if blind is not None:
        from .blind import make_page

        return make_page(blind, real, generated or [], pairs, question, seed)
    if key is not None:
        raise WanmoeError("--key is for --tally")
    if (run is None) == (not generated):
        raise WanmoeError("give --generated clips and the --real ones, or the --run that is to make them")
    if generated and (real is None or len(generated) > 1):
        raise WanmoeError("give the --real clips and one set of --generated ones; two sets are for --blind")
    if run is not None and (vae is None or real is not None):
        raise WanmoeError("--run takes its real clips from its shards, and needs their codec: --vae")
    place = chosen_device(device)
    if place.type == "cpu":  # before DeepSpeed is imported, which would say that it looked for others
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ..infer.evaluation.evaluate import evaluate as measure
    from ..infer.evaluation.table import terminal
    from .evaluation import open_judges, scenes, told_apart

    judges = open_judges(classifier, detector, vae, lpips, features, place)
    out = out or (run or Path()) / "evaluation"
    if out.exists() and not out.is_dir():
        raise WanmoeError(f"--out {out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    sources: dict[str, dict[str, str]] = {}
    asked: Path | None = None
    if run is not None:
        assert vae is not None
        from .evaluation_run import open_run

        opened = open_run(run)
        asked = opened.config.objective.classifier
        found = _of_run(opened, vae, start, steps, out, judges, seed, place, sources)
    else:
        assert generated and real is not None
        clips = _pairs(generated[0], real, sources)
        notes = told_apart(clips)
        found = measure(_counted(scenes(clips), len(clips)), judges, seed)
        found.notes += notes
    facts = _facts(run, generated, real, judges, start, steps, seed)
    for name, file in (("classifier", classifier), ("detector", detector)):
        if file is not None:
            facts |= {name: str(file), f"{name}_sha256": file_sha256(file)}
    if asked is not None and asked.is_file() and file_sha256(asked) == facts.get("classifier_sha256"):
        found.notes.append(
            f"{classifier} is the classifier that the loss of the run asked: its identity is too good; judge "
            "by one of another seed (`wanmoe train-classifier --seed 1`)"
        )
    _write(found, facts, sources, out)
    for line in terminal(found):
        typer.echo(line)
    typer.echo(f"\nwrote {out / 'evaluation.json'} and {out / 'evaluation.md'}")
    if track is not None:
        _track(track, found, facts, out)


def _pairs(made: Path, real: Path, sources: dict[str, dict[str, str]]) -> list[tuple[Clip, Clip | None]]:
    from .evaluation import paired, read_clips

    pairs = paired(read_clips(made), read_clips(real))
    for own, other in pairs:
        sources[own.id] = {"made": str(own.video_path.resolve())}
        if other is not None:
            sources[own.id]["real"] = str(other.video_path.resolve())
            sources[own.id]["real_start"] = str(other.start_frame)
    return pairs


def _counted(pairs: Iterator[AnyPair], total: int) -> Iterator[AnyPair]:
    yield from tqdm(pairs, total=total, unit="clip", desc="evaluate", disable=not sys.stderr.isatty())


def _of_run(
    run: Run,
    vae: str,
    start: float,
    steps: int,
    out: Path,
    judges: Any,
    seed: int,
    device: torch.device,
    sources: dict[str, dict[str, str]],
) -> Evaluation:
    from ..infer.evaluation.evaluate import evaluate as measure
    from .evaluation_run import held_out, router_figures, run_scenes

    pairs = run_scenes(run, vae, start, steps, out, device)
    found = measure(_counted(pairs, held_out(run)), judges, seed)
    for name in found.each:
        # Relative to evaluation.json, so that the folder can be moved.
        sources[name] = {side: f"{side}/{name}.mp4" for side in ("made", "real")}
    if (routing := router_figures(run, device, seed)) is not None:
        found.router, found.load, found.routed = routing
    found.notes.append(
        f"the generated clips are held-out clips, noised to t = {start:g} and made again in {steps} steps "
        "without guidance; the real ones are decoded from the shards, so that the codec's own loss is in both"
    )
    if vae == "haar":
        found.notes.append("haar is a stand-in for Wan's codec: these pictures are its, not Wan's")
    return found


def _facts(
    run: Path | None,
    generated: list[Path] | None,
    real: Path | None,
    judges: Any,
    start: float,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    from ..kernels.bench.provenance import provenance

    facts: dict[str, Any] = {"seed": seed}
    if run is not None:
        facts |= {"run": str(run), "start": start, "steps": steps}
    else:
        facts |= {"generated": str(generated[0]) if generated else "", "real": str(real)}
    if judges.backbone is not None:
        facts["features"] = judges.backbone.origin
    return facts | {"made_on": provenance(torch.device("cpu"), sys.argv)}


def _write(found: Evaluation, facts: dict[str, Any], sources: dict[str, Any], out: Path) -> None:
    from ..infer.evaluation.evaluate import as_json
    from ..infer.evaluation.table import markdown

    values = {"format": FORMAT, "facts": facts, **as_json(found), "sources": sources}
    text = json.dumps(values, indent=1, ensure_ascii=False)
    write_atomic(out / "evaluation.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    title = f"Evaluation of {facts.get('run') or facts.get('generated')}"
    page = markdown(found, title)
    write_atomic(out / "evaluation.md", lambda partial: partial.write_text(page, encoding="utf-8"))


def _track(uri: str, found: Evaluation, facts: dict[str, Any], out: Path) -> None:
    from ..infer.evaluation.table import flat
    from ..train.mlflow_once import record

    params = {key: value for key, value in facts.items() if key != "made_on"}
    run = record(
        uri,
        "wanmoe",
        f"evaluate {Path(str(facts.get('run') or facts.get('generated'))).name}",
        params=params,
        metrics=flat(found),
        artifacts=[out / "evaluation.json", out / "evaluation.md"],
        folder=out,
    )
    typer.echo(f"MLflow run {run}")
