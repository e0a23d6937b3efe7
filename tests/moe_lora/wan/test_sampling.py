"""Schedules, solvers, the switch of noise experts and guidance."""

import dataclasses

import numpy as np
import pytest
import torch

from wanmoe.moe_lora.adapter import AdapterConfig, attach
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import Expert
from wanmoe.moe_lora.routing import Gates
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.sampling import SOLVERS, make_schedule, sample, sampling_defaults

SHAPE = (2, 16, 2, 4, 4)


def official_levels(solver, steps, shift):
    """(sigmas and a final 0, whole timesteps), float64; from Wan2.2 `wan/utils/fm_solvers{,_unipc}.py`."""
    # numpy's last digit decides some of the whole timesteps where the shift is 1
    sigma = torch.from_numpy(np.linspace(0.999 if solver == "unipc" else 1, 0, steps + 1))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    timesteps = 1000 * sigma[:-1]
    return sigma, timesteps if solver == "euler" else timesteps.floor()


def official_loop(solver, v_of, noise, steps, shift):
    """The official sampling in plain float64 from its equations; v_of(x, timestep) is the guided model.

    Both multistep solvers predict x0 = x - sigma v and integrate exactly in the log signal-to-noise ratio
    lam = log((1 - sigma) / sigma): UniPC-2 with B(h) = e^-h - 1 (arXiv 2302.04867, section 3 and appendix)
    and DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2). A last step to sigma = 0 is of first order.
    """
    sigma, timesteps = official_levels(solver, steps, shift)
    alpha, lam = 1 - sigma, torch.log((1 - sigma) / sigma)
    x, start, x0s = noise.double(), noise.double(), []

    def towards(i, x, correction):
        """From sigma_i at x to sigma_{i+1}: x0 of step i held constant, and a correction of it."""
        factor = torch.expm1(lam[i] - lam[i + 1])
        return sigma[i + 1] / sigma[i] * x - alpha[i + 1] * factor * (x0s[i] + correction)

    def slope(i):
        """Change of x0 over the step from i, told from the step before."""
        ratio = (lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])
        return (x0s[i - 1] - x0s[i]) / ratio

    for i in range(steps):
        v = v_of(x.float(), timesteps[i].item()).double()
        if solver == "euler":
            x = x + (sigma[i + 1] - sigma[i]) * v
            continue
        x0s.append(x - sigma[i] * v)
        if solver == "unipc" and i > 0:
            x = towards(i - 1, start, unipc_correction(i, lam, x0s))
            start = x
        second_order = 0 < i < steps - 1
        x = towards(i, x, 0.5 * slope(i) if second_order else 0.0)
    return x.float()


def unipc_correction(i, lam, x0s):
    """UniC of the step that has just arrived at i, knowing x0 there."""
    change = x0s[i] - x0s[i - 1]
    if i == 1:
        return 0.5 * change
    h, before = lam[i] - lam[i - 1], lam[i - 2] - lam[i - 1]
    ratio, e = before / h, torch.expm1(-h)
    # rho of the two differences: sum_m rho_m r_m^(n-1) = n! phi_{n+1}(-h) (-h)^(n) / B(h) for n = 1, 2
    first = e / -h - 1
    wanted = torch.stack([first, 2 * (first / -h - 0.5)]) / e
    rho = torch.linalg.solve(
        torch.stack([torch.ones(2), torch.stack([ratio, torch.tensor(1.0)])]).double(), wanted
    )
    return rho[0] * (x0s[i - 2] - x0s[i - 1]) / ratio + rho[1] * change


@pytest.mark.parametrize(("steps", "shift"), [(40, 12.0), (40, 5.0), (7, 3.0), (50, 1.0), (1, 5.0)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_levels_are_the_official_ones(solver, steps, shift):
    sigmas, timesteps = official_levels(solver, steps, shift)
    ours = make_schedule(steps, shift, solver)
    torch.testing.assert_close(torch.tensor(ours.timesteps).double(), timesteps, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(ours.sigmas).double(), sigmas, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("solver", "steps", "shift", "boundary", "count"),
    [
        ("unipc", 40, 7.0, 0.900, 18),
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
        def v(x, t, context, *rest):
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

    def v(x, t, context, *rest):
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

        def v(x, t, context, *rest, sigma_of=sigma_of):
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
        def v(x, t, context, *rest):
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


def test_gates_images_and_progress_reach_every_step():
    seen, steps, asked = [], [], []
    latent, tokens = object(), object()

    def gates(t):
        asked.append(t)
        return Gates(t[:, None], torch.ones(2), 8)

    def v(x, t, context, *rest):
        seen.append((t, *rest))
        return torch.ones_like(x)

    sample(
        v, v, torch.randn(SHAPE), "text", "null", steps=4, shift=1.0, solver="euler", boundary=0.5,
        guidance=(2.0, 1.0), gates=gates, image_latent=latent, image_context=tokens,
        progress=lambda *args: steps.append(args),
    )  # fmt: skip
    assert steps == [(1, 4, "high"), (2, 4, "high"), (3, 4, "high"), (4, 4, "low")]
    assert len(asked) == 4 and len(seen) == 5  # guidance 2 on the one low step
    for t, given, *images in seen:
        assert t.shape == (2,) and torch.equal(given.experts[:, 0], t.float()) and images == [latent, tokens]


@pytest.mark.parametrize("guidance", [(3.0, 4.0), (1.0, 2.5), (0.0, 1.0)])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_text_and_null_in_one_batch_give_the_latent_of_two_passes(task, guidance):
    """Two sides, two clips of differently long prompts, gates per latent frame of a trained adapter."""
    high, low = (random_dit(seed, task=task, in_dim=16 if task == "t2v" else 36) for seed in (0, 1))
    config = AdapterConfig(experts=(Expert(name="a"), Expert(name="b")), blocks=2)
    adapters = [attach(dit, config) for dit in (high, low)]
    torch.manual_seed(2)
    for parameter in [p for adapter in adapters for p in adapter.parameters().values()]:
        torch.nn.init.normal_(parameter.data, std=0.3)
    noise = torch.randn(2, 16, 3, 4, 6)
    text, null = [torch.randn(5, 12), torch.randn(2, 12)], torch.randn(2, 8, 12)
    experts = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], [[0.2, 0.8]] * 3])
    settings = dict(
        steps=6, shift=5.0, boundary=0.875, guidance=guidance,
        gates=lambda t: adapters[0].gates(experts, t, tokens=18),
        image_latent=None if task == "t2v" else torch.randn(2, 20, 3, 4, 6),
    )  # fmt: skip
    forwards = []
    high.register_forward_hook(lambda dit, args, v: forwards.append(("high", len(v))))
    low.register_forward_hook(lambda dit, args, v: forwards.append(("low", len(v))))

    one = sample(high, low, noise, text, null, **settings, batched=True)
    scale = dict(zip(("low", "high"), guidance, strict=True))
    assert {side for side, _ in forwards} == {"high", "low"} and len(forwards) == 6
    assert all(clips == (2 if scale[side] == 1 else 4) for side, clips in forwards)
    two = sample(high, low, noise, text, null, **settings)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * two.abs().max().item())
    frozen = sample(high, low, noise, text, null, **{**settings, "gates": None}, batched=True)
    assert (frozen - one).abs().max() > 1e-2


def test_image_tokens_are_doubled_with_the_batch():
    tokens, latent = torch.randn(2, 3, 5), torch.randn(2, 20, 2, 4, 4)

    def v(x, t, context, gates, image_latent, image_context):
        assert context == ["a", "b", "c", "d"] and x.shape[0] == t.shape[0] == 4
        assert torch.equal(image_context, torch.cat((tokens, tokens)))
        assert torch.equal(image_latent, torch.cat((latent, latent)))
        return torch.ones_like(x)

    sample(
        v, v, torch.randn(SHAPE), ["a", "b"], ["c", "d"], steps=2, shift=1.0, boundary=0.5,
        guidance=(2.0, 2.0), image_latent=latent, image_context=tokens, batched=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "changes", "two", "defaults"),
    [
        ("t2v-A14B", {}, True, (12.0, 40, (3.0, 4.0))),
        ("i2v-A14B", {}, True, (5.0, 40, (3.5, 3.5))),
        ("i2v-A14B", {}, False, (5.0, 40, (3.5, 3.5))),
        ("t2v-1.3B", {}, False, (5.0, 50, (5.0, 5.0))),
        ("i2v-14B", {}, False, (5.0, 40, (5.0, 5.0))),
        ("i2v-14B", {"image_positions": 514}, False, (16.0, 50, (5.0, 5.0))),
    ],
)
def test_the_defaults_of_a_model_are_the_released_ones(preset, changes, two, defaults):
    config = dataclasses.replace(WanConfig.preset(preset), **changes)
    assert sampling_defaults(config, two) == defaults


def random_dit(seed, **changes):
    """Random weights everywhere, so that v bends with x and the solvers part."""
    torch.manual_seed(seed)
    sizes = dict(dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=12, text_len=8, freq_dim=16)
    dit = WanDiT(WanConfig(**{**sizes, **changes})).requires_grad_(False)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return dit


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_gives_the_latent_of_the_official_loop(solver):
    """Two random DiTs, the switch between them and guidance (3, 4), against the loop in plain PyTorch."""
    high, low = random_dit(0), random_dit(1)
    torch.manual_seed(2)
    noise, text, null = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 5, 12), torch.randn(1, 8, 12)
    settings = dict(steps=14, shift=5.0, boundary=0.875, guidance=(3.0, 4.0))
    ours = sample(high, low, noise, text, null, solver=solver, **settings)

    sides = []

    def v_of(x, timestep):
        sides.append(timestep >= 875)
        dit, scale = (high, 4.0) if sides[-1] else (low, 3.0)
        t = torch.tensor([timestep / 1000], dtype=torch.float64)
        return dit(x, t, null) + scale * (dit(x, t, text) - dit(x, t, null))

    theirs = official_loop(solver, v_of, noise, steps=14, shift=5.0)
    assert 0 < sum(sides) < 14
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    other = official_loop("euler" if solver != "euler" else "dpm++", v_of, noise, steps=14, shift=5.0)
    assert (other - theirs).abs().max() > 1e-2  # the bound above can tell the solvers apart


def test_settings_that_cannot_run_are_refused():
    def v(x, t, context, *rest):
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
