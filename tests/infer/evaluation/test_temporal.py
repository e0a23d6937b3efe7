"""Steadiness: known noise gives its PSNR, motion is no fault, what is hidden or outside does not count."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from wanmoe.infer.evaluation.scene import Scene
from wanmoe.infer.evaluation.temporal import BEST_PSNR, psnr, temporal_scores
from wanmoe.moe_lora.video import read_video


def texture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    layers = [cv2.GaussianBlur(rng.uniform(0, 1, (height, width, 3)), (0, 0), s) * s for s in (1.5, 4, 10)]
    total = sum(layers)
    return np.asarray((total - total.min()) / (total.max() - total.min()) * 200 + 20)


def clip(frames: Tensor, **marks: object) -> Scene:
    return Scene("clip", frames, 16.0, **marks)


def still(count: int = 4, height: int = 96, width: int = 128) -> Tensor:
    return torch.from_numpy(texture(height, width).round().astype(np.uint8)).expand(count, -1, -1, -1).clone()


def test_a_clip_that_stands_still_is_perfect() -> None:
    assert temporal_scores(clip(still())) == {"warped_psnr": BEST_PSNR, "warped_ssim": pytest.approx(1.0)}


def test_noise_of_a_known_level_gives_its_psnr() -> None:
    """Noise of deviation s in each of two frames that show the same is an error of 2 s^2 between them."""
    rng = np.random.default_rng(1)
    for level in (4.0, 8.0):
        noise = torch.from_numpy(rng.normal(0, level, (6, 96, 128, 3)))
        frames = (still(6).double() + noise).round().clamp(0, 255).byte()
        found = temporal_scores(clip(frames))["warped_psnr"]
        # The flow follows some of the noise, and sampling between pixels smooths it: the error is less.
        assert found == pytest.approx(psnr(2 * level**2), abs=1.0)


def test_psnr_is_that_of_torchmetrics() -> None:
    one, other = torch.rand(1, 3, 20, 30) * 255, torch.rand(1, 3, 20, 30) * 255
    theirs = float(peak_signal_noise_ratio(one, other, data_range=255.0))
    assert psnr(float((one - other).square().mean())) == pytest.approx(theirs, abs=1e-4)
    assert psnr(0.0) == BEST_PSNR and psnr(255.0**2) == pytest.approx(0, abs=1e-9)


def test_ssim_of_a_whole_picture_is_that_of_torchmetrics() -> None:
    """Where nothing moves and all counts, the map's mean is the library's number."""
    rng = np.random.default_rng(2)
    one = still(2)
    other = (one.double() + torch.from_numpy(rng.normal(0, 6, one.shape))).round().clamp(0, 255).byte()
    from wanmoe.infer.evaluation.temporal import _ssim

    a, b = (picture[0].permute(2, 0, 1)[None].float() for picture in (one, other))
    theirs = float(structural_similarity_index_measure(a, b, data_range=255.0))
    assert float(_ssim(a, b).mean()) == pytest.approx(theirs, abs=1e-4)


def test_motion_is_no_fault_and_flicker_is() -> None:
    ground = texture(120, 160)
    moving = torch.from_numpy(
        np.stack([ground[4 * k : 4 * k + 96, 6 * k : 6 * k + 128] for k in range(5)]).round().astype(np.uint8)
    )
    steady = temporal_scores(clip(moving))
    assert steady["warped_psnr"] > 40 and steady["warped_ssim"] > 0.99
    flicker = moving.int()
    flicker[1::2] += 12
    shaken = temporal_scores(clip(flicker.clamp(0, 255).byte()))
    # DIS takes some of a change of light for motion.
    assert shaken["warped_psnr"] < steady["warped_psnr"] - 8


def test_only_the_region_counts() -> None:
    frames = still(4)
    noise = torch.from_numpy(np.random.default_rng(3).normal(0, 30, (4, 96, 60, 3)))
    frames[:, :, :60] = (frames[:, :, :60].double() + noise).round().clamp(0, 255).byte()
    quiet, loud = torch.tensor([[90.0, 20, 30, 40]]), torch.tensor([[10.0, 20, 30, 40]])
    of_quiet = temporal_scores(clip(frames, boxes=(quiet,) * 4))
    of_loud = temporal_scores(clip(frames, boxes=(loud,) * 4))
    assert of_quiet["warped_psnr"] > 60 and of_loud["warped_psnr"] < 25
    assert of_quiet["warped_ssim"] > 0.999 > of_loud["warped_ssim"]
    nowhere = torch.zeros(0, 4)
    assert temporal_scores(clip(frames, boxes=(nowhere,) * 4)) == {}


def test_frames_without_a_region_do_not_count_where_others_have_one() -> None:
    """A clip that is loud where nobody marked it, and in a frame of which nothing is known."""
    frames = still(4)
    noise = torch.from_numpy(np.random.default_rng(3).normal(0, 30, (96, 128, 3)))
    frames[3] = (frames[3].double() + noise).round().clamp(0, 255).byte()
    box = torch.tensor([[90.0, 20, 30, 40]])
    assert temporal_scores(clip(frames, boxes=(box, box, box, None)))["warped_psnr"] > 60
    assert temporal_scores(clip(frames))["warped_psnr"] < 40
    where = torch.zeros(96, 128, dtype=torch.bool)
    where[20:60, 90:120] = True
    known = clip(frames, boxes=(box, None, None, None), where=(where,) * 4)
    assert temporal_scores(known)["warped_psnr"] < 40


def test_what_was_hidden_does_not_count() -> None:
    """A square that jumps uncovers a strip, of which no flow can tell what is there."""
    frames = still(3)
    for k in range(3):
        frames[k, 30:60, 30 + 14 * k : 60 + 14 * k] = frames[k, 30:60, 90:120].flip(0)
    found = temporal_scores(clip(frames))
    naive = psnr(float((frames[1:].double() - frames[:-1].double()).square().mean()))
    assert found["warped_psnr"] > naive + 3


def test_lpips_is_asked_with_what_counts_alone() -> None:
    frames = still(3)
    frames[:, :, :64] = torch.randint(0, 256, (3, 96, 64, 3), dtype=torch.uint8)
    asked = []

    def apart(one: Tensor, other: Tensor) -> Tensor:
        asked.append(one.shape)
        return (one - other).abs().mean(1)

    box = torch.tensor([[90.0, 30, 20, 20]])
    found = temporal_scores(clip(frames, boxes=(box,) * 3), apart)
    assert found["warped_lpips"] < 0.01 and len(asked) == 2
    assert all(shape[1] == 3 and min(shape[2:]) >= 32 for shape in asked)


def test_shuffled_frames_are_less_steady(data_dir: Path) -> None:
    frames = read_video(data_dir / "surgical" / "endo.mp4", fps=16, size=(144, 256), num_frames=17)
    order = torch.from_numpy(np.random.default_rng(0).permutation(17))
    own, shuffled = temporal_scores(clip(frames)), temporal_scores(clip(frames[order]))
    assert shuffled["warped_psnr"] < own["warped_psnr"] - 1 and shuffled["warped_ssim"] < own["warped_ssim"]


def test_too_short_or_too_small_a_clip_says_nothing() -> None:
    assert temporal_scores(clip(still(1))) == {}
    assert temporal_scores(clip(torch.zeros(4, 12, 40, 3, dtype=torch.uint8))) == {}
    assert not math.isnan(temporal_scores(clip(still(2, 90, 122)))["warped_psnr"])
