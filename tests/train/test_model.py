"""The model of a run: its side of the boundary, the adapter it starts from, and data that does not fit it."""

import pytest
import torch

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora import AdapterConfig, Expert, RouterConfig, WanmoeError, attach, save_adapter
from wanmoe.moe_lora.wan.weights import dit_hash, load_dit
from wanmoe.train import ShardDataset
from wanmoe.train.batch import LabelGates
from wanmoe.train.model import check_text_width, load_model, side_range, unseen_experts
from wanmoe.train.stages import STAGES


def parsed(config, **sections):
    return parse_config(
        {name: config.get(name, {}) | sections.get(name, {}) for name in config | sections}, "t"
    )


@pytest.mark.parametrize(
    ("side", "stage", "asked", "expected"),
    [
        ("both", "a", None, (0.0, 1.0)),
        ("both", "b", None, (0.2, 1.0)),
        ("high", "b", None, (0.875, 1.0)),
        ("low", "b", None, (0.2, 0.875)),
        ("low", "b", [0.0, 1.0], (0.0, 0.875)),
        ("high", "a", [0.9, 0.95], (0.9, 0.95)),
    ],
)
def test_a_side_trains_its_own_noise_levels(config, side, stage, asked, expected):
    made = parsed(config, model={"noise_expert": side}, objective={"t_range": asked} if asked else {})
    assert side_range(made, STAGES[stage], 0.875) == expected


def test_a_range_outside_the_side_is_refused(config):
    made = parsed(config, model={"noise_expert": "high"}, objective={"t_range": [0.0, 0.5]})
    with pytest.raises(WanmoeError, match=r"leaves nothing of \[0.875, 1.0\], the side of the high"):
        side_range(made, STAGES["a"], 0.875)


@pytest.fixture
def saved(base, tmp_path):
    adapter = attach(load_dit(base), AdapterConfig(blocks=2, ffn_blocks=1))
    return save_adapter(
        adapter, tmp_path / "a.safetensors", stage="a", step=1, noise_expert="low", base_sha256=dit_hash(base)
    )


def test_the_next_stage_starts_from_the_file_and_its_experts(config, saved):
    made = parsed(config, model={"adapter": str(saved), "noise_expert": "low"}, train={"stage": "b"})
    dit, adapter, base_sha256 = load_model(made)
    assert adapter.config.blocks == 2 and dit.first_adapted == 1 and len(base_sha256) == 64


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("adapter", {"rank_q": 16}, r"adapter.rank_q = 16 but .*a.safetensors has 8"),
        ("adapter", {"experts": [{"name": "milk"}]}, r"adapter.experts"),
        ("model", {"noise_expert": "high"}, r"it belongs to the low noise expert, this model is high"),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(config, saved, section, change, words):
    model = {"adapter": str(saved), "noise_expert": "low"}
    sections = {"model": model, "train": {"stage": "b"}}
    sections[section] = sections.get(section, {}) | change
    with pytest.raises(WanmoeError, match=words):
        load_model(parsed(config, **sections))


def test_an_adapter_of_another_base_is_refused(config, saved, base, tmp_path):
    dit = load_dit(base)
    dit.head.head.weight.data.add_(1)
    from wanmoe.moe_lora.wan.weights import save_dit

    save_dit(dit, tmp_path / "other.safetensors")
    other = {"dit": str(tmp_path / "other.safetensors"), "adapter": str(saved), "noise_expert": "low"}
    with pytest.raises(WanmoeError, match="it was trained on base"):
        load_model(parsed(config, model=other, train={"stage": "b"}))


def test_pretrain_starts_from_the_seed(config):
    made = parsed(
        {name: value for name, value in config.items() if name != "model"}, model={"preset": "tiny"}
    )
    made.train.stage = "pretrain"
    first, adapter, base_sha256 = load_model(made)
    again, *_ = load_model(made)
    assert adapter is None and base_sha256 == ""
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_shards_of_another_text_encoder_are_refused(base, shards, tmp_path):
    dit = load_dit(base)
    check_text_width(dit, ShardDataset(shards))
    dit.config = type(dit.config)(**{**vars(dit.config), "text_dim": 64})
    with pytest.raises(WanmoeError, match="text embeddings are 16 wide, the model reads 64"):
        check_text_width(dit, ShardDataset(shards))


def test_experts_that_no_clip_shows_are_named(shards):
    experts = AdapterConfig(experts=(*AdapterConfig().experts, Expert(name="Stapler"))).expert_set
    assert unseen_experts(ShardDataset(shards), LabelGates(experts, RouterConfig(), True)) == ["Stapler"]
