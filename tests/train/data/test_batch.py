"""Batches: labels reach them (trap A2), and a clip without one is refused where it is needed."""

import pytest
import torch

from wanmoe.moe_lora import Expert, ExpertSet, RouterConfig, WanmoeError
from wanmoe.train import ShardDataset
from wanmoe.train.data.batch import LabelGates, check_labels, collate, instrument_weights

EXPERTS = ExpertSet()


def test_labels_and_shapes_reach_the_batch(shards):
    dataset = ShardDataset(shards)
    batch = collate([dataset[3], dataset[7]], [5, 6], LabelGates(EXPERTS, RouterConfig(), needed=True))
    assert batch.latent.shape == (2, 16, 2, 4, 4) and batch.latent.dtype == torch.float16
    assert batch.pooled.shape == (2, 16) and len(batch.context) == 2 and batch.positions == [5, 6]
    assert batch.image_latent is None and batch.faults == []
    for key, row in zip(batch.keys, batch.rule, strict=True):
        label = int(key.split("_")[1]) % 4
        assert row.tolist() == [float(index == label) for index in range(4)]


def test_a_label_that_no_expert_has_names_sample_and_nearest():
    gates = LabelGates(ExpertSet([Expert(name="milk")]), RouterConfig(), needed=True)
    with pytest.raises(WanmoeError, match=r"sample k: unknown expert 'silk'; nearest is 'milk'"):
        gates("k", [("silk", 1.0)])
    free = LabelGates(ExpertSet([Expert(name="milk")]), RouterConfig(), needed=False)
    assert torch.equal(free("k", [("silk", 1.0)]), torch.zeros(1))


def test_several_labels_keep_their_weights():
    gates = LabelGates(EXPERTS, RouterConfig(top_k=2), needed=True)
    labels = [("Scissors", 0.5), ("Suction", 0.3), ("Other", 0.2)]
    assert gates("k", labels).tolist() == pytest.approx([0.5, 0, 0.3, 0.2])


def test_all_labels_are_checked_before_the_first_step(shards, make_shards, tmp_path):
    experts = ExpertSet([*EXPERTS.experts, Expert(name="Stapler")])
    gates = LabelGates(experts, RouterConfig(), needed=True)
    assert check_labels(ShardDataset(shards), gates) == ["Stapler"]
    unlabelled = make_shards(tmp_path / "clips", labelled=False, count=4)
    with pytest.raises(WanmoeError, match=r"sample train_000_abcdef01 has no instrument label"):
        check_labels(ShardDataset(unlabelled), gates)
    fallback = LabelGates(ExpertSet(fallback="Other"), RouterConfig(), needed=True)
    assert check_labels(ShardDataset(unlabelled), fallback) == ["Scissors", "Hook/Electrocautery", "Suction"]


def test_sampling_weights_make_instruments_equal(make_shards, tmp_path):
    dataset = ShardDataset(make_shards(tmp_path / "clips", count=9))  # Scissors three times, others twice
    weights = instrument_weights(dataset)
    assert sum(weights) == pytest.approx(4) and weights[0] == pytest.approx(1 / 3)
