"""Fréchet and kernel distance: closed forms, torchmetrics, their bias and what is said of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from wanmoe.infer.evaluation.distance import DRAWS, distance, frechet, kernel
from wanmoe.moe_lora.errors import WanmoeError


def sample(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Features with a spectrum that falls, as those of a backbone."""
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, (count, width)) * np.sqrt(1 / (1 + np.arange(width)))


@pytest.mark.parametrize(("many", "width"), [(40, 8), (300, 24), (12, 30), (200, 64)])
def test_frechet_is_that_of_torchmetrics(many: int, width: int) -> None:
    one, other = sample(many, width, 0), sample(many + 7, width, 1, 0.3)
    first, second = (torch.from_numpy(x) for x in (one, other))
    theirs = float(_compute_fid(first.mean(0), first.T.cov(), second.mean(0), second.T.cov()))
    assert frechet(one, other) == pytest.approx(theirs, abs=1e-4)
    assert frechet(other, one) == pytest.approx(frechet(one, other))


def test_frechet_of_known_gaussians() -> None:
    """Samples made to have exactly these moments: |m|^2 + sum (s1 - s2)^2 for covariances that commute."""
    rng = np.random.default_rng(0)

    def exact(mean: np.ndarray, deviation: np.ndarray, count: int) -> np.ndarray:
        raw = rng.normal(size=(count, len(mean)))
        raw -= raw.mean(0)
        white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
        return white * deviation + mean

    m1, m2, s1, s2 = (rng.uniform(0.5, 2, 6) for _ in range(4))
    found = frechet(exact(m1, s1, 50), exact(m2, s2, 90))
    assert found == pytest.approx(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum())


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    """Its estimator leaves the diagonal out of the two own sums alone, as ours does."""
    one, other = sample(60, 20, 0), sample(60, 20, 1, 0.2)
    theirs = float(poly_mmd(torch.from_numpy(one), torch.from_numpy(other)))
    assert kernel(one, other) == pytest.approx(theirs, abs=1e-4)


def test_the_same_set_is_at_no_distance() -> None:
    one = sample(32, 50, 0)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9) and kernel(one, one) <= 0
    found = distance(one, one, frechet, paired=True)
    assert found.halves == pytest.approx(found.floor) and found.inside_floor


def test_frechet_is_biased_by_the_sample_and_the_kernel_distance_is_not() -> None:
    """Of one distribution: the bias falls with N and is large at 160; the kernel distance is 0 on average."""
    means, kernels = [], []
    for count in (32, 160, 512):
        pairs = [(sample(count, 200, 2 * n), sample(count, 200, 2 * n + 1)) for n in range(6)]
        means.append(np.mean([frechet(*pair) for pair in pairs]))
        kernels.append(np.mean([kernel(*pair) for pair in pairs]))
    assert means[0] > 2 * means[1] > 4 * means[2] > 0
    trace = (1 / (1 + np.arange(200))).sum()
    assert means[1] > 0.05 * trace
    assert np.abs(kernels).max() < 0.01


@pytest.mark.parametrize("measure", [frechet, kernel])
def test_a_difference_is_above_the_floor_and_none_is_inside(measure: object) -> None:
    real = sample(120, 40, 0)
    alike = distance(sample(120, 40, 1), real, measure)  # type: ignore[arg-type]
    other = distance(sample(120, 40, 2, 0.6), real, measure)  # type: ignore[arg-type]
    assert alike.inside_floor and not other.inside_floor
    assert other.low < other.value < other.high and (other.made, other.real) == (120, 120)
    assert alike.floor_sd > 0 and alike.halves == pytest.approx(alike.floor, rel=0.3, abs=0.02)


def test_the_interval_holds_the_distance_of_the_distributions() -> None:
    """Of the kernel distance, whose truth a very large sample tells."""
    truth = kernel(sample(4000, 10, 100), sample(4000, 10, 101, 0.5))
    inside = 0
    for seed in range(20):
        found = distance(sample(60, 10, 2 * seed), sample(60, 10, 2 * seed + 1, 0.5), kernel, seed=seed)
        inside += found.low <= truth <= found.high
    assert inside >= 17 and DRAWS >= 500


@pytest.mark.parametrize("measure", [frechet, kernel])
def test_pairs_are_drawn_together(measure: object) -> None:
    """A clip that was made after another is close to it: what it shares with it is no uncertainty."""
    real = sample(60, 20, 0)
    made = real + sample(60, 20, 1, 0.5) / 4
    together, apart = (distance(made, real, measure, paired=paired) for paired in (True, False))  # type: ignore[arg-type]
    assert together.value == apart.value and together.low < together.value < together.high
    assert together.high - together.low < 0.7 * (apart.high - apart.low)


def test_halves_of_one_set_are_told_to_be_alike_and_the_page_shows_their_bias() -> None:
    """The table of docs/evaluate.md: 400 features with a spectrum that falls, of trace 400."""
    page = (Path(__file__).parents[3] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    spectrum = 1 / (1 + np.arange(400))
    spectrum *= 400 / spectrum.sum()
    shown = []
    for count in (32, 160, 512):
        both = np.random.default_rng(count).normal(size=(2 * count, 400)) * np.sqrt(spectrum)
        cells = [str(count)]
        for measure in (frechet, kernel):
            found = distance(both[:count], both[count:], measure)
            assert found.inside_floor, "two halves of one set"
            cells += [
                f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})".replace("-", "−"),
                f"{found.floor:.3g} ± {found.floor_sd:.2g}".replace("-", "−"),
            ]
        shown.append("| " + " | ".join([*cells, "inside the floor"]) + " |")
    table = page.split("<!-- bias -->")[1].split("<!-- /bias -->")[0].strip().splitlines()
    assert table[2:] == shown


@pytest.mark.parametrize("measure", [frechet, kernel])
@pytest.mark.parametrize("paired", [False, True])
def test_the_least_number_of_clips_has_an_interval(measure: object, paired: bool) -> None:
    """Of 4 clips one draw in 64 is a single clip four times."""
    found = distance(sample(4, 5, 0), sample(4, 5, 1), measure, paired=paired)  # type: ignore[arg-type]
    assert np.isfinite(found).all() and found.low <= found.value <= found.high


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(WanmoeError, match="needs 4 clips in each; there are 3 made and 9 real"):
        distance(sample(3, 5, 0), sample(9, 5, 1), frechet)
