"""What the launcher decides before and after a job; jobs themselves are in tests/train/test_launches.py."""

import shlex
import subprocess

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
        ([(TRY_AGAIN, False)], 0, TRY_AGAIN, 1),
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
    assert all("the job lost a rank (exit code" in line for line in told)


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


@pytest.mark.parametrize(
    "word",
    ["plain", "two words", 'a "quote"', '["a", "b"]', '"a"', "$HOME", "$HOME is", "`ls` x", "it's", r"a\b c"],
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
    assert echoed.stdout == word + "\n", shlex.quote(sent)
