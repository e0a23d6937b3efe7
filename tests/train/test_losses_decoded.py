"""Losses on decoded pictures, LPIPS out of files, and the crop that is decoded."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.wan.codec import HaarCodec
from wanmoe.train import losses_decoded
from wanmoe.train.losses import identity_loss, predicted_x0
from wanmoe.train.losses_decoded import Crop, Lpips, decoded_temporal_loss, load_lpips

B, F, h, w = 2, 3, 2, 3
N, H, W = 4 * (F - 1) + 1, 8 * h, 8 * w
EXACT = {"rtol": 1e-10, "atol": 1e-12}
needs_heads = pytest.mark.skipif(
    find_spec("torchmetrics") is None, reason="LPIPS' heads are not installed: pip install torchmetrics"
)
# (width, kernel) of each convolution of torchvision's networks by its index in `features`.
ALEX = {0: (64, 11), 3: (192, 5), 6: (384, 3), 8: (256, 3), 10: (256, 3)}
VGG = dict(
    zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        [(width, 3) for width in (64, 64, 128, 128, *[256] * 3, *[512] * 6)],
        strict=True,
    )
)
PLANS = {"alex": ALEX, "vgg": VGG}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def clips() -> dict[str, torch.Tensor]:
    return {
        "video": 2 * random(B, 3, N, H, W) - 1,
        "truth": 2 * random(B, 3, N, H, W, seed=1) - 1,
        "flow": random(B, F - 1, 2, h, w) - 0.5,
        "visible": (random(B, F - 1, h, w, seed=3) > 0.3).double(),
        "roi": random(B, F, h, w, seed=2) * (random(B, F, h, w, seed=3) > 0.4),
        "picture": torch.ones(B, h, w, dtype=torch.float64),
    }


def sampled(plane: np.ndarray, row: float, col: float) -> float:
    """Bilinear value of a plane at a place, the nearest one beyond the border."""
    row, col = min(max(row, 0.0), plane.shape[0] - 1.0), min(max(col, 0.0), plane.shape[1] - 1.0)
    top, left = math.floor(row), math.floor(col)
    bottom, right = min(top + 1, plane.shape[0] - 1), min(left + 1, plane.shape[1] - 1)
    a, b = row - top, col - left
    upper = (1 - b) * plane[top, left] + b * plane[top, right]
    return (1 - a) * upper + a * ((1 - b) * plane[bottom, left] + b * plane[bottom, right])


def reference(clips: dict[str, torch.Tensor]) -> list[float]:
    video, truth, flow, visible, roi, picture = (tensor.numpy() for tensor in clips.values())
    out = []
    for clip in range(B):
        total = weight = 0.0
        for k in range(F - 1):
            for row in range(H):
                for col in range(W):
                    cell = row // 8, col // 8
                    counts = visible[clip, k][cell] * roi[clip, k + 1][cell] * picture[clip][cell]
                    fine = (row + 0.5) / 8 - 0.5, (col + 0.5) / 8 - 0.5
                    x, y = (8 * sampled(flow[clip, k, axis], *fine) for axis in (0, 1))
                    change = 0.0
                    for channel in range(3):
                        own, true = (
                            sampled(v[clip, channel, 4 * k], row + y, col + x)
                            - v[clip, channel, 4 * k + 4, row, col]
                            for v in (video, truth)
                        )
                        change += abs(own - true) / 3
                    total += counts * change
                    weight += counts
        out.append(total / weight)
    return out


def test_l1_against_loops(clips):
    clips["picture"][1, 0, 0] = 0
    found = decoded_temporal_loss(**clips)
    np.testing.assert_allclose(found.numpy(), reference(clips), rtol=1e-10)


def test_only_frames_that_latent_frames_stand_for_are_compared(clips):
    before = decoded_temporal_loss(**clips)
    for frame in range(N):
        if frame % 4:
            clips["video"][:, :, frame] = 0
    assert torch.equal(decoded_temporal_loss(**clips), before)


@pytest.mark.parametrize("masks", ["all", "visible", "none"])
def test_l1_finite_differences_and_nothing_to_compare(clips, masks):
    if masks != "all":
        clips |= {"roi": None, "picture": None}
    if masks == "none":
        clips["visible"][0] = 0
    rest = {name: value for name, value in clips.items() if name != "video"}
    video = clips["video"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decoded_temporal_loss(x, **rest), (video,), fast_mode=True)
    loss = decoded_temporal_loss(video, **rest)
    loss.sum().backward()
    assert torch.isfinite(video.grad).all() and video.grad[1].any()
    assert bool(video.grad[0].any()) == bool(loss[0] > 0) == (masks != "none")


# LPIPS
def backbone(net: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state, before = {}, 3
    for index, (width, side) in PLANS[net].items():
        state[f"features.{index}.weight"] = torch.randn(width, before, side, side) / side / before**0.5
        state[f"features.{index}.bias"] = 0.1 * torch.randn(width)
        before = width
    # The classifier that such files have too, and that LPIPS has no use for.
    return state | {"classifier.1.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    for net in PLANS:
        torch.save(backbone(net), folder / f"{net}.pth")
    return {net: folder / f"{net}.pth" for net in PLANS}


@pytest.fixture(scope="module")
def lpips(files) -> Lpips:
    return load_lpips(files["alex"]).double()


def reference_lpips(net: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The map [n, H, W], from the paper's definition and torchvision's tables."""
    state = backbone(net)
    package = find_spec("torchmetrics").submodule_search_locations[0]
    heads = torch.load(
        f"{package}/functional/image/lpips_models/{net}.pth", weights_only=True, map_location="cpu"
    )
    stages: list[list[torch.Tensor]] = []
    for x in (one, other):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        kept = []
        for index, (_, side) in PLANS[net].items():
            if net == "alex" and index in (3, 6):
                x = nnf.max_pool2d(x, 3, 2)
            if net == "vgg" and index in (5, 10, 17, 24):
                x = nnf.max_pool2d(x, 2, 2)
            stride, padding = (4, 2) if side == 11 else (1, side // 2)
            weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
            x = nnf.conv2d(x, weight, bias, stride, padding).relu()
            if net == "alex" or index in (2, 7, 14, 21, 28):
                kept.append(x / x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10))
        stages.append(kept)
    total = torch.zeros(len(one), *one.shape[-2:])
    for layer, (a, b) in enumerate(zip(*stages, strict=True)):
        squares = (heads[f"lin{layer}.model.1.weight"] * (a - b) ** 2).sum(1, keepdim=True)
        total += nnf.interpolate(squares, one.shape[-2:], mode="bilinear")[:, 0]
    return total


@needs_heads
@pytest.mark.parametrize("net", sorted(PLANS))
def test_lpips_is_what_the_paper_says(files, net, tmp_path):
    one, other = (2 * random(2, 3, 40, 48, seed=s).float() - 1 for s in (0, 1))
    model = load_lpips(files[net], net)
    found = model(one, other)
    torch.testing.assert_close(found, reference_lpips(net, one, other), rtol=1e-4, atol=1e-6)
    assert found.min() > 1e-3 and not model(one, one).any()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    save_file(backbone(net), tmp_path / "same.safetensors")
    assert torch.equal(load_lpips(tmp_path / "same.safetensors", net)(one, other), found)


@needs_heads
def test_files_that_are_no_backbone_are_refused(files, tmp_path):
    with pytest.raises(WanmoeError, match=r"vgg.pth: .*features\.3\.weight"):
        load_lpips(files["vgg"])
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "else.safetensors")
    with pytest.raises(WanmoeError, match=r"else.safetensors: no tensor named features\."):
        load_lpips(tmp_path / "else.safetensors")
    with pytest.raises(WanmoeError, match="backbone 'resnet'; there are: alex, vgg"):
        load_lpips(files["alex"], "resnet")


def test_heads_that_are_not_installed_are_named(monkeypatch, files):
    monkeypatch.setattr(losses_decoded, "find_spec", lambda name: None)
    with pytest.raises(WanmoeError, match="pip install torchmetrics"):
        load_lpips(files["alex"])


@needs_heads
def test_pictures_too_small_for_the_backbone_are_named(lpips):
    with pytest.raises(WanmoeError, match="32 pixels a side, these have 24x40"):
        lpips(torch.zeros(1, 3, 24, 40).double(), torch.zeros(1, 3, 24, 40).double())


@pytest.fixture
def larger() -> dict[str, torch.Tensor]:
    """Two latent frames of 4 x 5, which is 32 x 40 pixels."""
    visible = (random(B, 1, 4, 5, seed=3) > 0.3).double()
    return {
        "video": 2 * random(B, 3, 5, 32, 40) - 1,
        "truth": 2 * random(B, 3, 5, 32, 40, seed=1) - 1,
        "flow": random(B, 1, 2, 4, 5) - 0.5,
        "visible": visible,
        "roi": random(B, 2, 4, 5, seed=2) * visible,
        "picture": torch.ones(B, 4, 5, dtype=torch.float64),
    }


@needs_heads
def test_lpips_over_time_is_0_at_the_truth_and_plain_lpips_where_that_stands_still(lpips, larger):
    assert decoded_temporal_loss(**larger | {"video": larger["truth"]}, lpips=lpips).tolist() == [0, 0]
    still = {
        "truth": larger["truth"][:, :, :1].expand(-1, -1, 5, -1, -1),
        "flow": torch.zeros(B, 1, 2, 4, 5),
        "visible": torch.ones(B, 1, 4, 5),
    }
    roi = {"roi": None, "picture": None}
    found = decoded_temporal_loss(**larger | still | roi, lpips=lpips)
    video = larger["video"]
    torch.testing.assert_close(found, lpips(video[:, :, 0], video[:, :, 4]).mean((1, 2)), **EXACT)
    weight = larger["roi"][:, 1].repeat_interleave(8, 1).repeat_interleave(8, 2)
    found = decoded_temporal_loss(**larger | still, lpips=lpips)
    earlier = torch.where(weight[:, None] > 0, video[:, :, 0], video[:, :, 4])
    expected = (lpips(earlier, video[:, :, 4]) * weight).sum((1, 2)) / weight.sum((1, 2))
    torch.testing.assert_close(found, expected, **EXACT)


@needs_heads
def test_lpips_over_time_finite_differences(lpips, larger):
    rest = {name: value for name, value in larger.items() if name != "video"} | {"lpips": lpips}
    video = larger["video"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decoded_temporal_loss(x, **rest), (video,), fast_mode=True)


@needs_heads
def test_lpips_over_time_asks_nothing_of_the_past_of_the_background(lpips, larger):
    """No flow: points of the earlier frame that nothing in the region came from have no gradient."""
    video = larger["video"].requires_grad_()
    decoded_temporal_loss(
        **larger | {"video": video, "flow": torch.zeros(B, 1, 2, 4, 5)}, lpips=lpips
    ).sum().backward()
    counts = larger["roi"][:, 1].repeat_interleave(8, 1).repeat_interleave(8, 2) > 0
    earlier = video.grad[:, :, 0].abs().sum(1)
    assert float(earlier[~counts].max()) < 1e-12 < float(earlier[counts].max())


@needs_heads
def test_lpips_over_time_of_nothing_of_one_frame_and_of_black(lpips, larger):
    larger["roi"][0] = 0
    video = larger["video"].requires_grad_()
    loss = decoded_temporal_loss(**larger, lpips=lpips)
    loss.sum().backward()
    assert loss[0] == 0 and not video.grad[0].any() and loss[1] > 0 and video.grad[1].any()

    one = {"flow": larger["flow"][:, :0], "visible": larger["visible"][:, :0]}
    one |= {"video": video[:, :, :1], "truth": larger["truth"][:, :, :1], "roi": larger["roi"][:, :1]}
    assert decoded_temporal_loss(**larger | one, lpips=lpips).tolist() == [0, 0]

    # Every channel of the first layer is shut: a norm of 0.
    shut = load_shut(lpips)
    video.grad = None
    black = {"truth": torch.zeros_like(larger["truth"]), "video": video * 0}
    decoded_temporal_loss(**larger | black, lpips=shut).sum().backward()
    assert torch.isfinite(video.grad).all()


def load_shut(lpips: Lpips) -> Lpips:
    shut = Lpips("alex").double()
    shut.load_state_dict(lpips.state_dict())
    torch.nn.init.constant_(shut.layers[0].bias, -1e3)
    return shut.requires_grad_(False)


# The crop
def test_the_crop_holds_the_region_in_its_middle():
    latent = torch.arange(9 * 13).view(1, 1, 1, 9, 13).repeat(2, 1, 2, 1, 1)
    roi = torch.zeros(2, 2, 9, 13)
    roi[0, 0, 3, 5], roi[0, 1, 5, 7] = 1, 0.5  # rows 3..5, columns 5..7, over both frames
    roi[1, :, 0:2, 12] = 1  # in a corner: clamped
    cut = Crop(roi, (5, 5))
    crop, inside = cut(latent), cut(roi)
    assert crop.shape == (2, 1, 2, 5, 5)
    assert crop[0, 0, :, 0, 0].tolist() == [2 * 13 + 4] * 2
    assert crop[1, 0, :, 0, 0].tolist() == [8] * 2
    assert torch.equal(crop[1, 0, 0], latent[1, 0, 0, :5, 8:])
    assert torch.equal(inside[0], roi[0, :, 2:7, 4:9])
    assert inside.sum((1, 2, 3)).tolist() == roi.sum((1, 2, 3)).tolist()


def test_the_crop_holds_the_most_that_any_place_would():
    roi = (random(5, 2, 9, 13) > 0.9).double() * random(5, 2, 9, 13, seed=1)
    held = Crop(roi, (4, 6))(roi).sum((1, 2, 3))
    for clip in range(5):
        places = [
            float(roi[clip, :, top : top + 4, left : left + 6].sum())
            for top in range(9 - 4 + 1)
            for left in range(13 - 6 + 1)
        ]
        assert float(held[clip]) == pytest.approx(max(places), rel=1e-3)


def test_the_crop_of_no_region_is_the_middle_and_never_beyond_the_picture():
    latent = torch.arange(9 * 13.0).view(1, 1, 1, 9, 13)
    empty = torch.zeros(1, 1, 9, 13)
    assert float(Crop(empty, (5, 5))(latent)[..., 0, 0]) == 2 * 13 + 4
    assert torch.equal(Crop(empty, (99, 99))(latent), latent)


def test_what_comes_from_outside_the_crop_is_told():
    roi = torch.zeros(1, 2, 6, 8)
    roi[0, :, 2:4, 3:6] = 1
    flow = torch.zeros(1, 1, 2, 6, 8)
    flow[0, 0, 0, 2, 3], flow[0, 0, 1, 3, 5], flow[0, 0, 0, 2, 5] = -0.75, 1.0, -2.25  # left, below, inside
    crop = Crop(roi, (2, 3))
    assert crop.still_inside(flow)[0, 0].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert crop(flow)[0, 0, 0].tolist() == [[-0.75, 0, -2.25], [0, 0, 0]]
    assert crop(flow[:, :0]).shape == (1, 0, 2, 2, 3)


def test_the_identity_loss_of_a_decoded_crop_reaches_v():
    """v -> x0 -> crop -> pictures -> frozen classifier -> loss, by finite differences; two places."""
    codec = HaarCodec().double()
    shape = (2, 16, 2, 3, 4)
    x_t, v = random(*shape), random(*shape, seed=1).requires_grad_()
    roi, t = torch.zeros(2, 2, 3, 4), torch.tensor([0.3, 0.8]).double()
    roi[0, :, 0, 0] = roi[1, :, 2, 3] = 1
    classifier = torch.nn.Linear(3 * 5 * 8 * 16, 4).double().requires_grad_(False)
    classes = torch.eye(4).double()[:2]

    def loss(v: torch.Tensor) -> torch.Tensor:
        crop = Crop(roi, (1, 2))(predicted_x0(x_t, v, t))
        return identity_loss(classifier(codec.decode(crop).flatten(1)), classes, t)

    assert torch.autograd.gradcheck(loss, (v,))
    loss(v).sum().backward()
    touched = v.grad.abs().sum((1, 2)) > 0
    assert touched[0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert touched[1].nonzero().tolist() == [[2, 2], [2, 3]]
