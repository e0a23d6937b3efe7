"""`make gpu`: everything that needs a card, in one go, on a machine that has torch, triton and nvcc.

Builds the CUDA library, runs the GPU tests, tunes the op's table, then measures the linear, the block and
training steps with that table, all within one budget of time. Each step has a log; one that fails, or that
has to be stopped, is recorded, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Outcome", "Step", "main", "run_steps", "steps"]

TOTAL_S = 470.0
"""For all steps together: less than eight minutes."""
GRACE_S = 15.0
"""The end of a step's time, for it to write what it has after it was interrupted."""
LAUNCH_NEEDS = ("ftfy", "pydantic", "safetensors", "tqdm", "typer")
"""What the command line imports besides torch and numpy."""
BLOCK_NEEDS = (*LAUNCH_NEEDS, "accelerate", "diffusers", "huggingface_hub", "peft", "transformers")
RING_NEEDS = (*LAUNCH_NEEDS, "aiohttp", "fsspec", "psutil", "tomli_w")
ENGINE_NEEDS = (*LAUNCH_NEEDS, "av", "cv2", "deepspeed", "psutil", "tomli_w")


class Step(NamedTuple):
    """One command of the run."""

    name: str
    command: tuple[str, ...]
    least_s: float
    """Seconds that the steps before leave to it, whatever they do."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""


class Outcome(NamedTuple):
    """How a step ended."""

    name: str
    code: int
    """Exit code, 0 too for a step that was skipped; 124: it reached its limit."""
    seconds: float
    limit_s: float
    note: str = ""


def steps(out: Path) -> list[Step]:
    """The steps of a run, with what each may take at least."""
    python = sys.executable
    gpu_tests = ["tests/kernels", "tests/csrc"]
    if not _missing(BLOCK_NEEDS):
        of_ring = ("tests/moe_lora/test_ring.py", "tests/moe_lora/test_formats.py")
        gpu_tests += ["tests/launch/test_bench_block.py", *of_ring]
    # Most of their time the tests compile kernels.
    workers = () if _missing(("xdist",)) else ("-n", "8")
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *workers, *gpu_tests)
    tuned = ("--linears", "qkv,q,k,ffn.0,ffn.2,kv", "--tokens", "5376")
    # The whole command brings the rows of PEFT; without its packages the kernels are measured all the same.
    bench = ("-m", "wanmoe.kernels.bench") if _missing(LAUNCH_NEEDS) else ("-m", "wanmoe.launch", "bench")
    block = ("-m", "wanmoe.launch", "bench", "block", "--out", str(out))
    engine = ("-m", "wanmoe.launch", "bench", "engine", "--parts", "speed,prefix", "--quick", "--out")
    ring = ("-m", "wanmoe.launch", "bench", "ring", "--out")
    return [
        Step("build", (python, "-m", "wanmoe.kernels.cuda_library"), 45),
        Step("tests", (python, *tests, f"--junitxml={out / 'tests.xml'}"), 95, ("pytest",)),
        Step("tune", (python, "-m", "wanmoe.kernels.bench.tune", *tuned), 45),
        Step("linear", (python, *bench, "--suite", "quick", "--out", str(out)), 70),
        Step("block", (python, *block), 40, BLOCK_NEEDS),
        Step("engine", (python, *engine, str(out)), 55, ENGINE_NEEDS),
        Step("ring", (python, *ring, str(out)), 120, RING_NEEDS),
    ]


def run_steps(
    wanted: Sequence[Step],
    out: Path,
    environment: Mapping[str, str],
    folder: Path,
    *,
    total_s: float = TOTAL_S,
    grace_s: float = GRACE_S,
) -> list[Outcome]:
    """Runs the steps in `folder`, each with its log in `out`; the last lines of each are printed.

    A step may take what is left of total_s less the least shares of the steps behind it. It is interrupted
    grace_s before, and killed with all its processes at its limit.
    """
    # Ignored in a job of the background, which the steps would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    outcomes = []
    for place, step in enumerate(wanted):
        started = time.monotonic()
        limit = total_s - (started - began) - sum(later.least_s for later in wanted[place + 1 :])
        if missing := _missing(step.needs):
            outcomes.append(Outcome(step.name, 0, 0.0, limit, f"skipped: needs {', '.join(missing)}"))
        else:
            print(f"== {step.name}: {' '.join(step.command[1:])}", flush=True)
            log = out / f"{step.name}.log"
            code = _run(step.command, log, environment, folder, limit, grace_s)
            print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]))
            note = {0: "done", 124: f"stopped at its limit of {limit:.0f} s"}.get(code, f"exit code {code}")
            outcomes.append(Outcome(step.name, code, round(time.monotonic() - started, 1), limit, note))
        print(f"== {step.name}: {outcomes[-1].note}, {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def _run(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    folder: Path,
    limit_s: float,
    grace_s: float,
) -> int:
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        try:
            return process.wait(max(limit_s - grace_s, 0.0))
        except subprocess.TimeoutExpired:
            # To the step alone: pytest and the benchmark then end their own processes and write their files.
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
            return 124
        finally:
            # Workers that outlive their step would disturb the next one.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if find_spec(name) is None]


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
    # Library products that do not change from run to run, which tests of our own kernels rely on.
    settings = {"WANMOE_TABLES": str(out / "tables"), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    outcomes = run_steps(steps(out), out, os.environ | settings, folder)
    (out / "steps.json").write_text(json.dumps([outcome._asdict() for outcome in outcomes], indent=1))
    print(f"{'step':<8} {'exit code':>9} {'seconds':>8}")
    for outcome in outcomes:
        print(f"{outcome.name:<8} {outcome.code:>9} {outcome.seconds:>8.1f}  {outcome.note}")
    return int(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
