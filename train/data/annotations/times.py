"""Actions with their times in text files, in the forms of the seed project's annotators.

    action 1'54 5'32                 minutes'seconds, pairs of start and end; several on a line, ` - ` allowed
    action 1'54                      a single time: 2 s from there
    state action 1'54 - 5'32         `state`, `reason` and `constant` in front are no part of the action
    parent                           indented lines under a line are its parts: the line itself is skipped
        part 1'54 5'32
    action<tab>0.32-0.34<tab>1.05-1.12     with a point: decimal minutes, minutes and seconds, or seconds
    action 114 332                   numbers without a point, or with an s: seconds

And the file beside a clip: the caption, then `Duration: 98.0s` and `Time range: 114s - 212s`.
Full-width and typographic marks (1’54, 1′54, 1：54, 1分54秒) are taken too.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from ....moe_lora.errors import WanmoeError
from ..segment import Segment
from .reading import read_text, shown, video_name

SINGLE = 2.0  # seconds of what is marked by one time alone
READINGS = ("auto", "decimal", "mm.ss", "seconds")
_LONGEST_LINE = 2000  # characters; a longer one is no list of actions, and searching it would take long
_TAB = 4  # columns of a tab at the start of a line

_MARK = "[:：'’‘′＇´`分]"
_CLOCK = rf"(?:\d{{1,2}}{_MARK})?\d{{1,3}}{_MARK}\d{{1,2}}(?:\.\d{{1,3}})?(?:[\"”″＂秒]|'')?"
_NUMBER = r"\d{1,6}(?:\.\d{1,6})?(?:s|秒)?"
_DASH = r"\s*[-–—~～－−至到]\s*"


def _list_of(time: str) -> str:
    one = rf"(?:{time})(?:{_DASH}(?:{time}))?"
    return rf"{one}(?:(?:\s*[,，;；、]\s*|\s+){one})*"


_TIMES = re.compile(_list_of(f"{_CLOCK}|{_NUMBER}"))
_ITEM = re.compile(rf"({_CLOCK}|{_NUMBER})(?:{_DASH}({_CLOCK}|{_NUMBER}))?")
# The shortest action whose rest is nothing but times. Numbers need a space before them: "grasper2" is a name.
_CLOCK_LINE = re.compile(rf"(?P<action>.*?\S)\s*(?P<times>{_list_of(_CLOCK)})")
_NUMBER_LINE = re.compile(rf"(?P<action>.*?\S)[\s:：]+(?P<times>{_list_of(_NUMBER)})")
_PREFIX = re.compile(r"(?:state|reason|constant)[\s:：]+", re.IGNORECASE)
_SIDE = re.compile(r"\s*(?P<key>duration|time range)\s*[:：]\s*(?P<value>.*?)\s*", re.IGNORECASE)
_CLIP_NUMBER = re.compile(r"_\d+(_part\d+)?$")  # cholec02_0046_part1
_COMMA = re.compile(rf"(?<![\d.]|{_MARK})\d+,\d+(?![\d.]|{_MARK})")
_LEFT = re.compile(rf"\d{_MARK}\d{{1,2}}\s*$")  # at the end of an action: a time that was taken for a word
_log = logging.getLogger(__name__)


class _Line(NamedTuple):
    where: str
    indent: int
    text: str
    action: str
    spans: list[tuple[str, str | None]]
    """As written: (start, end), end None for a single time."""


def read_times(path: Path, times: str = "auto") -> list[Segment]:
    """The segments of a text file of actions and times, or of the text file beside a clip.

    Args:
        times: what a number with a point means: "decimal" minutes (1.50 is 1 min 30 s), "mm.ss" (1.50 is
            1 min 50 s), "seconds", or "auto": decimal where the file has a fraction that cannot be seconds
            (.60 and more, or more than two digits), which is logged; else it must be said.

    Raises WanmoeError that names file and line, the value, and the form that is expected.
    """
    check_times(times)
    rows = [
        (f"{path}:{count}", row) for count, row in enumerate(read_text(path).split("\n"), 1) if row.strip()
    ]
    if not rows:
        raise WanmoeError(f"{path}: the file is empty; expected lines such as \"action 1'54 5'32\"")
    if any(_SIDE.fullmatch(row) for _, row in rows):
        return [_side_segment(rows, path)]
    lines = [_line(where, row) for where, row in rows]
    # A line with indented lines under it is their sum: only those are what is seen.
    following = [line.indent for line in lines[1:]] + [0]
    leaves = [line for line, indent in zip(lines, following, strict=True) if indent <= line.indent]
    unit = _unit(leaves, times, path)
    return [segment for line in leaves for segment in _segments(line, unit, video_name(path))]


def check_times(times: str) -> None:
    """Raises WanmoeError where `times` is none of `READINGS`."""
    if times not in READINGS:
        raise WanmoeError(f"--times is {times!r}, but must be one of {', '.join(READINGS)}")


def holds_times(text: str) -> bool:
    """Whether a text looks like one that `read_times` reads: a third of its lines or more have times."""
    rows = [row for row in text.split("\n") if row.strip()]
    if any(_SIDE.fullmatch(row) for row in rows):
        return True
    timed = 0
    for row in rows:
        try:
            timed += bool(_line("", row).spans)
        except WanmoeError:
            continue  # a line with a fault says nothing of what the others are
    return timed > 0 and 3 * timed >= len(rows)


def _line(where: str, row: str) -> _Line:
    if len(row) > _LONGEST_LINE:
        raise WanmoeError(f"{where}: a line of {len(row)} characters; at most {_LONGEST_LINE} are read")
    text = row.strip()
    wide = row.expandtabs(_TAB)
    indent = len(wide) - len(wide.lstrip())
    action, tab, rest = text.partition("\t")
    if tab:
        times = " ".join(rest.split())
        if not _TIMES.fullmatch(times):
            raise WanmoeError(
                f'{where}: {shown(times)} is no list of times such as "0.32-0.34<tab>1.05-1.12"'
            )
    else:
        found = _CLOCK_LINE.fullmatch(text) or _NUMBER_LINE.fullmatch(text)
        action, times = (found["action"], found["times"]) if found else (text, "")
    if comma := _COMMA.search(times):
        raise WanmoeError(
            f"{where}: {shown(comma[0])} has a comma between digits; write 0.5 with a point, and two times "
            "with a space"
        )
    left = _LEFT.search(action)
    if times and left and not _TIMES.fullmatch(action):
        raise WanmoeError(
            f"{where}: {shown(left[0])} before {shown(times)} looks like a time of another spelling; write "
            "all times of a line in one"
        )
    prefix = _PREFIX.match(action)
    action = action[prefix.end() if prefix else 0 :].strip(" \t:：,，;；-")
    return _Line(where, indent, text, " ".join(action.split()), _spans(times, where))


def _spans(times: str, where: str) -> list[tuple[str, str | None]]:
    items = [(found[1], found[2]) for found in _ITEM.finditer(times)]
    if len(items) < 2 or any(end for _, end in items):
        return items
    if len(items) % 2:
        raise WanmoeError(
            f"{where}: {len(items)} times in {shown(times)}; each start needs its end, and "
            "a name that ends in a number a tab before its times"
        )
    starts = [start for start, _ in items]
    return list(zip(starts[::2], starts[1::2], strict=True))


def _segments(line: _Line, unit: str, video: str) -> list[Segment]:
    if not line.action or _TIMES.fullmatch(line.action):
        raise WanmoeError(f"{line.where}: no action before the times in {shown(line.text)}")
    if not line.spans:
        raise WanmoeError(f"{line.where}: no time in {shown(line.text)}; expected \"action 1'54 5'32\"")
    return [
        Segment(video, *_range(start, end, unit, line.where), caption=line.action, origin=line.where)
        for start, end in line.spans
    ]


def _range(start: str, end: str | None, unit: str, where: str) -> tuple[float, float]:
    first = _seconds(start, unit, where)
    last = first if end is None else _seconds(end, unit, where)
    if last < first:
        raise WanmoeError(f"{where}: {end} ({last:g} s) comes before {start} ({first:g} s)")
    # Times are in whole seconds: an action that starts and ends in one is as good as a single time.
    return first, last if last > first else first + SINGLE


def _seconds(time: str, unit: str, where: str) -> float:
    parts = re.split(_MARK, time.rstrip("\"”″＂'秒s"))
    if len(parts) > 1:
        if float(parts[-1]) >= 60 or (len(parts) == 3 and int(parts[1]) >= 60):
            raise WanmoeError(f"{where}: {time} has 60 or more seconds; expected minutes'seconds as in 1'54")
        whole = 0
        for part in parts[:-1]:
            whole = 60 * whole + int(part)
        return 60 * whole + float(parts[-1])
    if unit == "seconds" or time[-1] in "s秒":
        return float(parts[0])
    if unit == "decimal":
        return round(60 * float(parts[0]), 3)
    if not _may_be_seconds(time):
        raise WanmoeError(f"{where}: {time} is not minutes.seconds; seconds are .00 to .59, in two digits")
    whole_minutes, _, fraction = time.partition(".")
    return 60.0 * int(whole_minutes) + int(fraction.ljust(2, "0")[:2])


def _may_be_seconds(time: str) -> bool:
    """Whether what follows the point can be seconds; 1.5 is 1.50, as a spreadsheet shows it."""
    fraction = time.partition(".")[2]
    return len(fraction.rstrip("0")) <= 2 and int(fraction.ljust(2, "0")[:2]) < 60


def _unit(lines: list[_Line], times: str, path: Path) -> str:
    """What bare numbers of the file mean: "decimal", "mm.ss" or "seconds"."""
    if times != "auto":
        return times
    bare = re.compile(r"\d+(\.\d+)?")
    known = [
        (line.where, time)
        for line in lines
        for span in line.spans
        for time in span
        if time and bare.fullmatch(time)
    ]
    pointed = next(((where, time) for where, time in known if "." in time), None)
    if pointed is None:
        return "seconds"
    unlike = next((time for _, time in known if not _may_be_seconds(time)), None)
    if unlike is None:
        where, time = pointed
        means = [f"{_seconds(time, unit, where):g} s" for unit in ("decimal", "mm.ss", "seconds")]
        raise WanmoeError(
            f"{where}: the time {time} may be decimal minutes ({means[0]}), minutes.seconds ({means[1]}) or "
            f"seconds ({means[2]}); say which with --times decimal, mm.ss or seconds"
        )
    _log.warning(
        "%s: times are read as decimal minutes, since %s cannot be minutes.seconds; where they are seconds, "
        "say --times seconds",
        path,
        unlike,
    )
    return "decimal"


def _side_segment(rows: list[tuple[str, str]], path: Path) -> Segment:
    said = [(where, found) for where, row in rows if (found := _SIDE.fullmatch(row))]
    caption = " ".join(row.strip() for _, row in rows if not _SIDE.fullmatch(row))
    ranges = [(where, found["value"]) for where, found in said if found["key"].lower() == "time range"]
    if not caption or not ranges:
        raise WanmoeError(f'{path}: expected a caption and a line such as "Time range: 114s - 212s"')
    where, value = ranges[0]
    span = _ITEM.fullmatch(value)
    if span is None or span[2] is None:
        raise WanmoeError(f'{where}: {shown(value)} is no time range such as "114s - 212s"')
    # <video>/texts/<clip>.txt, or the name of the clip: <video>_0046_part1.txt
    video = path.absolute().parent.parent.name if path.absolute().parent.name == "texts" else ""
    video = video or _CLIP_NUMBER.sub("", video_name(path))
    return Segment(video, *_range(span[1], span[2], "seconds", where), caption=caption, origin=where)
