"""Clips of one recording are one source, and videos that only share a word are not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from wanmoe.train.data.clip_list import read_clip_list
from wanmoe.train.data.sources import clip_source, recording


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cholec02_0040_part0", "cholec02"),
        ("a/clips/cholec02_0041_part1", "cholec02"),
        ("a/VID07_0003", "cholec07"),
        ("endo7_0046", "endo7"),
        ("a/endo7_0046_part1", "a/endo7"),
        ("film_0046_part1", "film"),
    ],
)
def test_a_clip_is_of_its_recording(name: str, expected: str) -> None:
    assert recording(name) == expected


@pytest.mark.parametrize(
    "name", ["again", "scissors_003", "clips/bird_2", "nasa_13013", "op2/scissors_003", "_0001", "endo07", ""]
)
def test_a_video_that_is_no_clip_is_a_source_of_its_own(name: str) -> None:
    assert recording(name) == name


def test_a_source_that_was_said_stays(tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    row = {"video_path": "a/endo7_0046.mp4", "caption": "x"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row | {'source': 'endo8_0001'})}\n")
    unsaid, said = read_clip_list(path)
    assert (clip_source(unsaid), clip_source(said)) == ("a/endo7", "endo8_0001")
    assert clip_source(replace(unsaid, source="endo7_0046")) == "endo7"
