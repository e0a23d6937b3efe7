"""Backbones: what a distance may be called, and files that are not what they should be."""

from pathlib import Path

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEModel

from wanmoe.infer.evaluation.features import EFFICIENTNET, features, load_backbone
from wanmoe.moe_lora.errors import WanmoeError


def clip(frames: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 40, 56, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def videomae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VideoMAE of random weights."""
    folder = tmp_path_factory.mktemp("models") / "videomae-small"
    config = VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    VideoMAEModel(config).save_pretrained(folder)
    return folder


def test_pictures_are_never_called_fvd_and_do_not_see_order() -> None:
    backbone = load_backbone(EFFICIENTNET)
    assert backbone.frechet == "FID on EfficientNet-Lite0" and backbone.kernel == "KID on EfficientNet-Lite0"
    assert not backbone.sees_order
    frames = clip()
    found = backbone(frames)
    assert found.shape == (1280,) and found.dtype == torch.float32
    torch.testing.assert_close(found, backbone(frames[[8, 1, 2, 3, 4, 5, 6, 7, 0]]), atol=1e-5, rtol=1e-5)


def test_videomae_is_called_by_its_folder_and_sees_order(videomae: Path) -> None:
    backbone = load_backbone(str(videomae))
    assert backbone.frechet == "Fréchet distance on videomae-small" and backbone.sees_order
    frames = clip()
    found = backbone(frames)
    assert found.shape == (16,) and torch.isfinite(found).all()
    assert not torch.allclose(found, backbone(frames.flip(0)), atol=1e-4)
    with pytest.raises(WanmoeError, match=r"film: 3 frames, but VideoMAE videomae-small needs 4"):
        features(backbone, clip(3), "film")


def test_only_the_known_i3d_makes_an_fvd(tmp_path: Path) -> None:
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(WanmoeError, match=r"is not the I3D that FVD is measured with \(bec6519f66ea"):
        load_backbone(str(path))


def test_what_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(WanmoeError, match="no such file or folder; features are efficientnet-lite0"):
        load_backbone(str(tmp_path / "none"))
    with pytest.raises(WanmoeError, match="not a folder of a VideoMAE that transformers reads"):
        load_backbone(str(tmp_path))
