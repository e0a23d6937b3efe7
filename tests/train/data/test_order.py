"""The order of the samples: every epoch whole, one size per batch, the same from wherever one starts."""

import itertools
from collections import Counter

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data.order import SampleOrder


def order(n: int, global_batch: int = 1, seed: int = 0, weights: list[float] | None = None) -> SampleOrder:
    return SampleOrder([range(n)], global_batch=global_batch, seed=seed, weights=weights)


def test_every_epoch_is_a_permutation_and_each_another() -> None:
    n = 23
    epochs = [[order(n, seed=7)[e * n + i] for i in range(n)] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [order(n, seed=8)[i] for i in range(n)] != epochs[0]
    # The same bits for ever: a run that is resumed after an update goes on as it began.
    assert [order(6)[i] for i in range(12)] == [4, 5, 3, 1, 0, 2, 2, 1, 4, 0, 3, 5]


def test_the_order_does_not_depend_on_ranks_or_on_where_a_run_starts() -> None:
    n, seed, world = 10, 3, 4
    batches = [order(n, 8, seed).batch(step) for step in range(15)]
    flat = [index for batch in batches for index in batch]
    assert flat == [i for s in range(30) for i in order(n, 4, seed).batch(s)]
    assert set(Counter(flat).values()) == {12}
    ranks = [[batch[rank::world] for batch in batches] for rank in range(world)]
    assert all(len(part) == 2 for rank in ranks for part in rank), "equal counts on all ranks"


@pytest.mark.parametrize("sizes", [(5,), (7, 3), (40, 1, 9), (2, 2, 2, 2), (100, 60)])
@pytest.mark.parametrize("global_batch", [1, 3, 8])
def test_a_batch_has_one_size_and_every_sample_comes_equally_often(
    sizes: tuple[int, ...], global_batch: int
) -> None:
    ends = list(itertools.accumulate(sizes, initial=0))
    buckets = [range(first, last) for first, last in itertools.pairwise(ends)]
    whole = SampleOrder(buckets, global_batch=global_batch, seed=1)
    epochs = 24  # after which every bucket here has given whole batches alone
    steps = sum(sizes) * epochs // global_batch
    seen: Counter[int] = Counter()
    for step in range(steps):
        batch = whole.batch(step)
        assert set(batch) <= set(buckets[whole.bucket(step)])
        seen.update(batch)
        late = SampleOrder(buckets, global_batch=global_batch, seed=1)
        assert step % 17 or late.batch(step) == batch, "a start at any step gives the same"
    assert seen == Counter({index: epochs for index in range(sum(sizes))})


def test_an_epoch_takes_what_is_full_and_the_next_begins_with_the_rest() -> None:
    both = SampleOrder([range(5), range(5, 9)], global_batch=3, seed=0)
    first = [index for step in range(2) for index in both.batch(step)]  # 5 // 3 and 4 // 3 batches
    assert len(set(first)) == 6
    rest = set(range(9)) - set(first)
    second = [index for step in range(2, 6) for index in both.batch(step)]  # 10 // 3 - 1 and 8 // 3 - 1: 3
    assert rest <= set(second)


def test_a_replacement_comes_from_the_same_bucket_and_is_always_the_same() -> None:
    both = SampleOrder([range(5), range(5, 9)], global_batch=3, seed=0)
    for position in range(60):
        own = both.buckets[both.bucket(position // 3)]
        chain = [both.replacement(position, attempt) for attempt in range(len(own))]
        assert sorted(chain) == list(own) and chain[0] == both[position]


def test_weights_set_how_often_a_sample_comes() -> None:
    n, weights = 12, [3.0] * 2 + [1.0] * 6 + [0.0] * 4
    counts = Counter(order(n, seed=5, weights=weights)[i] for i in range(n * 50))
    assert sum(counts.values()) == 600 and set(counts) == set(range(8))
    assert all(abs(counts[i] - 150) <= 1 for i in (0, 1))  # 3 of 12 places in every epoch
    assert all(abs(counts[i] - 50) <= 1 for i in range(2, 8))
    even = [order(n, seed=5, weights=[0.7] * n)[i] for i in range(n)]
    assert sorted(even) == list(range(n))
    first = [order(n, seed=5, weights=weights)[i] for i in range(n)]
    again = [order(n, seed=5, weights=weights)[n + i] for i in range(n)]
    assert first != sorted(first) and first != again
    for wrong in ([1.0], [0.0] * n, [-1.0] * n, [float("nan")] * n):
        with pytest.raises(WanmoeError, match="weights"):
            order(n, weights=wrong)


def test_weights_hold_across_sizes() -> None:
    """Instruments are balanced over all buckets together, not in each alone."""
    weights = [1.0] * 80 + [4.0] * 20
    both = SampleOrder([range(70), range(70, 100)], global_batch=2, seed=2, weights=weights)
    counts = Counter(index for step in range(4000) for index in both.batch(step))
    assert abs(sum(counts[i] for i in range(80, 100)) / 8000 - 0.5) < 0.01


def test_what_cannot_be_is_named() -> None:
    for buckets, global_batch, seed in (
        ([], 1, 0),
        ([range(3), []], 1, 0),
        ([range(3)], 0, 0),
        ([range(3)], 1, -1),
    ):
        with pytest.raises(WanmoeError, match="sample order: needs"):
            SampleOrder(buckets, global_batch=global_batch, seed=seed)
    with pytest.raises(WanmoeError, match="step must be 0 or more"):
        order(3).batch(-1)


def test_the_buckets_before_a_step_are_those_of_the_steps() -> None:
    both = SampleOrder([range(50), range(50, 83)], global_batch=4, seed=3)
    every = [both.bucket(step) for step in range(120)]
    for step in (0, 1, 19, 20, 21, 120):
        assert both.buckets_before(step).tolist() == every[:step]
