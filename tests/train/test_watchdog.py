"""A rank that dies, hangs or ends alone ends the others, with its name."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from wanmoe.moe_lora import WanmoeError
from wanmoe.train import watchdog
from wanmoe.train.config import TrainConfig
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
    change(tmp_path, 1, born=first.own.born + "0")
    assert "rank 1" in first.lost()


def test_a_clock_that_is_set_makes_no_process_another(pair, monkeypatch):
    (first, second), _ = pair
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)
    assert first.lost() is None and second.lost() is None


@pytest.mark.parametrize("boot", [watchdog.BOOT, Path("/nowhere")])
def test_a_process_is_told_from_others_while_it_lives(monkeypatch, boot):
    """Without /proc, psutil says it."""
    monkeypatch.setattr(watchdog, "BOOT", boot)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        born = watchdog.birth(process.pid)
        assert born == watchdog.birth(process.pid) is not None
        assert born != watchdog.birth(os.getpid())
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert watchdog.birth(process.pid) is None  # a zombie
    assert watchdog.birth(process.pid) is None


def test_a_rank_of_another_machine_is_gone_when_its_counter_stands_still(pair, tmp_path, monkeypatch):
    (first, _), _ = pair
    now = 1000.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    change(tmp_path, 1, host="node-b", machine="elsewhere", count=5)
    assert first.lost() is None
    now += watchdog.SILENT + 1
    assert "on node-b) is gone" in first.lost() and f"nothing to {tmp_path} for 60 s" in first.lost()
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


def test_a_sign_that_cannot_be_read_for_now_is_no_news(pair, tmp_path, monkeypatch):
    (first, _), _ = pair

    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, stale)
    assert read_sign(tmp_path, 1) is None and first.lost() is None


def test_a_sign_needs_no_room_once_it_is_there(pair, tmp_path):
    """On a disk that is full the others must not take this rank for gone."""
    (_, second), _ = pair
    path = tmp_path / "1.json"
    before = path.stat()
    for text in ("here", "in a function of a longer name", "x" * 10_000, ""):
        second.own.at, second.own.step = text, second.own.step + 1
        second._write()
        now = path.stat()
        assert (now.st_ino, now.st_size, now.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)
        assert read_sign(tmp_path, 1).step == second.own.step


def test_the_end_of_a_rank_is_told_whatever_the_disk_says(tmp_path, monkeypatch):
    dog = Watchdog(tmp_path, 0, 1, "job", 60.0)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dog, "_write", full)
    with pytest.raises(WanmoeError, match="the cause"):
        try:
            raise WanmoeError("the cause")
        finally:
            dog.close("the cause")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "ranks").write_text("")
    with pytest.raises(WanmoeError, match="ranks: could not be written .*choose another train.run"):
        Watchdog(tmp_path / "ranks", 0, 1, "job", 60.0)


def test_time_before_the_start_does_not_count(tmp_path, monkeypatch):
    now, told = 1000.0, []
    monkeypatch.setattr(watchdog, "INTERVAL", 0.005)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    ended = threading.Event()
    dog = Watchdog(tmp_path, 0, 1, "job", 60.0, lambda line: told.append(line) or ended.set())
    now += 3600
    dog.start()
    while dog.own.count < 5:
        dog._stop.wait(0.005)
    assert told == []
    now += 61
    assert ended.wait(60) and "no step for 60 s (train.timeout)" in told[0]
    dog.close()


def test_a_folder_in_use_is_refused_and_one_that_was_left_is_not(tmp_path):
    dog = Watchdog(tmp_path / "ranks", 0, 1, "job", 60.0)
    with pytest.raises(WanmoeError, match=r"rank 0 \(process \d+ on .* is at work there; wait for it"):
        check_unused(tmp_path / "ranks")
    change(tmp_path / "ranks", 0, pid=a_dead_process())
    check_unused(tmp_path / "ranks")
    change(tmp_path / "ranks", 0, host="node-b", machine="elsewhere", wall=time.time() - 3600)
    check_unused(tmp_path / "ranks")
    dog.close()
    check_unused(tmp_path / "ranks")
    assert read_sign(tmp_path / "ranks", 0).ended == ""


def watch_alone(run):
    return watchdog.watch_over(TrainConfig(stage="a", run=run, timeout=60), 0, 1)


def test_a_job_of_another_machine_that_fell_silent_is_waited_for(tmp_path, lone_group, monkeypatch, capsys):
    Watchdog(tmp_path / "ranks", 0, 1, "job", 60.0).close()
    now, slept = time.time(), []
    change(tmp_path / "ranks", 0, host="node-b", machine="elsewhere", ended=None, wall=now - 20)
    monkeypatch.setattr(watchdog.time, "time", lambda: now)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(watchdog.time, "sleep", slept.append)
    with watchdog.take(tmp_path / "ranks"):
        pass
    assert 39 < sum(slept) < 40 + 2 * watchdog.INTERVAL
    assert "on node-b) has left" in capsys.readouterr().err

    # It was only slow: its next sign comes.
    def beats(seconds):
        slept.append(seconds)
        change(tmp_path / "ranks", 0, count=len(slept))

    slept.clear()
    monkeypatch.setattr(watchdog.time, "sleep", beats)
    with pytest.raises(WanmoeError, match="on node-b. is at work there"), watchdog.take(tmp_path / "ranks"):
        pass
    assert len(slept) == 1
    # Long gone, nobody waits.
    change(tmp_path / "ranks", 0, wall=now - 61)
    slept.clear()
    with watchdog.take(tmp_path / "ranks"):
        pass
    assert slept == []


def test_of_two_jobs_that_start_at_once_one_gets_the_folder(tmp_path, lone_group):
    """The other has looked, and its sign is not there yet."""
    (asked, told), (go, end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        with watchdog.take(tmp_path / "ranks"):
            os.write(told, b"x")
            os.read(go, 1)
        os._exit(0)
    os.read(asked, 1)
    refused = f"ranks: process {child} on .* is at work there; wait for it, stop it"
    with pytest.raises(WanmoeError, match=refused), watch_alone(tmp_path):
        pass
    os.close(end)
    os.waitpid(child, 0)
    for _ in range(2):
        with (
            watch_alone(tmp_path),
            pytest.raises(WanmoeError, match="this process is at work there"),
            watch_alone(tmp_path),
        ):
            pass
    for pipe in (asked, told, go):
        os.close(pipe)


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
    hang = {"stopped": "os.kill(os.getpid(), signal.SIGSTOP)", "asleep": "time.sleep(600)", "lock": LOCKED}[
        how
    ]
    # The ten seconds count from where rank 1 hangs: not what a slow machine takes to come there.
    code = f"""
import os, signal, time
from pathlib import Path
hangs = Path({str(tmp_path)!r}, "hangs")
step = trainer.train_step
def hanging(side):
    if trainer.step == 4:
        if trainer.rank == 1:
            hangs.touch()
            {hang}
        while not hangs.exists():
            time.sleep(0.01)
        trainer.watchdog.timeout = 10.0
        trainer.watchdog.beat(4)
    return step(side)
trainer.train_step = hanging
trainer.fit()
"""
    started = ranks.start(endless, 2, code=code)
    started[0].join(timeout=300)
    for process in started[1:]:  # a frozen one cannot end itself; the launcher kills what is left
        process.join(timeout=60 if how == "asleep" else 1)
        process.kill()
    codes, text = ranks.join(started)
    assert codes == [TRY_AGAIN, TRY_AGAIN if how == "asleep" else -signal.SIGKILL], text[-3000:]
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
