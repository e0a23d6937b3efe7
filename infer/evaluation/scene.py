"""A clip as it is measured: its pictures, and what is known of the instruments in them.

Letters: F, H, W frames, height and width in pixels, n marks of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...moe_lora.errors import WanmoeError


@dataclass(frozen=True)
class Scene:
    """One clip. Marks are given by frame; None for a frame of which nothing is known, an empty tensor for one
    that shows no instrument."""

    id: str
    frames: Tensor
    """uint8 [F, H, W, 3], RGB."""
    fps: float
    label: tuple[tuple[str, float], ...] = ()
    """(name, weight) of the instruments that the clip is said to show."""
    caption: str = ""
    tips: tuple[Tensor | None, ...] = ()
    """[n, 2] by frame, x and y in pixels; pixel centres are whole numbers. () where none is marked at all."""
    boxes: tuple[Tensor | None, ...] = ()
    """[n, 4] by frame: left, top, width, height."""
    masks: tuple[Tensor | None, ...] = ()
    """bool [n, H, W] by frame, a mask for each instance."""
    where: tuple[Tensor | None, ...] = ()
    """bool [H, W] by frame: the instruments' region, where it is known between marked frames too."""

    def __post_init__(self) -> None:
        if self.frames.dtype != torch.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3:
            shape = list(self.frames.shape)
            raise WanmoeError(f"{self.id}: pictures are uint8 [F, H, W, 3]; got {self.frames.dtype} {shape}")
        for name in ("tips", "boxes", "masks", "where"):
            marks: Sequence[Tensor | None] = getattr(self, name)
            if marks and len(marks) != len(self.frames):
                raise WanmoeError(f"{self.id}: {name} of {len(marks)} frames, but it has {len(self.frames)}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.frames.shape[1]), int(self.frames.shape[2])

    def cut(self, length: int) -> Scene:
        """The first `length` frames."""
        return replace(
            self,
            frames=self.frames[:length],
            tips=self.tips[:length],
            boxes=self.boxes[:length],
            masks=self.masks[:length],
            where=self.where[:length],
        )

    @property
    def marked(self) -> bool:
        """Whether anything is known of where the instruments are."""
        marks = (*self.tips, *self.boxes, *self.masks, *self.where)
        return any(mark is not None for mark in marks)

    def region(self) -> tuple[Tensor | None, ...]:
        """Where the instruments are, bool [H, W] by frame: `where`, else of each frame what is known best of
        masks, boxes and squares about the tips; None for a frame of which nothing is known."""
        if self.where:
            return self.where
        return tuple(self._region_of(index) for index in range(len(self.frames)))

    def _region_of(self, index: int) -> Tensor | None:
        height, width = self.size
        if self.masks and (masks := self.masks[index]) is not None:
            return masks.any(0) if len(masks) else torch.zeros(height, width, dtype=torch.bool)
        boxes = self.boxes[index] if self.boxes else None
        if boxes is None and self.tips and (tips := self.tips[index]) is not None:
            side = tip_side(self.size)
            boxes = torch.cat([tips - (side - 1) / 2, torch.full_like(tips, side)], 1)
        if boxes is None:
            return None
        region = torch.zeros(height, width, dtype=torch.bool)
        for x, y, across, down in boxes.tolist():
            left, top = max(0, round(x)), max(0, round(y))
            region[top : max(top, round(y + down)), left : max(left, round(x + across))] = True
        return region


def tip_side(size: tuple[int, int]) -> float:
    """Side in pixels of the square that stands for a tip: a sixth of the picture's shorter side."""
    return float(max(1, round(min(size) / 6)))
