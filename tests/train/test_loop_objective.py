"""The joint stage with every term, on two ranks: what it logs, one rank against two, resume, the
early stop."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from wanmoe.launch.config import parse_config
from wanmoe.launch.preflight import preflight
from wanmoe.moe_lora import AdapterConfig, RouterConfig, WanmoeError, attach, load_dit, save_adapter
from wanmoe.moe_lora.adapter_file import read_adapter
from wanmoe.moe_lora.instruments import SURGICAL
from wanmoe.train import meter
from wanmoe.train.tracking import read_metrics

NAMES = [expert.name for expert in SURGICAL]
TERMS = ("diffusion", "roi", "identity", "temporal", "entropy", "balance", "teacher_kl", "orthogonality")


def joint(base, shards, classifier, run, ranks, accumulation):
    """Base, experts and router from the start, with every term; 18 steps of 4 clips from 6 epochs."""
    return {
        "model": {"dit": str(base)},
        "adapter": {"blocks": 2, "ffn_blocks": 1, "rank_base": 6},
        "router": {"mode": "learned", "time_gate": "learned", "logit_noise": 0.1, "floor": 0.1},
        "data": {"shards": str(shards), "batch": 1, "workers": 0},
        "objective": {"classifier": str(classifier), "orthogonality": 0.1, "t_sampling": "shift"},
        "optimizer": {"lr": 1e-2, "base_lr": 5e-3, "router_lr": 2e-2},
        "train": {
            "stage": "b",
            "train_router": True,
            "run": str(run),
            "epochs": 6,
            "accumulation": accumulation,
            "log_every": 1,
            "save_every": 9,
            "val_every": 9,
        },
        "deepspeed": {"zero": 3},
        "tracking": {"enabled": False},
        "launch": {"ranks": ranks},
    }


@pytest.fixture(scope="module")
def done(ranks, base, shards, classifier, tmp_path_factory):
    root = tmp_path_factory.mktemp("joint")
    tree = joint(base, shards, classifier, root / "two", 2, 2)
    return root, tree, ranks.run(tree)


def lines_of(run):
    return [line for line in read_metrics(run) if "train/loss" in line]


def test_the_run_says_its_terms_and_steps_and_logs_each_of_them(done):
    root, _, output = done
    terms = "1 diffusion + 3 roi + 0.5 identity + 0.5 temporal + 0.01 entropy"
    assert f"18 steps at rate 0.01 of {terms}" in output
    lines = lines_of(root / "two")
    assert len(lines) == 18
    weights = dict(zip(TERMS, (1, 3, 0.5, 0.5, 0.01, 0.05, 1, 0.1), strict=True))
    for line in lines:
        assert all(math.isfinite(line[f"train/{term}"]) for term in TERMS)
        total = sum(weight * line[f"train/{term}"] for term, weight in weights.items())
        total += line["train/teacher_kl_prompts"]  # weighs as teacher_kl
        assert line["train/loss"] == pytest.approx(total, rel=1e-4)
        parts = [line[f"train/grad_norm/{part}"] for part in ("base", "experts", "time_gate", "router")]
        assert math.hypot(*parts) == pytest.approx(line["train/grad_norm"], rel=1e-3)
        assert sum(line[f"t/{n / 10:.1f}"] for n in range(10)) == pytest.approx(1)
    assert {f"train/roi/{name}" for name in NAMES} <= {key for line in lines for key in line}
    told = [line for line in lines if "load/entropy" in line]
    assert len(told) == 18 * 4 // (meter.CLIPS * 4) >= 1
    assert sum(told[0][f"load/{name}"] for name in NAMES) == pytest.approx(1)
    (last,) = [line for line in read_metrics(root / "two") if line["step"] == 18 and "val/loss" in line]
    assert {"val/roi", "val/loss_t0.5", "val/loss/Suction", "val/loss_t0.9/Other"} <= set(last)
    assert (root / "two" / "plots" / "gates-000018.png").exists()


def test_base_experts_router_and_time_gate_are_in_the_file_and_have_moved(done):
    info, tensors = read_adapter(done[0] / "two" / "adapter.safetensors")
    assert info.stage == "b+base+router" and info.router.floor == 0.1
    assert all(value.any() for name, value in tensors.items() if name.endswith("_up"))
    assert tensors["blocks.2.self_attn.q.base_down"].shape[0] == 6
    assert not torch.equal(tensors["router.time_center"], torch.full((4,), 0.35))


def test_one_rank_with_four_forwards_trains_like_two_with_two(done, ranks, base, shards, classifier):
    root, _, _ = done
    tree = joint(base, shards, classifier, root / "one", 1, 4)
    ranks.run(tree)
    for one, two in zip(lines_of(root / "one"), lines_of(root / "two"), strict=True):
        for key in ("train/loss", "train/teacher_kl_prompts", *(f"train/{term}" for term in TERMS)):
            assert one[key] == pytest.approx(two[key], rel=2e-4, abs=2e-6), (one["step"], key)


def test_a_resumed_joint_run_is_bit_equal_to_a_straight_one(done, ranks):
    root, tree, _ = done
    run = root / "again"
    shutil.copytree(root / "two", run)
    shutil.rmtree(run / "resume" / "step_00000018")
    tree = json.loads(json.dumps(tree))
    tree["train"]["run"] = str(run)
    assert "at step 9" in ranks.run(tree)
    straight, resumed = (
        load_file(folder / "resume" / "step_00000018" / "state.safetensors") for folder in (root / "two", run)
    )
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    assert [line["train/loss"] for line in lines_of(run)] == [
        line["train/loss"] for line in lines_of(root / "two")
    ]


def test_the_joint_stage_runs_in_bf16_with_recomputation(ranks, base, shards, classifier, tmp_path):
    tree = joint(base, shards, classifier, tmp_path / "run", 2, 1)
    tree["train"] |= {"epochs": 1, "precision": "bf16", "checkpointing": True, "val_every": 0}
    output = ranks.run(tree)
    assert "skipped" not in output
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 6 and all(math.isfinite(line[f"train/{term}"]) for line in lines for term in TERMS)
    tensors = read_adapter(tmp_path / "run" / "adapter.safetensors")[1]
    assert not torch.equal(tensors["router.time_center"], torch.full((4,), 0.35))


def test_an_early_stop_by_a_region_that_no_clip_has_is_refused_before_the_start(
    config, make_shards, tmp_path
):
    config["data"]["shards"] = str(make_shards(tmp_path / "bare", marks=False))
    config["train"] |= {"val_every": 2, "early_stop": "val/roi"}
    with pytest.raises(WanmoeError, match=r'no held-out clip of .*bare has a region; set it to "val/loss"'):
        preflight(parse_config(config, "test"))


def test_a_router_is_not_trained_on_experts_of_stage_a(config, base, tmp_path):
    adapter = attach(load_dit(base), AdapterConfig(blocks=2, ffn_blocks=1), RouterConfig(mode="learned"))
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="a", step=1)
    config["model"]["adapter"], config["train"]["stage"] = str(path), "c"
    with pytest.raises(WanmoeError, match="is of stage a, whose experts are all zero; stage c starts from"):
        preflight(parse_config(config | {"router": {"mode": "learned"}}, "test"))


def test_an_early_stop_ends_the_run_keeps_the_best_and_stays_ended(ranks, config, tmp_path):
    """With a rate that ruins the model every validation is worse than the first."""
    config["optimizer"] = {"lr": 5.0, "warmup_steps": 0}
    config["train"] |= {"steps": 40, "val_every": 2, "early_stop": "val/roi", "patience": 2, "save_every": 0}
    output = ranks.run(config)
    assert "val/roi has not fallen below" in output and "training ends" in output
    info, tensors = read_adapter(tmp_path / "run" / "adapter.safetensors")
    last = max(line["step"] for line in read_metrics(tmp_path / "run"))
    assert last < 40 and info.step < last
    before = {name: value.clone() for name, value in tensors.items()}
    output = ranks.run(config)
    assert "is complete" in output
    after = read_adapter(tmp_path / "run" / "adapter.safetensors")[1]
    assert all(torch.equal(before[name], after[name]) for name in before)
