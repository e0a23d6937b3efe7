"""From noise to a latent: Wan's schedules, the two noise experts and guidance around diffusers' solvers.

Letters: B clips, C channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from ..errors import WanmoeError
from ..routing import Gates
from .config import WanConfig

__all__ = [
    "SOLVERS",
    "Denoiser",
    "SamplingDefaults",
    "Schedule",
    "make_schedule",
    "sample",
    "sampling_defaults",
]

SOLVERS = ("unipc", "dpm++", "euler")


class SamplingDefaults(NamedTuple):
    """Settings that a model was released with."""

    shift: float
    steps: int
    guidance: tuple[float, float]
    """(low, high)."""


def sampling_defaults(config: WanConfig, two_models: bool) -> SamplingDefaults:
    """The settings that a model was released with, told by its sizes and by whether it has two noise experts.

    One t2v model alone is taken for Wan2.1, since one guidance of Wan2.2's two would be arbitrary. Source:
    Wan2.2 `wan/configs/wan_{t2v,i2v}_A14B.py`, Wan2.1 `generate.py`.
    """
    if config.task == "t2v":
        return SamplingDefaults(12.0, 40, (3.0, 4.0)) if two_models else SamplingDefaults(5.0, 50, (5.0, 5.0))
    if config.image_positions:  # Wan2.1 FLF2V
        return SamplingDefaults(16.0, 50, (5.0, 5.0))
    if config.image_dim:  # Wan2.1 i2v; 3.0 is advised at 480p
        return SamplingDefaults(5.0, 40, (5.0, 5.0))
    return SamplingDefaults(5.0, 40, (3.5, 3.5))


_TRAIN_TIMESTEPS = 1000

Context: TypeAlias = Tensor | Sequence[Tensor]
_Scheduler: TypeAlias = (
    UniPCMultistepScheduler | DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler
)


class Denoiser(Protocol):
    """What `sample` calls: a WanDiT, or anything that predicts v as it does."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Context,
        gates: Gates | None = None,
        image_latent: Tensor | None = None,
        image_context: Tensor | None = None,
    ) -> Tensor: ...


class Schedule(NamedTuple):
    """Noise levels of a run, from noise to data."""

    sigmas: list[float]
    """Of every step's input, then 0."""
    timesteps: list[float]
    """What the model is told at each step, in thousandths; whole numbers for unipc and dpm++, as official."""

    def high_steps(self, boundary: float) -> int:
        """How many steps belong to the high-noise model: those with t >= boundary."""
        return sum(timestep >= boundary * _TRAIN_TIMESTEPS for timestep in self.timesteps)


def make_schedule(steps: int, shift: float, solver: str = "unipc") -> Schedule:
    """The noise levels that the official code uses for a number of steps, a shift and a solver.

    UniPC starts at the last trained level below 1, the others at pure noise; then sigma becomes
    shift * sigma / (1 + (shift - 1) * sigma). Raises WanmoeError. Source: Wan2.2 `wan/utils/fm_solvers*.py`.
    """
    if solver not in SOLVERS:
        near = difflib.get_close_matches(solver, SOLVERS, n=1, cutoff=0.0)[0]
        raise WanmoeError(f"no solver {solver!r}; did you mean {near!r}? known: {', '.join(SOLVERS)}")
    if steps < 1:
        raise WanmoeError(f"steps is {steps}; it must be at least 1")
    if not shift > 0:
        raise WanmoeError(f"shift is {shift}; it must be above 0")
    start = 1 - 1 / _TRAIN_TIMESTEPS if solver == "unipc" else 1.0
    sigmas = np.linspace(start, 0, steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    timesteps = sigmas * _TRAIN_TIMESTEPS
    if solver != "euler":
        timesteps = timesteps.astype(np.int64)
    return Schedule([*sigmas.tolist(), 0.0], [float(timestep) for timestep in timesteps])


@torch.no_grad()
def sample(
    high: Denoiser | None,
    low: Denoiser | None,
    noise: Tensor,
    context: Context,
    null_context: Context | None,
    *,
    steps: int,
    shift: float,
    solver: str = "unipc",
    boundary: float,
    guidance: tuple[float, float] = (1.0, 1.0),
    gates: Callable[[Tensor], Gates | None] | None = None,
    image_latent: Tensor | None = None,
    image_context: Tensor | None = None,
    batched: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Tensor:
    """Integrates the flow from `noise` [B, C, F, H, W] at t = 1 to a latent of that shape, float32.

    Steps with t >= boundary run `high`, the others `low`; a side that no step needs may be None. guidance is
    (low, high): v = v_null + g (v_text - v_null), and g = 1 runs the text alone. `gates(t [B])` is asked once
    a step and serves both passes. `batched` makes one forward of them, on 2B clips: the text rows, then the
    null rows of every tensor and of the gates. `progress(step, steps, "high" | "low")` is called after each
    step, counted from 1. Raises WanmoeError for a missing side or null context and for settings that cannot
    run.
    """
    schedule = make_schedule(steps, shift, solver)
    high_steps = schedule.high_steps(boundary)
    sides = ("high",) * high_steps + ("low",) * (steps - high_steps)
    models = {"high": high, "low": low}
    scales = {"high": guidance[1], "low": guidance[0]}
    for side in dict.fromkeys(sides):
        if models[side] is None:
            raise WanmoeError(
                f"{sides.count(side)} of {steps} steps need the {side}-noise model; none was given"
            )
        if scales[side] != 1 and null_context is None:
            raise WanmoeError(
                f"guidance {scales[side]} ({side} noise) needs a null context; give one, or 1.0"
            )

    scheduler = _scheduler(solver, schedule, noise.device)
    latent = noise.float()
    for step, side in enumerate(sides):
        # float64, so that the model gets back the whole number of thousandths that it was trained with
        flow_time = schedule.timesteps[step] / _TRAIN_TIMESTEPS
        t = torch.full((len(latent),), flow_time, dtype=torch.float64, device=latent.device)
        step_gates = None if gates is None else gates(t.float())
        model = models[side]
        assert model is not None
        text = _Condition(context, step_gates, image_latent, image_context)
        null = None if null_context is None else text._replace(context=null_context)
        v = _guided(model, latent, t, text, null, scales[side], batched)
        latent = scheduler.step(v, scheduler.timesteps[step], latent, return_dict=False)[0]
        if progress is not None:
            progress(step + 1, steps, side)
    return latent


class _Condition(NamedTuple):
    """What a denoiser takes after x and t, in its order."""

    context: Context
    gates: Gates | None
    image_latent: Tensor | None
    image_context: Tensor | None


def _guided(
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    text: _Condition,
    null: _Condition | None,
    scale: float,
    batched: bool,
) -> Tensor:
    """v of the text, led away from the null text by `scale`, float32."""
    if scale == 1:
        return model(x, t, *text).float()
    assert null is not None
    if batched:
        v_text, v_null = model(_twice(x), _twice(t), *_joined(text, null)).float().chunk(2)
    else:
        v_text, v_null = model(x, t, *text).float(), model(x, t, *null).float()
    return v_null + scale * (v_text - v_null)


def _joined(text: _Condition, null: _Condition) -> _Condition:
    """Text and null as one batch; they differ in the context alone, which may be of two lengths."""
    gates, image_latent, image_context = text.gates, text.image_latent, text.image_context
    return _Condition(
        [*text.context, *null.context],
        None if gates is None else Gates(_twice(gates.experts), _twice(gates.base), gates.tokens_per_row),
        None if image_latent is None else _twice(image_latent),
        None if image_context is None else _twice(image_context),
    )


def _twice(rows: Tensor) -> Tensor:
    return torch.cat((rows, rows))


def _scheduler(solver: str, schedule: Schedule, device: torch.device) -> _Scheduler:
    """A diffusers solver on Wan's own noise levels, which diffusers' schedules only approximate."""
    steps = len(schedule.timesteps)
    if solver == "euler":
        euler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TRAIN_TIMESTEPS, shift=1.0)
        euler.set_timesteps(sigmas=schedule.sigmas[:-1], device=device)
        euler.set_begin_index(0)
        return euler
    kind = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    scheduler = kind(
        num_train_timesteps=_TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps, device=device)
    scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(schedule.timesteps, dtype=torch.int64, device=device)
    scheduler.set_begin_index(0)
    return scheduler
