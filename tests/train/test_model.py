"""The model of a run: its side of the boundary, the adapter it starts from, and data that does not fit it."""

import pytest
import torch

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora import AdapterConfig, RouterConfig, WanmoeError, attach, save_adapter
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.weights import dit_hash, load_dit
from wanmoe.train import ShardDataset
from wanmoe.train.model import check_shards_fit, file_hashes, load_model, side_range
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
    dit, adapter = load_model(made)
    assert adapter.config.blocks == 2 and dit.first_adapted == 1
    found = {name: value for name, value in file_hashes(made).items() if value}
    assert found == {"base_sha256": dit_hash(made.model.dit), "adapter_sha256": dit_hash(saved)}


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
    made = parsed(config, model=other, train={"stage": "b"})
    with pytest.raises(WanmoeError, match="it was trained on base"):
        file_hashes(made)
    made.model.any_base = True
    assert len(file_hashes(made)["adapter_sha256"]) == 64


def test_pretrain_starts_from_the_seed(config):
    made = parsed(
        {name: value for name, value in config.items() if name != "model"}, model={"preset": "tiny"}
    )
    made.train.stage = "pretrain"
    first, adapter = load_model(made)
    again, _ = load_model(made)
    assert adapter is None and set(file_hashes(made).values()) == {""}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_shards_of_another_text_encoder_are_refused(base, shards, tmp_path):
    dit = load_dit(base)
    check_shards_fit(dit, ShardDataset(shards))
    dit.config = type(dit.config)(**{**vars(dit.config), "text_dim": 64})
    with pytest.raises(WanmoeError, match="text embeddings are 16 wide, the model reads 64"):
        check_shards_fit(dit, ShardDataset(shards))
    dit.config = WanConfig.preset("t2v-A14B")
    with pytest.raises(WanmoeError, match="encoded with the stand-in 'test', which this model does not know"):
        check_shards_fit(dit, ShardDataset(shards))


@pytest.mark.parametrize(
    ("stage", "router", "words"),
    [
        ("a", {"mode": "learned"}, "stage a trains no router and its adapter has none"),
        ("b", {"mode": "learned"}, "stage b trains no router and its adapter has none"),
        ("c", {}, "a router is to be trained; set router.mode = 'learned'"),
    ],
)
def test_a_router_that_nobody_trains_is_refused(config, saved, stage, router, words):
    model = {"adapter": str(saved), "noise_expert": "low"}
    with pytest.raises(WanmoeError, match=words):
        load_model(parsed(config, model=model, train={"stage": stage}, router=router))


BANDS = "bands [[0.0, 0.0], [0.2, 0.5], [0.6, 1.0]]"


@pytest.mark.parametrize(
    ("train", "router", "of_the_file", "expected"),
    [
        ({}, {}, {}, "bands [[0.0, 1.0]], floor 0.5"),
        ({"train_router": True}, {"mode": "learned"}, {}, "bands [[0.0, 1.0]], floor 0.5"),
        ({"freeze_base": True}, {}, {}, f"{BANDS}, floor 0"),
        ({}, {"bands": [[0.0, 1.0]]}, {}, "bands [[0.0, 1.0]], floor 0"),
        ({}, {"bands": [[0.0, 0.0], [0.2, 0.5], [0.6, 1.0]]}, {}, f"{BANDS}, floor 0"),  # but said
        ({}, {"floor": 0.2}, {}, f"{BANDS}, floor 0.2"),
        ({}, {"time_gate": "learned"}, {}, "learned, floor 0"),
        ({}, {"time_gate": "contrast", "contrast": [[0.5, 0.1]]}, {}, "contrast [[0.5, 0.1]]"),
        ({}, {}, {"floor": 0.2}, f"{BANDS}, floor 0.2"),
        ({}, {}, {"time_gate": "learned"}, "learned, floor 0"),
    ],
)
def test_stage_b_has_its_own_loudness_where_nothing_else_is_said(
    config, base, tmp_path, train, router, of_the_file, expected
):
    adapter = attach(load_dit(base), AdapterConfig(blocks=2, ffn_blocks=1), RouterConfig(**of_the_file))
    train = {"stage": "b"} | train
    for stage in ("a", "b"):
        path = save_adapter(adapter, tmp_path / f"{stage}.safetensors", stage=stage, step=1)
        made = parsed(config, model={"adapter": str(path)}, train=train, router=router)
        own = expected if stage == "a" else RouterConfig(**of_the_file | router).loudness
        assert load_model(made)[1].router_config.loudness == own
    if not of_the_file:
        fresh = parsed(config, model={"adapter": None}, train=train, router=router)
        if not train.get("freeze_base"):
            assert load_model(fresh)[1].router_config.loudness == expected


def test_routing_settings_of_the_file_hold_unless_set(config, base, tmp_path):
    settings = RouterConfig(mode="learned", top_k=1, bands=((0.0, 1.0),))
    adapter = attach(load_dit(base), AdapterConfig(blocks=2, ffn_blocks=1), settings)
    path = save_adapter(adapter, tmp_path / "c.safetensors", stage="c", step=1)
    made = parsed(config, model={"adapter": str(path)}, train={"stage": "b"}, router={"temperature": 0.5})
    _, loaded = load_model(made)
    assert loaded.router_config == settings.model_copy(update={"temperature": 0.5})
    assert torch.equal(loaded.router.out.weight, adapter.router.out.weight)
    made = parsed(config, model={"adapter": str(path)}, train={"stage": "b"}, router={"mode": "rule"})
    with pytest.raises(WanmoeError, match="holds a learned router, which router.mode = 'rule' would drop"):
        load_model(
            parsed(config, model={"adapter": str(path)}, train={"stage": "b"}, router={"mode": "rule"})
        )
