"""Gates from rules and from the learned router (traps A4, A10, A12, A13, A25, A27)."""

import pytest
import torch

from wanmoe.moe_lora import ExpertSet, Gates, WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC
from wanmoe.moe_lora.routing import (
    LearnedRouter,
    RuleRouter,
    ema_over_frames,
    pool_text,
    top_k,
)

RULE = RuleRouter(ExpertSet())


def test_a_hint_is_exactly_one_hot():
    assert RULE.route(hint="Suction", prompt="电凝钩").tolist() == [0, 0, 1, 0]


def test_a_mix_is_exact_and_goes_before_the_hint():
    gates = RULE.route(mix={"Scissors": 0.6, "Suction": 0.4}, hint="Other")
    torch.testing.assert_close(gates, torch.tensor([0.6, 0.0, 0.4, 0.0]))


def test_labels_keep_their_weights():
    assert RULE.route(labels=[("Scissors", 3.0), ("Other", 1.0)]).tolist() == [0.75, 0, 0, 0.25]


def test_a_prompt_mixes_what_it_names_and_nothing_else():
    gates = RULE.route(prompt="抓钳固定。电凝钩切割,电凝止血。")
    assert gates[0] == gates[2] == 0
    assert gates[1] > gates[3] > 0
    assert float(gates.sum()) == pytest.approx(1)


def test_ties_share_instead_of_picking_an_index():
    gates = RULE.route(prompt="scissors, hook, suction")  # three equal hits, top-2
    torch.testing.assert_close(gates, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))


def test_no_keyword_is_no_evidence_unless_a_fallback_is_named():
    assert RULE.route(prompt="手术视野").tolist() == [0, 0, 0, 0]
    assert RuleRouter(ExpertSet(fallback="Other")).route(prompt="手术视野").tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("weights", [{"Scissors": -1.0}, {"Scissors": float("nan")}, {"Scissors": 0.0}])
def test_bad_weights_are_refused(weights):
    with pytest.raises(WanmoeError, match="mix: "):
        RULE.route(mix=weights)


def test_unknown_hint_names_the_nearest():
    with pytest.raises(WanmoeError, match="unknown expert 'Sucker'; nearest is 'Suction'"):
        RULE.route(hint="Sucker")


def test_hints_mixes_and_labels_speak_either_taxonomy():
    tools = RuleRouter(ExpertSet(CHOLEC))  # grasper, bipolar, hook, scissors, clipper, irrigator
    assert tools.route(hint="Hook/Electrocautery").tolist() == [0, 0.5, 0.5, 0, 0, 0]
    mixed = tools.route(mix={"Other": 0.5, "Scissors": 0.3, "clipper": 0.2})
    torch.testing.assert_close(mixed, torch.tensor([0.25, 0, 0, 0.3, 0.45, 0]))
    assert tools.route(labels=[("Suction", 1.0), ("hook", 3.0)]).tolist() == [0, 0, 0.75, 0, 0, 0.25]
    assert RULE.route(mix={"bipolar": 1.0, "hook": 2.0, "grasper": 1.0}).tolist() == [0, 0.75, 0, 0.25]


def test_top_k_keeps_the_sum_and_the_gradient():
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], requires_grad=True)
    kept = top_k(gates, 2)
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0], [0.0, 2 / 9, 7 / 9]]))
    kept[0, 0].backward()
    assert gates.grad[0].abs().sum() > 0 and gates.grad[1].abs().sum() == 0


def test_top_k_of_nothing_is_nothing():
    assert top_k(torch.zeros(2, 4), 2).tolist() == [[0] * 4] * 2


def test_ema_is_bias_corrected_keeps_top_k_and_has_no_memory():
    constant = torch.tensor([0.7, 0.3, 0.0]).expand(1, 5, 3)
    torch.testing.assert_close(ema_over_frames(constant, 0.9, 2), constant)
    switch = torch.zeros(1, 6, 3)
    switch[:, :3, 0] = 1
    switch[:, 3:, 1] = 1
    smooth = ema_over_frames(switch, 0.5, 2)
    assert smooth[0, 2].tolist() == [1, 0, 0]
    assert smooth[0, 3, 1] > 0.5 and smooth[0, 3, 0] > 0.4
    assert (smooth > 0).sum(-1).max() <= 2
    torch.testing.assert_close(ema_over_frames(switch, 0.5, 2), smooth)


def test_text_gates_are_the_mean_over_the_frames():
    experts = torch.arange(12.0).view(6, 2)  # 2 clips x 3 frames
    text = Gates(experts, torch.ones(6), 10).per_clip(2, 32)
    assert text.tokens_per_row == 32
    assert text.experts.tolist() == [[2, 3], [8, 9]]
    assert text.base.tolist() == [1, 1]


def test_learned_router_sums_to_one_ignores_scale_and_learns_from_a_teacher():
    torch.manual_seed(0)
    router = LearnedRouter(16, 4)
    pooled = pool_text([torch.randn(5, 16), torch.randn(9, 16)])
    probs = router(pooled)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))
    torch.testing.assert_close(router(pooled * 100), probs, atol=1e-4, rtol=1e-3)
    teacher = torch.eye(4)[:2]
    optimizer = torch.optim.Adam(router.parameters(), 1e-2)
    before = -(teacher * probs.log()).sum().item()
    for _ in range(100):
        optimizer.zero_grad()
        (-(teacher * router(pooled).log()).sum()).backward()
        optimizer.step()
    assert -(teacher * router(pooled).log()).sum().item() < 0.1 * before
