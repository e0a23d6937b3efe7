"""Which recording a clip comes from: clips of one recording belong to one split."""

import re
from pathlib import Path

from .clips import Clip

# Cholec80, CholecT50 and their kin number the same operations: video07, VID07 and cholec07 are one.
CHOLEC = re.compile(r"(?:vid|video|cholec)[-_ ]?(\d{2,3})(?![^-_. ])", re.IGNORECASE)
_CLIP_NUMBER = re.compile(r"_\d+(?P<part>_part\d+)?$")  # cholec02_0046_part1


def recording(name: str) -> str:
    """The recording that a name stands for: the operation of Cholec80 and its kin, however it is spelt, else
    the name without the number of the clip.

    "endo7_0046" and "film_0046_part1" are clips of "endo7" and "film"; "scissors_003" is a video of its own,
    since what is left of it names no recording.
    """
    last = re.split(r"[/\\]", name)[-1]
    if operation := CHOLEC.match(last):
        return f"cholec{int(operation[1]):02d}"
    clip = _CLIP_NUMBER.search(last)
    if clip and clip.start() and (clip["part"] or re.search(r"\d", last[: clip.start()])):
        return name.removesuffix(clip[0])
    return name


def clip_source(clip: Clip) -> str:
    """The source that the clip list gave, else the recording that the name of the file stands for."""
    said, path = Path(clip.source).parts, clip.video_path.with_suffix("").parts
    return recording(clip.source) if said == path[len(path) - len(said) :] else clip.source
