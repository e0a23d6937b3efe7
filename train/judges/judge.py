"""The trained judges as other modules use them, and their files.

A file is safetensors with the weights, and metadata that says what it is (`wanmoe-classifier/1` or
`wanmoe-detector/1`), which latents it can judge and how well it did on held-out clips.

Letters: B clips, F, H, W latent frames, height, width, K classes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...moe_lora.adapter_file import write_safetensors
from ...moe_lora.errors import WanmoeError
from ...moe_lora.instruments import Expert, ExpertSet
from ...moe_lora.wan.codec import CHANNELS, SPACE_STRIDE, TIME_STRIDE
from .nets import CROP, PATCH, WIDTH, ClassifierNet, DetectorNet, patches

CLASSIFIER, DETECTOR = "wanmoe-classifier/1", "wanmoe-detector/1"
LATENT, PIXELS = "latent", "pixels"


class JudgeInfo(BaseModel):
    """What a judge's file says of itself."""

    model_config = ConfigDict(frozen=True)

    space: str = LATENT
    """What it judges: "latent", or "pixels" of a decoded video."""
    experts: tuple[Expert, ...] = ()
    """The classes of a classifier, in the order of its logits, with their keywords; () for a detector."""
    width: int = WIDTH
    sizes: tuple[str, ...]
    """Latent sizes "FxHxW" of the clips that it was trained on; it takes others too."""
    codec: dict[str, Any]
    """Name, fingerprint and stand_in of the codec that made their latents."""
    shards_sha256: str
    """Of the manifest of the shards that it was trained on."""
    clips: int
    """Training clips, of which each has a label."""
    steps: int
    batch: int
    lr: float
    seed: int
    held_out: dict[str, Any]
    """Figures on the held-out clips; see `held_out.py`."""
    versions: dict[str, str]


class Judge(nn.Module):
    """A frozen net and what its file says of it. Weights are fixed; gradients reach the input."""

    net: nn.Module

    def __init__(self, info: JudgeInfo, origin: str) -> None:
        super().__init__()
        self.info, self.origin = info, origin

    def check_fits(self, manifest: Mapping[str, Any], where: str = "the shards") -> None:
        """Raises WanmoeError unless the latents of a folder of shards come from the codec of this judge.

        A judge of pixels takes those of any codec.
        """
        own, other = self.info.codec, manifest["codec"]
        if self.info.space == LATENT and own["fingerprint"] != other["fingerprint"]:
            raise WanmoeError(
                f"{self.origin}: it judges latents of codec {own['name']} ({own['fingerprint'][:12]}), but "
                f"those of {where} are of {other['name']} ({other['fingerprint'][:12]}); train one on them"
            )

    def freeze(self) -> None:
        """Evaluation mode and no gradient for any weight."""
        self.eval().requires_grad_(False)


class Classifier(Judge):
    """Says which instrument a clip shows."""

    def __init__(self, info: JudgeInfo, origin: str = "classifier") -> None:
        super().__init__(info, origin)
        self.experts = ExpertSet(info.experts)
        self.classes: tuple[str, ...] = tuple(self.experts.names)
        self.space = info.space
        self.crop: tuple[int, int] = CROP[1:]
        """Height and width in cells of what it was trained on at most; it takes more too."""
        channels = PATCH if self.space == PIXELS else CHANNELS
        self.net = ClassifierNet(len(self.classes), channels, info.width)

    def forward(self, x: Tensor, roi: Tensor | None = None) -> Tensor:
        """Logits [B, K], fp32.

        `x` is a latent [B, 16, F, H, W], or for space "pixels" a video [B, 3, 4 F - 3, 8 H, 8 W] in [-1, 1];
        `roi` [B, F, H, W] in [0, 1] the region of the instrument, or None. A clip whose region is empty is
        judged as without one. Raises WanmoeError on other shapes.
        """
        return self.weigh(x, roi)[0]

    def weigh(self, x: Tensor, roi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The logits of `forward`, and the weight that each cell had in them, [B, F, H, W], summing to 1."""
        with torch.autocast(x.device.type, enabled=False):
            cells = self.cells(x)
            if roi is not None and roi.shape != (cells.shape[0], *cells.shape[2:]):
                wanted = [cells.shape[0], *cells.shape[2:]]
                raise WanmoeError(f"{self.origin}: a region is {wanted} here, but got {list(roi.shape)}")
            logits, weights = self.net(cells, None if roi is None else roi.float())
        return logits, weights

    def cells(self, x: Tensor) -> Tensor:
        """What the net reads of each cell of the latent grid, [B, C, F, H, W], checked and fp32."""
        if self.space == LATENT:
            return _checked(x, self.origin)
        fits = x.ndim == 5 and x.shape[1] == 3 and x.shape[2] % TIME_STRIDE == 1
        if not fits or x.shape[3] % SPACE_STRIDE or x.shape[4] % SPACE_STRIDE:
            raise WanmoeError(
                f"{self.origin}: it judges videos [B, 3, 4 n + 1, H, W] with H and W multiples of 8 (space "
                f"'pixels'), but got {list(x.shape)}"
            )
        return patches(x.float())

    @torch.no_grad()
    def predict(self, x: Tensor, roi: Tensor | None = None) -> Tensor:
        """[B]: index into `classes` of the likeliest instrument; arguments as of `forward`."""
        return self(x, roi).argmax(1)

    def targets(self, instruments: Sequence[tuple[str, float]]) -> Tensor:
        """[K]: the labels of a sample (name, weight) as weights of the classes, summing to 1, or all 0 for no
        label. Raises WanmoeError for a name that is none of the classes."""
        return class_weights(self.experts, instruments)


class Detector(Judge):
    """Says where the tip of the instrument is."""

    def __init__(self, info: JudgeInfo, origin: str = "detector") -> None:
        super().__init__(info, origin)
        self.net = DetectorNet(info.width)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [B, 16, F, H, W] -> heat [B, F, H, W], logits of a tip in the cell, and offsets [B, 2, F, H,
        W], (x, y) in cells from the middle of the cell to the tip; fp32."""
        with torch.autocast(latent.device.type, enabled=False):
            heat, offsets = self.net(_checked(latent, self.origin))
        return heat, offsets

    @torch.no_grad()
    def tips(self, latent: Tensor) -> Tensor:
        """[B, F, 3]: x, y of the likeliest tip in pixels of video frame 4 k for latent frame k (pixel centres
        are whole numbers), and the confidence in it, 0 to 1."""
        return peaks(*self(latent))


def peaks(heat: Tensor, offsets: Tensor) -> Tensor:
    """The highest cell of each frame of a heat map as (x, y, confidence), [B, F, 3]; see `Detector`."""
    width = heat.shape[3]
    top, at = heat.flatten(2).max(2)
    shift = offsets.flatten(3).gather(3, at[:, None, :, None].expand(-1, 2, -1, -1))[..., 0]
    x = (at % width + 0.5 + shift[:, 0]) * SPACE_STRIDE - 0.5
    y = (at // width + 0.5 + shift[:, 1]) * SPACE_STRIDE - 0.5
    return torch.stack([x, y, top.sigmoid()], -1)


def class_weights(experts: ExpertSet, instruments: Sequence[tuple[str, float]]) -> Tensor:
    """[K]: labels (name, weight) as weights of the experts that sum to 1; all 0 without a label."""
    weights = torch.zeros(len(experts))
    for name, share in experts.shares(instruments).items():
        weights[experts.index(name)] = share
    total = weights.sum()
    return weights / total if total > 0 else weights


def save_judge(judge: Judge, path: str | Path) -> None:
    """Writes the file of a judge, whole or not at all; raises WanmoeError where that fails."""
    kind = CLASSIFIER if isinstance(judge, Classifier) else DETECTOR
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in judge.net.state_dict().items()}
    write_safetensors(Path(path), tensors, {"format": kind, "info": judge.info.model_dump_json()})


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """A classifier from its file, frozen and in evaluation mode.

    Raises WanmoeError where the file is missing, damaged, or something else.
    """
    info, tensors = _read(path, CLASSIFIER, "train-classifier")
    judge = Classifier(info, str(path))
    _fill(judge, tensors, path)
    return judge.to(device)


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> Detector:
    """A tip detector from its file, frozen and in evaluation mode; errors as of `load_classifier`."""
    info, tensors = _read(path, DETECTOR, "train-detector")
    judge = Detector(info, str(path))
    _fill(judge, tensors, path)
    return judge.to(device)


def _read(path: str | Path, kind: str, command: str) -> tuple[JudgeInfo, dict[str, Tensor]]:
    try:
        with safe_open(Path(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WanmoeError(f"{path}: not a readable safetensors file ({error})") from error
    found = metadata.get("format")
    if found != kind:
        raise WanmoeError(f"{path}: format is {found!r}, expected {kind!r}, which `wanmoe {command}` writes")
    try:
        return JudgeInfo.model_validate(json.loads(metadata.get("info", "{}"))), tensors
    except json.JSONDecodeError as error:
        raise WanmoeError(f"{path}: its description is damaged: it is not JSON ({error})") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "it"
        raise WanmoeError(f"{path}: its description is damaged: {where}: {fault['msg']}") from error


def _fill(judge: Classifier | Detector, tensors: dict[str, Tensor], path: str | Path) -> None:
    wanted = {name: tensor.shape for name, tensor in judge.net.state_dict().items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted(name for name in wanted.keys() | given if wanted.get(name) != given.get(name)):
        raise WanmoeError(
            f"{path}: {len(wrong)} missing, unknown or misshapen tensors: {wrong[0]}; train it anew"
        )
    judge.net.load_state_dict(tensors)
    judge.freeze()


def _checked(latent: Tensor, origin: str) -> Tensor:
    if latent.ndim != 5 or latent.shape[1] != CHANNELS:
        raise WanmoeError(f"{origin}: it judges latents [B, 16, F, H, W], but got {list(latent.shape)}")
    return latent.float()
