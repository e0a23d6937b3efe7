"""Lists of clips: `clips.jsonl`, one JSON object a line, paths relative to the file; or a folder of videos
whose names are their labels.

Every fault of a line is named; what `write_clip_list` writes reads back as the same clips.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import write_atomic
from .captions import TOOLS as _TOOLS
from .clips import GIVEN, INTERPOLATED, Box, Clip, Polygon, Tip

_SECONDS = re.compile(r"\s*\[\d+(\.\d+)?s\]\s*$")  # the ` [3s]` that some tools append to a line
SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
Mark = TypeVar("Mark", Tip, Box, Polygon)


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


def write_clip_list(path: str | Path, clips: Iterable[Clip]) -> None:
    """Write `clips.jsonl`, whole or not at all; paths become relative to the file."""
    path = Path(path)
    folder = path.absolute().parent
    lines = [json.dumps(clip_row(clip, folder), ensure_ascii=False) + "\n" for clip in clips]
    write_atomic(path, lambda partial: partial.write_text("".join(lines), encoding="utf-8"))


def clip_row(clip: Clip, folder: Path) -> dict[str, Any]:
    """The line of a clip as JSON values, without what is not known; paths relative to `folder`."""
    row: dict[str, Any] = {
        "id": clip.id,
        "video_path": _relative(clip.video_path, folder),
        "caption": clip.caption,
        "caption_zh": clip.caption_zh,
        "instruments": None
        if clip.instruments is None
        else [{"name": name, "weight": weight} for name, weight in clip.instruments],
        "instrument_label": clip.instrument_label,
        "tools": [clip.tools] if clip.tools else [],
        "source": clip.source,
        "split": clip.split,
        "start_frame": clip.start_frame or None,
        "num_frames": clip.num_frames,
        "frames": clip.frames,
        "fps": clip.fps,
        "tips": [_mark_row(tip) for tip in clip.tips],
        "boxes": [_mark_row(box) for box in clip.boxes],
        "polygons": [_mark_row(polygon) for polygon in clip.polygons],
        "masks": None if clip.masks is None else _relative(clip.masks, folder),
        "phase": clip.phase,
        "triplets": list(clip.triplets),
        "licence": clip.licence,
    }
    kept = {key: value for key, value in row.items() if value not in (None, [])}
    return kept | ({"instruments": []} if clip.instruments == () else {})


def _mark_row(mark: Tip | Box | Polygon) -> dict[str, Any]:
    return {key: value for key, value in mark._asdict().items() if value not in ("", GIVEN)}


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.absolute(), folder)).as_posix()


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
    tools = ", ".join([*_texts(row, "tools", origin), *_TOOLS.findall(row["caption"])])
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
        frames=_whole(row, "frames", 1, origin),
        fps=_rate(row, origin),
        tips=_marks(row, "tips", _tip, origin),
        boxes=_marks(row, "boxes", _box, origin),
        polygons=_marks(row, "polygons", _polygon, origin),
        masks=path.parent / row["masks"] if _text(row, "masks", origin) else None,
        masks_from=_whole(row, "start_frame", 0, origin) or 0,
        phase=_text(row, "phase", origin),
        triplets=_texts(row, "triplets", origin),
        licence=_text(row, "licence", origin),
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


def _rate(row: Mapping[str, Any], origin: str) -> float | None:
    value = row.get("fps")
    if value is not None and not (_number(value) and value > 0):
        raise WanmoeError(f"{origin}: 'fps' must be a positive number, got {value!r}")
    return None if value is None else float(value)


def _texts(row: Mapping[str, Any], key: str, origin: str) -> tuple[str, ...]:
    value = row.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise WanmoeError(f"{origin}: {key!r} must be a list of texts, got {value!r}")
    return tuple(value)


def _marks(
    row: Mapping[str, Any], key: str, read: Callable[[object], Mark | None], origin: str
) -> tuple[Mark, ...]:
    """The marks of a line: rows of numbers, or objects that also say instrument, track and kind."""
    value = row.get(key) or []
    marks = []
    for one in value if isinstance(value, list) else [value]:
        mark = read(one)
        if mark is None:
            raise WanmoeError(f"{origin}: {key!r} is a list of {_FORMS[key]}, got {one!r}")
        marks.append(mark)
    return tuple(marks)


_FORMS = {
    "tips": 'rows of 3 numbers [frame, x, y] or of {"frame", "x", "y", "instrument", "track", "kind"}',
    "boxes": 'rows of 5 numbers [frame, x, y, width, height] or of {"frame", "x", "y", "width", "height", '
    '"instrument", "track", "kind"}, width and height above 0',
    "polygons": '{"frame", "points": [[x, y], ...], "instrument", "track"} with 3 points or more',
}


def _tip(value: object) -> Tip | None:
    numbers, said = _numbers(value, ("frame", "x", "y"))
    if numbers is None:
        return None
    frame, x, y = numbers
    return Tip(int(frame), x, y, *said)


def _box(value: object) -> Box | None:
    numbers, said = _numbers(value, ("frame", "x", "y", "width", "height"))
    if numbers is None or min(numbers[3:]) <= 0:
        return None
    frame, x, y, width, height = numbers
    return Box(int(frame), x, y, width, height, *said)


def _polygon(value: object) -> Polygon | None:
    if not isinstance(value, dict):
        return None
    points = value.get("points")
    numbers, said = _numbers(value, ("frame",))
    if numbers is None or not isinstance(points, list) or len(points) < 3:
        return None
    if not all(isinstance(p, list) and len(p) == 2 and all(_number(n) for n in p) for p in points):
        return None
    return Polygon(int(numbers[0]), tuple((float(x), float(y)) for x, y in points), *said[:2])


def _numbers(value: object, keys: tuple[str, ...]) -> tuple[tuple[float, ...] | None, tuple[str, str, str]]:
    """The numbers of a mark, None where they are not there, and its (instrument, track, kind)."""
    said = ("", "", GIVEN)
    if isinstance(value, dict):
        said = (value.get("instrument", ""), value.get("track", ""), value.get("kind", GIVEN))
        if not all(isinstance(one, str) for one in said) or said[2] not in (GIVEN, INTERPOLATED):
            return None, said
        value = [value.get(key) for key in keys]
    if not isinstance(value, list) or len(value) != len(keys) or not all(_number(one) for one in value):
        return None, said
    # A frame is a whole number of 0 or more; some tools write it as 5.0.
    whole = float(value[0]) >= 0 and float(value[0]).is_integer()
    return (tuple(float(one) for one in value), said) if whole else (None, said)


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
