"""Codecs: the stand-in wavelet's algebra, and the Wan VAE against direct calls of diffusers."""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from safetensors.torch import save_file

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.wan import codec as codec_module
from wanmoe.moe_lora.wan.codec import (
    HAAR_BANDS,
    WAN_MEAN,
    WAN_STD,
    HaarCodec,
    haar_matrix,
    image_condition,
    latent_shape,
    load_vae,
)

DATA = Path(os.environ.get("WANMOE_DATA", Path(__file__).parents[4] / "shared" / "data"))


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _latent(frames: int, height: int, width: int) -> torch.Tensor:
    """A random latent whose time details vanish in frame 0, as those of every video do."""
    latent = _noise(2, 16, frames, height, width)
    latent[:, [band[1] > 0 for band in HAAR_BANDS], 0] = 0
    return latent


# ---------------------------------------------------------------------------------------------- stand-in


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_haar_matrix_is_orthonormal(size: int) -> None:
    matrix = haar_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert (matrix[0] > 0).all()


def test_the_kept_bands_are_orthonormal_and_distinct() -> None:
    assert len(set(HAAR_BANDS)) == 16
    basis = HaarCodec().basis.flatten(1).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 8, 8), (5, 16, 24), (13, 40, 8)])
def test_shapes_follow_the_strides(frames: int, height: int, width: int) -> None:
    codec = HaarCodec()
    latent = codec.encode(_noise(2, 3, frames, height, width))
    assert latent.shape == (2, 16, *latent_shape(frames, height, width))
    assert latent.dtype == torch.float32
    assert codec.decode(latent).shape == (2, 3, frames, height, width)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_encode_undoes_decode(frames: int) -> None:
    codec = HaarCodec()
    latent = _latent(frames, 3, 5)
    torch.testing.assert_close(codec.encode(codec.decode(latent)), latent, atol=1e-4, rtol=1e-4)


def test_decode_of_encode_is_a_projection() -> None:
    codec = HaarCodec()
    video = _noise(1, 3, 9, 16, 16)
    once = codec.decode(codec.encode(video))
    torch.testing.assert_close(codec.decode(codec.encode(once)), once, atol=1e-4, rtol=1e-4)
    # What is lost is at right angles to what is kept: the nearest video that the bands can hold. (Frame 0
    # counts as four, for it stands still through a group.) The mean latent is not 0, so compare differences.
    other = codec.decode(_latent(3, 2, 2)[:1])
    weight = torch.tensor([4.0] + [1.0] * 8).view(1, 1, 9, 1, 1)
    lost, kept = video - once, once - other
    cosine = (weight * lost * kept).sum() / (lost.norm() * kept.norm())
    assert abs(cosine) < 1e-5


def test_each_latent_frame_depends_on_its_own_group_alone() -> None:
    codec = HaarCodec()
    video = _noise(1, 3, 13, 8, 8)
    before = codec.encode(video)
    for frame in range(13):
        changed = video.clone()
        changed[:, :, frame] += _noise(1, 3, 8, 8, seed=1)
        moved = (codec.encode(changed) - before).abs().amax(dim=(0, 1, 3, 4)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [(frame + 3) // 4]


def test_frame_0_stands_still_in_its_group() -> None:
    latent = HaarCodec().encode(_noise(1, 3, 5, 16, 16))
    details = torch.tensor([band[1] > 0 for band in HAAR_BANDS])
    assert latent[:, details, 0].abs().max() < 1e-6
    assert latent[:, details, 1].abs().max() > 0.1
    assert latent[:, ~details, 0].abs().max() > 0.1


def test_an_image_is_encoded_like_a_still_group() -> None:
    codec = HaarCodec()
    latent = codec.encode(_noise(1, 3, 1, 16, 16).expand(1, 3, 5, 16, 16))
    torch.testing.assert_close(latent[:, :, 0], latent[:, :, 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "nearest"),
    [((8, 16, 16), "9"), ((6, 16, 16), "5"), ((5, 20, 16), "16"), ((5, 16, 23), "24"), ((5, 0, 8), "8")],
)
def test_wrong_sizes_name_the_nearest_valid_one(shape: tuple[int, int, int], nearest: str) -> None:
    with pytest.raises(WanmoeError, match=f"nearest is {nearest}$"):
        HaarCodec().encode(torch.zeros(1, 3, *shape))


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(WanmoeError, match="3, F, H, W"):
        HaarCodec().encode(torch.zeros(1, 4, 5, 16, 16))
    with pytest.raises(WanmoeError, match="16, f, h, w"):
        HaarCodec().decode(torch.zeros(1, 15, 2, 2, 2))


def test_the_stand_in_names_itself() -> None:
    codec = load_vae("haar")
    assert isinstance(codec, HaarCodec)
    assert (codec.name, codec.stand_in) == ("haar", True)
    assert codec.fingerprint == HaarCodec().fingerprint
    assert not codec.state_dict()


@pytest.mark.parametrize(
    ("clip", "floor"), [("surgical/endo.mp4", 25.5), ("bikes.mp4", 25.0), ("gestures/again.mkv", 26.0)]
)
def test_real_clips_survive_and_latents_are_normalised(clip: str, floor: float) -> None:
    av = pytest.importorskip("av")
    if not (DATA / clip).is_file():
        pytest.skip(f"no {clip} under WANMOE_DATA ({DATA})")
    with av.open(str(DATA / clip)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), 17)]
    pixels = (
        torch.stack([torch.from_numpy(frame) for frame in frames]).permute(3, 0, 1, 2).float() / 127.5 - 1
    )
    height, width = pixels.shape[2:]
    scale = 128 / min(height, width)
    pixels = torch.nn.functional.interpolate(
        pixels, size=(round(height * scale), round(width * scale)), mode="bilinear", antialias=True
    )
    video = pixels[None, ..., :128, -128:]
    codec = HaarCodec()
    latent = codec.encode(video)
    error = (codec.decode(latent).clamp(-1, 1) - video).square().mean()
    assert 10 * torch.log10(4 / error) > floor
    assert latent.mean().abs() < 0.3
    assert 0.5 < latent.std() < 1.6


# ------------------------------------------------------------------------------------------------ Wan VAE


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _original_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The key names of `Wan2.1_VAE.pth` for a diffusers VAE of four levels with two residual blocks each."""
    head = {"norm_out": "head.0", "conv_out": "head.2", "conv_in": "conv1"}
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    residual["conv_shortcut"] = "shortcut"
    out = {}
    for key, value in state.items():
        part, *rest = key.split(".")
        if part in ("quant_conv", "post_quant_conv"):
            out[f"{'conv1' if part == 'quant_conv' else 'conv2'}.{rest[0]}"] = value
        elif rest[0] in head:
            out[f"{part}.{head[rest[0]]}.{rest[1]}"] = value
        elif rest[0] == "mid_block" and rest[1] == "attentions":
            out[f"{part}.middle.1.{'.'.join(rest[3:])}"] = value
        elif rest[0] == "mid_block":
            out[f"{part}.middle.{2 * int(rest[2])}.{residual[rest[3]]}.{rest[4]}"] = value
        elif rest[0] == "down_blocks":
            name = residual.get(rest[2], rest[2])
            out[f"{part}.downsamples.{rest[1]}.{name}.{'.'.join(rest[3:])}"] = value
        else:  # up_blocks: three residual blocks and an upsampler a level
            level = 4 * int(rest[1])
            if rest[2] == "resnets":
                out[f"{part}.upsamples.{level + int(rest[3])}.{residual[rest[4]]}.{rest[5]}"] = value
            else:
                out[f"{part}.upsamples.{level + 3}.{'.'.join(rest[4:])}"] = value
    return out


def _expected_latent(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(table).view(16, 1, 1, 1) for table in (WAN_MEAN, WAN_STD))
    with torch.no_grad():
        return (vae.encode(video).latent_dist.mode() - mean) / std


@pytest.mark.parametrize("layout", ["folder", "model folder", "pth", "safetensors", "diffusers safetensors"])
def test_every_layout_of_the_vae_equals_diffusers(vae: AutoencoderKLWan, layout: str, tmp_path: Path) -> None:
    if layout == "folder":
        vae.save_pretrained(path := tmp_path / "vae")
    elif layout == "model folder":
        vae.save_pretrained((path := tmp_path) / "vae")
    elif layout == "pth":
        torch.save(_original_layout(vae.state_dict()), path := tmp_path / "Wan2.1_VAE.pth")
    elif layout == "safetensors":
        save_file(_original_layout(vae.state_dict()), path := tmp_path / "vae.safetensors")
    else:
        save_file(vae.state_dict(), path := tmp_path / "vae.safetensors")
    codec = load_vae(path)
    assert not codec.stand_in
    assert len(codec.fingerprint) == 64
    video = _noise(1, 3, 5, 16, 16).clamp(-1, 1)
    latent = codec.encode(video)
    assert latent.shape == (1, 16, 2, 2, 2)
    torch.testing.assert_close(latent, _expected_latent(vae, video), atol=1e-6, rtol=1e-5)
    mean, std = (torch.tensor(table).view(16, 1, 1, 1) for table in (WAN_MEAN, WAN_STD))
    with torch.no_grad():
        expected = vae.decode(latent * std + mean).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latent), expected, atol=1e-6, rtol=1e-5)
    assert expected.std() > 0.01


def test_the_constants_are_those_of_diffusers() -> None:
    config = AutoencoderKLWan(base_dim=8).config
    assert tuple(config.latents_mean) == WAN_MEAN
    assert tuple(config.latents_std) == WAN_STD


def test_the_vae_is_frozen_and_decode_carries_a_gradient(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    codec = load_vae(tmp_path)
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    latent = _noise(1, 16, 1, 2, 2).requires_grad_(True)
    codec.decode(latent).sum().backward()
    assert latent.grad is not None and latent.grad.abs().max() > 0
    with pytest.raises(WanmoeError, match=r"nearest is 5$"):
        codec.encode(torch.zeros(1, 3, 6, 16, 16))


def test_a_missing_or_broken_file_is_one_clear_line(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(vae.state_dict(), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-1000])
    text = tmp_path / "text.pth"
    text.write_text("not a checkpoint")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    short = tmp_path / "short.safetensors"
    save_file({k: v for k, v in vae.state_dict().items() if k != "decoder.conv_out.bias"}, short)
    empty = tmp_path / "empty"
    empty.mkdir()
    lacking = tmp_path / "lacking"
    vae.save_pretrained(lacking)
    save_file(
        {k: v for k, v in vae.state_dict().items() if k != "decoder.conv_out.bias"},
        lacking / "diffusion_pytorch_model.safetensors",
    )
    for path in (tmp_path / "absent.pth", cut, text, other, short, empty, lacking):
        with pytest.raises(WanmoeError) as caught:
            load_vae(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "1 weights are missing: decoder.conv_out.bias" in str(caught.value)


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    torch.save({"encoder.conv1.weight": Path}, path)
    with pytest.raises(WanmoeError, match="holds code, which is not run"):
        load_vae(path)


def test_a_vae_of_another_size_is_refused(tmp_path: Path) -> None:
    AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(
        tmp_path
    )
    with pytest.raises(WanmoeError, match="4 latent channels"):
        load_vae(tmp_path)


def test_the_file_is_read_once_and_never_a_second_time_in_memory(
    vae: AutoencoderKLWan, tmp_path: Path, watch_reads: Callable[..., list[str]]
) -> None:
    save_file(_original_layout(vae.state_dict()), path := tmp_path / "vae.safetensors")
    read = watch_reads(codec_module)
    codec = load_vae(path, dtype=torch.bfloat16)
    assert sorted(read) == sorted(_original_layout(vae.state_dict()))
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in codec.parameters())


def test_a_file_may_change_under_a_loaded_vae(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    torch.save(_original_layout(vae.state_dict()), path := tmp_path / "vae.pth")
    codec = load_vae(path)
    with path.open("r+b") as handle:
        handle.write(bytes(path.stat().st_size))
    video = _noise(1, 3, 1, 16, 16).clamp(-1, 1)
    torch.testing.assert_close(codec.encode(video), _expected_latent(vae, video), atol=1e-6, rtol=1e-5)


def test_a_torch_file_of_the_old_format_is_read_too(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    torch.save(_original_layout(vae.state_dict()), path, _use_new_zipfile_serialization=False)
    video = _noise(1, 3, 1, 16, 16).clamp(-1, 1)
    torch.testing.assert_close(
        load_vae(path).encode(video), _expected_latent(vae, video), atol=1e-6, rtol=1e-5
    )


# ---------------------------------------------------------------------------------------------- tiles


def _local(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same VAE without a look at its neighbours: only there must tiles change nothing at all."""
    local = AutoencoderKLWan(base_dim=8).eval()
    local.load_state_dict(vae.state_dict())
    with torch.no_grad():
        for name, weight in local.named_parameters():
            if "attentions" in name and "proj" in name:
                weight.zero_()
            elif weight.ndim >= 4 and weight.shape[-1] == 3:
                middle = weight[..., 1, 1].clone()
                weight.zero_()
                weight[..., 1, 1] = 3 * middle
    return local


def test_tiles_of_a_vae_that_sees_no_neighbours_change_nothing(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    _local(vae).save_pretrained(tmp_path)
    whole, tiled = load_vae(tmp_path), load_vae(tmp_path, tile=64)
    video = _noise(1, 3, 5, 96, 136).clamp(-1, 1)
    latent = whole.encode(video)
    seen: list[tuple[int, ...]] = []
    for conv in (tiled.vae.encoder.conv_in, tiled.vae.decoder.conv_in):
        conv.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    torch.testing.assert_close(tiled.encode(video), latent, atol=1e-5, rtol=1e-5)
    assert max(seen) == (64, 64) and len(seen) == 2 * 2 * 3
    seen.clear()
    decoded = whole.decode(latent)
    torch.testing.assert_close(tiled.decode(latent), decoded, atol=1e-5, rtol=1e-5)
    assert max(seen) == (8, 8) and len(seen) == 2 * 2 * 3
    assert latent.std() > 0.1 and decoded.std() > 0.05 and (decoded.abs() < 1).float().mean() > 0.5
    seen.clear()
    tiled.encode(video[..., :64, :64])
    assert seen == [(64, 64)] * 2, "what fits in a tile is not cut"


@pytest.mark.parametrize(("size", "nearest"), [(100, 96), (120, 128), (16, 32), (0, 32)])
def test_a_tile_size_that_does_not_divide_names_the_nearest(
    vae: AutoencoderKLWan, size: int, nearest: int, tmp_path: Path
) -> None:
    vae.save_pretrained(tmp_path)
    with pytest.raises(
        WanmoeError, match=rf"tile size {size} .* multiple of 32 pixels; nearest is {nearest}$"
    ):
        load_vae(tmp_path, tile=size)


def test_the_stand_in_needs_no_tiles() -> None:
    assert isinstance(load_vae("haar", tile=64), HaarCodec)


# -------------------------------------------------------------------------------- first and last frame


@pytest.mark.parametrize("frames", [5, 13])
@pytest.mark.parametrize("with_last", [False, True])
def test_the_image_condition_is_that_of_diffusers(
    vae: AutoencoderKLWan, frames: int, with_last: bool, tmp_path: Path
) -> None:
    vae.save_pretrained(tmp_path)
    first, last = _noise(3, 16, 24).clamp(-1, 1), _noise(3, 16, 24, seed=1).clamp(-1, 1)
    if not with_last:
        last = None
    pipeline = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=None)
    with torch.no_grad():
        _, expected = pipeline.prepare_latents(
            first[None], 1, height=16, width=24, num_frames=frames, dtype=torch.float32,
            device=torch.device("cpu"), last_image=None if last is None else last[None],
        )  # fmt: skip
    condition = image_condition(load_vae(tmp_path), first, frames, last)
    assert condition.shape == (1, 20, (frames - 1) // 4 + 1, 2, 3)
    assert torch.equal(condition[:, :4], expected[:, :4])
    torch.testing.assert_close(condition, expected, atol=1e-5, rtol=1e-5)
    marks = condition[0, :4, :, 0, 0].sum(0).tolist()
    assert marks == [4.0] + [0.0] * ((frames - 1) // 4 - 1) + [1.0 if with_last else 0.0]


def test_a_last_frame_must_fit_the_first_and_have_room() -> None:
    codec, first = HaarCodec(), torch.zeros(3, 16, 24)
    with pytest.raises(WanmoeError, match=r"a last frame \[3, 16, 16\] for a first one \[3, 16, 24\]"):
        image_condition(codec, first, 5, torch.zeros(3, 16, 16))
    with pytest.raises(WanmoeError, match=r"and 1 frames; .* at least 5"):
        image_condition(codec, first, 1, first)
