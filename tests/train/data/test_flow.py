"""Flow against known motion: translation, zoom, rotation, its sign, what is hidden; latents that follow."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.motion import clip_flow
from wanmoe.moe_lora.video import read_video, to_model
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.train.data.flow import latent_flow

Matrix = NDArray[np.float64]


def texture(height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(rng.uniform(0, 1, (height, width, 3)), (0, 0), s) * s for s in (1.5, 4, 10)]
    total = sum(layers)
    return np.asarray((total - total.min()) / (total.max() - total.min()) * 255, np.float32)


def moving(motions: list[Matrix], height: int, width: int) -> Tensor:
    """Frames of a texture: frame k shows what was at p in the texture at motions[k] p (2 x 3)."""
    ground = texture(height, width)
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    frames = [
        cv2.warpAffine(ground, m, (width, height), flags=how, borderMode=cv2.BORDER_REFLECT) for m in motions
    ]
    return torch.from_numpy(np.stack(frames).round().astype(np.uint8))


def about_centre(angle: float, zoom: float, height: int, width: int) -> Matrix:
    return cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, zoom)


def true_backward(now: Matrix, before: Matrix, height: int, width: int) -> NDArray[np.float64]:
    """[2, H, W]: p in the later frame shows texture now(p), which was at before^-1(now(p))."""
    rows, cols = np.mgrid[0:height, 0:width]
    points = np.stack([cols, rows, np.ones_like(rows)]).reshape(3, -1).astype(float)
    back = cv2.invertAffineTransform(before)
    there = back @ np.vstack([now @ points, points[2:]])
    return (there - points[:2]).reshape(2, height, width)


def warp(earlier: Tensor, flow: Tensor) -> Tensor:
    """Samples [C, h, w] at p + flow, as a loss does."""
    height, width = earlier.shape[1:]
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = (cols + flow[0]) * 2 / (width - 1) - 1, (rows + flow[1]) * 2 / (height - 1) - 1
    grid = torch.stack([x, y], -1)[None].float()
    return torch.nn.functional.grid_sample(
        earlier[None].float(), grid, padding_mode="border", align_corners=True
    )[0]


def shift(x: float, y: float) -> Matrix:
    """The texture moves by (x, y)."""
    return np.array([[1.0, 0, -x], [0, 1.0, -y]])


MOTIONS = {
    "translation": [shift(3.25 * k, -2.5 * k) for k in range(3)],
    "zoom": [about_centre(0, 1.03**-k, 152, 200) for k in range(3)],
    "rotation": [about_centre(2.0 * k, 1, 152, 200) for k in range(3)],
}


@pytest.mark.parametrize("name", MOTIONS)
def test_known_motion_is_found_within_a_quarter_pixel_and_with_its_sign(name: str) -> None:
    motions = MOTIONS[name]
    frames = moving(motions, 152, 200)
    flow = clip_flow(frames)
    assert flow.backward.shape == flow.forward.shape == (2, 2, 152, 200) and flow.scale == 1
    inner = (slice(None), slice(16, -16), slice(16, -16))
    for k in (1, 2):
        truth = true_backward(motions[k], motions[k - 1], 152, 200)
        miss = np.linalg.norm((flow.backward[k - 1] - truth)[inner], axis=0)
        assert miss.mean() < 0.1 and np.quantile(miss, 0.99) < 0.25
        ahead = true_backward(motions[k - 1], motions[k], 152, 200)
        assert np.linalg.norm((flow.forward[k - 1] - ahead)[inner], axis=0).mean() < 0.1
        before, now = (frames[n].permute(2, 0, 1).float() for n in (k - 1, k))
        backward = torch.from_numpy(flow.backward[k - 1])
        right, wrong = ((warp(before, sign * backward) - now).abs()[inner].mean() for sign in (1, -1))
        assert right < 1.5 and right * 4 < (before - now).abs()[inner].mean() < wrong
        assert flow.visible[k - 1, 16:-16, 16:-16].mean() > 0.99


def test_a_large_picture_is_searched_at_half_its_size_in_pixels_of_its_own() -> None:
    flow = clip_flow(moving([shift(0, 0), shift(6, 4)], 328, 440))
    assert flow.scale == 2 and flow.backward.shape == (1, 2, 164, 220)
    inner = flow.backward[0, :, 12:-12, 12:-12]
    assert np.abs(inner - np.array([-6, -4])[:, None, None]).max() < 0.25


def test_what_comes_into_the_picture_was_not_seen() -> None:
    flow = clip_flow(moving([shift(0, 0), shift(8, 0)], 64, 96))
    assert not flow.visible[0, :, :7].any() and flow.visible[0, 8:-8, 10:-8].mean() > 0.98


def test_the_strip_that_a_square_uncovers_is_hidden() -> None:
    ground, square = texture(128, 160), texture(48, 48, seed=5)[..., ::-1]
    frames = []
    for k in range(2):
        frame = ground.copy()
        frame[40:88, 40 + 12 * k : 88 + 12 * k] = square
        frames.append(frame)
    flow = clip_flow(torch.from_numpy(np.stack(frames).round().astype(np.uint8)))
    uncovered = np.zeros((128, 160), bool)
    uncovered[42:86, 41:51] = True
    assert flow.visible[0][uncovered].mean() < 0.25
    far = np.ones((128, 160), bool)
    far[32:96, 28:112] = False
    assert flow.visible[0][far].mean() > 0.98
    assert flow.visible[0, 44:84, 58:94].mean() > 0.9, "the square itself was seen"
    assert np.abs(np.median(flow.backward[0, :, 44:84, 58:94], axis=(1, 2)) - [-12, 0]).max() < 0.25
    hidden = 1 - flow.visible[0].mean()
    assert hidden < 0.1, "and little else is"


def test_latents_follow_the_latent_flow() -> None:
    frames = moving([shift(2 * k, k) for k in range(13)], 128, 192)
    flow, visible = latent_flow(frames)
    assert flow.dtype == torch.float16 and flow.shape == (3, 2, 16, 24)
    assert visible.dtype == torch.uint8 and visible.shape == (3, 16, 24)
    assert set(visible.unique().tolist()) == {0, 255}
    inner = (slice(None), slice(2, -2), slice(2, -2))
    assert (flow[:, :, 2:-2, 2:-2] - torch.tensor([-1, -0.5])[:, None, None]).abs().max() < 0.04
    latent = load_vae("haar").encode(to_model(frames)[None])[0]
    for k in (2, 3):  # latent frame 1 holds four frames and latent frame 0 one: no shift makes them equal
        before, now = latent[:3, k - 1], latent[:3, k]
        right, wrong = (
            (warp(before, sign * flow[k - 1].float()) - now).abs()[inner].mean() for sign in (1, -1)
        )
        still = (before - now).abs()[inner].mean()
        assert right * 3 < still < wrong


def test_what_leaves_half_a_cell_hidden_is_hidden_in_the_latent() -> None:
    _, visible = latent_flow(moving([shift(2 * k, 0) for k in range(5)], 64, 96))
    assert not visible[0, :, 0].any() and (visible[0, 1:-1, 2:-1] == 255).all()


def test_the_same_pictures_give_the_same_bytes_with_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    frames = read_video(data_dir / "bikes.mp4", fps=16, size=(96, 160), num_frames=9)
    seen = set()
    before = cv2.getNumThreads()
    try:
        for workers, inside in ((1, 1), (2, 2), (3, 1), (1, 5)):
            monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
            cv2.setNumThreads(inside)
            flow, latent = clip_flow(frames), latent_flow(frames)
            parts = (flow.backward, flow.forward, flow.visible, latent[0].numpy(), latent[1].numpy())
            seen.add(b"".join(part.tobytes() for part in parts))
    finally:
        cv2.setNumThreads(before)
    assert len(seen) == 1


def test_real_motion_is_followed(data_dir: Path) -> None:
    """What is seen in both, carried along, is nearer to the later frame than what stood there."""
    for name, factor in (("surgical/endo.mp4", 2.5), ("gestures/walk.mkv", 1.3), ("bikes.mp4", 2.5)):
        frames = read_video(data_dir / name, fps=16, size=(240, 320), start_frame=40, num_frames=9)
        flow = clip_flow(frames, 4)
        grey = frames.float().mean(-1)
        for k in range(2):
            seen = torch.from_numpy(flow.visible[k])
            warped = warp(grey[4 * k][None], torch.from_numpy(flow.backward[k]))[0]
            error = (warped - grey[4 * k + 4]).abs()[seen].mean()
            assert error * factor < (grey[4 * k] - grey[4 * k + 4]).abs()[seen].mean()
            assert 0.3 < seen.float().mean() < 1


def test_nothing_is_seen_across_a_cut(data_dir: Path) -> None:
    names = ("surgical/endo.mp4", "gestures/walk.mkv", "bikes.mp4")
    frames = torch.cat([read_video(data_dir / name, size=(240, 320), num_frames=1) for name in names])
    assert clip_flow(frames).visible.mean() < 0.02


def test_a_single_frame_has_no_flow_and_a_size_without_latent_is_named() -> None:
    flow, visible = latent_flow(torch.zeros(1, 16, 24, 3, dtype=torch.uint8))
    assert flow.shape == (0, 2, 2, 3) and visible.shape == (0, 2, 3)
    with pytest.raises(WanmoeError, match="nearest is 5"):
        latent_flow(torch.zeros(6, 16, 24, 3, dtype=torch.uint8))
    assert clip_flow(torch.zeros(3, 16, 16, 3, dtype=torch.uint8)).visible.all()
