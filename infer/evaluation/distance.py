"""How far two sets of clips are apart in the features of a backbone: Fréchet and kernel distance, each with
its sample size, interval and floor.

The Fréchet distance of two finite samples of one and the same distribution is far above 0 and falls with
their size: with 160 clips the bias can be larger than what two models differ by. The kernel distance has no
such bias. So nothing here is a bare number: beside it stand its interval and what two halves of the real
clips give, and what is compared with that floor is taken at the floor's own size.

Letters: N clips of a set, D features of a clip, S draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...moe_lora.errors import WanmoeError

Floats = NDArray[np.float64]
Measure = Callable[[Floats, Floats], float]

DRAWS, SPLITS = 500, 40
"""Draws with replacement behind an interval, and random halves behind a floor."""
UNBIASED_FROM = 2048
"""Clips from which the Fréchet distance is the headline, as the field has it; below, the kernel distance."""


class Distance(NamedTuple):
    """A distance between made and real clips, and what it can be held against."""

    value: float
    """Between all of both sets."""
    low: float
    high: float
    """95 % interval of `value` over draws of clips with replacement, of pairs of them where they are paired,
    the bias of drawing twice taken off."""
    made: int
    real: int
    """Clips."""
    halves: float
    """Between random halves, one of the made and one of the real clips, the mean: the size of `floor`."""
    halves_sd: float
    floor: float
    """Between two halves of the real clips, the mean over random halves."""
    floor_sd: float

    @property
    def inside_floor(self) -> bool:
        """Whether what the two sets differ by is no more than real clips differ among themselves: the excess
        over the floor, at the same size, is within two deviations of both."""
        spread = float(np.hypot(self.halves_sd, self.floor_sd))
        return self.halves - self.floor <= 2 * spread


def frechet(one: Floats, other: Floats) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of samples [N, D] and [M, D] (Heusel et al., 2017).

    The trace of the root is the sum of the singular values of X1 X2^T, X the centred samples: no root of a
    matrix is taken, which for fewer clips than features is singular, and which some versions of scipy get
    wrong.
    """
    first, second = _centred(one), _centred(other)
    root = float(np.linalg.svd(_short(first) @ _short(second).T, compute_uv=False).sum())
    apart = float(((one.mean(0) - other.mean(0)) ** 2).sum())
    return max(0.0, apart + float((first**2).sum() + (second**2).sum()) - 2 * root)


def kernel(one: Floats, other: Floats) -> float:
    """Squared maximum mean discrepancy, unbiased, with the kernel (x y / D + 1)^3 (Bińkowski et al., 2018).

    It may be below 0: its mean is 0 for samples of one distribution.
    """
    return _discrepancy(*_kernels(one, other), np.ones(len(one)), np.ones(len(other)))


def distance(
    made: Floats, real: Floats, measure: Measure, *, paired: bool = False, seed: int = 0
) -> Distance:
    """The distance of features [N, D] of made and [M, D] of real clips by `frechet` or `kernel`.

    `paired` says that clip n of one set was made after clip n of the other: then both are drawn together for
    the interval, and no half holds both.

    Raises WanmoeError where there are fewer than 4 clips in a set.
    """
    if min(len(made), len(real)) < 4:
        raise WanmoeError(
            f"a distance between sets needs 4 clips in each; there are {len(made)} made and {len(real)} real"
        )
    rng = np.random.default_rng(seed)
    value = measure(made, real)
    drawn = (
        _kernel_draws(made, real, paired, rng)
        if measure is kernel
        else _draws(made, real, measure, paired, rng)
    )
    # A draw holds clips twice, so its distance is too large by about the bias of the sample itself.
    low, high = value + np.quantile(drawn, [0.025, 0.975]) - drawn.mean()
    half = min(len(made), len(real)) // 2
    floors, halves = [], []
    for _ in range(SPLITS):
        order = rng.permutation(len(real))
        first, second = order[:half], order[half : 2 * half]
        floors.append(measure(real[second], real[first]))
        halves.append(measure(made[second if paired else rng.permutation(len(made))[:half]], real[first]))
    return Distance(
        value,
        float(low),
        float(high),
        len(made),
        len(real),
        float(np.mean(halves)),
        float(np.std(halves, ddof=1)),
        float(np.mean(floors)),
        float(np.std(floors, ddof=1)),
    )


def _centred(sample: Floats) -> Floats:
    """Centred and scaled so that the sum of squares is the trace of the covariance."""
    return np.asarray((sample - sample.mean(0)) / np.sqrt(max(1, len(sample) - 1)))


def _short(sample: Floats) -> Floats:
    """The sample itself, or where it has more rows than columns a square matrix with the same X^T X."""
    if len(sample) <= sample.shape[1]:
        return sample
    return np.asarray(np.linalg.qr(sample, mode="r"))


def _draws(made: Floats, real: Floats, measure: Measure, paired: bool, rng: np.random.Generator) -> Floats:
    """[S]: the distance of sets drawn with replacement; fewer draws of large sets."""
    count = DRAWS if max(len(made), len(real)) <= 256 else DRAWS // 10

    def draw() -> float:
        first = rng.integers(len(made), size=len(made))
        second = first if paired else rng.integers(len(real), size=len(real))
        return measure(made[first], real[second])

    return np.array([draw() for _ in range(count)])


def _kernel_draws(made: Floats, real: Floats, paired: bool, rng: np.random.Generator) -> Floats:
    """[S]: as `_draws`, from one table of kernels; a clip drawn twice is not paired with itself."""
    tables = _kernels(made, real)

    def times(clips: int) -> Floats:
        while True:  # of few clips a draw may be one clip alone, which has no pairs
            drawn = rng.multinomial(clips, np.full(clips, 1 / clips)).astype(float)
            if (drawn > 0).sum() > 1:
                return drawn

    def draw() -> float:
        first = times(len(made))
        return _discrepancy(*tables, first, first if paired else times(len(real)))

    return np.array([draw() for _ in range(DRAWS)])


def _kernels(one: Floats, other: Floats) -> tuple[Floats, Floats, Floats]:
    width = one.shape[1]
    own, cross, against = ((a @ b.T / width + 1) ** 3 for a, b in ((one, one), (one, other), (other, other)))
    return own, cross, against


def _discrepancy(own: Floats, cross: Floats, against: Floats, times: Floats, times_other: Floats) -> float:
    """MMD^2 with each clip so many `times`; no pair of a clip with itself."""
    return float(
        _pairs(own, times)
        + _pairs(against, times_other)
        - 2 * (times @ cross @ times_other) / (times.sum() * times_other.sum())
    )


def _pairs(table: Floats, times: Floats) -> float:
    weight = times.sum() ** 2 - (times**2).sum()
    return float((times @ table @ times - (np.diag(table) * times**2).sum()) / weight)
