"""The same command on a laptop, a GPU box or several nodes: re-runs itself under the deepspeed launcher."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
import torch

from ..moe_lora import WanmoeError
from .config import LaunchConfig


def under_launcher() -> bool:
    """Whether this process is a rank that a launcher started."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(config: LaunchConfig, arguments: Sequence[str]) -> int:
    """Runs `wanmoe <arguments>` as the ranks of a DeepSpeed job and returns its exit code.

    SIGINT and SIGTERM go to the ranks alone, which save and end by themselves: DeepSpeed's launcher would
    kill them one after the other and report a failure. So the job has a session of its own, out of Ctrl-C's
    reach.
    """
    job = subprocess.Popen(command(config, arguments), env=environment(config), start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        ranks = local_rank_processes(job.pid)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        if not ranks:
            os.killpg(job.pid, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return job.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def local_rank_processes(job: int) -> list[psutil.Process]:
    """The ranks that DeepSpeed's launcher has started under process `job` on this machine."""
    try:
        children = psutil.Process(job).children(recursive=True)
        found = [child for child in children if any("--local_rank=" in word for word in child.cmdline())]
        # A rank's reader processes are forks of it, with its command line.
        pids = {child.pid for child in found}
        return [child for child in found if child.ppid() not in pids]
    except psutil.NoSuchProcess:
        return []


def command(config: LaunchConfig, arguments: Sequence[str]) -> list[str]:
    """The deepspeed command line of a job."""
    deepspeed = shutil.which("deepspeed", path=os.path.dirname(sys.executable)) or shutil.which("deepspeed")
    if deepspeed is None:
        raise WanmoeError("the deepspeed command is not installed; run: pip install 'deepspeed>=0.19.8'")
    words = [sys.executable, deepspeed, "--log_level", "error", "--master_port", str(master_port(config))]
    if config.hostfile is not None:
        if not config.hostfile.is_file():
            raise WanmoeError(f"{config.hostfile}: no such hostfile; it holds lines like `host1 slots=8`")
        words += ["--hostfile", str(config.hostfile), "--master_addr", config.master_addr]
        if config.no_ssh:
            words += ["--no_ssh", "--node_rank", str(config.node_rank)]
        if config.include:
            words += ["--include", config.include]
    else:
        # Without this DeepSpeed would read /job/hostfile if the machine has one.
        words += ["--hostfile", os.devnull, "--num_gpus", str(local_ranks(config))]
    return [*words, "--module", "wanmoe.launch", *arguments]


def master_port(config: LaunchConfig) -> int:
    """The port where the ranks meet: as configured, else one that is free now; nodes need a fixed one."""
    if config.master_port or config.hostfile:
        return config.master_port or 29500
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_ranks(config: LaunchConfig) -> int:
    """Processes on this machine: as configured, one per GPU, or one."""
    return config.ranks or max(torch.cuda.device_count(), 1)


def environment(config: LaunchConfig) -> dict[str, str]:
    """The environment of the ranks: DeepSpeed's CPU accelerator where there is no GPU, and cores shared
    fairly."""
    env = dict(os.environ)
    # Our readers open files by themselves; nothing else of webdataset in a rank shall run a shell for a URL
    # or unpickle. For the ranks alone: a program that imports this package may use webdataset as it likes.
    env.setdefault("WDS_SECURE", "1")
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
        threads = max((os.cpu_count() or 1) // local_ranks(config), 1)
        env.setdefault("OMP_NUM_THREADS", str(threads))
    # ninja, which compiles DeepSpeed's shared-memory collectives at the first start, lies beside the
    # interpreter.
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", "")])
    return env
