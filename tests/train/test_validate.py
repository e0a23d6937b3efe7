"""Held-out loss: the same noise for every model, every clip counted once."""

import pytest
import torch

from wanmoe.moe_lora import AdapterConfig, ExpertSet, RouterConfig, attach, save_adapter
from wanmoe.moe_lora.wan.weights import load_dit
from wanmoe.train import ShardDataset
from wanmoe.train.data.batch import LabelGates
from wanmoe.train.evaluate import evaluate, evaluate_files, held_out_gates
from wanmoe.train.routed import Routed
from wanmoe.train.validate import LEVELS, held_out_errors, levels_within

GATES = LabelGates(ExpertSet(), RouterConfig(), needed=True)


def routed(v, batch):
    return Routed(v, batch.rule, batch.rule, None, None)


def test_a_model_that_knows_the_answer_has_no_loss_and_one_that_says_nothing_has_that_of_the_target(shards):
    dataset = ShardDataset(shards, "val")
    latents = {dataset[i].key: dataset[i].latent for i in range(len(dataset))}

    def oracle(x_t, t, batch):
        x0 = torch.stack([latents[key] for key in batch.keys])
        return routed((x_t - x0) / t.view(-1, 1, 1, 1, 1), batch)

    assert held_out_errors(oracle, dataset, GATES).loss.max() < 1e-6
    nothing = held_out_errors(lambda x_t, t, batch: routed(torch.zeros_like(x_t), batch), dataset, GATES)
    assert nothing.loss.shape == (4, len(LEVELS)) and nothing.loss.min() > 0.5
    assert torch.equal(nothing.gates, torch.eye(4))


def test_the_error_of_the_region_is_that_of_its_cells_alone(shards):
    dataset = ShardDataset(shards, "val")
    wrong = torch.zeros(4, 16, 2, 4, 4)
    for index in range(4):
        wrong[index, :, dataset[index].roi > 0] = 2.0

    def predict(x_t, t, batch):
        x0 = batch.latent.float()
        off = wrong[[dataset.keys.index(key) for key in batch.keys]]
        return routed((x_t - x0) / t.view(-1, 1, 1, 1, 1) + off, batch)

    found = held_out_errors(predict, dataset, GATES, batch=3)
    torch.testing.assert_close(found.roi, torch.full((4, 9), 4.0), atol=1e-4, rtol=0)
    share = torch.stack([(dataset[index].roi > 0).float().mean() for index in range(4)])
    torch.testing.assert_close(found.loss[:, 0], 4.0 * share, atol=1e-4, rtol=0)


def test_a_clip_without_a_region_has_no_error_of_it(make_shards, tmp_path):
    bare = ShardDataset(make_shards(tmp_path / "bare", marks=False), "val")
    found = held_out_errors(lambda x, t, batch: routed(torch.zeros_like(x), batch), bare, GATES)
    assert not found.has_region.any() and found.read.all() and found.loss.min() > 0


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_noise_does_not_depend_on_the_batch_size(shards, batch):
    dataset = ShardDataset(shards, "val")

    def predict(x_t, t, batch):
        return routed(x_t * t.view(-1, 1, 1, 1, 1), batch)

    expected = held_out_errors(predict, dataset, GATES, batch=2)
    torch.testing.assert_close(held_out_errors(predict, dataset, GATES, batch=batch), expected)


def test_levels_of_a_side():
    """Nine fixed quantiles of t, wherever the boundary lies."""
    assert levels_within((0.0, 1.0)) == LEVELS and len(LEVELS) == 9
    assert levels_within((0.875, 1.0)) == (0.8875, 0.9, 0.9125, 0.925, 0.9375, 0.95, 0.9625, 0.975, 0.9875)
    low = levels_within((0.0, 0.875))
    assert len(low) == 9 and low[0] == 0.0875 and low[-1] == 0.7875


def test_every_clip_is_measured_with_every_expert(base, shards, tmp_path):
    """With random experts each column differs, and that of the clip's own label is its plain loss."""
    dit = load_dit(base)
    adapter = attach(dit, AdapterConfig(blocks=2), RouterConfig(mode="learned"))
    for parameter in adapter.parameters(("experts",)).values():
        torch.nn.init.normal_(parameter, std=0.2)
    path = save_adapter(adapter, tmp_path / "b.safetensors", stage="b", step=1)
    figures = evaluate_files(base, shards, path, wrong_expert=True)
    frozen = evaluate_files(base, shards, None, wrong_expert=False)
    assert set(figures["by_expert"]) == set(figures["by_instrument"]) == set(adapter.experts.names)
    for label, row in figures["by_expert"].items():
        assert row[label] == pytest.approx(figures["by_instrument"][label])
        assert len({round(loss, 6) for loss in row.values()}) == 4
    assert figures["loss"] == pytest.approx(sum(figures["by_instrument"].values()) / 4)
    assert figures["loss"] != pytest.approx(frozen["loss"], rel=1e-5)
    assert figures["by_t"]["0.1"] == pytest.approx(frozen["by_t"]["0.1"])  # experts are off below t = 0.2
    gates = held_out_gates(path, ShardDataset(shards, "val"))
    assert all(sum(row) == pytest.approx(1) for row in gates["router"].values())
    # The captions of these clips name no instrument: the rule router has no evidence.
    assert all(sum(row) == 0 for row in gates["rule"].values())


def test_one_side_is_measured_at_its_own_levels_with_the_same_noise(base, shards, tmp_path):
    adapter = attach(load_dit(base), AdapterConfig(blocks=2))
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="a", step=1, noise_expert="high")
    side, whole = evaluate_files(base, shards, path, False), evaluate_files(base, shards, None, False)
    assert list(side["by_t"])[:2] == ["0.8875", "0.9"] and len(side["by_t"]) == 9
    assert side["by_t"]["0.9"] == pytest.approx(whole["by_t"]["0.9"])  # a fresh adapter is the frozen model


def test_the_frozen_model_needs_no_adapter(base, shards):
    figures = evaluate(load_dit(base), None, ShardDataset(shards, "val"), "pretrain")
    assert figures["clips"] == 4 and set(figures["by_t"]) == {str(level) for level in LEVELS}
