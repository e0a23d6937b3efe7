"""The parts of a whole downloaded Wan model: which file of a folder is what."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import WanmoeError

__all__ = ["ModelFolder", "find_parts"]

_VAE = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")
_TEXT = ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors")
_CLIP = ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",)
_DIT = "diffusion_pytorch_model"


class ModelFolder(NamedTuple):
    """Paths of a model's parts, as `load_dit`, `load_vae`, `load_text_encoder` and `load_clip` take them.

    None where the folder lacks the part.
    """

    dit: Path | None
    """The low-noise expert of Wan2.2, or the one DiT of Wan2.1."""
    dit_high_noise: Path | None
    """The high-noise expert; None for a model of one DiT."""
    vae: Path | None
    text: Path | None
    tokenizer: Path | None
    clip: Path | None
    """The image encoder of Wan2.1 i2v."""


def find_parts(folder: str | Path) -> ModelFolder:
    """The parts of a model folder as Wan (2.1 or 2.2) or diffusers ships it.

    Nothing is opened. Raises WanmoeError for a folder that is not there or in which there is no DiT.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WanmoeError(f"{folder}: no such folder; give one that holds a whole Wan model")
    if (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
        parts = _diffusers(folder)
    else:
        parts = _original(folder)
    if parts.dit is None and parts.dit_high_noise is None:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise WanmoeError(
            f"{folder}: no Wan model: neither low_noise_model/ and high_noise_model/ nor {_DIT}*.safetensors "
            f"nor transformer/ is in it; it holds {found}"
        )
    return parts


def _original(folder: Path) -> ModelFolder:
    return ModelFolder(
        dit=_present(folder / "low_noise_model") or _single_dit(folder),
        dit_high_noise=_present(folder / "high_noise_model"),
        vae=_present(*(folder / name for name in _VAE)),
        text=_present(*(folder / name for name in _TEXT)),
        tokenizer=_present(folder / "google" / "umt5-xxl"),
        clip=_present(*(folder / name for name in _CLIP)),
    )


def _single_dit(folder: Path) -> Path | None:
    """The weights of Wan2.1 among the other files of its folder: the index, the one file, or any shard."""
    shards = sorted(folder.glob(f"{_DIT}-*.safetensors"))[:1]
    return _present(folder / f"{_DIT}.safetensors.index.json", folder / f"{_DIT}.safetensors", *shards)


def _diffusers(folder: Path) -> ModelFolder:
    first, second = _present(folder / "transformer"), _present(folder / "transformer_2")
    # diffusers numbers the experts in the order of sampling: `transformer` is the high-noise one.
    dit, high = (second, first) if second else (first, None)
    return ModelFolder(
        dit=dit,
        dit_high_noise=high,
        vae=_present(folder / "vae"),
        text=_present(folder / "text_encoder"),
        tokenizer=_present(folder / "tokenizer"),
        clip=_present(folder / "image_encoder"),
    )


def _present(*places: Path) -> Path | None:
    return next((place for place in places if place.exists()), None)
