"""What is checked of a request before any weights are read: with the real model that takes minutes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..moe_lora.errors import WanmoeError
from ..moe_lora.instruments import ExpertSet
from ..moe_lora.video import read_image
from ..moe_lora.wan.codec import CHANNELS, SPACE_STRIDE
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.sampling import make_schedule, sampling_defaults
from .route import Wish

# Pixels of a patch: the codec halves three times, every Wan DiT takes 2 x 2 of its cells.
SPACE_STEP = 2 * SPACE_STRIDE


@dataclass(frozen=True)
class Job:
    """One video to make, nothing left open but the seed."""

    prompt: str
    wish: Wish
    frames: int
    size: tuple[int, int]
    """Height and width."""
    steps: int
    guidance: tuple[float, float]
    """(low, high)."""
    shift: float
    solver: str
    seed: int | None
    negative_prompt: str
    first: Path | None
    last: Path | None
    """Pictures of an i2v clip."""
    output: Path | None


def make_job(
    config: WanConfig,
    two_models: bool,
    *,
    prompt: str,
    wish: Wish,
    num_frames: int,
    video_size: tuple[int, int],
    num_steps: int | None,
    guidance_scale: float | tuple[float, float] | None,
    flow_shift: float | None,
    solver: str,
    seed: int | None,
    negative_prompt: str,
    image_path: str | Path | None,
    last_image_path: str | Path | None,
    output_path: str | Path | None,
) -> Job:
    """The arguments of `LoRAMoEInference.generate` with the model's own settings in place of None."""
    own = sampling_defaults(config, two_models)
    scale = own.guidance if guidance_scale is None else guidance_scale
    pair = [float(each) for each in scale] if isinstance(scale, tuple | list) else [float(scale)] * 2
    if len(pair) != 2:
        raise WanmoeError(f"guidance_scale {scale}: give one number, or two (low, high)")
    return Job(
        prompt=prompt,
        wish=wish,
        frames=num_frames,
        size=video_size,
        steps=own.steps if num_steps is None else num_steps,
        guidance=(pair[0], pair[1]),
        shift=own.shift if flow_shift is None else flow_shift,
        solver="euler" if solver == "vanilla" else solver,
        seed=seed,
        negative_prompt=negative_prompt,
        first=None if image_path is None else Path(image_path),
        last=None if last_image_path is None else Path(last_image_path),
        output=None if output_path is None else Path(output_path),
    )


def check_job(job: Job, config: WanConfig, experts: Mapping[str, ExpertSet], merged: bool) -> None:
    """Raises `WanmoeError` for a video that cannot be made, from the headers of the files alone.

    experts: of the adapter of each side that has one.
    """
    _check_size(job.frames, job.size)
    if not all(map(math.isfinite, (*job.guidance, job.shift))):
        raise WanmoeError(f"guidance_scale {job.guidance} and flow_shift {job.shift} must be finite")
    make_schedule(job.steps, job.shift, job.solver)
    if job.seed is not None and not 0 <= job.seed < 2**63:
        raise WanmoeError(f"seed {job.seed} must be at least 0 and below 2^63")
    _check_pictures(job, config)
    if job.wish and not experts:
        raise WanmoeError("a hint, a mix or a schedule was given, but no adapter: give lora_moe_weights")
    if job.wish.schedule and merged:
        raise WanmoeError(
            "merged weights hold one mix of experts, a schedule changes it along the clip; leave one out"
        )
    names = {tuple(each.names) for each in experts.values()}
    if len(names) > 1:
        low, high = (", ".join(each) for each in sorted(names))
        raise WanmoeError(f"the adapters of the two sides have different experts: {low} and {high}")
    for each in experts.values():
        job.wish.check(each, job.frames)
    if job.output is not None:
        _check_output(job.output)


def check_model(config: WanConfig, path: Path) -> None:
    """Raises `WanmoeError` for a DiT that the codecs here do not serve."""
    if config.out_dim != CHANNELS:
        raise WanmoeError(
            f"{path}: a model of {config.out_dim} latent channels (Wan2.2 5B has 48); only {CHANNELS} will do"
        )


def _check_size(frames: int, size: tuple[int, int]) -> None:
    if frames < 1 or (frames - 1) % 4:
        near = max(0, round((frames - 1) / 4)) * 4 + 1
        raise WanmoeError(f"num_frames {frames} must be 4n+1; nearest is {near}")
    near_size = [max(1, round(side / SPACE_STEP)) * SPACE_STEP for side in size]
    if list(size) != near_size:
        raise WanmoeError(
            f"video_size {size[0]}x{size[1]} (height x width) must be multiples of {SPACE_STEP}; "
            f"nearest is {near_size[0]}x{near_size[1]}"
        )


def _check_pictures(job: Job, config: WanConfig) -> None:
    given = job.first or job.last
    if config.task != "i2v":
        if given is not None:
            raise WanmoeError(f"image_path {given}: a {config.task} model takes no image; leave it out")
        return
    if job.first is None:
        raise WanmoeError("an i2v model needs image_path, the first frame of the clip")
    if config.image_positions and job.last is None:
        raise WanmoeError("this model goes from a first to a last frame: give last_image_path too")
    if config.image_dim and not config.image_positions and job.last is not None:
        raise WanmoeError(
            f"last_image_path {job.last}: this Wan2.1 i2v model was not trained for a last frame"
        )
    for picture in (job.first, job.last):
        if picture is not None:
            read_image(picture)


def _check_output(path: Path) -> None:
    if path.suffix.lower() != ".mp4":
        raise WanmoeError(f"output_path {path}: the file is an mp4; end its name in .mp4")
    if not path.parent.is_dir():
        raise WanmoeError(f"output_path {path}: the folder {path.parent} does not exist; make it first")
    for file in (path, gates_picture(path)):
        if file.is_dir():
            raise WanmoeError(f"output_path {path}: {file} is a folder; choose another name")
    if not os.access(path.parent, os.W_OK):
        raise WanmoeError(f"output_path {path}: the folder {path.parent} cannot be written")


def gates_picture(output: Path) -> Path:
    """Where the picture of the gates of a video goes."""
    return output.with_suffix(".gates.png")
