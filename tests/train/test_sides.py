"""Both noise experts in one job: each trains as it would alone, and a step goes to one of them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora import WanmoeError
from wanmoe.moe_lora.adapter_file import read_adapter
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import load_dit, save_dit
from wanmoe.train.config import ObjectiveConfig
from wanmoe.train.model import side_configs
from wanmoe.train.noise import share_above
from wanmoe.train.parking import Parked
from wanmoe.train.tracking import read_metrics


@pytest.fixture(scope="module")
def high(base, tmp_path_factory):
    """Another base of the same sizes."""
    torch.manual_seed(7)
    dit = WanDiT(load_dit(base).config)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    path = tmp_path_factory.mktemp("high") / "model.safetensors"
    save_dit(dit, path)
    return path


@pytest.fixture
def both(config, high):
    config["model"] |= {"dit_high_noise": str(high)}
    config["objective"] |= {"high_share": 0.4}
    config["optimizer"] |= {"lr_high_noise": 5e-3}
    config["train"] |= {"steps": 12, "global_batch": 2, "save_every": 6, "keep": 9}
    return config


# The steps of one side of a job of two, played by a job of one: it skips what goes to the other.
ONE_SIDE = """
import math
from wanmoe.train.loop import Trainer
order = json.load(open(ORDER))
side = trainer.sides[0]
steps = [step for step, which in enumerate(order) if which == side.name]
side.steps, side.objective.steps = len(steps), len(steps)
trainer.feed.start(0, trainer.steps)
losses = {}
while trainer.step < trainer.steps:
    if trainer.step in steps:
        values, _ = trainer.train_step(side)
        losses[trainer.step - 1] = values["train/loss"]
    else:
        for _ in range(trainer.config.train.accumulation):
            trainer.feed.take(trainer.step)
        trainer.step += 1
trainer._save(last=True)
trainer.saver.wait()
result = losses
"""


@pytest.mark.parametrize("zero", [3, 1])
def test_each_model_trains_as_it_would_alone(ranks, both, high, tmp_path, zero):
    both["deepspeed"] = {"zero": zero}
    text = ranks.run(both)
    run = tmp_path / "run"
    lines = read_metrics(run)
    order = ["high" if any(key.startswith("high/train") for key in line) else "low" for line in lines]
    order = [name for name, line in zip(order, lines, strict=True) if any("train/loss" in k for k in line)]
    assert len(order) == 12 and 2 <= order.count("high") <= 8
    assert "model [high]: " in text and "t in [0.875, 1.0]" in text and "rate 0.005" in text
    (tmp_path / "order.json").write_text(json.dumps(order))
    for name in ("high", "low"):
        alone = json.loads(json.dumps(both))
        alone["model"] = {"dit": str(high) if name == "high" else both["model"]["dit"], "noise_expert": name}
        alone["optimizer"]["lr"] = 5e-3 if name == "high" else both["optimizer"]["lr"]
        del alone["optimizer"]["lr_high_noise"]
        alone["train"]["run"] = str(tmp_path / name)
        code = ONE_SIDE.replace("ORDER", repr(str(tmp_path / "order.json")))
        ranks.run(alone, code=code, result=str(tmp_path / f"{name}.json"))
        losses = {int(k): v for k, v in json.loads((tmp_path / f"{name}.json").read_text()).items()}
        key = f"{name}/train/loss"
        assert {line["step"] - 1: line[key] for line in lines if key in line} == losses
        ours, theirs = (read_adapter(path / f"adapter-{name}.safetensors") for path in (run, tmp_path / name))
        assert ours[0].noise_expert == name and ours[0].step == order.count(name)
        assert all(torch.equal(ours[1][k], value) for k, value in theirs[1].items())
    assert {key.split("/")[0] for key in lines[0]} == {"step", "high"}  # its validation comes first
    figures = {key for line in lines for key in line}
    assert {"high/val/loss", "low/val/loss", "high/train/lr", "low/train/lr"} <= figures


def test_a_resumed_job_of_two_is_bit_equal_and_nothing_frozen_is_saved(ranks, both, base, tmp_path):
    import shutil

    ranks.run(both)
    run = tmp_path / "run"
    straight = load_file(run / "resume" / "step_00000012" / "state.safetensors")
    assert not set(load_dit(base).state_dict()) & {name.split("/", 2)[2] for name in straight}
    assert {name.split("/")[0] for name in straight} == {"high", "low"}
    shutil.rmtree(run / "resume" / "step_00000012")
    assert "at step 6" in ranks.run(both)
    resumed = load_file(run / "resume" / "step_00000012" / "state.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_two_models_keep_their_shards_apart_within_a_node(ranks, both, tmp_path):
    both["train"] |= {"global_batch": 4, "steps": 6}
    both["deepspeed"] = {"zero": 3, "config": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    ranks.run(both, 4)
    both["deepspeed"] = {"zero": 0}
    both["train"]["run"] = str(tmp_path / "whole")
    ranks.run(both, 1)
    keys = ("high/train/loss", "low/train/loss")
    ours, theirs = (
        {
            (line["step"], key): line[key]
            for line in read_metrics(tmp_path / run)
            for key in keys
            if key in line
        }
        for run in ("run", "whole")
    )
    assert len(ours) == 6 and ours == {place: pytest.approx(loss, abs=1e-5) for place, loss in theirs.items()}


def test_the_models_take_turns_on_one_card(ranks, both, tmp_path):
    """The idle one waits in host memory; here the card is the host too, and the copies are counted."""
    both["deepspeed"] = {"zero": 0}
    ranks.run(both, 1)
    plain = read_adapter(tmp_path / "run" / "adapter-high.safetensors")[1]
    both["train"]["run"] = str(tmp_path / "parked")
    code = """
from wanmoe.train.parking import Parked
copies = []
enter = Parked.enter
def counted(self, device):
    copies.append(not self.here)
    enter(self, device)
Parked.enter = counted
for side in trainer.sides:
    side.parked = Parked(side.dit)
    side.leave()
trainer.fit()
result = {"entered": copies.count(True), "here": [side.parked.here for side in trainer.sides]}
"""
    ranks.run(both, 1, code=code, result=str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found["here"]) == [False, True]
    assert 4 <= found["entered"] < 14  # not at each step: a model that stays is not copied
    parked = read_adapter(tmp_path / "parked" / "adapter-high.safetensors")[1]
    assert all(torch.equal(parked[name], value) for name, value in plain.items())


def test_what_is_parked_comes_back_as_a_copy_and_what_trains_stays():
    module = torch.nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    before, bias = module.weight.clone(), module.bias.data_ptr()
    parked = Parked(module)
    parked.leave()
    away = module.weight.data_ptr()
    parked.enter(torch.device("cpu"))
    assert module.weight.data_ptr() != away and module.bias.data_ptr() == bias
    assert torch.equal(module.weight, before)
    parked.leave()
    assert module.weight.data_ptr() == away


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"noise_expert": "high"}}, "needs the low-noise model under model.dit"),
        ({"model": {"dit": None, "preset": "tiny"}}, "needs the low-noise model under model.dit"),
        ({"model": {"dit_high_noise": None, "adapter_high_noise": "x"}}, "needs model.dit_high_noise"),
        ({"train": {"accumulation": 2}}, "give train.global_batch or train.accumulation, not both"),
    ],
)
def test_settings_that_do_not_go_together(both, change, words):
    for section, keys in change.items():
        both[section] = {k: v for k, v in (both[section] | keys).items() if v is not None}
    with pytest.raises(WanmoeError, match=words):
        parse_config(both, "test")


def test_models_of_other_sizes_and_a_batch_that_does_not_divide_are_refused(ranks, both, base, tmp_path):
    from dataclasses import replace

    save_dit(WanDiT(replace(load_dit(base).config, ffn_dim=64)), tmp_path / "wide.safetensors")
    wide = both | {"model": both["model"] | {"dit_high_noise": str(tmp_path / "wide.safetensors")}}
    assert "are of different sizes or tasks" in ranks.fail(wide)
    odd = both | {"train": both["train"] | {"global_batch": 3}}
    assert "train.global_batch = 3 does not divide among 2 ranks" in ranks.fail(odd)


def test_each_side_has_its_files_and_its_rate(both, high, base):
    sides = side_configs(parse_config(both, "test"))
    assert {name: side.optimizer.lr for name, side in sides.items()} == {"high": 5e-3, "low": 1e-2}
    assert {name: side.model.dit for name, side in sides.items()} == {"high": high, "low": base}
    assert all(side.model.noise_expert == name for name, side in sides.items())


def test_the_high_side_gets_its_part_of_the_distribution_of_t():
    plain = ObjectiveConfig()
    assert share_above(0.875, plain, (0.0, 1.0)) == pytest.approx(0.125)
    assert share_above(0.875, plain, (0.75, 1.0)) == pytest.approx(0.5)
    shifted = ObjectiveConfig(t_shift=5.0)
    # t = 5 u / (1 + 4 u) lies above 0.875 from u = 7/12 on.
    assert share_above(0.875, shifted, (0.0, 1.0)) == pytest.approx(5 / 12)
