"""What the launcher decides before and after a job; jobs themselves are in tests/train/test_launches.py."""

import os
import re
import shlex
import socket
import subprocess
import sys

import pytest

from wanmoe.launch import launcher
from wanmoe.launch.config import LaunchConfig
from wanmoe.moe_lora import WanmoeError
from wanmoe.train.watchdog import TRY_AGAIN


@pytest.mark.parametrize(
    ("ends", "restarts", "expected", "starts"),
    [
        ([(0, False)], 3, 0, 1),
        ([(TRY_AGAIN, False), (0, False)], 1, 0, 2),
        ([(-9, False), (137, False), (0, False)], 3, 0, 3),
        ([(TRY_AGAIN, False), (TRY_AGAIN, False)], 1, TRY_AGAIN, 2),
        ([(247, False)], 0, TRY_AGAIN, 1),
        ([(2, False)], 3, 2, 1),  # a fault of the user's: it would come again
        ([(1, False)], 3, 1, 1),
        ([(TRY_AGAIN, True)], 3, TRY_AGAIN, 1),  # told to stop
        ([(-15, True)], 3, -15, 1),
    ],
)
def test_only_a_job_that_lost_a_rank_is_started_again(monkeypatch, capsys, ends, restarts, expected, starts):
    left = list(ends)
    monkeypatch.setattr(launcher, "_run", lambda config, arguments: left.pop(0))
    assert launcher.launch(LaunchConfig(restarts=restarts), []) == expected
    assert left == []
    told = capsys.readouterr().err.splitlines()
    assert len(told) == starts - 1
    for number, line in enumerate(told, 1):
        assert "the job lost a rank (killed by SIGKILL)" in line or f"(exit code {TRY_AGAIN})" in line
        assert line.endswith(f"restart {number} of {restarts}")


@pytest.fixture
def hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("node-a slots=2\nnode-b slots=2\n")
    return path


def test_without_pdsh_the_other_ways_are_told(hosts, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WanmoeError, match="pdsh is not installed.*--no-ssh.*--slurm"):
        launcher.command(LaunchConfig(hostfile=hosts), [])


def test_a_node_that_is_not_in_the_hostfile_is_told(hosts):
    with pytest.raises(WanmoeError, match=r"launch.node_rank = 2: .*hosts has nodes 0 to 1"):
        launcher.command(LaunchConfig(hostfile=hosts, no_ssh=True, node_rank=2), [])


def test_the_ranks_meet_at_the_first_host(hosts):
    words = launcher.command(LaunchConfig(hostfile=hosts, no_ssh=True), ["train"])
    assert words[words.index("--master_addr") + 1] == "node-a"
    assert words[words.index("--master_port") + 1] == "29500"
    assert words[-3:] == ["--module", "wanmoe.launch", "train"]


def test_a_host_alone_that_is_not_this_machine_is_reached_by_pdsh(tmp_path, monkeypatch):
    (tmp_path / "pdsh").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("node-a slots=2\n")
    config = LaunchConfig(hostfile=tmp_path / "hosts")
    assert "--force_multi" in launcher.command(config, [])
    assert launcher.environment(config)["PDSH_SSH_ARGS_APPEND"].startswith("-o ServerAliveInterval=15")
    (tmp_path / "hosts").write_text(f"{socket.gethostname()} slots=2\n")
    assert "--force_multi" not in launcher.command(config, [])
    assert "PDSH_SSH_ARGS_APPEND" not in launcher.environment(config)


def test_a_restart_meets_at_another_port(hosts, monkeypatch):
    ports = []
    monkeypatch.setattr(
        launcher, "_run", lambda config, words: (ports.append(config.master_port), (TRY_AGAIN, False))[1]
    )
    launcher.launch(LaunchConfig(hostfile=hosts, no_ssh=True, restarts=2), [])
    assert ports == [None, 29501, 29502]  # 29500 is the first one's
    ports.clear()
    launcher.launch(LaunchConfig(restarts=1), [])
    assert ports == [None, None]  # a free one each time


def test_the_cards_that_are_visible_are_those_that_are_used(monkeypatch):
    """DeepSpeed's runner forgets CUDA_VISIBLE_DEVICES where it is given --num_gpus."""
    monkeypatch.setattr(launcher.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,7")
    words = launcher.command(LaunchConfig(), [])
    assert words[words.index("--include") + 1] == "localhost:2,3,7" and "--num_gpus" not in words
    words = launcher.command(LaunchConfig(ranks=2), [])
    assert words[words.index("--include") + 1] == "localhost:2,3"
    with pytest.raises(WanmoeError, match="launch.ranks = 4: CUDA_VISIBLE_DEVICES = '2,3,7' has fewer cards"):
        launcher.command(LaunchConfig(ranks=4), [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    with pytest.raises(WanmoeError, match="takes numbers alone"):
        launcher.command(LaunchConfig(ranks=2), [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "--num_gpus" in launcher.command(LaunchConfig(), [])


def test_ranks_are_found_beside_a_process_that_has_ended():
    """One that nobody has waited for yet: a zombie has no command line."""
    rank = "import time; time.sleep(600)"
    parent = f"""
import subprocess, sys
ended = subprocess.Popen([sys.executable, "-c", ""])
rank = subprocess.Popen([sys.executable, "-c", {rank!r}, "--local_rank=0"])
import os
os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
print(rank.pid, flush=True)
input()
rank.kill()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", parent], **pipes) as job:
        pid = int(job.stdout.readline())
        assert [one.pid for one in launcher.local_rank_processes(job.pid)] == [pid]
        job.communicate("\n")
    assert launcher.local_rank_processes(job.pid) == []


@pytest.mark.parametrize(
    "word",
    [
        "plain",
        "two words",
        'a "quote"',
        '["a", "b"]',
        '"a"',
        "$HOME",
        "$HOME is",
        "`ls` x",
        "it's",
        r"a\b c",
        "50%n",
        "5 %",
    ],
)
def test_words_pass_the_shells_of_other_hosts(word):
    """By what DeepSpeed's PDSHRunner.parse_user_args does to them on the way."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    class Arguments:
        user_script, user_args = "x", [launcher.for_pdsh(word)]

    sent = " ".join(PDSHRunner(Arguments, "").user_arguments)
    echoed = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {sent}"], capture_output=True, text=True, check=True
    )
    # pdsh has filled in the number of the host before.
    assert re.sub("%([nhu%])", lambda at: {"%": "%"}.get(at[1], "0"), echoed.stdout) == word + "\n", (
        shlex.quote(sent)
    )
