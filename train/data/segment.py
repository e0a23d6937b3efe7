"""What an annotation file says: stretches of a video in seconds, not yet frames of a file."""

from dataclasses import dataclass
from typing import NamedTuple

from .clips import Box, Polygon, Tip


class Moment(NamedTuple):
    """A mark at a time of the video, in seconds.

    The mark's own `frame` is not used; its coordinates are shares of the picture's width and height, 0 to 1,
    since an annotation may have been made on another size than the video has.
    """

    seconds: float
    mark: Tip | Box | Polygon


@dataclass(frozen=True)
class Segment:
    """A stretch of a video that an annotation speaks of; None and empty: it was not said."""

    video: str
    """Name of the video, without folder and suffix: what the file of the video is found by."""
    start: float
    """Seconds from the start of the video."""
    end: float
    caption: str
    origin: str
    """Where it was read, for messages: "labels.txt:12"."""
    caption_zh: str | None = None
    tools: tuple[str, ...] = ()
    """Instruments that an annotator named as in use or in sight, in the annotation's own words."""
    instruments: tuple[tuple[str, float], ...] | None = None
    """(name, weight) by the labels; () says that there is none, None that nothing was said."""
    phase: str | None = None
    triplets: tuple[str, ...] = ()
    """ "instrument,verb,target" as the annotation spells them."""
    moments: tuple[Moment, ...] = ()
    licence: str | None = None
    split: str | None = None
    """Where the annotation comes with an official split: "train" or "val"."""
