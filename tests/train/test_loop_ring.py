"""A training run whose blocks stream from host memory is the run that it would be without."""

import json

import pytest
import torch

from wanmoe.moe_lora.adapter_file import read_adapter
from wanmoe.moe_lora.wan.weights import load_dit, save_dit
from wanmoe.train.tracking import read_metrics

STEPS = 6


def trained(ranks, config, run, world=1, **sections):
    """(losses, adapters, what it said) of a run."""
    tree = json.loads(json.dumps(config))
    tree["train"] |= {"run": str(run), "val_every": 3, "global_batch": 2}
    tree["deepspeed"] = {"zero": 0 if world == 1 else 1}
    for section, keys in sections.items():
        tree[section] = tree.get(section, {}) | keys
    text = ranks.run(tree, world)
    files = sorted(run.glob("adapter*.safetensors"))
    figures = ("train/loss", "val/loss", "low/train/loss", "high/train/loss")
    losses = [{key: line[key] for key in figures if key in line} for line in read_metrics(run)]
    return losses, [read_adapter(file)[1] for file in files], text


def same(ours, truth):
    assert ours[0] == truth[0] and any(ours[0])
    assert len(ours[1]) == len(truth[1]) > 0
    for found, expected in zip(ours[1], truth[1], strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def resident(ranks, shards, base, tmp_path_factory):
    """The run with all blocks as plain parameters, by whether the tail is computed again."""
    return {}


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_streamed_blocks_give_the_same_run_to_the_bit(
    ranks, config, resident, tmp_path, blocks, checkpointing
):
    config["train"] |= {"checkpointing": checkpointing}
    if checkpointing not in resident:
        resident[checkpointing] = trained(ranks, config, tmp_path / "resident")
    ours = trained(ranks, config, tmp_path / "ring", ring={"blocks": blocks})
    same(ours, resident[checkpointing])
    assert f"{blocks} of 3 blocks stream from" in ours[2]
    waits = [line["ring/wait_s"] for line in read_metrics(tmp_path / "ring") if "train/loss" in line]
    assert len(waits) == STEPS and all(0 <= wait < 60 for wait in waits)


def test_two_ranks_reduce_their_gradients_beside_the_ring(ranks, config, tmp_path):
    truth = trained(ranks, config, tmp_path / "resident", 2)
    same(trained(ranks, config, tmp_path / "ring", 2, ring={"blocks": 3, "slots": 3}), truth)


def test_two_ranks_of_a_quantised_base_that_stays_share_nothing(ranks, config, tmp_path):
    one = trained(ranks, config, tmp_path / "one", model={"quantised": "int8"}, data={"batch": 2})
    two = trained(ranks, config, tmp_path / "two", 2, model={"quantised": "int8"})
    assert "in int8: relative error of its weights" in two[2]
    for found, expected in zip(two[0], one[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_both_noise_experts_take_turns_in_one_ring(ranks, config, base, tmp_path):
    torch.manual_seed(1)
    other = load_dit(base)
    for parameter in other.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    save_dit(other, tmp_path / "high.safetensors")
    config["model"] |= {"dit_high_noise": str(tmp_path / "high.safetensors")}
    config["objective"] |= {"high_share": 0.5}
    truth = trained(ranks, config, tmp_path / "resident")
    same(trained(ranks, config, tmp_path / "ring", ring={"blocks": 2}), truth)
    assert len(truth[1]) == 2


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_quantised_base_trains_close_to_the_plain_one_and_says_its_error(ranks, config, tmp_path, blocks):
    truth = trained(ranks, config, tmp_path / "plain")
    ours = trained(ranks, config, tmp_path / "fp8", ring={"blocks": blocks}, model={"quantised": "fp8"})
    for found, expected in zip(ours[0], truth[0], strict=True):
        assert (found == pytest.approx(expected, rel=0.02) and found != expected) or not expected
    assert "base in fp8: relative error of its weights 2." in ours[2]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"ring": {"blocks": 4}}, "ring.blocks = 4: the model has 3 blocks"),
        ({"ring": {"blocks": 2}, "deepspeed": {"zero": 3}}, "leave deepspeed.zero out"),
        ({"model": {"quantised": "fp8"}, "deepspeed": {"zero": 3}}, "leave deepspeed.zero out"),
    ],
)
def test_what_does_not_go_together_is_one_clear_line(ranks, config, sections, said):
    config["deepspeed"] = {}
    for section, keys in sections.items():
        config[section] = config.get(section, {}) | keys
    assert said in ranks.fail(config, 1)
