"""A DiT small enough to build in every test."""

import copy

import pytest
import torch

from wanmoe.moe_lora import AdapterConfig, RouterConfig, attach, save_adapter
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT

CONFIG = WanConfig(
    task="t2v",
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=4,
    in_dim=16,
    out_dim=16,
    text_dim=12,
    text_len=8,
    freq_dim=16,
)


@pytest.fixture
def dit() -> WanDiT:
    """Random weights everywhere, the head too, so that no output is trivially zero."""
    torch.manual_seed(0)
    model = WanDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.fixture
def clip() -> dict[str, object]:
    """Two clips of 2 latent frames of 4 x 6: 12 tokens each."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 16, 2, 4, 6, generator=generator),
        "t": torch.tensor([0.7, 0.9]),
        "context": [torch.randn(5, 12, generator=generator), torch.randn(3, 12, generator=generator)],
    }


@pytest.fixture
def frozen(dit):
    """A copy without adapter."""
    return copy.deepcopy(dit)


@pytest.fixture
def saved(dit, frozen, tmp_path):
    """An adapter in the last two of four blocks with ranks 1 to 4, and its file for the high side."""
    ranks = {"rank_q": 3, "rank_k": 2, "rank_v": 2, "rank_o": 1, "rank_ffn": 4}
    config = AdapterConfig(blocks=2, ffn_blocks=1, alpha=3.0, **ranks)
    adapter = attach(dit, config, RouterConfig(bands=((0.0, 1.0),)))
    torch.manual_seed(7)
    for parameter in adapter.parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "adapter.safetensors"
    about = {"stage": "b", "step": 3, "noise_expert": "high", "base_sha256": "ab" * 32}
    return adapter, save_adapter(adapter, path, **about)
