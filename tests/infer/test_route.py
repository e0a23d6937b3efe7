"""What decides about the experts of a request, and what a router that reads the first frame is given."""

import pytest
import torch

from wanmoe.infer.route import Wish, route
from wanmoe.moe_lora import AdapterConfig, RouterConfig, WanmoeError, attach
from wanmoe.moe_lora.routing import learned_gates, pool_text
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT

CONFIG = WanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, text_dim=12, text_len=8, freq_dim=16)
TEXT = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def adapter(**router):
    return attach(WanDiT(CONFIG), AdapterConfig(blocks=2, ffn_blocks=1), RouterConfig(**router))


def ask(adapter, wish=None, evidence=None, prompt="liver", frames=9):
    return route(adapter, lambda: TEXT, prompt, wish or Wish(), frames, evidence)


def test_a_capped_router_is_capped_here_too_and_a_hint_is_not():
    learned = adapter(mode="learned", max_gate=0.6)
    learned.router.out.bias.data[2] = 9.0
    found = ask(learned)
    assert found.source == "router" and not found.blind
    with torch.no_grad():
        expected = learned_gates(learned.router(pool_text([TEXT])), learned.router_config, training=False)
    assert list(found.gates.values()) == expected[0].tolist()
    assert max(found.gates.values()) == pytest.approx(0.6)
    assert ask(learned, Wish(hint="Suction")).gates["Suction"] == 1.0


def test_a_router_reads_the_first_frame_and_says_when_it_was_not_given():
    learned = adapter(mode="learned", first_frame_classes=6)
    blind, zeros, seen = (ask(learned, evidence=each) for each in (None, torch.zeros(6), torch.randn(6) * 5))
    assert blind.gates == zeros.gates != seen.gates
    assert blind.describe().endswith("; it reads the first frame too, which it was not given")
    assert "first frame" not in zeros.describe() + seen.describe()
    with pytest.raises(WanmoeError, match=r"the router reads 6 classes of the first frame, the classifier"):
        ask(learned, evidence=torch.zeros(4))
    for quiet in (ask(learned, Wish(hint="Suction")), ask(adapter(mode="learned"), evidence=torch.zeros(4))):
        assert "first frame" not in quiet.describe()


def test_a_schedule_is_as_soft_as_the_request_says_or_else_the_adapter():
    walk = "0:Hook, 5:Suction"
    rule = adapter(ema=0.0)
    assert ask(rule, Wish(schedule=walk)).frames[:, 2].tolist() == [0, 0, 1]
    soft = ask(rule, Wish(schedule=walk, ema=0.5)).frames
    torch.testing.assert_close(soft, ask(adapter(), Wish(schedule=walk)).frames)
    torch.testing.assert_close(soft[2, 2], torch.tensor(1 / 1.75))
    slow = ask(adapter(ema=0.9), Wish(schedule=walk)).frames
    assert 0 < slow[2, 2] < soft[2, 2]


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({}, "so the base adapter alone"),
        ({"floor": 0.5}, "so all experts alike"),
        ({"time_gate": "contrast"}, "so all experts alike"),
    ],
)
def test_what_speaks_where_nobody_is_routed_is_what_the_model_gets(router, words):
    asked = adapter(**router)
    found = ask(asked)
    assert found.source == "none" and found.describe().endswith(words)
    (speaks,) = asked.gates(found.experts[None], torch.tensor([0.9]), tokens=4).experts.tolist()
    assert len(set(speaks)) == 1 and bool(speaks[0]) == ("alike" in words)
