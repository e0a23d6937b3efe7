"""Reader of CholecInstanceSeg: outlines of instruments, a LabelMe 1.0.0 file per frame.

Layout (github.com/labdeeman7/cholec_instance_seg, README.md and utilities/_sample_files):
`train/VID01_t50_full/ann_dir/t50_VID01_000631.json`, folders `train`, `val` and `test`. The first part of a
file's name tells what the number counts: `t50` and `t80` seconds (frames of CholecT50 and Cholec80 at 1
fps; the sequences called sparse have one in 30), `seg8k` frames at 25 fps (those of CholecSeg8k). An
instance may have several outlines of one label and `group_id`; the id counts within a frame. A file without
shapes says that no instrument is in view; some of those lack the size of the picture.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....moe_lora.errors import WanmoeError
from ..clips import Polygon
from ..segment import Segment
from .cholec import FPS, instrument_name
from .reading import number, official_split, read_json, share, shown
from .runs import MAX_SECONDS, Frame, segments_of, weighted
from .times import SINGLE

_RATES = {"t50": 1, "t80": 1, "seg8k": FPS}
_NAME = re.compile(r"(?P<part>t50|t80|seg8k)_(?P<video>.+)_(?P<frame>\d{1,9})", re.IGNORECASE)
_log = logging.getLogger(__name__)


def read_instance_seg(files: Sequence[Path], max_seconds: float = MAX_SECONDS) -> list[Segment]:
    """The segments of the frames in `files`, by video and part; a frame with none near it speaks for 2 s.

    Tracks are "<label>/<group_id>". Raises WanmoeError that names the file and the shape.
    """
    parts: dict[tuple[Path, str, str], list[tuple[float, Path]]] = {}
    for file in files:
        name = _NAME.fullmatch(file.stem)
        if name is None:
            raise WanmoeError(
                f"{file}: the name must tell part, video and frame, as t50_VID01_000631.json does "
                f"(parts: {', '.join(_RATES)})"
            )
        part = name["part"].lower()
        seconds = int(name["frame"]) / _RATES[part]
        parts.setdefault((file.parent, part, name["video"]), []).append((seconds, file))
    made = []
    for (folder, part, video), frames in parts.items():
        made += segments_of(
            [_frame(seconds, file) for seconds, file in frames],
            video=video,
            path=folder,
            period=1 / _RATES[part],
            max_seconds=max_seconds,
            lone=SINGLE,
            split=official_split(folder / part),
        )
    return made


def _frame(seconds: float, file: Path) -> Frame:
    data = read_json(file)
    shapes = data.get("shapes") if isinstance(data, dict) else None
    if not isinstance(shapes, list):
        raise WanmoeError(f'{file}: expected a LabelMe object with a list of "shapes", got {shown(data)}')
    sizes = [number(data.get(key)) for key in ("imageWidth", "imageHeight")]
    width, height = (size or 0.0 for size in sizes)
    if shapes and not (width > 0 and height > 0):
        raise WanmoeError(f'{file}: "imageWidth" and "imageHeight" must be the size of the picture')
    names, outlines = [], []
    for count, shape in enumerate(shapes, start=1):
        name, outline = _outline(shape, width, height, f"{file}: shape {count}")
        names.append(name)
        if outline is None:
            # What is left of a mask of a pixel or two when it is traced.
            _log.info("%s: shape %d has fewer than 3 points and is left out", file, count)
        else:
            outlines.append(outline)
    return Frame(seconds, weighted(names), marks=tuple(outlines))


def _outline(shape: Any, width: float, height: float, where: str) -> tuple[str, Polygon | None]:
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label.strip():
        raise WanmoeError(f'{where}: expected an object with "label" and "points", got {shown(shape)}')
    if shape.get("shape_type", "polygon") != "polygon":
        raise WanmoeError(f'{where}: only polygons are read, got "shape_type" {shown(shape["shape_type"])}')
    points = shape.get("points")
    if not isinstance(points, list):
        raise WanmoeError(f'{where}: "points" must be a list of [x, y], got {shown(points)}')
    corners = []
    for point in points:
        x, y = (number(one) for one in point) if isinstance(point, list) and len(point) == 2 else (None, None)
        if x is None or y is None:
            raise WanmoeError(f"{where}: a point is [x, y] in pixels, got {shown(point)}")
        corners.append((share(x / width, where), share(y / height, where)))
    group = shape.get("group_id")
    if group is not None and (isinstance(group, bool) or not isinstance(group, (int, str))):
        raise WanmoeError(f'{where}: "group_id" must be a whole number, got {shown(group)}')
    name = instrument_name(label)
    track = "" if group is None else f"{label}/{group}"
    return name, Polygon(0, tuple(corners), name, track) if len(corners) > 2 else None
