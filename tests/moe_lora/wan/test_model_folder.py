"""Which part of a downloaded model is where."""

from pathlib import Path

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.wan.model_folder import ModelFolder, find_parts

TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def lay_out(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def test_an_original_wan22_folder(tmp_path):
    shard = "diffusion_pytorch_model-00001-of-00006.safetensors"
    lay_out(tmp_path, f"low_noise_model/{shard}", f"high_noise_model/{shard}", "Wan2.1_VAE.pth", TEXT)
    lay_out(tmp_path, "google/umt5-xxl/tokenizer.json", "configuration.json")
    assert find_parts(tmp_path) == ModelFolder(
        dit=tmp_path / "low_noise_model",
        dit_high_noise=tmp_path / "high_noise_model",
        vae=tmp_path / "Wan2.1_VAE.pth",
        text=tmp_path / TEXT,
        tokenizer=tmp_path / "google" / "umt5-xxl",
        clip=None,
    )


@pytest.mark.parametrize(
    "files",
    [
        ["diffusion_pytorch_model.safetensors"],
        [
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model-00002-of-00002.safetensors",
        ],
        [
            "diffusion_pytorch_model.safetensors.index.json",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model-00002-of-00002.safetensors",
        ],
    ],
)
def test_an_original_wan21_folder_with_its_dit_among_the_other_files(files, tmp_path):
    lay_out(tmp_path, *files, "config.json", "a_lora.safetensors", "Wan2.1_VAE.pth", TEXT, CLIP)
    lay_out(tmp_path, "google/umt5-xxl/spiece.model", "xlm-roberta-large/tokenizer.json")
    parts = find_parts(str(tmp_path))
    assert parts.dit == tmp_path / files[0]
    assert (parts.dit_high_noise, parts.clip) == (None, tmp_path / CLIP)


def test_in_a_diffusers_folder_the_first_transformer_is_the_high_noise_one(tmp_path):
    names = ["transformer", "transformer_2", "vae", "text_encoder"]
    lay_out(
        tmp_path, "model_index.json", *(f"{name}/config.json" for name in names), "tokenizer/spiece.model"
    )
    paths = [tmp_path / name for name in ("transformer_2", "transformer", "vae", "text_encoder", "tokenizer")]
    assert find_parts(tmp_path) == ModelFolder(*paths, None)


def test_a_diffusers_folder_of_one_transformer_is_a_model_of_one_dit(tmp_path):
    lay_out(tmp_path, "transformer/config.json", "image_encoder/config.json")
    absent = (None, None, None, None)
    assert find_parts(tmp_path) == ModelFolder(tmp_path / "transformer", *absent, tmp_path / "image_encoder")


def test_one_noise_expert_alone_will_do(tmp_path):
    lay_out(tmp_path, "high_noise_model/config.json")
    parts = find_parts(tmp_path)
    assert (parts.dit, parts.dit_high_noise) == (None, tmp_path / "high_noise_model")


def test_a_folder_without_a_dit_is_refused_with_what_it_holds(tmp_path):
    lay_out(tmp_path, "Wan2.1_VAE.pth", "notes.txt")
    with pytest.raises(WanmoeError, match=r"no Wan model: .* it holds Wan2\.1_VAE\.pth, notes\.txt$"):
        find_parts(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "notes.txt"):
        with pytest.raises(WanmoeError, match="no such folder") as caught:
            find_parts(path)
        assert str(path) in str(caught.value)
