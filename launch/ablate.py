"""`wanmoe ablate`: a file of rows, trained and measured; one table."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..moe_lora.errors import WanmoeError
from .options import Device, chosen_device

if TYPE_CHECKING:
    from .ablation import Plan

PRESETS = Path(__file__).parent / "presets" / "ablations"


def ablate(
    file: Annotated[Path, typer.Argument(help="TOML file of the ablation, or the name of one that ships.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for runs and table; a second call takes what is there."),
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Names of rows, with semicolons. Default: all.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each row. Default: the file's.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time on the CPU. Default: as cores.")
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(help="MLflow tracking URI; rows go there as runs under one."),
    ] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Check the file and say what would be trained.")] = False,
    device: Device = None,
) -> None:
    """Train and measure the rows of an ablation; what they share is trained once."""
    from .ablation import read_ablation
    from .ablation_table import table, write_result

    path = _file(file)
    plan = read_ablation(path)
    if seeds is not None:
        plan.spec.seeds = seeds
    names = None if rows is None else _names(rows, plan)
    folder = out or Path("runs") / f"ablation-{path.stem}"
    if dry:
        return _say_plan(plan, names)
    place = chosen_device(device)
    if place.type == "cpu":  # before DeepSpeed is imported, which would say that it looked for others
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from .ablate_run import run_ablation

    result = run_ablation(
        plan,
        folder,
        jobs or os.cpu_count() or 1,
        place,
        ["wanmoe", *sys.argv[1:]],
        typer.echo,
        names,
    )
    written = write_result(result, folder)
    typer.echo(f"\n{table(result)}\n\nwrote {written} ({result['minutes']:.1f} minutes)")
    if track is not None:
        typer.echo(f"MLflow run {_track(track, result, folder)}")
    if result["failed"]:
        first, fault = next(iter(result["failed"].items()))
        raise WanmoeError(f"{len(result['failed'])} rows failed, the first is {first}: {fault}")


def _file(file: Path) -> Path:
    if file.is_file():
        return file
    known = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    if str(file) in known:
        return known[str(file)]
    raise WanmoeError(f"{file}: no such file; ablations that ship are {', '.join(known)}")


def _names(text: str, plan: Plan) -> list[str]:
    names = [word.strip() for word in text.split(";") if word.strip()]
    if unknown := [name for name in names if name not in plan.rows]:
        raise WanmoeError(f"--rows: no row {unknown[0]!r}; there are: {'; '.join(plan.rows)}")
    return names


def _say_plan(plan: Plan, names: list[str] | None) -> None:
    """Rows with their stages, and how many trainings there are once shared ones are counted once."""
    chains = set()
    for name, steps in plan.rows.items():
        if names is not None and name not in names:
            continue
        told = " -> ".join(f"{step.use} ({step.tree['train'].get('steps', '?')} steps)" for step in steps)
        typer.echo(f"{name}: {told or 'the base alone'}")
        chains |= {tuple(step.model_dump_json() for step in steps[: end + 1]) for end in range(len(steps))}
    total = len(chains) * plan.spec.seeds
    typer.echo(f"{total} trainings with {plan.spec.seeds} seeds, besides base and judges")


def _track(uri: str, result: dict[str, Any], folder: Path) -> str:
    """A run of the ablation, and under it one for each row and seed."""
    from ..train.mlflow_once import record

    artifacts = [folder / "ablation.json", folder / "ablation.md"]
    parent = record(
        uri,
        "wanmoe",
        f"ablation {result['name']}",
        params={"reference": result["reference"], "seeds": len(result["seeds"])},
        metrics={"minutes": result["minutes"]},
        artifacts=artifacts,
        folder=folder,
    )
    for name, by_seed in result["rows"].items():
        for seed, row in by_seed.items():
            steps = result["recipes"][name]
            params = {"row": name, "axis": result["axes"][name], "seed": seed}
            params |= {"commits": ", ".join(row["commits"])}
            for number, step in enumerate(steps):
                params |= {f"{number}.{step['use']}.{key}": value for key, value in _flat(step["tree"])}
            record(
                uri,
                "wanmoe",
                f"{name}, seed {seed}",
                params=params,
                metrics={f"ablation/{key}": one["value"] for key, one in row["figures"].items()},
                parent=parent,
                folder=folder,
            )
    return parent


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out = []
    for key, value in tree.items():
        out += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return out
