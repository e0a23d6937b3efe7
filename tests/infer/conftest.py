"""Random models of the `tiny` preset with adapters that say something, and a pipeline on them."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from wanmoe.infer import LoRAMoEInference
from wanmoe.moe_lora.adapter import AdapterConfig, attach
from wanmoe.moe_lora.adapter_file import save_adapter
from wanmoe.moe_lora.routing import RouterConfig
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import dit_hash, load_dit, save_dit

I2V = WanConfig(**{**WanConfig.preset("tiny").__dict__, "task": "i2v", "in_dim": 36})
MODEL = {"vae_path": "haar", "t5_path": "hash", "alpha_base": 1.0, "device": "cpu"}


def _write_dit(path: Path, config: WanConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    dit = WanDiT(config)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    save_dit(dit, path)
    return path


def _write_adapter(
    path: Path, dit_path: Path, *, seed: int = 0, router: str = "rule", with_router: bool = True, **about: str
) -> Path:
    """An adapter whose experts say something: up projections drawn, not zero."""
    dit = load_dit(dit_path)
    config = AdapterConfig(blocks=4, fallback=about.pop("fallback", None))
    adapter = attach(dit, config, RouterConfig(mode=router), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.parameters().items():
        if name.endswith("_up"):
            parameter.data.normal_(std=0.5, generator=generator)
    if not with_router:
        adapter.router = None
    save_adapter(adapter, path, stage="b", step=7, **about)
    return path


@pytest.fixture(scope="session")
def write_dit() -> Callable[..., Path]:
    """write_dit(path, config, seed): random weights that do not predict zero."""
    return _write_dit


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., Path]:
    """write_adapter(path, dit_path, seed=, router=, with_router=, ...): see there."""
    return _write_adapter


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    low = _write_dit(folder / "low.safetensors", WanConfig.preset("tiny"), 0)
    _write_dit(folder / "high.safetensors", WanConfig.preset("tiny"), 1)
    _write_dit(folder / "i2v.safetensors", I2V, 2)
    _write_adapter(folder / "adapter.safetensors", low, base_sha256=dit_hash(low))
    _write_adapter(folder / "learned.safetensors", low, router="learned")
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert cv2.imwrite(str(folder / "image.png"), image)
    return folder


@pytest.fixture(scope="session")
def inference(files: Path) -> LoRAMoEInference:
    return LoRAMoEInference(
        "tiny", files / "low.safetensors", lora_moe_weights=files / "adapter.safetensors", **MODEL
    )
