"""The same run under every way of holding the model: the same losses and the same adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from wanmoe.launch.config import parse_config
from wanmoe.train.data.batch import LabelGates
from wanmoe.train.data.loader import TrainBatches
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.engine import lr_factor, peak_rates
from wanmoe.train.model import load_model, ready_adapter, resolved
from wanmoe.train.noise import sample_generator
from wanmoe.train.objective import Objective
from wanmoe.train.routed import RoutedDiT
from wanmoe.train.stages import STAGES, part_of, select_trainable, stage_name
from wanmoe.train.tracking import read_metrics

STEPS, CLIPS = 20, 4


@pytest.fixture(scope="module")
def tree(shards, base):
    """Base, experts and router at once, so that every kind of parameter trains."""
    return {
        "model": {"dit": str(base)},
        "adapter": {"blocks": 2, "ffn_blocks": 1},
        "router": {"mode": "learned"},
        "data": {"shards": str(shards), "batch": 1, "workers": 0},
        "objective": {"identity": 0},
        "optimizer": {"lr": 3e-3, "router_lr": 3e-3, "warmup_steps": 2},
        "train": {"stage": "b", "train_router": True, "steps": STEPS, "global_batch": CLIPS, "log_every": 1},
        "tracking": {"enabled": False},
    }


@pytest.fixture(scope="module")
def plain(tree, lone_group, tmp_path_factory):
    """(losses, adapter) of one process without DeepSpeed: torch's AdamW and clipping, and nothing else."""
    whole = tree | {"train": tree["train"] | {"run": str(tmp_path_factory.mktemp("plain") / "run")}}
    config = parse_config(whole, "test")
    spec = STAGES[stage_name(config)]
    dit, adapter = load_model(config)
    ready_adapter(config, spec, adapter)
    config = resolved(config, adapter)
    dataset = ShardDataset(config.data.shards, "train")
    gates = LabelGates(adapter.experts, adapter.router_config, needed=True)
    batches = TrainBatches(
        dataset, gates, batch=1, accumulation=CLIPS, rank=0, world=1, seed=0, balanced=True, workers=0,
        caption_dropout=config.data.caption_dropout,
    )  # fmt: skip
    config = config.model_copy(update={"train": config.train.model_copy(update={"accumulation": CLIPS})})
    objective = Objective(
        config, spec, adapter, dataset, gates, t_range=(0.0, 1.0), global_batch=CLIPS, steps=STEPS,
        caption_dropout=config.data.caption_dropout, device=torch.device("cpu"),
    )  # fmt: skip
    trainable = select_trainable(spec, dit, adapter)
    start = {name: p.detach().clone() for name, p in trainable.items()}
    model = RoutedDiT(dit, adapter, spec)
    rates = peak_rates(config, spec)
    groups = [{"params": [p], "peak": rates[part_of(name)]} for name, p in trainable.items()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=config.optimizer.weight_decay)
    losses, made = [], batches(0, STEPS)
    for step in range(STEPS):
        factor = lr_factor(step, STEPS, config, spec)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        taken = [next(made) for _ in range(CLIPS)]
        objective.open_window(taken, adapter.router)
        total = 0.0
        for batch in taken:
            torch.manual_seed(sample_generator(0, batch.positions[0], "dropout").initial_seed())
            loss = objective(batch, step, torch.float32, lambda inputs: model(*inputs))
            (loss.total / CLIPS).backward()
            total += loss.total.item() / CLIPS
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    # A parameter that had stood still would agree with anything.
    assert all((p - start[name]).abs().max().item() > 1e-3 for name, p in trainable.items())
    return losses, {name: p.detach().clone() for name, p in trainable.items()}


# Under hpZ, as on several nodes, a rank has a shard of the whole base and one of its node's copy.
NODES = {"zero": 3, "config": {"zero_optimization": {"zero_hpz_partition_size": 2}}}


@pytest.mark.parametrize(
    ("deepspeed", "world", "shared"),
    [
        *[({"zero": zero}, world, 1) for zero, world in ((0, 1), (0, 2), (1, 2), (2, 2), (3, 2), (3, 4))],
        (NODES, 4, 1),
        *[({"zero": zero}, world, 2) for zero, world in ((1, 2), (3, 2), (3, 4))],
    ],
)
def test_every_way_of_holding_the_model_trains_the_same(
    ranks, tree, plain, tmp_path, deepspeed, world, shared
):
    run = tmp_path / "run"
    train = tree["train"] | {"run": str(run), "sequence_parallel": shared}
    text = ranks.run(tree | {"train": train, "deepspeed": deepspeed}, world)
    assert f"ZeRO-{deepspeed['zero']}, as configured" in text
    losses = [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]
    expected, adapter = plain
    assert losses == pytest.approx(expected, abs=1e-5)
    found = load_file(run / "adapter.safetensors")
    for name, value in adapter.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
    assert json.loads((run / "resume" / f"step_{STEPS:08d}" / "trainer.json").read_text())["step"] == STEPS


@pytest.mark.parametrize(("zero", "world"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_a_base_in_bf16_trains_as_it_does_without_deepspeed(ranks, tree, tmp_path_factory, zero, world):
    """What a card runs by default. Whole copies keep adapters and gradients in fp32, whatever the ZeRO stage;
    shards are of one dtype, so that there the adapters are rounded too, and agree as far as bf16 goes."""
    root = tmp_path_factory.mktemp("bf16")
    found = []
    for name, stage, count in (("one", 0, 1), ("other", zero, world)):
        train = tree["train"] | {"run": str(root / name), "precision": "bf16", "checkpointing": True}
        ranks.run(tree | {"train": train, "deepspeed": {"zero": stage}}, count)
        losses = [line["train/loss"] for line in read_metrics(root / name) if "train/loss" in line]
        found.append((losses, load_file(root / name / "adapter.safetensors")))
    (expected, adapter), (losses, other) = found
    bound = 5e-2 if zero == 3 else 1e-3
    assert losses == pytest.approx(expected, rel=bound)
    moved = sum(float((value - other[name]).square().sum()) for name, value in adapter.items()) ** 0.5
    size = sum(float(value.square().sum()) for value in adapter.values()) ** 0.5
    assert moved < bound * size
