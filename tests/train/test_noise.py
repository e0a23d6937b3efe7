"""Flow matching and the distribution of t (traps A19)."""

import pytest
import torch

from wanmoe.train.config import ObjectiveConfig
from wanmoe.train.noise import draw_t, noised, sample_generator, strata

U = torch.arange(20_000, dtype=torch.float64).add(0.5) / 20_000
CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig(t_shift=5.0),
    ObjectiveConfig(t_sampling="logit_normal", t_mean=0.5, t_std=1.2),
    ObjectiveConfig(t_sampling="logit_normal", t_shift=3.0),
    ObjectiveConfig(t_sampling="sigmoid", t_std=1.2),
    ObjectiveConfig(t_sampling="shift", t_shift=3.0),
    ObjectiveConfig(t_sampling="mode"),
    ObjectiveConfig(t_sampling="mode", t_mode=-0.8, t_shift=2.0),
]


def test_x_t_and_v():
    x0, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    x_t, v = noised(x0, noise, torch.tensor([0.0, 0.25]))
    assert torch.equal(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])
    torch.testing.assert_close(x_t - torch.tensor([0.0, 0.25]).view(2, 1, 1, 1, 1) * v, x0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("t_range", [(0.875, 1.0), (0.0, 0.9), (0.2, 0.6)])
def test_a_slice_has_the_shape_of_the_whole_inside_and_nothing_outside(config, t_range):
    whole = draw_t(U, config, (0.0, 1.0))
    part = draw_t(U, config, t_range)
    low, high = t_range
    assert part.min() >= low and part.max() <= high
    inside = whole[(whole >= low) & (whole <= high)].double()
    quantiles = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    expected = torch.quantile(inside, quantiles)
    torch.testing.assert_close(torch.quantile(part.double(), quantiles), expected, atol=2e-3, rtol=0)


def test_uniform_and_shift_are_what_they_say():
    assert float(draw_t(U, ObjectiveConfig(), (0, 1)).mean()) == pytest.approx(0.5, abs=1e-3)
    half = draw_t(torch.tensor([0.5]), ObjectiveConfig(t_shift=5.0), (0, 1))
    assert float(half) == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))


def test_the_families_are_those_of_their_sources():
    """Against draws by the formulas themselves: musubi's sigmoid and shift, Stable Diffusion 3's mode."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=generator, dtype=torch.float64)
    u = torch.rand(200_000, generator=generator, dtype=torch.float64)
    sigmoid = torch.sigmoid(0.8 * normal)
    drawn = [
        (ObjectiveConfig(t_sampling="sigmoid", t_std=0.8), sigmoid),
        (ObjectiveConfig(t_sampling="shift", t_std=0.8, t_shift=3.0), 3 * sigmoid / (1 + 2 * sigmoid)),
        (
            ObjectiveConfig(t_sampling="mode", t_mode=1.29),
            1 - u - 1.29 * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u),
        ),
    ]
    quantiles = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    for config, expected in drawn:
        ours = torch.quantile(draw_t(U, config, (0.0, 1.0)).double(), quantiles)
        torch.testing.assert_close(ours, torch.quantile(expected, quantiles), atol=4e-3, rtol=0)


def test_sigmoid_has_no_shift():
    with pytest.raises(ValueError, match='"sigmoid" has no t_shift; "shift" has'):
        ObjectiveConfig(t_sampling="sigmoid", t_shift=2.0)


def test_the_clips_of_a_step_take_one_share_each_in_an_order_that_changes():
    def shares(step):
        return [strata(3, step * 8 + place, 8) for place in range(8)]

    orders = [[round(8 * first) for first, _ in shares(step)] for step in range(4)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert all(width == 1 / 8 for _, width in shares(0))
    assert len({tuple(order) for order in orders}) == 4
    assert strata(3, 17, 1) == (0.0, 1.0)  # a batch of one draws from the whole


@pytest.mark.parametrize("t_range", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_bad_ranges_are_refused(t_range):
    with pytest.raises(ValueError, match="objective.t_range must rise within"):
        ObjectiveConfig(t_range=t_range)


def test_random_streams_depend_on_seed_position_and_purpose_alone():
    def draw(*arguments):
        return torch.randn(4, generator=sample_generator(*arguments))

    assert torch.equal(draw(0, 7, "noise"), draw(0, 7, "noise"))
    others = [draw(1, 7, "noise"), draw(0, 8, "noise"), draw(0, 7, "caption")]
    assert not any(torch.equal(draw(0, 7, "noise"), other) for other in others)
