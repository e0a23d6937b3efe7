"""The picture backbone with its trained weights sees what photographs show."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image

from wanmoe.infer.evaluation import efficientnet
from wanmoe.infer.evaluation.efficientnet import WIDTH, load_efficientnet
from wanmoe.moe_lora.errors import WanmoeError

PALACE, DAISY = 698, 985  # classes of ImageNet


@pytest.fixture(scope="module")
def net() -> efficientnet.EfficientNetLite0:
    return load_efficientnet()


def test_photographs_are_what_they_are(net: efficientnet.EfficientNetLite0) -> None:
    house, flower = (
        torch.from_numpy(load_sample_image(f"{name}.jpg").copy()) for name in ("china", "flower")
    )
    assert PALACE in net(house[None])[0].topk(3).indices
    assert net(flower[None])[0].argmax() == DAISY


def test_features_are_of_one_width_for_any_size_and_frozen(net: efficientnet.EfficientNetLite0) -> None:
    pictures = torch.randint(0, 256, (2, 96, 130, 3), dtype=torch.uint8)
    features = net.features(pictures)
    assert features.shape == (2, WIDTH) and (features >= 0).all() and not features.requires_grad
    torch.testing.assert_close(net.features(pictures[1:])[0], features[1], atol=1e-5, rtol=1e-5)


def test_missing_or_other_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(WanmoeError, match="wanmoe\\[evaluation\\]"):
        load_efficientnet()

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(efficientnet, "find_spec", lambda name: Spec)
    with pytest.raises(WanmoeError, match="not the weights"):
        load_efficientnet()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"other")
    with pytest.raises(WanmoeError, match="not the weights"):
        load_efficientnet()
