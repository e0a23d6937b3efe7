"""Readers of three data sets of cholecystectomies: CholecT50, Cholec80 and CholecTrack20.

CholecT50, `labels/VID01.json` (github.com/CAMMA-public/cholect50, docs/README-Format.md): frames at `fps`,
each a list of instances of 15 numbers: triplet; instrument id, score, left, top, width, height; verb;
target id, score, left, top, width, height; phase. Boxes are shares of the picture, -1 is null. `categories`
names the ids.

Cholec80, `tool_annotations/video01-tool.txt` and `phase_annotations/video01-phase.txt` (tools and their
order: github.com/CAMMA-public/TF-Cholec80, readme.md; header and frame numbers as readers in public code
state them): a row per 25 frames of 0 or 1 for each tool, and a row per frame with the phase, frames from 0
at 25 fps.

CholecTrack20, `Training/VID02/VID02.json` (github.com/CAMMA-public/cholectrack20, README.md and
DetEval/eval.py, where the names of instruments and phases stand): frames at 1 fps, numbered 1, 26, 51, ...
at 25 fps, and only those that show a tool; each tool an object.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....moe_lora.errors import WanmoeError
from ..clips import Box
from ..segment import Segment
from .reading import number, official_split, read_json, read_text, share, shown, video_name
from .runs import MAX_SECONDS, Frame, is_active, segments_of, spoken, weighted

FPS = 25  # of the videos
LICENCE = "CC BY-NC-SA 4.0"  # of CholecT50 and of CholecTrack20

# Spellings of the three sets, without case and separators -> names of moe_lora.instruments.CHOLEC.
_NAMES = {
    "grasper": "grasper",
    "bipolar": "bipolar",
    "hook": "hook",
    "scissors": "scissors",
    "clipper": "clipper",
    "irrigator": "irrigator",
    "specimenbag": "specimen bag",
}
_TRACK_INSTRUMENTS = ("grasper", "bipolar", "hook", "scissors", "clipper", "irrigator", "specimen bag")
_TRACK_PHASES = (
    "preparation",
    "calot-triangle-dissection",
    "clipping-and-cutting",
    "gallbladder-dissection",
    "gallbladder-packaging",
    "cleaning-and-coagulation",
    "gallbladder-retraction",
)
_CATEGORIES = ("triplet", "instrument", "verb", "target", "phase")
_INSTANCE = 15
_RATES = (0.1, 240)  # labelled frames a second


def instrument_name(label: str) -> str:
    """The name of an instrument in our sets; one that they lack keeps its own, as words."""
    return _NAMES.get(re.sub(r"[-_\s]", "", label).lower(), spoken(label))


def read_cholect50(path: Path, max_seconds: float = MAX_SECONDS) -> list[Segment]:
    """The segments of one video of CholecT50, with triplets, weights, and boxes where there are some.

    A frame with no instance was not annotated; an instance that has a phase and no instrument says that
    there is none. Raises WanmoeError that names the file and the frame.
    """
    data = _object(read_json(path), path)
    fps = number(data.get("fps"))
    if fps is None or not _RATES[0] <= fps <= _RATES[1]:
        raise WanmoeError(f'{path}: "fps" must be {_RATES[0]} to {_RATES[1]}, got {shown(data.get("fps"))}')
    tables = _object(data.get("categories"), path, "categories")
    names = {kind: _object(tables.get(kind), path, f"categories.{kind}") for kind in _CATEGORIES}
    frames = []
    for index, rows in _annotations(data, path):
        where = f"{path}: frame {index}"
        if rows:
            frames.append(_instances([_numbers(row, where) for row in rows], index / fps, names, where))
    return segments_of(
        [frame for frame in frames if frame.instruments or frame.phase],
        video=video_name(path),
        path=path,
        period=1 / fps,
        max_seconds=max_seconds,
        split=official_split(path),
        licence=LICENCE,
    )


def _numbers(row: object, where: str) -> list[float]:
    numbers = [number(one) for one in row] if isinstance(row, list) else []
    known = [one for one in numbers if one is not None]
    if len(numbers) != _INSTANCE or len(known) != _INSTANCE:
        raise WanmoeError(f"{where}: an instance is a list of {_INSTANCE} numbers, got {shown(row)}")
    return known


def _instances(
    rows: list[list[float]], seconds: float, names: Mapping[str, Mapping[str, Any]], where: str
) -> Frame:
    def named(kind: str, index: float) -> str | None:
        return None if index < 0 else _named(names[kind].get(f"{index:.0f}"), kind, index, where)

    tools, active, triplets, boxes = [], set(), [], []
    for row in rows:
        label = named("instrument", row[1])
        if label is None:
            continue
        tool = instrument_name(label)
        verb, target = named("verb", row[7]), named("target", row[8])
        triplet = named("triplet", row[0]) or (verb and target and f"{label},{verb},{target}")
        tools.append(tool)
        triplets += [triplet] if triplet else []
        active |= {tool} if verb and is_active(verb) else set()
        boxes += _box(row[3:7], tool, "", where)
    phases = [phase for row in rows if (phase := named("phase", row[14]))]
    return Frame(
        seconds, weighted(tools, active), phases[0] if phases else None, tuple(triplets), tuple(boxes)
    )


def read_cholec80(path: Path, max_seconds: float = MAX_SECONDS) -> list[Segment]:
    """The segments of one `videoXX-tool.txt` of Cholec80, with the phases of `videoXX-phase.txt`, where that
    lies beside it or in `../phase_annotations`.

    Raises WanmoeError that names file and line.
    """
    rows = list(_table(path))
    (_, header), *rows = rows or [("", [""])]
    names = [_NAMES.get(label.lower()) for label in header[1:]]
    if header[0].lower() != "frame" or not names or None in names:
        raise WanmoeError(
            f"{path}:1: expected the header of a videoXX-tool.txt, 'Frame Grasper Bipolar Hook Scissors "
            f"Clipper Irrigator SpecimenBag', got {shown(' '.join(header))}"
        )
    phases = _phases(path)
    frames = []
    for where, row in rows:
        if len(row) != len(header) or not row[0].isdecimal() or set(row[1:]) - {"0", "1"}:
            raise WanmoeError(
                f"{where}: expected a frame number and {len(names)} times 0 or 1, got {shown(' '.join(row))}"
            )
        seen = [name for name, flag in zip(names, row[1:], strict=True) if name and flag == "1"]
        frames.append(Frame(_index(row[0], where) / FPS, weighted(seen), phases.get(_index(row[0], where))))
    return segments_of(frames, video=video_name(path), path=path, period=1.0, max_seconds=max_seconds)


def _phases(tools: Path) -> dict[int, str]:
    """Phase by frame; empty where there is no file of phases."""
    name = re.sub(r"-tool$", "-phase", tools.stem) + tools.suffix
    places = [tools.with_name(name), tools.absolute().parent.parent / "phase_annotations" / name]
    found = [place for place in places if name != tools.name and place.is_file()]
    if not found:
        return {}
    phases = {}
    for where, row in list(_table(found[0]))[1:]:
        if len(row) != 2 or not row[0].isdecimal():
            raise WanmoeError(f"{where}: expected a frame number and a phase, got {shown(' '.join(row))}")
        phases[_index(row[0], where)] = row[1]
    return phases


def _table(path: Path) -> Iterator[tuple[str, list[str]]]:
    for count, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{count}", line.split()


def read_cholectrack20(path: Path, max_seconds: float = MAX_SECONDS) -> list[Segment]:
    """The segments of one video of CholecTrack20, with boxes whose track is the intraoperative one.

    Raises WanmoeError that names the file and the frame.
    """
    data = _object(read_json(path), path)
    video = data.get("video")
    video = video if isinstance(video, dict) else {}
    frames = []
    for index, tools in _annotations(data, path):
        if tools:
            frames.append(_tracked(tools, (index - 1) / FPS, f"{path}: frame {index}"))
    name = video.get("name")
    return segments_of(
        frames,
        video=name if isinstance(name, str) and name else video_name(path),
        path=path,
        period=1.0,
        max_seconds=max_seconds,
        split=official_split(path, video.get("split")),
        licence=LICENCE,
    )


def _tracked(tools: list[Any], seconds: float, where: str) -> Frame:
    names, boxes, phase = [], [], None
    if seconds < 0:
        raise WanmoeError(f"{where}: frames are counted from 1")
    for tool in tools:
        if not isinstance(tool, dict):
            raise WanmoeError(
                f'{where}: a tool is an object with "instrument" and "tool_bbox", got {shown(tool)}'
            )
        name = _listed(_TRACK_INSTRUMENTS, tool.get("instrument"), "instrument", where)
        if name is None:
            continue
        phase = phase or _listed(_TRACK_PHASES, tool.get("phase"), "phase", where)
        names.append(name)
        box = tool.get("tool_bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise WanmoeError(f'{where}: "tool_bbox" is [left, top, width, height], got {shown(box)}')
        track = number(tool.get("intraoperative_track"))
        boxes += _box(box, name, "" if track is None or track < 0 else str(int(track)), where)
    return Frame(seconds, weighted(names), phase, marks=tuple(boxes))


def _box(values: list[Any], instrument: str, track: str, where: str) -> list[Box]:
    """The box as a list of one; empty where it is null."""
    if -1 in values:
        return []
    left, top, width, height = (share(one, where) for one in values)
    return [Box(0, left, top, width, height, instrument, track)]


def _listed(names: tuple[str, ...], value: object, kind: str, where: str) -> str | None:
    index = number(value)
    if index is None and value is not None:
        raise WanmoeError(f'{where}: "{kind}" must be a number, got {shown(value)}')
    if index is None or index < 0:
        return None
    return _named(dict(enumerate(names)).get(round(index)), kind, index, where)


def _named(name: object, kind: str, index: float, where: str) -> str:
    if not isinstance(name, str) or not name or not index.is_integer():
        raise WanmoeError(f"{where}: {kind} {index:g} has no name among the categories")
    return name


def _annotations(data: Mapping[str, Any], path: Path) -> Iterator[tuple[int, list[Any]]]:
    frames = _object(data.get("annotations"), path, "annotations")
    for key, rows in frames.items():
        index = _index(key, f"{path}: annotations")
        if not isinstance(rows, list):
            raise WanmoeError(f"{path}: frame {index}: expected a list, got {shown(rows)}")
        yield index, rows


def _index(text: str, where: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise WanmoeError(f"{where}: a frame is numbered by digits, got {shown(text)}")
    return int(text)


def _object(value: object, path: Path, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        what = f'"{key}"' if key else "the file"
        raise WanmoeError(f"{path}: {what} must hold a JSON object, got {shown(value)}")
    return value
