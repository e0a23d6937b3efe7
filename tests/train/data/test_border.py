"""The endoscope's border: synthetic circles, the real one, and dark scenes that are none."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from wanmoe.moe_lora.video import read_video
from wanmoe.train.data.border import endoscope_border


def scene(frames: int, height: int, width: int, light: float = 1.0, seed: int = 0) -> Tensor:
    """A textured scene that drifts, with the noise of a camera."""
    rng = np.random.default_rng(seed)
    ground = cv2.GaussianBlur(rng.uniform(0, 255, (height, width + 4 * frames, 3)), (0, 0), 3)
    ground = (ground - ground.min()) / (ground.max() - ground.min()) * 200 + 30
    pictures = np.stack([ground[:, 4 * k : 4 * k + width] for k in range(frames)]) * light
    return torch.from_numpy(np.clip(pictures + rng.normal(0, 2, pictures.shape), 0, 255).astype(np.uint8))


def through_stop(pictures: Tensor, x: float, y: float, radius: float) -> tuple[Tensor, Tensor]:
    """The scene through a round stop with a soft rim and a noisy black border; and its true cells."""
    height, width = pictures.shape[1:3]
    rows, cols = np.mgrid[0:height, 0:width]
    inside = np.clip(radius - np.hypot(cols - x, rows - y) + 0.5, 0, 1)
    noise = np.random.default_rng(1).integers(0, 9, pictures.shape)
    seen = pictures.numpy() * inside[..., None] + noise * (1 - inside[..., None])
    cells = (inside > 0).reshape(height // 8, 8, width // 8, 8).any(axis=(1, 3))
    return torch.from_numpy(seen.astype(np.uint8)), torch.from_numpy(cells)


@pytest.mark.parametrize(
    ("x", "y", "radius"), [(200, 120, 110), (190, 110, 160), (160, 128, 120), (208, 60, 200), (208, 120, 215)]
)
def test_a_round_picture_is_found_wherever_it_lies(x: float, y: float, radius: float) -> None:
    pictures, truth = through_stop(scene(9, 240, 416), x, y, radius)
    picture = endoscope_border(pictures)
    assert picture.dtype == torch.uint8 and picture.shape == (30, 52)
    assert set(picture.unique().tolist()) == {0, 255}
    found = picture > 0
    assert (found & truth).sum() > 0.97 * (found | truth).sum()
    assert ((~found) & (~truth)).sum() > 0.9 * (~truth).sum()


def test_a_dark_instrument_or_cavity_at_the_rim_is_picture() -> None:
    pictures = scene(9, 240, 416)
    pictures[:, 90:150, :150] = 6  # dark in every frame, from the rim inwards
    pictures, truth = through_stop(pictures, 208, 120, 150)
    found = endoscope_border(pictures) > 0
    assert (found & truth).sum() > 0.95 * (found | truth).sum()


def test_writing_in_the_border_is_not_border() -> None:
    pictures, _ = through_stop(scene(5, 240, 416), 208, 120, 115)
    cv2_text = np.zeros((240, 416, 3), np.uint8)
    cv2.putText(cv2_text, "12:31", (4, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (220, 220, 220), 2)
    written = torch.maximum(pictures, torch.from_numpy(cv2_text))
    plain, found = endoscope_border(pictures), endoscope_border(written)
    assert not plain[:4, :8].any() and found[2, 1:8].any(), "cells with writing are learnt as they are"
    assert torch.equal(plain[6:], found[6:])


def test_bars_above_and_below_are_border() -> None:
    pictures = scene(5, 240, 416)
    pictures[:, :27], pictures[:, 220:] = 2, 2
    found = endoscope_border(pictures) > 0
    assert not found[:3].any() and found[3:28].all() and not found[28:].any()


@pytest.mark.parametrize("light", [1.0, 0.3, 0.12, 0.0])
def test_a_scene_without_border_has_none_however_dark_it_is(light: float) -> None:
    assert (endoscope_border(scene(5, 240, 416, light)) == 255).all()


def test_light_that_falls_off_towards_the_corners_is_no_border() -> None:
    rows, cols = np.mgrid[-1:1:240j, -1:1:416j]
    for power in (0.5, 2):
        light = np.exp(-power * (rows**2 + cols**2))
        pictures = scene(5, 240, 416).float() * torch.from_numpy(light[..., None]).float()
        assert (pictures[:, 0, 0].amax() < 24) == (power == 2), "the second has dark corners"
        assert (endoscope_border(pictures.to(torch.uint8)) == 255).all()


def test_a_lit_part_of_a_dark_scene_is_no_endoscope_picture() -> None:
    spot, _ = through_stop(scene(5, 240, 416), 208, 120, 50)
    assert (endoscope_border(spot) == 255).all(), "too small"
    bent = scene(5, 240, 416)
    bent[:, :170, :300] = 3
    assert (endoscope_border(bent) == 255).all(), "the hull of an L runs through the dark"


def test_the_border_of_a_real_endoscope_is_found(data_dir: Path) -> None:
    pictures = read_video(data_dir / "surgical" / "endo.mp4", fps=16, size=(480, 832), num_frames=17)
    found = endoscope_border(pictures)
    border = (found == 0).float().mean()
    assert 0.13 < border < 0.16
    assert not found[[0, 0, -1, -1], [0, -1, 0, -1]].any() and not found[30, 0].any(), "corners and sides"
    assert (found[:-1, 16:80] == 255).all(), "the picture reaches the upper and the lower edge"
    brightest = pictures.amax(dim=(0, 3)).unflatten(0, (60, 8)).unflatten(2, (104, 8)).amax(dim=(1, 3))
    assert brightest[found == 0].max() <= 24 and (brightest[found > 0] > 24).float().mean() > 0.99


@pytest.mark.parametrize("name", ["gestures/walk.mkv", "gestures/book.mkv", "bikes.mp4", "nasa_13013.mp4"])
def test_other_footage_has_no_border(name: str, data_dir: Path) -> None:
    """Among it a title on black and a workshop with dark corners and beams that stand still."""
    pictures = read_video(data_dir / name, fps=16, size=(176, 320))
    for start in range(0, len(pictures) - 16, 17):
        assert (endoscope_border(pictures[start : start + 17]) == 255).all()
