"""A base read straight into the shards of ZeRO-3: the same values, and no rank holds the model."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weight_files import open_weights
from wanmoe.moe_lora.wan.weights import load_dit, save_dit, to_diffusers
from wanmoe.train.model import open_shards

# What is in the shards of all ranks, put together, and what each rank read and held, as rank 0 writes it.
GATHERED = """
import deepspeed
from safetensors.torch import save_file
side = trainer.sides[0]
loaded = [None] * trainer.world
torch.distributed.all_gather_object(loaded, vars(side.shards.loaded) if side.shards is not None else None)
names = dict(side.dit.named_parameters())
with deepspeed.zero.GatheredParameters(list(names.values())):
    if trainer.rank == 0:
        values = {name: p.detach().clone() for name, p in names.items()}
        save_file(values, %r, metadata={"loaded": json.dumps(loaded)})
"""


def gathered(ranks, config, world, tmp_path):
    """(what the ranks said, the parameters put together, what each rank read and held)."""
    path = tmp_path / "gathered" / "found.safetensors"
    path.parent.mkdir()
    text = ranks.run(config, world, code=GATHERED % str(path))
    with safe_open(path, framework="pt") as file:
        return text, load_file(path), json.loads(file.metadata()["loaded"])


def same(found, path, dtype=None):
    """Whether all parameters of the model loaded whole are there to the bit, beside those of the adapter."""
    state = load_dit(path, dtype=dtype).state_dict()
    return all(torch.equal(found[name], p) for name, p in state.items())


@pytest.mark.parametrize("layout", ["original", "diffusers", "torch", "shards"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_shards_hold_what_the_file_holds(ranks, config, base, tmp_path, layout, world):
    state = load_file(base)
    path = tmp_path / "model.safetensors"
    if layout == "torch":
        path = tmp_path / "model.pth"
        torch.save(state, path)
    elif layout == "shards":
        names = sorted(state)
        for part in (0, 1):
            piece = {name: state[name] for name in names[part::2]}
            save_file(piece, tmp_path / f"model-0000{part + 1}-of-00002.safetensors")
        path = tmp_path
    else:
        renamed = {to_diffusers(name) if layout == "diffusers" else name: p for name, p in state.items()}
        save_file(renamed, path)
    (tmp_path / "config.json").write_text(
        json.dumps({"num_heads": 2, "text_len": 8, "model_type": "t2v", "dim": 32})
    )
    config["model"]["dit"] = str(path)
    _, found, loaded = gathered(ranks, config, world, tmp_path)
    assert same(found, path)
    for rank in loaded:
        assert rank["bytes_read"] <= rank["bytes_whole"] / world + 4 * len(state)


def test_no_rank_holds_the_model(ranks, config, tmp_path):
    """125 MB on four ranks: what a rank holds at most is its part and one tensor beside it."""
    torch.manual_seed(0)
    dit = WanDiT(WanConfig(dim=384, ffn_dim=1024, num_heads=4, num_layers=16, text_dim=16, text_len=8))
    save_dit(dit, tmp_path / "model.safetensors")
    largest = max(p.numel() for p in dit.parameters()) * 4
    config["model"]["dit"] = str(tmp_path / "model.safetensors")
    text, found, loaded = gathered(ranks, config, 4, tmp_path)
    assert same(found, tmp_path / "model.safetensors")
    for rank in loaded:
        whole = rank["bytes_whole"]
        assert whole > 100e6 and rank["bytes_read"] == pytest.approx(whole / 4, rel=1e-3)
        # What is not freed at once, by the allocator or the collectives, is small beside the model.
        assert rank["peak"] < whole / 4 + 2 * largest + 16e6
    assert "base read in shards: " in text


def test_bf16_shards_of_a_file_in_float32(ranks, config, base, tmp_path):
    config["train"] |= {"precision": "bf16", "steps": 2}
    _, found, _ = gathered(ranks, config, 2, tmp_path)
    assert same(found, base, torch.bfloat16)


def test_a_file_that_can_only_be_read_whole_is_told_and_loaded_whole(ranks, config, base, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(load_file(base), path, _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text(
        json.dumps({"num_heads": 2, "text_len": 8, "model_type": "t2v", "dim": 32})
    )
    config["model"]["dit"] = str(path)
    text, found, loaded = gathered(ranks, config, 2, tmp_path)
    assert loaded == [None, None] and "can only be read whole" in text
    assert same(found, path)


def test_what_trains_whole_is_loaded_whole(config, base):
    config["train"] |= {"stage": "pretrain"}
    assert open_shards(parse_config(config, "test"), None, torch.device("cpu"), print) is None


@pytest.mark.parametrize("bounds", [(0, 1), (0, 24), (5, 6), (7, 19), (23, 24), (12, 12)])
def test_a_part_of_a_stored_tensor_is_that_of_the_whole(tmp_path, bounds):
    value = torch.arange(24.0).view(4, 3, 2)
    save_file({"x": value}, tmp_path / "x.safetensors")
    torch.save({"x": value}, tmp_path / "x.pth")
    for source in (tmp_path / "x.safetensors", tmp_path / "x.pth", {"x": value}):
        stored = open_weights(source).tensors["x"]
        assert torch.equal(stored.part(*bounds), value.flatten()[slice(*bounds)])
