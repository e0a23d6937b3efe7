"""The whole way on a small model: clips, shards, a base, stages A, B and C, one video per instrument, a
report.

Everything is the real thing at a small size but for the stand-ins that the report names: no pretrained
weights are used, so the base is trained here first, on scenes without instruments.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
import typer

from ..infer import LoRAMoEInference
from ..infer.report import DemoResults, findings, write_report
from ..moe_lora import Expert, ExpertSet, WanmoeError
from ..moe_lora.instruments import SURGICAL
from ..moe_lora.video import read_video, to_frames, write_video
from ..moe_lora.wan.codec import load_vae
from ..moe_lora.wan.text import load_text_encoder
from ..train import ShardDataset
from ..train.data.batch import main_instrument
from ..train.data.clip_list import clips_from_folder, read_clip_list
from ..train.data.clips import Clip, instrument_names
from ..train.data.prepare import label as label_of
from ..train.data.prepare import prepare
from ..train.data.router_prompts import router_prompts
from ..train.evaluate import evaluate_files, held_out_gates
from ..train.synth import synth_clips
from ..train.tracking import read_metrics
from .config import Config, parse_config
from .launcher import launch
from .report import curve

MARKER = ".wanmoe-demo"
RESULTS = "demo.json"
STAGES = ("pretrain", "a", "b", "c")
MOMENTS = "; a lower loss there may show the scene or the person as much as the label"
STAND_INS = [
    "The base model is the tiny preset (2 million parameters), trained here on drawn scenes without "
    "instruments; Wan2.2 A14B takes its place with the same commands. A model of this size does not learn to "
    "draw an instrument in minutes: its videos show colours and textures, no more.",
    "The video codec haar is a fixed wavelet that keeps 16 of 768 bands: it stands in for Wan's VAE, and "
    "its blocks are visible.",
    "The text encoder hash gives every word a fixed random vector: it stands in for umT5.",
]


@dataclass(frozen=True)
class Recipe:
    """Sizes of the demo; the default is what `wanmoe demo` runs."""

    size: tuple[int, int] = (96, 96)
    frames: int = 17
    clips: int = 160
    val: int = 48
    background_clips: int = 400
    batch: int = 2
    steps: tuple[int, int, int, int] = (1000, 600, 600, 150)
    """Of pretrain, a, b, c. Stage b does not go on from a: both have the same steps and rate."""
    lr: tuple[float, float, float, float] = (3e-3, 5e-3, 5e-3, 3e-3)
    sample_steps: int = 30


def run_demo(out: Path, clips: Path | None, ranks: int, seed: int, recipe: Recipe | None = None) -> Path:
    """Runs everything and returns the report; each run starts afresh in `out`.

    Raises:
        WanmoeError: unusable clips, `out` holds something else, or a stage failed.
    """
    recipe = recipe or Recipe()
    began = time.monotonic()
    given = None if clips is None else clips_from_folder(clips)
    start_afresh(out)
    say(f"demo in {out}: {ranks} ranks, seed {seed}")
    experts, shards = make_data(out, given, recipe, seed)
    encoded = ShardDataset(shards["clips"], "train")
    regions = all(encoded.has_region(index) for index in range(len(encoded)))
    if not regions:
        say("the clips have no tips, boxes or masks: no loss looks at the instruments' region")
    for number, stage in enumerate(STAGES):
        run_stage(stage_config(out, stage, number, experts, shards, ranks, seed, recipe, regions), out)
    results = measure(out, experts, shards["clips"], recipe, seed)
    results.facts |= {
        "clips": f"your folder {clips}" if clips else "drawn by `wanmoe synth`",
        "ranks": f"{ranks} under DeepSpeed ZeRO-3",
        "seed": str(seed),
        "wall time": f"{(time.monotonic() - began) / 60:.1f} minutes on {platform.machine()}",
    }
    (out / RESULTS).write_text(results.to_json(), encoding="utf-8")
    report = out / "report.html"
    write_report(results, report)
    print_results(results, report)
    return report


def start_afresh(out: Path) -> None:
    """Empties the folder of an earlier demo; refuses a folder that holds anything else."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise WanmoeError(f"{out} is not empty and not a demo's folder; choose another with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).write_text("made by `wanmoe demo`, which empties this folder when it runs again\n")


def make_data(
    out: Path, given: list[Clip] | None, recipe: Recipe, seed: int
) -> tuple[ExpertSet, dict[str, Path]]:
    """Draws (or takes) the clips and encodes them; returns the experts and the shard folders."""
    scene: dict[str, Any] = {"height": recipe.size[0], "width": recipe.size[1], "frames": recipe.frames}
    background = synth_clips(
        out / "background",
        clips=recipe.background_clips,
        val=16,
        seed=seed + 1,
        instruments=0,
        **scene,
    )
    if given is None:
        experts = ExpertSet(SURGICAL)
        path = synth_clips(out / "clips", clips=recipe.clips, val=recipe.val, seed=seed, **scene)
        given, fps, stride = read_clip_list(path), None, None
    else:
        experts = experts_of(given)
        given = labelled(given, experts)
        # A few real clips: every window counts, so they overlap within a split.
        fps, stride = None, max(recipe.frames // 4, 1)
    codec, text = load_vae("haar"), load_text_encoder("hash", dim=64, max_length=32)
    shards = {"background": out / "shards" / "background", "clips": out / "shards" / "clips"}
    common: dict[str, Any] = {
        "codec": codec,
        "text_encoder": text,
        "experts": experts,
        "size": recipe.size,
        "frames": recipe.frames,
        "seed": seed,
    }
    say("encoding background scenes")
    prepare(read_clip_list(background), shards["background"], **common)
    say("encoding clips")
    prepare(
        given,
        shards["clips"],
        fps=fps,
        window_stride=stride,
        val_fraction=0.25,
        router_prompts=router_prompts(experts, seed),
        **common,
    )
    return experts, shards


def labelled(clips: list[Clip], experts: ExpertSet) -> list[Clip]:
    """The clips that a stage which routes by label can use; says which ones are left out."""
    kept = [clip for clip in clips if label_of(clip, experts)]
    for clip in clips:
        if clip not in kept:
            say(f"left out {clip.origin}: no instrument label, and no keyword of an expert in its caption")
    if not kept:
        raise WanmoeError(
            f"none of the {len(clips)} clips has an instrument label or a keyword in its caption"
        )
    return kept


def experts_of(clips: list[Clip]) -> ExpertSet:
    """The surgical families where they cover every label or the captions name them, else one per label."""
    names = instrument_names(clips)
    surgical = ExpertSet(SURGICAL)
    if not names and not any(surgical.find(clip.caption) for clip in clips):
        raise WanmoeError("no clip has a label; name files after the instrument, e.g. scissors_01.mp4")
    if all(name.lower() in [known.lower() for known in surgical.names] for name in names):
        return surgical
    return ExpertSet([Expert(name=name) for name in names])


def stage_config(
    out: Path,
    stage: str,
    number: int,
    experts: ExpertSet,
    shards: dict[str, Path],
    ranks: int,
    seed: int,
    recipe: Recipe,
    regions: bool,
) -> Config:
    """The config of one stage, as a user would write it; `regions`: whether the clips have the
    instruments'."""
    model: dict[str, Any] = {"preset": "tiny"} if stage == "pretrain" else {"dit": str(base_path(out))}
    if stage == "c":
        model["adapter"] = str(out / "b" / "adapter.safetensors")
    tree: dict[str, Any] = {
        "model": model,
        "router": {"mode": "learned" if stage == "c" else "rule"},
        "data": {
            "shards": str(shards["background" if stage == "pretrain" else "clips"]),
            "batch": recipe.batch,
            "val_batch": 8,
            "workers": 0,  # samples of kilobytes are read faster than they are handed over
        },
        "objective": {"t_range": [0.0, 1.0]} | ({} if regions else {"roi": 0.0}),
        "optimizer": {"lr": recipe.lr[number], "schedule": "cosine"},
        "train": {
            "stage": stage,
            "run": str(out / stage),
            "steps": recipe.steps[number],
            "seed": seed,
            "val_every": max(recipe.steps[number] // 4, 1),
        },
        "tracking": {"experiment": "wanmoe-demo"},
        "launch": {"ranks": ranks},
    }
    if stage in ("a", "b"):
        tree["adapter"] = experts.to_json() | {"blocks": 2, "ffn_blocks": 2}
        if experts.fallback is None:
            tree["adapter"].pop("fallback")
    return parse_config(tree, f"demo stage {stage}")


def run_stage(config: Config, out: Path) -> None:
    """Writes the stage's config beside the runs and trains it under the launcher."""
    path = out / "configs" / f"{config.train.stage}.toml"
    path.parent.mkdir(exist_ok=True)
    dump = config.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    # Absolute, since a config's relative paths are relative to its own folder.
    for section, key in (("model", "dit"), ("model", "adapter"), ("data", "shards"), ("train", "run")):
        if key in dump[section]:
            dump[section][key] = str(Path(dump[section][key]).resolve())
    path.write_text(tomli_w.dumps(dump), encoding="utf-8")
    say(f"stage {config.train.stage}: wanmoe train --config {path}")
    code = launch(config.launch, ["train", "--config", str(path)])
    if code != 0:
        raise WanmoeError(f"stage {config.train.stage} failed with exit code {code}; its output is above")
    check_reached(config)


def check_reached(config: Config) -> None:
    """A stage that a signal stopped ends well, too; raises WanmoeError where its steps are not all done."""
    reached = max((int(line["step"]) for line in read_metrics(config.train.run)), default=0)
    if reached < (config.train.steps or 0):
        raise WanmoeError(f"stage {config.train.stage} was stopped at step {reached} of {config.train.steps}")


def measure(out: Path, experts: ExpertSet, shards: Path, recipe: Recipe, seed: int) -> DemoResults:
    """Held-out figures of every model, one generated clip per label, and what the report shows of them."""
    say("measuring on the held-out clips")
    base = base_path(out)
    adapters: dict[str, Path | None] = {"frozen base": None}
    adapters |= {f"stage {stage.upper()}": out / stage / "adapter.safetensors" for stage in ("a", "b", "c")}
    figures = {
        name: evaluate_files(base, shards, path, wrong_expert=name == "stage B")
        for name, path in adapters.items()
    }
    held_out = ShardDataset(shards, "val")
    gates = held_out_gates(out / "c" / "adapter.safetensors", held_out)
    videos, real = generate_videos(out, experts, held_out, recipe, seed)
    by_expert = figures["stage B"]["by_expert"]
    return DemoResults(
        title="wanmoe demo",
        facts=facts(out, figures),
        stand_ins=STAND_INS,
        curves={stage: curve(read_metrics(out / stage)) for stage in STAGES},
        validation={name: figure["loss"] for name, figure in figures.items()},
        validation_by_t={
            name: {float(t): loss for t, loss in figure["by_t"].items()} for name, figure in figures.items()
        },
        experts=experts.names,
        wrong_expert={
            label: [by_expert[label][name] for name in experts.names]
            for label in experts.names
            if label in by_expert
        },
        gates=gates["router"],
        rule_gates=gates["rule"],
        videos={label: str(path) for label, path in videos.items()},
        real_videos={label: str(path) for label, path in real.items()},
        notes=[
            note + (MOMENTS if note.startswith("held-out moments") else "")
            for note in held_out.manifest.get("notes", [])
        ],
    )


def generate_videos(
    out: Path, experts: ExpertSet, held_out: ShardDataset, recipe: Recipe, seed: int
) -> tuple[dict[str, Path], dict[str, Path]]:
    """One clip per label from the same noise, and a held-out clip of that label beside it."""
    say("generating one video per label from the same noise")
    pipeline = LoRAMoEInference(
        "t2v",
        base_path(out),
        vae_path="haar",
        t5_path="hash",
        lora_moe_weights=out / "b" / "adapter.safetensors",
        alpha_base=1.0,
        device="cpu",
    )
    codec = load_vae("haar")
    generated: dict[str, Path] = {}
    real: dict[str, Path] = {}
    (out / "samples").mkdir(exist_ok=True)
    for index in range(len(held_out)):
        label = main_instrument(held_out, index)
        if label not in experts.names or label in generated:
            continue
        sample = held_out[index]
        name = "".join(c if c.isalnum() else "-" for c in label.lower())
        generated[label] = out / "samples" / f"{name}.mp4"
        pipeline.generate(
            sample.caption,
            instrument_hint=label,
            num_frames=recipe.frames,
            video_size=recipe.size,
            num_steps=recipe.sample_steps,
            guidance_scale=1.5,
            flow_shift=3.0,
            seed=seed,
            output_path=generated[label],
        )
        real[label] = out / "samples" / f"{name}-held-out.mp4"
        write_video(real[label], to_frames(codec.decode(sample.latent[None])[0]), fps=16)
    for path in generated.values():
        read_video(path)
    return generated, real


def base_path(out: Path) -> Path:
    """The base that stage pretrain wrote."""
    return out / "pretrain" / "model.safetensors"


def facts(out: Path, figures: dict[str, Any]) -> dict[str, str]:
    """Versions and sizes for the report."""
    versions = {name: importlib.metadata.version(name) for name in ("wanmoe", "torch", "deepspeed")}
    steps = {stage: str(int(read_metrics(out / stage)[-1]["step"])) for stage in STAGES}
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "steps": ", ".join(f"{stage} {count}" for stage, count in steps.items()),
        "held-out clips": str(figures["frozen base"]["clips"]),
        "threads": str(torch.get_num_threads()),
        "MLflow": f"sqlite:///{out}/mlflow.db",
    }


def markdown(results: DemoResults) -> str:
    """The main figures as two Markdown tables, as they stand in the README."""
    rows = [f"| {name} | {loss:.4f} |" for name, loss in results.validation.items()]
    losses = ["| model | held-out loss |", "|---|---|", *rows]
    experts = [
        "| clips of | " + " | ".join(results.experts) + " |",
        "|---" * (len(results.experts) + 1) + "|",
    ]
    for label, row in results.wrong_expert.items():
        best = min(row)
        cells = [f"**{loss:.4f}**" if loss == best else f"{loss:.4f}" for loss in row]
        experts.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*losses, "", "Loss of a label's clips with each expert routed (the lowest in bold):", "", *experts]
    )


def print_results(results: DemoResults, report: Path) -> None:
    """The figures of the report, on the terminal."""
    for finding in findings(results):
        say(f"[{finding.verdict}] {finding.text}")
    say("held-out loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in results.validation.items()))
    say(f"report: {report}")


def say(line: str) -> None:
    """One line to the terminal."""
    typer.echo(f"== {line}")
