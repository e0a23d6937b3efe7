"""`wanmoe convert` and `wanmoe inspect`: adapters to and from the files of other tools."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..moe_lora.errors import WanmoeError
from .options import parse_mix

if TYPE_CHECKING:
    from ..moe_lora import AdapterConfig

Target = Literal["comfyui", "diffusers", "peft", "merged", "wanmoe"]


def convert(
    source: Annotated[
        list[Path], typer.Argument(help="Adapter or LoRA; several are told apart by their noise expert.")
    ],
    to: Annotated[
        Target,
        typer.Option(
            help="comfyui (diffusers reads it too), diffusers, peft: a plain LoRA; merged: a whole model; "
            "wanmoe: an adapter, from a file of another tool."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="File or folder to write; of two sources NAME_low and NAME_high.")
    ],
    instrument: Annotated[str | None, typer.Option(help="Expert that goes along with the base.")] = None,
    mix: Annotated[list[str] | None, typer.Option(help="NAME=WEIGHT, several times.")] = None,
    alpha_base: Annotated[float, typer.Option(help="Strength of the base adapter.")] = 1.0,
    alpha_expert: Annotated[float, typer.Option(help="Strength of the experts.")] = 1.0,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Cut the LoRA to this rank; default: exact, as wide as it takes."),
    ] = None,
    dit: Annotated[
        Path | None, typer.Option(help="Model to merge into, or that an imported adapter is for.")
    ] = None,
    dit_high_noise: Annotated[Path | None, typer.Option(help="The same of the high-noise side.")] = None,
    base: Annotated[
        Literal["keep", "svd"],
        typer.Option(help="A plain LoRA to wanmoe: keep it whole as a frozen base, or cut it to our ranks."),
    ] = "keep",
    config: Annotated[
        Path | None, typer.Option(help="Config whose [adapter] gives the experts beside a plain LoRA.")
    ] = None,
    lora_moe_config_file: Annotated[
        Path | None, typer.Option(help="Config of a file of the seed's fork that does not carry its own.")
    ] = None,
    fold_timestep: Annotated[
        bool, typer.Option(help="Keep the fork's constant timestep factor 0.7876 instead of our bands.")
    ] = False,
    noise_expert: Annotated[
        Literal["high", "low", "both"] | None,
        typer.Option(help="Side of an imported file that does not say its own."),
    ] = None,
) -> None:
    """Convert adapters: to LoRAs of other tools, into a merged model, or from their files into ours."""
    from ..infer.load import noise_expert_of

    logging.basicConfig(format="%(message)s")
    logging.getLogger("wanmoe").setLevel(logging.INFO)
    if instrument and mix:
        raise WanmoeError("--instrument and --mix exclude each other; give one of them")
    gates = {instrument: 1.0} if instrument else parse_mix(mix or [])
    sides = [noise_expert or noise_expert_of(path) for path in source]
    models = {"low": dit, "both": dit, "high": dit_high_noise or dit}
    for path, side, target in zip(source, sides, _targets(out, sides), strict=True):
        strengths = {"gates": gates, "alpha_base": alpha_base, "alpha_expert": alpha_expert}
        if to == "wanmoe":
            if gates or rank is not None:
                raise WanmoeError(
                    "--to wanmoe imports a whole file; --instrument, --mix and --rank are for exports"
                )
            options = {"base": base, "fold_timestep": fold_timestep, "config_file": lora_moe_config_file}
            _import(path, target, side, models[side], _adapter_config(config), options)
        elif to == "merged":
            _merge(path, target, models[side], strengths)
        else:
            _export(path, target, to, rank, strengths)


def inspect(
    path: Annotated[Path, typer.Argument(help="File or folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    hash_large: Annotated[bool, typer.Option("--hash", help="sha256 of files above 2 GB too.")] = False,
) -> None:
    """Say what a file is: format, task, side, ranks, experts and hash of adapters, LoRAs, models, caches."""
    from ..infer.inspect_file import inspect_file

    report = inspect_file(path, hash_large=hash_large)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        typer.echo("\n".join(report.lines()))


def _targets(out: Path, sides: list[str]) -> list[Path]:
    """Where each source goes: to `out`, or beside it under the name of its side."""
    if not out.absolute().parent.is_dir():
        raise WanmoeError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if len(sides) == 1:
        return [out]
    if sorted(sides) != ["high", "low"]:
        raise WanmoeError(
            f"the sources belong to the noise experts {', '.join(sides)}; give one file, or one of each side"
        )
    return [out.with_name(f"{out.stem}_{side}{out.suffix}") for side in sides]


def _export(path: Path, out: Path, to: Any, rank: int | None, strengths: dict[str, Any]) -> None:
    from ..moe_lora.interop import export_lora

    report = export_lora(path, out, format=to, rank=rank, **strengths)
    how = "exact" if report.error == 0 else f"error {report.error:.2e} of |dW|"
    typer.echo(f"wrote {out}: {report.format}, {report.linears} linears of rank {report.rank}, {how}")
    typer.echo("a plain LoRA acts alike at every noise level: the adapter's bands over t are not in it")


def _merge(path: Path, out: Path, dit: Path | None, strengths: dict[str, Any]) -> None:
    from ..moe_lora.interop import export_merged

    if dit is None:
        raise WanmoeError("--to merged needs --dit, the model to merge into")
    count = export_merged(path, dit, out, **strengths)
    typer.echo(f"wrote {out}: {dit} with {count} linears changed, the same at every noise level")


def _import(
    path: Path, out: Path, side: str, dit: Path | None, config: AdapterConfig | None, options: dict[str, Any]
) -> None:
    import torch

    from ..moe_lora import import_adapter, save_adapter
    from ..moe_lora.adapter_file import is_adapter
    from ..moe_lora.fork_file import is_fork
    from ..moe_lora.wan.dit import WanDiT
    from ..moe_lora.wan.weights import read_dit_config

    if is_adapter(path):
        raise WanmoeError(
            f"{path}: this is an adapter of wanmoe already; --to comfyui, peft or merged exports it"
        )
    if dit is None:
        raise WanmoeError(
            "--to wanmoe needs --dit, the model that the adapter is for; its header is read alone"
        )
    with torch.device("meta"):
        model = WanDiT(read_dit_config(dit)[0])
    adapter = import_adapter(path, model, config=config, device="cpu", **options)
    stage = "b" if is_fork(path) else "a"
    save_adapter(adapter, out, stage=stage, step=0, noise_expert=side)
    count = adapter.count()
    typer.echo(
        f"wrote {out}: {side} noise, {len(adapter.modules)} linears, {count:,} parameters, stage {stage}"
    )


def _adapter_config(path: Path | None) -> AdapterConfig | None:
    from .config import load_adapter_config

    return None if path is None else load_adapter_config(path)
