"""Labelled frames become runs, weights and captions."""

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data.annotations.runs import Frame, is_active, segments_of, spoken, weighted
from wanmoe.train.data.clips import Box
from wanmoe.train.data.segment import Segment

HOOK, GRASPER = weighted(["hook"]), weighted(["grasper"])


def cut(
    frames: list[Frame], period: float = 1.0, max_seconds: float = 20.0, lone: float = 0.0
) -> list[Segment]:
    return segments_of(
        frames, video="v", path=Path("v.json"), period=period, max_seconds=max_seconds, lone=lone
    )


def test_weights_favour_the_instrument_at_work() -> None:
    assert weighted([]) == ()
    assert weighted(["hook", "hook"]) == (("hook", 1.0),)
    assert weighted(["grasper", "hook"]) == (("grasper", 0.5), ("hook", 0.5))
    assert dict(weighted(["grasper", "hook"], ["hook"])) == pytest.approx({"grasper": 0.3, "hook": 0.7})
    both = dict(weighted(["a", "b", "c", "d"], ["c", "d"]))
    assert both == pytest.approx({"a": 0.15, "b": 0.15, "c": 0.35, "d": 0.35})
    assert dict(weighted(["a", "b"], ["a", "b"])) == {"a": 0.5, "b": 0.5}


def test_a_run_ends_with_the_set_the_phase_or_a_gap() -> None:
    frames = [
        *(Frame(second, HOOK, "p") for second in (0, 1, 2)),
        *(Frame(second, GRASPER, "p") for second in (3, 4)),
        *(Frame(second, GRASPER, "q") for second in (5, 6)),
        *(Frame(second, GRASPER, "q") for second in (8, 9)),
        *(Frame(second, (), "q") for second in (10, 11)),
    ]
    got = cut(frames[::-1])
    assert [(one.start, one.end) for one in got] == [(0, 3), (3, 5), (5, 7), (8, 10), (10, 12)]
    assert got[-1].instruments == () and got[-1].caption == "no instrument in view during q"
    assert got[0].caption == "hook in view during p" and got[0].origin == "v.json at 0 s"


def test_the_order_in_which_a_frame_names_instruments_does_not_matter() -> None:
    got = cut([Frame(0, weighted(["a", "b"])), Frame(1, weighted(["b", "a"]))])
    assert len(got) == 1 and got[0].caption == "a and b in view"


def test_the_weights_of_a_run_are_those_of_its_frames_on_average() -> None:
    names = ["grasper", "hook"]
    (got,) = cut([Frame(0, weighted(names, ["hook"])), Frame(1, weighted(names))])
    assert got.instruments is not None and [name for name, _ in got.instruments] == ["hook", "grasper"]
    assert dict(got.instruments) == pytest.approx({"hook": 0.6, "grasper": 0.4})


@pytest.mark.parametrize("seed", range(30))
def test_long_runs_are_cut_into_equal_parts_that_lose_nothing(seed: int) -> None:
    draw = random.Random(seed)
    period, longest = draw.choice((1.0, 0.04, 0.5)), draw.choice((20.0, 7.0, 3.3))
    count = draw.randint(1, 400)
    frames = [
        Frame(index * period, HOOK, marks=(Box(0, 0.1, 0.1, 0.2, 0.2, track=str(index)),))
        for index in range(count)
    ]
    got = cut(frames, period, longest)
    lengths = [one.end - one.start for one in got]
    assert max(lengths) <= longest + 1e-3 and max(lengths) - min(lengths) < 1e-6
    assert len(got) == max(1, math.ceil(count * period / longest - 1e-6))
    assert got[0].start == 0 and got[-1].end == pytest.approx(count * period)
    assert all(left.end == right.start for left, right in pairwise(got))
    for one in got:
        assert all(one.start <= moment.seconds < one.end for moment in one.moments)
    assert [moment.mark.track for one in got for moment in one.moments] == [
        str(index) for index in range(count)
    ]


def test_a_part_between_two_key_frames_keeps_what_was_said_and_has_no_mark() -> None:
    mark = Box(0, 0.1, 0.1, 0.2, 0.2)
    got = cut([Frame(0, HOOK, "p", marks=(mark,)), Frame(1, HOOK, "p", marks=(mark,))], max_seconds=0.5)
    assert [len(one.moments) for one in got] == [1, 0, 1, 0]
    assert {one.caption for one in got} == {"hook in view during p"}


def test_a_frame_alone_speaks_for_two_seconds_unless_another_comes() -> None:
    frames = [Frame(0, HOOK), Frame(30, HOOK), Frame(31, GRASPER), Frame(60, HOOK)]
    got = cut(frames, lone=2.0)
    assert [(one.start, one.end) for one in got] == [(0, 2), (30, 31), (31, 33), (60, 62)]


def test_captions_say_what_works_first_and_idle_instruments_last() -> None:
    frame = Frame(
        0,
        weighted(["grasper", "hook", "scissors", "irrigator"]),
        "p",
        (
            *("grasper,retract,gallbladder", "hook,null_verb,null_target", "hook,dissect,cystic_plate"),
            *("scissors,cut,cystic-duct", "hook,dissect,cystic_plate"),
        ),
    )
    (got,) = cut([frame])
    assert got.caption == (
        "hook dissects cystic plate; scissors cut cystic duct; grasper retracts gallbladder; "
        "irrigator in view"
    )
    assert got.triplets == tuple(dict.fromkeys(frame.triplets))
    (idle,) = cut([frame._replace(instruments=HOOK, triplets=("hook,null_verb,null_target",))])
    assert idle.caption == "hook in view"


def test_labels_are_words() -> None:
    assert (
        spoken("CalotTriangleDissection")
        == spoken("calot-triangle_dissection")
        == "calot triangle dissection"
    )
    assert is_active("dissect") and is_active("clip")
    assert not any(is_active(verb) for verb in ("null_verb", "null-verb", "grasp", "retract", ""))


def test_a_length_of_nothing_is_refused() -> None:
    with pytest.raises(WanmoeError, match="longer than 0"):
        cut([Frame(0, HOOK)], max_seconds=0)
