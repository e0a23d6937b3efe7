"""A base read straight into the shards of ZeRO-3: the same values, and no rank holds the model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weight_files import open_weights
from wanmoe.moe_lora.wan.weights import load_dit, save_dit, to_diffusers
from wanmoe.train.model import open_shards

# What is in the shards of all ranks, put together, against the file; and what this rank read and held.
GATHERED = """
import deepspeed
side = trainer.sides[0]
loaded = side.shards.loaded if side.shards is not None else None
names = dict(side.dit.named_parameters())
whole = {}
with deepspeed.zero.GatheredParameters(list(names.values())):
    whole = {name: p.detach().double().sum().item() for name, p in names.items()}
    whole |= {name + "/first": p.detach().flatten()[-1].item() for name, p in names.items()}
result = {"whole": whole, "loaded": loaded and vars(loaded)}
"""


def told(path):
    """As GATHERED tells it, of the model loaded whole."""
    state = load_dit(path).state_dict()
    return {name: p.double().sum().item() for name, p in state.items()} | {
        f"{name}/first": p.flatten()[-1].item() for name, p in state.items()
    }


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
    ranks.run(config, world, code=GATHERED, result=str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    for name, value in told(path).items():
        assert found["whole"][name] == pytest.approx(value, rel=1e-12, abs=1e-12), name
    assert found["loaded"]["bytes_read"] <= found["loaded"]["bytes_whole"] / world + 4 * len(state)


def test_no_rank_holds_the_model(ranks, config, tmp_path):
    """125 MB on four ranks: what a rank holds at most is its part and one tensor beside it."""
    torch.manual_seed(0)
    dit = WanDiT(WanConfig(dim=384, ffn_dim=1024, num_heads=4, num_layers=16, text_dim=16, text_len=8))
    save_dit(dit, tmp_path / "model.safetensors")
    largest = max(p.numel() for p in dit.parameters()) * 4
    config["model"]["dit"] = str(tmp_path / "model.safetensors")
    text = ranks.run(config, 4, code=GATHERED, result=str(tmp_path / "found.json"))
    loaded = json.loads((tmp_path / "found.json").read_text())["loaded"]
    whole = loaded["bytes_whole"]
    assert whole > 100e6 and loaded["bytes_read"] == pytest.approx(whole / 4, rel=1e-3)
    # What is not freed at once, by the allocator or the collectives, is small beside the model.
    assert loaded["peak"] < whole / 4 + 2 * largest + 16e6
    assert "base read in shards: " in text


def test_bf16_shards_of_a_file_in_float32(ranks, config, base, tmp_path):
    config["train"] |= {"precision": "bf16", "steps": 2}
    ranks.run(config, 2, code=GATHERED, result=str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())["whole"]
    for name, value in load_dit(base, dtype=torch.bfloat16).state_dict().items():
        assert found[f"{name}/first"] == value.flatten()[-1].item(), name


def test_a_file_that_can_only_be_read_whole_is_told_and_loaded_whole(ranks, config, base, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(load_file(base), path, _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text(
        json.dumps({"num_heads": 2, "text_len": 8, "model_type": "t2v", "dim": 32})
    )
    config["model"]["dit"] = str(path)
    text = ranks.run(config, 2, code=GATHERED, result=str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["loaded"] is None and "can only be read whole" in text
    for name, value in told(path).items():
        assert found["whole"][name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


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
