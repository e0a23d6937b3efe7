"""The report on a file of weights: its fields, for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class ExpertState(BaseModel):
    """One expert of an adapter file."""

    model_config = ConfigDict(frozen=True)

    name: str
    trained: bool
    """False where its up projections are all zero."""


class FileReport(BaseModel):
    """What was found in a file or folder; what does not apply or is not known is None or empty."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    path: str
    format: str
    task: str | None = None
    """t2v or i2v."""
    noise_expert: str | None = None
    """high, low or both: the noise expert of A14B that it is or belongs to."""
    linears: str | None = None
    """How many linears an adapter changes, and in which blocks."""
    ranks: dict[str, dict[str, list[int]]] = {}
    """Of base, experts or lora, by projection: more than one where layers differ."""
    experts: list[ExpertState] = []
    """In the order of the gate columns."""
    parameters: int | None = None
    dtypes: dict[str, int] = {}
    """Values stored in each dtype."""
    bytes: int | None = None
    sha256: str | None = None
    """Of the file, as `sha256sum` prints it, or of its shards' hashes; None where it was not computed."""
    details: dict[str, Any] = {}
    """What the format says beyond that, JSON values."""
    notes: list[str] = []

    def lines(self) -> list[str]:
        """The report for a terminal, a fact a line."""
        rows: list[tuple[str, str]] = [("file", self.path), ("format", self.format)]
        facts = {"task": self.task, "noise expert": self.noise_expert, "linears": self.linears}
        # Of an adapter these are asked for, so their absence is told.
        rows += [(label, fact or "not stated") for label, fact in facts.items() if fact or self.ranks]
        for part, ranks in self.ranks.items():
            shown = (f"{name} {'/'.join(map(str, values))}" for name, values in ranks.items())
            rows.append((f"rank of {part}", ", ".join(shown)))
        if self.experts:
            marked = (e.name if e.trained else f"{e.name} (all zero: never trained)" for e in self.experts)
            rows.append(("experts", ", ".join(marked)))
        if self.parameters is not None:
            rows.append(("parameters", f"{self.parameters:,}"))
        if self.dtypes:
            rows.append(("dtype", ", ".join(self.dtypes)))
        rows += [(key.replace("_", " "), _shown(value)) for key, value in self.details.items()]
        if self.bytes is not None:
            rows.append(("size", _size(self.bytes)))
            rows.append(("sha256", self.sha256 or f"not computed, for it means reading {_size(self.bytes)}"))
        rows += [("note", note) for note in self.notes]
        width = max(len(label) for label, _ in rows)
        return [f"{label:{width}}  {text}" for label, text in rows]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return self.model_dump(mode="json")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " x ".join(_shown(item) for item in value) if len(value) > 1 else ", ".join(map(str, value))
    return str(value)


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
