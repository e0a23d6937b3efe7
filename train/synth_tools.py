"""The four drawn instruments: their look, their motion and their exact tips.

An instrument turns and slides about a pivot outside the picture, as a laparoscopic one does about its port.
It is drawn in its own frame, u along the shaft towards the tip and v across, in units of the picture's
shorter side, on a canvas `OVERSAMPLE` times finer than the picture.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

OVERSAMPLE = 4
_SCALE = 1.15  # of every drawing: shafts of 11 to 17 pixels at 96, wider than one latent cell
_SHIFT = 4  # bits of sub-pixel position that OpenCV takes

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


class Pose(NamedTuple):
    """Where an instrument is at one moment: pivot (x, y), angle, length to the tip, opening of its jaws."""

    pivot: tuple[float, float]
    angle: float
    reach: float
    opening: float
    power: float
    """Brightness of the cautery spark, 0 to 1."""
    mirror: float
    """1 or -1: the side of the shaft that v counts towards."""

    def at(self, u: float, v: float) -> tuple[float, float]:
        """(x, y) of the point u behind the tip (negative) or before it, v to the right of the shaft."""
        along, across = self.reach + _SCALE * u, _SCALE * self.mirror * v
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.pivot[0] + along * cos - across * sin, self.pivot[1] + along * sin + across * cos


class Canvas:
    """Colours and coverage of one instrument in one frame, both `OVERSAMPLE` times finer than the picture."""

    def __init__(self, height: int, width: int, pose: Pose) -> None:
        self.pose, self.unit = pose, float(min(height, width) * OVERSAMPLE)
        self.colour = np.zeros((height * OVERSAMPLE, width * OVERSAMPLE, 3), np.uint8)
        self.cover = np.zeros((height * OVERSAMPLE, width * OVERSAMPLE), np.uint8)

    def polygon(self, points: Points, colour: Colour) -> None:
        """Fill a polygon given in (u, v)."""
        corners = np.array([self._pixel(u, v) for u, v in points], np.int32)
        cv2.fillPoly(self.colour, [corners], colour, cv2.LINE_8, _SHIFT)
        cv2.fillPoly(self.cover, [corners], 255, cv2.LINE_8, _SHIFT)

    def disc(self, u: float, v: float, radius: float, colour: Colour) -> None:
        """Fill a disc about (u, v)."""
        centre, size = self._pixel(u, v), round(_SCALE * radius * self.unit * 2**_SHIFT)
        cv2.circle(self.colour, centre, size, colour, -1, cv2.LINE_8, _SHIFT)
        cv2.circle(self.cover, centre, size, 255, -1, cv2.LINE_8, _SHIFT)

    def tube(self, start: float, end: float, width: float, colour: Colour, shine: float = 0.8) -> None:
        """A round shaft along u, dark at its edges and bright along its middle."""
        for part in (1.0, 0.8, 0.58, 0.36, 0.16):
            light = 0.55 + 0.45 * (1 - part) + shine * max(0.0, 0.45 - part)
            half, shift = width * part / 2, -0.08 * width * (1 - part)
            low, high = shift - half, shift + half
            self.polygon([(start, low), (end, low), (end, high), (start, high)], _lit(colour, light))

    def _pixel(self, u: float, v: float) -> tuple[int, int]:
        x, y = self.pose.at(u, v)  # OpenCV counts from the middle of the first pixel
        return round((x * self.unit - 0.5) * 2**_SHIFT), round((y * self.unit - 0.5) * 2**_SHIFT)


@dataclass(frozen=True)
class Tool:
    """One kind of instrument: how it is painted, how it moves and where its tip is."""

    name: str
    draw: Callable[[Canvas], None]
    move: Callable[[float, float, float], tuple[float, float, float, float]]
    """(time in [0, 1], phase, pace about 1) -> turn in radians, slide in picture sides, opening, power."""
    tip: Callable[[Pose], tuple[float, float]]
    """The working point, in the picture's units."""


def _draw_scissors(canvas: Canvas) -> None:
    """Steel-blue shaft, two long pale curved blades about a screw."""
    joint, half = -0.30, canvas.pose.opening / 2
    canvas.tube(-2.0, joint + 0.02, 0.105, (92, 118, 150))
    for side in (-1.0, 1.0):
        back = [(-0.01, 0.035), (0.10, 0.050), (0.20, 0.040), (0.30, 0.0)]
        edge = [(0.20, 0.006), (0.10, 0.0), (-0.01, -0.02)]
        canvas.polygon(_turned([*back, *edge], joint, side, side * half), (158, 170, 186))
        shine = [(0.0, 0.030), (0.10, 0.046), (0.20, 0.037), (0.28, 0.004), (0.19, 0.024), (0.09, 0.030)]
        canvas.polygon(_turned(shine, joint, side, side * half), (242, 246, 255))
    canvas.disc(joint + 0.005, 0.0, 0.036, (60, 72, 92))
    canvas.disc(joint + 0.005, 0.0, 0.018, (205, 212, 222))


def _draw_hook(canvas: Canvas) -> None:
    """Black insulated shaft, amber collar, thin bright L-shaped wire."""
    canvas.tube(-2.0, -0.17, 0.095, (46, 44, 52), shine=1.6)
    canvas.tube(-0.19, -0.14, 0.085, (214, 158, 40))
    canvas.polygon([(-0.15, -0.024), (0.024, -0.024), (0.024, 0.024), (-0.15, 0.024)], (196, 196, 204))
    canvas.polygon([(-0.024, 0.0), (0.024, 0.0), (0.020, 0.150), (-0.014, 0.150)], (196, 196, 204))
    canvas.polygon([(-0.15, -0.014), (0.0, -0.014), (0.0, 0.0), (-0.15, 0.0)], (250, 250, 252))
    heat = canvas.pose.power
    hot = (255, round(150 + 90 * heat), round(60 + 130 * heat)) if heat > 0.05 else (225, 225, 232)
    canvas.disc(0.003, 0.142, 0.024 + 0.012 * heat, hot)


def _draw_suction(canvas: Canvas) -> None:
    """Thick white tube with a green ring, side holes and a dark open end."""
    canvas.tube(-2.0, 0.0, 0.150, (206, 212, 214))
    canvas.tube(-0.33, -0.26, 0.166, (28, 150, 92))
    canvas.tube(-0.60, -0.55, 0.160, (28, 150, 92))
    for u, v in ((-0.20, 0.030), (-0.14, -0.034), (-0.09, 0.030)):
        canvas.disc(u, v, 0.021, (34, 22, 24))
    mouth = [(0.030 * math.cos(a), 0.075 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 16)]
    canvas.polygon(mouth, (150, 156, 160))
    canvas.polygon([(0.6 * u, 0.74 * v) for u, v in mouth], (40, 14, 16))


def _draw_grasper(canvas: Canvas) -> None:
    """Brass shaft with dark bands, two blunt toothed jaws."""
    joint, half = -0.21, canvas.pose.opening / 2
    canvas.tube(-2.0, joint, 0.115, (176, 138, 62))
    for start in np.arange(joint - 0.10, -1.4, -0.11):
        canvas.tube(float(start) - 0.035, float(start), 0.115, (84, 58, 30), shine=0.3)
    for side in (-1.0, 1.0):
        jaw = [(-0.02, 0.056), (0.11, 0.066), (0.19, 0.052), (0.215, 0.026), (0.205, 0.004)]
        teeth = [(0.20 - 0.033 * n, 0.002 if n % 2 else 0.020) for n in range(6)]
        canvas.polygon(_turned([*jaw, *teeth, (-0.02, 0.0)], joint, side, side * half), (150, 116, 48))
        ridge = [(0.0, 0.044), (0.11, 0.054), (0.185, 0.042), (0.18, 0.030), (0.10, 0.036), (0.0, 0.030)]
        canvas.polygon(_turned(ridge, joint, side, side * half), (244, 214, 138))
    canvas.disc(joint, 0.0, 0.046, (110, 84, 40))
    canvas.disc(joint, 0.0, 0.020, (226, 196, 120))


def _turned(points: Points, joint: float, side: float, angle: float) -> list[tuple[float, float]]:
    """Points given from the joint, mirrored to `side` and turned about it."""
    cos, sin = math.cos(angle), math.sin(angle)
    return [(joint + u * cos - side * v * sin, u * sin + side * v * cos) for u, v in points]


def _lit(colour: Colour, light: float) -> Colour:
    red, green, blue = (min(255, round(part * light)) for part in colour)
    return red, green, blue


def _wave(time: float, cycles: float, phase: float) -> float:
    return math.sin(2 * math.pi * (cycles * time + phase))


def _move_scissors(time: float, phase: float, pace: float) -> tuple[float, float, float, float]:
    """Advances slowly and snips once or twice."""
    return (
        0.05 * _wave(time, 0.5, phase),
        0.14 * (time - 0.5),
        0.16 + 0.52 * (1 + _wave(time, 1.5 * pace, phase)),
        0.0,
    )


def _move_hook(time: float, phase: float, pace: float) -> tuple[float, float, float, float]:
    """Sweeps from side to side; the spark burns on the way back."""
    swing = _wave(time, 1.1 * pace, phase)
    power = max(0.0, math.cos(2 * math.pi * (1.1 * pace * time + phase))) ** 0.5
    return 0.17 * swing, -0.03 * swing * swing, 0.0, power


def _move_suction(time: float, phase: float, pace: float) -> tuple[float, float, float, float]:
    """Probes in and out along its own axis."""
    return 0.03 * _wave(time, 0.4, phase), 0.13 * _wave(time, 1.2 * pace, phase), 0.0, 0.0


def _move_grasper(time: float, phase: float, pace: float) -> tuple[float, float, float, float]:
    """Comes in open, closes its jaws once, then pulls back and aside."""
    closed = 1 / (1 + math.exp(-18 * (time - 0.42 - 0.12 * (phase - 0.5))))
    pull = max(0.0, time - 0.5) * 2 * pace
    turn = 0.16 * pull * (1 if phase > 0.5 else -1)
    return turn, 0.12 * min(1.0, time / 0.4) - 0.06 - 0.17 * pull, 0.95 * (1 - closed), 0.0


def _between_jaws(pose: Pose, length: float) -> tuple[float, float]:
    """The middle between the ends of two jaws of this length."""
    return pose.at(length * (math.cos(pose.opening / 2) - 1), 0.0)


TOOLS = (
    Tool("Scissors", _draw_scissors, _move_scissors, lambda pose: _between_jaws(pose, 0.30)),
    Tool("Hook/Electrocautery", _draw_hook, _move_hook, lambda pose: pose.at(0.003, 0.150)),
    Tool("Suction", _draw_suction, _move_suction, lambda pose: pose.at(0.015, 0.0)),
    Tool("Other", _draw_grasper, _move_grasper, lambda pose: _between_jaws(pose, 0.21)),
)
"""In the order of the surgical experts: a label is an index into this table."""


def downsample(canvas: Canvas) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colour already weighted by coverage [H, W, 3], and coverage [H, W], both in [0, 1]."""
    size = (canvas.cover.shape[1] // OVERSAMPLE, canvas.cover.shape[0] // OVERSAMPLE)
    colour = cv2.resize(canvas.colour, size, interpolation=cv2.INTER_AREA)
    cover = cv2.resize(canvas.cover, size, interpolation=cv2.INTER_AREA)
    return np.asarray(colour, np.float32) / np.float32(255), np.asarray(cover, np.float32) / np.float32(255)
