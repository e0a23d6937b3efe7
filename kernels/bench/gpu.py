"""`make gpu`: everything that needs a card, in one go, on a machine that has torch, triton and nvcc.

Builds the CUDA library, runs the GPU tests, tunes the op's table, then measures the linear and the block with
that table. Each step has a time limit and a log; one that fails or runs past its limit is recorded, and the
next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Step", "main", "run_steps", "steps"]


class Step(NamedTuple):
    """One command of the run."""

    name: str
    command: tuple[str, ...]
    limit_s: float


class Outcome(NamedTuple):
    """How a step ended."""

    name: str
    code: int
    """Exit code; 124: it ran past its limit."""
    seconds: float


def steps(out: Path) -> list[Step]:
    """The steps of a run; their limits add up to less than eight minutes."""
    python = sys.executable
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels")
    # The whole command brings the rows of PEFT; without its packages the kernels are measured all the same.
    whole = all(find_spec(package) for package in ("typer", "pydantic", "safetensors"))
    bench = ("-m", "wanmoe.launch", "bench") if whole else ("-m", "wanmoe.kernels.bench")
    return [
        Step("build", (python, "-m", "wanmoe.kernels.cuda_library"), 60),
        Step("tests", (python, *tests, f"--junitxml={out / 'tests.xml'}"), 130),
        Step("tune", (python, "-m", "wanmoe.kernels.bench.tune", "--tokens", "5376,32760"), 90),
        Step("linear", (python, *bench, "--suite", "quick", "--out", str(out)), 150),
        Step("block", (python, "-m", "wanmoe.launch", "bench", "block", "--out", str(out)), 45),
    ]


def run_steps(
    wanted: Sequence[Step], out: Path, environment: Mapping[str, str], folder: Path
) -> list[Outcome]:
    """Runs the steps in `folder`, each with its log in `out`; the last lines of each are printed."""
    outcomes = []
    for step in wanted:
        log = out / f"{step.name}.log"
        print(f"== {step.name}: {' '.join(step.command[1:])}", flush=True)
        began = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            try:
                code = subprocess.run(
                    step.command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    cwd=folder,
                    timeout=step.limit_s,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        taken = time.perf_counter() - began
        outcomes.append(Outcome(step.name, code, round(taken, 1)))
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]))
        ended = {0: "done", 124: f"stopped at its limit of {step.limit_s:.0f} s"}.get(
            code, f"exit code {code}"
        )
        print(f"== {step.name}: {ended}, {taken:.0f} s", flush=True)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all steps; 0 when all passed, 1 when one did not, 2 without a card or outside a checkout."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, tables and results")
    given = parser.parse_args(argv)
    folder = Path(__file__).resolve().parents[2]
    if not torch.cuda.is_available():
        print("error: no CUDA device; `make test` and `wanmoe bench` run on the CPU", file=sys.stderr)
        return 2
    if not (folder / "tests").is_dir():
        print(f"error: {folder} is no checkout of wanmoe; clone the repository", file=sys.stderr)
        return 2
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_steps(steps(out), out, os.environ | {"WANMOE_TABLES": str(out / "tables")}, folder)
    (out / "steps.json").write_text(json.dumps([outcome._asdict() for outcome in outcomes], indent=1))
    print(f"{'step':<8} {'exit code':>9} {'seconds':>8}")
    for outcome in outcomes:
        print(f"{outcome.name:<8} {outcome.code:>9} {outcome.seconds:>8.1f}")
    return int(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
