"""Losses on decoded pictures, by option: change over time in colours or in LPIPS' features, and the crop of
the latent that is worth decoding.

LPIPS (Zhang et al., CVPR 2018, version 0.1) is built here out of two files: the backbone's weights, which the
user gives, and the heads, which the package torchmetrics ships. The packages that have it whole import
torchvision, whose wheel on PyPI is made for CUDA and breaks transformers beside a CPU build of torch.

Letters: B clips, N frames of the video, C latent channels, F latent frames, H, W the video's height and width
in pixels, h, w those of the latent. `roi`, `picture`, `flow` and `visible` are on the latent grid, as in
`losses`.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..moe_lora.errors import WanmoeError
from ..moe_lora.wan.codec import SPACE_STRIDE, TIME_STRIDE
from ..moe_lora.wan.weight_files import WeightsError, check_tensors, open_weights
from .losses import at_least_fp32, later_weight, masked_mean, temporal_loss, warp

_MAX = 0
"""Stands for a pooling layer in the plans of the backbones."""
_VGG = (64, 64, _MAX, 128, 128, _MAX, 256, 256, 256, _MAX, 512, 512, 512, _MAX, 512, 512, 512)
# Layers of torchvision's `features`, and where LPIPS listens: after these.
_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
_SMALLEST = {"alex": 32, "vgg": 16}


def decoded_temporal_loss(
    video: Tensor,
    truth: Tensor,
    flow: Tensor,
    visible: Tensor,
    roi: Tensor | None,
    picture: Tensor | None,
    lpips: Lpips | None = None,
) -> Tensor:
    """[B]: `temporal_loss` on decoded videos [B, 3, N, H, W] in [-1, 1].

    Compared are frames 0, 4, 8, ..., for which the latent frames stand; the flow is brought to their size and
    to pixels, masks to the nearest.

    Without `lpips` the distance is L1 of the colours. With it, it is the same thing said in LPIPS' features
    f (of unit length, squared, weighed by its heads, added over its layers):
    |(f(warp(video_k)) - f(video_{k+1})) - (f(warp(truth_k)) - f(truth_{k+1}))|^2. Where the truth warps
    exactly this is LPIPS(warp(video_k), video_{k+1}); it is 0 at the truth, and smooth. (A difference of two
    LPIPS would be below 0 for a clip that is more still than the true one, and, cut off at 0, teach nothing
    there.) Points that do not count are first filled from the later frame, so that what is hidden, or outside
    the region, is in neither side of the comparison.
    """
    video, truth = at_least_fp32(video[:, :, ::TIME_STRIDE]), at_least_fp32(truth[:, :, ::TIME_STRIDE])
    flow = _finer(at_least_fp32(flow), "bilinear") * SPACE_STRIDE
    visible = _finer(at_least_fp32(visible), "nearest")
    roi = None if roi is None else _finer(at_least_fp32(roi), "nearest")
    picture = None if picture is None else _finer(at_least_fp32(picture), "nearest")
    if lpips is None:
        return temporal_loss(video, truth, flow, visible, roi, picture)
    weight = later_weight(visible, roi, picture)
    if not weight.shape[1]:  # one frame has no past
        return masked_mean(video[:, 0, :-1], weight)
    change = _feature_change(video, flow, weight, lpips)
    with torch.no_grad():
        true_change = _feature_change(truth, flow, weight, lpips)
    wrong = [own - true for own, true in zip(change, true_change, strict=True)]
    distance = lpips.weighed(wrong, (int(video.shape[3]), int(video.shape[4])))
    return masked_mean(distance.view(weight.shape), weight)


def _feature_change(frames: Tensor, flow: Tensor, weight: Tensor, lpips: Lpips) -> list[Tensor]:
    """f(warped) - f(later) per layer, of B x (F - 1) pairs of frames [B, 3, F, H, W]."""
    later = frames[:, :, 1:]
    warped = torch.where(weight[:, None] > 0, warp(frames[:, :, :-1], flow), later)
    before, after = (lpips.features(part.transpose(1, 2).flatten(0, 1)) for part in (warped, later))
    return [a - b for a, b in zip(before, after, strict=True)]


def _finer(grid: Tensor, mode: str) -> Tensor:
    """A grid [..., h, w] of the latent at the size of the video."""
    flat = grid.reshape(-1, 1, *grid.shape[-2:])
    if not len(flat):  # which interpolate refuses
        return grid.new_zeros(*grid.shape[:-2], *(SPACE_STRIDE * side for side in grid.shape[-2:]))
    align = False if mode == "bilinear" else None
    flat = nnf.interpolate(flat, scale_factor=SPACE_STRIDE, mode=mode, align_corners=align)
    return flat.view(*grid.shape[:-2], *flat.shape[-2:])


class Crop:
    """The place of each clip, `size` cells of the latent grid, that shows its region [B, F, h, w].

    Of all places in the picture it is one that holds most of the region over the clip, and of these the
    middle one: a region that fits lies in the middle of its crop, and what `size` is larger than the region
    is its margin. A clip without a region gives its middle; a size that is larger than the picture is cut to
    it. The same box for all frames. No host sync.
    """

    def __init__(self, roi: Tensor, size: tuple[int, int]) -> None:
        height, width = min(size[0], roi.shape[-2]), min(size[1], roi.shape[-1])
        held = nnf.avg_pool2d(roi.detach().float().sum(1), (height, width), stride=1)  # [B, places, places]
        most = held >= held.amax((1, 2), keepdim=True) * (1 - 1e-4)  # equal but for rounding
        top = torch.arange(held.shape[1], device=held.device)[:, None].expand_as(held)
        left = torch.arange(held.shape[2], device=held.device).expand_as(held)
        away = sum((at - masked_mean(at, most)[:, None, None]) ** 2 for at in (top, left))
        place = torch.where(most, away, torch.inf).flatten(1).argmin(1)
        self._rows = top.flatten(1).gather(1, place[:, None]) + torch.arange(height, device=held.device)
        self._cols = left.flatten(1).gather(1, place[:, None]) + torch.arange(width, device=held.device)

    def __call__(self, grid: Tensor) -> Tensor:
        """The part [B, ..., *size] of a latent, or of what lies on its grid [B, ..., h, w]."""
        flat = grid.reshape(len(grid), math.prod(grid.shape[1:-2]), *grid.shape[-2:])
        clip = torch.arange(len(grid), device=grid.device)[:, None, None]
        part = flat[clip, :, self._rows[:, :, None], self._cols[:, None, :]].permute(0, 3, 1, 2)
        return part.reshape(*grid.shape[:-2], *part.shape[-2:])

    def still_inside(self, flow: Tensor) -> Tensor:
        """[B, F - 1, *size]: 1 where the flow [B, F - 1, 2, h, w] comes from within the crop, otherwise 0."""
        inside = torch.ones_like(self(flow[:, :, 0]))
        for axis, places in enumerate((self._cols[:, None, None, :], self._rows[:, None, :, None])):
            came_from = places + self(flow[:, :, axis])
            first, last = (places.flatten(1).amin(1) - 0.5, places.flatten(1).amax(1) + 0.5)  # outer edges
            inside = inside * (came_from >= first.view(-1, 1, 1, 1)) * (came_from <= last.view(-1, 1, 1, 1))
        return inside


class Lpips(nn.Module):
    """LPIPS of a frozen backbone, "alex" or "vgg", as a map; made by `load_lpips`.

    The gradient reaches both pictures.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str) -> None:
        super().__init__()
        layers = _alexnet() if net == "alex" else _vgg16()
        self.taps, self.smallest = _TAPS[net], _SMALLEST[net]
        self.layers = nn.ModuleList(layers)
        # In which colours the backbones were trained, as numbers of [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        heads = [torch.zeros(1, width, 1, 1) for width in _WIDTHS[net]]
        self.heads = nn.ParameterList(nn.Parameter(head) for head in heads)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Five maps [n, c, ., .] of pictures [n, 3, H, W] in [-1, 1], of unit length at each point."""
        if min(pictures.shape[-2:]) < self.smallest:
            height, width = pictures.shape[-2:]
            raise WanmoeError(
                f"LPIPS needs pictures of {self.smallest} pixels a side, these have {height}x{width}; "
                "take larger clips, or L1"
            )
        x, out = (pictures - self.shift) / self.scale, []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                out.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return out

    def weighed(self, differences: list[Tensor], size: tuple[int, int]) -> Tensor:
        """[n, *size]: squares of the maps' differences, weighed by the heads and added over the layers."""
        total = differences[0].new_zeros(())
        for difference, head in zip(differences, self.heads, strict=True):
            map_ = (difference.pow(2) * head).sum(1, keepdim=True)
            total = total + nnf.interpolate(map_, size, mode="bilinear", align_corners=False)
        return total[:, 0]

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """[n, H, W]: LPIPS of pictures [n, 3, H, W] in [-1, 1], as a map; its mean is the usual number."""
        pairs = zip(self.features(one), self.features(other), strict=True)
        return self.weighed([a - b for a, b in pairs], (int(one.shape[-2]), int(one.shape[-1])))


def load_lpips(path: str | Path, net: str = "alex") -> Lpips:
    """LPIPS with the backbone of a file, frozen, in fp32 on the CPU; nothing is downloaded.

    Args:
        path: state dict of torchvision's alexnet or vgg16 (.pth, read without running code, or safetensors).
        net: "alex" or "vgg".

    Raises:
        WanmoeError: net is unknown, the package with the heads is missing, or the file holds something else.
    """
    if net not in _TAPS:
        raise WanmoeError(f"LPIPS has no backbone {net!r}; there are: {', '.join(_TAPS)}")
    package = find_spec("torchmetrics")  # not imported: its data file is all that is wanted
    if package is None or not package.submodule_search_locations:
        raise WanmoeError("LPIPS needs its heads, which are not installed: pip install torchmetrics")
    folder = Path(package.submodule_search_locations[0]) / "functional" / "image" / "lpips_models"
    model = Lpips(net)
    backbone = {f"features.{name}": value for name, value in model.layers.named_parameters()}
    _copy(backbone, path, "features.")
    heads = {f"lin{index}.model.1.weight": head for index, head in enumerate(model.heads)}
    _copy(heads, folder / f"{net}.pth", "")
    return model.requires_grad_(False).eval()


def _copy(parameters: dict[str, nn.Parameter], path: str | Path, prefix: str) -> None:
    """Fills parameters with the tensors of a file that have their names; others of the prefix are a fault."""
    stored = {name: value for name, value in open_weights(path).tensors.items() if name.startswith(prefix)}
    if not stored:
        raise WeightsError(f"{path}: no tensor named {prefix}...; give torchvision's alexnet or vgg16")
    check_tensors({name: tuple(p.shape) for name, p in parameters.items()}, stored, str(path))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name].read())


def _alexnet() -> list[nn.Module]:
    """`torchvision.models.alexnet().features` without its last pooling."""
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ]


def _vgg16() -> list[nn.Module]:
    """`torchvision.models.vgg16().features` without its last pooling."""
    layers: list[nn.Module] = []
    width = 3
    for plan in _VGG:
        if plan == _MAX:
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, plan, 3, padding=1), nn.ReLU()]
            width = plan
    return layers
