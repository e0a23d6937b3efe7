"""Losses of the predicted velocity and of the clean latent that follows from it: overall, in the instruments'
region, of the instrument's identity, and over time.

Every loss is one number per clip, in fp32 (fp64 stays), of gradient 0 where there is nothing to compare.

Letters: B clips, C latent channels, F, H, W latent frames, height, width, K classes; t is sigma in [0, 1], 1
is pure noise; v = noise - x0. `roi` [B, F, H, W] in [0, 1], 1 = instrument; `picture` [B, H, W], 0 = the
endoscope's round border; None = the whole picture. Masks are used as they are, never blurred: a blur darkens
what lies at the border.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def squared_error(v: Tensor, target: Tensor) -> Tensor:
    """Squared error [B, F, H, W] of velocities [B, C, F, H, W], mean over the channels."""
    return (at_least_fp32(v) - at_least_fp32(target)).pow(2).mean(1)


def flow_matching_loss(error: Tensor, picture: Tensor | None) -> Tensor:
    """[B]: mean of the error [B, F, H, W] over what lies in the picture."""
    return masked_mean(error, _everywhere(error, picture))


def roi_loss(error: Tensor, roi: Tensor, picture: Tensor | None) -> Tensor:
    """[B]: mean over the picture of roi x error.

    Divided by the picture and not by the region, so that `flow_matching_loss` + w `roi_loss` is the mean of
    an error that weighs exactly 1 in the background and exactly 1 + w in the region.
    """
    return masked_mean(error * at_least_fp32(roi), _everywhere(error, picture))


def roi_error(error: Tensor, roi: Tensor) -> Tensor:
    """[B]: mean error inside the region; NaN for a clip without one. To be reported, not to be trained on."""
    inside = at_least_fp32(roi).flatten(1)
    return (error.flatten(1) * inside).sum(1) / inside.sum(1)


def predicted_x0(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean latent [B, C, F, H, W] that x_t and v say at t [B]: x0 = x_t - t v."""
    return at_least_fp32(x_t) - at_least_fp32(t).view(-1, 1, 1, 1, 1) * at_least_fp32(v)


def identity_loss(logits: Tensor, classes: Tensor, t: Tensor) -> Tensor:
    """[B]: (1 - t) x cross-entropy of logits [B, K] with soft classes [B, K]; 0 for a clip without label.

    The rows of `classes` sum to 1, or are all 0 where nothing is known. Weighed by 1 - t, since what x0 is
    predicted to be out of noise alone shows no instrument. The classifier must run with its graph: only its
    weights are frozen.
    """
    cross_entropy = -(at_least_fp32(classes) * at_least_fp32(logits).log_softmax(1)).sum(1)
    return (1 - at_least_fp32(t)) * cross_entropy


def warp(earlier: Tensor, flow: Tensor) -> Tensor:
    """What frames [B, C, N, H, W] show a frame later: each sampled where the points of its successor were.

    `flow` [B, N, 2, H, W]: (x, y) in pixels of the frames, from the successor back; bilinear, and beyond the
    border the nearest pixel inside.
    """
    clips, channels, count, height, width = earlier.shape
    frames = at_least_fp32(earlier).transpose(1, 2).flatten(0, 1)
    flow = flow.to(frames).flatten(0, 1)
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    # align_corners=False: -1 and 1 are the outer edges, which holds for a side of one pixel too.
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    warped = nnf.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped.view(clips, count, channels, height, width).transpose(1, 2)


def temporal_loss(
    x0: Tensor,
    truth: Tensor,
    flow: Tensor,
    visible: Tensor,
    roi: Tensor | None,
    picture: Tensor | None,
) -> Tensor:
    """[B]: change along the motion that the true clip does not have, L1 over the region's visible points.

    Mean over channels and over the points p of each later frame k + 1, weighed by visible x roi x picture, of
    |(warp(x0_k) - x0_{k+1}) - (warp(truth_k) - truth_{k+1})|. True latents do not warp exactly, so their own
    change is taken off: the loss is 0 at the truth, and nowhere asks for less motion than it has.

    Args:
        x0, truth: [B, C, F, H, W].
        flow: [B, F - 1, 2, H, W]: (x, y) in latent pixels from frame k + 1 back to frame k.
        visible: [B, F - 1, H, W], 1 = the point of frame k + 1 is seen in frame k.
    """
    # warp is linear: one warp of the difference is the difference of the two, and exactly 0 at the truth.
    wrong = at_least_fp32(x0) - at_least_fp32(truth)
    change = (warp(wrong[:, :, :-1], flow) - wrong[:, :, 1:]).abs().mean(1)
    return masked_mean(change, later_weight(visible, roi, picture).to(change))


def later_weight(visible: Tensor, roi: Tensor | None, picture: Tensor | None) -> Tensor:
    """[B, F - 1, H, W]: how much each point of the frames 1 .. F - 1 counts in a comparison with its past."""
    weight = at_least_fp32(visible)
    if roi is not None:
        weight = weight * roi[:, 1:]
    return weight if picture is None else weight * picture[:, None]


def masked_mean(values: Tensor, weight: Tensor) -> Tensor:
    """[B]: mean of values [B, ...] weighed by `weight` of the same shape; 0, with gradient 0, where all
    weigh 0."""
    total = weight.flatten(1).sum(1)
    return (values * weight).flatten(1).sum(1) / torch.where(total > 0, total, torch.ones_like(total))


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32; fp64 stays, for checks by finite differences."""
    return x if x.dtype == torch.float64 else x.float()


def _everywhere(error: Tensor, picture: Tensor | None) -> Tensor:
    """[B, F, H, W]: 1 where the error counts."""
    if picture is None:
        return torch.ones_like(error)
    return picture[:, None].to(error).expand_as(error)
