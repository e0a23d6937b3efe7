"""`wanmoe launch ... train`: the options of section `launch` where people look for a launcher's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .config import load_config, parse_launch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Start ranks on one machine or many: by DeepSpeed's launcher (pdsh over ssh, or --no-ssh on each "
    "node) or by Slurm. `doctor` looks for what would go wrong.",
)


@app.callback()
def options(
    context: typer.Context,
    hostfile: Annotated[Path | None, typer.Option(help="Lines of `host slots=N`.")] = None,
    no_ssh: Annotated[
        bool, typer.Option("--no-ssh", help="Start this node's ranks alone; run it on every node.")
    ] = False,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="This node's place in the hostfile, with --no-ssh.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Start the ranks by srun.")] = False,
    include: Annotated[str | None, typer.Option(help="Part of the hosts, e.g. host1:0,1@host2.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="Where the ranks meet; the first host.")] = None,
    master_port: Annotated[int | None, typer.Option(min=1, max=65535)] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
    restarts: Annotated[
        int | None, typer.Option(min=0, help="Starts again of a job that lost a rank.")
    ] = None,
) -> None:
    """Keeps what was given, for the subcommand."""
    given = {
        "hostfile": None if hostfile is None else str(hostfile.absolute()),
        "no_ssh": no_ssh or None,
        "node_rank": node_rank,
        "slurm": slurm or None,
        "include": include,
        "master_addr": master_addr,
        "master_port": master_port,
        "ranks": ranks,
        "restarts": restarts,
    }
    context.obj = {key: value for key, value in given.items() if value is not None}


def overrides(context: typer.Context) -> list[str]:
    """The options as --launch.key value, which a config takes."""
    return [word for key, value in context.obj.items() for word in (f"--launch.{key}", json.dumps(value))]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="TOML config; any key is set by --section.key value.")],
    machine: Annotated[str | None, typer.Option(help="Preset of a machine, e.g. a100-80g.")] = None,
) -> None:
    """As `wanmoe train`, with the options before it."""
    from .train import start

    start(config, [*overrides(context), *context.args], machine)


@app.command()
def doctor(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="Also what this config names: weights, shards, run folder.")
    ] = None,
    fake: Annotated[
        str | None, typer.Option(help="Dry run on this machine alone, as 2x2: nodes x ranks.")
    ] = None,
) -> None:
    """Look at every host, and let all ranks add up numbers together; exit code 1 where something is wrong."""
    from .doctor import examine

    settings = None if config is None else load_config(config, overrides(context))
    launch = parse_launch(context.obj, "wanmoe launch") if settings is None else settings.launch
    raise typer.Exit(examine(launch, settings, fake))
