"""Layouts, shards, inference of sizes, and errors that name what is wrong."""

import dataclasses
import hashlib
import json
import os

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.lora_file import write_lora
from wanmoe.moe_lora.lora_merge import LoRASpec
from wanmoe.moe_lora.wan import weights
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import (
    dit_hash,
    load_dit,
    read_dit_config,
    save_dit,
    to_diffusers,
    to_original,
)

SIZES = dict(dim=128, ffn_dim=96, num_heads=4, num_layers=2, text_dim=24, text_len=16, freq_dim=32)
CONFIG = WanConfig(**SIZES)
I2V = WanConfig(task="i2v", in_dim=36, **SIZES)
CLIP = WanConfig(task="i2v", in_dim=36, image_dim=12, **SIZES)  # Wan2.1 i2v
FLF = WanConfig(task="i2v", in_dim=36, image_dim=12, image_positions=6, **SIZES)


@pytest.fixture(scope="module")
def state():
    return random_state(CONFIG)


def random_state(config):
    torch.manual_seed(0)
    return {name: torch.randn_like(p) for name, p in WanDiT(config).state_dict().items()}


def assert_holds(dit, state):
    loaded = dit.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name
    assert not dit.training and not any(p.requires_grad or p.is_meta for p in dit.parameters())


def as_diffusers(state):
    return {to_diffusers(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("config", [CONFIG, I2V, CLIP, FLF], ids=["t2v", "i2v", "wan2.1-i2v", "wan2.1-flf2v"])
def test_names_map_to_diffusers_and_back(config):
    state = random_state(config)
    renamed = as_diffusers(state)
    theirs = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=config.in_dim, out_channels=16,
        text_dim=24, freq_dim=32, ffn_dim=96, num_layers=2, image_dim=config.image_dim or None,
        added_kv_proj_dim=128 if config.image_dim else None, pos_embed_seq_len=config.image_positions or None,
    )  # fmt: skip
    theirs.load_state_dict(renamed, strict=True)
    assert [to_original(name) for name in renamed] == list(state)
    assert_holds(load_dit(theirs.state_dict(), config), state)
    assert to_diffusers("blocks.7.norm3.bias") == "blocks.7.norm2.bias"
    assert to_original("blocks.11.attn2.to_out.0.weight") == "blocks.11.cross_attn.o.weight"
    assert to_original("something.else") == "something.else"


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui", "comfyui-short"])
def test_every_layout_loads_from_a_state_dict_and_from_a_file(state, layout, tmp_path):
    prefix = {"comfyui": "model.diffusion_model.", "comfyui-short": "diffusion_model."}.get(layout, "")
    stored = as_diffusers(state) if layout == "diffusers" else {prefix + k: v for k, v in state.items()}
    assert_holds(load_dit(stored, CONFIG), state)
    save_file(stored, tmp_path / "model.safetensors")
    assert_holds(load_dit(tmp_path / "model.safetensors", CONFIG), state)
    torch.save(stored, tmp_path / "model.pth")
    assert_holds(load_dit(tmp_path / "model.pth", CONFIG), state)


def write_shards(folder, state, *, index):
    folder.mkdir()
    names = list(state)
    parts = {f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / file)
    if index:
        weight_map = {key: file for file, keys in parts.items() for key in keys}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("renamed", [True, False])
def test_shards_load_as_folder_index_or_any_shard(state, index, renamed, tmp_path):
    folder = write_shards(tmp_path / "dit", as_diffusers(state) if renamed else state, index=index)
    sources = [folder, folder / "diffusion_pytorch_model-00002-of-00003.safetensors"]
    if index:
        sources.append(folder / "diffusion_pytorch_model.safetensors.index.json")
    for source in sources:
        assert_holds(load_dit(source, CONFIG), state)
    (folder / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    for source in sources:
        with pytest.raises(WanmoeError, match=r"1 of 3 shards are missing: .*00003-of-00003"):
            load_dit(source, CONFIG)


def test_sizes_come_from_the_shapes_and_the_rest_from_config_json(state, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(as_diffusers(state), file)
    guess = load_dit(file).config
    assert (guess.dim, guess.ffn_dim, guess.num_layers, guess.text_dim, guess.freq_dim) == (
        128,
        96,
        2,
        24,
        32,
    )
    assert (guess.task, guess.num_heads, guess.text_len) == ("t2v", 1, 512)
    assert load_dit(random_state(I2V)).config.task == "i2v"

    diffusers = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 4, "attention_head_dim": 32}
    (tmp_path / "config.json").write_text(
        json.dumps({**diffusers, "in_channels": 16, "patch_size": [1, 2, 2]})
    )
    assert load_dit(file).config.num_heads == 4
    original = {"_class_name": "WanModel", "dim": 128, "num_heads": 4, "text_len": 16, "model_type": "t2v"}
    (tmp_path / "config.json").write_text(json.dumps({**original, "ffn_dim": 96, "eps": 1e-6}))
    assert load_dit(file).config == CONFIG
    (tmp_path / "config.json").write_text(json.dumps({**original, "ffn_dim": 97}))
    with pytest.raises(WanmoeError, match=r"ffn_dim is 96 in the tensors but 97 in config.json"):
        load_dit(file)
    (tmp_path / "config.json").write_text(json.dumps({**original, "model_type": "ti2v"}))
    with pytest.raises(WanmoeError, match="ti2v"):
        load_dit(file)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WanmoeError, match=r"config\.json: not readable JSON"):
        load_dit(file)


def test_a_saved_model_comes_back_with_its_config_and_without_an_adapter(state, tmp_path):
    dit = load_dit(state, CONFIG)
    dit.blocks[1].self_attn.q.expert_down = torch.nn.Parameter(torch.zeros(4, 2, 128))
    file = tmp_path / "base.safetensors"
    file.write_bytes(b"an older one")
    save_dit(dit, file)
    assert os.listdir(tmp_path) == ["base.safetensors"]
    again = load_dit(file)
    assert again.config == CONFIG
    assert_holds(again, state)
    with safe_open(file, "pt") as handle:
        assert json.loads(handle.metadata()["wanmoe_config"])["num_heads"] == 4
    with pytest.raises(WanmoeError, match="could not be written"):
        save_dit(dit, tmp_path / "nowhere" / "base.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WanmoeError, match="could not be written"):
        save_dit(dit, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "folder"]


def test_dtype_is_kept_or_converted(state, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert {p.dtype for p in load_dit(half, CONFIG).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_dit(half, CONFIG, dtype=torch.float32).parameters()} == {torch.float32}
    mixed = dict(half, **{name: state[name] for name in state if "modulation" in name or "time" in name})
    dit = load_dit(mixed, CONFIG)
    assert dit.head.modulation.dtype == torch.float32 and dit.head.head.weight.dtype == torch.bfloat16
    assert dit(torch.randn(1, 16, 1, 4, 4), torch.ones(1), torch.randn(1, 3, 24)).isfinite().all()
    eighth = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    with pytest.raises(WanmoeError, match=r"float8_e4m3fn.*give a dtype"):
        load_dit(eighth, CONFIG)
    assert load_dit(eighth, CONFIG, dtype=torch.bfloat16).head.head.weight.dtype == torch.bfloat16


def test_a_loaded_model_shares_no_memory_with_its_source(state):
    source = {name: tensor.clone() for name, tensor in state.items()}
    dit = load_dit(source, CONFIG)
    for tensor in source.values():
        tensor.zero_()
    assert_holds(dit, state)


def test_missing_extra_and_misshapen_keys_are_listed(state, tmp_path):
    bad = dict(state, **{f"extra.{i}": torch.zeros(1) for i in range(12)})
    del bad["blocks.1.self_attn.q.weight"], bad["head.head.bias"]
    bad["blocks.0.ffn.0.weight"] = torch.zeros(96, 64)
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(WanmoeError) as caught:
        load_dit(tmp_path / "bad.safetensors", CONFIG)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/bad.safetensors: ") and "\n" not in text
    assert "2 missing: " in text and "blocks.1.self_attn.q.weight" in text and "head.head.bias" in text
    assert "12 extra: extra.0" in text and text.count("extra.") == 8 and ", ..." in text
    assert "1 misshapen: blocks.0.ffn.0.weight (96, 64) (expected (96, 128))" in text


def test_a_wrong_config_is_an_error_too(state):
    with pytest.raises(WanmoeError, match=r"27 missing: blocks.2"):
        load_dit(state, WanConfig(**{**SIZES, "num_layers": 3}))
    with pytest.raises(WanmoeError, match=r"1 misshapen: patch_embedding.weight \(128, 16, 1, 2, 2\)"):
        load_dit(state, I2V)


def test_image_tensors_that_do_not_make_a_whole_model_are_listed(state):
    clip = random_state(CLIP)
    part = {name: tensor for name, tensor in clip.items() if "v_img" not in name}
    with pytest.raises(WanmoeError, match=r"4 missing: blocks\.0\.cross_attn\.v_img\.weight"):
        load_dit(part)
    with pytest.raises(WanmoeError, match=r"1 extra: img_emb\.proj\.0\.weight"):
        load_dit({**state, "img_emb.proj.0.weight": torch.zeros(2)})
    with pytest.raises(WanmoeError, match=r"^state dict: WanConfig\.image_dim is 12 for task 't2v'"):
        load_dit({**state, "img_emb.proj.1.weight": torch.zeros(12, 12)})


def test_a_norm_that_early_conversions_of_wan21_hold_is_left_out():
    clip = random_state(CLIP)
    stored = as_diffusers(clip)
    stored |= {f"blocks.{i}.attn2.norm_added_q.weight": torch.ones(128) for i in range(2)}
    assert_holds(load_dit(stored, CLIP), clip)


def test_the_config_is_read_from_headers_alone(tmp_path):
    for config, task in ((CONFIG, "t2v"), (I2V, "i2v"), (CLIP, "i2v"), (FLF, "i2v")):
        state = random_state(config)
        for layout, stored in {
            "original": state,
            "diffusers": as_diffusers(state),
            "comfyui": {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()},
        }.items():
            file = tmp_path / f"{layout}.safetensors"
            save_file(stored, file)
            with open(file, "r+b") as handle:  # every number made a NaN: only the header may be looked at
                start = 8 + int.from_bytes(handle.read(8), "little")
                handle.seek(start)
                handle.write(b"\xff" * (file.stat().st_size - start))
            found, name = read_dit_config(file)
            assert name == layout
            assert found == dataclasses.replace(config, num_heads=1, text_len=512) and found.task == task
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "flf2v", "num_heads": 4, "text_len": 16}))
    assert read_dit_config(tmp_path / "original.safetensors") == (FLF, "original")
    theirs = {"num_attention_heads": 4, "attention_head_dim": 32, "image_dim": 12, "pos_embed_seq_len": 6}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert read_dit_config(tmp_path / "diffusers.safetensors")[0] == dataclasses.replace(FLF, text_len=512)
    (tmp_path / "config.json").write_text(json.dumps({**theirs, "pos_embed_seq_len": None}))
    with pytest.raises(WanmoeError, match=r"image_positions is 6 in the tensors but 0 in config\.json"):
        read_dit_config(tmp_path / "diffusers.safetensors")
    save_dit(load_dit(random_state(FLF), FLF), tmp_path / "ours.safetensors")
    assert read_dit_config(tmp_path / "ours.safetensors") == (FLF, "original")
    with pytest.raises(WanmoeError, match="not a Wan DiT"):
        read_dit_config({"encoder.x": torch.zeros(1)})


def test_other_models_are_refused_without_a_config(state):
    with pytest.raises(WanmoeError, match=r"not a Wan DiT: no patch_embedding\.weight; it holds encoder\.x"):
        load_dit({"encoder.x": torch.zeros(1)})
    control = dict(state, **{"patch_embedding.weight": torch.zeros(128, 48, 1, 2, 2)})
    with pytest.raises(WanmoeError, match="reads 48 channels and predicts 16"):
        load_dit(control)
    odd = random_state(WanConfig(**{**SIZES, "dim": 96}))
    with pytest.raises(WanmoeError, match="heads is not stated and width 96"):
        load_dit(odd)


def test_files_that_cannot_be_read_give_one_clear_line(state, tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-1000])
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    torch.save(state, tmp_path / "whole.pth")
    cut_torch = tmp_path / "cut.pth"
    cut_torch.write_bytes((tmp_path / "whole.pth").read_bytes()[:-5000])
    code = tmp_path / "code.pth"
    torch.save({"weight": os.path.join}, code)
    torch.save([1], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "number.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "repo" / "high_noise_model").mkdir(parents=True)
    save_file(state, tmp_path / "repo" / "high_noise_model" / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    for name, match in {
        "absent.safetensors": "no such file",
        "cut.safetensors": "not a whole safetensors file",
        "pointer.safetensors": "not a whole safetensors file",
        "cut.pth": "not a whole torch file",
        "code.pth": "not a whole torch file of plain tensors",
        "list.pth": "holds a list",
        "number.pth": "'epoch' is not a tensor",
        "empty": "no .safetensors or .pth file in this folder",
        "repo": "did you mean one of its folders high_noise_model",
        "model.safetensors.index.json": "no 'weight_map'",
    }.items():
        with pytest.raises(WanmoeError, match=match) as caught:
            load_dit(tmp_path / name, CONFIG)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WanmoeError, match=r"holds 3 weight files \(cut\.safetensors, .*name the one"):
        load_dit(tmp_path, CONFIG)


def test_a_tensor_in_two_shards_is_an_error(state, tmp_path):
    folder = write_shards(tmp_path / "dit", state, index=False)
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    first = next(iter(load_file(folder / "diffusion_pytorch_model-00001-of-00003.safetensors")))
    save_file({**load_file(shard), first: state[first]}, shard)
    with pytest.raises(WanmoeError, match="is in another shard too"):
        load_dit(folder, CONFIG)


def test_the_hash_is_that_of_the_bytes(state, tmp_path):
    file = tmp_path / "one.safetensors"
    save_file(state, file)
    assert dit_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    folder = write_shards(tmp_path / "dit", state, index=True)
    before = dit_hash(folder)
    assert len(before) == 64 and before != dit_hash(file)
    assert before == dit_hash(folder / "diffusion_pytorch_model-00001-of-00003.safetensors")
    shard = folder / "diffusion_pytorch_model-00003-of-00003.safetensors"
    changed = load_file(shard)
    next(iter(changed.values())).view(-1)[0] += 1
    save_file(changed, shard)
    assert dit_hash(folder) != before


def test_a_model_is_read_once_and_never_a_second_time_in_memory(state, tmp_path, watch_reads):
    """Also while other LoRAs are merged into it and its dtype is changed."""
    save_file(state, path := tmp_path / "dit.safetensors")
    name = "blocks.0.self_attn.q"
    width = state[f"{name}.weight"].shape[0]
    write_lora(tmp_path / "lora.safetensors", {name: (torch.ones(2, width), torch.ones(width, 2))})
    read = watch_reads(weights)
    specs = [LoRASpec(tmp_path / "lora.safetensors", 0.5)]
    dit = load_dit(path, dtype=torch.bfloat16, loras=specs)
    assert sorted(read) == sorted(state)
    merged = (state[f"{name}.weight"] + 0.5 * 2).bfloat16()
    assert torch.equal(dit.get_parameter(f"{name}.weight"), merged)
