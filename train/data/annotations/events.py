"""A list of events in JSON, as the seed project's annotation tool writes it.

    [{"type": "instant", "text": "...", "time_s": 12.5, "tools_in": ["hook"], "tools_observed": ["grasper"]},
     {"type": "segment", "text": "...", "start_s": 12.5, "end_s": 18}]

A `[Tools in: ...]` inside a text stays there: it is read with the caption.
"""

from pathlib import Path
from typing import Any

from ....moe_lora.errors import WanmoeError
from ..segment import Segment
from .reading import number, read_json, shown, video_name
from .times import SINGLE


def read_events(path: Path) -> list[Segment]:
    """The segments of a list of events; an instant lasts 2 s.

    Raises WanmoeError that names the file and the number of the event, the first being 1.
    """
    data = read_json(path)
    if not isinstance(data, list) or not data:
        raise WanmoeError(f"{path}: expected a list of events that is not empty, got {shown(data)}")
    return [_event(row, path, f"{path}: event {count}") for count, row in enumerate(data, start=1)]


def _event(row: object, path: Path, where: str) -> Segment:
    if not isinstance(row, dict):
        raise WanmoeError(f'{where}: expected an object with "type" and "text", got {shown(row)}')
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise WanmoeError(f'{where}: "text" must be a text that is not empty, got {shown(text)}')
    kind = row.get("type")
    if kind == "instant":
        start = _time(row, "time_s", where)
        end = start + SINGLE
    elif kind == "segment":
        start, end = _time(row, "start_s", where), _time(row, "end_s", where)
    else:
        raise WanmoeError(f'{where}: "type" is "instant" or "segment", got {shown(kind)}')
    if end <= start:
        raise WanmoeError(f'{where}: "end_s" {end:g} must come after "start_s" {start:g}')
    tools = [*_labels(row, "tools_in", where), *_labels(row, "tools_observed", where)]
    return Segment(
        video_name(path), start, end, " ".join(text.split()), where, tools=tuple(dict.fromkeys(tools))
    )


def _time(row: dict[str, Any], key: str, where: str) -> float:
    known = number(row.get(key))
    if known is None or known < 0:
        raise WanmoeError(f'{where}: "{key}" must be seconds, 0 or more, got {shown(row.get(key))}')
    return known


def _labels(row: dict[str, Any], key: str, where: str) -> list[str]:
    value = row.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise WanmoeError(f'{where}: "{key}" must be a list of names, got {shown(value)}')
    return [one.strip() for one in value if one.strip()]
