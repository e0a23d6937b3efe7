"""Video codecs: the Wan 2.1 VAE, and a fixed wavelet that stands in for it where there are no weights.

B clips, F frames, H, W pixels; f = (F - 1) / 4 + 1 latent frames, h = H / 8, w = W / 8; 16 latent channels.
Video is in [-1, 1], frame 0 is encoded alone and every later group of four frames makes one latent frame.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import WanmoeError
from ..files import feed
from .weight_files import fill_module, open_weights

CHANNELS = 16
TIME_STRIDE = 4
SPACE_STRIDE = 8

# A tile of the VAE and three quarters of it, the distance of two tiles, are multiples of SPACE_STRIDE.
_TILE_STEP = 4 * SPACE_STRIDE

# Latent statistics of the Wan 2.1 VAE (official wan/modules/vae2_1.py; the defaults of diffusers' config).
WAN_MEAN: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
WAN_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
WAN_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

# The 16 bands (colour, time, row, column) that the stand-in keeps, and the mean and deviation of each.
# Index 0 along an axis is the low pass; 1, then 2-3, then 4-7 are the details from coarse to fine. Colours:
# 0 luma, 1 red against blue, 2 green against both. Chosen as the 16 of 768 with the most energy, and their
# statistics taken, over ten real clips (laparoscopy, street traffic, six signed gestures, space footage, a
# decoded Wan sample) of up to 97 frames at 16 fps, centre-cropped to 96, 128, 192 and 256 pixels, each kind
# of clip weighted alike, latent frame 0 left out. They hold 97.2 % of the energy. The mean of a detail band
# is set to 0, which it is for a set of clips and their mirror images.
HAAR_BANDS: tuple[tuple[int, int, int, int], ...] = (
    (0, 0, 0, 0),
    (1, 0, 0, 0),
    (2, 0, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (0, 0, 0, 1),
    (0, 2, 0, 0),
    (0, 3, 0, 0),
    (0, 0, 2, 0),
    (0, 0, 3, 0),
    (0, 0, 0, 2),
    (0, 0, 0, 3),
    (0, 0, 1, 1),
    (0, 1, 0, 1),
    (1, 0, 1, 0),
    (1, 0, 0, 1),
)
HAAR_MEAN: tuple[float, ...] = (-6.3345, 2.4332, 0.5824, *(0.0,) * 13)
HAAR_STD: tuple[float, ...] = (13.9542, 4.3614, 2.5605, 2.1474, 2.2579, 2.2072, 0.8389, 0.9817)
HAAR_STD += (0.9962, 1.1806, 1.0032, 1.0374, 0.7439, 0.5843, 0.7449, 0.5964)


class Codec(Protocol):
    """What the rest of the program knows of a codec; tensors may come from any device."""

    name: str
    stand_in: bool

    @property
    def fingerprint(self) -> str:
        """Digest of everything that fixes the latents; shards of another fingerprint cannot be mixed."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Video `[B, 3, F, H, W]` in [-1, 1] -> normalised latent `[B, 16, f, h, w]`."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latent `[B, 16, f, h, w]` -> video `[B, 3, F, H, W]`."""
        ...


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent sizes `(f, h, w)` of a video; `WanmoeError` naming the nearest valid size if it has none."""
    if frames < 1 or (frames - 1) % TIME_STRIDE:
        near = max(0, round((frames - 1) / TIME_STRIDE)) * TIME_STRIDE + 1
        raise WanmoeError(
            f"a video of {frames} frames cannot be encoded: frames must be 4n+1; nearest is {near}"
        )
    for side, size in (("height", height), ("width", width)):
        if size < SPACE_STRIDE or size % SPACE_STRIDE:
            near = max(1, round(size / SPACE_STRIDE)) * SPACE_STRIDE
            raise WanmoeError(
                f"a video of {side} {size} cannot be encoded: it must be a multiple of 8; nearest is {near}"
            )
    return (frames - 1) // TIME_STRIDE + 1, height // SPACE_STRIDE, width // SPACE_STRIDE


def _check_video(video: Tensor) -> None:
    if video.ndim != 5 or video.shape[1] != 3:
        raise WanmoeError(f"a codec encodes [B, 3, F, H, W], but got a tensor of shape {list(video.shape)}")
    latent_shape(*video.shape[2:])


def _check_latent(latent: Tensor) -> None:
    if latent.ndim != 5 or latent.shape[1] != CHANNELS:
        raise WanmoeError(f"a codec decodes [B, 16, f, h, w], but got a tensor of shape {list(latent.shape)}")


def haar_matrix(size: int) -> Tensor:
    """Orthonormal Haar transform `[size, size]` in fp64 for a power of two; row 0 is the low pass."""
    rows = torch.ones(1, 1, dtype=torch.float64)
    low = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    high = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    while rows.shape[0] < size:
        details = torch.kron(torch.eye(rows.shape[0], dtype=torch.float64), high)
        rows = torch.cat([torch.kron(rows, low), details]) / 2**0.5
    return rows


def _haar_basis() -> Tensor:
    """The kept basis functions `[16, 3, 4, 8, 8]` in fp32, orthonormal as vectors of length 768."""
    colour = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colour /= colour.norm(dim=1, keepdim=True)
    time, space = haar_matrix(TIME_STRIDE), haar_matrix(SPACE_STRIDE)
    functions = [
        torch.einsum("c,t,u,v->ctuv", colour[c], time[t], space[u], space[v]) for c, t, u, v in HAAR_BANDS
    ]
    return torch.stack(functions).float()


class HaarCodec(nn.Module):
    """Stand-in codec: a fixed orthonormal 4x8x8 causal Haar wavelet with its 16 strongest bands.

    Not a learned codec: it needs no weights, and blurs. Frame 0 makes a group of its own, standing still, so
    its bands of time detail are zero. `decode` is the adjoint: `encode(decode(z)) == z` for every z whose
    time details vanish in latent frame 0, and `decode(encode(video))` is the nearest video that 16 bands can
    hold. `decode` does not clamp, for that would break both.
    """

    basis: Tensor
    mean: Tensor
    std: Tensor

    name = "haar"
    stand_in = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", _haar_basis(), persistent=False)
        self.register_buffer("mean", torch.tensor(HAAR_MEAN).view(CHANNELS, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(HAAR_STD).view(CHANNELS, 1, 1, 1), persistent=False)

    @property
    def fingerprint(self) -> str:
        """Digest of the band table and its statistics."""
        return hashlib.sha256(repr((HAAR_BANDS, HAAR_MEAN, HAAR_STD)).encode()).hexdigest()

    def encode(self, video: Tensor) -> Tensor:
        """Video `[B, 3, F, H, W]` in [-1, 1] -> normalised latent `[B, 16, f, h, w]`, fp32."""
        _check_video(video)
        video = video.to(self.basis)
        b, c, frames, height, width = video.shape
        tiles = video.reshape(b, c, frames, height // 8, 8, width // 8, 8)
        first = torch.einsum("kcuv,bcyuxv->bkyx", self.basis.sum(2), tiles[:, :, 0]).unsqueeze(2)
        groups = tiles[:, :, 1:].unflatten(2, ((frames - 1) // 4, 4))
        rest = torch.einsum("kctuv,bcftyuxv->bkfyx", self.basis, groups)
        return (torch.cat([first, rest], dim=2) - self.mean) / self.std

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latent `[B, 16, f, h, w]` -> video `[B, 3, F, H, W]`, fp32, not clamped."""
        _check_latent(latent)
        bands = latent.to(self.basis) * self.std + self.mean
        # The four frames of the group of its own are one frame, so their mean is what they say.
        first = torch.einsum("kcuv,bkyx->bcyuxv", self.basis.mean(2), bands[:, :, 0]).unsqueeze(2)
        rest = torch.einsum("kctuv,bkfyx->bcftyuxv", self.basis, bands[:, :, 1:]).flatten(2, 3)
        tiles = torch.cat([first, rest], dim=2)
        return tiles.flatten(-2).flatten(-3, -2)


class WanVAE(nn.Module):
    """The Wan 2.1 VAE (diffusers' `AutoencoderKLWan`) with normalised latents.

    `encode` takes the posterior mean and keeps no graph; `decode` is differentiable and clamps to [-1, 1].
    """

    mean: Tensor
    std: Tensor

    name = "wan2.1-vae"
    stand_in = False

    def __init__(self, vae: Any, files: list[Path], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.vae: Any = vae.eval().requires_grad_(False)
        self.files = files
        dtype = next(vae.parameters()).dtype
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(-1, 1, 1, 1), persistent=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the files the weights came from."""
        return file_digest(self.files)

    @property
    def tiled(self) -> bool:
        """Whether it works in tiles."""
        return bool(self.vae.use_tiling)

    def tile(self, size: int) -> None:
        """From now on encodes and decodes in tiles of `size` pixels a side that overlap by a quarter.

        Memory then follows the tile, not the picture. The overlaps are blended; the result differs a little
        from that of the whole picture, for the VAE attends over all of a frame. Raises `WanmoeError` unless
        `size` is a multiple of 32, so that tiles and their distance are whole latents.
        """
        if size < _TILE_STEP or size % _TILE_STEP:
            near = max(1, round(size / _TILE_STEP)) * _TILE_STEP
            raise WanmoeError(
                f"VAE tile size {size} is not a multiple of {_TILE_STEP} pixels; nearest is {near}"
            )
        distance = size * 3 // 4
        self.vae.enable_tiling(size, size, distance, distance)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video `[B, 3, F, H, W]` in [-1, 1] -> normalised latent `[B, 16, f, h, w]`, fp32."""
        _check_video(video)
        mode: Tensor = self.vae.encode(video.to(self.mean)).latent_dist.mode()
        return ((mode - self.mean) / self.std).float()

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latent `[B, 16, f, h, w]` -> video `[B, 3, F, H, W]` in [-1, 1], fp32."""
        _check_latent(latent)
        video: Tensor = self.vae.decode(latent.to(self.mean) * self.std + self.mean).sample
        return video.float().clamp(-1.0, 1.0)


def image_condition(codec: Codec, first: Tensor, frames: int, last: Tensor | None = None) -> Tensor:
    """What an i2v model is given beside the noise: `[1, 20, f, h, w]` for an image `[3, H, W]` in [-1, 1].

    Four channels of mask, one for each video frame that a latent frame covers, then the latent of the given
    frames with grey ones between or after them. The mask is 1 in latent frame 0, whose four stand for video
    frame 0, and with `last`, the last video frame, in the last channel of the last latent frame. Source:
    Wan2.2 `wan/image2video.py`, Wan2.1 `wan/first_last_frame2video.py`. Raises `WanmoeError` on sizes that
    cannot be encoded.
    """
    given = [first] if last is None else [first, last]
    if last is not None and (last.shape != first.shape or frames < 1 + TIME_STRIDE):
        raise WanmoeError(
            f"a last frame {list(last.shape)} for a first one {list(first.shape)} and {frames} frames; both "
            f"must be of one size, and the frames at least {1 + TIME_STRIDE}"
        )
    grey = first.new_zeros(3, frames - len(given), *first.shape[1:])
    video = torch.cat([first[:, None], grey, *(image[:, None] for image in given[1:])], dim=1)
    latent = codec.encode(video[None])
    mask = latent.new_zeros(1, TIME_STRIDE, *latent.shape[2:])
    mask[:, :, 0] = 1.0
    if last is not None:
        mask[:, -1, -1] = 1.0
    return torch.cat([mask, latent], dim=1)


def load_vae(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tile: int | None = None,
) -> HaarCodec | WanVAE:
    """Codec named by `path`: "haar", a diffusers folder, or `Wan2.1_VAE.pth` / `.safetensors`.

    A folder may be the VAE's own or a whole converted model with a `vae/` in it. A file may have the original
    or diffusers' key names; its tensors are read one at a time, so no second copy is held. With `tile` the
    VAE works in tiles of so many pixels (`WanVAE.tile`); the stand-in needs none. Raises `WanmoeError` where
    the file is missing, broken, or of another kind.
    """
    if str(path) == HaarCodec.name:
        return HaarCodec().to(device)
    path = Path(path)
    if path.is_dir():
        codec = _load_folder(path, dtype)
    elif path.is_file():
        codec = _load_file(path, dtype, device)
    else:
        raise WanmoeError(
            f"codec {path}: no such file or folder; give 'haar', a VAE file or a diffusers folder"
        )
    if tile is not None:
        codec.tile(tile)
    return codec.to(device)


def _load_folder(folder: Path, dtype: torch.dtype) -> WanVAE:
    from diffusers import AutoencoderKLWan

    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise WanmoeError(f"codec {folder}: the folder has no config.json, so it is not a diffusers VAE")
    vae = load_pretrained(AutoencoderKLWan, f"codec {folder}", folder, "AutoencoderKLWan", torch_dtype=dtype)
    _check_config(folder, vae.config.z_dim, bool(vae.config.is_residual))
    weights = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
    return WanVAE(vae, weights, tuple(vae.config.latents_mean), tuple(vae.config.latents_std))


def _load_file(path: Path, dtype: torch.dtype, device: str | torch.device) -> WanVAE:
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    stored = open_weights(path).tensors
    if "encoder.conv1.weight" in stored:
        stored = convert_wan_vae_to_diffusers(stored)  # renames alone: the tensors stay on disk
    needed = (
        "encoder.conv_in.weight",
        "quant_conv.weight",
        "post_quant_conv.weight",
        "decoder.norm_out.gamma",
    )
    if absent := [name for name in needed if name not in stored]:
        raise WanmoeError(f"codec {path}: the keys are not those of a Wan VAE ({absent[0]} is missing)")
    channels, base_dim, decoder_dim = (
        stored[name].shape[0]
        for name in ("post_quant_conv.weight", "encoder.conv_in.weight", "decoder.norm_out.gamma")
    )
    _check_config(path, channels, "encoder.down_blocks.0.resnets.0.norm1.gamma" in stored)
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(base_dim=base_dim, decoder_base_dim=decoder_dim)
    fill_module(vae, stored, f"codec {path}", dtype=dtype, device=device)
    return WanVAE(vae, [path], WAN_MEAN, WAN_STD)


def _check_config(path: Path, channels: int, residual: bool) -> None:
    if channels != CHANNELS or residual:
        raise WanmoeError(
            f"codec {path}: a VAE of {channels} latent channels; the models here use the Wan 2.1 VAE with 16"
        )


def load_pretrained(kind: Any, label: str, folder: Path, name: str, **options: Any) -> Any:
    """The model of a diffusers or transformers class in a folder, none of its weights missing.

    Raises `WanmoeError` that begins with `label` and calls the kind of model by `name`.
    """
    try:
        loaded: Any = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise WanmoeError(f"{label}: cannot be loaded as {name}: {first_line(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise WanmoeError(f"{label}: {len(missing)} weights are missing: {', '.join(missing[:3])}")
    return model


def file_digest(files: list[Path]) -> str:
    """sha256 of the contents of some files, and of their names where there are several."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0".encode() if len(files) > 1 else b"")
        feed(digest, file)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """The first line of an error, for a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
