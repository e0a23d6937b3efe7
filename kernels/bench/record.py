"""The file of one run: what ran, on what, every sample; written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .ceilings import Ceilings, MatmulCeiling

__all__ = ["FORMAT", "Row", "Run", "device_slug", "read_run", "write_run", "write_text"]

FORMAT = "wanmoe-bench/1"
STATUSES = ("ok", "FAILED", "absent")


@dataclass(frozen=True)
class Row:
    """One variant in one mode on one problem."""

    group: str
    title: str
    mode: str
    variant: str
    status: str
    """ok; FAILED: it raised, left memory unwritten or is wrong; absent: it could not run here."""
    note: str = ""
    linear: str = ""
    tokens: int = 0
    clips: int = 0
    gates: str = ""
    ms: Mapping[str, float] | None = None
    """median, p20, p80."""
    samples: tuple[float, ...] = ()
    """ms of every timed call, in order."""
    ratio: float | None = None
    """Over the frozen linear in the same mode."""
    overhead_pct: float | None = None
    model_pct: float | None = None
    """Overhead that the byte model predicts from this run's ceilings."""
    gbps: float | None = None
    """Bytes that the problem must move, over the time."""
    flops: float = 0.0
    moved: float = 0.0
    """Bytes that the problem must move."""
    floor_pct: float | None = None
    """Time at the ceilings over the time."""
    graph_ms: float | None = None
    """Median of CUDA-graph replays: far below `ms` where the host is what takes the time."""
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    tensor: str = ""
    """The output or gradient nearest to its limit; the errors are its own."""
    error: float | None = None
    eager_error: float | None = None
    error_ratio: float | None = None


@dataclass(frozen=True)
class Run:
    """Everything of one call of the benchmark."""

    suite: str
    provenance: Mapping[str, Any]
    configuration: Mapping[str, Any]
    ceilings: Ceilings | None
    rows: tuple[Row, ...]
    format: str = field(default=FORMAT)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status == "FAILED"]


def write_run(run: Run, path: Path) -> None:
    """As JSON, one row a line. Raises OSError, and then leaves a former file as it was."""
    head = {
        "format": run.format,
        "suite": run.suite,
        "provenance": run.provenance,
        "configuration": run.configuration,
        "ceilings": asdict(run.ceilings) if run.ceilings else None,
    }
    rows = ",\n".join(json.dumps(_plain(row), allow_nan=False) for row in run.rows)
    write_text(path, f'{json.dumps(head, indent=1, allow_nan=False)[:-2]},\n "rows": [\n{rows}\n]}}\n')


def read_run(path: Path) -> Run:
    """The inverse of `write_run`. Raises ValueError that names the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _run(data)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result file of format {FORMAT}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name beside its own, flushes it, then renames it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def device_slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def _plain(row: Row) -> dict[str, Any]:
    """As JSON has it: infinite errors, which JSON has no number for, become the text "inf"."""
    return {key: "inf" if value == float("inf") else value for key, value in asdict(row).items()} | {
        "samples": [float(f"{sample:.6g}") for sample in row.samples]
    }


def _run(data: dict[str, Any]) -> Run:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}")
    ceilings = data["ceilings"]
    if ceilings is not None:
        matmuls = tuple(MatmulCeiling(**matmul) for matmul in ceilings["matmuls"])
        ceilings = Ceilings(ceilings["dtype"], ceilings["copy_tbps"], matmuls)
    return Run(
        data["suite"],
        data["provenance"],
        data["configuration"],
        ceilings,
        tuple(_row(number, row) for number, row in enumerate(data["rows"])),
    )


def _row(number: int, data: dict[str, Any]) -> Row:
    names = {known.name for known in fields(Row)}
    if data.keys() != names:
        raise ValueError(f"row {number}: keys {sorted(data.keys() ^ names)} are missing or unknown")
    if data["status"] not in STATUSES:
        raise ValueError(f"row {number}: status {data['status']!r} is none of {', '.join(STATUSES)}")
    if data["status"] == "ok" and not (data["ms"] and data["samples"]):
        raise ValueError(f"row {number}: an ok row needs ms and samples")
    infinite = {key: float("inf") for key in ("error", "eager_error", "error_ratio") if data[key] == "inf"}
    return Row(**(data | infinite | {"samples": tuple(data["samples"])}))
