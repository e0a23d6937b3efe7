"""Lists of events in JSON."""

import json
from pathlib import Path

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data.annotations.events import read_events

INSTANT = {"type": "instant", "text": "钛夹钳夹闭胆囊管 [Tools in: 钛夹钳]", "time_s": 12.5}
SEGMENT = {
    "type": "segment",
    "text": "电凝钩A 切割胆囊三角",
    "start_s": 30,
    "end_s": 41.5,
    "tools_in": ["电凝钩A", "抓钳"],
    "tools_observed": ["抓钳", "吸引器"],
}


def written(folder: Path, value: object) -> Path:
    path = folder / "cholec07_events.json"
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def test_instants_and_segments_are_read_with_their_tools(tmp_path: Path) -> None:
    path = written(tmp_path, [INSTANT, SEGMENT])
    instant, segment = read_events(path)
    assert (instant.start, instant.end, instant.tools) == (12.5, 14.5, ())
    assert instant.caption == "钛夹钳夹闭胆囊管 [Tools in: 钛夹钳]"
    assert (segment.start, segment.end) == (30, 41.5)
    assert segment.tools == ("电凝钩A", "抓钳", "吸引器")
    assert segment.instruments is None and segment.video == "cholec07"
    assert segment.origin == f"{path}: event 2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "moment"}, '"type" is "instant" or "segment", got \'moment\''),
        ({"text": " "}, '"text" must be a text'),
        ({"start_s": "30"}, '"start_s" must be seconds'),
        ({"start_s": -1}, '"start_s" must be seconds'),
        ({"end_s": 30}, 'must come after "start_s" 30'),
        ({"end_s": float("nan")}, '"end_s" must be seconds, 0 or more, got nan'),
        ({"end_s": True}, '"end_s" must be seconds'),
        ({"tools_in": "hook"}, '"tools_in" must be a list of names'),
        ({"tools_observed": [3]}, '"tools_observed" must be a list of names'),
    ],
)
def test_a_fault_names_the_event(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = written(tmp_path, [INSTANT, {**SEGMENT, **change}])
    with pytest.raises(WanmoeError) as caught:
        read_events(path)
    assert str(caught.value).startswith(f"{path}: event 2: ") and said in str(caught.value)


@pytest.mark.parametrize("value", [[], {}, "text", [3], None])
def test_what_is_no_list_of_events_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(WanmoeError, match="expected"):
        read_events(written(tmp_path, value))
