"""The order of the samples: a function of seed and step, whatever the number of ranks and readers.

Samples of one latent size form a bucket, and the global batch of a step comes from one bucket, so that all
ranks do equal work. Each bucket is an endless concatenation of permutations, one per epoch. An epoch takes
from every bucket the whole batches that are full by then; what is left over opens the bucket's first batch of
the next epoch. So nothing is padded, nothing is dropped, and every sample is seen equally often.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...moe_lora.errors import WanmoeError


class SampleOrder:
    """Which samples the global batch of each step holds; costs the same for any step.

    Args:
        buckets: the samples of each bucket.
        global_batch: samples per optimizer step over all ranks and forwards.
        seed: another seed is another order.
        weights: one per sample, >= 0: an epoch has as many places as there are samples, and a sample takes
            them in proportion to its weight, rounded down or up. None: every sample one place.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]],
        *,
        global_batch: int,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        if global_batch < 1 or seed < 0 or not buckets or not all(buckets):
            raise WanmoeError(
                f"sample order: needs global_batch >= 1, seed >= 0 and samples; got {global_batch}, {seed} "
                f"and buckets of {[len(bucket) for bucket in buckets]}"
            )
        self.buckets = [list(bucket) for bucket in buckets]
        self.global_batch, self.seed = global_batch, seed
        total = sum(len(bucket) for bucket in self.buckets)
        self._shares: list[bytes | None] = [None] * len(self.buckets)
        self._places = [len(bucket) for bucket in self.buckets]
        """Places of each bucket in an epoch."""
        if weights is not None:
            values = _checked(weights, total)
            own = [values[bucket] for bucket in self.buckets]
            self._places = [round(total * part.sum() / values.sum()) for part in own]
            self._shares = [part.tobytes() for part in own]

    def __getitem__(self, position: int) -> int:
        """The sample at a place of the sequence of all global batches, one after the other."""
        return self.replacement(position, 0)

    def replacement(self, position: int, attempt: int) -> int:
        """What stands in for the sample at `position`: the one `attempt` places later in its epoch."""
        step, place = divmod(position, self.global_batch)
        bucket, turn = self._find(step)
        places = self._places[bucket]
        epoch, inside = divmod(turn * self.global_batch + place, places)
        order = _epoch(len(self.buckets[bucket]), places, self.seed, epoch, bucket, self._shares[bucket])
        return self.buckets[bucket][int(order[(inside + attempt) % places])]

    def batch(self, step: int) -> list[int]:
        """The samples of the global batch of `step`, counted from 0."""
        first = step * self.global_batch
        return [self[position] for position in range(first, first + self.global_batch)]

    def bucket(self, step: int) -> int:
        """The bucket that the batch of `step` comes from."""
        return self._find(step)[0]

    def buckets_before(self, step: int) -> NDArray[np.int64]:
        """The buckets of the steps 0 .. step - 1."""
        parts, epoch = [np.zeros(0, np.int64)], 0
        while self._batches(epoch) < step:
            parts.append(self._turns(epoch)[0])
            epoch += 1
        return np.concatenate(parts)[:step]

    def _find(self, step: int) -> tuple[int, int]:
        """The bucket of `step`, and how many batches came from it before."""
        if step < 0:
            raise WanmoeError(f"sample order: step must be 0 or more, got {step}")
        # After e epochs there were between e * places / global_batch - buckets and e * places / global_batch.
        ratio = self.global_batch / sum(self._places)
        last = int((step + len(self.buckets) + 1) * ratio) + 2
        epoch = bisect_right(range(last), step, lo=int(step * ratio) // 2, key=self._batches) - 1
        buckets, turns = self._turns(epoch)
        inside = step - self._batches(epoch)
        bucket = int(buckets[inside])
        return bucket, self._count(bucket, epoch) + int(turns[inside])

    def _turns(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        counts = tuple(self._count(bucket, epoch + 1) - self._count(bucket, epoch) for bucket in self._all)
        return _schedule(counts, self.seed, epoch)

    @property
    def _all(self) -> range:
        return range(len(self.buckets))

    def _count(self, bucket: int, epochs: int) -> int:
        """Whole batches that a bucket has filled after so many epochs."""
        return epochs * self._places[bucket] // self.global_batch

    def _batches(self, epochs: int) -> int:
        return sum(self._count(bucket, epochs) for bucket in self._all)


@lru_cache(maxsize=8)
def _schedule(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The buckets of an epoch's batches in a shuffled order, and the how many-th of its bucket each is."""
    buckets = np.repeat(np.arange(len(counts)), counts)
    buckets = buckets[np.argsort(_words(seed, epoch, 0).random_raw(len(buckets)), kind="stable")]
    turns = np.empty_like(buckets)
    for bucket, count in enumerate(counts):
        turns[buckets == bucket] = np.arange(count)
    return buckets, turns


def _words(seed: int, epoch: int, stream: int) -> np.random.PCG64:
    # Raw PCG64 words, not `Generator.permutation`: NumPy promises the bits of the former alone across
    # versions.
    return np.random.PCG64(np.random.SeedSequence([seed, epoch, stream]))


@lru_cache(maxsize=32)
def _epoch(n: int, places: int, seed: int, epoch: int, bucket: int, share: bytes | None) -> NDArray[np.int64]:
    """The samples at the places of one epoch of a bucket of n samples."""
    bits = _words(seed, epoch, 1 + bucket)  # 0 is the order of the batches
    order = np.argsort(bits.random_raw(n), kind="stable")
    if share is None:
        return order
    # One systematic draw over the shuffled samples: the counts are even, their order is shuffled once more.
    ends = np.cumsum(np.frombuffer(share, dtype=np.float64)[order])
    offset = bits.random_raw() / 2**64
    draws = (np.arange(places) + offset) / places * ends[-1]
    picks = order[np.minimum(np.searchsorted(ends, draws, side="right"), n - 1)]
    return picks[np.argsort(bits.random_raw(places), kind="stable")]


def _checked(weights: Sequence[float], n: int) -> NDArray[np.float64]:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n,) or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise WanmoeError(
            f"sample order: weights are {n} finite numbers >= 0, not all 0; got {len(weights)} of them"
        )
    return values
