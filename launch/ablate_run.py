"""Running an ablation: trainings that rows share once, as soon as what they need is there, then figures."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from ..kernels.bench.provenance import provenance
from ..moe_lora import WanmoeError
from ..moe_lora.files import file_sha256, write_atomic
from ..moe_lora.wan.weights import dit_hash
from ..train.stages import STAGES, stage_name
from .ablation import Plan
from .ablation_figures import Figure, Measured, judged, measure
from .ablation_shared import Node, Shared, train
from .evaluation_run import open_run

FORMAT = "wanmoe-ablation/1"


@dataclass
class _Work:
    """What is still to do: trainings by key, and rows with their last training."""

    nodes: dict[str, Node] = field(default_factory=dict)
    rows: dict[tuple[str, int], list[str]] = field(default_factory=dict)


def run_ablation(
    plan: Plan,
    out: Path,
    jobs: int,
    device: torch.device,
    argv: list[str],
    say: Callable[[str], object],
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Trains and measures every row with every seed; what lies in `out` already is not made again.

    Args:
        jobs: trainings at a time on the CPU; on a card they take turns.
        names: rows to run; default all. Others that an earlier call has measured stay in the result.

    Returns the result as `table` takes it, of the rows that succeeded, with `failed` by row. Raises
    WanmoeError for a folder of another ablation, where clips, base or judges cannot be made, and where a
    worker was killed.
    """
    began = time.monotonic()
    shared = Shared(plan, out, device)
    shared.claim()
    jobs = 1 if device.type == "cuda" else jobs
    rows = [name for name in plan.rows if names is None or name in names]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(jobs,)) as pool:
        try:
            say("clips, base and judges")
            list(pool.map(shared.make_clips, plan.spec.scenes))
            for maker in [pool.submit(make) for make in shared.makers()]:
                maker.result()
            rows = [name for name in plan.rows if name in rows or _measured(shared, name)]
            done, failed = _run_all(shared, _work(shared, rows), pool, jobs, say)
        except BrokenProcessPool as error:
            raise WanmoeError(
                "a worker was killed, as the system does when memory is short: take fewer --jobs; the same "
                "command goes on from here"
            ) from error
        except (WanmoeError, KeyboardInterrupt) as error:
            why = str(error) or "interrupted; the same command goes on from here"
            say(f"{why}; ending what still runs")
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {
        "format": FORMAT,
        "name": plan.spec.name,
        "reference": plan.reference,
        "provenance": provenance(torch.device("cpu"), argv),
        "seeds": list(range(plan.spec.seeds)),
        "figures": plan.spec.figures,
        "axes": {name: plan.axes[name] for name in rows},
        "rows": {name: done[name] for name in rows if name in done},
        "failed": failed,
        "recipes": {name: [step.model_dump() for step in plan.rows[name]] for name in rows},
        "scenes": {name: scenes.model_dump() for name, scenes in plan.spec.scenes.items()},
        "judges": judged(shared.judge, shared.detector if shared.finds_tips else None),
        "commits": sorted(
            {one for rows_ in done.values() for row in rows_.values() for one in row["commits"]}
        ),
        "minutes": (time.monotonic() - began) / 60,
    }


def _measured(shared: Shared, name: str) -> bool:
    """Whether nothing is left to train of a row that an earlier call has measured."""
    work = _work(shared, [name])
    rows = all(shared.row(name, seed).exists() for _, seed in work.rows)
    return rows and all(shared.is_made(key) for key in work.nodes)


def _work(shared: Shared, rows: Sequence[str]) -> _Work:
    """Every training once, whichever rows it belongs to."""
    work = _Work()
    for seed in range(shared.plan.spec.seeds):
        for name in rows:
            steps = shared.plan.rows[name]
            if not steps and seed:  # the base alone is the same with every seed
                continue
            before: str | None = None
            chain = []
            experts = shared.experts_of(steps)
            for step in steps:
                key = shared.key(step, seed, before, experts)
                work.nodes[key] = Node(key, step, seed, before, experts)
                chain.append(key)
                before = key
            work.rows[name, seed] = chain
    return work


def _run_all(
    shared: Shared,
    work: _Work,
    pool: ProcessPoolExecutor,
    jobs: int,
    say: Callable[[str], object],
) -> tuple[dict[str, dict[int, dict[str, Any]]], dict[str, str]]:
    """Trainings and figures as soon as what they need is there; a failure costs the rows that need it."""
    waits = {key for key in work.nodes if not shared.is_made(key)}
    rows = dict(work.rows)
    running: dict[Future[Any], tuple[str, Any]] = {}
    going: set[str] = set()
    broken: dict[str, str] = {}
    done: dict[str, dict[int, dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    say(f"{len(work.nodes)} trainings, {len(work.nodes) - len(waits)} of them there; {len(rows)} rows")
    while waits or rows or running:
        for row, chain in list(rows.items()):
            if fault := next((broken[key] for key in chain if key in broken), None):
                failed[f"{row[0]}, seed {row[1]}"] = fault
                say(f"{row[0]}, seed {row[1]}: {fault}")
                del rows[row]
            elif waits.isdisjoint(chain) and len(running) < jobs:
                running[pool.submit(measure_row, shared, *row, chain)] = ("row", row)
                del rows[row]
        ready = [key for key in work.nodes if key in waits - going and work.nodes[key].before not in waits]
        for key in ready[: max(0, jobs - len(running))]:
            running[pool.submit(train_node, shared, work.nodes[key])] = ("node", key)
            going.add(key)
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            kind, what = running.pop(future)
            try:
                found = future.result()
            except WanmoeError as error:
                if kind == "node":
                    _break(what, str(error), work, broken, waits)
                else:
                    failed[f"{what[0]}, seed {what[1]}"] = str(error)
                    say(f"{what[0]}, seed {what[1]}: {error}")
                continue
            if kind == "node":
                waits.discard(what)
                node = work.nodes[what]
                say(f"trained {node.step.use} ({what}), seed {node.seed}: {found:.0f} s")
            else:
                done.setdefault(what[0], {})[what[1]] = found
                say(f"{what[0]}, seed {what[1]}: " + _line(found["figures"]))
    return done, failed


def _break(key: str, fault: str, work: _Work, broken: dict[str, str], waits: set[str]) -> None:
    """Marks a training that failed, and all that would have come after it."""
    broken[key] = fault
    waits.discard(key)
    for other in work.nodes.values():
        if other.before == key and other.key not in broken:
            _break(other.key, fault, work, broken, waits)


def _line(figures: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{key} {figure['value']:.4g}" for key, figure in figures.items())


def train_node(shared: Shared, node: Node) -> float:
    """One training, gone on with where it was cut off; returns its seconds."""
    began = time.monotonic()
    folder = shared.stage(node.key)
    config = shared.config(node)
    folder.parent.mkdir(parents=True, exist_ok=True)
    train(config, folder.with_suffix(".toml"), shared.device)
    seconds = time.monotonic() - began
    made = {"commit": _commit(), "seconds": seconds, "seed": node.seed}
    text = json.dumps(made, indent=1)
    write_atomic(folder / "made.json", lambda partial: partial.write_text(text))
    return seconds


def measure_row(shared: Shared, name: str, seed: int, chain: Sequence[str]) -> dict[str, Any]:
    """The figures of a row with one seed; those that are there of the same files are taken."""
    spec, path = shared.plan.spec, shared.row(name, seed)
    tips = shared.detector if shared.finds_tips else None
    files = [shared.judge, *([tips] if tips else [])]
    facts = {
        "format": FORMAT,
        "chain": list(chain),
        "base": dit_hash(shared.base),
        "files": [file_sha256(file) for file in files],
        "figures": spec.figures,
        "clips": [shared.fingerprint(one) for one in (spec.measure, spec.pairs) if one is not None],
        "vae": spec.vae,
    }
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found.get("of") == facts:
            return found
    adapter = shared.adapter(chain[-1]) if chain else None
    trained = {part for key in chain for part in _parts(shared, key)}
    on = Measured(
        shared.shards(spec.measure),
        None if spec.pairs is None else shared.shards(spec.pairs),
        shared.judge,
        shared.classifier(shared.experts_of(shared.plan.rows[name])),
        tips,
        spec.vae,
        shared.device,
    )
    figures = measure(spec.figures, shared.base, adapter, on, trained)
    made = [json.loads((shared.stage(key) / "made.json").read_text()) for key in chain]
    if "train_s" in spec.figures:
        figures["train_s"] = Figure(sum(one["seconds"] for one in made))
    row = {
        "figures": {key: figure._asdict() for key, figure in figures.items()},
        "commits": sorted({one["commit"] for one in made} | {_commit()}),
        "of": facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(row)
    write_atomic(path, lambda partial: partial.write_text(text))
    return row


def _parts(shared: Shared, key: str) -> set[Any]:
    return set(STAGES[stage_name(open_run(shared.stage(key)).config)].trains)


def _commit() -> str:
    commit = provenance(torch.device("cpu"), [])["commit"] or {"hash": "unknown", "dirty": False}
    return str(commit["hash"]) + ("-dirty" if commit["dirty"] else "")


def _start_worker(jobs: int) -> None:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would go on training for hours."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)
