"""Settings derived from the model, versions, and gates made from arguments (traps B1, B2, B3)."""

import importlib.metadata

import pytest
import torch

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora import AdapterConfig, RouterConfig, WanmoeError, attach
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import load_dit
from wanmoe.train.engine import RoutedDiT, check_versions, deepspeed_config
from wanmoe.train.stages import STAGES


@pytest.mark.parametrize(
    ("version", "fits"), [("0.19.7", False), ("0.9.20", False), ("0.19.8", True), ("1.0.0+x", True)]
)
def test_an_old_deepspeed_is_refused_with_the_command_that_mends_it(monkeypatch, version, fits):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if fits:
        check_versions()
    else:
        with pytest.raises(
            WanmoeError, match=r"deepspeed .* is too old; run: pip install 'deepspeed>=0.19.8'"
        ):
            check_versions()


def test_settings_on_a14b_keep_adapters_resident_and_prefetch_one_block(config):
    with torch.device("meta"):
        dit = WanDiT(WanConfig.preset("t2v-A14B"))
    trainable = attach(dit).train_only(("experts",))
    found = deepspeed_config(parse_config(config, "test"), dit, trainable, bf16=True)["zero_optimization"]
    largest = max(p.numel() for p in trainable.values())
    assert found["stage3_param_persistence_threshold"] == largest == 4 * 13824 * 4
    assert largest < 5120 * 5120
    assert found["stage3_prefetch_bucket_size"] >= 351_394_304
    assert found["reduce_bucket_size"] == sum(p.numel() for p in trainable.values())


def test_any_deepspeed_key_can_be_overridden(config, base):
    config["deepspeed"] = {
        "config": {"zero_optimization": {"stage3_max_live_parameters": 7}, "wall_clock_breakdown": True}
    }
    dit = load_dit(base)
    trainable = attach(dit, AdapterConfig(blocks=2)).parameters()
    found = deepspeed_config(parse_config(config, "test"), dit, trainable, bf16=False)
    assert found["zero_optimization"]["stage3_max_live_parameters"] == 7
    assert found["zero_optimization"]["stage"] == 3 and found["wall_clock_breakdown"]


def test_module_order_does_not_depend_on_the_data(base):
    """Ranks that called different modules would mix halves of both under ZeRO-3."""
    dit = load_dit(base)
    adapter = attach(dit, AdapterConfig(blocks=2), RouterConfig(mode="learned"))
    module = RoutedDiT(dit, adapter, STAGES["c"])
    calls: list[str] = []
    for name, child in module.named_modules():
        child.register_forward_hook(lambda *_, name=name: calls.append(name))
    orders = []
    for seed, t in ((0, 0.05), (1, 0.5), (2, 0.99)):
        torch.manual_seed(seed)
        rule = torch.eye(4)[torch.randint(4, (2,))]
        context = [torch.randn(1 + seed, 16), torch.randn(4, 16)]
        module(torch.randn(2, 16, 2, 4, 4), torch.tensor([t, 1 - t]), context, torch.randn(2, 16), rule)
        orders.append(list(calls))
        calls.clear()
    assert orders[0] == orders[1] == orders[2]
    assert "router.out" in orders[0] and "dit.blocks.2.self_attn.o" in orders[0]
