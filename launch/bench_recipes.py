"""What each way to train is worth on drawn scenes: one base, several recipes, several seeds, one table.

Everything is trained by `wanmoe train`, one rank a job, without a launcher: with one rank it only costs time.
The base, two classifiers (one to train against, another to judge by) and the tip detector are trained once; a
seed changes where the adapter starts, the order of the clips and their noise. Clips, codec and text encoder
are stand-ins of the demo's size: the figures compare recipes and say nothing of Wan2.2 itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w
import torch

from ..kernels.bench.provenance import provenance
from ..moe_lora import ExpertSet, WanmoeError
from ..moe_lora.adapter import Part
from ..moe_lora.files import file_sha256, write_atomic
from ..moe_lora.instruments import SURGICAL
from ..moe_lora.wan.codec import load_vae
from ..moe_lora.wan.text import load_text_encoder
from ..train.data.clip_list import read_clip_list
from ..train.data.prepare import prepare
from ..train.data.router_prompts import router_prompts
from ..train.data.shards import ShardDataset
from ..train.stages import STAGES, stage_name
from ..train.synth import synth_clips
from .config import Config, apply_overrides, parse_config
from .demo import check_reached
from .launcher import environment, master_port
from .recipe_figures import COLUMNS, judged, measure
from .recipes import BASE_LINE, RECIPES, Recipe

FORMAT = "wanmoe-recipes/3"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the scenes and lengths of the runs."""

    size: tuple[int, int] = (96, 96)
    frames: int = 17
    clips: int = 160
    val: int = 48
    background: int = 400
    few: int = 20
    """Training clips where they are few."""
    pairs: int = 24
    """Held-out clips of two instruments; in training none has two."""
    batch: int = 4
    pretrain_steps: int = 800
    steps: int = 600
    """Of a recipe, all its stages together."""
    judge_steps: int | None = None
    """Of classifier and detector; None: as many as the commands take."""

    def scenes(self) -> dict[str, tuple[int, int, int, int]]:
        """By kind: instruments in a scene, the seed it is drawn with, training and held-out clips."""
        return {
            "clips": (1, 0, self.clips, self.val),
            "background": (0, 1, self.background, 16),
            "few": (1, 2, self.few, 4),
            "pairs": (2, 3, 1, self.pairs),
        }


def run_recipes(
    names: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    sizes: Sizes,
    jobs: int,
    argv: list[str],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Trains and measures each recipe with each seed; what lies in `out` from an earlier run is not redone.

    Returns the result as `table` takes it. Raises WanmoeError for an unknown recipe, or where a training
    failed.
    """
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise WanmoeError(f"no recipe {unknown[0]!r}; there are: {', '.join(RECIPES)}")
    began = time.monotonic()
    shared = Shared(out, sizes)
    _claim(out, sizes)
    found = sum(shared.row(name, seed).exists() for name in names for seed in seeds)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    rows: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    try:
        say("clips, base, classifiers and detector")
        list(pool.map(shared.make_clips, sizes.scenes()))
        makers = [
            pool.submit(make)
            for make in (shared.make_base, shared.make_classifier, shared.make_judge, shared.make_detector)
        ]
        for maker in makers:
            maker.result()
        # The main rows grow longer down the list: the longest first, so that no core waits long at the end.
        order = [(name, seed) for seed in seeds for name in reversed(names)]
        work = {pool.submit(run_one, shared, name, seed): (name, seed) for name, seed in order}
        for future in as_completed(work):
            name, seed = work[future]
            rows[name][seed] = future.result()
            figures = rows[name][seed]["figures"]
            say(
                f"{name}, seed {seed}: "
                + ", ".join(f"{key} {figures[key]:.4g}" for key in COLUMNS if key in figures)
            )
    except WanmoeError as error:
        say(f"{error}; ending what still runs")
        raise
    finally:
        # After a failure nobody waits for hours of other recipes.
        pool.shutdown(cancel_futures=True)
    return {
        "format": FORMAT,
        "provenance": provenance(torch.device("cpu"), argv),
        "sizes": asdict(sizes),
        "seeds": list(seeds),
        "judges": judged(shared.judge, shared.detector),
        "recipes": {name: asdict(RECIPES[name]) for name in names},
        "rows": {name: [rows[name][seed]["figures"] for seed in seeds] for name in names},
        "commits": sorted({row["commit"] for by_seed in rows.values() for row in by_seed.values()}),
        "rows_found": found,
        "minutes": (time.monotonic() - began) / 60,
    }


class Shared:
    """What all recipes share, and where it lies; every part is made once."""

    def __init__(self, out: Path, sizes: Sizes) -> None:
        self.out, self.sizes = out.absolute(), sizes
        self.base = self.out / "base" / "model.safetensors"
        self.classifier = self.out / "classifier.safetensors"
        self.judge = self.out / "judge.safetensors"
        self.detector = self.out / "detector.safetensors"

    def shards(self, kind: str) -> Path:
        """Of one kind of `Sizes.scenes`."""
        return self.out / "shards" / kind

    def row(self, name: str, seed: int) -> Path:
        """Where the figures of a recipe go; what trains nothing has no seed."""
        if not RECIPES[name].stages:
            return self.out / "rows" / f"{_slug(name)}.json"
        return self.out / "rows" / f"{_slug(name)}-{seed}.json"

    def make_clips(self, kind: str) -> None:
        """Draws and encodes one kind of scenes."""
        if (self.shards(kind) / "manifest.json").exists():
            return
        sizes, (instruments, seed, clips, val) = self.sizes, self.sizes.scenes()[kind]
        path = synth_clips(
            self.out / kind,
            clips=clips,
            val=val,
            seed=seed,
            instruments=instruments,
            height=sizes.size[0],
            width=sizes.size[1],
            frames=sizes.frames,
        )
        prepare(
            read_clip_list(path),
            self.shards(kind),
            codec=load_vae("haar"),
            text_encoder=load_text_encoder("hash", dim=64, max_length=32),
            experts=ExpertSet(SURGICAL),
            size=sizes.size,
            frames=sizes.frames,
            seed=0,
            router_prompts=router_prompts(ExpertSet(SURGICAL)) if instruments else (),
        )

    def make_base(self) -> None:
        """Trains the small base on scenes without instruments."""
        if self.base.exists():
            return
        tree: dict[str, Any] = {
            "model": {"preset": "tiny"},
            "data": {"shards": str(self.shards("background"))},
            "train": {"stage": "pretrain", "run": str(self.base.parent), "steps": self.sizes.pretrain_steps},
        }
        keys = {"optimizer.lr": "3e-3"}
        # Alone on the machine for most of the time: with all of its cores.
        train(self._config(tree, keys, 0), self.out / "configs" / "base.toml", os.cpu_count() or 1)

    def make_classifier(self) -> None:
        """Trains the classifier that `identity` asks."""
        if not self.classifier.exists():
            self._command("train-classifier", self.classifier)

    def make_judge(self) -> None:
        """Trains the classifier that no adapter was trained against."""
        if not self.judge.exists():
            self._command("train-classifier", self.judge, "--seed", "1")

    def make_detector(self) -> None:
        """Trains the tip detector."""
        if not self.detector.exists():
            self._command("train-detector", self.detector)

    def stage(self, recipe: Recipe, number: int, run: Path, before: Path | None, seed: int) -> Config:
        """The config of one stage of a recipe, after the adapter `before`."""
        stage = recipe.stages[number]
        model: dict[str, Any] = {"dit": str(self.base)}
        if before is not None:
            model["adapter"] = str(before)
        steps = max(1, round(stage.share * self.sizes.steps))
        tree: dict[str, Any] = {
            "model": model,
            "data": {"shards": str(self.shards(recipe.clips))},
            "objective": {"classifier": str(self.classifier)},
            "train": {"stage": stage.stage, "run": str(run), "steps": steps},
        }
        if before is None:
            tree["adapter"] = {"blocks": 2, "ffn_blocks": 2}
        return self._config(tree, stage.keys, seed)

    def _config(self, tree: dict[str, Any], keys: Mapping[str, str], seed: int) -> Config:
        tree["data"] |= {"batch": self.sizes.batch, "val_batch": 8, "workers": 0}
        tree["train"] |= {"seed": seed, "log_every": 50}
        tree["tracking"] = {"enabled": False}
        tree["launch"] = {"ranks": 1}
        apply_overrides(tree, [word for key, value in keys.items() for word in (f"--{key}", value)])
        return parse_config(tree, f"recipe stage {tree['train']['stage']}")

    def _command(self, name: str, out: Path, *options: str) -> None:
        words = [name, "--shards", str(self.shards("clips")), "--out", str(out), *options]
        if self.sizes.judge_steps is not None:
            words += ["--steps", str(self.sizes.judge_steps)]
        _run([sys.executable, "-m", "wanmoe.launch", *words], dict(os.environ), out.with_suffix(".log"))


def run_one(shared: Shared, name: str, seed: int) -> dict[str, Any]:
    """Trains one recipe with one seed and measures it; what is done already is read.

    Returns its `figures`, the `commit` that they were made at, and what they are `of`.
    """
    path, recipe = shared.row(name, seed), RECIPES[name]
    files = (shared.base, shared.classifier, shared.judge, shared.detector)
    facts = {
        "format": FORMAT,
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "files": [file_sha256(file) for file in files],
        "shards": [ShardDataset(shared.shards(kind), "val").fingerprint for kind in shared.sizes.scenes()],
    }
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found.get("of") == facts:
            return found
        # It is another recipe by now, or trained on or judged by other files and clips.
        shutil.rmtree(shared.out / "runs" / f"{_slug(name)}-{seed}", ignore_errors=True)
    began = time.monotonic()
    adapter: Path | None = None
    trained: set[Part] = set()
    for number, stage in enumerate(recipe.stages):
        run = shared.out / "runs" / f"{_slug(name)}-{seed}" / f"{number}-{stage.stage}"
        config = shared.stage(recipe, number, run, adapter, seed)
        trained |= train(config, shared.out / "configs" / f"{_slug(name)}-{seed}-{number}.toml")
        adapter = run / "adapter.safetensors"
    seconds = time.monotonic() - began
    figures = measure(
        shared.base,
        adapter,
        shared.shards("clips"),
        shared.shards("pairs"),
        shared.judge,
        shared.detector,
        trained,
    )
    figures["train_s"] = seconds
    commit = provenance(torch.device("cpu"), [])["commit"] or {"hash": "unknown", "dirty": False}
    made = {
        "figures": figures,
        "commit": commit["hash"] + ("-dirty" if commit["dirty"] else ""),
        "of": facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(made, indent=1)
    write_atomic(path, lambda partial: partial.write_text(text))
    return made


def train(config: Config, path: Path, threads: int = 1) -> set[Part]:
    """Runs `wanmoe train` on a config; returns the parts of the adapter that it trains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dump = config.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    path.write_text(tomli_w.dumps(dump), encoding="utf-8")
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": master_port(config.launch)}
    env = environment(config.launch) | {name: str(value) for name, value in rank.items()}
    # Figures of one kind of machine: several jobs at a time share cores, never a card.
    env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"DS_ACCELERATOR": "cpu"}
    _run(
        [sys.executable, "-m", "wanmoe.launch", "train", "--config", str(path)], env, path.with_suffix(".log")
    )
    check_reached(config)
    return set(STAGES[stage_name(config)].trains)


def _run(words: list[str], env: dict[str, str], log: Path) -> None:
    with log.open("w") as file:
        code = subprocess.run(words, env=env, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise WanmoeError(f"{log}: exit code {code}: {' / '.join(last)}")


def _claim(out: Path, sizes: Sizes) -> None:
    """Marks the folder; one that was made with other sizes is refused."""
    marker = out / "sizes.json"
    text = json.dumps(asdict(sizes), sort_keys=True)
    if marker.exists():
        if marker.read_text() != text:
            raise WanmoeError(f"{out}: holds recipes of other sizes; choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise WanmoeError(f"{out} is not empty and holds no recipes; choose another with --out")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(text)


def _start_worker() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would go on training for hours."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def table(result: Mapping[str, Any]) -> str:
    """Markdown: mean and deviation over the seeds, then the difference from the equal base, seed by seed."""
    columns = [key for key in COLUMNS if any(key in row for rows in result["rows"].values() for row in rows)]
    head = [
        "| recipe | " + " | ".join(COLUMNS[key] for key in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines = [
        f"| {name} | " + " | ".join(_cell(key, rows) for key in columns) + " |"
        for name, rows in result["rows"].items()
    ]
    out = [*head, *lines]
    if BASE_LINE in result["rows"]:
        against = result["rows"][BASE_LINE]
        out += ["", f'Difference from "{BASE_LINE}", paired by seed:', "", *head]
        for name, rows in result["rows"].items():
            if name == BASE_LINE:
                continue
            pairs = [
                {key: row[key] - other[key] for key in columns if key in row and key in other}
                for row, other in zip(rows, against, strict=True)
            ]
            out.append(f"| {name} | " + " | ".join(_cell(key, pairs, sign="+") for key in columns) + " |")
    return "\n".join(out)


def _cell(key: str, rows: Sequence[Mapping[str, float]], sign: str = "") -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    mean = statistics.fmean(values)
    if key == "parameters":
        return f"{mean:{sign},.0f}"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean:{sign}.3f}{spread}"


def write_result(result: Mapping[str, Any], folder: Path) -> Path:
    """Writes `recipes.json` and, beside it, its table `recipes.md`; returns the former."""
    path = folder / "recipes.json"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    page = table(result) + "\n"
    write_atomic(path.with_suffix(".md"), lambda partial: partial.write_text(page, encoding="utf-8"))
    return path
