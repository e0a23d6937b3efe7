"""Schedules, solvers, the switch of noise experts and guidance."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.routing import Gates
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.sampling import SOLVERS, make_schedule, sample

SHAPE = (2, 16, 2, 4, 4)


def official_solvers(name):
    """A module of the official `wan/utils`, loaded by file: the package itself imports heavy extras."""
    spec = importlib.util.find_spec("wan")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the official package (PyPI wan22) is not installed")
    file = Path(next(iter(spec.submodule_search_locations))) / "utils" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"official_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def official_scheduler(solver, steps, shift):
    if solver == "unipc":
        scheduler = official_solvers("fm_solvers_unipc").FlowUniPCMultistepScheduler(
            num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
        )
        scheduler.set_timesteps(steps, shift=shift)
    else:
        module = official_solvers("fm_solvers")
        scheduler = module.FlowDPMSolverMultistepScheduler(
            num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
        )
        scheduler.set_timesteps(sigmas=module.get_sampling_sigmas(steps, shift))
    return scheduler


@pytest.mark.parametrize(("steps", "shift"), [(40, 12.0), (40, 5.0), (7, 3.0), (50, 1.0), (1, 5.0)])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_noise_levels_are_the_official_ones(solver, steps, shift):
    theirs = official_scheduler(solver, steps, shift)
    ours = make_schedule(steps, shift, solver)
    assert ours.timesteps == theirs.timesteps.tolist()
    torch.testing.assert_close(torch.tensor(ours.sigmas), theirs.sigmas, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("solver", "steps", "shift", "boundary", "count"),
    [
        ("unipc", 40, 12.0, 0.875, 26),
        ("unipc", 40, 5.0, 0.900, 15),
        ("unipc", 50, 5.0, 0.900, 18),
        ("unipc", 40, 3.0, 0.900, 10),
        ("unipc", 40, 5.0, 0.875, 17),
        ("dpm++", 40, 12.0, 0.875, 26),
        ("dpm++", 40, 5.0, 0.875, 17),
        ("dpm++", 40, 5.0, 0.900, 15),
        ("euler", 40, 12.0, 0.875, 26),
    ],
)
def test_the_switch_is_by_t_and_not_by_index(solver, steps, shift, boundary, count):
    seen = []

    def model(side):
        def v(x, t, context, gates=None, image_latent=None):
            seen.append((side, t[0].item()))
            return torch.ones_like(x)

        return v

    assert make_schedule(steps, shift, solver).high_steps(boundary) == count
    sample(
        model("high"), model("low"), torch.randn(SHAPE), None, None,
        steps=steps, shift=shift, solver=solver, boundary=boundary,
    )  # fmt: skip
    assert [side for side, _ in seen] == ["high"] * count + ["low"] * (steps - count)
    assert all((t >= boundary) == (side == "high") for side, t in seen)


def test_a_step_exactly_on_the_boundary_is_high():
    schedule = make_schedule(8, 1.0, "euler")
    assert schedule.timesteps[1] == 875.0 and schedule.high_steps(0.875) == 2


def exact_sigma(schedule):
    """sigma of a step from its t, which unipc and dpm++ cut to a whole number of thousandths."""

    def sigma_of(t):
        at = min(schedule.timesteps, key=lambda timestep: abs(timestep - t[0].item() * 1000))
        return schedule.sigmas[schedule.timesteps.index(at)]

    return sigma_of


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_flow_is_solved_exactly(solver, steps):
    """x_t lies on the line from the noise to one known x0, so every solver must land on x0."""
    torch.manual_seed(0)
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    sigma_of = exact_sigma(make_schedule(steps, 3.0, solver))

    def v(x, t, context, gates=None, image_latent=None):
        return (x - x0) / sigma_of(t)

    out = sample(v, v, noise, None, None, steps=steps, shift=3.0, solver=solver, boundary=0.9)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x0, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_curved_flow_converges(solver):
    """Data N(0, 0.5^2 I) has a known v and a known end point; more steps come nearer to it."""
    torch.manual_seed(0)
    noise = torch.randn(SHAPE)
    errors = []
    for steps in (20, 80):
        schedule = make_schedule(steps, 1.0, solver)
        sigma_of = exact_sigma(schedule)

        def v(x, t, context, gates=None, image_latent=None, sigma_of=sigma_of):
            s = sigma_of(t)
            return (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2) * x

        start = schedule.sigmas[0]
        end = 0.5 * noise / ((1 - start) ** 2 * 0.25 + start**2) ** 0.5
        out = sample(v, v, noise, None, None, steps=steps, shift=1.0, solver=solver, boundary=0.9)
        errors.append(((out - end).norm() / end.norm()).item())
    assert errors[1] < errors[0] / (3 if solver == "euler" else 5)  # first and second order
    assert errors[1] < 0.02


def test_guidance_combines_per_side_and_is_skipped_at_one():
    calls = []

    def model(text, null):
        def v(x, t, context, gates=None, image_latent=None):
            calls.append(context)
            return torch.full_like(x, text if context == "text" else null)

        return v

    noise = torch.zeros(SHAPE)
    kwargs = dict(steps=2, shift=1.0, solver="euler", boundary=0.9)
    # Euler from 1 to 0.5 with the high model, then to 0 with the low one.
    out = sample(model(3.0, 1.0), model(7.0, 5.0), noise, "text", "null", guidance=(1.5, 4.0), **kwargs)
    expected = -0.5 * (1 + 4.0 * (3 - 1)) - 0.5 * (5 + 1.5 * (7 - 5))
    assert torch.equal(out, torch.full(SHAPE, expected))
    assert calls == ["text", "null"] * 2
    calls.clear()
    out = sample(model(3.0, 1.0), model(7.0, 5.0), noise, "text", None, **kwargs)
    assert torch.equal(out, torch.full(SHAPE, -5.0)) and calls == ["text", "text"]


def test_gates_image_and_progress_reach_every_step():
    seen, steps, image = [], [], object()
    asked = []

    def gates(t):
        asked.append(t)
        return Gates(t[:, None], torch.ones(2), 8)

    def v(x, t, context, gates=None, image_latent=None):
        seen.append((t, gates, image_latent))
        return torch.ones_like(x)

    sample(
        v, v, torch.randn(SHAPE), "text", "null", steps=4, shift=1.0, solver="euler", boundary=0.5,
        guidance=(2.0, 1.0), gates=gates, image_latent=image, progress=lambda *args: steps.append(args),
    )  # fmt: skip
    assert steps == [(1, 4, "high"), (2, 4, "high"), (3, 4, "high"), (4, 4, "low")]
    assert len(asked) == 4 and len(seen) == 5  # guidance 2 on the one low step
    for t, given, got_image in seen:
        assert t.shape == (2,) and torch.equal(given.experts[:, 0], t.float()) and got_image is image


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_the_official_solver_on_a_real_model_gives_the_same_latent(solver):
    torch.manual_seed(0)
    config = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, text_len=8, freq_dim=16)
    dit = WanDiT(config).requires_grad_(False)
    torch.nn.init.normal_(dit.head.head.weight, std=0.2)
    noise, context = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 16)
    ours = sample(dit, dit, noise, context, None, steps=12, shift=5.0, solver=solver, boundary=0.9)

    scheduler, latent = official_scheduler(solver, 12, 5.0), noise
    for timestep in scheduler.timesteps:
        v = dit(latent, timestep[None].double() / 1000, context)
        latent = scheduler.step(v, timestep, latent, return_dict=False)[0]
    assert (latent - noise).norm() > 0.3 * noise.norm()
    torch.testing.assert_close(ours, latent, rtol=0, atol=1e-4)


def test_settings_that_cannot_run_are_refused():
    def v(x, t, context, gates=None, image_latent=None):
        return torch.ones_like(x)

    noise = torch.randn(SHAPE)
    kwargs = dict(steps=4, shift=1.0, boundary=0.5)
    with pytest.raises(WanmoeError, match="did you mean 'unipc'"):
        make_schedule(4, 1.0, "uni_pc")
    with pytest.raises(WanmoeError, match="steps is 0"):
        sample(v, v, noise, None, None, **{**kwargs, "steps": 0})
    with pytest.raises(WanmoeError, match="shift is -1"):
        sample(v, v, noise, None, None, **{**kwargs, "shift": -1})
    with pytest.raises(WanmoeError, match="need the high-noise model"):
        sample(None, v, noise, None, None, **kwargs)
    with pytest.raises(WanmoeError, match=r"guidance 3.0 \(low noise\) needs a null context"):
        sample(v, v, noise, None, None, guidance=(3.0, 1.0), **kwargs)
    sample(None, v, noise, None, None, **{**kwargs, "boundary": 1.5})
