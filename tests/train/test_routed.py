"""Gates are made inside of the forward from its arguments (trap B3)."""

import torch

from wanmoe.moe_lora import AdapterConfig, RouterConfig, attach
from wanmoe.moe_lora.wan.weights import load_dit
from wanmoe.train.routed import RoutedDiT
from wanmoe.train.stages import STAGES


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
