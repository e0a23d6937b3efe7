"""One TOML file, typed: read, overridden from the command line, checked once, with errors that name the
nearest key."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from ..moe_lora import AdapterConfig, Expert, ExpertSet, WanmoeError
from ..train.config import Section, TrainerConfig
from ..train.data.store import is_url

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Paths in a config file are relative to the file, so that it can be run from anywhere.
PATH_KEYS = (
    *("model.dit", "model.adapter", "model.dit_high_noise", "model.adapter_high_noise"),
    *("data.shards", "train.run", "launch.hostfile"),
    *("objective.classifier", "objective.vae", "objective.lpips"),
)


class LaunchConfig(Section):
    """Section `launch`: how many processes, and where; `wanmoe launch` has options for these keys."""

    ranks: int | None = Field(None, ge=1)
    """Processes on this machine (with slurm on each); default: one per GPU, or 1 without any."""
    hostfile: Path | None = None
    """DeepSpeed hostfile (`host slots=N` lines) for several machines, which pdsh reaches by ssh."""
    no_ssh: bool = False
    """Start only this node's processes; run the command on every node with its own node_rank."""
    node_rank: int = Field(0, ge=0)
    master_addr: str | None = None
    """Where the ranks meet; default: the first host, or this machine."""
    master_port: int | None = Field(None, ge=1, le=65535)
    """Default: a free port on one machine, 29500 with a hostfile."""
    include: str | None = None
    """DeepSpeed's --include, e.g. "host1:0,1@host2"."""
    slurm: bool = False
    """Start the processes by srun, within an allocation."""
    restarts: int = Field(0, ge=0)
    """How often a job that lost a rank is started again, from its last save."""

    @model_validator(mode="after")
    def _one_way(self) -> LaunchConfig:
        if self.slurm and self.hostfile is not None:
            raise ValueError("give launch.hostfile or launch.slurm, not both: Slurm knows its hosts")
        if self.no_ssh and self.hostfile is None:
            raise ValueError("launch.no_ssh needs launch.hostfile, the same on every node")
        return self


class Config(TrainerConfig):
    """A whole config file."""

    launch: LaunchConfig = LaunchConfig()


def load_config(path: Path, overrides: Sequence[str] = (), machine: str | None = None) -> Config:
    """Reads a TOML config over the preset of a `machine`, and lays `--section.key value` overrides over both.

    Raises:
        WanmoeError: not readable, an unknown key (with the nearest valid one), or a value that does not fit.
    """
    tree = read_toml(path)
    resolve_paths(tree, path.parent)
    if machine is not None:
        tree = _over(read_toml(machine_preset(machine)), tree)
    apply_overrides(tree, overrides)
    # Those of the command line are as the shell means them; a run's config.toml must not move them.
    resolve_paths(tree, Path.cwd())
    given = {word[2:].split("=")[0].replace("-", "_") for word in overrides if word.startswith("--")}
    return parse_config(tree, str(path), given)


def machine_preset(name: str) -> Path:
    """The file of a preset by its name, or a file of one's own.

    Raises:
        WanmoeError: there is none; the presets are named.
    """
    known = {
        path.stem: path for path in sorted((Path(__file__).parent / "presets" / "machines").glob("*.toml"))
    }
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    raise WanmoeError(f"--machine {name}: no such preset or file; there are {', '.join(known)}")


def _over(under: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with what it does not say from `under`, both of sections."""
    merged = {key: dict(value) for key, value in under.items()}
    for key, value in tree.items():
        merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged


def load_experts(path: Path | None) -> ExpertSet:
    """The experts of a config file's `adapter` section alone; the four surgical families without one."""
    return ExpertSet() if path is None else load_adapter_config(path).expert_set


def load_adapter_config(path: Path) -> AdapterConfig:
    """The `adapter` section of a config file alone; raises WanmoeError as `load_config`."""
    tree = read_toml(path)
    try:
        return AdapterConfig.model_validate(tree.get("adapter", {}))
    except ValidationError as error:
        raise WanmoeError(f"{path}: adapter.{_first_problem(error)}") from error


def parse_launch(tree: dict[str, Any], source: str) -> LaunchConfig:
    """Validates section `launch` alone; `source` names it in errors."""
    try:
        return LaunchConfig.model_validate(tree)
    except ValidationError as error:
        raise WanmoeError(f"{source}: {_first_problem(error)}") from error


def parse_config(tree: dict[str, Any], source: str, given: Collection[str] = ()) -> Config:
    """Validates a nested dict; `source` names it in errors, but for the keys `given` on the command line."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problem = _first_problem(error)
        if any(problem.startswith(f"{key}:") for key in given):
            raise WanmoeError(f"--{problem}") from error
        raise WanmoeError(f"{source}: {problem}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested dicts; WanmoeError where it cannot be read or is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise WanmoeError(f"{path}: cannot read the config ({error.strerror})") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WanmoeError(f"{path}: not valid TOML: {error}") from error


def resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of a config file relative to its folder, in place."""
    for dotted in PATH_KEYS:
        section, key = dotted.split(".")
        value = tree.get(section, {}).get(key) if isinstance(tree.get(section), dict) else None
        stand_in = dotted == "objective.vae" and value == "haar"
        if isinstance(value, str) and not is_url(value) and not stand_in:
            tree[section][key] = str((folder / value).resolve())


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `--section.key value` (or `--section.key=value`) in a nested dict; values are read as TOML."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or "." not in word:
            raise WanmoeError(
                f"unexpected argument {word!r}; options of the config are given as --section.key value"
            )
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            if not words:
                raise WanmoeError(f"--{key} needs a value")
            value = words.pop(0)
        check_key(key)
        place = tree
        *sections, leaf = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise WanmoeError(f"--{key}: {section!r} is a value in the config file, not a section")
        place[leaf] = _toml_value(value)


def check_key(dotted: str) -> None:
    """Raises WanmoeError, naming the nearest valid key, unless `section.key` exists."""
    known = list(valid_keys())
    if dotted not in known and not dotted.startswith("deepspeed.config."):
        raise WanmoeError(f"unknown config key {dotted!r}; nearest is {nearest(dotted, known)!r}")


def valid_keys() -> list[str]:
    """Every `section.key` of a config file."""
    keys = []
    for section, field in Config.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            keys += [f"{section}.{key}" for key in model.model_fields]
    return keys


def reference() -> str:
    """Every key of a config with its default and meaning, as the Markdown page docs/config.md."""
    lines = ["# Config reference", "", "Written from the schema by `wanmoe.launch.config.reference`.", ""]
    for section, field in Config.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        lines += [f"## {section}", "", "| key | default | meaning |", "|---|---|---|"]
        for key, value in model.model_fields.items():
            default = (
                "needed" if value.is_required() else _short(value.get_default(call_default_factory=True))
            )
            meaning = " ".join((value.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple) and value and isinstance(value[0], Expert):
        return ", ".join(expert.name for expert in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like `name`."""
    return max(known, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    # Of a key that takes one thing or another pydantic names each: what it says of them is one problem.
    loc = [part for part in problem["loc"] if not re.search(r"[\[(]|^int$|^float$|^constrained", str(part))]
    place = ".".join(map(str, loc))
    if len(loc) < len(problem["loc"]):
        ways = [one["msg"] for one in error.errors() if list(one["loc"][: len(loc)]) == loc]
        problem = {**problem, "msg": "; or ".join(dict.fromkeys(ways))}
    if problem["type"] == "extra_forbidden":
        known = valid_keys() if "." in place else list(Config.model_fields)
        return f"unknown key {place!r}; nearest is {nearest(place, known)!r}"
    if problem["type"] == "missing":
        return f"key {place!r} is missing"
    value = problem.get("input")
    shown = "" if isinstance(value, dict) else f" (got {value!r})"
    told = f"{problem['msg'].removeprefix('Value error, ')}{shown}"
    return f"{place}: {told}" if place else told
