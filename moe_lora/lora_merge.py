"""Merging LoRAs into the frozen weights while they are loaded: W + strength * scale * up @ down."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import WanmoeError
from .lora_file import Delta, image_layers, read_lora
from .low_rank import check_finite

__all__ = ["LoRAMerge", "LoRASpec"]

Side = Literal["high", "low"]
_SIDES: tuple[Side, ...] = ("high", "low")
_LISTED = 4

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoRASpec:
    """A LoRA to merge: its file, how strongly, and into which noise expert."""

    path: Path
    strength: float = 1.0
    side: Side | None = None
    """None: whichever side the file says it is for, both if it says nothing; a side wins over the file."""

    @classmethod
    def parse(cls, text: str) -> LoRASpec:
        """`file[:strength][:high|low]`, the two in either order; raises WanmoeError for anything else."""
        rest, side, strength = text, None, None
        for _ in range(2):
            before, colon, last = rest.rpartition(":")
            known = next((known for known in _SIDES if known == last.lower()), None)
            if colon and known and side is None:
                rest, side = before, known
            elif colon and strength is None and (number := _number(last)) is not None:
                rest, strength = before, number
        strength = 1.0 if strength is None else strength
        if not rest:
            raise WanmoeError(f"--lora {text!r}: no file is named; write file[:strength][:high|low]")
        if not math.isfinite(strength):
            raise WanmoeError(f"--lora {text!r}: the strength {strength} is not finite")
        if ":" in rest and not Path(rest).exists():
            raise WanmoeError(
                f"--lora {text!r}: {rest.rpartition(':')[2]!r} is neither a strength nor high or low, and "
                f"there is no file {rest}; write file[:strength][:high|low]"
            )
        return cls(Path(rest), strength, side)

    def serves(self, noise_expert: str) -> bool:
        """Whether the `high` or `low` noise expert takes it; reads the header of the file."""
        return read_lora(self.path, self.side).noise_expert in (None, "both", noise_expert)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class _Change(NamedTuple):
    """What one file does to one parameter."""

    delta: Delta
    strength: float
    label: str


class LoRAMerge:
    """Adds LoRAs to parameters one at a time, so that no second copy of a model is held.

    Args:
        specs: added up where they change the same parameter; their sides are the caller's to choose.
    """

    def __init__(self, specs: Iterable[LoRASpec] = ()) -> None:
        self._changes: dict[str, list[_Change]] = {}
        for spec in specs:
            file = read_lora(spec.path, spec.side)
            self.add(file.deltas, file.label, spec.strength)

    def add(self, deltas: Mapping[str, Delta], label: str, strength: float = 1.0) -> None:
        """One more set of changes, by the original name of the layer; errors call it `label`."""
        for layer, delta in deltas.items():
            change = _Change(delta, strength, label)
            if delta.rank or delta.diff is not None:
                weight = layer if layer.endswith("modulation") else f"{layer}.weight"
                self._changes.setdefault(weight, []).append(change)
            if delta.diff_b is not None:
                self._changes.setdefault(f"{layer}.bias", []).append(change)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares the changes with the parameters of a model, by name and shape, before anything is read.

        Where the model has no image encoder, the changes of its attention to one are left out, and counted in
        the log: LoRAs for few steps of Wan2.1 i2v serve other models too. Raises WanmoeError that names the
        file and the parameters which the model lacks or has otherwise.
        """
        if not image_layers(shapes):
            for label, names in self._by_label().items():
                if dropped := image_layers(names):
                    _logger.info(
                        "%s: %d of its %d changes are of an image encoder, which this model lacks",
                        *(label, len(dropped), len(names)),
                    )
            for name in image_layers(self._changes):
                del self._changes[name]
        for label, names in self._by_label().items():
            absent = [name for name in names if name not in shapes]
            if absent:
                shown = ", ".join(absent[:_LISTED]) + (", ..." if len(absent) > _LISTED else "")
                raise WanmoeError(
                    f"{label}: {len(absent)} of the {len(names)} parameters that it changes are not in this "
                    f"model: {shown}; is it a LoRA for another Wan?"
                )
        for name, changes in self._changes.items():
            for change in changes:
                _check_shape(change, name, shapes[name])

    def _by_label(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, changes in self._changes.items():
            for change in changes:
                found.setdefault(change.label, []).append(name)
        return found

    def apply(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter with its changes: summed in float32, then in `dtype`, by default its own.

        A parameter that no LoRA changes comes back as it is. Computed on the tensor's device. Raises
        WanmoeError when a change does not have the shape of the parameter.
        """
        changes = self._changes.get(name)
        if not changes:
            return tensor
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        merged = tensor.to(wide, copy=True).contiguous()
        for change in changes:
            _check_shape(change, name, tuple(tensor.shape))
            diff = change.delta.diff_b if name.endswith(".bias") else change.delta.diff
            if diff is not None:
                values = diff.read().to(merged)
                check_finite(f"{change.label}: its change of {name}", values)
                merged.add_(values, alpha=change.strength)
            if change.delta.rank and not name.endswith(".bias"):
                down, up = (factor.to(merged) for factor in change.delta.factors())
                check_finite(f"{change.label}: its change of {name}", down, up)
                merged.flatten(1).addmm_(up, down, alpha=change.strength * change.delta.scale)
        return merged.to(dtype or tensor.dtype)


def _check_shape(change: _Change, name: str, shape: tuple[int, ...]) -> None:
    """Raises WanmoeError unless what `change` adds to parameter `name` has its shape."""
    delta = change.delta
    found = []
    if name.endswith(".bias"):
        found = [] if delta.diff_b is None else [delta.diff_b.shape]
    else:
        found = [] if delta.diff is None else [delta.diff.shape]
        if delta.down is not None and delta.up is not None:
            product = (delta.up.shape[0], delta.down.shape[1])
            # A convolution's kernel is a matrix here, its later sizes multiplied out.
            found.append(shape if len(shape) > 1 and product == (shape[0], math.prod(shape[1:])) else product)
    for size in found:
        if tuple(size) != shape:
            raise WanmoeError(
                f"{change.label}: its change of {name} is {tuple(size)}, this model's parameter is {shape}; "
                "is it a LoRA for another Wan?"
            )
