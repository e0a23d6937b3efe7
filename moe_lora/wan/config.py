"""Sizes of a Wan video transformer and the presets that have a name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..errors import WanmoeError

__all__ = ["BOUNDARIES", "WanConfig"]

# Flow time from which a step belongs to the high-noise model, per task (Wan2.2 configs).
BOUNDARIES: dict[str, float] = {"t2v": 0.875, "i2v": 0.900}


@dataclass(frozen=True)
class WanConfig:
    """Shape of one Wan DiT, checked on construction.

    The defaults are one noise expert of Wan2.2 T2V-A14B. Raises WanmoeError for sizes that cannot be built.
    """

    task: str = "t2v"
    """"t2v" (noise alone) or "i2v" (noise, then mask and first-frame latent as further channels)."""
    dim: int = 5120
    """Token width D."""
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_dim: int = 16
    """Channels that the patch embedding reads: `out_dim`, plus 20 of conditioning for i2v."""
    out_dim: int = 16
    """Channels of the latent, and of v."""
    text_dim: int = 4096
    text_len: int = 512
    """Text tokens attended to; shorter contexts are padded with zeros to this length."""
    freq_dim: int = 256
    """Width of the sinusoidal embedding of t."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int = 0
    """Width of the CLIP tokens of the first frame, which Wan2.1 i2v attends to (1280); 0: it takes none."""
    image_positions: int = 0
    """Learned positions that are added to the CLIP tokens: 514 where first and last frame are given (Wan2.1
    FLF2V, 257 tokens of each), else 0."""

    def __post_init__(self) -> None:
        if self.task not in BOUNDARIES:
            raise WanmoeError(f"WanConfig.task is {self.task!r}; it must be one of {', '.join(BOUNDARIES)}")
        for name in ("dim", "ffn_dim", "num_heads", "in_dim", "out_dim", "text_dim", "text_len", "freq_dim"):
            if getattr(self, name) < 1:
                raise WanmoeError(f"WanConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_layers < 0:
            raise WanmoeError(f"WanConfig.num_layers is {self.num_layers}; it must not be negative")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise WanmoeError(
                f"WanConfig.patch_size is {self.patch_size}; it must be three sizes of at least 1"
            )
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise WanmoeError(
                f"WanConfig.dim {self.dim} over {self.num_heads} heads is not an even whole number per head; "
                "choose num_heads so that it is"
            )
        if self.freq_dim % 2:
            raise WanmoeError(f"WanConfig.freq_dim is {self.freq_dim}; it must be even (cosines and sines)")
        for name in ("image_dim", "image_positions"):
            if getattr(self, name) < 0:
                raise WanmoeError(f"WanConfig.{name} is {getattr(self, name)}; it must not be negative")
        if self.image_dim and self.task != "i2v":
            raise WanmoeError(
                f"WanConfig.image_dim is {self.image_dim} for task {self.task!r}; CLIP tokens go with i2v"
            )
        if self.image_positions and not self.image_dim:
            raise WanmoeError(
                f"WanConfig.image_positions is {self.image_positions} without CLIP tokens; give image_dim too"
            )
        if self.image_channels < 0 or (self.task == "i2v") != (self.image_channels > 0):
            raise WanmoeError(
                f"WanConfig.in_dim {self.in_dim} does not fit task {self.task!r} and out_dim {self.out_dim}: "
                "t2v reads out_dim channels, i2v reads more"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def image_channels(self) -> int:
        """Channels of `image_latent` (0 for t2v, 20 for i2v: 4 of mask and 16 of latent)."""
        return self.in_dim - self.out_dim

    @property
    def boundary(self) -> float:
        """Flow time from which a step belongs to the high-noise model: 0.875 t2v, 0.900 i2v."""
        return BOUNDARIES[self.task]

    @classmethod
    def preset(cls, name: str) -> WanConfig:
        """The sizes known by a name: t2v-A14B, i2v-A14B, i2v-14B (Wan2.1), t2v-1.3B, tiny.

        Raises WanmoeError that names the nearest preset.
        """
        if name not in _PRESETS:
            near = difflib.get_close_matches(name, _PRESETS, n=1, cutoff=0.0)[0]
            raise WanmoeError(
                f"no model preset {name!r}; did you mean {near!r}? known: {', '.join(_PRESETS)}"
            )
        return _PRESETS[name]

    @property
    def is_released(self) -> bool:
        """Whether these are the sizes of a model that was published."""
        return any(self == preset for name, preset in _PRESETS.items() if name != "tiny")


_PRESETS: dict[str, WanConfig] = {
    "t2v-A14B": WanConfig(),
    "i2v-A14B": WanConfig(task="i2v", in_dim=36),
    "i2v-14B": WanConfig(task="i2v", in_dim=36, image_dim=1280),
    "t2v-1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "tiny": WanConfig(dim=128, ffn_dim=384, num_heads=4, num_layers=8, text_dim=64, text_len=32, freq_dim=64),
}
