"""What a dry run counts is what a run on real tensors holds."""

import contextlib

import pytest
import torch

from wanmoe.moe_lora.adapter import AdapterConfig, attach
from wanmoe.moe_lora.needs import LiveBytes, activations
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT

SMALL = WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=8, text_dim=64, text_len=16, freq_dim=32)
ADAPTER = AdapterConfig(blocks=4, ffn_blocks=2)
LATENT = (5, 16, 12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [("experts",), ("base", "experts"), ()])
def test_a_dry_run_counts_what_a_real_one_holds_to_the_byte(checkpointing, dtype, parts):
    torch.manual_seed(0)
    dit = WanDiT(SMALL).to(dtype)
    adapter = attach(dit, ADAPTER)
    trained = adapter.train_only(parts or ("experts",))
    dit.checkpointing = checkpointing
    x, t = torch.randn(2, 16, *LATENT).to(dtype), torch.rand(2)
    context = torch.randn(2, 16, 64).to(dtype)
    gates = adapter.gates(torch.rand(2, 4), t, tokens=5 * 8 * 6)
    live = LiveBytes()
    with live, contextlib.nullcontext() if parts else torch.no_grad():
        state = dit.prefix(x, t, context, gates=gates)
        prefix = live.restart()
        v = dit.tail(state, gates)
        forward = live.restart()
        if parts:
            v.square().mean().backward()
    gradients = sum(p.grad.nbytes for p in trained.values()) if parts else 0
    kind = {"clips": 2, "dtype": dtype, "checkpointing": checkpointing, "card": False}
    found = activations(SMALL, ADAPTER, parts, LATENT, **kind)
    assert (found.prefix, found.forward) == (prefix, forward)
    assert found.backward == live.peak - gradients


def test_a_storage_counts_once_and_until_it_ends():
    live = LiveBytes()
    given = torch.zeros(1000)
    with live:
        view = given[:10]
        made = torch.zeros(100)
        other = made.view(10, 10)
        assert live.now == 400
        del made
        assert live.now == 400
        del other
        assert live.now == 0
        doubled = given + 1
    assert live.peak == 4000 and view.numel() == 10 and doubled.numel() == 1000
    assert live.restart() == 4000 and live.peak == live.now == 4000


def test_the_kernels_of_a_card_take_less_and_checkpointing_much_less():
    on_card = activations(SMALL, ADAPTER, ("experts",), LATENT)
    on_cpu = activations(SMALL, ADAPTER, ("experts",), LATENT, card=False)
    again = activations(SMALL, ADAPTER, ("experts",), LATENT, checkpointing=True)
    assert again.peak < on_card.peak < on_cpu.peak
    assert again.prefix == on_card.prefix
