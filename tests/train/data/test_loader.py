"""The batches of a rank: the same samples for any world and any workers, and none that cannot be read."""

import json

import pytest
import torch

from wanmoe.moe_lora import ExpertSet, RouterConfig, WanmoeError
from wanmoe.train import ShardDataset
from wanmoe.train.data.batch import LabelGates
from wanmoe.train.data.loader import TrainBatches
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.stream import ShardStream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
TOOL = {"name": "t", "fingerprint": "0", "stand_in": True}


def batches(shards, rank=0, world=1, batch=2, accumulation=1, stream=False, **more):
    gates = LabelGates(ExpertSet(), RouterConfig(), needed=True)
    options = {"seed": 0, "balanced": False, "workers": 0} | more
    reader = ShardStream(shards, seed=0) if stream else ShardDataset(shards)
    return TrainBatches(
        reader, gates, batch=batch, accumulation=accumulation, rank=rank, world=world, **options
    )


def keys(made):
    return [key for batch in made for key in batch.keys]


def in_order(parts):
    """The keys of all ranks' batches by their position in the sample order."""
    pairs = [pair for made in parts for b in made for pair in zip(b.positions, b.keys, strict=True)]
    positions = [position for position, _ in sorted(pairs)]
    assert positions == list(range(positions[0], positions[0] + len(positions))), "each position once"
    return [key for _, key in sorted(pairs)]


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory):
    """Clips of two lengths, 9 and 5 of them."""
    root = tmp_path_factory.mktemp("sizes") / "s"
    torch.manual_seed(0)
    with ShardWriter(root, TOOL, TOOL, max_bytes=20_000) as writer:
        for number in range(14):
            frames = 2 if number % 14 < 9 else 3
            meta = {"caption": "x", "instruments": [{"name": "Suction", "weight": 1.0}]}
            latent = torch.randn(16, frames, 4, 4)
            writer.add(f"clip_{number:02d}", "train", latent, torch.ones(2, 16), meta)
    return root


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_resume_gives_exactly_the_remaining_samples(two_sizes, world, workers):
    steps, whole = 21, in_order([batches(two_sizes, batch=4)(0, 21)])
    # Without worker processes every start is tried, with them a few: they take their time to come up.
    for start in range(steps) if workers == 0 else (0, 5):
        ranks = [
            batches(two_sizes, rank, world, 1, 4 // world, workers=workers)(start, steps)
            for rank in range(world)
        ]
        assert in_order(ranks) == whole[start * 4 :]


def test_a_resume_at_any_single_sample(two_sizes):
    whole = keys(batches(two_sizes, batch=1)(0, 40))
    for start in range(40):
        assert keys(batches(two_sizes, batch=1)(start, 40)) == whole[start:]


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 1, 6), (2, 1, 3), (3, 2, 1), (6, 1, 1)])
def test_every_split_of_the_global_batch_sees_the_same_samples(shards, world, batch, accumulation):
    expected = [set(keys(batches(shards, batch=6)(step, step + 1))) for step in range(7)]
    for step in range(7):
        ranks = [
            keys(batches(shards, rank, world, batch, accumulation)(step, step + 1)) for rank in range(world)
        ]
        assert {len(part) for part in ranks} == {6 // world}
        assert {key for part in ranks for key in part} == expected[step]


def test_all_ranks_have_one_size_in_a_step(two_sizes):
    ranks = [list(batches(two_sizes, rank, 2, 1, 2)(0, 20)) for rank in range(2)]
    sizes = [[tuple(batch.latent.shape) for batch in made] for made in ranks]
    assert sizes[0] == sizes[1] and len(set(sizes[0])) == 2
    assert all(sizes[0][i] == sizes[0][i + 1] for i in range(0, 40, 2)), "both forwards of a step"


def test_an_epoch_shows_every_clip_once(shards):
    whole = keys(batches(shards)(0, 6))
    assert sorted(whole) == sorted(ShardDataset(shards).keys) and whole != sorted(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_label_is_one_line_from_any_process(make_shards, tmp_path, workers):
    unlabelled = make_shards(tmp_path / "clips", labelled=False, count=4)
    with pytest.raises(WanmoeError, match=r"sample train_00\d_abcdef01 has no instrument label") as caught:
        next(batches(unlabelled, workers=workers)(0, 1))
    assert "\n" not in str(caught.value)


def test_balanced_sampling_draws_rare_instruments_as_often(make_shards, tmp_path):
    root = make_shards(tmp_path / "clips", count=9)  # Scissors three times, the others twice
    seen = torch.zeros(4)
    for batch in batches(root, balanced=True, batch=3)(0, 12):
        seen += batch.rule.sum(0)
    assert seen.sum() == 36 and seen.max() - seen.min() <= 3


def spoil(root, key, part="latent.safetensors"):
    """Flips a bit of a part of a sample."""
    for line in (root / "index.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["key"] == key:
            path, place = root / row["shard"], row["parts"][part]
            data = bytearray(path.read_bytes())
            data[place["offset"] + place["size"] // 2] ^= 4
            path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_replaced_by_the_next_and_named(make_shards, tmp_path, workers):
    root = make_shards(tmp_path / "clips")
    sound = keys(batches(root, batch=1)(0, 24))
    bad = [sound[3], sound[4]]  # one after the other: the first is replaced by what follows both
    for key in bad:
        spoil(root, key)
    worlds = {}
    for world in (1, 2):
        made = [
            list(batches(root, rank, world, 1, 2 // world, workers=workers, max_bad=3)(0, 12))
            for rank in range(world)
        ]
        worlds[world] = in_order(made)
        found = [fault for part in made for batch in part for fault in batch.faults]
        assert {fault.key for fault in found} == set(bad)
        assert all(f"sample {fault.key}, part latent.safetensors: altered" in fault.reason for fault in found)
        assert sum(len(batch.keys) for part in made for batch in part) == 24, "counts stay equal"
    assert worlds[1] == worlds[2], "the replacement depends on the position alone"
    assert worlds[1][3] == worlds[1][4] == sound[5]
    kept = [(mine, was) for mine, was in zip(worlds[1], sound, strict=True) if was not in bad]
    assert all(mine == was for mine, was in kept)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_in_a_row_are_an_error_that_names_the_last(make_shards, tmp_path, workers):
    root = make_shards(tmp_path / "clips")
    made = batches(root, batch=1, workers=workers, max_bad=4)
    for key in ShardDataset(root).keys:
        spoil(root, key)
    with pytest.raises(WanmoeError, match=r"5 samples in a row cannot be read, at last .*altered") as caught:
        next(made(0, 1))
    assert "\n" not in str(caught.value)


def test_without_leave_the_first_bad_sample_stops(make_shards, tmp_path):
    root = make_shards(tmp_path / "clips")
    first = keys(batches(root, batch=1)(0, 1))
    spoil(root, first[0])
    with pytest.raises(WanmoeError, match="1 samples in a row"):
        next(batches(root, batch=1)(0, 1))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_stream_goes_on_exactly_where_it_was(two_sizes, workers):
    starts = range(16) if workers == 0 else (3, 10)
    for rank in range(2):
        options = {
            "rank": rank,
            "world": 2,
            "batch": 1,
            "accumulation": 2,
            "workers": workers,
            "stream": True,
        }
        whole = [batch.keys for batch in batches(two_sizes, **options)(0, 16)]
        for start in starts:
            assert [batch.keys for batch in batches(two_sizes, **options)(start, 16)] == whole[2 * start :]


def test_a_stream_has_the_sizes_of_the_order_and_shows_every_clip_once_per_epoch(two_sizes):
    ranks = [list(batches(two_sizes, rank, 2, 1, stream=True)(0, 63)) for rank in range(2)]
    sizes = [[tuple(batch.latent.shape[2:]) for batch in made] for made in ranks]
    by_offset = [tuple(batch.latent.shape[2:]) for batch in batches(two_sizes, batch=2)(0, 63)]
    assert sizes[0] == sizes[1] == by_offset
    seen = [key for made in ranks for batch in made for key in batch.keys]
    assert {seen.count(key) for key in ShardDataset(two_sizes).keys} <= {8, 9, 10}  # of 9 epochs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_replaces_what_cannot_be_read_and_loses_no_place(make_shards, tmp_path, workers):
    root = make_shards(tmp_path / "clips")
    options = {"batch": 1, "workers": workers, "stream": True, "max_bad": 3}
    sound = keys(batches(root, **options)(0, 30))
    first = sound.index(ShardDataset(root).keys[5])
    bad = [sound[first], sound[first + 1]]
    for key in bad:
        spoil(root, key)
    made = list(batches(root, **options)(0, 30))
    assert {fault.key for batch in made for fault in batch.faults} == set(bad) and not set(bad) & set(
        keys(made)
    )
    assert all(mine == was for mine, was in zip(keys(made), sound, strict=True) if was not in bad)
    if workers == 0:
        assert keys(made)[first] == keys(made)[first + 1] == sound[first + 2]
        assert [keys(batches(root, **options)(start, 30)) for start in range(8)] == [
            keys(made)[start:] for start in range(8)
        ]


def test_a_stream_cannot_be_balanced_and_says_what_to_do(two_sizes):
    with pytest.raises(WanmoeError, match=r'data\.balanced = false, or data\.reader = "indexed"'):
        batches(two_sizes, stream=True, balanced=True)
