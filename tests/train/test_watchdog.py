"""A rank that dies, hangs or ends alone ends the others, with its name."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from wanmoe.moe_lora import WanmoeError
from wanmoe.train import watchdog
from wanmoe.train.watchdog import TRY_AGAIN, Watchdog, check_unused, read_sign


def a_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def pair(tmp_path):
    """Two watchdogs of one job in one process; what they would end it with."""
    told = []
    dogs = [Watchdog(tmp_path, rank, 2, "job", 60.0, told.append) for rank in (0, 1)]
    yield dogs, told
    for dog in dogs:
        dog.close()


def change(folder, rank, **fields):
    path = folder / f"{rank}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_all_there(pair):
    (first, second), _ = pair
    assert first.lost() is None and second.lost() is None


def test_a_dead_process_of_this_machine_is_named_at_once(pair, tmp_path):
    (first, _), _ = pair
    change(tmp_path, 1, pid=a_dead_process(), step=7)
    assert re.fullmatch(r"rank 1 \(process \d+ on .+\) is gone; it was at step 7", first.lost())


def test_another_process_of_the_same_number_is_not_the_rank(pair, tmp_path):
    (first, _), _ = pair
    change(tmp_path, 1, born=1.0)
    assert "rank 1" in first.lost()


def test_a_rank_of_another_machine_is_gone_when_its_counter_stands_still(pair, tmp_path, monkeypatch):
    (first, _), _ = pair
    now = 1000.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    change(tmp_path, 1, host="node-b", count=5)
    assert first.lost() is None
    now += watchdog.SILENT + 1
    assert "on node-b) is gone" in first.lost()
    change(tmp_path, 1, count=6)
    assert first.lost() is None


def test_a_rank_that_ended_well_is_not_lost_and_one_with_an_error_says_it(pair, tmp_path):
    (first, _), _ = pair
    change(tmp_path, 1, ended="", pid=a_dead_process())
    assert first.lost() is None
    change(tmp_path, 1, ended="disk full")
    assert first.lost().endswith("has ended: disk full")


def test_signs_of_an_earlier_job_count_for_nothing(pair, tmp_path):
    (first, _), _ = pair
    change(tmp_path, 1, attempt="before", pid=a_dead_process())
    assert first.lost() is None


def test_a_folder_in_use_is_refused_and_one_that_was_left_is_not(tmp_path):
    dog = Watchdog(tmp_path / "ranks", 0, 1, "job", 60.0)
    with pytest.raises(WanmoeError, match=r"rank 0 \(process \d+ on .* is at work there; wait for it"):
        check_unused(tmp_path / "ranks")
    change(tmp_path / "ranks", 0, pid=a_dead_process())
    check_unused(tmp_path / "ranks")
    change(tmp_path / "ranks", 0, host="node-b")
    with pytest.raises(WanmoeError, match="on node-b"):
        check_unused(tmp_path / "ranks")
    change(tmp_path / "ranks", 0, host="node-b", wall=time.time() - 3600)
    check_unused(tmp_path / "ranks")
    dog.close()
    check_unused(tmp_path / "ranks")
    assert read_sign(tmp_path / "ranks", 0).ended == ""


@pytest.fixture
def endless(config):
    config["train"] |= {"steps": 10**6, "global_batch": 2, "save_every": 2}
    return config


def wait_for_step(process, step):
    until = time.monotonic() + 120
    while f"step {step}: loss" not in (process.log.read_text() if process.log.exists() else ""):
        assert process.is_alive() and time.monotonic() < until
        process.join(timeout=0.05)


def test_a_killed_rank_ends_the_others_with_its_name(ranks, endless, tmp_path):
    started = ranks.start(endless, 2)
    wait_for_step(started[0], 5)
    pid = started[1].pid
    started[1].kill()
    codes, text = ranks.join(started)
    assert codes == [TRY_AGAIN, -signal.SIGKILL], text[-3000:]
    assert f"rank 1 (process {pid} on " in text and "the same command goes on from the last save" in text
    # It does, and the signs of the dead do not hinder it.
    endless["train"]["steps"] = 10**6
    (again, other) = ranks.start(endless, 2)
    until = time.monotonic() + 120
    while "resuming" not in (again.log.read_text() if again.log.exists() else ""):
        assert again.is_alive() and time.monotonic() < until
        again.join(timeout=0.05)
    for process in (again, other):
        os.kill(process.pid, signal.SIGTERM)
    codes, text = ranks.join([again, other])
    assert codes == [0, 0] and "stopped by signal at step" in text


@pytest.mark.parametrize("how", ["stopped", "asleep", "lock"])
def test_a_rank_that_hangs_ends_the_job_with_its_name_and_stacks(ranks, endless, tmp_path, how):
    """One is frozen from outside, one sleeps, one never gives its lock to another thread."""
    endless["train"]["timeout"] = 10.0
    hang = {"stopped": "os.kill(os.getpid(), signal.SIGSTOP)", "asleep": "time.sleep(600)", "lock": LOCKED}[
        how
    ]
    code = f"""
import os, signal, time
step = trainer.train_step
def hanging(side):
    if trainer.rank == 1 and trainer.step == 4:
        {hang}
    return step(side)
trainer.train_step = hanging
trainer.fit()
"""
    started = ranks.start(endless, 2, code=code)
    started[0].join(timeout=120)
    for process in started[1:]:  # a frozen one cannot end itself; the launcher kills what is left
        process.join(timeout=30 if how == "asleep" else 1)
        process.kill()
    codes, text = ranks.join(started)
    assert codes[0] == TRY_AGAIN, text[-3000:]
    assert "no step for 10 s (train.timeout)" in text
    told = re.search(r"first those that wait for nobody: (.*?);", text)[1]
    assert told.startswith("rank 1 ")
    assert ("at step 4 in hanging" if how == "asleep" else "silent for") in told
    stacks = (tmp_path / "run" / "ranks" / "0-stacks.txt").read_text()
    assert "train_step" in stacks


LOCKED = "import re; re.match(r'(a+)+b', 'a' * 60)"


def test_a_second_job_on_the_same_folder_is_refused(ranks, endless):
    started = ranks.start(endless, 1)
    wait_for_step(started[0], 2)
    text = ranks.fail(endless, 1)
    assert "is at work there; wait for it, stop it, or choose another train.run" in text
    os.kill(started[0].pid, signal.SIGTERM)
    assert ranks.join(started)[0] == [0]
