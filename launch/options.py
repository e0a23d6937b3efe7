"""Options that several commands share, and how their words are read."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..moe_lora.errors import WanmoeError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

Size = Annotated[tuple[int, int], typer.Option(help="Height and width in pixels, multiples of 16.")]
Vae = Annotated[
    str, typer.Option(help="VAE weights (diffusers folder, .pth, .safetensors); `haar` is a stand-in.")
]
Text = Annotated[str, typer.Option(help="Text encoder (HF folder, .pth); `hash` is a stand-in.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Tokenizer folder, for a .pth text encoder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")]


def chosen_device(name: str | None) -> torch.device:
    """The device of --device, checked to be there; None is cuda where there is one."""
    import torch

    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WanmoeError(f"--device {name!r} is no device; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise WanmoeError(f"--device {name!r} is not supported; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise WanmoeError(f"--device {name!r} is not there: torch finds {count} CUDA devices; give cpu")
    return device


def chosen_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype of --dtype; None keeps the file's. The default, bf16 on cuda, is said once."""
    import torch

    if name is None and device.type == "cuda":
        _log.info("the DiT runs in bf16, the default on cuda; --dtype file keeps the dtype of the file")
        return torch.bfloat16
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "file": None}
    if (name or "file") not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise WanmoeError(f"--dtype {name!r} is unknown; nearest is {near!r}, known are: {', '.join(known)}")
    return known[name or "file"]


def parse_mix(words: list[str]) -> dict[str, float] | None:
    """["Scissors=0.6", "Suction=0.4"] -> weights by name."""
    mix: dict[str, Any] = {}
    for word in words:
        if word.count("=") > 1:
            raise WanmoeError(f"--mix {word!r}: give --mix once for each expert")
        name, equals, weight = word.rpartition("=")
        try:
            mix[name] = float(weight)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise WanmoeError(f"--mix {word!r}: expected NAME=WEIGHT, for example Scissors=0.6")
    return mix or None
