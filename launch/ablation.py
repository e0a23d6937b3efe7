"""An ablation as one TOML file: clips, stages and the rows that differ, checked before anything runs.

```toml
name = "temperature"
reference = "one"
[scenes.clips]
[base]
train.stage = "pretrain"
train.steps = 400
[stage.b]
train.stage = "b"
train.steps = 300
[[row]]
name = "one"
stages = ["b"]
[[row]]
like = "one"
grid = {"router.temperature" = [0.5, 2.0]}
```

A row is a chain of stages, each a `wanmoe train` with the keys of its stage; what two rows have in common
from their beginning on is trained once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..moe_lora.errors import WanmoeError
from .config import check_key, nearest, parse_config, read_toml, resolve_paths

Tree = dict[str, Any]

FIGURES: dict[str, str] = {
    "parameters": "trained parameters",
    "loss": "held-out loss",
    "roi": "in the region",
    "withheld": "caption withheld",
    "pairs": "two instruments, in the region",
    "wrong": "wrong expert less right",
    "identity": "identity",
    "identity_withheld": "identity, caption withheld",
    "pck": "tip PCK@8px",
    "tip_pck@5px": "tip PCK@5px",
    "tip_pck@10px": "tip PCK@10px",
    "tip_pck@20px": "tip PCK@20px",
    "warped_psnr": "warped PSNR, dB",
    "warped_ssim": "warped SSIM",
    "fds": "FDS",
    "gatc": "GATC",
    "kid": "KID on EfficientNet-Lite0",
    "router_agreement": "router's top-1",
    "train_s": "seconds of training",
}
"""What a row can be measured by, and what a table calls it."""
DEFAULT = (
    "parameters",
    "loss",
    "roi",
    "wrong",
    "identity",
    "tip_pck@10px",
    "warped_psnr",
    "kid",
    "router_agreement",
)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Scenes(_Table):
    """Clips that are drawn (`wanmoe synth`)."""

    clips: int = Field(160, ge=1)
    val: int = Field(48, ge=1)
    size: tuple[int, int] = (96, 96)
    frames: int = 17
    instruments: int = Field(1, ge=0, le=2)
    seed: int = 0
    router_prompts: bool = False
    """Whether prompts that a router can be trained on are stored with them."""


class Row(_Table):
    """One row of the table, or with `grid` several."""

    name: str = ""
    """Default: the values of the grid."""
    axis: str = ""
    """What it is a part of, in the table and the plots."""
    stages: list[str | Tree] | None = None
    """Names of stages in turn, or tables: `use`, and keys that this row changes. [] is the base alone."""
    like: str | None = None
    """The row whose stages it has."""
    set: Tree = Field(default_factory=dict)
    """Keys that it changes in its last stage."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Keys and their values: a row for each combination."""


class Ablation(_Table):
    """A whole file."""

    name: str
    reference: str | None = None
    """The row that the others are held against; default: the first that trains."""
    seeds: int = Field(1, ge=1)
    figures: list[str] = Field(default_factory=lambda: list(DEFAULT))
    scenes: dict[str, Scenes] = Field(default_factory=dict)
    """Clips to draw, by name."""
    shards: dict[str, Path] = Field(default_factory=dict)
    """Folders of shards of one's own, by name."""
    measure: str = "clips"
    """The clips whose held-out part every row is measured on; judges are trained on the rest of them."""
    pairs: str | None = None
    """Clips for the figure `pairs`."""
    base: Tree = Field(default_factory=dict)
    """Of the stage that makes the base, or `model = {dit = "file"}` for one that is there."""
    common: Tree = Field(default_factory=dict)
    """Config keys of every stage but the base."""
    stage: dict[str, Tree]
    """Stages by name: sections of a training config. `shards` in one is the name of other clips."""
    row: list[Row]
    judge_steps: int | None = None
    """Of classifiers and detector; default: as the commands take."""
    vae: str = "haar"
    """Codec of the shards, for figures of decoded clips."""


class Step(BaseModel):
    """One training of a row, whole."""

    model_config = ConfigDict(frozen=True)

    use: str
    shards: str
    tree: Tree
    """Of the config, without run folder, seed and what comes of the steps before."""


class Plan(BaseModel):
    """A file, checked and spelled out."""

    spec: Ablation
    rows: dict[str, list[Step]]
    axes: dict[str, str]
    base: Step | None
    """None: the base is there."""
    base_file: Path | None

    @property
    def reference(self) -> str:
        """The row that others are held against."""
        if self.spec.reference is not None:
            return self.spec.reference
        return next((name for name, steps in self.rows.items() if steps), next(iter(self.rows)))


def read_ablation(path: Path) -> Plan:
    """Reads and checks a file, every config of it included.

    Raises WanmoeError that names the file, the row and the key: unknown names, keys or values.
    """
    try:
        spec = Ablation.model_validate(read_toml(path))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise WanmoeError(f"{path}: {place}: {fault['msg']}") from error
    spec.shards = {name: _placed(folder, path) for name, folder in spec.shards.items()}
    known = [*spec.scenes, *spec.shards]
    for name in filter(None, (spec.measure, spec.pairs)):
        if name not in known:
            there = ", ".join(known) or "none"
            raise WanmoeError(
                f"{path}: no clips {name!r}; there are {there} (measure and pairs stand at the top)"
            )
    if unknown := [figure for figure in spec.figures if figure not in FIGURES]:
        near = nearest(unknown[0], list(FIGURES))
        raise WanmoeError(f"{path}: no figure {unknown[0]!r}; nearest is {near!r}")
    if "pairs" in spec.figures and spec.pairs is None:
        raise WanmoeError(f'{path}: the figure "pairs" needs its clips: pairs = "name"')
    rows: dict[str, list[Step]] = {}
    axes: dict[str, str] = {}
    for row in spec.row:
        for name, steps in _expanded(spec, row, rows, path):
            if "|" in name or "\n" in name:
                raise WanmoeError(f"{path}: row {name!r}: no | and no line break in the name of a row")
            if name in rows:
                raise WanmoeError(f"{path}: two rows are called {name!r}")
            rows[name], axes[name] = steps, row.axis
    if spec.reference is not None and spec.reference not in rows:
        near = nearest(spec.reference, list(rows))
        raise WanmoeError(f"{path}: reference: no row {spec.reference!r}; nearest is {near!r}")
    base, file = _base(spec, path)
    plan = Plan(spec=spec, rows=rows, axes=axes, base=base, base_file=file)
    _check(plan, path, known)
    return plan


def _expanded(
    spec: Ablation, row: Row, rows: Mapping[str, list[Step]], path: Path
) -> list[tuple[str, list[Step]]]:
    where = f"{path}: row {row.name or row.like!r}"
    if (row.stages is None) == (row.like is None):
        raise WanmoeError(f"{where}: give its stages, or the row that it is like")
    if row.like is not None:
        if row.like not in rows:
            raise WanmoeError(f"{where}: like: no row {row.like!r} above it")
        steps = rows[row.like]
    else:
        steps = [_step(spec, one, where, path) for one in row.stages or []]
    if (row.set or row.grid) and not steps:
        raise WanmoeError(f"{where}: it has no stage whose keys could be set")
    if not row.grid:
        if not row.name:
            raise WanmoeError(f"{where}: a row needs a name")
        return [(row.name, _changed(steps, row.set, path))]
    if empty := [key for key, values in row.grid.items() if not values]:
        raise WanmoeError(f"{where}: grid: {empty[0]} has no values")
    out = []
    for values in itertools.product(*row.grid.values()):
        patch = dict(zip(row.grid, values, strict=True))
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in patch.items())
        name = f"{row.name}, {told}" if row.name else told
        tree: Tree = {}
        for key, value in patch.items():
            _put(tree, key, value, where)
        out.append((name, _changed(steps, over(row.set, tree), path)))
    return out


def _step(spec: Ablation, one: str | Tree, where: str, path: Path) -> Step:
    patch = {"use": one} if isinstance(one, str) else dict(one)
    use = patch.pop("use", None)
    if use not in spec.stage:
        raise WanmoeError(f"{where}: no stage {use!r}; there are {', '.join(spec.stage)}")
    tree = over(over(spec.common, spec.stage[use]), patch)
    shards = tree.pop("shards", spec.measure)
    resolve_paths(tree, path.absolute().parent)
    return Step(use=use, shards=shards, tree=tree)


def _changed(steps: Sequence[Step], patch: Tree, path: Path) -> list[Step]:
    if not patch:
        return list(steps)
    *before, last = steps
    tree = over(last.tree, patch)
    shards = tree.pop("shards", last.shards)
    resolve_paths(tree, path.absolute().parent)
    return [*before, Step(use=last.use, shards=shards, tree=tree)]


def _base(spec: Ablation, path: Path) -> tuple[Step | None, Path | None]:
    tree = over({}, spec.base)
    given = tree.get("model", {}).get("dit") if isinstance(tree.get("model"), dict) else None
    if given is not None:
        return None, _placed(Path(given), path)
    shards = tree.pop("shards", spec.measure)
    tree = over({"model": {"preset": "tiny"}, "train": {"stage": "pretrain"}}, tree)
    return Step(use="base", shards=shards, tree=tree), None


def _check(plan: Plan, path: Path, known: Sequence[str]) -> None:
    """Every config, before hours of training."""
    chains = {**plan.rows, "base": [] if plan.base is None else [plan.base]}
    for name, steps in chains.items():
        for number, step in enumerate(steps):
            if step.shards not in known:
                raise WanmoeError(
                    f"{path}: row {name!r}: no clips {step.shards!r}; there are {', '.join(known)}"
                )
            for key in ("seed", "run"):
                if key in step.tree.get("train", {}):
                    raise WanmoeError(
                        f"{path}: row {name!r}, stage {step.use!r}: train.{key} is given by the ablation"
                    )
            tree = over(step.tree, {"data": {"shards": "x"}, "train": {"run": "x"}})
            model = tree.setdefault("model", {})
            if step is not plan.base:
                model["dit"] = "x"
            if number:
                model["adapter"] = "x"
            parse_config(tree, f"{path}: row {name!r}, stage {step.use!r}")


def over(under: Tree, tree: Tree) -> Tree:
    """`tree` laid over `under`, section by section; both stay as they are."""
    merged = {key: over({}, value) if isinstance(value, dict) else value for key, value in under.items()}
    for key, value in tree.items():
        inner = merged.get(key)
        merged[key] = (
            over(inner if isinstance(inner, dict) else {}, value) if isinstance(value, dict) else value
        )
    return merged


def _put(tree: Tree, dotted: str, value: Any, where: str) -> None:
    if dotted != "shards":
        try:
            check_key(dotted)
        except WanmoeError as error:
            raise WanmoeError(f"{where}: {error}") from error
    *sections, leaf = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value


def _placed(file: Path, path: Path) -> Path:
    return (path.absolute().parent / file).resolve()
