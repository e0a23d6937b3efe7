"""The same command on a laptop, a GPU box or several nodes: re-runs itself under the deepspeed launcher."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil
import torch

from ..moe_lora import WanmoeError
from ..train.watchdog import TRY_AGAIN
from . import slurm
from .config import LaunchConfig
from .hosts import hosts_of

# Ctrl-C, a scheduler's end and its warning: all of them mean to save and end.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def under_launcher() -> bool:
    """Whether this process is a rank that a launcher started."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(config: LaunchConfig, arguments: Sequence[str]) -> int:
    """Runs `wanmoe <arguments>` as the ranks of a job and returns its exit code.

    A job that lost a rank is started again, `config.restarts` times at most; one that was told to stop, or
    whose config is at fault, is not. DeepSpeed 0.19.8 has no elastic training any more.
    """
    for left in range(config.restarts, -1, -1):
        code, told_to_stop = _run(config, arguments)
        lost = code == TRY_AGAIN or code > 128 or code < 0
        if not lost or told_to_stop or not left:
            break
        sys.stderr.write(
            f"wanmoe: the job lost a rank (exit code {code}); it starts again, "
            f"{left - 1} more {'time' if left == 2 else 'times'} if need be\n"
        )
    return code


def _run(config: LaunchConfig, arguments: Sequence[str]) -> tuple[int, bool]:
    """(exit code, whether it was told to stop) of one start.

    Signals go to the ranks alone, which save and end by themselves: DeepSpeed's launcher would kill them one
    after the other and report a failure. So the job has a session of its own, out of Ctrl-C's reach.
    """
    job = start(config, arguments)
    told_to_stop = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal told_to_stop
        told_to_stop = True
        ranks = local_rank_processes(job.pid)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        if over_pdsh(config):
            _stop_remote(config, arguments)
        elif config.slurm:
            job.send_signal(signal.SIGUSR1)  # which srun passes on; at SIGTERM it kills its tasks
        elif not ranks:
            os.killpg(job.pid, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in STOPS}
    try:
        return job.wait(), told_to_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(
    config: LaunchConfig, arguments: Sequence[str], module: str = "wanmoe.launch", **pipes: Any
) -> subprocess.Popen[Any]:
    """Starts ranks that run a module; in a session of their own.

    Raises:
        WanmoeError: a launcher that the config asks for is not there.
    """
    words, env = command(config, arguments, module), environment(config)
    return subprocess.Popen(words, env=env, start_new_session=True, **pipes)


def over_pdsh(config: LaunchConfig) -> bool:
    """Whether pdsh starts the ranks, on several hosts."""
    return config.hostfile is not None and not config.no_ssh and len(hosts_of(config)) > 1


def _stop_remote(config: LaunchConfig, arguments: Sequence[str]) -> None:
    """Tells the ranks of the first host to stop: what one is told they all hear."""
    words = " ".join(re.escape(word) for word in arguments)
    # The oldest: the readers of a rank are forks of it, with its command line.
    stop = f"pkill -TERM -o -f {shlex.quote(f'wanmoe.launch --local_rank=[0-9]+ {words}')}"
    subprocess.Popen(["pdsh", "-R", "ssh", "-w", next(iter(hosts_of(config))), stop])


def for_pdsh(word: str) -> str:
    """A word that the shells of other hosts leave as it is; DeepSpeed quotes those with spaces, and `"` in
    them."""
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


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


def command(config: LaunchConfig, arguments: Sequence[str], module: str = "wanmoe.launch") -> list[str]:
    """The command line of a job whose ranks run a module: srun's, or deepspeed's."""
    if config.slurm:
        return slurm.command(config, arguments, module)
    deepspeed = shutil.which("deepspeed", path=os.path.dirname(sys.executable)) or shutil.which("deepspeed")
    if deepspeed is None:
        raise WanmoeError("the deepspeed command is not installed; run: pip install 'deepspeed>=0.19.8'")
    words = [sys.executable, deepspeed, "--log_level", "error", "--master_port", str(master_port(config))]
    hosts = hosts_of(config)
    if hosts:
        if over_pdsh(config) and shutil.which("pdsh") is None:
            raise WanmoeError(
                "pdsh is not installed, which starts the ranks on several hosts: apt-get install pdsh, or "
                "start each host by itself with --no-ssh and its --node-rank, or use --slurm"
            )
        if config.node_rank >= len(hosts):
            raise WanmoeError(
                f"launch.node_rank = {config.node_rank}: {config.hostfile} has nodes 0 to {len(hosts) - 1}"
            )
        words += [
            "--hostfile",
            str(config.hostfile),
            "--master_addr",
            config.master_addr or next(iter(hosts)),
        ]
        if config.no_ssh:
            words += ["--no_ssh", "--node_rank", str(config.node_rank)]
        if config.include:
            words += ["--include", config.include]
        if over_pdsh(config):
            arguments = [for_pdsh(word) for word in arguments]
    else:
        # Without this DeepSpeed would read /job/hostfile if the machine has one.
        words += ["--hostfile", os.devnull, "--num_gpus", str(local_ranks(config))]
    return [*words, "--module", module, *arguments]


def master_port(config: LaunchConfig) -> int:
    """The port where the ranks meet: as configured, else one that is free now; nodes need a fixed one."""
    if config.slurm:
        return slurm.port(config)
    if config.master_port or config.hostfile:
        return config.master_port or 29500
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_ranks(config: LaunchConfig) -> int:
    """Processes on this machine: as the hostfile or the config says, one per GPU, or one."""
    if hosts := slurm.hosts_of(config) if config.slurm else hosts_of(config):
        return list(hosts.values())[min(config.node_rank, len(hosts) - 1)]
    return config.ranks or max(torch.cuda.device_count(), 1)


def environment(config: LaunchConfig) -> dict[str, str]:
    """The environment of the ranks: DeepSpeed's CPU accelerator where there is no GPU, and cores shared
    fairly."""
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
        threads = max((os.cpu_count() or 1) // local_ranks(config), 1)
        env.setdefault("OMP_NUM_THREADS", str(threads))
    if config.slurm:
        env |= slurm.environment(config)
    # ninja, which compiles DeepSpeed's shared-memory collectives at the first start, lies beside the
    # interpreter.
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", "")])
    return env
