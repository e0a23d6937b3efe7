"""`wanmoe bench engine`: what each ZeRO stage holds, moves and takes, and what the frozen prefix saves.

Three parts, each with its own table: bytes (formulas, held against real ranks at small sizes, and for A14B
formulas alone), speed (steps of real ranks, with compute, gather and loader apart) and prefix.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..kernels.bench.provenance import provenance
from ..kernels.bench.record import write_text
from ..moe_lora import AdapterConfig, WanmoeError
from ..moe_lora.wan.config import WanConfig
from ..train.config import TrainerConfig
from ..train.zero import Stage
from .bench_engine_bytes import Bytes, Model, meta_model, model_bytes
from .bench_engine_jobs import Subject, run_subjects
from .bench_engine_prefix import CPU, GPU, QUICK, measure_prefix
from .bench_engine_tables import KINDS
from .config import parse_config

FORMAT = "wanmoe-bench-engine/1"
PARTS = ("bytes", "speed", "prefix")
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
# Nodes, ranks on each and the models of a job whose bytes are modelled for A14B.
A14B_JOBS = ((1, 1, 8), (2, 1, 8), (1, 2, 8), (2, 2, 8))
TINY = Subject("tiny", WanConfig.preset("tiny"), (3, 16, 16), {"blocks": 2, "ffn_blocks": 1})
CARD = Subject("t2v-1.3B", WanConfig.preset("t2v-1.3B"), (21, 32, 32), {}, checkpointing=True)


def deep() -> Subject:
    """`tiny` of 12 blocks in A14B's proportions: as many of them within the distance of DeepSpeed's reuse."""
    from ..moe_lora.wan.block import WanBlock

    with torch.device("meta"):
        big, small = WanBlock(WanConfig.preset("t2v-A14B")), WanBlock(TINY.sizes)
    block = sum(p.numel() for p in small.parameters())
    distance = 10**9 * block // sum(p.numel() for p in big.parameters())
    return Subject(
        "tiny, 12 blocks",
        dataclasses.replace(TINY.sizes, num_layers=12),
        TINY.latent,
        {"blocks": 5, "ffn_blocks": 2},
        {"stage3_max_reuse_distance": distance, "stage3_max_live_parameters": 3 * block},
        checkpointing=True,
    )


def bench_engine(
    parts: Sequence[str],
    ranks: int,
    device: torch.device,
    *,
    quick: bool,
    argv: list[str],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Measures the parts and returns what was found, with where and by what.

    Args:
        ranks: processes that share the small model on the CPU.
        device: where the prefix is measured, and with a GPU also the speed of training steps.

    Raises:
        WanmoeError: an unknown part, or a rank failed.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise WanmoeError(f"bench engine has no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    result: dict[str, Any] = {
        "format": FORMAT,
        "provenance": provenance(device, argv),
        "deepspeed": _deepspeed_version(),
    }
    gpu = device.type == "cuda"
    held: list[dict[str, Any]] = []
    speed: list[dict[str, Any]] = []
    # The small model on the CPU is there for its bytes; its speed is told where there is no other.
    if "bytes" in parts or ("speed" in parts and not gpu):
        steps = 0 if "speed" not in parts else 2 if quick else 5
        held, speed = _small(ranks, steps, quick, say)
    if "bytes" in parts:
        say("A14B on the meta device")
        result |= {"measured": held, "modelled": modelled()}
    if "speed" in parts:
        rows = _card(device, quick, say) if gpu else []
        why_not = None if gpu else "No GPU: training steps on one were not measured."
        result |= {"speed": speed + rows, "no_gpu": why_not}
    if "prefix" in parts:
        say("prefix and full graph")
        setting = GPU if gpu else QUICK if quick else CPU
        result["prefix"] = measure_prefix(setting, device)
    return result


def _small(
    ranks: int, steps: int, quick: bool, say: Callable[[str], object]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What real ranks on the CPU held and moved beside the formulas, and how long their steps took."""
    stages: tuple[Stage, ...] = (0, 1, 3) if quick else STAGES
    jobs: list[tuple[list[tuple[Subject, tuple[Stage, ...]]], int]] = [
        ([(TINY, stages), (deep(), (3,))], ranks)
    ]
    if not quick:  # two nodes, as far as DeepSpeed can tell
        jobs.append(([(TINY, (3,))], 2 * ranks))
    held, speed = [], []
    for wanted, world in jobs:
        say(f"ZeRO {', '.join(map(str, wanted[0][1]))} on {world} ranks (CPU)")
        timed = steps if world == ranks else 0
        found = run_subjects(wanted, world, ranks, timed)
        for subject, chosen in wanted:
            for stage in chosen:
                parsed = parse_config(subject.config(Path(), stage), "bench engine")
                model = meta_model(subject.sizes, parsed.adapter, parsed)
                formula = model_bytes(model, stage, world, ranks)
                own = found[subject.name, stage]
                held.append(_beside(subject, stage, world, ranks, formula, own))
                if timed:
                    speed.append(_speed_row(subject, stage, world, "CPU", own))
    return held, speed


def _beside(
    subject: Subject, stage: int, world: int, local: int, formula: Bytes, found: list[dict[str, Any]]
) -> dict[str, Any]:
    measured = []
    for rank in found:
        states, moved = rank["states"][0], rank["moved"][0]
        measured.append(
            {kind: (states | moved)[kind] for kind in KINDS}
            | {"gathered": moved["gather"] + moved["gather in node"], "in_node": moved["gather in node"]}
            | {"all_reduced": moved["all-reduce"], "scattered": moved["scatter"]}
            | {"peak": moved["peak"], "rest": states["rest"]}
        )
    expected = formula.as_dict() | {"in_node": formula.gathered_in.get("node", 0)}
    return {
        "subject": subject.name,
        "stage": stage,
        "ranks": world,
        "local": local,
        "modelled": expected,
        "measured": measured,
        "equal": all(one[key] == expected[key] for one in measured for key in one if key != "rest"),
        "steps_alike": all(rank["moved"][0] == rank["moved"][1] for rank in found),
    }


def _speed_row(
    subject: Subject, stage: int, world: int, device: str, found: list[dict[str, Any]]
) -> dict[str, Any]:
    """The slowest rank's medians: a step ends when all ranks have it."""
    step = max(statistics.median(rank["free_s"]) for rank in found)
    slowest = max(found, key=lambda rank: statistics.median(rank["free_s"]))["apart_s"]
    apart = {key: statistics.median(one[key] for one in slowest) for key in slowest[0]}
    return {
        "subject": subject.name,
        "device": device,
        "stage": stage,
        "ranks": world,
        "tokens": subject.tokens,
        "step_s": step,
        "tokens_per_s": world * subject.tokens / step,
        "apart": apart | {"compute": apart["whole"] - apart["gather"] - apart["reduce"] - apart["loader"]},
        "peak_memory": max((rank["peak_memory"] or 0) for rank in found) or None,
        "raw": [{"free_s": rank["free_s"], "apart_s": rank["apart_s"]} for rank in found],
    }


def _card(device: torch.device, quick: bool, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Steps of real ranks, one per GPU of this machine; with one GPU there is nothing to gather."""
    ranks = torch.cuda.device_count()
    stages: tuple[Stage, ...] = (1, 3) if ranks > 1 else (0, 3)
    say(f"{CARD.name} on {ranks} GPU{'s' * (ranks > 1)}")
    found = run_subjects([(CARD, stages)], ranks, ranks, 3 if quick else 10, gpu=True, workers=2)
    name = torch.cuda.get_device_name(device)
    return [_speed_row(CARD, stage, ranks, name, found[CARD.name, stage]) for stage in stages]


def modelled() -> list[dict[str, Any]]:
    """A14B under every stage, in bf16, stage b, the adapter as by default; nobody measured these."""
    sizes, rows = WanConfig.preset("t2v-A14B"), []
    model = meta_model(sizes, AdapterConfig(), _stage_b())
    for models, nodes, local in A14B_JOBS:
        world = nodes * local
        for stage in STAGES:
            rows.append(_a14b_row(model, stage, models, nodes, local, str(stage), local))
        if nodes > 1:
            # hpZ is what training takes here; without it every gather goes over all ranks.
            rows[-1]["zero"] = "3, hpZ"
            rows.insert(len(rows) - 1, _a14b_row(model, 3, models, nodes, local, "3", world))
    return rows


def _a14b_row(
    model: Model, stage: Stage, models: int, nodes: int, local: int, name: str, shared: int
) -> dict[str, Any]:
    world = nodes * local
    one = model_bytes(model, stage, world, shared)
    return {
        "models": models,
        "nodes": nodes,
        "ranks": world,
        "zero": name,
        "one_model": one.as_dict(),
        "states": models * one.states,
        "received": one.received(world, shared),
        "across": one.gathered_in.get("world", 0) + one.all_reduced + one.scattered,
        "deepspeed_estimate": _estimate(model, stage, models, nodes, local),
    }


def _estimate(model: Model, stage: Stage, models: int, nodes: int, local: int) -> int | None:
    """DeepSpeed's own figure for a rank without offload, where it has one."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    total = models * sum(p.numel() for p in model.module.parameters())
    where = {"num_gpus_per_node": local, "num_nodes": nodes, "cpu_offload": False}
    if stage == 2:
        return int(estimate_zero2_model_states_mem_needs(total, **where)[1])
    if stage == 3:
        layers = (sum(p.numel() for p in one.parameters(recurse=False)) for one in model.module.modules())
        found = estimate_zero3_model_states_mem_needs(total, max(layers), cpu_offload_params=False, **where)
        return int(found[1])
    return None


def _stage_b() -> TrainerConfig:
    tree = {
        "model": {"preset": "t2v-A14B"},
        "data": {"shards": "none"},
        "train": {"stage": "b", "run": "none"},
    }
    return parse_config(tree, "bench engine")


def _deepspeed_version() -> str:
    import deepspeed

    return str(deepspeed.__version__)


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """Writes the figures as JSON into `folder`/engine and returns the path."""
    stamp = result["provenance"]["utc"].replace(":", "").replace("-", "").replace("+0000", "Z")
    path = folder / "engine" / f"engine-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path
