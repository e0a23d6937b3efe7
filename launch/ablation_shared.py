"""What the rows of an ablation share: clips, base and judges, and where each training lies.

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
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import tomli_w
import torch

from ..moe_lora import ExpertSet, WanmoeError
from ..moe_lora.files import file_sha256, write_atomic
from ..moe_lora.instruments import SURGICAL
from ..moe_lora.wan.codec import load_vae
from ..moe_lora.wan.text import load_text_encoder
from ..moe_lora.wan.weights import dit_hash
from ..train.data.clip_list import read_clip_list
from ..train.data.prepare import prepare
from ..train.data.router_prompts import router_prompts
from ..train.data.shards import ShardDataset
from ..train.synth import synth_clips
from .ablation import Plan, Step, Tree, over
from .ablation_figures import TIP_FIGURES
from .config import Config, parse_config
from .demo import check_reached
from .evaluation_run import open_run
from .launcher import environment, master_port


class Node(NamedTuple):
    """One training: a stage of a row with a seed, after another or from the base."""

    key: str
    step: Step
    seed: int
    before: str | None
    """Key of the stage before it."""
    experts: str
    """Which classifier its loss asks: one of the same classes (`Shared.experts_of`)."""


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
            "shards": {name: self.fingerprint(name) for name in spec.shards},
            "measure": spec.measure,
            "base": base if self.plan.base_file is None else dit_hash(self.plan.base_file),
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
        write_atomic(marker, lambda partial: partial.write_text(text))

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
        run_logged(
            [sys.executable, "-m", "wanmoe.launch", *words], dict(os.environ), file.with_suffix(".log")
        )

    def key(self, step: Step, seed: int, before: str | None, experts: str) -> str:
        """A name that tells a training from every other: its stage, and a hash of what it comes from."""
        facts = [step.model_dump(mode="json"), seed, before, self._digest(experts)]
        digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{step.use}-{digest[:10]}"

    def _digest(self, experts: str) -> list[str]:
        if experts not in self._digests:
            clips = [*self.plan.spec.scenes, *self.plan.spec.shards]
            files = [dit_hash(self.base), file_sha256(self.classifier(experts))]
            self._digests[experts] = [*files, *map(self.fingerprint, clips)]
        return self._digests[experts]

    def fingerprint(self, name: str) -> str:
        """Of some clips that are there."""
        return ShardDataset(self.shards(name), "val").fingerprint

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
    run_logged(words, env, path.with_suffix(".log"))
    check_reached(config)


def run_logged(words: list[str], env: dict[str, str], log: Path) -> None:
    """Runs a command, what it says going to `log`; WanmoeError with its last lines where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(words, env=env, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        # Our own last line, where there is one: compilers and libraries speak too.
        last = [line for line in lines if line.startswith("wanmoe: error")][-1:] or lines[-3:]
        raise WanmoeError(f"{log}: exit code {code}: {' / '.join(last)}")


def _slug(name: str) -> str:
    """A name as a file is called; four digits of its hash keep two of them apart."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return f"{'-'.join(words)[:80]}-{sha256(name.encode()).hexdigest()[:4]}"
