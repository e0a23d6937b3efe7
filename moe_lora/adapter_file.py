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

from .adapter import Adapter, AdapterConfig, attach
from .errors import WanmoeError
from .files import write_atomic
from .routing import RouterConfig

if TYPE_CHECKING:
    from .wan.dit import WanDiT

FORMAT = "wanmoe-adapter/1"


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
            starts fresh: it must be trained before it routes anything.
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
    """Whether the tensors of an adapter file include a learned router."""
    return any(name.startswith("router.") for name in tensors)


def _fill(adapter: Adapter, tensors: Mapping[str, Tensor], path: str) -> None:
    wanted = adapter.parameters()
    if has_router(tensors) and adapter.router is None:
        raise WanmoeError(
            f"{path}: it holds a learned router, which router.mode = 'rule' would drop; leave the key out"
        )
    given = wanted if has_router(tensors) else adapter.parameters(("base", "experts"))
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
