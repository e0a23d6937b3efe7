"""One drawn scene: a moving tissue-like background, instruments over it, and the exact truth about them.

Letters: F frames, H, W height and width in pixels. Positions inside are in units of the shorter side; what
leaves this module is in pixels.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .synth_tools import Canvas, Pose, Tool, downsample

Floats = NDArray[np.float32]

_SIDES = {"left": 0.35, "right": 0.35, "bottom": 0.2, "top": 0.1}
"""How often an instrument enters from each border."""


@dataclass(frozen=True)
class Scene:
    """Frames uint8 [F, H, W, 3]; masks uint8 [F, H, W] (255 = instrument); tips (frame, x, y) and boxes
    (frame, x, y, w, h), of every instrument in every frame. A box holds all that its instrument covers, also
    what another one lies over.
    """

    frames: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    tips: list[tuple[int, float, float]]
    boxes: list[tuple[int, int, int, int, int]]
    sides: tuple[str, ...]
    """Border from which each instrument enters, no two from the same: left, right, top or bottom."""


def draw_scene(
    tools: Sequence[Tool],
    rng: np.random.Generator,
    *,
    frames: int,
    height: int,
    width: int,
    footage: NDArray[np.uint8] | None = None,
) -> Scene:
    """Draw one scene of up to four instruments, the last on top; the same generator state, the same pixels.

    `footage` [F, H', W', 3], at least as large as the picture, replaces the procedural background.
    """
    if footage is None:
        ground = _tissue(rng, frames, height, width)
    else:
        ground = _footage(footage, rng, frames, height, width)
    light = _vignette(rng, height, width)
    pictures = np.empty((frames, height, width, 3), np.uint8)
    masks = np.zeros((frames, height, width), np.uint8)
    tips: list[tuple[int, float, float]] = []
    boxes: list[tuple[int, int, int, int, int]] = []
    paths: dict[str, list[Pose]] = {}
    for tool in tools:
        side, poses = _poses(tool, rng, frames, height, width, paths)
        paths[side] = poses
    unit = min(height, width)
    for index in range(frames):
        picture = ground[index]
        for tool, poses in zip(tools, paths.values(), strict=True):
            pose = poses[index]
            canvas = Canvas(height, width, pose)
            tool.draw(canvas)
            colour, cover = downsample(canvas)
            picture = _lay_over(picture, colour, cover, pose, tool, unit)
            own = np.where(cover >= 0.5, 255, 0).astype(np.uint8)
            masks[index] |= own
            x, y = tool.tip(pose)
            tips.append((index, round(x * unit - 0.5, 2), round(y * unit - 0.5, 2)))
            boxes.append((index, *_box(own)))
        pictures[index] = np.clip(picture * light * 255 + 0.5, 0, 255)
    return Scene(pictures, masks, tips, boxes, tuple(paths))


def _poses(
    tool: Tool, rng: np.random.Generator, frames: int, height: int, width: int, taken: Container[str]
) -> tuple[str, list[Pose]]:
    """A pivot outside one border that is not taken and a path about it whose tip stays well inside the
    picture."""
    unit = min(height, width)
    wide, high = width / unit, height / unit
    often = np.array([0.0 if side in taken else share for side, share in _SIDES.items()])
    side = str(rng.choice(list(_SIDES), p=often / often.sum()))
    along, away = rng.uniform(0.25, 0.75), rng.uniform(0.35, 0.55)
    pivot = {
        "left": (-away, along * high),
        "right": (wide + away, along * high),
        "bottom": (along * wide, high + away),
        "top": (along * wide, -away),
    }[side]
    depth, across = rng.uniform(0.46, 0.68), rng.uniform(0.32, 0.68)
    goal = {
        "left": (depth * wide, across * high),
        "right": ((1 - depth) * wide, across * high),
        "bottom": (across * wide, (1 - depth) * high),
        "top": (across * wide, depth * high),
    }[side]
    angle = math.atan2(goal[1] - pivot[1], goal[0] - pivot[0])
    reach = math.hypot(goal[1] - pivot[1], goal[0] - pivot[0])
    phase, pace, flip = rng.uniform(), rng.uniform(0.85, 1.15), float(rng.choice([-1.0, 1.0]))
    poses = []
    for index in range(frames):
        turn, slide, opening, power = tool.move(index / max(1, frames - 1), phase, pace)
        poses.append(Pose(pivot, angle + flip * turn, reach + slide, opening, power, flip))
    return side, poses


def _lay_over(ground: Floats, colour: Floats, cover: Floats, pose: Pose, tool: Tool, unit: int) -> Floats:
    """Shadow, instrument and, where the cautery burns, its glow over the background."""
    reach = max(1, unit // 32)
    shadow = cv2.GaussianBlur(cover, (0, 0), unit / 40)
    shadow = np.roll(shadow, (2 * reach, reach), (0, 1))
    picture = ground * (1 - 0.45 * shadow[..., None])
    picture = picture * (1 - cover[..., None]) + colour
    if pose.power > 0.05:
        x, y = tool.tip(pose)
        height, width = cover.shape
        rows, cols = np.mgrid[0:height, 0:width].astype(np.float32)
        far = (cols + 0.5 - x * unit) ** 2 + (rows + 0.5 - y * unit) ** 2
        glow = pose.power * np.exp(-far / (2 * (0.085 * unit) ** 2))
        picture = picture + glow[..., None] * np.array([0.95, 0.55, 0.16], np.float32)
    return np.asarray(picture, np.float32)


def _box(mask: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    x, y, w, h = cv2.boundingRect(mask)
    return int(x), int(y), int(w), int(h)


def _vignette(rng: np.random.Generator, height: int, width: int) -> Floats:
    rows, cols = np.mgrid[0:height, 0:width].astype(np.float32)
    x = (cols - width * rng.uniform(0.45, 0.55)) / width
    y = (rows - height * rng.uniform(0.45, 0.55)) / height
    return np.asarray(1.08 - 1.1 * (x * x + y * y), np.float32)[..., None]


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: float) -> Floats:
    """Smooth noise in about [0, 1], `cells` bumps along the shorter side."""
    height, width = size
    scale = cells / min(size)
    rows, cols = (max(4, round(n * scale)) + 1 for n in size)
    grid = rng.uniform(size=(rows, cols)).astype(np.float32)
    return np.asarray(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def _tissue(rng: np.random.Generator, frames: int, height: int, width: int) -> Floats:
    """Reddish smooth tissue with fat, folds and veins that drifts, turns and breathes: float [F, H, W, 3]."""
    big = (2 * height, 2 * width)
    folds = 0.65 * _noise(rng, big, 7) + 0.35 * _noise(rng, big, 16)
    fat = np.clip((_noise(rng, big, 5) - 0.62) * 5, 0, 1)[..., None]
    veins = np.exp(-(((_noise(rng, big, 6) - 0.5) / 0.035) ** 2))[..., None]
    red = np.array([rng.uniform(0.58, 0.76), rng.uniform(0.20, 0.30), rng.uniform(0.18, 0.27)], np.float32)
    yellow = np.array([0.85, rng.uniform(0.62, 0.72), 0.36], np.float32)
    texture = red * (0.60 + 0.75 * folds[..., None])
    texture = texture * (1 - 0.7 * fat) + yellow * (0.75 + 0.4 * folds[..., None]) * 0.7 * fat
    texture = (texture * (1 - 0.25 * veins)).astype(np.float32)
    texture += 0.25 * np.clip((_noise(rng, big, 14) - 0.86) * 8, 0, 1)[..., None]  # wet highlights

    rows, cols = np.mgrid[0:height, 0:width].astype(np.float32)
    bump_x, bump_y = _noise(rng, (height, width), 3) - 0.5, _noise(rng, (height, width), 3) - 0.5
    drift = rng.uniform(-0.14, 0.14, size=2) * (width, height)
    turn, zoom = rng.uniform(-0.10, 0.10), rng.uniform(-0.08, 0.08)
    breath, phase = rng.uniform(0.05, 0.10) * min(height, width), rng.uniform()
    out = np.empty((frames, height, width, 3), np.float32)
    for index in range(frames):
        time = index / max(1, frames - 1) - 0.5
        scale = 1 + zoom * time
        cos, sin = scale * math.cos(turn * time), scale * math.sin(turn * time)
        x, y = cols - width / 2, rows - height / 2
        swell = breath * math.sin(2 * math.pi * (1.1 * time + phase))
        at_x = (cos * x - sin * y + width + drift[0] * time + swell * bump_x).astype(np.float32)
        at_y = (sin * x + cos * y + height + drift[1] * time + swell * bump_y).astype(np.float32)
        out[index] = cv2.remap(texture, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return out


def _footage(
    footage: NDArray[np.uint8], rng: np.random.Generator, frames: int, height: int, width: int
) -> Floats:
    """A random piece of the footage, run forwards and back where it is short: float [F, H, W, 3]."""
    length = footage.shape[0]
    there_and_back = np.concatenate([np.arange(length), np.arange(length - 2, 0, -1)])
    start = int(rng.integers(max(1, length - frames + 1)))
    picks = there_and_back[(start + np.arange(frames)) % len(there_and_back)]
    top = int(rng.integers(footage.shape[1] - height + 1))
    left = int(rng.integers(footage.shape[2] - width + 1))
    piece = footage[picks, top : top + height, left : left + width]
    if rng.uniform() < 0.5:
        piece = piece[:, :, ::-1]
    return np.asarray(piece, np.float32) / np.float32(255)
