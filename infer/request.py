"""What is checked of a request before any weights are read: with the real model that takes minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..moe_lora.errors import WanmoeError
from ..moe_lora.wan.codec import SPACE_STRIDE
from .load import experts_of
from .route import Wish

# Pixels of a patch: the codec halves three times, every Wan DiT takes 2 x 2 of its cells.
SPACE_STEP = 2 * SPACE_STRIDE


def check_size(frames: int, size: tuple[int, int]) -> None:
    """Raises `WanmoeError`, naming the nearest valid value, for a clip that no Wan model makes."""
    if frames < 1 or (frames - 1) % 4:
        near = max(0, round((frames - 1) / 4)) * 4 + 1
        raise WanmoeError(f"num_frames {frames} must be 4n+1; nearest is {near}")
    near_size = [max(1, round(side / SPACE_STEP)) * SPACE_STEP for side in size]
    if list(size) != near_size:
        raise WanmoeError(
            f"video_size {size[0]}x{size[1]} (height x width) must be multiples of {SPACE_STEP}; "
            f"nearest is {near_size[0]}x{near_size[1]}"
        )


def checked_output(path: Path) -> Path:
    """The path of an mp4 in a folder that exists; raises `WanmoeError` otherwise."""
    if path.suffix.lower() != ".mp4":
        raise WanmoeError(f"output_path {path}: the file is an mp4; end its name in .mp4")
    if not path.parent.is_dir():
        raise WanmoeError(f"output_path {path}: the folder {path.parent} does not exist; make it first")
    return path


def check_request(
    frames: int,
    size: tuple[int, int],
    output: Path,
    pictures: Sequence[Path | None],
    adapters: Sequence[Path],
    config_file: Path | None,
    wish: Wish,
) -> None:
    """Raises `WanmoeError` for a request that cannot be met, by its arguments and the adapter files alone."""
    check_size(frames, size)
    checked_output(output)
    for picture in pictures:
        if picture is not None and not picture.is_file():
            raise WanmoeError(f"{picture}: no such picture")
    if wish and not adapters:
        raise WanmoeError("a hint, a mix or a schedule was given, but no adapter: give lora_moe_weights")
    for path in adapters:
        wish.check(experts_of(path, config_file), frames)
