"""A clip: a piece of a video with what is known about it, and the windows of frames that it is cut into.

Letters: F frames.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...moe_lora.errors import WanmoeError
from ...moe_lora.video import VideoInfo, frame_at

GIVEN, INTERPOLATED = "given", "interpolated"  # what a mark of a frame is


class Tip(NamedTuple):
    """The tip of an instrument in one frame; pixels of the video file, pixel centres are whole numbers."""

    frame: int
    x: float
    y: float
    instrument: str = ""
    track: str = ""
    """Marks of one instrument through time have one track; "" where it was not said."""
    kind: str = GIVEN


class Box(NamedTuple):
    """The box about an instrument in one frame, left and top first; units as of `Tip`."""

    frame: int
    x: float
    y: float
    width: float
    height: float
    instrument: str = ""
    track: str = ""
    kind: str = GIVEN


class Polygon(NamedTuple):
    """One outline of an instrument in one frame; an instance may have several, with one track."""

    frame: int
    points: tuple[tuple[float, float], ...]
    instrument: str = ""
    track: str = ""


@dataclass(frozen=True)
class Clip:
    """One piece of a video with what is known about it; None and empty: it was not said."""

    video_path: Path
    caption: str
    id: str
    source: str
    """The video that it comes from: clips of one source belong to one split."""
    origin: str
    """Where it was read, for messages: "clips.jsonl:12"."""
    caption_zh: str | None = None
    instruments: tuple[tuple[str, float], ...] | None = None
    """(name, weight), weights summing to 1; () says that there is none, None that nothing was said."""
    instrument_label: int | None = None
    """Index into the expert set."""
    tools: str = ""
    """What a `[Tools in: ...]` of the caption said."""
    split: str | None = None
    start_frame: int = 0
    num_frames: int | None = None
    frames: int | None = None
    """The clip is one window of this many frames (4 n + 1) at `fps`, as `wanmoe clips` cuts them."""
    fps: float | None = None
    tips: tuple[Tip, ...] = ()
    boxes: tuple[Box, ...] = ()
    polygons: tuple[Polygon, ...] = ()
    masks: Path | None = None
    """PNG [F * H, W]: the masks of the clip's frames, stacked vertically; or a folder of `<frame of the
    video>.png`."""
    masks_from: int = 0
    """The frame of the video to which the first mask of a stack belongs."""
    phase: str | None = None
    triplets: tuple[str, ...] = ()
    licence: str | None = None


class Window(NamedTuple):
    """The frames of the video file that make one sample, and its number within the clip."""

    number: int
    indices: tuple[int, ...]


def instrument_names(clips: Iterable[Clip]) -> list[str]:
    """The distinct names in the clips' `instruments`, sorted: the experts of a set given by labels."""
    return sorted({name for clip in clips for name, _ in clip.instruments or ()})


def check_frames(frames: int) -> None:
    """Raises `WanmoeError` where the model has no clips of so many frames."""
    if frames < 1 or frames % 4 != 1:
        raise WanmoeError(f"frames is {frames}, but a clip of the model has 4 n + 1 frames (17, 33, 81, ...)")


def windows(
    clip: Clip, info: VideoInfo, *, frames: int, fps: float | None = None, stride: int | None = None
) -> list[Window]:
    """Cut a clip into windows of `frames` (4 n + 1), `stride` apart, both counted at `fps` (the file's rate
    when None).

    The stride is `frames` unless given, so windows do not overlap. A clip that is one window already (its own
    `frames`) is that window. Empty where the clip is shorter than one window.
    """
    if clip.frames is not None:
        frames, fps, stride = clip.frames, clip.fps, None
    check_frames(frames)
    step = frames if stride is None else stride
    if step < 1 or (fps is not None and not fps > 0):
        raise WanmoeError(f"window stride {stride} and fps {fps} must be positive")
    ratio = info.fps / fps if fps else 1.0
    end = min(info.frames, clip.start_frame + (clip.num_frames or info.frames))
    cut: list[Window] = []
    while True:
        first = len(cut) * step
        indices = tuple(frame_at(clip.start_frame, first + index, ratio) for index in range(frames))
        if indices[-1] >= end:
            return cut
        cut.append(Window(len(cut), indices))
        if clip.frames is not None:
            return cut


def window_span(info: VideoInfo, frames: int, fps: float | None) -> int:
    """Frames of the file that a window covers, from its first to its last."""
    return frame_at(0, frames - 1, info.fps / fps if fps else 1.0) + 1
