"""CholecInstanceSeg: LabelMe files of one frame each, in the data set's own folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data.annotations.instance_seg import read_instance_seg
from wanmoe.train.data.clips import Polygon

SQUARE = [[276.0, 2.0], [427, 2.0], [427, 240], [276.0, 240.0]]


def shape(label: str = "grasper", group: Any = 1, **change: Any) -> dict[str, Any]:
    made = {
        "label": label,
        "points": SQUARE,
        "group_id": group,
        "description": "",
        "shape_type": "polygon",
        "flags": None,
    }
    return made | change


def frame(folder: Path, name: str, *shapes: Any, **change: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    whole = {
        "version": "1.0.0",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": f"img_dir/{name}.png",
        "imageHeight": 480,
        "imageWidth": 854,
    }
    path.write_text(
        json.dumps({k: v for k, v in (whole | change).items() if v != "absent"}), encoding="utf-8"
    )
    return path


def test_frames_become_runs_with_outlines_as_shares(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "VID01_t50_full" / "ann_dir"
    files = [
        frame(folder, "t50_VID01_000630", shape("hook"), shape(), shape(group=1), shape(group=2)),
        frame(folder, "t50_VID01_000631", shape("hook", flags={}), shape()),
        frame(folder, "t50_VID01_000632"),
    ]
    working, empty = read_instance_seg(files)
    assert (working.video, working.start, working.end, working.split) == ("VID01", 630, 632, "train")
    assert working.instruments == (("hook", 0.5), ("grasper", 0.5)) and working.phase is None
    assert working.caption == "hook and grasper in view" and working.triplets == ()
    assert [(moment.seconds, moment.mark.track) for moment in working.moments] == [
        *((630, track) for track in ("hook/1", "grasper/1", "grasper/1", "grasper/2")),
        *((631, track) for track in ("hook/1", "grasper/1")),
    ]
    mark = working.moments[0].mark
    assert isinstance(mark, Polygon) and mark.instrument == "hook"
    assert mark.points == ((276 / 854, 2 / 480), (0.5, 2 / 480), (0.5, 0.5), (276 / 854, 0.5))
    assert (empty.start, empty.end, empty.instruments) == (632, 634, ())
    assert empty.caption == "no instrument in view"


def test_sparse_frames_speak_for_two_seconds_each(tmp_path: Path) -> None:
    folder = tmp_path / "test" / "VID07_t80_sparse" / "ann_dir"
    files = [frame(folder, f"t80_VID07_{second:06d}", shape("snare", None)) for second in (0, 30, 60)]
    got = read_instance_seg(files)
    assert [(one.start, one.end, one.split) for one in got] == [
        (0, 2, "val"),
        (30, 32, "val"),
        (60, 62, "val"),
    ]
    assert got[0].instruments == (("snare", 1.0),) and got[0].moments[0].mark.track == ""


def test_frames_of_cholecseg8k_are_counted_at_25_a_second(tmp_path: Path) -> None:
    folder = tmp_path / "VID12_seg8k" / "ann_dir"
    files = [frame(folder, f"seg8k_video12_{15750 + index:06d}", shape()) for index in range(80)]
    # Frames without an instrument lack the size of the picture.
    files.append(frame(folder, "seg8k_video12_015830", imageHeight="absent", imageWidth="absent"))
    got, empty = read_instance_seg(files)
    assert (got.video, got.start, got.end) == ("video12", 630, pytest.approx(633.2))
    assert len(got.moments) == 80 and empty.instruments == () and got.split is None


def test_videos_and_parts_are_kept_apart(tmp_path: Path) -> None:
    files = [
        frame(tmp_path, "t50_VID01_000000", shape()),
        frame(tmp_path, "seg8k_VID01_000000", shape()),
        frame(tmp_path, "t50_VID02_000001", shape()),
    ]
    assert [(one.video, one.start) for one in read_instance_seg(files)] == [
        ("VID01", 0),
        ("VID01", 0),
        ("VID02", 1),
    ]


def test_outlines_of_a_point_or_two_are_left_out_and_their_instrument_stays(tmp_path: Path) -> None:
    path = frame(tmp_path, "t50_VID01_000001", shape(points=SQUARE[:2]))
    (got,) = read_instance_seg([path])
    assert got.moments == () and got.instruments == (("grasper", 1.0),)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("frame_0001", {}, "the name must tell part, video and frame"),
        ("t50_VID01_000001", {"imageWidth": "absent"}, '"imageWidth" and "imageHeight" must be the size'),
        ("t50_VID01_000001", {"imageHeight": 0}, '"imageWidth" and "imageHeight" must be the size'),
        ("t50_VID01_000001", {"shapes": {}}, 'a list of "shapes"'),
        ("t50_VID01_000001", {"shapes": [None]}, 'shape 1: expected an object with "label"'),
        ("t50_VID01_000001", {"shapes": [shape(), shape("")]}, 'shape 2: expected an object with "label"'),
        ("t50_VID01_000001", {"shapes": [shape(shape_type="rectangle")]}, "only polygons are read"),
        ("t50_VID01_000001", {"shapes": [shape(points=None)]}, '"points" must be a list of [x, y], got None'),
        ("t50_VID01_000001", {"shapes": [shape(points=[[1, 2, 3]])]}, "a point is [x, y] in pixels"),
        ("t50_VID01_000001", {"shapes": [shape(points=[[1, None]])]}, "a point is [x, y] in pixels"),
        ("t50_VID01_000001", {"shapes": [shape(points=[[9000, 1]])]}, "a coordinate is 10.5"),
        ("t50_VID01_000001", {"shapes": [shape(group=[1])]}, '"group_id" must be a whole number'),
    ],
)
def test_a_fault_names_file_and_shape(tmp_path: Path, name: str, change: dict[str, Any], said: str) -> None:
    path = frame(tmp_path, name, *([] if "shapes" in change else [shape()]), **change)
    with pytest.raises(WanmoeError) as caught:
        read_instance_seg([path])
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)
