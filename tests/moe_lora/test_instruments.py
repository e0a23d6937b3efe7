"""Instruments as data: names, keywords in two languages, longest match, no evidence (traps A3, A25)."""

import pytest

from wanmoe.moe_lora import Expert, ExpertSet, WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC, known_experts

SURGICAL = ExpertSet()
TOOLS = ExpertSet(CHOLEC)


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


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("抓钳抓取组织", {"grasper": 2}),
        ("双极电凝钳止血", {"bipolar": 1}),
        ("电凝钩切割", {"hook": 1}),
        ("剪刀剪切", {"scissors": 2}),
        ("钛夹钳夹闭胆囊管", {"clipper": 2}),
        ("吸引器吸引", {"irrigator": 2}),
        ("bipolar forceps", {"bipolar": 1}),  # not the grasper's forceps
        ("a video clip, 夹住, 呼吸", {}),
    ],
)
def test_the_six_tools_are_found_by_their_words(text, hits):
    assert TOOLS.find(text) == hits


@pytest.mark.parametrize(
    ("name", "tools", "families"),
    [
        ("Hook/Electrocautery", {"bipolar": 0.5, "hook": 0.5}, {"Hook/Electrocautery": 1.0}),
        ("Other", {"grasper": 0.5, "clipper": 0.5}, {"Other": 1.0}),
        (" suction", {"irrigator": 1.0}, {"Suction": 1.0}),
        ("Scissors", {"scissors": 1.0}, {"Scissors": 1.0}),
        ("bipolar", {"bipolar": 1.0}, {"Hook/Electrocautery": 1.0}),
        ("hook", {"hook": 1.0}, {"Hook/Electrocautery": 1.0}),
        ("Grasper", {"grasper": 1.0}, {"Other": 1.0}),
        ("clipper", {"clipper": 1.0}, {"Other": 1.0}),
        ("irrigator", {"irrigator": 1.0}, {"Suction": 1.0}),
        ("电凝钩", {"hook": 1.0}, {"Hook/Electrocautery": 1.0}),
    ],
)
def test_names_of_either_taxonomy_are_understood_by_both(name, tools, families):
    assert TOOLS.weights(name) == tools
    assert SURGICAL.weights(name) == families


def test_only_the_members_that_are_there_share_a_family():
    some = ExpertSet(known_experts(["grasper", "hook"]))
    assert some.weights("Hook/Electrocautery") == {"hook": 1.0}
    with pytest.raises(WanmoeError, match="unknown expert 'Suction'; nearest is .*known are: grasper, hook"):
        some.weights("Suction")


def test_own_names_and_words_go_before_the_other_taxonomy():
    own = ExpertSet([Expert(name="hook"), Expert(name="blade", keywords=("Hook/Electrocautery",))])
    assert own.weights("hook/electrocautery") == {"blade": 1.0}
    assert ExpertSet([Expert(name="other"), Expert(name="grasper")]).weights("Other") == {"other": 1.0}
    with pytest.raises(WanmoeError, match="unknown expert 'Suction'"):
        ExpertSet([Expert(name="milk"), Expert(name="thanks")]).weights("Suction")


def test_known_names_get_our_words_and_others_their_own():
    assert known_experts(expert.name for expert in CHOLEC) == CHOLEC
    assert known_experts(SURGICAL.names) == SURGICAL.experts
    assert known_experts(["Type-A"]) == (Expert(name="Type-A"),)
    spelt = known_experts(["SCISSORS", "HOOK"])
    assert [expert.name for expert in spelt] == ["SCISSORS", "HOOK"]
    assert ExpertSet(spelt).find("剪刀,电凝钩") == {"SCISSORS": 1, "HOOK": 1}


def test_a_list_from_both_taxonomies_is_a_usable_set():
    mixed = ExpertSet(known_experts(["clipper", "Other", "Hook/Electrocautery", "bipolar"]))
    assert mixed.find("bipolar") == {"bipolar": 1}
    assert mixed.find("trocar, clipper, cautery") == {"Other": 1, "clipper": 1, "Hook/Electrocautery": 1}
