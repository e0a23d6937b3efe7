"""The order of the samples: a function of seed and step, whatever the number of ranks."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...moe_lora.errors import WanmoeError


def position_to_index(position: int, n: int, seed: int, weights: Sequence[float] | None = None) -> int:
    """The sample at `position` of an endless concatenation of permutations of n samples, one per epoch.

    With `weights` (one per sample, >= 0) an epoch still has n positions, and sample i takes
    n * weights[i] / sum(weights) of them, rounded down or up.
    """
    if n < 1 or position < 0 or seed < 0:
        raise WanmoeError(
            f"sample order: needs n >= 1, position >= 0, seed >= 0; got {n}, {position}, {seed}"
        )
    epoch, place = divmod(position, n)
    return int(_epoch(n, seed, epoch, None if weights is None else _share(weights, n))[place])


def batch_indices(
    step: int, *, global_batch: int, n: int, seed: int, weights: Sequence[float] | None = None
) -> list[int]:
    """The samples of the global batch of `step`, counted from 0; a rank takes its own equal slice.

    It depends on nothing but its arguments: every rank has the same number of steps for any number of
    samples, and a resume costs nothing. The end of one epoch and the start of the next may share a batch.
    """
    if step < 0 or global_batch < 1:
        raise WanmoeError(f"sample order: needs step >= 0 and global_batch >= 1; got {step}, {global_batch}")
    first = step * global_batch
    return [position_to_index(first + place, n, seed, weights) for place in range(global_batch)]


@lru_cache(maxsize=8)
def _epoch(n: int, seed: int, epoch: int, share: bytes | None) -> NDArray[np.int64]:
    # Raw PCG64 words, not `Generator.permutation`: NumPy promises the bits of the former alone across
    # versions.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(bits.random_raw(n), kind="stable")
    if share is None:
        return order
    # One systematic draw over the shuffled samples: the counts are even, their order is shuffled once more.
    ends = np.cumsum(np.frombuffer(share, dtype=np.float64)[order])
    offset = bits.random_raw() / 2**64
    picks = order[
        np.minimum(np.searchsorted(ends, (np.arange(n) + offset) / n * ends[-1], side="right"), n - 1)
    ]
    return picks[np.argsort(bits.random_raw(n), kind="stable")]


def _share(weights: Sequence[float], n: int) -> bytes:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n,) or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise WanmoeError(
            f"sample order: weights are {n} finite numbers >= 0, not all 0; got {len(weights)} of them"
        )
    return values.tobytes()
