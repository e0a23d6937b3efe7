"""FDS, GATC and TCD against their definitions, written out."""

import math

import cv2
import numpy as np
import pytest
import torch

from wanmoe.infer.evaluation.scene import Scene
from wanmoe.infer.evaluation.simulator import (
    DILATION,
    REACH,
    centroid_distance,
    frame_decay,
    simulator_scores,
    tool_consistency,
)

H, W, F = 64, 80, 13


def film(seed: int = 0, count: int = F) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    frames = [cv2.GaussianBlur(rng.uniform(0, 255, (H, W, 3)), (0, 0), 2) for _ in range(count)]
    stretched = (np.stack(frames) - 128) * 4 + 128
    return torch.from_numpy(stretched.clip(0, 255).astype(np.uint8))


def mask() -> torch.Tensor:
    out = torch.zeros(H, W, dtype=torch.bool)
    out[25:40, 30:50] = True
    return out


def test_frame_decay_of_a_known_difference() -> None:
    true = torch.full((F, H, W, 3), 100, dtype=torch.uint8)
    made = true.clone()
    made[0] = 0  # the frame that such a clip is given is in none of it
    made[1:3], made[3:7], made[7:] = 110, 120, 140
    found = frame_decay(made, true)
    assert found["fds_early"] == pytest.approx(10 / 127.5)
    assert found["fds_mid"] == pytest.approx(20 / 127.5)
    assert found["fds_late"] == pytest.approx(40 / 127.5)
    assert found["fds"] == pytest.approx((2 * 10 + 4 * 20 + 6 * 40) / 12 / 127.5)
    assert frame_decay(true, true) == {
        "fds": 0,
        "fds_early": 0,
        "fds_mid": 0,
        "fds_late": 0,
        "frame_ssim": pytest.approx(1, abs=1e-4),
    }
    assert frame_decay(true[:1], true[:1]) == {}


def test_the_phases_of_72_frames_are_those_of_the_original() -> None:
    true = torch.zeros(73, 16, 16, 3, dtype=torch.uint8)
    made = true.clone()
    made[12], made[13], made[36], made[37] = 51, 102, 153, 204
    found = frame_decay(made, true)
    assert found["fds_early"] == pytest.approx(51 / 127.5 / 12)
    assert found["fds_mid"] == pytest.approx((102 + 153) / 127.5 / 24)
    assert found["fds_late"] == pytest.approx(204 / 127.5 / 36)


def written_out(made: torch.Tensor, true: torch.Tensor, tools: torch.Tensor) -> float:
    """GATC frame by frame and shift by shift."""
    greys = [
        [cv2.cvtColor(frame.numpy(), cv2.COLOR_RGB2GRAY).astype(np.float64) / 255 for frame in clip]
        for clip in (made, true)
    ]
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * DILATION + 1,) * 2)
    grown = cv2.dilate(tools.numpy().astype(np.uint8), kernel) > 0
    scores = []
    for t, truth in enumerate(greys[1]):
        x = truth[grown] - truth[grown].mean()
        best = -1.0
        for at in (t - 1, t, t + 1):
            if not 0 <= at < len(made):
                continue
            for dy in range(-REACH, REACH + 1):
                for dx in range(-REACH, REACH + 1):
                    matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
                    moved = cv2.warpAffine(greys[0][at], matrix, (W, H), borderMode=cv2.BORDER_REPLICATE)
                    y = moved[grown] - moved[grown].mean()
                    best = max(best, (x @ y) / math.sqrt((x @ x) * (y @ y)))
        edges = [
            np.hypot(cv2.Sobel(g, cv2.CV_64F, 1, 0, ksize=3), cv2.Sobel(g, cv2.CV_64F, 0, 1, ksize=3))[
                grown
            ].mean()
            for g in (greys[0][t], truth)
        ]
        scores.append(best * min(1, edges[0] / edges[1]))
    return float(np.median(scores))


def test_tool_consistency_is_its_definition() -> None:
    true = film(0, 4)
    blurred = torch.from_numpy(np.stack([cv2.GaussianBlur(frame.numpy(), (0, 0), 1.5) for frame in true]))
    for made in (blurred.roll((2, 1), (1, 2)), (true.int() // 2 + film(1, 4).int() // 2).byte(), film(2, 4)):
        ours = tool_consistency(made, true, [mask().numpy()] * 4)
        assert ours == pytest.approx(written_out(made, true, mask()), abs=2e-3)


def test_tool_consistency_forgives_small_shifts_and_nothing_else() -> None:
    true, tools = film(0), [mask().numpy()] * F

    def score(made: torch.Tensor) -> float:
        value = tool_consistency(made, true, tools)
        assert value is not None
        return value

    assert score(true) == pytest.approx(1, abs=1e-3)
    assert score(true.roll((3, -3), (1, 2))) > 0.97 and score(true.roll(1, 0)) > 0.93
    assert score(true.roll(12, 2)) < 0.5 and score(film(5)) < 0.5
    assert score(torch.full_like(true, 90)) == 0, "what has vanished has no edges"
    assert tool_consistency(true, true, [None] * F) is None
    small = np.zeros((H, W), bool)
    assert tool_consistency(true, true, [small] * F) is None


def test_centroids_are_matched_and_missed_ones_cost_half_the_diagonal() -> None:
    def at(*places: tuple[int, int]) -> torch.Tensor:
        masks = torch.zeros(len(places), H, W, dtype=torch.bool)
        for one, (x, y) in zip(masks, places, strict=True):
            one[y : y + 8, x : x + 8] = True
        return masks

    true = [at((10, 10), (50, 40))] * 3
    assert centroid_distance(true, true, (H, W)) == 0
    moved = [at((53, 44), (10, 10))] * 3
    assert centroid_distance(moved, true, (H, W)) == pytest.approx((5 + 0) / 2)
    missed = [at((10, 10))] * 3
    half = 0.5 * math.hypot(H, W)
    assert centroid_distance(missed, true, (H, W)) == pytest.approx(half / 2)
    assert centroid_distance([None] * 3, true, (H, W)) is None
    none = [at()] * 3
    assert centroid_distance(true, none, (H, W)) is None
    speck = torch.zeros(1, H, W, dtype=torch.bool)
    speck[0, :5, :5] = True
    assert centroid_distance([speck] * 3, true, (H, W)) == pytest.approx(half), "25 pixels are no instance"
    frames = [at((10, 10)), at((14, 10)), at((40, 10))]
    assert centroid_distance(frames, [at((10, 10))] * 3, (H, W)) == pytest.approx(4), "the median of frames"


def test_what_is_not_known_is_left_out() -> None:
    frames = film()
    tools: tuple[torch.Tensor | None, ...] = (mask()[None],) * F
    plain = Scene("a", frames, 8.0)
    assert {"gatc", "tcd"}.isdisjoint(simulator_scores(plain, plain))
    true = Scene("a", frames, 8.0, masks=tools)
    assert "gatc" in simulator_scores(plain, true) and "tcd" not in simulator_scores(plain, true)
    assert simulator_scores(true, true)["tcd"] == 0
