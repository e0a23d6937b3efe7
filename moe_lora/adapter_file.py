"""Adapter files `wanmoe-adapter/1`: safetensors with the adapter alone, and metadata that says what it
belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter import Adapter, AdapterConfig, attach, make_router
from .errors import WanmoeError
from .files import write_atomic
from .routing import LearnedRouter, RouterConfig

if TYPE_CHECKING:
    from .wan.dit import WanDiT

FORMAT = "wanmoe-adapter/1"
_ROUTER, _TIME_GATE = "router.", "router.time_"


class AdapterInfo(BaseModel):
    """What an adapter file says of itself."""

    model_config = ConfigDict(frozen=True)

    adapter: AdapterConfig
    router: RouterConfig
    task: str
    """t2v or i2v."""
    noise_expert: str
    """high, low, or both: which of the two noise experts of A14B it was trained on."""
    stage: str
    """Row of the stage table that it was trained as."""
    step: int
    base_sha256: str
    """Hash of the frozen model it was trained on; empty when unknown."""


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    stage: str,
    step: int,
    noise_expert: str = "both",
    base_sha256: str = "",
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes the adapter, and nothing frozen, to a safetensors file; complete or not at all.

    Args:
        tensors: values by name where the live parameters are partitioned; default: the live ones.
    """
    path = Path(path)
    names = adapter.parameters()
    values = names if tensors is None else tensors
    if set(values) != set(names):
        raise ValueError(f"tensors to save differ from the registry: {sorted(set(values) ^ set(names))[:8]}")
    info = AdapterInfo(
        adapter=adapter.config,
        router=adapter.router_config,
        task=adapter.dit.config.task,
        noise_expert=noise_expert,
        stage=stage,
        step=step,
        base_sha256=base_sha256,
    )
    contents = {name: values[name].detach().to("cpu", dtype).contiguous() for name in names}
    write_safetensors(path, contents, {"format": FORMAT, "info": info.model_dump_json()})
    return path


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, and the folders on the way to it."""

    def write(temporary: Path) -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)

    write_atomic(path, write, (SafetensorError,))


def read_adapter(path: str | Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Reads an adapter file: its description and its tensors by name; raises as `read_adapter_info` does."""
    info = read_adapter_info(path)
    try:
        with safe_open(path, framework="pt") as file:
            return info, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WanmoeError(f"{path}: not a readable safetensors file ({error})") from error


def read_adapter_info(path: str | Path) -> AdapterInfo:
    """Reads the description of an adapter file, from its header alone.

    Raises:
        WanmoeError: not there, cut short, not an adapter, or of another format.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise WanmoeError(f"{path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise WanmoeError(
            f"{path}: not a wanmoe adapter (format {metadata.get('format')!r}, expected {FORMAT!r}); "
            "was a base model or another tool's LoRA given?"
        )
    try:
        info: Any = json.loads(metadata.get("info", "{}"))
        return AdapterInfo.model_validate(info)
    except json.JSONDecodeError as error:
        raise WanmoeError(f"{path}: its description is damaged: it is not JSON ({error})") from error
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}" for fault in error.errors())
        raise WanmoeError(f"{path}: its description is damaged: {'; '.join(faults)}") from error


def load_adapter(
    path: str | Path,
    dit: WanDiT,
    *,
    noise_expert: str | None = None,
    base_sha256: str | None = None,
    router: RouterConfig | None = None,
    any_base: bool = False,
) -> Adapter:
    """Attaches the adapter of a file to a DiT, with the experts, ranks and router that the file carries.

    Args:
        noise_expert: "high", "low" or "both", what `dit` serves; a file of one side goes to that side alone.
        base_sha256: hash of the base that `dit` was loaded from; a file trained on another base is refused.
        router: the keys that are set in it replace those of the file. A learned router that the file lacks
            starts fresh: it must be trained before it routes anything. So does a learned time gate that
            the file does not speak of.
        any_base: load in spite of another noise expert, task or base.

    Raises:
        WanmoeError: names the file and what does not fit.
    """
    info, tensors = read_adapter(path)
    problems = []
    if noise_expert and info.noise_expert not in ("both", noise_expert):
        problems.append(f"it belongs to the {info.noise_expert} noise expert, this model is {noise_expert}")
    if info.task != dit.config.task:
        problems.append(f"it was trained for {info.task}, this model is {dit.config.task}")
    if base_sha256 and info.base_sha256 and info.base_sha256 != base_sha256:
        problems.append(f"it was trained on base {info.base_sha256[:12]}, this base is {base_sha256[:12]}")
    if problems and not any_base:
        raise WanmoeError(
            f"{path}: {'; '.join(problems)}; pass any_base (--any_base) to load it all the same"
        )
    if info.router.time_gate == "learned" and not has_time_gate(tensors):
        raise WanmoeError(f"{path}: it says that its time gate is learned, but holds none; is it whole?")
    changed = {} if router is None else {key: getattr(router, key) for key in router.model_fields_set}
    adapter = attach(dit, info.adapter, info.router.model_copy(update=changed))
    _fill(adapter, tensors, str(path))
    return adapter


def is_adapter(path: str | Path) -> bool:
    """Whether a file says that it is an adapter of ours; False for whatever cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def has_router(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of an adapter file include the network of a learned router."""
    return any(_is_router(name) for name in tensors)


def has_time_gate(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of an adapter file include a learned time gate."""
    return any(name.startswith(_TIME_GATE) for name in tensors)


def _is_router(name: str) -> bool:
    return name.startswith(_ROUTER) and not name.startswith(_TIME_GATE)


def router_of(info: AdapterInfo, tensors: Mapping[str, Tensor], path: str | Path) -> LearnedRouter:
    """The learned router of an adapter file alone, without a model; what `read_adapter` returned of `path`.

    Raises:
        WanmoeError: the file holds none, or not the one that it describes.
    """
    values = {name.removeprefix(_ROUTER): value for name, value in tensors.items() if _is_router(name)}
    if "hidden.weight" not in values:
        raise WanmoeError(f"{path}: it holds no learned router; train stage c from it")
    width = values["hidden.weight"].shape[1] - info.router.first_frame_classes
    try:
        router = make_router(info.router, max(width, 1), len(info.adapter.experts))
        router.load_state_dict(values)
    except RuntimeError as error:
        fault = " ".join(str(error).split())
        raise WanmoeError(f"{path}: its router is not the one that it describes: {fault}") from error
    return router.eval()


def _fill(adapter: Adapter, tensors: Mapping[str, Tensor], path: str) -> None:
    wanted = adapter.parameters()
    for held, part, dropped in (
        (has_router(tensors), adapter.router, "router, which router.mode = 'rule'"),
        (has_time_gate(tensors), adapter.time_gate, "time gate, which router.time_gate = 'bands'"),
    ):
        if held and part is None:
            raise WanmoeError(f"{path}: it holds a learned {dropped} would drop; leave the key out")
    fresh = {name for name in wanted if _is_router(name) and not has_router(tensors)}
    fresh |= {name for name in wanted if name.startswith(_TIME_GATE) and not has_time_gate(tensors)}
    given = [name for name in wanted if name not in fresh]
    missing = [name for name in given if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    for what, names in (("missing", missing), ("unknown", extra), ("misshapen", misshapen)):
        if names:
            shown = ", ".join(names[:8])
            raise WanmoeError(f"{path}: {len(names)} {what} tensors: {shown}; does it fit this model?")
    for name in given:
        wanted[name].data.copy_(tensors[name])
