"""What every reader of annotations shares: files read whole, numbers checked, names of videos and splits."""

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any

from ....moe_lora.errors import WanmoeError

# What people append to the name of a video for the file that annotates it.
_MARKERS = re.compile(
    r"[-_. ]+(tools?|phases?|timestamps?|times?|labels?|annotations?|annot|actions?|events?|captions?|标注)$",
    re.IGNORECASE,
)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    # `Segment` knows no third part: what the authors test on must not be trained on either.
    **dict.fromkeys(("val", "valid", "validation", "test", "testing"), "val"),
}
_FOLDERS_UP = 4  # <split>/VID03_t80_sparse/ann_dir/t80_VID03_000030.json


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; raises WanmoeError where it cannot be read as that."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WanmoeError(
            f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise WanmoeError(f"{path}: the annotations cannot be read: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """The JSON value of a file; raises WanmoeError where it is none."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise WanmoeError(f"{path}: not a JSON file: {error}") from error


def number(value: object) -> float | None:
    """A finite number as float; None for anything else, truth values too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def share(value: object, where: str) -> float:
    """A coordinate as a share of the picture; labels of things at the border may lie a little outside."""
    known = number(value)
    if known is None or not -0.5 <= known <= 1.5:
        raise WanmoeError(
            f"{where}: a coordinate is {shown(value)}, but it must be a share of the picture, 0 to 1"
        )
    return known


def shown(value: object) -> str:
    """A value for a message, on one line and cut short."""
    return reprlib.repr(value)


def video_name(path: Path) -> str:
    """The name of the video that a file annotates: its own without what marks it (`video01-tool.txt`)."""
    return _MARKERS.sub("", path.stem) or path.stem


def official_split(path: Path, declared: object = None) -> str | None:
    """ "train" or "val" where the file declares it or lies in a folder of that name; "test" is "val" too."""
    folders = [folder.name for folder in list(path.parents)[:_FOLDERS_UP]]
    for name in [declared if isinstance(declared, str) else "", *folders]:
        if name.lower() in _SPLITS:
            return _SPLITS[name.lower()]
    return None
