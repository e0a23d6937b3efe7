"""Instruments as data: names, keywords in two languages, longest match, no evidence (traps A3, A25)."""

import pytest

from wanmoe.moe_lora import Expert, ExpertSet, WanmoeError

SURGICAL = ExpertSet()


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("电凝钩切割组织。", {"Hook/Electrocautery": 1}),  # 电凝 and 钩 lie inside 电凝钩: one hit, not three
        ("吸引清理术野。抓钳抓取组织。", {"Suction": 2, "Other": 2}),
        ("双极电凝钳", {"Hook/Electrocautery": 1}),
        ("The Hooks and a pair of scissors", {"Hook/Electrocautery": 1, "Scissors": 1}),
        ("cauterising, aspirating", {"Hook/Electrocautery": 1, "Suction": 1}),
        ("a hooked needle unhooks", {}),  # whole words only
        ("用hook切割组织", {"Hook/Electrocautery": 1}),  # a Chinese character ends an English word
        ("suction吸引器", {"Suction": 2}),  # and the ending of suction* too
        ("hook2, 3hooks", {}),
        ("手术视野", {}),
        ("", {}),
    ],
)
def test_find(text, hits):
    assert SURGICAL.find(text) == hits


def test_overlapping_keywords_take_the_longer_one_even_if_it_starts_later():
    experts = ExpertSet([Expert(name="a", keywords=("夹持",)), Expert(name="b", keywords=("持针钳",))])
    assert experts.find("夹持针钳") == {"b": 1}


def test_index_by_name_case_and_keyword():
    assert SURGICAL.index("suction") == 2
    assert SURGICAL.index("bipolar") == 1


def test_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(WanmoeError, match="unknown expert 'Scisors'; nearest is 'Scissors'"):
        SURGICAL.index("Scisors")


def test_custom_experts_match_their_own_name():
    experts = ExpertSet([Expert(name="milk"), Expert(name="thanks")], fallback="milk")
    assert experts.find("a person signs thanks") == {"thanks": 1}
    assert experts.fallback == "milk"


@pytest.mark.parametrize("name", ["C++", "Tool (A)", "#2", ".net", "Hook/Electrocautery"])
def test_names_with_signs_at_their_edges_match_themselves(name):
    experts = ExpertSet([Expert(name=name), Expert(name="other")])
    for text in (name, name.lower(), f"the {name}, twice", f"用{name}切割"):
        assert experts.find(text) == {name: 1}, text
    assert experts.find(f"x{name}y") == {}


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ([], "names? at least one|is empty"),
        ([Expert(name="a"), Expert(name="A")], "names must differ"),
        ([Expert(name="a", keywords=("x",)), Expert(name="b", keywords=("X",))], "belongs to both"),
        ([Expert(name="a", keywords=("*",))], "empty keyword"),
    ],
)
def test_bad_sets_are_refused(experts, words):
    with pytest.raises(WanmoeError, match=words):
        ExpertSet(experts)
