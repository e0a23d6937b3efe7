"""The forms of annotations: which one a file has, and the reader for it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....moe_lora.errors import WanmoeError
from ..segment import Segment
from .cholec import read_cholec80, read_cholect50, read_cholectrack20
from .events import read_events
from .instance_seg import read_instance_seg
from .reading import read_json, read_text
from .runs import MAX_SECONDS
from .times import check_times, holds_times, read_times

# Form -> the files of a folder that have it. Of Cholec80 those of the tools: the reader finds the phases.
_PATTERNS = {
    "times": "*.txt",
    "events": "*.json",
    "cholect50": "*.json",
    "cholec80": "*-tool.txt",
    "cholectrack20": "*.json",
    "instance-seg": "*.json",
}
FORMS = tuple(_PATTERNS)
_SUFFIXES = (".txt", ".json")


def read_annotations(
    path: Path,
    form: str = "auto",
    video: str | None = None,
    *,
    times: str = "auto",
    max_seconds: float = MAX_SECONDS,
    forms: Mapping[Path, str | None] | None = None,
) -> list[Segment]:
    """The segments of a file of annotations, or of all in a folder and its subfolders.

    Args:
        form: one of `FORMS`, or "auto": told from what the files hold.
        video: the name of the video, where the file's own name, or what the file says, is not it.
        times: what numbers with a point mean in a file of times, see `read_times`.
        max_seconds: runs of labelled frames (the cholec forms and instance-seg) are cut to this length.
        forms: what `detect_all` said of the folder, where that is known already.

    Raises WanmoeError that names the file, the place in it and what was expected.
    """
    path = Path(path)
    if form != "auto" and form not in FORMS:
        raise WanmoeError(f"--format is {form!r}, but must be auto or one of {', '.join(FORMS)}")
    check_times(times)
    form, files = _files(path, form, forms)
    segments = _read(form, files, times, max_seconds)
    if not segments:
        raise WanmoeError(f"{path}: no annotated stretch in it (read as {form}; --format sets another form)")
    if video is None:
        return segments
    videos = sorted({segment.video for segment in segments})
    # The text beside a clip is named after the clip, so a folder of those has many names and one video.
    if len(videos) > 1 and form != "times":
        raise WanmoeError(
            f"{path}: one name of a video ({video}) is given, but {len(videos)} are annotated: "
            f"{', '.join(videos[:3])}, ...; give one file, or no name"
        )
    return [replace(segment, video=video) for segment in segments]


def _read(form: str, files: list[Path], times: str, max_seconds: float) -> list[Segment]:
    if form == "instance-seg":
        return read_instance_seg(files, max_seconds)
    readers: dict[str, Callable[[Path], list[Segment]]] = {
        "times": lambda file: read_times(file, times),
        "events": read_events,
        "cholect50": lambda file: read_cholect50(file, max_seconds),
        "cholec80": lambda file: read_cholec80(file, max_seconds),
        "cholectrack20": lambda file: read_cholectrack20(file, max_seconds),
    }
    return [segment for file in files for segment in readers[form](file)]


def _files(path: Path, form: str, forms: Mapping[Path, str | None] | None) -> tuple[str, list[Path]]:
    """The form, told where it is "auto", and the files to read."""
    if path.is_file():
        return (_told(path) if form == "auto" else form), [path]
    if not path.is_dir():
        raise WanmoeError(f"{path}: no such file or folder of annotations")
    if form == "auto":
        found = detect_all(path) if forms is None else forms
        several = sorted({known for known in found.values() if known is not None})
        if len(several) != 1:
            what = f"annotations of several forms ({', '.join(several)})" if several else "no annotations"
            raise WanmoeError(
                f"{path}: {what} in this folder ({len(found)} files of {' and '.join(_SUFFIXES)}); "
                f"name the form with --format ({', '.join(FORMS)}) or give one file"
            )
        form = several[0]
        # A file named unlike its form is read too, such as events in a .txt; Cholec80's phases are no such.
        files = [file for file, known in found.items() if known == form]
        return form, [file for file in files if form != "cholec80" or file.match(_PATTERNS[form])]
    files = _candidates(path, _PATTERNS[form])
    if not files:
        raise WanmoeError(f"{path}: no {_PATTERNS[form]} in this folder, which the form {form} reads")
    return form, files


def _candidates(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob(pattern)
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def _told(path: Path) -> str:
    form = detect(path)
    if form is None:
        raise WanmoeError(
            f"{path}: not a known form of annotations; name it with --format ({', '.join(FORMS)}), "
            "or see the forms in the guide"
        )
    return form


def detect_all(folder: Path) -> dict[Path, str | None]:
    """`detect` of every text and JSON file in a folder and its subfolders."""
    return {file: detect(file) for file in _candidates(folder, "*")}


def detect(path: Path) -> str | None:
    """The form that a file has by what it holds, None where it is none of `FORMS`.

    Raises WanmoeError where it cannot be read, or is called .json and is none.
    """
    if path.suffix.lower() == ".json":
        return _json_form(read_json(path))
    text = read_text(path)
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return _json_form(json.loads(text))
        except (ValueError, RecursionError):
            pass  # a caption may start with a bracket
    header = text.split("\n", 1)[0].lower().split()
    if header[:1] == ["frame"]:
        return "cholec80" if header[1:2] == ["phase"] or "grasper" in header else None
    return "times" if holds_times(text) else None


def _json_form(data: Any) -> str | None:
    if isinstance(data, list):
        keys = data[0].keys() if data and isinstance(data[0], dict) else set()
        return "events" if {"type", "text"} & keys else None
    if not isinstance(data, dict):
        return None
    if isinstance(data.get("shapes"), list):
        return "instance-seg"
    frames = data.get("annotations")
    if not isinstance(frames, dict):
        return None
    first = next((rows[0] for rows in frames.values() if isinstance(rows, list) and rows), None)
    if isinstance(first, dict):
        return "cholectrack20" if "tool_bbox" in first else None
    tables = data.get("categories")
    known = isinstance(tables, dict) and "triplet" in tables
    return "cholect50" if known or isinstance(first, list) else None
