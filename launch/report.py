"""`wanmoe report`: what runs, evaluations and ablations left behind, as one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..infer.charts import Curve, Dot
from ..infer.evaluation.metrics import direction
from ..infer.run_report import AblationPart, EvaluationPart, Part, RunPart, TallyPart, gone, write_run_report
from ..moe_lora.errors import WanmoeError
from ..train.tracking import read_metrics
from .ablation import FIGURES
from .ablation_table import columns, difference, read_result, table
from .blind import TALLY
from .evaluate import FORMAT

_LOWER = ("loss", "roi", "withheld", "pairs", "kid", "fds")
_HIGHER = ("wrong", "identity", "identity_withheld", "pck", "gatc", "router_agreement")
_PLOTTED_NOT = ("parameters", "train_s")


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of runs, of evaluations and of ablations, in any number.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write. Default: report.html in the first folder.")
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "wanmoe report",
) -> None:
    """One HTML page of runs, evaluations and ablations: curves, tables, clips with tips, failures, gates."""
    parts = [part for folder in folders for part in parts_of(folder)]
    path = folders[0] / "report.html" if out is None else out
    if path.suffix != ".html" or not path.absolute().parent.is_dir():
        raise WanmoeError(f"--out {path}: give an .html file in a folder that is there")
    write_run_report(path, title, parts)
    for part in parts:
        if isinstance(part, EvaluationPart) and (lost := gone(part.values)):
            typer.echo(
                f"{part.name}: {len(lost)} clips are gone and have no pictures, the first is {lost[0]}"
            )
    typer.echo(f"wrote {path}: {', '.join(_told(part) for part in parts)}")


def _told(part: Part) -> str:
    kinds = {RunPart: "run", EvaluationPart: "evaluation", AblationPart: "ablation", TallyPart: "tally"}
    return f"{kinds[type(part)]} {part.name}"


def parts_of(folder: Path) -> list[Part]:
    """What a folder holds: a run, with its evaluation where it has one, an evaluation, or an ablation.

    Raises WanmoeError where it holds none of them.
    """
    parts: list[Part] = []
    if (folder / "config.toml").is_file():
        parts.append(_run(folder))
    for place in (folder, folder / "evaluation"):
        if (place / "evaluation.json").is_file():
            parts.append(EvaluationPart(str(place), _evaluation(place / "evaluation.json")))
    if (folder / "tally.json").is_file():
        parts.append(TallyPart(str(folder), _read(folder / "tally.json", TALLY, "a tally")))
    if (folder / "ablation.json").is_file():
        parts.append(_ablation(folder / "ablation.json"))
    if not parts:
        raise WanmoeError(
            f"{folder}: it holds no config.toml of a run, evaluation.json, tally.json or ablation.json; "
            "give the folders of `wanmoe train`, `wanmoe evaluate` or `wanmoe ablate`"
        )
    return parts


def curve(lines: list[dict[str, float]], side: str = "") -> Curve:
    """Training and held-out loss by step; of one noise expert where both train."""
    train = [line for line in lines if f"{side}train/loss" in line]
    val = [line for line in lines if f"{side}val/loss" in line]
    return Curve(
        steps=[int(line["step"]) for line in train],
        train=[line.get(f"{side}train/diffusion", line[f"{side}train/loss"]) for line in train],
        val_steps=[int(line["step"]) for line in val],
        val=[line[f"{side}val/loss"] for line in val],
    )


def _run(folder: Path) -> RunPart:
    from .config import load_config

    config, lines = load_config(folder / "config.toml"), read_metrics(folder)
    curves = {side: curve(lines, side and f"{side}/") for side in ("", "high", "low")}
    model = config.model
    facts = {
        "stage": config.train.stage,
        "steps": str(int(max((line["step"] for line in lines), default=0))),
        "base": str(model.dit or model.preset),
        "shards": config.data.shards,
        "seed": str(config.train.seed),
    }
    return RunPart(str(folder), facts, {side: one for side, one in curves.items() if one.steps or one.val})


def _evaluation(path: Path) -> dict[str, Any]:
    found = _read(path, FORMAT, "an evaluation")
    for source in found["sources"].values():
        source |= {side: str(path.parent / source[side]) for side in ("made", "real") if side in source}
    return found


def _read(path: Path, kind: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WanmoeError(f"{path}: not a JSON file that can be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != kind:
        raise WanmoeError(f"{path}: not {what} of this version (format {kind}); make it again")
    return found


def _ablation(path: Path) -> AblationPart:
    result = read_result(path)
    lines = [line for line in table(result).split("\n\n")[0].splitlines() if not line.startswith("|--")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    differences = {}
    for key in columns(result):
        if key in _PLOTTED_NOT:
            continue
        dots = []
        for name in result["rows"]:
            found = difference(result, name, key) if name != result["reference"] else None
            if found is not None:
                dots.append(Dot(name, *found, result["axes"].get(name, "")))
        better = "lower" if key in _LOWER else "higher" if key in _HIGHER else direction(key)
        differences[FIGURES[key]] = (better, dots)
    facts = {"seeds": str(len(result["seeds"])), "commits": ", ".join(one[:10] for one in result["commits"])}
    facts |= {f"failed: {name}": why for name, why in result["failed"].items()}
    return AblationPart(result["name"], result["reference"], cells[0], cells[1:], differences, facts)
