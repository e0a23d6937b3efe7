"""Losses of v and of the predicted clean latent (traps A16, A17, A18), against plain loops in NumPy."""

import math

import cv2
import numpy as np
import pytest
import torch

from wanmoe.train.data.flow import latent_flow
from wanmoe.train.losses import (
    flow_matching_loss,
    identity_loss,
    predicted_x0,
    roi_error,
    roi_loss,
    squared_error,
    temporal_loss,
    warp,
)

B, C, F, H, W, K = 2, 3, 3, 5, 7, 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Clips:
    """Random clips in fp64 of odd sizes; masks with soft values, the first clip's border hidden."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.v, self.target = self.normal(B, C, F, H, W), self.normal(B, C, F, H, W)
        self.x_t, self.truth = self.normal(B, C, F, H, W), self.normal(B, C, F, H, W)
        self.t = self.uniform(B)
        self.roi = self.uniform(B, F, H, W) * (self.uniform(B, F, H, W) > 0.4)
        self.picture = torch.ones(B, H, W, dtype=torch.float64)
        self.picture[0, :, :2] = 0
        self.flow = 2.5 * self.normal(B, F - 1, 2, H, W)  # up to beyond the border
        self.visible = (self.uniform(B, F - 1, H, W) > 0.3).double()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)


@pytest.fixture
def clips() -> Clips:
    return Clips()


def reference_error(clips: Clips) -> np.ndarray:
    return ((clips.v.numpy() - clips.target.numpy()) ** 2).mean(1)


def reference_warp(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """[C, H, W] sampled at p + flow(p), by the definition."""
    height, width = frame.shape[1:]
    out = np.zeros_like(frame)
    for row in range(height):
        for col in range(width):
            x = min(max(col + flow[0, row, col], 0.0), width - 1.0)
            y = min(max(row + flow[1, row, col], 0.0), height - 1.0)
            left, top = math.floor(x), math.floor(y)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            a, b = x - left, y - top
            upper = (1 - a) * frame[:, top, left] + a * frame[:, top, right]
            lower = (1 - a) * frame[:, bottom, left] + a * frame[:, bottom, right]
            out[:, row, col] = (1 - b) * upper + b * lower
    return out


def reference_temporal(x0, truth, flow, visible, roi, picture) -> np.ndarray:
    out = []
    for b in range(len(x0)):
        total = weight = 0.0
        for k in range(x0.shape[2] - 1):
            own = reference_warp(x0[b, :, k], flow[b, k]) - x0[b, :, k + 1]
            true = reference_warp(truth[b, :, k], flow[b, k]) - truth[b, :, k + 1]
            counts = visible[b, k] * roi[b, k + 1] * picture[b]
            total += (np.abs(own - true).mean(0) * counts).sum()
            weight += counts.sum()
        out.append(total / weight)
    return np.array(out)


def numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def test_flow_matching_is_the_mean_over_what_lies_in_the_picture(clips):
    error = squared_error(clips.v, clips.target)
    np.testing.assert_allclose(error.numpy(), reference_error(clips), rtol=1e-12)
    whole = flow_matching_loss(error, None)
    torch.testing.assert_close(whole, (clips.v - clips.target).pow(2).flatten(1).mean(1), **EXACT)
    seen = flow_matching_loss(error, clips.picture)
    np.testing.assert_allclose(
        seen.numpy(), [error[0, :, :, 2:].mean(), error[1].mean()], rtol=1e-12
    )  # the first clip's two columns to the left are no picture


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_background_weighs_exactly_1_and_region_1_plus_w(clips, weight):
    roi = (clips.roi > 0).double()
    v = clips.v.clone().requires_grad_()
    error = squared_error(v, clips.target)
    total = flow_matching_loss(error, clips.picture) + weight * roi_loss(error, roi, clips.picture)
    total.sum().backward()
    points = clips.picture.sum((1, 2)).view(B, 1, 1, 1, 1) * F
    per_point = v.grad * points * C / (2 * (clips.v - clips.target))
    expected = (1 + weight * roi) * clips.picture[:, None]
    torch.testing.assert_close(per_point, expected[:, None].expand_as(per_point), **EXACT)


def test_the_border_of_picture_and_region_is_as_bright_as_their_middle():
    """Equal errors everywhere: no mask is blurred, and none is darkened at the edge of the picture."""
    error = torch.ones(1, 1, 4, 4, requires_grad=True)
    roi = torch.zeros(1, 1, 4, 4)
    roi[..., :2] = 1
    (flow_matching_loss(error, None) + 2 * roi_loss(error, roi, None)).sum().backward()
    assert (error.grad * 16).tolist() == [[[[3, 3, 1, 1]] * 4]]


def test_roi_loss_against_loops_and_soft_masks(clips):
    error = reference_error(clips)
    roi, picture = numpy(clips.roi, clips.picture)
    expected = []
    for b in range(B):
        total = sum(
            error[b, f, y, x] * roi[b, f, y, x] * picture[b, y, x]
            for f in range(F)
            for y in range(H)
            for x in range(W)
        )
        expected.append(total / (F * picture[b].sum()))
    found = roi_loss(torch.from_numpy(error), clips.roi, clips.picture)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    inside = roi_error(torch.from_numpy(error), clips.roi).numpy()
    np.testing.assert_allclose(inside, (error * roi).sum((1, 2, 3)) / roi.sum((1, 2, 3)), rtol=1e-12)


def test_a_region_error_without_region_is_not_a_number(clips):
    clips.roi[1] = 0
    found = roi_error(squared_error(clips.v, clips.target), clips.roi)
    assert torch.isfinite(found[0]) and torch.isnan(found[1])


def test_x0_comes_out_of_x_t_and_v(clips):
    noise = clips.normal(B, C, F, H, W)
    t = clips.t.view(B, 1, 1, 1, 1)
    x_t, v = (1 - t) * clips.truth + t * noise, noise - clips.truth
    torch.testing.assert_close(predicted_x0(x_t, v, clips.t), clips.truth, **EXACT)


def test_identity_against_loops_and_without_label(clips):
    logits, t = clips.normal(3, K), torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    classes = torch.tensor([[0, 1, 0, 0], [0.25, 0, 0.75, 0], [0, 0, 0, 0]], dtype=torch.float64)
    expected = []
    for row, weights, at in zip(*numpy(logits, classes, t), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        expected.append((1 - at) * -sum(w * (value - log_sum) for w, value in zip(weights, row, strict=True)))
    logits.requires_grad_()
    loss = identity_loss(logits, classes, t)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)
    loss.sum().backward()
    assert loss[2] == 0 and not logits.grad[2].any()
    assert logits.grad[:2].abs().amin() > 0


def test_noise_alone_says_nothing_of_the_instrument(clips):
    classes = torch.eye(K, dtype=torch.float64)[:B]
    assert identity_loss(clips.normal(B, K), classes, torch.ones(B)).tolist() == [0, 0]


def test_warp_against_loops_inside_and_beyond_the_border(clips):
    earlier = clips.truth[:, :, :-1]
    found = warp(earlier, clips.flow).numpy()
    for b in range(B):
        for k in range(F - 1):
            expected = reference_warp(earlier[b, :, k].numpy(), clips.flow[b, k].numpy())
            np.testing.assert_allclose(found[b, :, k], expected, atol=1e-12)


def test_flow_points_back_and_is_x_before_y():
    """A point at (row 1, column 1) comes to (row 1, column 3): back from there is x = -2."""
    earlier = torch.zeros(1, 1, 1, 4, 5)
    earlier[..., 1, 1] = 1
    flow = torch.zeros(1, 1, 2, 4, 5)
    flow[:, :, 0] = -2
    warped = warp(earlier, flow)
    assert warped.nonzero().tolist() == [[0, 0, 0, 1, 3]]


def test_warp_of_one_pixel_of_no_frame_and_of_bf16():
    one = torch.full((1, 2, 1, 1, 1), 3.0)
    torch.testing.assert_close(warp(one, torch.full((1, 1, 2, 1, 1), 0.7)), one)
    assert warp(torch.zeros(2, 3, 0, 4, 4), torch.zeros(2, 0, 2, 4, 4)).shape == (2, 3, 0, 4, 4)
    assert warp(one.bfloat16(), torch.zeros(1, 1, 2, 1, 1).half()).dtype == torch.float32


def test_the_stored_flow_and_warp_agree_on_a_picture_that_moves():
    """From pixels to the warped frame: 12 px right and 8 px down between latent frames."""
    random = np.random.default_rng(0)
    canvas = cv2.GaussianBlur(random.integers(0, 256, (400, 400, 3)).astype(np.float32), (0, 0), 6)
    canvas = ((canvas - canvas.min()) / (canvas.max() - canvas.min()) * 255).astype(np.uint8)
    frames = [canvas[100 - 2 * f : 292 - 2 * f, 100 - 3 * f : 292 - 3 * f] for f in range(5)]
    pictures = torch.from_numpy(np.stack(frames))
    flow, visible = latent_flow(pictures)
    cells = pictures[::4].float().mean(-1).view(2, 24, 8, 24, 8).mean((2, 4))
    earlier, later = cells[None, None, :1], cells[1]
    seen = visible[0].bool()
    assert seen.float().mean() > 0.7

    def miss(flow: torch.Tensor) -> float:
        return float((warp(earlier, flow[None].float())[0, 0, 0] - later).abs()[seen].mean())

    assert miss(flow) < 0.5 * miss(torch.zeros_like(flow)) < 0.5 * miss(-flow)


def test_temporal_against_loops(clips):
    expected = reference_temporal(
        *numpy(clips.x_t, clips.truth, clips.flow, clips.visible, clips.roi, clips.picture)
    )
    found = temporal_loss(clips.x_t, clips.truth, clips.flow, clips.visible, clips.roi, clips.picture)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    found = temporal_loss(clips.x_t, clips.truth, clips.flow, clips.visible, None, None)
    ones = np.ones((B, F, H, W)), np.ones((B, H, W))
    expected = reference_temporal(*numpy(clips.x_t, clips.truth, clips.flow, clips.visible), *ones)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_temporal_is_exactly_0_at_the_truth_and_for_what_is_shifted_alike(clips):
    args = clips.truth, clips.flow, clips.visible, clips.roi, clips.picture
    assert temporal_loss(clips.truth, *args).tolist() == [0, 0]
    brighter = clips.truth + 0.5  # a constant error does not change over time
    assert float(temporal_loss(brighter, *args).max()) < 1e-12


def test_temporal_sees_neither_hidden_points_nor_the_background(clips):
    """An error of the last frame alone counts where that frame's point is seen and in the region."""
    counts = (clips.visible * clips.roi[:, 1:] * clips.picture[:, None]) > 0
    silent = ~counts[:, None].expand(B, C, F - 1, H, W)
    x0 = clips.truth.clone().requires_grad_()
    # Only the last frame is no other frame's past.
    wrong = torch.zeros_like(clips.truth)
    wrong[:, :, -1] = clips.normal(B, C, H, W)
    args = clips.truth, clips.flow, clips.visible, clips.roi, clips.picture
    temporal_loss(x0 + wrong, *args).sum().backward()
    assert not x0.grad[:, :, -1][silent[:, :, -1]].any()
    assert x0.grad[:, :, -1][~silent[:, :, -1]].abs().min() > 0


def test_a_moving_instrument_costs_nothing_and_one_left_behind_does():
    """A bright block moves two columns a frame; flow, region and visibility follow it."""
    truth = torch.zeros(1, 2, 3, 6, 9)
    flow, roi = torch.zeros(1, 2, 2, 6, 9), torch.zeros(1, 3, 6, 9)
    for frame in range(3):
        truth[0, :, frame, 2:4, 2 * frame : 2 * frame + 2] = 1
        roi[0, frame, 2:4, 2 * frame : 2 * frame + 2] = 1
        if frame:
            flow[0, frame - 1, 0, 2:4, 2 * frame : 2 * frame + 2] = -2
    seen = torch.ones(1, 2, 6, 9)

    def loss(x0: torch.Tensor) -> float:
        return float(temporal_loss(x0, truth, flow, seen, roi, None))

    assert loss(truth) == 0
    assert loss(2 * truth) == pytest.approx(0, abs=1e-6)  # another instrument that moves alike
    still = truth[:, :, :1].expand_as(truth)
    assert loss(still) == pytest.approx(0.5)  # gone with the first step, and gone as before in the second
    assert loss(truth + torch.arange(3).view(1, 1, 3, 1, 1)) == pytest.approx(1)  # flicker


@pytest.mark.parametrize("what", ["picture", "roi", "visible"])
def test_a_clip_with_nothing_to_compare_costs_exactly_0_without_gradient(clips, what):
    getattr(clips, what)[1] = 0
    v = clips.v.clone().requires_grad_()
    error, x0 = squared_error(v, clips.target), predicted_x0(clips.x_t, v, clips.t)
    losses = {"temporal": temporal_loss(x0, clips.truth, clips.flow, clips.visible, clips.roi, clips.picture)}
    if what != "visible":
        losses["roi"] = roi_loss(error, clips.roi, clips.picture)
    if what == "picture":
        losses["flow"] = flow_matching_loss(error, clips.picture)
    for loss in losses.values():
        (gradient,) = torch.autograd.grad(loss.sum(), v, retain_graph=True)
        assert loss[1] == 0 and not gradient[1].any()
        assert loss[0] > 0 and gradient[0].any() and torch.isfinite(gradient).all()


def test_a_clip_of_one_frame_has_no_past(clips):
    x0 = clips.x_t[:, :, :1].clone().requires_grad_()
    args = clips.flow[:, :0], clips.visible[:, :0], clips.roi[:, :1], clips.picture
    loss = temporal_loss(x0, clips.truth[:, :, :1], *args)
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and not x0.grad.any()


def test_half_precision_is_computed_in_fp32():
    v = torch.full((1, 2, 1, 2, 2), 300.0, dtype=torch.float16)  # whose square is beyond fp16
    error = squared_error(v, torch.zeros_like(v))
    assert error.dtype == torch.float32 and float(flow_matching_loss(error, None)) == 90_000
    assert predicted_x0(v, v, torch.tensor([0.5])).dtype == torch.float32


# Finite differences in fp64: every loss to v, and those of x0 through x_t - t v.
def _losses_of_v(clips: Clips):
    classifier = torch.nn.Conv3d(C, K, (2, 3, 3)).double().requires_grad_(False)
    classes = torch.eye(K, dtype=torch.float64)[[1, 3]]
    compared = clips.truth, clips.flow, clips.visible

    def x0(v):
        return predicted_x0(clips.x_t, v, clips.t)

    return {
        "flow_matching": lambda v: flow_matching_loss(squared_error(v, clips.target), clips.picture),
        "whole": lambda v: flow_matching_loss(squared_error(v, clips.target), None),
        "roi": lambda v: roi_loss(squared_error(v, clips.target), clips.roi, clips.picture),
        "identity": lambda v: identity_loss(classifier(x0(v)).flatten(2).logsumexp(2), classes, clips.t),
        "temporal": lambda v: temporal_loss(x0(v), *compared, clips.roi, clips.picture),
        "temporal_whole": lambda v: temporal_loss(x0(v), *compared, None, None),
        "warp": lambda v: warp(x0(v)[:, :, :-1], clips.flow),
    }


@pytest.mark.parametrize("name", sorted(_losses_of_v(Clips())))
def test_finite_differences(clips, name):
    torch.manual_seed(0)
    loss = _losses_of_v(clips)[name]
    v = clips.v.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (v,))
    (gradient,) = torch.autograd.grad(loss(v).sum(), v)
    assert all(part.any() for part in gradient)
