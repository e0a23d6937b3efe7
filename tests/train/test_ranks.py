"""How ranks start: versions that are refused, and a rank without a launcher."""

import fcntl
import importlib.metadata
import os
import subprocess
import sys

import pytest
from torch.utils.file_baton import FileBaton

from wanmoe.moe_lora import WanmoeError
from wanmoe.train.ranks import alone_in, check_versions


@pytest.mark.parametrize(
    ("version", "fits"), [("0.19.7", False), ("0.9.20", False), ("0.19.8", True), ("1.0.0+x", True)]
)
def test_an_old_deepspeed_is_refused_with_the_command_that_mends_it(monkeypatch, version, fits):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if fits:
        check_versions()
    else:
        with pytest.raises(
            WanmoeError, match=r"deepspeed .* is too old; run: pip install 'deepspeed>=0.19.8'"
        ):
            check_versions()


def test_a_rank_alone_says_how_to_start():
    code = "from wanmoe.train.ranks import init_distributed; init_distributed()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "start with `wanmoe train` or the deepspeed launcher" in done.stderr


def test_the_lock_of_a_killed_compilation_goes_and_that_of_a_running_one_stays(tmp_path, capsys):
    (tmp_path / "main.o").touch()
    lock = FileBaton(str(tmp_path / "lock"))
    take = (
        "import sys; from torch.utils.file_baton import FileBaton; "
        f"baton = FileBaton({lock.lock_file_path!r}); print(baton.try_acquire(), flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", take], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as compiler:
        assert compiler.stdout.readline() == "True\n"
        with alone_in(tmp_path):
            assert not lock.try_acquire()
        compiler.kill()
        compiler.wait()
    with alone_in(tmp_path):
        assert lock.try_acquire()
    assert capsys.readouterr().err.count("the process that compiled there is gone") == 1
    assert (tmp_path / "main.o").exists()


def test_one_process_at_a_time_builds_and_a_killed_one_holds_nobody_up(tmp_path):
    build = (
        "import pathlib, sys, time; from wanmoe.train.ranks import alone_in\n"
        f"with alone_in(pathlib.Path({str(tmp_path)!r})):\n print('in', flush=True); sys.stdin.readline()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", build], **pipes) as first:
        assert first.stdout.readline() == "in\n"
        guard = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first.kill()
        first.wait()
    fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(guard)
