"""What a generation takes on the card: weights by their sizes, a step counted in a dry run, the decoder
modelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..moe_lora.adapter import AdapterConfig
from ..moe_lora.needs import CONTEXT, Base, activations, decoding, on_card
from ..moe_lora.wan.codec import latent_shape
from ..moe_lora.wan.config import WanConfig


class Needs(NamedTuple):
    """Bytes on the card. Denoising and decoding do not overlap."""

    stays: int
    """Weights of the sides that are there all the time."""
    comes: int
    """Weights of the side that is there for its steps alone."""
    denoise: int
    """Activations of a step."""
    decode: int
    """The codec with its activations, and the decoded video."""

    @property
    def peak(self) -> int:
        """The larger phase, with what stays and what CUDA takes."""
        return self.stays + max(self.comes + self.denoise, self.decode) + CONTEXT

    def describe(self) -> str:
        """In words."""
        weights, whose = (self.stays, "weights") if self.stays else (self.comes, "weights of one side")
        return (
            f"needed on the card {self.peak / 1e9:.1f} GB: {whose} {weights / 1e9:.1f}, then "
            f"{self.denoise / 1e9:.1f} to denoise and {self.decode / 1e9:.1f} to decode"
        )


def needs(
    config: WanConfig,
    adapter: AdapterConfig | None,
    sides: Sequence[Base],
    *,
    adapters: int,
    codec: int,
    frames: int,
    size: tuple[int, int],
    clips: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    swapped: bool = False,
    stream: int = 0,
    slots: int = 2,
) -> Needs:
    """What generating one video takes; nothing is computed.

    Args:
        adapters, codec: bytes of all adapters, and of the codec.
        clips: of a forward; 2 where guidance runs both passes at once.
        swapped: of two sides, one at a time is on the card.
        stream: blocks of each side that wait on the host.
    """
    shape = latent_shape(frames, *size)
    if swapped:
        stays, comes = 0, max(side.whole for side in sides) + math.ceil(adapters / len(sides))
    else:
        stays, comes = on_card(sides, stream, slots) + adapters, 0
    step = activations(config, adapter, (), shape, clips=clips, dtype=dtype).peak
    return Needs(stays, comes, step, codec + decoding(frames, *size))
