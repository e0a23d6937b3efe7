"""Batches: labels reach them, all ranks have as many, the samples do not depend on the world (trap A2)."""

import pytest
import torch

from wanmoe.moe_lora import Expert, ExpertSet, RouterConfig, WanmoeError
from wanmoe.train import ShardDataset
from wanmoe.train.data.batch import LabelGates, TrainBatches, check_labels, instrument_weights

EXPERTS = ExpertSet()


def batches(shards, rank=0, world=1, batch=2, accumulation=1, **more):
    gates = LabelGates(EXPERTS, RouterConfig(), needed=True)
    options = {"seed": 0, "balanced": False, "workers": 0} | more
    return TrainBatches(
        ShardDataset(shards), gates, batch=batch, accumulation=accumulation, rank=rank, world=world, **options
    )


def keys(made):
    return [key for batch in made for key in batch.keys]


def test_labels_and_shapes_reach_the_batch(shards):
    first = next(batches(shards)(0, 1))
    assert first.latent.shape == (2, 16, 2, 4, 4)
    assert first.pooled.shape == (2, 16) and len(first.context) == 2
    assert first.image_latent is None
    names = ("Scissors", "Hook/Electrocautery", "Suction", "Other")
    for key, row in zip(first.keys, first.rule, strict=True):
        label = int(key.split("_")[1]) % 4
        assert row.tolist() == [float(index == label) for index in range(len(names))]


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 1, 6), (2, 1, 3), (3, 2, 1), (6, 1, 1)])
def test_every_split_of_the_global_batch_sees_the_same_samples(shards, world, batch, accumulation):
    expected = [set(keys(batches(shards, batch=6)(step, step + 1))) for step in range(7)]
    for step in range(7):
        ranks = [
            keys(batches(shards, rank, world, batch, accumulation)(step, step + 1)) for rank in range(world)
        ]
        assert {len(part) for part in ranks} == {6 // world}
        assert {key for part in ranks for key in part} == expected[step]


def test_an_epoch_shows_every_clip_once_and_a_resume_goes_on_where_it_was(shards):
    whole = keys(batches(shards)(0, 9))
    assert sorted(whole[:12]) == sorted(ShardDataset(shards).keys)
    assert whole[:12] != sorted(whole[:12])
    assert keys(batches(shards)(4, 9)) == whole[8:]


def test_worker_processes_change_nothing(shards):
    assert keys(batches(shards, workers=2)(0, 5)) == keys(batches(shards)(0, 5))


def test_a_clip_without_evidence_stops_a_stage_that_routes_by_label(make_shards, tmp_path):
    unlabelled = make_shards(tmp_path / "clips", labelled=False, count=4)
    with pytest.raises(WanmoeError, match=r"sample train_00\d_abcdef01 has no instrument label"):
        next(batches(unlabelled)(0, 1))


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


def test_balanced_sampling_draws_rare_instruments_as_often(make_shards, tmp_path):
    root = make_shards(tmp_path / "clips", count=9)  # Scissors three times, the others twice
    dataset = ShardDataset(root)
    assert sum(instrument_weights(dataset)) == pytest.approx(4)
    seen = torch.zeros(4)
    for batch in batches(root, balanced=True, batch=3)(0, 12):
        seen += batch.rule.sum(0)
    assert seen.sum() == 36 and seen.max() - seen.min() <= 3
