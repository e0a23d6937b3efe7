"""`python -m wanmoe.kernels.bench`: the benchmark on a machine that has torch and little else."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .benchmark import Options, no_peers, run_linear
from .suites import SUITES


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs; an unusable argument is one line on standard error and code 2."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m wanmoe.kernels.bench", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), help="default: quick with a GPU, otherwise cpu")
    parser.add_argument("--rows", help="patterns over names as q-n5376-b1-clip/fwd, comma-separated")
    parser.add_argument("--variants", help="names, comma-separated; frozen and loop always run")
    parser.add_argument("--out", type=Path, help="folder for JSON, plot and page")
    parser.add_argument("--device", type=torch.device, help="cpu, cuda or cuda:N")
    given = parser.parse_args(words)
    argv_shown = ["python -m wanmoe.kernels.bench", *words]
    options = Options(given.suite, given.rows, given.variants, given.out, given.device, argv_shown)
    try:
        return run_linear(options, no_peers("PEFT is measured by `wanmoe bench`"))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
