"""The command: ceilings, then every group, then the file, the page, the plot and the tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .ceilings import Ceilings, measure_ceilings
from .linear import Inputs, Problem
from .measure import measure_group
from .plot import plot_run
from .provenance import checkout, device_name, gpu_state, provenance
from .record import Row, Run, device_slug, write_run
from .report import folder_page, modelled_text, run_text, unmeasured
from .suites import SUITES, Group, Suite, chosen
from .variants import FROZEN, FROZEN_AGAIN, LOOP, Prepared, Variant, linear_variants

__all__ = ["Options", "Peers", "flushed", "keep_and_publish", "run_linear", "run_suite"]

Peers = Callable[[Problem], Sequence[Variant]]
"""Other people's implementations of a problem; they come from outside, since kernels import none of them."""


@dataclass(frozen=True)
class Options:
    """What `wanmoe bench` and `python -m wanmoe.kernels.bench` take."""

    suite: str | None = None
    """cpu, quick or full; None: quick where there is a GPU, otherwise cpu."""
    rows: str | None = None
    """Comma-separated patterns over names as q-n5376-b1-clip/fwd."""
    variants: str | None = None
    """Comma-separated names; the frozen linear and the loop always run."""
    out: Path | None = None
    """Folder; None: kernels/bench/results/<device> in a checkout, otherwise bench-results/<device>."""
    device: torch.device | None = None
    argv: Sequence[str] = ()


def flushed(line: str) -> None:
    """Prints at once, so that a log shows how far a run has come."""
    print(line, flush=True)


def run_linear(
    options: Options, peers: Peers = lambda problem: (), say: Callable[[str], object] = flushed
) -> int:
    """Runs a suite, writes its files and prints its tables; returns the exit code of `keep_and_publish`.

    Raises: ValueError for an unknown suite, pattern or variant.
    """
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = options.suite or ("quick" if device.type == "cuda" else "cpu")
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is unknown; choose from {', '.join(SUITES)}")
    if name != "cpu" and device.type != "cuda":
        raise ValueError(f"suite {name} needs a CUDA device and this is {device.type}; use the suite cpu")
    folder = options.out or default_folder(device)
    return keep_and_publish(run_suite(SUITES[name], options, device, peers, say), folder, say)


def run_suite(
    suite: Suite, options: Options, device: torch.device, peers: Peers, say: Callable[[str], object]
) -> Iterator[Run]:
    """The ceilings and the rows of a suite, on a device: the run so far, after each group."""
    groups = chosen(suite, options.rows)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    only = _named(options.variants, groups, peers, device)
    about = provenance(device, list(options.argv))
    states = [gpu_state(device)]
    began = time.monotonic()
    ceilings = measure_ceilings(_shapes(groups), dtype=dtype, device=device, protocol=suite.protocol)
    say(f"{about['device']}: copy {ceilings.copy_tbps:.3g} TB/s, {ceilings.tflops:.3g} TFLOP/s")
    rows: list[Row] = []
    for number, group in enumerate(groups, 1):
        rows += _measured(group, only, peers, dtype, device, ceilings, suite)
        states.append(gpu_state(device))
        modes = ", ".join(mode.name for mode in group.modes)
        seconds = time.monotonic() - began
        say(f"{number}/{len(groups)} {group.problem.slug} ({modes}), {seconds:.0f} s")
        configuration = {
            "protocol": asdict(suite.protocol),
            "dtype": ceilings.dtype,
            "groups": [f"{g.problem.slug}/{mode.name}" for g in groups for mode in g.modes],
            "complete": number == len(groups),
            "variants": sorted(only) if only else None,
            "seconds": round(seconds, 1),
        }
        yield Run(suite.name, about | {"gpu_states": [*states]}, configuration, ceilings, tuple(rows))


def keep_and_publish(runs: Iterator[Run], folder: Path, say: Callable[[str], object]) -> int:
    """Writes each state of a run as it comes, and publishes the last one.

    Returns: 1 when a row is FAILED, that is wrong or broken, 130 when the run was interrupted, otherwise 0.
    Speed never decides. Raises: KeyboardInterrupt when nothing was measured before it.
    """
    run: Run | None = None
    interrupted = False
    try:
        for run in runs:
            keep(run, folder)
    except KeyboardInterrupt:
        if run is None:
            raise
        say("interrupted: this is what was measured until then")
        interrupted = True
    if run is None:
        raise ValueError("nothing was measured: the suite has no rows")
    return publish(run, folder, say) or (130 if interrupted else 0)


def publish(run: Run, folder: Path, say: Callable[[str], object]) -> int:
    """Writes JSON, plot and page of a run into a folder, prints the tables, and returns the exit code."""
    path = keep(run, folder)
    no_plot = plot_run(run, path.with_suffix(".png"))
    page = folder_page(folder)
    say(run_text(run, colour=sys.stdout.isatty()))
    if run.ceilings is not None:
        say("\n" + modelled_text(unmeasured([run])))
    say("")
    if no_plot:
        say(no_plot)
    say(f"wrote {path}, {page}")
    return 1 if run.failed else 0


def keep(run: Run, folder: Path) -> Path:
    """Writes the JSON of a run, over that of the same run before, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = run.provenance["utc"].replace(":", "").replace("-", "").replace("+0000", "Z")
    path = folder / f"{run.suite}-{stamp}.json"
    write_run(run, path)
    return path


def default_folder(device: torch.device) -> Path:
    """kernels/bench/results/<device> in a checkout, bench-results/<device> with an installed package."""
    root = checkout()
    base = root / "kernels" / "bench" / "results" if root else Path("bench-results")
    return base / device_slug(device_name(device))


def _measured(
    group: Group,
    only: frozenset[str] | None,
    peers: Peers,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    suite: Suite,
) -> list[Row]:
    # A new problem is a new compilation; the old ones only count against the compiler's limit.
    torch.compiler.reset()
    variants = [v for v in _all(group.problem, peers, device) if only is None or v.name in only]
    rows = measure_group(
        group, variants, dtype=dtype, device=device, ceilings=ceilings, protocol=suite.protocol
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _all(problem: Problem, peers: Peers, device: torch.device) -> list[Variant]:
    """Peers stand behind the loops."""
    variants = linear_variants(problem, device)
    place = next(i for i, variant in enumerate(variants) if variant.name == "packed")
    return [*variants[:place], *peers(problem), *variants[place:]]


def _named(
    asked: str | None, groups: Sequence[Group], peers: Peers, device: torch.device
) -> frozenset[str] | None:
    if asked is None:
        return None
    known = {v.name for group in groups for v in _all(group.problem, peers, device)}
    names = {name.strip() for name in asked.split(",") if name.strip()}
    if unknown := names - known:
        raise ValueError(
            f"variant {', '.join(sorted(unknown))} is unknown; choose from {', '.join(sorted(known))}"
        )
    return frozenset(names | {FROZEN, FROZEN_AGAIN, LOOP})


def _shapes(groups: Sequence[Group]) -> set[tuple[int, int, int]]:
    return {
        (group.problem.all_tokens, part.d_in, part.d_out) for group in groups for part in group.problem.parts
    }


def no_peers(reason: str, names: Sequence[str] = ("PEFT", "PEFT compiled")) -> Peers:
    """Rows that say why a peer is not measured."""
    absent = Variant("", _never, why_not=reason)
    return lambda problem: [replace(absent, name=name) for name in names]


def _never(inputs: Inputs) -> Prepared:
    raise RuntimeError("a variant that cannot run was asked to")
