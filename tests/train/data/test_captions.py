"""Captions: what makes no clip, what is cleaned away, and the tools in brackets (trap A26)."""

import pytest

from wanmoe.train.data.captions import clean_caption, skip_reason, tools_of


@pytest.mark.parametrize("text", ["显露CVS", "the Cvs view", "手术结束，撤出器械", "暂时停止"])
def test_speech_about_the_operation_makes_no_clip(text: str) -> None:
    reason = skip_reason(text)
    assert reason is not None and "the caption says" in reason


@pytest.mark.parametrize("text", ["抓钳牵拉胆囊", "canvas vs skin", "手术开始", ""])
def test_other_captions_are_kept(text: str) -> None:
    assert skip_reason(text) is None


def test_the_reason_is_one_whatever_the_spelling() -> None:
    assert skip_reason("CVS") == skip_reason("cVs") == "the caption says 'cvs'"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("抓钳A、抓钳B牵拉胆囊", "抓钳牵拉胆囊"),
        ("抓钳1、抓钳2、抓钳3牵拉", "抓钳牵拉"),
        ("抓钳A牵拉，抓钳B固定", "抓钳牵拉，抓钳固定"),
        ("抓钳1号、抓钳2号牵拉", "抓钳牵拉"),
        ("戳卡b置入", "戳卡置入"),
        ("电凝钩A切割，双极电凝B止血", "电凝钩切割，双极电凝止血"),
        ("双极电凝钳A止血", "双极电凝钳A止血"),  # another instrument, with a name of its own
        ("抓钳grasps the 电凝钩hook", "抓钳grasps the 电凝钩hook"),
        ("Fat [Tools in: hook] is  moved\t[unsure] left.", "Fat is moved left."),
        ("  抓钳 牵拉  ", "抓钳 牵拉"),
        ("[Tools observed: scissors]", ""),
        ("a [ b", "a [ b"),
    ],
)
def test_numbers_and_brackets_are_cleaned_away(text: str, clean: str) -> None:
    assert clean_caption(text) == clean
    assert clean_caption(clean) == clean


def test_tools_in_brackets_are_read_before_they_are_dropped() -> None:
    text = (
        "Fat is moved. [Tools in: Hook, grasper] [note: grasper] [tools  observed: grasper、电凝钩；suction]"
    )
    assert tools_of(text) == ("Hook", "grasper", "电凝钩", "suction")
    assert tools_of("[Tool in: specimen bag]") == ("specimen bag",)
    assert tools_of("[Tools in: ] [unsure] a hook") == ()
    assert "Tools" not in clean_caption(text)
