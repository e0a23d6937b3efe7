"""Requests from a file: what is read, and what is said of lines that cannot be."""

import json

import pytest

from wanmoe.infer.prompts import Request, read_prompts
from wanmoe.moe_lora.errors import WanmoeError


def test_a_text_file_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "\ufeff# for the talk\n\n  电凝钩分离胆囊  \r\na hook # not a comment\n", encoding="utf-8"
    )
    assert read_prompts(path) == [Request(prompt="电凝钩分离胆囊"), Request(prompt="a hook # not a comment")]


def test_every_key_of_a_json_line_is_read_and_paths_are_relative_to_the_file(tmp_path):
    full = {
        "prompt": "a hook",
        "instrument_hint": "Hook/Electrocautery",
        "mix": {"Hook": 0.6, "Suction": 1},
        "schedule": "0:Hook, 40:Suction",
        "image_path": "first.png",
        "last_image_path": "/data/last.png",
        "negative_prompt": "",
        "seed": 7,
        "output_path": "clips/a.mp4",
        "num_frames": 17,
        "video_size": [256, 320],
        "num_steps": 12,
        "guidance_scale": [3, 4.5],
        "flow_shift": 5,
    }
    assert full.keys() == Request.model_fields.keys()
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(full) + "\n\n" + '{"prompt": "吸引", "guidance_scale": 2}\n', encoding="utf-8")
    first, second = read_prompts(path)
    assert first.model_dump() == {
        **full,
        "image_path": tmp_path / "first.png",
        "last_image_path": type(path)("/data/last.png"),
        "output_path": tmp_path / "clips" / "a.mp4",
        "video_size": (256, 320),
        "guidance_scale": (3, 4.5),
    }
    assert second == Request(prompt="吸引", guidance_scale=2.0)
    rest = second.model_dump(exclude={"prompt", "guidance_scale"})
    assert set(rest.values()) == {None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "num_frame": 17}', "unknown key 'num_frame'; nearest is 'num_frames'"),
        ('{"seed": 1}', "prompt is missing"),
        ('{"prompt": ""}', "prompt is ''"),
        ('{"prompt": "a", "seed": "7"}', "seed is '7': .*valid integer"),
        ('{"prompt": "a", "num_steps": 2.5}', "num_steps is 2.5"),
        ('{"prompt": "a", "video_size": [256]}', "video_size"),
        ('{"prompt": "a", "guidance_scale": "high"}', "guidance_scale is 'high'"),
        ('{"prompt": "a", "mix": {"Hook": null}}', "mix is None"),
        ('{"prompt": "a", "schedule": "3:Hook"}', "schedule '3:Hook' starts at frame 3; it must start at 0"),
        ('{"prompt": "a"', "a line is a JSON object"),
        ('"a hook"', "a line is a JSON object"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_its_file(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line, encoding="utf-8")
    with pytest.raises(WanmoeError, match=rf"prompts\.jsonl:3: .*{message}") as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_two_lines_may_not_write_the_same_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "output_path": "a.mp4"}\n' * 2, encoding="utf-8")
    with pytest.raises(WanmoeError, match=r"jsonl:2: output_path .*a\.mp4 is that of line 1 too"):
        read_prompts(path)


def test_files_that_are_no_prompts_are_refused(tmp_path):
    for name, content, message in [
        ("prompts.csv", b"a", r"prompts\.csv: prompts are read from \.txt"),
        ("empty.txt", b"# nothing\n\n", "holds no prompt"),
        ("latin.txt", b"\xff\xfe\xff", "UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WanmoeError, match=message):
            read_prompts(tmp_path / name)
    with pytest.raises(WanmoeError, match=r"none\.txt: cannot read the prompts"):
        read_prompts(tmp_path / "none.txt")
