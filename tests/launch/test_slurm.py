"""What is asked of Slurm, and what a task learns from it; a job under a stand-in is in
tests/train/test_launches.py."""

import os
import sys

import pytest

from wanmoe.launch import slurm
from wanmoe.launch.config import LaunchConfig
from wanmoe.launch.launcher import environment, local_ranks
from wanmoe.moe_lora import WanmoeError


@pytest.fixture
def allocation(tmp_path, monkeypatch):
    """Two nodes of eight cards, by a scontrol that knows them."""
    for name, text in {"srun": "", "scontrol": "echo node07; echo node08"}.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[07-08]")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    return tmp_path


def test_one_task_per_card_on_every_node(allocation, monkeypatch):
    # Not as many as the allocation's script has tasks, which srun would take.
    monkeypatch.setenv("SLURM_NTASKS", "2")
    words = slurm.command(LaunchConfig(slurm=True), ["train", "--config", "a.toml"], "wanmoe.launch")
    assert words[:3] == ["srun", "--kill-on-bad-exit=1", "--wait=0"]
    assert words[3:6] == ["--nodes=2", "--ntasks=16", "--ntasks-per-node=8"]
    assert words[6:] == [sys.executable, "-u", "-m", "wanmoe.launch", "train", "--config", "a.toml"]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert "--cpus-per-task=12" in slurm.command(LaunchConfig(slurm=True), [], "wanmoe.launch")
    assert "--ntasks-per-node=2" in slurm.command(LaunchConfig(slurm=True, ranks=2), [], "wanmoe.launch")


def test_all_tasks_meet_at_the_first_node(allocation):
    config = LaunchConfig(slurm=True)
    env = environment(config)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node07", "30067")
    assert local_ranks(config) == 8
    # This machine may be a login node: that it has no GPU is not the ranks' affair.
    assert env.keys() - os.environ.keys() == {"MASTER_ADDR", "MASTER_PORT", slurm.MARK}
    given = environment(LaunchConfig(slurm=True, master_addr="ib-node07", master_port=4000))
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("ib-node07", "4000")


def test_the_number_of_cards_is_what_slurm_says_or_is_asked_for(allocation, monkeypatch):
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    with pytest.raises(WanmoeError, match="give the number of its ranks as --ranks"):
        slurm.hosts_of(LaunchConfig(slurm=True))
    assert slurm.hosts_of(LaunchConfig(slurm=True, ranks=3)) == {"node07": 3, "node08": 3}
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "a100:4")
    assert slurm.hosts_of(LaunchConfig(slurm=True)) == {"node07": 4, "node08": 4}


@pytest.mark.parametrize("lacks", ["SLURM_JOB_ID", "srun"])
def test_outside_of_an_allocation_it_is_told_where_to_run(allocation, monkeypatch, lacks):
    if lacks == "srun":
        monkeypatch.setenv("PATH", str(allocation / "none"))
    else:
        monkeypatch.delenv(lacks)
    with pytest.raises(WanmoeError, match="within an allocation: run it in a script for sbatch"):
        slurm.command(LaunchConfig(slurm=True), [], "wanmoe.launch")


def test_a_scontrol_that_fails_is_one_line(allocation):
    (allocation / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(WanmoeError, match=r"cannot ask scontrol for the hosts of 'node\[07-08\]'"):
        slurm.hosts_of(LaunchConfig(slurm=True))


PLACE = {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)"}
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture
def place(monkeypatch):
    for name in (*RANK, slurm.MARK):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)


def test_a_task_of_ours_takes_its_place(place, monkeypatch):
    monkeypatch.setenv(slurm.MARK, "1")
    slurm.take_place()
    assert [os.environ[name] for name in RANK] == ["11", "3", "16", "8"]


def test_the_script_of_a_job_is_no_rank(place):
    """It has a SLURM_PROCID, too."""
    slurm.take_place()
    assert not set(RANK) & set(os.environ)
