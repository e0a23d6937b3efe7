"""`wanmoe plan`: before a run, what it takes of a card and of the host, how long it is, and what fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..moe_lora.errors import WanmoeError
from .config import Config, load_config

if TYPE_CHECKING:
    import torch

    from ..train.planner import Card, Job, Needs, Planner, Settings

PRESETS = Path(__file__).parent / "presets"
GB = 10**9


def plan(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="Of the run. Default: Wan2.2 A14B, both noise experts, every stage.")
    ] = None,
    machine: Annotated[str | None, typer.Option(help="Preset of a machine, as for train.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Plan generation, not training.")] = False,
    card: Annotated[
        str | None,
        typer.Option(help="The run as configured on this card: 24GB, a name such as a100-80g, or cpu."),
    ] = None,
    fit: Annotated[str | None, typer.Option(help="The fastest settings that fit this card.")] = None,
    pcie: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s from pinned host memory to the card.")
    ] = None,
    host: Annotated[
        float | None, typer.Option(min=0.0, help="GB that the host has for what waits there.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Cards that train together, on one machine.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="Sizes of a known model, t2v-A14B, ..., for weights not at hand.")
    ] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width in pixels. Default: the clips', or 256.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="4 n + 1. Default: the clips', or 81.")] = None,
    clips: Annotated[
        int | None, typer.Option(min=1, help="Of an epoch. Default: the shards', or 160.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the settings as a preset, for --machine.")] = None,
) -> None:
    """What a run takes of a card and of the host, and how long it is, before it starts; bytes are counted,
    seconds are modelled. Keys of the config are set by --section.key value."""
    from ..train.planner import Planner, card_of

    if (card is None) == (fit is None):
        which = "not both" if card else "for settings that fit"
        raise WanmoeError(f"give --card CARD for the run as configured, or --fit CARD: {which}")
    if out is not None and (fit is None or generate):
        raise WanmoeError("--out writes what --fit proposes for training: give --fit, and no --generate")
    if out is not None:
        _check_out(out)
    _check_keys(context.args, fit is not None, generate)
    if generate and ranks > 1:
        raise WanmoeError("--ranks is for training: a video is generated on one card")
    kind = card_of(str(card or fit), None if pcie is None else pcie * GB)
    files = [PRESETS / f"stage_{stage}.toml" for stage in "bac"] if config is None else [config]
    one = generate or "train.stage" in _keys(context.args)
    read = [load_config(file, context.args, machine) for file in files[: 1 if one else None]]
    if config is None and model is None:
        model = "t2v-A14B"
    jobs = [job_of(one, model, size, frames, ranks, generate, kind.is_host) for one in read]
    planner = Planner(jobs[0], kind)
    if fit is None and not generate:
        found = [planner.needs(settings_of(read[0], planner))]
    else:
        room = math.inf if host is None else host * GB
        asked = read[0].model.quantised
        every = (None, "fp8", "nf4") if asked is None and fit is not None else (asked,)
        found = planner.fit(every, room)
    typer.echo(describe(planner, found[0]))
    if not generate:
        typer.echo(
            "\nhours of steps, modelled: "
            + "; ".join(sorted(map(partial(_hours, kind, found[0].settings, clips), read, jobs)))
        )
    if len(found) > 1:
        typer.echo("\nothers that fit:\n" + "\n".join(_line(one, jobs[0]) for one in found[1:]))
    if out is not None:
        write_preset(out, planner, found[0])
        typer.echo(f"\nwrote {out}: wanmoe train --config ... --machine {out}")
    if "nf4" in (one.settings.quantised for one in found[:1]) and find_spec("bitsandbytes") is None:
        typer.echo("\nnf4 takes bitsandbytes, which is not installed: pip install 'wanmoe[nf4]'")
    waits = sum(found[0].host.values())
    if host is not None and waits > host * GB:
        raise WanmoeError(
            f"{waits / GB:.3g} GB on the host do not fit into --host {host:g}; --fit {card} --host {host:g} "
            "says what does"
        )
    if found[0].peak > kind.memory:
        raise WanmoeError(
            f"{found[0].peak / GB:.3g} GB do not fit into {kind.memory / GB:.3g}; see --fit {card}"
        )


_CHOSEN = ("train.checkpointing", "ring.blocks", "deepspeed.zero")


def _keys(words: Sequence[str]) -> list[str]:
    """The config keys among the words of a command line."""
    return [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]


def _check_keys(words: Sequence[str], fit: bool, generate: bool) -> None:
    """A key that is given and would not be followed is refused."""
    given = _keys(words)
    chosen = [key for key in given if key in _CHOSEN]
    if chosen and (fit or generate):
        what = "--generate" if generate else "--fit"
        away = "leave it out" if generate else "leave it out, or give --card for the run as configured"
        raise WanmoeError(f"--{chosen[0]}: {what} chooses it itself; {away}")


def _check_out(out: Path) -> None:
    """Before seconds of planning: a preset may be replaced, nothing else."""
    if not out.absolute().parent.is_dir():
        raise WanmoeError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir() or (out.exists() and _BY_PLAN not in out.read_text(encoding="utf-8", errors="replace")):
        raise WanmoeError(f"--out {out}: it is there and no preset of `wanmoe plan`; choose another name")


_BY_PLAN = "# By `wanmoe plan`"


def job_of(
    config: Config,
    model: str | None,
    size: tuple[int, int] | None,
    frames: int | None,
    ranks: int,
    generate: bool = False,
    host: bool = False,
) -> Job:
    """What a config asks of a card.

    Args:
        model: name of the sizes; None takes those of the config's weights.
        size, frames: of a clip in pixels; None takes the largest of the config's shards, if they are there.
        ranks: of the job, on one machine.
        host: on the CPU, where "auto" is fp32.

    Raises:
        WanmoeError: the weights are not there, the stage is pretrain, or the sizes are none of a clip.
    """
    import torch

    from ..moe_lora.adapter_file import read_adapter_info
    from ..moe_lora.wan.codec import latent_shape
    from ..moe_lora.wan.config import WanConfig
    from ..moe_lora.wan.weights import read_dit_config
    from ..train.data.shards import ShardIndex
    from ..train.planner import Job
    from ..train.stages import STAGES, stage_name, with_accumulation

    if config.train.stage == "pretrain":
        raise WanmoeError(
            "a plan is made for stages a, b and c and for generation; stage pretrain trains the base"
        )
    weights, adapter = config.model.dit, config.model.adapter
    if model is None and weights is not None and not weights.exists():
        raise WanmoeError(
            f"model.dit: {weights} does not exist; give --model t2v-A14B to plan without the weights"
        )
    if model is None and weights is not None:
        wan = read_dit_config(weights)[0]
    else:
        wan = WanConfig.preset(model or str(config.model.preset))
    known = adapter is not None and adapter.exists()
    shards = Path(str(config.data.shards))
    if size is None and frames is None and not generate and (shards / "manifest.json").exists():
        latent = max(ShardIndex(shards).buckets, key=math.prod)
    else:
        height, width = size or (256, 256)
        if any(side < 16 or side % 16 for side in (height, width)):
            near = " ".join(str(max(1, round(side / 16)) * 16) for side in (height, width))
            raise WanmoeError(f"--size {height} {width}: multiples of 16 are wanted; nearest is {near}")
        latent = latent_shape(frames or 81, height, width)
    shared = 1 if generate else config.train.sequence_parallel
    if wan.num_heads % shared:
        raise WanmoeError(
            f"train.sequence_parallel = {shared} does not divide the model's {wan.num_heads} attention heads"
        )
    if ranks % shared:
        raise WanmoeError(f"--ranks {ranks} does not divide by train.sequence_parallel = {shared}")
    one_model = model is not None and not model.endswith("A14B")
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and not host)
    forwards = 2 if generate else with_accumulation(config, ranks // shared).train.accumulation
    return Job(
        model or str(weights or config.model.preset),
        wan,
        1 if config.model.dit_high_noise is None or one_model else 2,
        read_adapter_info(adapter).adapter if known and adapter is not None else config.adapter,
        () if generate else STAGES[stage_name(config)].trains,
        latent,
        1 if generate else config.data.batch,
        forwards,
        ranks,
        shared,
        torch.bfloat16 if bf16 else torch.float32,
    )


def settings_of(config: Config, planner: Planner) -> Settings:
    """How training would hold the models of a job on that card."""
    from ..train.planner import Settings
    from ..train.zero import FULL, make_plan

    job, form, again = planner.job, config.model.quantised, config.train.checkpointing
    found = make_plan(
        config.deepspeed.zero,
        [planner.base(form)] * job.models,
        planner.elements[0] * job.models,
        job.ranks,
        int(planner.card.memory / FULL),
        ring=config.ring.blocks,
        slots=config.ring.slots,
        shardable=form is None,
        beside=lambda: planner.beside(again),
    )
    return Settings(form, again, found.stage, found.park, found.stream, config.ring.slots)


def describe(planner: Planner, needs: Needs, measured: Mapping[str, float] | None = None) -> str:
    """Where everything lies and how long a step takes, for a terminal; `measured` are bytes by name."""
    job, card = planner.job, planner.card
    what = "generation" if not job.trains else f"training {', '.join(job.parts)}"
    lines = [
        f"{job.name}{' x 2' if job.models == 2 else ''}, {what}: {job.clip}, {job.tokens} tokens a clip",
        f"{card.name}: {card.memory / GB:.3g} GB, {card.flops / 1e12:.3g} TFLOP/s, "
        f"{card.bandwidth / 1e12:.2g} TB/s, {card.link / GB:.3g} GB/s from the host; "
        f"{_counted(job.ranks, 'rank')}",
        f"settings: {needs.settings.describe(job)}",
        "",
    ]
    wide = max(map(len, [*needs.held, *needs.phases, *needs.host])) + 4
    row = f"  {{:<{wide}}}{{:6.2f}}".format
    lines += [
        "GB of a rank" if card.is_host else "GB on a card",
        *(row(name, size / GB) for name, size in needs.held.items()),
    ]
    lines += ["beside it, the highest of", *(row(name, size / GB) for name, size in needs.phases.items())]
    lines += [row("peak", needs.peak / GB) + f" of {card.memory / GB:.3g}"]
    lines += [row(name, size / GB) for name, size in (measured or {}).items()]
    if needs.host:
        lines += ["GB on the host, for all ranks together"]
        lines += [row(name, size / GB) for name, size in needs.host.items()]
    return "\n".join([*lines, "", *_times(job, needs)])


def _times(job: Job, needs: Needs) -> list[str]:
    block = f"a block, modelled: forward {1e3 * needs.forward:.1f} ms"
    if job.trains:
        block += f", backward {1e3 * needs.backward:.1f} ms"
    if needs.copy:
        source = "gathered from the other cards" if needs.settings.stage == 3 else "copied from the host"
        hidden = "hidden behind computation" if needs.time.stall < 0.01 * needs.seconds else "not all hidden"
        block += f", {source} {1e3 * needs.copy:.1f} ms: {hidden}"
    step = f"a step, modelled: {needs.seconds:.3g} s"
    if needs.time.stall >= 0.01 * needs.seconds:
        step += f", {needs.time.stall:.3g} s of it waiting for blocks"
    if needs.swap:
        step += f", {needs.swap:.3g} s of it bringing the other model"
    if job.trains:
        step += (
            f"; {job.clips * job.forwards * job.tokens / job.shared / needs.seconds:,.0f} tokens/s on a card"
        )
    else:
        step += " with guidance; 40 steps take "
        step += f"{40 * needs.seconds / 60:.1f} minutes, without text encoder and codec"
    return [block, step]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _line(needs: Needs, job: Job) -> str:
    host = sum(needs.host.values()) / GB
    return (
        f"  {needs.peak / GB:6.1f} GB, {host:5.1f} on the host, {needs.seconds:7.3g} s a step: "
        f"{needs.settings.describe(job)}"
    )


def _hours(card: Card, settings: Settings, clips: int | None, config: Config, job: Job) -> str:
    from ..train.data.shards import ShardIndex
    from ..train.planner import Planner
    from ..train.stages import STAGES, stage_name, total_steps

    shards = Path(str(config.data.shards))
    if clips is None:
        clips = len(ShardIndex(shards)) if (shards / "manifest.json").exists() else 160
    batch = job.clips * job.forwards * job.ranks // job.shared
    steps = total_steps(config, STAGES[stage_name(config)], clips, batch)
    seconds = Planner(job, card).needs(settings).seconds
    return f"stage {config.train.stage} {steps * seconds / 3600:.1f} ({steps} steps of {batch} clips)"


def out_of_memory(config: Config, device: torch.device, ranks: int) -> tuple[str, str]:
    """(the plan of a run that has just run out of a card's memory with what it took, what to try next)."""
    import psutil
    import torch

    from ..train.planner import Planner, card_here

    host = psutil.virtual_memory().available
    planner = Planner(job_of(config, None, None, None, ranks), card_here(device))
    asked = planner.needs(settings_of(config, planner))
    taken = float(torch.cuda.max_memory_allocated(device))
    # What fits has to be that much smaller than what was believed to fit.
    room = min(planner.card.memory, asked.peak) * 0.9
    smaller = Planner(planner.job, replace(planner.card, memory=int(room)))
    told = describe(planner, asked, {"measured before it ran out": taken})
    try:
        try:
            chosen = smaller.fit((config.model.quantised,), host)[0].settings
        except WanmoeError:  # other weights are the last resort
            chosen = smaller.fit(host=host)[0].settings
    except WanmoeError as error:
        return told, str(error)
    keys = {
        "model.quantised": chosen.quantised != config.model.quantised and f'"{chosen.quantised}"',
        "train.checkpointing": chosen.checkpointing != config.train.checkpointing
        and str(chosen.checkpointing).lower(),
        "ring.blocks": chosen.stream,
        "deepspeed.zero": (chosen.stage == 3 and 3) or (config.deepspeed.zero == 3 and "auto"),
    }
    words = " ".join(f"--{key} {value}" for key, value in keys.items() if value is not False)
    return told, f"try {words}"


def write_preset(path: Path, planner: Planner, needs: Needs) -> None:
    """Writes settings as a machine preset; raises WanmoeError where it cannot."""
    from ..moe_lora.files import write_atomic

    job, chosen = planner.job, needs.settings
    models = "both noise experts of one job" if job.models == 2 else "one model"
    lines = [
        f"# {planner.card.name}, {_counted(job.ranks, 'rank')}: {job.name}, {models}, clips of {job.clip}.",
        f"{_BY_PLAN}: {needs.peak / GB:.1f} GB on a card, {sum(needs.host.values()) / GB:.1f} on the "
        f"host; modelled {needs.seconds / job.forwards:.2f} s a forward and backward.",
        *(["[model]", f'quantised = "{chosen.quantised}"'] if chosen.quantised else []),
        "[data]",
        f"batch = {job.clips}",
        "[train]",
        'precision = "bf16"',
        f"checkpointing = {str(chosen.checkpointing).lower()}",
        "[ring]",
        f"blocks = {chosen.stream}",
        *([f"slots = {chosen.slots}"] if chosen.stream else []),
        "[deepspeed]",
        f"zero = {3 if chosen.stage == 3 else chr(34) + 'auto' + chr(34)}",
        "[launch]",
        "restarts = 3",
    ]
    write_atomic(path, lambda partial: partial.write_text("\n".join(lines) + "\n", encoding="utf-8"))
