"""CholecT50, Cholec80 and CholecTrack20, from small files in exactly their layouts."""

import json
from pathlib import Path
from typing import Any

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC
from wanmoe.train.data.annotations.cholec import read_cholec80, read_cholect50, read_cholectrack20
from wanmoe.train.data.clips import Box

# Ids and names as in the label files of CholecT50, "carlot" too.
CATEGORIES = {
    "triplet": {
        "17": "grasper,retract,gallbladder",
        "60": "hook,dissect,gallbladder",
        "79": "clipper,clip,cystic_duct",
        "94": "grasper,null_verb,null_target",
    },
    "instrument": dict(enumerate(("grasper", "bipolar", "hook", "scissors", "clipper", "irrigator"))),
    "verb": dict(enumerate(("grasp", "retract", "dissect", "coagulate", "clip", "cut"))) | {9: "null_verb"},
    "target": {"0": "gallbladder", "2": "cystic_duct", "14": "null_target"},
    "phase": dict(enumerate(("preparation", "carlot-triangle-dissection", "clipping-and-cutting"))),
}
NULL = [-1, -1, -1, -1, -1]
RETRACT = [17, 0, 1, *NULL[:4], 1, 0, *NULL, 1]
DISSECT = [60, 2, 1.0, 0.25, 0.5, 0.125, 0.2, 2, 0, *NULL, 1]
IDLE = [94, 0, 1, *NULL[:4], 9, 14, *NULL, 1]
CLIP = [79, 4, 1, *NULL[:4], 4, 2, *NULL, 2]
NONE = [-1, -1, *NULL, -1, -1, *NULL, 2]
TOOLS = ("Grasper", "Bipolar", "Hook", "Scissors", "Clipper", "Irrigator", "SpecimenBag")


def t50(folder: Path, frames: dict[str, Any], **change: Any) -> Path:
    path = folder / "labels" / "VID02.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "video": 2,
        "fps": 1,
        "num_frames": 2840,
        "categories": CATEGORIES,
        "annotations": frames,
        "info": {"name": "CholecT50", "bbox format": "tlwh"},
        "licenses": [{"id": 1, "name": "CC BY-NC-SA 4.0"}],
    }
    path.write_text(json.dumps(whole | change), encoding="utf-8")
    return path


def test_the_layout_of_an_instance_is_fifteen_numbers() -> None:
    assert {len(row) for row in (RETRACT, DISSECT, IDLE, CLIP, NONE)} == {15}


def test_cholect50_becomes_runs_with_triplets_weights_and_boxes(tmp_path: Path) -> None:
    frames = {
        "0": [],
        **{str(second): [RETRACT, DISSECT] for second in (1, 2, 3, 4)},
        "5": [RETRACT],
        "6": [IDLE, RETRACT],
        "7": [CLIP],
        "8": [NONE],
        "9": [NONE],
        "10": [],
    }
    path = t50(tmp_path, frames)
    both, hold, clip, none = read_cholect50(path)

    assert (both.video, both.start, both.end) == ("VID02", 1, 5)
    assert both.caption == "hook dissects gallbladder; grasper retracts gallbladder"
    assert both.caption_zh is None and both.phase == "carlot-triangle-dissection"
    assert both.instruments is not None
    assert [name for name, _ in both.instruments] == ["hook", "grasper"]
    assert dict(both.instruments) == pytest.approx({"hook": 0.7, "grasper": 0.3})
    assert both.triplets == ("grasper,retract,gallbladder", "hook,dissect,gallbladder")
    assert [moment.seconds for moment in both.moments] == [1, 2, 3, 4]
    assert both.moments[0].mark == Box(0, 0.25, 0.5, 0.125, 0.2, "hook")
    assert both.licence == "CC BY-NC-SA 4.0" and both.split is None

    assert (hold.start, hold.end, hold.instruments) == (5, 7, (("grasper", 1.0),))
    assert hold.caption == "grasper retracts gallbladder" and not hold.moments
    assert (clip.start, clip.end, clip.caption) == (7, 8, "clipper clips cystic duct")
    assert (none.start, none.end, none.instruments) == (8, 10, ())
    assert none.caption == "no instrument in view during clipping and cutting"


def test_every_name_that_cholect50_gives_is_one_of_ours(tmp_path: Path) -> None:
    ours = {expert.name for expert in CHOLEC}
    frames = {str(3 * index): [[-1, index, *NULL, -1, -1, *NULL, 0]] for index in range(6)}
    got = read_cholect50(t50(tmp_path, frames))
    assert {name for one in got for name, _ in one.instruments or ()} == ours
    assert got[0].caption == "grasper in view during preparation" and got[0].triplets == ()


def test_the_rate_of_the_labels_is_the_files_own(tmp_path: Path) -> None:
    (got,) = read_cholect50(t50(tmp_path, {"10": [CLIP], "11": [CLIP]}, fps=0.5))
    assert (got.start, got.end) == (20, 24)


def test_long_runs_are_cut(tmp_path: Path) -> None:
    path = t50(tmp_path, {str(second): [DISSECT] for second in range(41)})
    got = read_cholect50(path)
    assert [one.start for one in got] == pytest.approx([0, 41 / 3, 82 / 3])
    assert [one.end for one in got] == pytest.approx([41 / 3, 82 / 3, 41])
    assert len(read_cholect50(path, max_seconds=41)) == 1


@pytest.mark.parametrize(
    ("frames", "change", "said"),
    [
        ({"7": [CLIP[:14]]}, {}, "frame 7: an instance is a list of 15 numbers"),
        ({"7": [[*CLIP[:14], "2"]]}, {}, "frame 7: an instance is a list of 15 numbers"),
        ({"7": CLIP}, {}, "frame 7: an instance is a list of 15 numbers"),
        ({"7": {}}, {}, "frame 7: expected a list"),
        ({"x": [CLIP]}, {}, "a frame is numbered by digits, got 'x'"),
        ({"7": [[79, 9, *CLIP[2:]]]}, {}, "frame 7: instrument 9 has no name"),
        ({"7": [[79, 1.5, *CLIP[2:]]]}, {}, "frame 7: instrument 1.5 has no name"),
        ({"7": [[*DISSECT[:3], 213.0, *DISSECT[4:]]]}, {}, "frame 7: a coordinate is 213.0"),
        ({"7": [CLIP]}, {"fps": 0}, '"fps" must be 0.1 to 240, got 0'),
        ({"7": [CLIP]}, {"categories": None}, '"categories" must hold a JSON object, got None'),
        ({"7": [CLIP]}, {"categories": {"triplet": {}}}, '"categories.instrument" must hold'),
        ({}, {"annotations": []}, '"annotations" must hold a JSON object'),
    ],
)
def test_a_fault_of_cholect50_is_one_line(
    tmp_path: Path, frames: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    path = t50(tmp_path, frames, **change)
    with pytest.raises(WanmoeError) as caught:
        read_cholect50(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)


def table(path: Path, header: str, rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def tools(path: Path, *flags: str) -> Path:
    rows = ["\t".join([str(25 * second), *row]) for second, row in enumerate(flags)]
    return table(path, "\t".join(["Frame", *TOOLS]), rows)


def phases(path: Path, *names: str) -> Path:
    """A row for each frame, 25 of one name."""
    rows = [f"{25 * second + frame}\t{name}" for second, name in enumerate(names) for frame in range(25)]
    return table(path, "Frame\tPhase", rows)


@pytest.mark.parametrize("folder", ["tool_annotations", "phase_annotations"])
def test_cholec80_is_read_with_its_phases_beside_it_or_in_their_folder(tmp_path: Path, folder: str) -> None:
    path = tools(
        tmp_path / "tool_annotations" / "video01-tool.txt",
        *("1010000", "1010000", "1010000", "0000000", "0000001", "0000001"),
    )
    calot, packaging = "CalotTriangleDissection", "GallbladderPackaging"
    phases(tmp_path / folder / "video01-phase.txt", calot, calot, packaging, packaging, packaging)
    got = read_cholec80(path)
    assert [(one.video, one.start, one.end, one.phase) for one in got] == [
        ("video01", 0, 2, calot),
        ("video01", 2, 3, packaging),
        ("video01", 3, 4, packaging),
        ("video01", 4, 5, packaging),
        ("video01", 5, 6, None),
    ]
    assert got[0].instruments == (("grasper", 0.5), ("hook", 0.5))
    assert got[0].caption == "grasper and hook in view during calot triangle dissection"
    assert got[2].instruments == () and got[2].caption == "no instrument in view during gallbladder packaging"
    assert got[4].instruments == (("specimen bag", 1.0),) and got[4].caption == "specimen bag in view"


def test_cholec80_is_read_without_phases_and_with_its_columns_in_any_order(tmp_path: Path) -> None:
    path = table(tmp_path / "video80-tool.txt", "Frame\tHook\tGrasper", ["0\t1\t0", "25\t1\t0", "50\t0\t1"])
    first, second = read_cholec80(path)
    assert (first.end, first.instruments, first.phase) == (2, (("hook", 1.0),), None)
    assert second.instruments == (("grasper", 1.0),) and first.moments == ()


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("Frame\tPhase", "0\tPreparation", ":1: expected the header of a videoXX-tool.txt"),
        ("Frame", "0", ":1: expected the header of a videoXX-tool.txt"),
        ("Frame\tHook\tSpoon", "0\t1\t1", ":1: expected the header of a videoXX-tool.txt"),
        ("Frame\tHook", "0\t2", ":2: expected a frame number and 1 times 0 or 1, got '0 2'"),
        ("Frame\tHook", "0\t1\t1", ":2: expected a frame number and 1 times 0 or 1"),
        ("Frame\tHook", "x\t1", ":2: expected a frame number and 1 times 0 or 1"),
        ("Frame\tHook", "9999999999\t1", ":2: a frame is numbered by digits"),
    ],
)
def test_a_fault_of_cholec80_is_one_line(tmp_path: Path, header: str, row: str, said: str) -> None:
    path = table(tmp_path / "video01-tool.txt", header, [row])
    with pytest.raises(WanmoeError) as caught:
        read_cholec80(path)
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)


def test_a_fault_of_a_phase_file_names_that_file(tmp_path: Path) -> None:
    path = tools(tmp_path / "video01-tool.txt", "1000000")
    broken = table(tmp_path / "video01-phase.txt", "Frame\tPhase", ["0\tPreparation", "1 Clean up"])
    with pytest.raises(WanmoeError, match="expected a frame number and a phase") as caught:
        read_cholec80(path)
    assert str(caught.value).startswith(f"{broken}:3: ")


def tool(**change: Any) -> dict[str, Any]:
    made = {
        "instrument": 0,
        "verb": -1,
        "target": -1,
        "phase": 1,
        "triplet": -1,
        "tool_bbox": [0.6, 0.64, 0.365, 0.306],
        "operator": 2,
        "iscrowd": 0,
        "area": 157798.0,
        "score": 1.0,
        "intraoperative_track": 4,
        "intracorporeal_track": 5,
        "visibility_track": 6,
        "visibility": 1,
        **dict.fromkeys(("crowded", "occluded", "bleeding", "smoke", "blurred"), 0),
    }
    return made | change


def track20(folder: Path, frames: dict[str, Any], **change: Any) -> Path:
    path = folder / "Training" / "VID02" / "vid02.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "info": {"dataset": "CholecTrack20", "version": 1.0, "bbox format": "tlwh"},
        "annotations": frames,
        "categories": {"tools": [{"id": 0, "name": "grasper"}], "operators": []},
        "video": {
            "name": "VID02",
            "num_frames": len(frames),
            "split": "training",
            "height": 480,
            "width": 854,
        },
    }
    path.write_text(json.dumps(whole | change), encoding="utf-8")
    return path


def test_cholectrack20_becomes_runs_with_tracked_boxes(tmp_path: Path) -> None:
    hook = tool(instrument=2, tool_bbox=[-0.002, 0.1, 0.2, 0.2], intraoperative_track=7)
    bag = tool(instrument=6, phase=4, intraoperative_track=-1)
    hidden = tool(instrument=6, phase=4, tool_bbox=[-1, -1, -1, -1])
    frames = {
        "4326": [tool(), hook],
        "4351": [tool(), hook],
        "4401": [tool()],
        "000001": [bag],
        "26": [hidden],
    }
    frames["51"] = []
    bagging, working, holding = read_cholectrack20(track20(tmp_path, frames))

    assert (bagging.start, bagging.end, bagging.phase) == (0, 2, "gallbladder-packaging")
    assert bagging.instruments == (("specimen bag", 1.0),) and len(bagging.moments) == 1
    assert (working.video, working.start, working.end) == ("VID02", 173, 175)
    assert working.instruments == (("grasper", 0.5), ("hook", 0.5))
    assert working.caption == "grasper and hook in view during calot triangle dissection"
    assert [(moment.seconds, moment.mark) for moment in working.moments[1:3]] == [
        (173, Box(0, -0.002, 0.1, 0.2, 0.2, "hook", "7")),
        (174, Box(0, 0.6, 0.64, 0.365, 0.306, "grasper", "4")),
    ]
    assert (holding.start, holding.end) == (176, 177)
    assert {one.split for one in (bagging, working, holding)} == {"train"}
    assert holding.licence == "CC BY-NC-SA 4.0"


@pytest.mark.parametrize(("said", "split"), [("testing", "val"), ("Validation", "val"), ("?", "train")])
def test_the_split_is_what_the_file_says_else_its_folder(tmp_path: Path, said: str, split: str) -> None:
    path = track20(tmp_path, {"1": [tool()]}, video={"split": said})
    (got,) = read_cholectrack20(path)
    assert got.split == split and got.video == "vid02"


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ({"26": [3]}, "frame 26: a tool is an object"),
        ({"26": [tool(instrument=7)]}, "frame 26: instrument 7 has no name"),
        ({"26": [tool(instrument="hook")]}, "frame 26: \"instrument\" must be a number, got 'hook'"),
        ({"26": [tool(tool_bbox=[120.0, 132.0, 23.0, 65.0])]}, "frame 26: a coordinate is 120.0"),
        ({"26": [tool(tool_bbox=[0.1, 0.2])]}, 'frame 26: "tool_bbox" is [left, top, width, height]'),
        ({"0": [tool()]}, "frame 0: frames are counted from 1"),
    ],
)
def test_a_fault_of_cholectrack20_is_one_line(tmp_path: Path, frames: dict[str, Any], said: str) -> None:
    path = track20(tmp_path, frames)
    with pytest.raises(WanmoeError) as caught:
        read_cholectrack20(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)
