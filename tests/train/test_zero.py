"""The stage that a job runs under, and settings derived from the model (traps B2, B8, B15)."""

import itertools

import pytest
import torch

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora import AdapterConfig, WanmoeError, attach
from wanmoe.moe_lora.needs import Base, on_card, spread
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import load_dit
from wanmoe.train.zero import SHARE, deepspeed_config, make_plan


def test_settings_on_a14b_keep_adapters_resident_and_prefetch_one_block(config):
    with torch.device("meta"):
        dit = WanDiT(WanConfig.preset("t2v-A14B"))
    trainable = attach(dit).train_only(("experts",))
    parsed = parse_config(config, "test")
    made = deepspeed_config(parsed, dit, trainable, stage=3, bf16=True, world=1)
    found = made["zero_optimization"]
    largest = max(p.numel() for p in trainable.values())
    assert found["stage3_param_persistence_threshold"] == largest == 4 * 13824 * 4
    assert largest < 5120 * 5120
    assert found["stage3_prefetch_bucket_size"] >= 351_394_304
    assert found["reduce_bucket_size"] == sum(p.numel() for p in trainable.values())


def test_any_deepspeed_key_can_be_overridden(config, base):
    config["deepspeed"] = {
        "config": {"zero_optimization": {"stage3_max_live_parameters": 7}, "wall_clock_breakdown": True}
    }
    dit = load_dit(base)
    trainable = attach(dit, AdapterConfig(blocks=2)).parameters()
    found = deepspeed_config(parse_config(config, "test"), dit, trainable, stage=3, bf16=False, world=1)
    assert found["zero_optimization"]["stage3_max_live_parameters"] == 7
    assert found["zero_optimization"]["stage"] == 3 and found["wall_clock_breakdown"]


def test_another_stage_under_deepspeeds_own_key_is_refused(config, base):
    config["deepspeed"] = {"zero": 1, "config": {"zero_optimization": {"stage": 2}}}
    dit = load_dit(base)
    trainable = attach(dit, AdapterConfig(blocks=2)).parameters()
    with pytest.raises(WanmoeError, match="set deepspeed.zero = 2"):
        deepspeed_config(parse_config(config, "test"), dit, trainable, stage=1, bf16=False, world=1)


@pytest.mark.parametrize(("local", "world", "group"), [(8, 16, 8), (8, 8, None), (1, 2, None), (8, 12, None)])
def test_on_several_nodes_frozen_shards_are_kept_within_each(monkeypatch, config, base, local, world, group):
    monkeypatch.setenv("LOCAL_SIZE", str(local))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    dit = load_dit(base)
    trainable = attach(dit, AdapterConfig(blocks=2)).parameters()
    made = deepspeed_config(parse_config(config, "test"), dit, trainable, stage=3, bf16=False, world=world)
    assert made["zero_optimization"].get("zero_hpz_partition_size") == group


GB = 10**9
BLOCK = 702_788_608
BASE = Base(28_577_000_000 - 40 * BLOCK, BLOCK, 40)  # bytes of one A14B model in bf16


@pytest.mark.parametrize(
    ("models", "world", "memory", "stage", "park"),
    [
        ([BASE], 8, 80 * GB, 1, False),
        ([BASE], 1, 80 * GB, 0, False),
        ([BASE], 8, 40 * GB, 3, False),
        ([BASE, BASE], 16, 80 * GB, 3, False),
        ([BASE, BASE], 1, 80 * GB, 0, True),
        ([BASE, BASE], 8, 140 * GB, 1, False),
        ([BASE, BASE], 1, 40 * GB, 0, True),
        ([BASE], 1, 40 * GB, 0, False),
        ([BASE, BASE], 4, 24 * GB, 3, False),
    ],
)
def test_whole_copies_where_they_fit_and_shards_where_they_do_not(models, world, memory, stage, park):
    plan = make_plan("auto", models, 0, world, memory)
    assert (plan.stage, plan.park) == (stage, park)
    assert f"ZeRO-{stage}" in plan.why and f"{memory / 1e9:.3g} GB a rank" in plan.why
    assert make_plan(2, models, 0, world, memory).stage == 2


@pytest.mark.parametrize(
    ("models", "world", "memory", "cards"),
    [([BASE], 1, 24 * GB, 2), ([BASE, BASE], 1, 24 * GB, 4), ([BASE, BASE], 2, 24 * GB, 4)],
)
def test_what_does_not_fit_is_refused_with_the_number_of_cards_that_do(models, world, memory, cards):
    with pytest.raises(WanmoeError, match=f"GB a rank do not fit: .* or at least {cards} such cards"):
        make_plan("auto", models, 0, world, memory, ring=0)
    assert make_plan("auto", models, 0, cards, memory, ring=0).stage == 3


@pytest.mark.parametrize(
    ("models", "world", "memory", "stream"),
    [([BASE], 1, 24 * GB, 23), ([BASE, BASE], 1, 24 * GB, 32), ([BASE, BASE], 2, 24 * GB, 32)],
)
def test_blocks_stream_where_nothing_else_fits_and_no_more_than_must(models, world, memory, stream):
    plan = make_plan("auto", models, 0, world, memory)
    assert (plan.stage, plan.stream, plan.park) == (min(world - 1, 1), stream, False)
    assert f"{stream} of 40 blocks stream from" in plan.why
    assert on_card(models, stream, 2) <= SHARE * memory < on_card(models, stream - 1, 2)
    assert make_plan("auto", models, 0, 4, 80 * GB, ring=5).stream == 5
    with pytest.raises(WanmoeError, match="ring.blocks = 41: the model has 40 blocks"):
        make_plan("auto", models, 0, world, memory, ring=41)


@pytest.mark.parametrize("beside", [1 * GB, 5 * GB, 12 * GB])
def test_what_a_step_takes_decides_where_it_is_known(beside):
    plan = make_plan("auto", [BASE, BASE], 0, 1, 24 * GB, beside=lambda: beside)
    assert on_card([BASE, BASE], plan.stream, 2) + beside <= 0.95 * 24 * GB
    assert on_card([BASE, BASE], plan.stream - 1, 2) + beside > 0.95 * 24 * GB
    both = make_plan("auto", [BASE, BASE], 0, 1, 80 * GB, beside=lambda: beside)
    assert (both.park, both.stream) == (False, 0)
    assert make_plan("auto", [BASE, BASE], 0, 1, 80 * GB, beside=lambda: 20 * GB).park
    with pytest.raises(WanmoeError, match="do not fit"):
        make_plan("auto", [BASE], 0, 1, 24 * GB, beside=lambda: 24 * GB)


def test_a_small_model_on_long_clips_streams_too():
    """Its weights are a small part of the card, and what a step takes is most of it."""
    small = Base(BASE.rest // 10, BLOCK // 10, 40)
    assert make_plan("auto", [small], 0, 1, 24 * GB).stream == 0
    plan = make_plan("auto", [small], 0, 1, 24 * GB, beside=lambda: 21 * GB)
    assert plan.stream > 0 and on_card([small], plan.stream, 2) + 21 * GB <= 0.95 * 24 * GB


def test_shards_are_taken_only_where_a_step_fits_beside_them():
    four = ("auto", [BASE, BASE], 0, 4, 24 * GB)
    assert make_plan(*four, beside=lambda: 4 * GB).stage == 3
    plan = make_plan(*four, beside=lambda: 9 * GB)
    assert plan.stage == 1 and plan.stream > 0
    with pytest.raises(WanmoeError, match="train.checkpointing = true, or other settings that `wanmoe plan"):
        make_plan(*four, beside=lambda: 22 * GB)


def test_a_quantised_base_is_never_sharded():
    small = Base(BASE.rest, BLOCK // 2, 40, unpacked=BLOCK)
    assert make_plan("auto", [small], 0, 8, 40 * GB, shardable=False) == make_plan(
        "auto", [small], 0, 8, 40 * GB, ring=0, shardable=False
    )
    assert make_plan("auto", [small, small], 0, 8, 24 * GB, shardable=False).stream == 23
    with pytest.raises(WanmoeError, match="do not fit"):
        make_plan("auto", [small, small], 0, 8, 24 * GB, ring=0, shardable=False)


@pytest.mark.parametrize("first", [0, 1, 20, 32, 40])
def test_streamed_blocks_lie_far_apart_and_those_of_the_prefix_come_first(first):
    for stream in range(41):
        chosen = spread(stream, first, 40)
        assert len(chosen) == stream and chosen <= set(range(40))
        prefix = sorted(i for i in chosen if i < first)
        assert len(prefix) == min(stream, first)
        gaps = [later - sooner for sooner, later in itertools.pairwise(prefix)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_base_that_trains_in_bf16_gets_masters():
    model = Base(GB // 2, GB // 80, 40)
    assert make_plan("auto", [model], 10**8, 1, 80 * GB, mixed=True).stage == 1
    with pytest.raises(WanmoeError, match="keeps no fp32 masters .* set it to 1"):
        make_plan(0, [model], 10**8, 1, 80 * GB, mixed=True)
