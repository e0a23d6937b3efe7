"""docs/cluster.md: its commands are those that there are; its table is what plan and formulas say."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from wanmoe.launch import cli, doctor, train
from wanmoe.launch.bench_engine import _stage_b
from wanmoe.launch.bench_engine_bytes import meta_model, model_bytes
from wanmoe.launch.config import Config, machine_preset
from wanmoe.moe_lora import AdapterConfig
from wanmoe.moe_lora.needs import base_of
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.train import zero
from wanmoe.train.planner import Job, Planner, card_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
STARTS = r"^(?:deepspeed .* --module wanmoe\.launch|wanmoe) (.*?)(?: \|\| .*| &)?$"
COMMANDS = re.findall(STARTS, PAGE, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_one(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    (tmp_path / "a.toml").write_text(
        '[model]\ndit = "w"\n[data]\nshards = "s"\n[train]\nstage = "a"\nrun = "r"\n'
    )
    asked = []
    monkeypatch.setattr(train, "start", lambda path, words, machine: asked.append((words, machine)))
    monkeypatch.setattr(doctor, "examine", lambda launch, config, fake: asked.append((launch, fake)) or 0)
    monkeypatch.setattr("sys.argv", ["wanmoe"])
    typer.main.get_command(cli.app).main(shlex.split(words), standalone_mode=False)
    assert len(asked) == 1
    if "train" in words:
        given, machine = asked[0]
        assert machine == "a100-80g" and machine_preset(machine).is_file()
        assert ("--launch.hostfile" in given) == ("--hostfile" in words)
        assert ("--launch.node_rank" in given) == ("--node-rank" in words)


def test_there_are_commands_of_every_kind():
    assert len(COMMANDS) == 8
    for word in ("doctor", "train", "--hostfile", "--no-ssh", "--slurm", "--fake"):
        assert any(word in words for words in COMMANDS)


def test_the_table_of_machines_is_what_training_would_do(monkeypatch):
    (table,) = re.findall(r"^\| machine \|.*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    model = meta_model(WanConfig.preset("t2v-A14B"), AdapterConfig(), _stage_b())
    base, trainable = base_of(WanConfig.preset("t2v-A14B"), torch.bfloat16), model.trains
    assert base.whole == 2 * model.base
    wan, trains = WanConfig.preset("t2v-A14B"), ("base", "experts")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.strip().splitlines()[2:]]
    assert len(rows) == 6
    for machine, *cells in rows:
        *counts, memory = [int(number) for number in re.findall(r"\d+", machine)]
        nodes, local = counts if len(counts) == 2 else (1, counts[0])
        world = nodes * local
        monkeypatch.setenv("LOCAL_SIZE", str(local))
        for models, cell in enumerate(cells, 1):
            asked = [base] * models, trainable * models, world, int(memory * 10**9 / zero.FULL)
            job = Job("t2v-A14B", wan, models, AdapterConfig(), trains, (21, 32, 32), ranks=local)
            planner = Planner(job, card_of(f"{memory}GB"))
            plan = zero.make_plan("auto", *asked, beside=lambda planner=planner: planner.beside(True))
            assert ("in host memory" in cell) == plan.park
            assert (f"{plan.stream} of 40 blocks stream" in cell) == (plan.stream > 0)
            assert ("shards" in cell) == (plan.stage == 3)
            assert ("ZeRO-1" in cell) == (plan.stage == 1)
            assert ("once more within each node" in cell) == (plan.stage == 3 and nodes > 1)
            if plan.stage == 3:
                states = models * model_bytes(model, 3, world, local).states / 1e9
                assert f"{states:.1f} GB a rank" in cell


def test_the_keys_it_names_are_keys():
    named = re.findall(r"`(\w+)\.(\w+)(?: = [^`]*)?`", PAGE)
    known = {section: field.annotation.model_fields for section, field in Config.model_fields.items()}
    named = [(section, key) for section, key in named if section in known]
    assert len(named) > 5
    for section, key in named:
        assert key in known[section], f"{section}.{key}"
