"""Clip lists: which pieces of which videos there are, what they show, and which of them are held out.

A list is `clips.jsonl`, one JSON object a line, paths relative to the file; or a folder of videos
whose names are their labels. Letters: F frames.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...moe_lora.errors import WanmoeError
from ...moe_lora.video import VideoInfo, frame_at

SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
_SECONDS = re.compile(r"\s*\[\d+(\.\d+)?s\]\s*$")  # the ` [3s]` that some tools append to a line
_TOOLS = re.compile(r"\[\s*tools?\s+(?:in|observed)\s*:\s*([^\]]*)\]", re.IGNORECASE)


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
    tips: tuple[tuple[float, ...], ...] = ()
    """Rows (frame, x, y); frames and pixels of the video file."""
    boxes: tuple[tuple[float, ...], ...] = ()
    """Rows (frame, x, y, width, height)."""
    masks: Path | None = None
    """PNG [F * H, W]: the masks of the clip's frames, stacked vertically."""
    masks_from: int = 0
    """The frame of the video to which the first mask belongs."""


class Window(NamedTuple):
    """The frames of the video file that make one sample, and its number within the clip."""

    number: int
    indices: tuple[int, ...]


def read_clip_list(path: str | Path) -> list[Clip]:
    """Read `clips.jsonl`; needs `video_path` and `caption` on every line, and takes the other fields of
    `Clip`.

    A trailing ` [3s]` after the object is accepted. Raises `WanmoeError` that names file, line and cause.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WanmoeError(
            f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        raise WanmoeError(f"{path}: the clip list cannot be read: {error.strerror}") from error
    clips = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            clips.append(_clip(line, path, f"{path}:{number}"))
    if not clips:
        raise WanmoeError(f"{path}: the clip list holds no clips")
    return clips


def clips_from_folder(folder: str | Path) -> list[Clip]:
    """The clips of a folder: its `clips.jsonl` where there is one, else every video in it and its subfolders.

    A video's label is its file name without trailing digits (`scissors_003.mp4` -> "scissors"), or its
    folder's name where nothing is left; its caption is the first line of `<stem>.txt` beside it, else the
    label.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WanmoeError(f"{folder}: no such folder of clips")
    if (folder / "clips.jsonl").is_file():
        return read_clip_list(folder / "clips.jsonl")
    clips = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inside.parts):
            continue
        label = _label(path)
        clips.append(
            Clip(
                video_path=path,
                caption=_side_caption(path) or label,
                id=path.stem,
                source=str(inside.with_suffix("")),
                origin=str(path),
                instruments=((label, 1.0),),
            )
        )
    if not clips:
        raise WanmoeError(f"{folder}: no clips.jsonl and no video in it ({', '.join(SUFFIXES)})")
    return clips


def instrument_names(clips: Iterable[Clip]) -> list[str]:
    """The distinct names in the clips' `instruments`, sorted: the experts of a set given by labels."""
    return sorted({name for clip in clips for name, _ in clip.instruments or ()})


def windows(
    clip: Clip, info: VideoInfo, *, frames: int, fps: float | None = None, stride: int | None = None
) -> list[Window]:
    """Cut a clip into windows of `frames` (4 n + 1), `stride` apart, both counted at `fps` (the file's rate
    when None).

    The stride is `frames` unless given, so windows do not overlap. Empty where the clip is shorter than one
    window.
    """
    if frames < 1 or frames % 4 != 1:
        raise WanmoeError(f"frames is {frames}, but a clip of the model has 4 n + 1 frames (17, 33, 81, ...)")
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


def window_span(info: VideoInfo, frames: int, fps: float | None) -> int:
    """Frames of the file that a window covers, from its first to its last."""
    return frame_at(0, frames - 1, info.fps / fps if fps else 1.0) + 1


def _clip(line: str, path: Path, origin: str) -> Clip:
    try:
        row = json.loads(_SECONDS.sub("", line))
    except ValueError as error:
        raise WanmoeError(f"{origin}: not a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise WanmoeError(f"{origin}: expected a JSON object, got {type(row).__name__}")
    for key in ("video_path", "caption"):
        if key not in row:
            raise WanmoeError(f"{origin}: the key {key!r} is missing")
        if not isinstance(row[key], str) or not row[key].strip():
            raise WanmoeError(f"{origin}: {key!r} must be a text that is not empty, got {row[key]!r}")
    tools = " ".join(_TOOLS.findall(row["caption"]))
    video = path.parent / row["video_path"]
    return Clip(
        video_path=video,
        caption=" ".join(_TOOLS.sub(" ", row["caption"]).split()),
        id=_text(row, "id", origin) or video.stem,
        source=_text(row, "source", origin) or str(Path(row["video_path"]).with_suffix("")),
        origin=origin,
        caption_zh=_text(row, "caption_zh", origin),
        instruments=_instruments(row.get("instruments"), origin),
        instrument_label=_whole(row, "instrument_label", 0, origin),
        tools=tools,
        split=_split(row, origin),
        start_frame=_whole(row, "start_frame", 0, origin) or 0,
        num_frames=_whole(row, "num_frames", 1, origin),
        masks_from=_whole(row, "start_frame", 0, origin) or 0,
        tips=_rows(row, "tips", 3, origin),
        boxes=_rows(row, "boxes", 5, origin),
        masks=path.parent / row["masks"] if _text(row, "masks", origin) else None,
    )


def _text(row: Mapping[str, Any], key: str, origin: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise WanmoeError(f"{origin}: {key!r} must be a text, got {value!r}")
    return value or None


def _whole(row: Mapping[str, Any], key: str, least: int, origin: str) -> int | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise WanmoeError(f"{origin}: {key!r} must be a whole number of {least} or more, got {value!r}")
    return value


def _split(row: Mapping[str, Any], origin: str) -> str | None:
    value = row.get("split")
    if value not in (None, "train", "val"):
        raise WanmoeError(f'{origin}: "split" is "train" or "val", got {value!r}')
    return value


def _rows(row: Mapping[str, Any], key: str, width: int, origin: str) -> tuple[tuple[float, ...], ...]:
    value = row.get(key) or []
    rows = value if isinstance(value, list) else [value]
    for one in rows:
        if not isinstance(one, list) or len(one) != width or not all(_number(part) for part in one):
            raise WanmoeError(f"{origin}: {key!r} is a list of rows of {width} numbers, got the row {one!r}")
    return tuple(tuple(float(part) for part in one) for one in rows)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _instruments(value: object, origin: str) -> tuple[tuple[str, float], ...] | None:
    if value is None:
        return None
    pairs: list[tuple[str, float]] = []
    for one in value if isinstance(value, list) else [value]:
        name, weight = (one, 1.0) if isinstance(one, str) else (None, None)
        if isinstance(one, dict):
            name, weight = one.get("name"), one.get("weight", 1.0)
        if not isinstance(name, str) or not name or not _number(weight) or float(weight or 0) <= 0:
            raise WanmoeError(
                f'{origin}: "instruments" is a list of names or of {{"name", "weight"}} with positive '
                f"weights, got {one!r}"
            )
        pairs.append((name, float(weight or 0)))
    total = sum(weight for _, weight in pairs)
    return tuple((name, weight / total) for name, weight in pairs)


def _label(path: Path) -> str:
    """The file name without what numbers it, or the folder's name where it is nothing but a number."""
    return re.sub(r"[\s\d_.()#-]+$", "", path.stem) or path.parent.name


def _side_caption(path: Path) -> str:
    side = path.with_suffix(".txt")
    if not side.is_file():
        return ""
    try:
        lines = side.read_text(encoding="utf-8-sig").strip().splitlines()
    except UnicodeDecodeError as error:
        raise WanmoeError(
            f"{side}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    if not lines:
        raise WanmoeError(f"{side}: the caption file is empty; write a caption or remove it")
    return lines[0].strip()
