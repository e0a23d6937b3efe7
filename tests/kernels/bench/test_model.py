"""The byte model reproduces the computed figures of the performance specification, to their last digit."""

import pytest

from wanmoe.kernels.bench import model
from wanmoe.kernels.bench.model import BACKWARD, FORWARD, Card, Passes, added, overhead
from wanmoe.kernels.bench.report import modelled_text

A100, H100, RTX4090 = model.CARDS
SHAPES = {shape.name: shape for shape in model.SHAPES}
# Figures are printed to a tenth of a point; each may itself be rounded.
CLOSE = 0.1
FORWARD_FIGURES = {
    "loop, 3 active": [(82, 141), (82, 141), (77, 131), (36, 62)],
    "PEFT": [(107, 182), (107, 182), (97, 166), (49, 84)],
    "packed": [(9.3, 15.9), (9.2, 15.8), (7.3, 12.4), (5.4, 9.2)],
    "single_pass": [(9.2, 15.7), (9.1, 15.7), (7.2, 12.4), (5.3, 9.1)],
    "delta_first": [(6.1, 10.4), (6.1, 10.4), (4.2, 7.1), (4.2, 7.1)],
    "epilogue": [(4.0, 6.2), (3.7, 5.9), (1.8, 2.6), (3.3, 5.5)],
    "epilogue at 95 %": [(9.4, 11.6), (9.0, 11.2), (7.1, 7.9), (8.6, 10.8)],
    "floor": [(1.9, 1.9), (1.3, 1.3), (0.9, 0.9), (0.9, 0.9)],
    "merged per call": [(5.8, 9.9)] * 4,
}
BACKWARD_FIGURES = {
    "loop, 3 active": {"q": (82, 141)},
    "packed": {"q": (15.3, 26.2), "ffn.0": (9.5, 16.3), "ffn.2": (11.4, 19.5)},
    "fused du+dB": {"q": (13.2, 22.5), "ffn.0": (6.7, 11.4), "ffn.2": (10.9, 18.6)},
    "fused du+dB, dx in the epilogue": {"q": (8.0, 13.0), "ffn.0": (4.6, 7.8), "ffn.2": (5.4, 8.8)},
}


def percent(passes, name, card, tokens=5376):
    return 100 * overhead(passes, [SHAPES[name]], card, tokens)


def agrees(found, figure):
    return abs(found - figure) <= (0.5 if figure >= 30 else CLOSE)


@pytest.mark.parametrize("form", FORWARD_FIGURES)
def test_forward_figures(form):
    for name, figures in zip(SHAPES, FORWARD_FIGURES[form], strict=True):
        for card, figure in zip((A100, H100), figures, strict=True):
            assert agrees(percent(FORWARD[form], name, card), figure), (name, card.name)


@pytest.mark.parametrize("form", BACKWARD_FIGURES)
def test_backward_figures(form):
    for name, figures in BACKWARD_FIGURES[form].items():
        for card, figure in zip((A100, H100), figures, strict=True):
            assert agrees(percent(BACKWARD[form], name, card), figure), (name, card.name)


def test_one_pass_over_x_is_the_unit_of_the_specification():
    for card, figure in ((A100, 3.05), (H100, 5.2), (RTX4090, 3.2)):
        assert abs(percent(Passes(x=1), "k", card) - figure) < 0.05


def test_a_merged_weight_is_paid_for_once_and_the_rest_per_token():
    merged = FORWARD["merged per call"]
    assert abs(percent(merged, "k", A100, 75600) - 0.4) < 0.05
    assert abs(percent(merged, "k", H100, 75600) - 0.7) < 0.05
    assert abs(percent(FORWARD["packed"], "k", H100, 75600) - percent(FORWARD["packed"], "k", H100)) < 1e-9


def test_sharing_the_shrink_of_q_k_and_v_saves_two_reads_of_x():
    trio = [SHAPES["q"], SHAPES["k"], SHAPES["k"]]
    for card, figure in ((A100, 2.0), (H100, 3.5)):
        apart = overhead(FORWARD["packed"], trio, card, 5376)
        together = overhead(FORWARD["packed"], trio, card, 5376, shared=True)
        assert abs(100 * (apart - together) - figure) < 0.05


def test_added_counts_every_pass():
    passes = Passes(x=2, y=3, h=1, weight=1, partials=True, into_x=1, into_y=1)
    shape = model.Shape("one", 64, 128, 20)
    flops, moved = added(passes, shape, tokens=10)
    assert flops == 2 * 10 * 32 * (64 + 128)
    assert moved == 2 * (10 * (2 * 64 + 3 * 128 + 32) + 64 * 128) + 2 * 4 * 8 * 32 * 64


def test_up_grad_pays_for_its_planes():
    """Per token 2 x tiles x columns x 4 bytes: half a pass over dy at 32 columns, a whole one at 64."""
    for name, share in (("k", 0.5), ("q", 1.0)):
        shape = SHAPES[name]
        ideal, ours = (added(BACKWARD[form], shape, 1000)[1] for form in ("fused du+dB", "up_grad"))
        assert ours - ideal == share * 2 * 1000 * shape.d_out
    assert percent(BACKWARD["up_grad"], "q", H100) > percent(BACKWARD["packed"], "q", H100)
    assert percent(BACKWARD["up_grad"], "k", H100) < percent(BACKWARD["packed"], "k", H100)


def test_the_printed_table_says_that_it_is_modelled():
    text = modelled_text((Card("A100", 312, 2.0),))
    assert text.startswith("MODELLED, not measured")
    assert "delta_first" in text and "6.09" in text
