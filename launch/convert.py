"""`wanmoe convert` and `wanmoe inspect`: adapters to and from the files of other tools."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from ..moe_lora.errors import WanmoeError
from .options import parse_mix

if TYPE_CHECKING:
    import torch

    from ..moe_lora import AdapterConfig
    from ..moe_lora.export import ExportReport

Target = Literal["comfyui", "diffusers", "peft", "merged", "wanmoe"]
Kind = Literal["adapter", "fork", "lora"]
Side = Literal["high", "low", "both"]
Precision = Literal["fp32", "bf16", "fp16"]

_ALWAYS = {"source", "to", "out", "dtype"}
_STRENGTHS = {"instrument", "mix", "alpha_base", "alpha_expert"}
_MODELS = {"dit", "dit_high_noise"}
# What acts, by what the source is and whether it becomes a LoRA, a merged model or an adapter.
_ACTS: dict[tuple[Kind, str], set[str]] = {
    ("adapter", "lora"): _STRENGTHS | {"rank"},
    ("adapter", "merged"): _STRENGTHS | _MODELS | {"any_base"},
    ("lora", "lora"): {"noise_expert"},
    ("lora", "merged"): _MODELS | {"noise_expert"},
    ("lora", "wanmoe"): _MODELS | {"base", "config", "noise_expert"},
    ("fork", "wanmoe"): _MODELS | {"fold_timestep", "lora_moe_config_file", "noise_expert"},
}
_KINDS = {"adapter": "an adapter of wanmoe", "fork": "a LoRA-MoE file of the fork", "lora": "a plain LoRA"}


def convert(
    context: typer.Context,
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
    mix: Annotated[
        list[str] | None,
        typer.Option(help="NAME=WEIGHT, several times; scaled to sum to 1, as generate does."),
    ] = None,
    alpha_base: Annotated[
        float, typer.Option(help="Strength of the base adapter (generate uses 0.7 by default).")
    ] = 1.0,
    alpha_expert: Annotated[float, typer.Option(help="Strength of the experts.")] = 1.0,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Cut the LoRA to this rank; default: exact, as wide as it takes."),
    ] = None,
    dit: Annotated[
        Path | None, typer.Option(help="Model to merge into, or that an imported adapter is for.")
    ] = None,
    dit_high_noise: Annotated[Path | None, typer.Option(help="The same of the high-noise side.")] = None,
    any_base: Annotated[bool, typer.Option(help="Merge in spite of another task or base.")] = False,
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
        Side | None, typer.Option(help="Side of a LoRA or of the fork's file, whatever it says itself.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of what is written. Default: as stored; wanmoe: fp32.")
    ] = None,
) -> None:
    """Convert adapters: to LoRAs of other tools, into a merged model, or from their files into ours."""
    import torch

    logging.basicConfig(format="%(message)s")
    logging.getLogger("wanmoe").setLevel(logging.INFO)
    if instrument and mix:
        raise WanmoeError("--instrument and --mix exclude each other; give one of them")
    # Of a click of typer's own, whose classes are not click's.
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, where in sources.items() if where is not None and where.name == "COMMANDLINE"}
    kinds = {path: _kind(path) for path in source}
    for path, kind in kinds.items():
        _check_options(path, kind, to, given)
    sides: list[Side] = [noise_expert or _side(path, kinds[path], lora_moe_config_file) for path in source]
    targets = _targets(out, sides)
    models = [_model(to, side, len(source), dit, dit_high_noise) for side in sides]
    _check_targets(targets, [*source, dit, dit_high_noise, config, lora_moe_config_file])
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    chosen = known[dtype] if dtype else None
    for path, side, target, model in zip(source, sides, targets, models, strict=True):
        kind = kinds[path]
        if to == "wanmoe":
            job = _Import(base, noise_expert, fold_timestep, lora_moe_config_file, chosen)
            _import(path, target, side, model, _adapter_config(config), job)
        elif kind == "lora":
            _plain(path, target, to, noise_expert, model, chosen)
        else:
            strengths: dict[str, Any] = {
                "alpha_base": alpha_base,
                "alpha_expert": alpha_expert,
                "dtype": chosen,
            }
            strengths |= {"gates": _gates(path, instrument, parse_mix(mix or []))}
            if "alpha_expert" in given and not strengths["gates"]:
                raise WanmoeError(
                    "--alpha_expert does nothing without experts: name them with --instrument or --mix"
                )
            if to == "merged":
                _merge(path, target, model, strengths | {"any_base": any_base})
            else:
                _export(path, target, to, strengths | {"rank": rank})


def inspect(
    path: Annotated[Path, typer.Argument(help="File or folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    hash_large: Annotated[bool, typer.Option("--hash", help="sha256 of files above 2 GB too.")] = False,
    lora_moe_config_file: Annotated[
        Path | None, typer.Option(help="Config of a file of the seed's fork that does not carry its own.")
    ] = None,
) -> None:
    """Say what a file is: format, task, side, ranks, experts and hash of adapters, LoRAs, models, caches."""
    from ..infer.inspect_file import inspect_file

    report = inspect_file(path, hash_large=hash_large, config_file=lora_moe_config_file)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        typer.echo("\n".join(report.lines()))


def _kind(path: Path) -> Kind:
    """What a source is; a LoRA is what is none of the others, and its reader says so where it is none."""
    from ..moe_lora.adapter_file import is_adapter
    from ..moe_lora.fork_file import is_fork

    if not path.exists():
        raise WanmoeError(f"{path}: no such file or folder")
    return "adapter" if is_adapter(path) else "fork" if is_fork(path) else "lora"


def _side(path: Path, kind: Kind, config_file: Path | None) -> Any:
    """The noise expert that a file says it is for, "both" where it says nothing."""
    from ..moe_lora.adapter_file import read_adapter_info
    from ..moe_lora.fork_file import read_fork
    from ..moe_lora.lora_file import read_lora

    if kind == "adapter":
        return read_adapter_info(path).noise_expert
    file = read_fork(path, config_file) if kind == "fork" else read_lora(path)
    return file.noise_expert or "both"


def _check_options(path: Path, kind: Kind, to: Target, given: set[str]) -> None:
    """Refuses what cannot be converted so, and options that would do nothing."""
    into = to if to in ("merged", "wanmoe") else "lora"
    if (kind, into) == ("adapter", "wanmoe"):
        raise WanmoeError(
            f"{path}: this is an adapter of wanmoe already; --to comfyui, peft or merged exports it"
        )
    if (kind, into) not in _ACTS:
        raise WanmoeError(f"{path}: this is {_KINDS[kind]}; import it with --to wanmoe, then export that")
    idle = sorted(given - _ALWAYS - _ACTS[kind, into])
    if idle:
        listed = ", ".join(f"--{name}" for name in idle)
        raise WanmoeError(f"{path}: --to {to} of {_KINDS[kind]} does nothing with {listed}; leave it out")


def _targets(out: Path, sides: list[Side]) -> list[Path]:
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


def _model(to: Target, side: Side, sources: int, dit: Path | None, high: Path | None) -> Path | None:
    """The model of a source's side, where one is needed."""
    if to not in ("merged", "wanmoe"):
        return None
    if to == "merged" and sources > 1 and not (dit and high):
        raise WanmoeError(
            "--to merged of two sources needs --dit and --dit_high_noise, the model of each side"
        )
    if to == "merged" and side == "both" and dit and high:
        raise WanmoeError(
            "the source serves both noise experts; give one model at a time, or say --noise_expert of a LoRA"
        )
    # A model by itself is the one that is meant; the hash of an adapter's base tells where it is not.
    model = (high or dit) if side == "high" else dit if side == "low" else (dit or high)
    if model is None:
        raise WanmoeError(f"--to {to} needs --dit, the model of the {side} noise expert(s)")
    return model


def _check_targets(targets: list[Path], read: Iterable[Path | None]) -> None:
    """Refuses to write over what is read."""
    from ..moe_lora.wan.weight_files import weight_files

    sources: set[Path] = set()
    for path in read:
        if path is not None:
            sources |= {path.resolve(), *(file.resolve() for file in weight_files(path))}
    for target in targets:
        # A PEFT LoRA is a folder of these.
        written = (target, target / "adapter_model.safetensors", target / "adapter_config.json")
        if any(file.resolve() in sources for file in written):
            raise WanmoeError(f"--out {target}: that is a file which is read; give another name")


def _gates(path: Path, instrument: str | None, mix: dict[str, float] | None) -> dict[str, float] | None:
    """Weights of the experts as generate makes them of an instrument or a mix, where there is most noise."""
    from ..moe_lora.adapter_file import read_adapter_info
    from ..moe_lora.export import gates_of

    gates = gates_of(path, instrument=instrument, mix=mix)
    info = read_adapter_info(path)
    adapter = info.adapter
    if gates and info.stage == "a":
        typer.echo(f"{path}: its experts were never trained, so without effect", err=True)
    if not instrument and not mix:
        if adapter.fallback is not None:
            typer.echo(f"{path}: no instrument, so its fallback expert {adapter.fallback}")
        elif gates:
            typer.echo(f"{path}: no instrument, so all experts alike")
        else:
            typer.echo(f"{path}: base adapter alone, {len(adapter.experts)} experts left out")
    return gates


def _export(path: Path, out: Path, to: Any, options: dict[str, Any]) -> None:
    from ..moe_lora.adapter_file import read_adapter_info
    from ..moe_lora.export import export_lora

    _say_written(out, export_lora(path, out, format=to, **options))
    if not read_adapter_info(path).router.steady:
        typer.echo("a plain LoRA acts alike at every noise level: the adapter's time gate is not in it")


def _say_written(out: Path, report: ExportReport) -> None:
    import torch

    how = "exact" if report.error == 0 else f"error {report.error:.2e} of |dW|"
    if report.dtype != torch.float32:
        how += f" in float32, rounded to {str(report.dtype).removeprefix('torch.')}"
    typer.echo(f"wrote {out}: {report.format}, {report.linears} linears of rank {report.rank}, {how}")


def _merge(path: Path, out: Path, dit: Path | None, options: dict[str, Any]) -> None:
    from ..moe_lora.export import export_merged

    assert dit is not None
    count = export_merged(path, dit, out, **options)
    typer.echo(f"wrote {out}: {dit} with {count} linears changed, the same at every noise level")


def _plain(
    path: Path, out: Path, to: Any, side: Side | None, dit: Path | None, dtype: torch.dtype | None
) -> None:
    from ..moe_lora.export import merge_lora, rewrite_lora
    from ..moe_lora.lora_merge import LoRASpec

    if to != "merged":
        _say_written(out, rewrite_lora(path, out, format=to, noise_expert=side, dtype=dtype))
        return
    assert dit is not None
    count = merge_lora(LoRASpec(path, side=None if side == "both" else side), dit, out, dtype=dtype)
    typer.echo(f"wrote {out}: {dit} with {count} layers of {path} merged in")


class _Import(NamedTuple):
    """How a file of another tool becomes an adapter."""

    base: Literal["keep", "svd"]
    noise_expert: Side | None
    fold_timestep: bool
    config_file: Path | None
    dtype: torch.dtype | None


def _import(
    path: Path, out: Path, side: Side, dit: Path | None, config: AdapterConfig | None, job: _Import
) -> None:
    import torch

    from ..moe_lora import import_adapter, save_adapter
    from ..moe_lora.fork_file import is_fork
    from ..moe_lora.wan.dit import WanDiT
    from ..moe_lora.wan.weights import read_dit_config

    assert dit is not None
    with torch.device("meta"):
        model = WanDiT(read_dit_config(dit)[0])
    adapter = import_adapter(
        path,
        model,
        config=config,
        base=job.base,
        noise_expert=job.noise_expert,
        fold_timestep=job.fold_timestep,
        any_base=job.noise_expert is not None,  # what is said on the command line counts
        config_file=job.config_file,
        device="cpu",
    )
    stage = "b" if is_fork(path) else "a"
    dtype = job.dtype or torch.float32
    save_adapter(adapter, out, stage=stage, step=0, noise_expert=side, dtype=dtype)
    count = adapter.count()
    typer.echo(
        f"wrote {out}: {side} noise, {len(adapter.modules)} linears, {count:,} parameters, stage {stage}"
    )


def _adapter_config(path: Path | None) -> AdapterConfig | None:
    from .config import load_adapter_config

    return None if path is None else load_adapter_config(path)
