"""`wanmoe bench`: the adapted linear against its peers, and `wanmoe bench block`, the adapted block."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..moe_lora.errors import WanmoeError
from .options import chosen_device

app = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="Measure the adapted linear: every form, loops, PEFT and merged weights, each with its error.",
)

Out = Annotated[
    Path | None,
    typer.Option(help="Folder. Default: kernels/bench/results/<device> in a checkout, else bench-results/."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")]


@app.callback()
def bench(
    context: typer.Context,
    suite: Annotated[
        str | None, typer.Option(help="cpu, quick or full. Default: quick with a GPU, otherwise cpu.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Patterns over q-n5376-b1-clip/fwd and the like, with commas.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Names, with commas; the frozen linear and the loop always run.")
    ] = None,
    out: Out = None,
    device: Device = None,
) -> None:
    """Time and check every form of the adapted linear; exit code 1 when a row is wrong, never for speed."""
    if context.invoked_subcommand is not None:
        return
    from ..kernels.bench.benchmark import Options, run_linear
    from .bench_peers import peft_variants

    options = Options(suite, rows, variants, out, chosen_device(device), ["wanmoe", *sys.argv[1:]])
    try:
        code = run_linear(options, peft_variants, typer.echo)
    except ValueError as error:
        raise WanmoeError(str(error)) from error
    raise typer.Exit(code)


@app.command()
def block(
    tokens: Annotated[
        str | None, typer.Option(help="Token grids FxHxW, with commas. Default: 21x16x16; 2x8x8 on the CPU.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Size of the block. Default: t2v-A14B; t2v-1.3B on the CPU.")
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option(help="Also under torch.compile. Default: with a GPU.")
    ] = None,
    out: Out = None,
    device: Device = None,
) -> None:
    """One adapted DiT block, forward and backward: ours, and that of diffusers with PEFT."""
    from ..kernels.bench.benchmark import Options, default_folder, keep_and_publish
    from ..moe_lora.wan.config import WanConfig
    from .bench_peers import block_run

    place = chosen_device(device)
    gpu = place.type == "cuda"
    config = WanConfig.preset(preset or ("t2v-A14B" if gpu else "t2v-1.3B"))
    grids = parse_grids(tokens or ("21x16x16" if gpu else "2x8x8"))
    runs = block_run(
        Options(argv=["wanmoe", *sys.argv[1:]]),
        config,
        grids,
        text_len=config.text_len if gpu else 64,
        device=place,
        suite="block",
        compiled=gpu if compiled is None else compiled,
        say=typer.echo,
    )
    raise typer.Exit(keep_and_publish(runs, out or default_folder(place), typer.echo))


@app.command()
def tune(
    linears: Annotated[str | None, typer.Option(help="q, k, ffn.0, ffn.2, qkv, kv, with commas.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens per call, with commas.")] = None,
) -> None:
    """Measure every form and launch on this card and store what wins where training reads it."""
    from ..kernels.bench.tune import ORDER, TOKENS, tune_card

    try:
        path = tune_card((linears or ORDER).split(","), tokens or TOKENS, typer.echo)
    except ValueError as error:
        raise WanmoeError(str(error)) from error
    typer.echo(f"wrote {path}")


@app.command()
def resources(
    archs: Annotated[
        str, typer.Option(help="sm_80, sm_86, sm_89, sm_90, with commas.")
    ] = "sm_80,sm_86,sm_89,sm_90",
    out: Annotated[Path | None, typer.Option(help="JSON file for the whole table.")] = None,
) -> None:
    """What the compiler makes of every kernel, without the card: registers, spills, shared memory; exit
    code 1 for a spill."""
    from ..kernels.bench.resources import resources_run

    try:
        code = resources_run([word.strip() for word in archs.split(",")], out, typer.echo)
    except ValueError as error:
        raise WanmoeError(str(error)) from error
    raise typer.Exit(code)


@app.command()
def data(
    samples: Annotated[int, typer.Option(min=2, help="Clips that are written and read.")] = 96,
    latent: Annotated[str, typer.Option(help="Latent size FxHxW.")] = "21x60x104",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a caption, 4096 wide.")] = 512,
    workers: Annotated[str, typer.Option(help="Numbers of reader processes, with commas.")] = "0,1,2,4",
    rounds: Annotated[int, typer.Option(min=1, help="Times that every case is measured.")] = 3,
    scratch: Annotated[
        Path | None,
        typer.Option(help="Folder on the disk to measure. Default: the system's for temporary files."),
    ] = None,
    out: Out = None,
) -> None:
    """Samples a second from shards: by offset, streamed, and by plain webdataset, cold and warm."""
    from ..kernels.bench.benchmark import default_folder
    from .bench_data import Sizes, bench_data, table, write_result

    counts = [word.strip() for word in workers.split(",")]
    if not all(word.isdecimal() for word in counts):
        raise WanmoeError(f"--workers {workers!r}: expected numbers, for example 0,2,4")
    (size,) = parse_grids(latent, "--latent")
    result = bench_data(
        Sizes(samples, size, tokens),
        [int(word) for word in counts],
        rounds,
        scratch,
        ["wanmoe", *sys.argv[1:]],
        typer.echo,
    )
    path = write_result(result, out or default_folder(chosen_device("cpu")))
    typer.echo(f"{table(result)}\nwrote {path}")


@app.command()
def engine(
    parts: Annotated[str, typer.Option(help="bytes, speed, prefix, with commas.")] = "bytes,speed,prefix",
    ranks: Annotated[int, typer.Option(min=2, help="Processes that train the small model on the CPU.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases, at the smallest sizes.")] = False,
    out: Out = None,
    device: Device = None,
) -> None:
    """What each ZeRO stage holds, gathers and takes, on real ranks and modelled for A14B; and the frozen
    prefix against the graph through all blocks."""
    from ..kernels.bench.benchmark import default_folder
    from .bench_engine import bench_engine, write_result
    from .bench_engine_tables import tables

    place = chosen_device(device)
    names = [word.strip() for word in parts.split(",")]
    result = bench_engine(names, ranks, place, quick=quick, argv=["wanmoe", *sys.argv[1:]], say=typer.echo)
    path = write_result(result, out or default_folder(place))
    typer.echo("\n\n".join([*tables(result), f"wrote {path}"]))


@app.command()
def ring(out: Out = None, device: Device = None) -> None:
    """Blocks that stream against blocks that stay, training and generation, measured beside planned: A14B
    with random weights, held to 24 and 16 GB of the card; on the CPU the tiny model."""
    from ..kernels.bench.benchmark import default_folder
    from .bench_ring import CPU, GPU, bench_ring, table, write_result

    place = chosen_device(device)
    setting = GPU if place.type == "cuda" else CPU
    keep = partial(write_result, folder=out or default_folder(place))
    result = bench_ring(place, setting, argv=["wanmoe", *sys.argv[1:]], say=typer.echo, keep=keep)
    path = keep(result)
    typer.echo(f"{table(result)}\nwrote {path}")


def parse_grids(text: str, option: str = "--tokens") -> list[tuple[int, int, int]]:
    """ "21x16x16,21x30x52" -> grids of F, H, W; raises WanmoeError for anything else."""
    grids = []
    for word in text.split(","):
        numbers = word.strip().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            raise WanmoeError(f"{option} {word.strip()!r}: expected FxHxW, for example 21x16x16")
        frames, height, width = map(int, numbers)
        grids.append((frames, height, width))
    return grids
