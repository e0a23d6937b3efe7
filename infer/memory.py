"""What a generation takes on the card, modelled from sizes: weights of one side, activations, the decoder.

L video tokens, D width; sizes in bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..moe_lora.wan.codec import latent_shape
from ..moe_lora.wan.config import WanConfig

# Values of width D that live at once in a block without a graph: x, its norm, q, k, v and both rotated, and
# the attention's output; the feed-forward layer holds fewer. Norms in plain PyTorch add three of float32.
_LIVE = 8
_NORM = 3 * 2
# Channels of the decoder at full size, values of it alive at once, and frames decoded together.
_DECODER_CHANNELS, _DECODER_LIVE, _DECODER_FRAMES = 96, 6, 4
# What CUDA itself and its libraries' work spaces take.
_CONTEXT = 0.8e9


class Needs(NamedTuple):
    """Bytes on the card. The two phases do not overlap: where there are two sides, both have left the card
    when the video is decoded."""

    weights: int
    """One side of the model, with its adapter."""
    denoise: int
    """Activations of a step."""
    decode: int
    """Activations of the codec and the decoded video."""
    codec: int
    """Weights of the codec, which stay on the card."""

    @property
    def peak(self) -> float:
        """The larger phase, one side resident, and what CUDA takes."""
        return self.weights + self.codec + max(self.denoise, self.decode) + _CONTEXT


def needs(
    config: WanConfig,
    weights: int,
    codec: int,
    frames: int,
    size: tuple[int, int],
    clips: int,
    itemsize: int,
) -> Needs:
    """Modelled, not measured: what generating one video takes.

    Args:
        weights, codec: bytes of one side, and of the codec.
        clips: of a forward; 2 where guidance runs both passes at once.
        itemsize: of the DiT's activations.
    """
    shape = latent_shape(frames, *size)
    tokens = math.prod(n // patch for n, patch in zip(shape, config.patch_size, strict=True))
    live = (_LIVE + _NORM) * config.dim * itemsize
    pixels = size[0] * size[1]
    decoder = _DECODER_CHANNELS * _DECODER_LIVE * min(frames, _DECODER_FRAMES) * pixels * 4
    return Needs(weights, clips * tokens * live, decoder + frames * 3 * pixels * 4, codec)
