"""`wanmoe bench engine`: its formulas against real ranks, the prefix against the full graph, and its page."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from wanmoe.launch import bench
from wanmoe.launch.bench_engine import TINY, _stage_b, bench_engine, deep, modelled, write_result
from wanmoe.launch.bench_engine_bytes import gathers, meta_model
from wanmoe.launch.bench_engine_jobs import run_subjects
from wanmoe.launch.bench_engine_prefix import QUICK, Step, Variant, calls, measure_prefix, saved_bytes
from wanmoe.launch.bench_engine_tables import tables
from wanmoe.launch.config import parse_config
from wanmoe.moe_lora import AdapterConfig, WanmoeError
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.train.zero import deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def done():
    """(result, lines) of the bytes and the speed on two real ranks, at the smallest sizes."""
    said = []
    argv = ["wanmoe", "bench", "engine", "--quick"]
    return bench_engine(["bytes", "speed"], 2, CPU, quick=True, argv=argv, say=said.append), said


def test_the_formulas_are_what_real_ranks_hold_and_move_to_the_byte(done):
    result, said = done
    assert [row["stage"] for row in result["measured"]] == [0, 1, 3, 3]
    for row in result["measured"]:
        assert row["steps_alike"] and len(row["measured"]) == 2
        for rank in row["measured"]:
            expected = {key: row["modelled"][key] for key in rank if key != "rest"}
            assert {key: value for key, value in rank.items() if key != "rest"} == expected
            # All other tensors of the process: the clip and its text, gates, rotary tables.
            assert rank["rest"] < 100_000
        assert row["equal"]
    whole, sharded = result["measured"][0]["modelled"], result["measured"][2]["modelled"]
    assert sharded["frozen"] * 2 == whole["frozen"]
    assert sharded["gathered"] >= whole["frozen"] and whole["gathered"] == 0
    assert said[0] == "ZeRO 0, 1, 3 on 2 ranks (CPU)"
    # In A14B's proportions some blocks of the tail are released, and gathered again in the backward.
    deeper = result["measured"][3]
    assert deeper["subject"] == "tiny, 12 blocks"
    assert deeper["modelled"]["gathered"] > 2 * deeper["modelled"]["frozen"] + deeper["modelled"]["resident"]


def test_a_step_is_timed_as_it_is_and_in_parts(done):
    result, _ = done
    assert result["no_gpu"] and len(result["speed"]) == 4
    for row in result["speed"]:
        parts = row["apart"]
        assert parts["compute"] > 0 and parts["loader"] > 0 and parts["reduce"] > 0
        assert (parts["gather"] > 0) == (row["stage"] > 0)
        summed = sum(parts[key] for key in ("compute", "gather", "reduce", "loader"))
        assert summed == pytest.approx(parts["whole"])
        assert row["tokens_per_s"] == pytest.approx(2 * 3 * 8 * 8 / row["step_s"])


def test_within_the_distance_of_reuse_nothing_is_released():
    subject = deep()
    config = parse_config(subject.config(Path(), 3), "test")
    model = meta_model(subject.sizes, config.adapter, config)
    settings = deepspeed_config(
        config, model.module.dit, model.trainable, stage=3, bf16=True, world=2, local=2
    )["zero_optimization"]
    block = sum(p.numel() for p in model.module.dit.blocks[0].parameters())
    once, most = gathers(model, settings | {"stage3_max_reuse_distance": 10**9}, 2)
    again, least = gathers(model, settings | {"stage3_max_reuse_distance": 0}, 2)
    # DeepSpeed's default is more than this whole model, prefix and all.
    assert most > 11.5 * block
    assert least < 3.2 * block and 1.1 * once < again < 1.2 * once


def test_a14b_is_modelled_from_its_own_modules():
    rows = modelled()
    assert {(row["models"], row["nodes"], row["zero"]) for row in rows} >= {
        (1, 1, "0"), (2, 1, "3"), (1, 2, "3"), (2, 2, "3, hpZ"),
    }  # fmt: skip
    by = {(row["models"], row["nodes"], row["zero"]): row for row in rows}
    whole, sharded = by[1, 1, "0"]["one_model"], by[1, 1, "3"]["one_model"]
    with torch.device("meta"):
        base = meta_model(WanConfig.preset("t2v-A14B"), AdapterConfig(), _stage_b())
    assert whole["frozen"] == 2 * base.base and whole["moments"] == 8 * base.trains
    assert whole["frozen"] / 8 <= sharded["frozen"] < whole["frozen"] / 7.9
    # Each block in the forward, and of the eight of the tail those that were released before the backward.
    block = 2 * sum(p.numel() for p in base.module.dit.blocks[0].parameters())
    assert 4.5 * block < sharded["gathered"] - whole["frozen"] < 5.5 * block
    assert 2.5 * block < sharded["peak"] < 3.5 * block
    near, far = by[1, 2, "3, hpZ"], by[1, 2, "3"]
    assert near["across"] < far["across"] / 100 and near["states"] > 2 * far["states"]
    assert by[2, 1, "3"]["deepspeed_estimate"] > 4 * by[2, 1, "3"]["states"]


def test_the_prefix_is_one_forward_and_the_same_loss():
    part = measure_prefix(QUICK, CPU)
    rows = {row["name"]: row for row in part["rows"]}
    assert part["adapted_from"] == 32
    prefix, full = rows["prefix"], rows["full graph"]
    assert prefix["forwards"] == full["forwards"] == [1] * 40
    assert prefix["backwards"] == [0] * 32 + [1] * 8 and full["backwards"] == [1] * 40
    again, over = rows["prefix, checkpointed"], rows["full graph, checkpointed"]
    assert again["forwards"] == [1] * 32 + [2] * 8 and over["forwards"] == [2] * 40
    assert again["backwards"] == prefix["backwards"] and over["backwards"] == [1] * 40
    assert len({row["loss"] for row in rows.values()}) == 1
    assert max(row["gradient_difference"] for row in rows.values()) < 1e-5
    assert all(len(row["seconds"]) == QUICK.rounds for row in rows.values())
    # Saved: eight blocks of forty, and what is there once; a checkpoint keeps a block's input alone.
    assert prefix["saved_bytes"] < 0.75 * full["saved_bytes"]
    assert again["saved_bytes"] < over["saved_bytes"] < 0.2 * full["saved_bytes"]


def test_a_wrong_gradient_would_be_seen():
    step = Step(dataclasses.replace(QUICK), CPU)
    prefix = Variant("prefix", full=False, checkpointing=False)
    with calls(step.dit) as (forwards, backwards):
        step(prefix)
    assert sum(forwards.values()) == 40 and sum(backwards.values()) == 8
    found = step.gradients()
    assert found.keys() == step.trained.keys() and all(bool(value.any()) for value in found.values())
    assert saved_bytes(step, prefix) > 0


def test_a_rank_that_fails_says_why(monkeypatch):
    broken = dataclasses.replace(TINY, adapter={"blocks": 9})
    with pytest.raises(WanmoeError, match=r"rank \d failed: .*adapter.blocks = 9 does not fit"):
        run_subjects([(broken, (0,))], 1, 1, 0)


def test_the_command_prints_its_tables_and_leaves_a_file(tmp_path):
    words = ["engine", "--parts", "prefix", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    called = CliRunner().invoke(bench.app, words)
    assert called.exit_code == 0, called.output
    (path,) = tmp_path.glob("engine/engine-*.json")
    result = json.loads(path.read_text())
    assert result["format"] == "wanmoe-bench-engine/1" and result["provenance"]["versions"]["torch"]
    assert tables(result)[0] in called.output and f"wrote {path}" in called.output.replace("\n", "")
    error = CliRunner().invoke(bench.app, ["engine", "--parts", "gather"]).exception
    assert isinstance(error, WanmoeError)
    assert str(error) == "bench engine has no part 'gather'; there are bytes, speed, prefix"


def test_a_result_is_a_file_of_plain_figures(done, tmp_path):
    result, _ = done
    path = write_result(result, tmp_path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert len(tables(result)) == 3 and "1.000000" in tables(result)[0]


def test_the_tables_of_the_page_are_those_of_the_committed_result():
    page = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    (name,) = set(re.findall(r"kernels/bench/results/[\w./-]+\.json", page))
    result = json.loads((ROOT / name).read_text())
    made = tables(result)
    assert len(made) == 4
    for text in made:
        assert text in page
    assert all(row["equal"] and row["steps_alike"] for row in result["measured"])
    assert result["modelled"] == json.loads(json.dumps(modelled()))
