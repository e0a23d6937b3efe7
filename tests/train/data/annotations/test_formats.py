"""The form of a file or folder is told from what it holds, and no input makes anything but a WanmoeError."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data.annotations import FORMS, read_annotations
from wanmoe.train.data.annotations.formats import detect

NULL = [-1] * 5
CATEGORIES = {
    "triplet": {"60": "hook,dissect,gallbladder"},
    "instrument": {"0": "grasper", "2": "hook"},
    "verb": {"2": "dissect"},
    "target": {"0": "gallbladder"},
    "phase": {"1": "calot-triangle-dissection"},
}
DISSECT = [60, 2, 1, 0.1, 0.2, 0.3, 0.4, 2, 0, *NULL, 1]
CHOLECT50 = {"video": 2, "fps": 1, "categories": CATEGORIES, "annotations": {"0": [], "1": [DISSECT]}}
TOOL = {"instrument": 2, "phase": 1, "tool_bbox": [0.1, 0.2, 0.3, 0.4], "intraoperative_track": 3}
CHOLECTRACK20 = {"info": {"dataset": "CholecTrack20"}, "annotations": {"1": [], "26": [TOOL]}}
SHAPE = {"label": "hook", "points": [[1, 2], [30, 2], [30, 40]], "group_id": 1, "shape_type": "polygon"}
LABELME = {"version": "1.0.0", "shapes": [SHAPE], "imageHeight": 480, "imageWidth": 854}
EVENTS = [{"type": "instant", "text": "夹闭", "time_s": 3, "tools_in": ["钛夹钳"]}]
TOOL_TABLE = "Frame\tGrasper\tHook\n0\t1\t0\n25\t0\t1\n"
PHASE_TABLE = "Frame\tPhase\n0\tPreparation\n25\tPreparation\n"
TIMES = "剪刀剪断 1'54 5'32\n夹闭\t6.30-6.75\n"

FILES = {
    "times": ("VID02.txt", TIMES),
    "events": ("VID02.json", json.dumps(EVENTS)),
    "cholect50": ("VID02.json", json.dumps(CHOLECT50)),
    "cholec80": ("VID02-tool.txt", TOOL_TABLE),
    "cholectrack20": ("VID02.json", json.dumps(CHOLECTRACK20)),
    "instance-seg": ("t50_VID02_000010.json", json.dumps(LABELME)),
}


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_every_form_has_a_file_here() -> None:
    assert tuple(FILES) == FORMS


@pytest.mark.parametrize("form", FORMS)
def test_a_file_and_its_folder_are_told_and_read_alike(tmp_path: Path, form: str) -> None:
    path = put(tmp_path / "set", *FILES[form])
    got = read_annotations(path)
    assert detect(path) == form and got
    assert {segment.video for segment in got} == {"VID02"}
    assert got == read_annotations(path, form) == read_annotations(tmp_path / "set")
    assert got == read_annotations(tmp_path / "set", form)


@pytest.mark.parametrize("form", FORMS)
def test_the_video_can_be_named(tmp_path: Path, form: str) -> None:
    path = put(tmp_path, *FILES[form])
    assert {segment.video for segment in read_annotations(path, video="video02")} == {"video02"}


def test_the_suffix_does_not_decide(tmp_path: Path) -> None:
    path = put(tmp_path, "VID02.txt", "\n " + json.dumps(EVENTS))
    assert [segment.tools for segment in read_annotations(path)] == [("钛夹钳",)]
    assert read_annotations(tmp_path) == read_annotations(path)
    # A caption may start with a bracket and be no JSON.
    path = put(tmp_path, "caption.txt", "[Tools in: 剪刀] 剪断\nTime range: 3s - 9s\n")
    assert [segment.end for segment in read_annotations(path)] == [9]


def test_the_folders_of_the_data_sets_are_read_whole(tmp_path: Path) -> None:
    t50 = tmp_path / "CholecT50"
    put(t50, "label_mapping.txt", "# ivt,i,v,t,iv,it\n0,0,2,1,2,1\n1,0,2,0,2,0\n")
    put(t50, "README.txt", "Labels of fifty videos.\nPlease cite the paper.\n")
    for video in ("VID01", "VID02"):
        put(t50, f"labels/{video}.json", json.dumps(CHOLECT50))
    assert [segment.video for segment in read_annotations(t50)] == ["VID01", "VID02"]

    cholec80 = tmp_path / "cholec80"
    put(cholec80, "tool_annotations/video01-tool.txt", TOOL_TABLE)
    put(cholec80, "phase_annotations/video01-phase.txt", PHASE_TABLE)
    put(cholec80, "videos/video01-timestamp.txt", "Frame\tTimestamp\n1\t00:00:00.00\n2\t00:00:00.04\n")
    got = read_annotations(cholec80)
    assert [(segment.video, segment.phase) for segment in got] == [("video01", "Preparation")] * 2

    track20 = tmp_path / "CholecTrack20"
    put(track20, "Training/VID02/VID02.json", json.dumps(CHOLECTRACK20))
    put(track20, "Testing/VID01/VID01.json", json.dumps(CHOLECTRACK20))
    assert {(one.video, one.split) for one in read_annotations(track20)} == {
        ("VID01", "val"),
        ("VID02", "train"),
    }

    seg = tmp_path / "CholecInstanceSeg"
    put(seg, "train/VID01_t50_full/ann_dir/t50_VID01_000010.json", json.dumps(LABELME))
    put(seg, "train/VID01_t50_full/ann_dir/t50_VID01_000011.json", json.dumps(LABELME))
    put(seg, "val/VID03_t80_sparse/ann_dir/t80_VID03_000030.json", json.dumps(LABELME))
    assert [(one.video, one.start, one.split) for one in read_annotations(seg)] == [
        ("VID01", 10, "train"),
        ("VID03", 30, "val"),
    ]


def test_a_folder_of_texts_beside_clips_is_one_video(tmp_path: Path) -> None:
    for index, (start, end) in enumerate([(3, 9), (114, 212)]):
        text = f"夹闭胆囊管。\nDuration: {end - start}.0s\nTime range: {start}s - {end}s\n"
        put(tmp_path, f"cholec02/texts/{index}_clip{index}.txt", text)
    assert {one.video for one in read_annotations(tmp_path / "cholec02")} == {"cholec02"}
    put(tmp_path, "cholec02/texts/odd.txt", "夹闭\nTime range: 3s - 9s\n")
    assert {one.video for one in read_annotations(tmp_path, video="v")} == {"v"}


def test_what_is_passed_on_reaches_the_readers(tmp_path: Path) -> None:
    times = put(tmp_path, "a.txt", "cut\t1.30-2.30\n")
    assert [one.start for one in read_annotations(times, times="decimal")] == [78]
    frames = {str(second): [DISSECT] for second in range(10)}
    t50 = put(tmp_path, "b.json", json.dumps(CHOLECT50 | {"annotations": frames}))
    assert len(read_annotations(t50, max_seconds=5)) == 2
    with pytest.raises(WanmoeError, match="--times is 'hours'"):
        read_annotations(t50, times="hours")


@pytest.mark.parametrize(
    ("files", "form", "said"),
    [
        ({"a.json": "[1]"}, "auto", "not a known form"),
        ({"a.txt": "just a caption\n"}, "auto", "--format"),
        ({"a.json": "{"}, "auto", "not a JSON file"),
        ({"a.json": "[" * 100_000}, "auto", "not a JSON file"),
        ({"a.txt": TIMES}, "coco", "--format is 'coco', but must be auto or one of times, events"),
        ({"a.txt": TIMES}, "events", "not a JSON file"),
        ({"a.json": json.dumps(CHOLECT50 | {"annotations": {"0": []}})}, "auto", "no annotated stretch"),
    ],
)
def test_a_file_that_is_not_understood_is_one_line(
    tmp_path: Path, files: dict[str, str], form: str, said: str
) -> None:
    (path,) = [put(tmp_path, name, text) for name, text in files.items()]
    with pytest.raises(WanmoeError) as caught:
        read_annotations(path, form)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "form", "video", "said"),
    [
        ({}, "auto", None, "no annotations in this folder (0 files of .txt and .json)"),
        ({"a.txt": "a caption\n"}, "auto", None, "no annotations in this folder (1 files"),
        ({"a.txt": TIMES, "b.json": json.dumps(EVENTS)}, "auto", None, "several forms (events, times)"),
        ({"a.txt": TIMES}, "cholec80", None, "no *-tool.txt in this folder"),
        (
            {"a.json": json.dumps(EVENTS), "b.json": json.dumps(EVENTS)},
            "auto",
            "v",
            "but 2 are annotated: a, b",
        ),
    ],
)
def test_a_folder_that_is_not_understood_is_one_line(
    tmp_path: Path, files: dict[str, str], form: str, video: str | None, said: str
) -> None:
    for name, text in files.items():
        put(tmp_path, name, text)
    with pytest.raises(WanmoeError) as caught:
        read_annotations(tmp_path, form, video)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WanmoeError, match="no such file or folder"):
        read_annotations(tmp_path / "nothing")


ODD = (
    None,
    True,
    -1,
    0,
    3.5,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "7",
    [],
    [[]],
    {},
    {"a": [1]},
    "\ud800",
)


def spoiled(value: Any, draw: random.Random) -> Any:
    """The value with one of its parts, somewhere, put to something odd."""
    if draw.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return draw.choice(ODD)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [spoiled(one, draw) if index == at else one for index, one in enumerate(value)]
    at = draw.choice(list(value))
    return {
        (draw.choice(("x", "-1", "1e9", key)) if key == at else key): one for key, one in value.items()
    } | ({at: spoiled(value[at], draw)} if draw.random() < 0.8 else {})


def bent(form: str, draw: random.Random) -> bytes:
    """The file of a form, cut short, with bytes changed, with a value changed, or random from the start."""
    text = FILES[form][1]
    kind = draw.randrange(4)
    if kind == 0 and text[0] in "[{":
        return json.dumps(spoiled(json.loads(text), draw)).encode()
    data = bytearray(text.encode())
    if kind == 1:
        return bytes(data[: draw.randrange(len(data))])
    if kind == 2:
        return draw.randbytes(draw.randrange(200))
    for _ in range(draw.randint(1, 5)):
        data[draw.randrange(len(data))] = draw.choice([*b"0123456789.'-[]{}\", \t\n", draw.randrange(256)])
    return bytes(data)


@pytest.mark.parametrize("form", FORMS)
def test_broken_files_raise_nothing_but_a_wanmoe_error(tmp_path: Path, form: str) -> None:
    draw = random.Random(FORMS.index(form))
    path = tmp_path / FILES[form][0]
    outcomes = set()
    for _ in range(1500):
        path.write_bytes(bent(form, draw))
        for asked in ("auto", form):
            try:
                outcomes.add(bool(read_annotations(path, asked)))
            except WanmoeError as error:
                assert "\n" not in str(error)
                outcomes.add(None)
    assert outcomes == {True, None}
