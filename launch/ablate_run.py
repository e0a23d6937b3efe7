"""Running an ablation: clips, base and judges once, every stage that rows share once, then the figures.

Everything is kept in one folder under a name made of what it comes from, so that a call that was cut off, or
one with more rows, takes what is there:

```
<out>/shards/<clips>/            base/  classifier.safetensors  judge.safetensors  detector.safetensors
<out>/stages/<stage>-<key>/      a run folder of `wanmoe train`, and made.json when it is done
<out>/rows/<row>-<seed>.json     figures, and what they are of
```
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tomli_w
import torch

from ..kernels.bench.provenance import provenance
from ..moe_lora import ExpertSet, WanmoeError
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
from .ablation import Plan, Step, Tree, over
from .ablation_figures import TIP_FIGURES, Figure, Measured, judged, measure
from .config import Config, parse_config
from .demo import check_reached
from .evaluation_run import open_run
from .launcher import environment, master_port

FORMAT = "wanmoe-ablation/1"


class Node(NamedTuple):
    """One training: a stage of a row with a seed, after another or from the base."""

    key: str
    step: Step
    seed: int
    before: str | None
    """Key of the stage before it."""
    experts: str
    """Which classifier its loss asks: one of the same classes (`Shared.experts_of`)."""


@dataclass
class _Work:
    """What is still to do: trainings by key, and rows with their last training."""

    nodes: dict[str, Node] = field(default_factory=dict)
    rows: dict[tuple[str, int], list[str]] = field(default_factory=dict)


def run_ablation(
    plan: Plan,
    out: Path,
    jobs: int,
    device: torch.device,
    argv: list[str],
    say: Callable[[str], object],
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Trains and measures every row with every seed; what lies in `out` already is not made again.

    Args:
        jobs: trainings at a time on the CPU; on a card they take turns.
        names: rows to run; default all.

    Returns the result as `table` takes it, of the rows that succeeded, with `failed` by row. Raises
    WanmoeError for a folder of another ablation, and where clips, base or judges cannot be made.
    """
    began = time.monotonic()
    shared = Shared(plan, out, device)
    shared.claim()
    jobs = 1 if device.type == "cuda" else jobs
    rows = [name for name in plan.rows if names is None or name in names]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(jobs,)) as pool:
        try:
            say("clips, base and judges")
            list(pool.map(shared.make_clips, plan.spec.scenes))
            for maker in [pool.submit(make) for make in shared.makers()]:
                maker.result()
            done, failed = _run_all(shared, _work(shared, rows), pool, jobs, say)
        except WanmoeError as error:
            say(f"{error}; ending what still runs")
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {
        "format": FORMAT,
        "name": plan.spec.name,
        "reference": plan.reference,
        "provenance": provenance(torch.device("cpu"), argv),
        "seeds": list(range(plan.spec.seeds)),
        "figures": plan.spec.figures,
        "axes": {name: plan.axes[name] for name in rows},
        "rows": {name: done[name] for name in rows if name in done},
        "failed": failed,
        "recipes": {name: [step.model_dump() for step in plan.rows[name]] for name in rows},
        "scenes": {name: scenes.model_dump() for name, scenes in plan.spec.scenes.items()},
        "judges": judged(shared.judge, shared.detector if shared.finds_tips else None),
        "commits": sorted({row["commit"] for rows_ in done.values() for row in rows_.values()}),
        "minutes": (time.monotonic() - began) / 60,
    }


def _work(shared: Shared, rows: Sequence[str]) -> _Work:
    """Every training once, whichever rows it belongs to."""
    work = _Work()
    for seed in range(shared.plan.spec.seeds):
        for name in rows:
            steps = shared.plan.rows[name]
            if not steps and seed:  # the base alone is the same with every seed
                continue
            before: str | None = None
            chain = []
            experts = shared.experts_of(steps)
            for step in steps:
                key = shared.key(step, seed, before, experts)
                work.nodes[key] = Node(key, step, seed, before, experts)
                chain.append(key)
                before = key
            work.rows[name, seed] = chain
    return work


def _run_all(
    shared: Shared,
    work: _Work,
    pool: ProcessPoolExecutor,
    jobs: int,
    say: Callable[[str], object],
) -> tuple[dict[str, dict[int, dict[str, Any]]], dict[str, str]]:
    """Trainings and figures as soon as what they need is there; a failure costs the rows that need it."""
    waits = {key for key in work.nodes if not shared.is_made(key)}
    rows = dict(work.rows)
    running: dict[Future[Any], tuple[str, Any]] = {}
    going: set[str] = set()
    broken: dict[str, str] = {}
    done: dict[str, dict[int, dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    say(f"{len(work.nodes)} trainings, {len(work.nodes) - len(waits)} of them there; {len(rows)} rows")
    while waits or rows or running:
        for row, chain in list(rows.items()):
            if fault := next((broken[key] for key in chain if key in broken), None):
                failed[f"{row[0]}, seed {row[1]}"] = fault
                say(f"{row[0]}, seed {row[1]}: {fault}")
                del rows[row]
            elif waits.isdisjoint(chain) and len(running) < jobs:
                running[pool.submit(measure_row, shared, *row, chain)] = ("row", row)
                del rows[row]
        ready = [key for key in work.nodes if key in waits - going and work.nodes[key].before not in waits]
        for key in ready[: max(0, jobs - len(running))]:
            running[pool.submit(train_node, shared, work.nodes[key])] = ("node", key)
            going.add(key)
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            kind, what = running.pop(future)
            try:
                found = future.result()
            except WanmoeError as error:
                if kind == "node":
                    _break(what, str(error), work, broken, waits)
                else:
                    failed[f"{what[0]}, seed {what[1]}"] = str(error)
                    say(f"{what[0]}, seed {what[1]}: {error}")
                continue
            if kind == "node":
                waits.discard(what)
                node = work.nodes[what]
                say(f"trained {node.step.use} ({what}), seed {node.seed}: {found:.0f} s")
            else:
                done.setdefault(what[0], {})[what[1]] = found
                say(f"{what[0]}, seed {what[1]}: " + _line(found["figures"]))
    return done, failed


def _break(key: str, fault: str, work: _Work, broken: dict[str, str], waits: set[str]) -> None:
    """Marks a training that failed, and all that would have come after it."""
    broken[key] = fault
    waits.discard(key)
    for other in work.nodes.values():
        if other.before == key and other.key not in broken:
            _break(other.key, fault, work, broken, waits)


def _line(figures: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{key} {figure['value']:.4g}" for key, figure in figures.items())


class Shared:
    """What all rows share, and where it lies; every part is made once."""

    def __init__(self, plan: Plan, out: Path, device: torch.device) -> None:
        self.plan, self.out, self.device = plan, out.absolute(), device
        self.judge = self.out / "judge.safetensors"
        self.detector = self.out / "detector.safetensors"
        self._digests: dict[str, list[str]] = {}

    @property
    def base(self) -> Path:
        """The file of the base."""
        return self.plan.base_file or self.out / "base" / "model.safetensors"

    def classifier(self, experts: str = "") -> Path:
        """The classifier that trainings with these experts ask ("": the four surgical ones)."""
        return self.out / f"classifier{'-' if experts else ''}{experts}.safetensors"

    def experts_of(self, steps: Sequence[Step]) -> str:
        """A name of the experts that a row begins with, "" for those without a list of their own."""
        own = steps[0].tree.get("adapter", {}).get("experts") if steps else None
        return "" if own is None else sha256(json.dumps(own).encode()).hexdigest()[:6]

    @property
    def finds_tips(self) -> bool:
        """Whether a figure needs the detector."""
        return not set(TIP_FIGURES).isdisjoint(self.plan.spec.figures)

    def shards(self, name: str) -> Path:
        """The folder of some clips."""
        return self.plan.spec.shards.get(name, self.out / "shards" / name)

    def stage(self, key: str) -> Path:
        """The run folder of a training."""
        return self.out / "stages" / key

    def row(self, name: str, seed: int) -> Path:
        """Where the figures of a row go; what trains nothing has no seed."""
        tail = f"-{seed}" if self.plan.rows[name] else ""
        return self.out / "rows" / f"{_slug(name)}{tail}.json"

    def claim(self) -> None:
        """Marks the folder by the clips, base and judges of the ablation; one of others is refused."""
        spec = self.plan.spec
        base = None if self.plan.base is None else self.plan.base.model_dump()
        facts = {
            "scenes": {name: scenes.model_dump() for name, scenes in spec.scenes.items()},
            "measure": spec.measure,
            "base": str(self.plan.base_file or base),
            "judge_steps": spec.judge_steps,
        }
        marker, text = self.out / "ablation.lock.json", json.dumps(facts, sort_keys=True)
        if marker.exists():
            if marker.read_text() != text:
                raise WanmoeError(f"{self.out}: holds an ablation of other clips or another base; give --out")
            return
        if self.out.exists() and any(self.out.iterdir()):
            raise WanmoeError(f"{self.out} is not empty and holds no ablation; choose another with --out")
        self.out.mkdir(parents=True, exist_ok=True)
        marker.write_text(text)

    def makers(self) -> list[Callable[[], None]]:
        """What is made before the rows, besides the clips."""
        makers = [self.make_base, self.make_judge]
        for steps in {self.experts_of(steps): steps for steps in self.plan.rows.values()}.values():
            makers.append(partial(self.make_classifier, steps))
        return [*makers, self.make_detector] if self.finds_tips else makers

    def make_clips(self, name: str) -> None:
        """Draws and encodes some scenes."""
        if (self.shards(name) / "manifest.json").exists():
            return
        scenes = self.plan.spec.scenes[name]
        path = synth_clips(
            self.out / "clips" / name,
            clips=scenes.clips,
            val=scenes.val,
            seed=scenes.seed,
            instruments=scenes.instruments,
            height=scenes.size[0],
            width=scenes.size[1],
            frames=scenes.frames,
        )
        prepare(
            read_clip_list(path),
            self.shards(name),
            codec=load_vae("haar"),
            text_encoder=load_text_encoder("hash", dim=64, max_length=32),
            experts=ExpertSet(SURGICAL),
            size=scenes.size,
            frames=scenes.frames,
            seed=0,
            router_prompts=router_prompts(ExpertSet(SURGICAL)) if scenes.router_prompts else (),
            progress=False,
        )

    def make_base(self) -> None:
        """Trains the base, where the file does not name one."""
        step = self.plan.base
        if step is None or self.base.exists():
            if not self.base.exists():
                raise WanmoeError(f"{self.base}: there is no such base")
            return
        tree = over(step.tree, {"train": {"run": str(self.base.parent), "seed": 0}})
        config = self._config(tree, step.shards, "base")
        # Alone on the machine for most of the time: with all of its cores.
        train(config, self.out / "base.toml", self.device, os.cpu_count() or 1)

    def make_classifier(self, steps: Sequence[Step]) -> None:
        """Trains the classifier that the loss `identity` of a row asks: its classes are the row's experts."""
        name = self.experts_of(steps)
        options: list[str] = []
        if name:
            config = self.out / f"experts-{name}.toml"
            config.write_text(tomli_w.dumps({"adapter": {"experts": steps[0].tree["adapter"]["experts"]}}))
            options = ["--config", str(config)]
        self._judge("train-classifier", self.classifier(name), *options)

    def make_judge(self) -> None:
        """Trains the classifier that no adapter was trained against."""
        self._judge("train-classifier", self.judge, "--seed", "1")

    def make_detector(self) -> None:
        """Trains the tip detector."""
        self._judge("train-detector", self.detector)

    def _judge(self, command: str, file: Path, *options: str) -> None:
        if file.exists():
            return
        words = [command, "--shards", str(self.shards(self.plan.spec.measure)), "--out", str(file), *options]
        if self.plan.spec.judge_steps is not None:
            words += ["--steps", str(self.plan.spec.judge_steps)]
        words += ["--device", str(self.device)]
        _run([sys.executable, "-m", "wanmoe.launch", *words], dict(os.environ), file.with_suffix(".log"))

    def key(self, step: Step, seed: int, before: str | None, experts: str) -> str:
        """A name that tells a training from every other: its stage, and a hash of what it comes from."""
        facts = [step.model_dump(mode="json"), seed, before, self._digest(experts)]
        digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{step.use}-{digest[:10]}"

    def _digest(self, experts: str) -> list[str]:
        if experts not in self._digests:
            clips = [*self.plan.spec.scenes, *self.plan.spec.shards]
            prints = [ShardDataset(self.shards(name), "val").fingerprint for name in clips]
            files = [file_sha256(self.base), file_sha256(self.classifier(experts))]
            self._digests[experts] = [*files, *prints]
        return self._digests[experts]

    def is_made(self, key: str) -> bool:
        """Whether a training has ended."""
        return (self.stage(key) / "made.json").exists()

    def config(self, node: Node) -> Config:
        """The config of a training."""
        tree: Tree = {
            "model": {"dit": str(self.base)},
            "objective": {"classifier": str(self.classifier(node.experts))},
            "train": {"run": str(self.stage(node.key)), "seed": node.seed},
        }
        if node.before is not None:
            tree["model"]["adapter"] = str(self.adapter(node.before))
        return self._config(over(tree, node.step.tree), node.step.shards, node.key)

    def _config(self, tree: Tree, shards: str, name: str) -> Config:
        tree = over(tree, {"data": {"shards": str(self.shards(shards))}})
        tree = over({"tracking": {"enabled": False}, "data": {"workers": 0}}, tree)
        return parse_config(tree, f"{self.plan.spec.name}: {name}")

    def adapter(self, key: str) -> Path:
        """The adapter file of a training."""
        (path,) = open_run(self.stage(key)).adapters.values()
        assert path is not None
        return path


def train_node(shared: Shared, node: Node) -> float:
    """One training, gone on with where it was cut off; returns its seconds."""
    began = time.monotonic()
    folder = shared.stage(node.key)
    config = shared.config(node)
    folder.parent.mkdir(parents=True, exist_ok=True)
    train(config, folder.with_suffix(".toml"), shared.device)
    seconds = time.monotonic() - began
    made = {"commit": _commit(), "seconds": seconds, "seed": node.seed}
    text = json.dumps(made, indent=1)
    write_atomic(folder / "made.json", lambda partial: partial.write_text(text))
    return seconds


def measure_row(shared: Shared, name: str, seed: int, chain: Sequence[str]) -> dict[str, Any]:
    """The figures of a row with one seed; those that are there of the same files are taken."""
    spec, path = shared.plan.spec, shared.row(name, seed)
    tips = shared.detector if shared.finds_tips else None
    files = [shared.judge, *([tips] if tips else [])]
    facts = {
        "format": FORMAT,
        "chain": list(chain),
        "base": file_sha256(shared.base),
        "files": [file_sha256(file) for file in files],
        "figures": spec.figures,
    }
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found.get("of") == facts:
            return found
    adapter = shared.adapter(chain[-1]) if chain else None
    trained = {part for key in chain for part in _parts(shared, key)}
    on = Measured(
        shared.shards(spec.measure),
        None if spec.pairs is None else shared.shards(spec.pairs),
        shared.judge,
        tips,
        spec.vae,
        shared.device,
    )
    figures = measure(spec.figures, shared.base, adapter, on, trained)
    made = [json.loads((shared.stage(key) / "made.json").read_text()) for key in chain]
    if "train_s" in spec.figures:
        figures["train_s"] = Figure(sum(one["seconds"] for one in made))
    commits = {one["commit"] for one in made} | {_commit()}
    row = {
        "figures": {key: figure._asdict() for key, figure in figures.items()},
        "commit": ", ".join(sorted(commits)),
        "of": facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(row)
    write_atomic(path, lambda partial: partial.write_text(text))
    return row


def _parts(shared: Shared, key: str) -> set[Any]:
    return set(STAGES[stage_name(open_run(shared.stage(key)).config)].trains)


def train(config: Config, path: Path, device: torch.device, threads: int = 1) -> None:
    """Runs `wanmoe train` on a config: on the CPU as one rank, on a card by the launcher."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dump = config.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    path.write_text(tomli_w.dumps(dump), encoding="utf-8")
    words = [sys.executable, "-m", "wanmoe.launch", "train", "--config", str(path)]
    env = dict(os.environ)
    if device.type == "cpu":
        rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": master_port(config.launch)}
        env = environment(config.launch) | {name: str(value) for name, value in rank.items()}
        # Figures of one kind of machine: several jobs at a time share cores, never a card.
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        env |= {"DS_ACCELERATOR": "cpu"}
    _run(words, env, path.with_suffix(".log"))
    check_reached(config)


def _run(words: list[str], env: dict[str, str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(words, env=env, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise WanmoeError(f"{log}: exit code {code}: {' / '.join(last)}")


def _commit() -> str:
    commit = provenance(torch.device("cpu"), [])["commit"] or {"hash": "unknown", "dirty": False}
    return str(commit["hash"]) + ("-dirty" if commit["dirty"] else "")


def _start_worker(jobs: int) -> None:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
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
    """A name as a file is called; four digits of its hash keep two of them apart."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return f"{'-'.join(words)[:80]}-{sha256(name.encode()).hexdigest()[:4]}"
