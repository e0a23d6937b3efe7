"""Schedules to gates per latent frame, and the picture of them."""

import cv2
import pytest
import torch

from wanmoe.infer.timeline import GateRecord, Moment, draw_gates, parse_schedule, timeline
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC, ExpertSet

FAMILIES = ExpertSet()
HOOK, SUCTION = FAMILIES.index("Hook/Electrocautery"), FAMILIES.index("Suction")


def test_a_schedule_is_frames_and_experts():
    assert parse_schedule("0:Hook, 40:Suction") == [Moment(0, {"Hook": 1.0}), Moment(40, {"Suction": 1.0})]
    assert parse_schedule("0:Hook/Electrocautery,8 : Hook=0.6 + Suction=.4") == [
        Moment(0, {"Hook/Electrocautery": 1.0}),
        Moment(8, {"Hook": 0.6, "Suction": 0.4}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no FRAME:EXPERT"),
        ("Hook", "'Hook' is no FRAME:EXPERT"),
        ("-1:Hook", "is no FRAME:EXPERT"),
        ("4:Hook", "starts at frame 4; it must start at 0"),
        ("0:Hook, 8:Suction, 8:Hook", "frame 8 comes after 8; frames must rise"),
        ("0:Hook=much", "'much' is no weight"),
        ("0:Hook=-1", "must be finite and not negative"),
        ("0:Hook=nan", "must be finite and not negative"),
        ("0:Hook=0", "sum to zero"),
        ("0:Hook+Hook", "names an expert twice"),
    ],
)
def test_what_is_no_schedule_is_one_line(text, message):
    with pytest.raises(WanmoeError) as caught:
        parse_schedule(text)
    assert message in str(caught.value) and repr(text) in str(caught.value)


def test_a_latent_frame_takes_the_mean_of_the_frames_it_holds():
    """Frame 0 alone, then groups of four: the change at frame 7 is inside the group 5..8."""
    gates = timeline(parse_schedule("0:Hook, 7:Suction"), FAMILIES, 13, ema=0.0)
    assert gates[:, HOOK].tolist() == [1.0, 1.0, 0.5, 0.0]
    assert gates[:, SUCTION].tolist() == [0.0, 0.0, 0.5, 1.0]


def test_the_average_is_that_of_this_clip_alone_and_corrected():
    gates = timeline(parse_schedule("0:Hook, 5:Suction"), FAMILIES, 17, ema=0.5)
    assert torch.allclose(gates.sum(1), torch.ones(5))
    # By hand: weights 1, 1/2, 1/4, ... of the frames before, over their sum.
    expected = [0, 0, 1 / 1.75, 1.5 / 1.875, 1.75 / 1.9375]
    torch.testing.assert_close(gates[:, SUCTION], torch.tensor(expected))


def test_no_more_experts_speak_at_once_than_top_k_or_a_moment_names():
    walk = parse_schedule("0:Scissors, 5:Hook, 9:Suction, 13:Other")
    assert (timeline(walk, FAMILIES, 17, ema=0.9, top_k=2) > 0).sum(1).max() == 2
    three = parse_schedule("0:Scissors+Hook+Suction")
    assert (timeline(three, FAMILIES, 17, top_k=2) > 0).sum(1).tolist() == [3] * 5


def test_names_of_the_other_taxonomy_are_understood():
    tools = ExpertSet(CHOLEC)
    gates = timeline(parse_schedule("0:Hook/Electrocautery, 1:Suction"), tools, 5, ema=0.0)
    assert gates[0, tools.index("hook")] == gates[0, tools.index("bipolar")] == 0.5
    assert gates[1, tools.index("irrigator")] == 1.0


@pytest.mark.parametrize(
    ("text", "ema", "message"),
    [
        ("0:Hook, 17:Suction", 0.5, "whose last frame is 16"),
        ("0:Hook, 4:stapler", 0.5, "frame 4: unknown expert 'stapler'"),
        ("0:Hook", 1.0, "ema 1.0"),
    ],
)
def test_what_does_not_fit_the_clip_is_one_line(text, ema, message):
    with pytest.raises(WanmoeError, match=message):
        timeline(parse_schedule(text), FAMILIES, 17, ema=ema)


def test_the_picture_shows_the_experts_that_speak(tmp_path):
    """A hook that hands over to suction: both colours are there in like areas, the others are not."""
    gates = timeline(parse_schedule("0:Hook, 9:Suction"), FAMILIES, 17, ema=0.0)
    records = [GateRecord(i + 1, "high" if i < 3 else "low", 0.95 - i / 10, gates) for i in range(8)]
    draw_gates(tmp_path / "gates.png", records, FAMILIES.names, 17, "a clip")
    picture = cv2.imread(str(tmp_path / "gates.png"))[..., ::-1].reshape(-1, 3).astype(int)
    palette = {HOOK: (255, 127, 14), SUCTION: (44, 160, 44)}  # tab10, in the order of the experts

    def area(colour):
        return (abs(picture - colour).max(1) < 3).sum()

    hook, suction = (area(palette[index]) for index in (HOOK, SUCTION))
    assert 0.6 < hook / suction < 1.7 and hook > 20_000
    assert area((31, 119, 180)) < 2_000  # Scissors: in the legend alone
    records = [record._replace(gates=torch.zeros(1, 4)) for record in records]
    draw_gates(tmp_path / "silent.png", records, FAMILIES.names, 17)
    picture = cv2.imread(str(tmp_path / "silent.png"))[..., ::-1].reshape(-1, 3).astype(int)
    assert area(palette[HOOK]) < 2_000
