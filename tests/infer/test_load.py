"""Prompts are encoded once, each for itself; adapters of any format say side and experts."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from wanmoe.infer.load import (
    PromptEncoder,
    adapter_paths,
    check_task,
    decode_anyhow,
    experts_of,
    noise_expert_of,
)
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.lora_file import write_lora
from wanmoe.moe_lora.wan.codec import WAN_MEAN, WAN_STD, WanVAE
from wanmoe.moe_lora.wan.text import HashTextEncoder, encode_prompts


def test_embeddings_do_not_depend_on_the_prompts_beside_them():
    encoder = PromptEncoder(HashTextEncoder)
    encoder.prepare(["hook", "a much longer prompt with many words", "hook"])
    assert torch.equal(encoder["hook"], encode_prompts(HashTextEncoder(), ["hook"])[0])


def test_a_prompt_that_was_prepared_needs_no_encoder():
    loads = []

    def load():
        loads.append(1)
        return HashTextEncoder()

    encoder = PromptEncoder(load)
    encoder.prepare(["a"])
    encoder.prepare(["a"])
    assert len(loads) == 1
    encoder.prepare(["b"])
    assert len(loads) == 2 and encoder["a"].shape == encoder["b"].shape


def test_a_video_that_the_card_cannot_decode_at_once_is_decoded_in_tiles(monkeypatch, caplog):
    sizes = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 16, "num_res_blocks": 1}
    codec = WanVAE(AutoencoderKLWan(**sizes).eval(), [], WAN_MEAN, WAN_STD)
    latent, whole = torch.randn(1, 16, 1, 8, 8), codec.decode

    def full(latent):
        if not codec.tiled:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(latent)

    monkeypatch.setattr(codec, "decode", full)
    assert decode_anyhow(codec, latent, 32).shape == (1, 3, 1, 64, 64)
    assert codec.tiled and "in tiles of 32 pixels then" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        decode_anyhow(HaarFull(), latent, 32)


class HaarFull:
    def decode(self, latent):
        raise torch.OutOfMemoryError("CUDA out of memory")


def lora(path, **metadata):
    write_lora(path, {"blocks.0.self_attn.q": (torch.ones(1, 4), torch.ones(4, 1))}, metadata=metadata)
    return path


def test_a_lora_goes_where_it_says(tmp_path):
    stated = lora(tmp_path / "x.safetensors", noise_expert="high")
    named = lora(tmp_path / "x_low_noise.safetensors")
    silent = lora(tmp_path / "y.safetensors")
    assert [noise_expert_of(path) for path in (stated, named, silent)] == ["high", "low", "both"]
    assert adapter_paths(stated, True, False) == {"high": stated}
    assert adapter_paths(silent, True, False) == {"low": silent, "high": silent}
    assert adapter_paths(named, False, False) == {"low": named}
    assert experts_of(silent).names[0] == "Scissors"
    with pytest.raises(WanmoeError, match="there is only one model"):
        adapter_paths(stated, False, False)


def test_a_task_is_checked_where_it_is_given(tmp_path):
    check_task(None, "i2v", tmp_path)
    check_task("i2v-14B", "i2v", tmp_path)
    with pytest.raises(WanmoeError, match="this is a i2v model, but the task is t2v"):
        check_task("t2v", "i2v", tmp_path)


def test_a_fork_file_without_a_config_of_its_own_is_read_with_the_one_beside_it(tmp_path):
    parts = {"base_lora_down": (2, 4), "base_lora_up": (4, 2)}
    parts |= {"expert_lora_down.0": (2, 4), "expert_lora_up.0": (4, 2)}
    tensors = {f"lora_moe_0.{name}.weight": torch.ones(shape) for name, shape in parts.items()}
    save_file(tensors, tmp_path / "fork.safetensors")
    config = {"alpha": 2, "expert_names": ["hook"], "module_ranks": {"blocks.0.attn1.q": 2}}
    (tmp_path / "fork.json").write_text(json.dumps({**config, "lora_dim": 2, "num_experts": 1}))
    path, beside = tmp_path / "fork.safetensors", tmp_path / "fork.json"
    assert adapter_paths(path, True, False, beside) == {"low": path, "high": path}
    assert adapter_paths(path, False, False, beside) == {"low": path}
    assert experts_of(path, beside).names == ["hook"]
    with pytest.raises(WanmoeError, match="config file"):
        adapter_paths(path, True, False)
