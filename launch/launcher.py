"""The same command on a laptop, a GPU box or several nodes: re-runs itself under the deepspeed launcher."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
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
from .hosts import check_reachable, free_port, hosts_of, is_here

# Ctrl-C, a scheduler's end and its warning, a terminal that is gone: all of them mean to save and end.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Without these, pdsh waits for hours for a machine that has no power.
ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"


def under_launcher() -> bool:
    """Whether this process is a rank that a launcher started."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(config: LaunchConfig, arguments: Sequence[str]) -> int:
    """Runs `wanmoe <arguments>` as the ranks of a job and returns its exit code.

    A job that lost a rank is started again, `config.restarts` times at most, and ends with TRY_AGAIN if that
    does not help; one that was told to stop, or whose config is at fault, is not. DeepSpeed 0.19.8 has no
    elastic training any more.
    """
    for left in range(config.restarts, -1, -1):
        code, told_to_stop = _run(_at_next_port(config, config.restarts - left), arguments)
        lost = code == TRY_AGAIN or code > 128 or code < 0
        if not lost or told_to_stop or not left:
            break
        sys.stderr.write(
            f"wanmoe: the job lost a rank ({_cause(code)}); it starts again, restart "
            f"{config.restarts - left + 1} of {config.restarts}\n"
        )
    # Of a rank that was killed DeepSpeed's launcher tells the signal, as 247 or -9.
    return TRY_AGAIN if lost and not told_to_stop else code


def _cause(code: int) -> str:
    """An exit code in words: of a rank that a signal ended, shells tell 137 and DeepSpeed 247 or -9."""
    number = -code if code < 0 else 256 - code if code > 192 else code - 128 if code > 128 else 0
    killed = number in signal.valid_signals()
    return f"killed by {signal.Signals(number).name}" if killed else f"exit code {code}"


def _at_next_port(config: LaunchConfig, attempt: int) -> LaunchConfig:
    """Ranks that are left of an earlier start must not meet those of this one."""
    if not attempt or not (config.hostfile or config.slurm):
        return config
    return config.model_copy(update={"master_port": master_port(config) + attempt})


def _run(config: LaunchConfig, arguments: Sequence[str]) -> tuple[int, bool]:
    """(exit code, whether it was told to stop) of one start.

    Signals go to the ranks alone, which save and end by themselves: DeepSpeed's launcher would kill them one
    after the other and report a failure. So the job has a session of its own, out of Ctrl-C's reach.
    """
    job: subprocess.Popen[Any] | None = None
    told_to_stop = False
    first_host = next(iter(hosts_of(config))) if over_pdsh(config) else None

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal told_to_stop
        told_to_stop = True
        if job is None:
            return  # it is told as soon as it is there
        ranks = local_rank_processes(job.pid)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        if first_host is not None:
            _stop_remote(first_host, arguments)
        elif config.slurm:
            job.send_signal(signal.SIGUSR1)  # which srun passes on; at SIGTERM it kills its tasks
        elif not ranks:
            os.killpg(job.pid, signal.SIGTERM)

    # nohup lets a job outlive its terminal.
    heard = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        sys.stderr.write(f"wanmoe: starting {_number_of_ranks(config)}\n")
        job = start(config, arguments)
        if told_to_stop:
            forward(signal.SIGTERM, None)
        code = job.wait()
        if code == 0 and (left := ranks_left(job.pid)):
            # DeepSpeed's runner takes a launcher that was killed for one that ended well.
            sys.stderr.write("wanmoe: the ranks' launcher was killed; they save and end\n")
            for rank in left:
                rank.send_signal(signal.SIGTERM)
            psutil.wait_procs(left)
            code = TRY_AGAIN
        if told_to_stop and _cause(code) == "killed by SIGTERM":
            # It comes before or after their work: in between they hear it, save and end by themselves.
            sys.stderr.write("wanmoe: stopped while no rank was at work\n")
            code = 0
        return code, told_to_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(
    config: LaunchConfig, arguments: Sequence[str], module: str = "wanmoe.launch", **pipes: Any
) -> subprocess.Popen[Any]:
    """Starts ranks that run a module; in a session of their own.

    Raises:
        WanmoeError: a launcher that the config asks for is not there, or a host does not answer.
    """
    words, env = command(config, arguments, module), environment(config)
    if over_pdsh(config):
        check_reachable([host for host in hosts_of(config) if not is_here(host)])
    return subprocess.Popen(words, env=env, start_new_session=True, **pipes)


def _number_of_ranks(config: LaunchConfig) -> str:
    hosts = slurm.hosts_of(config) if config.slurm else hosts_of(config)
    count = local_ranks(config) if config.no_ssh or not hosts else sum(hosts.values())
    where = f" on {len(hosts)} hosts" if len(hosts) > 1 and not config.no_ssh else ""
    return f"{count} {'rank' if count == 1 else 'ranks'}{where}"


def over_pdsh(config: LaunchConfig) -> bool:
    """Whether pdsh starts the ranks: on several hosts, or on one that is not this machine."""
    hosts = {} if config.no_ssh else hosts_of(config)
    return len(hosts) > 1 or not all(map(is_here, hosts))


def _stop_remote(host: str, arguments: Sequence[str]) -> None:
    """Tells a rank of that host to stop: what one is told they all hear."""
    words = " ".join(re.escape(word) for word in arguments)
    # The oldest: the readers of a rank are forks of it, with its command line.
    stop = f"pkill -TERM -o -f {shlex.quote(f'wanmoe.launch --local_rank=[0-9]+ {words}')}"
    subprocess.Popen(["pdsh", "-R", "ssh", "-w", host, stop.replace("%", "%%")])


def for_pdsh(word: str) -> str:
    """A word that pdsh and the shells of other hosts leave as it is; DeepSpeed quotes those with spaces, and
    `"` in them."""
    word = word.replace("%", "%%")  # of pdsh: %n, %h
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def local_rank_processes(job: int) -> list[psutil.Process]:
    """The ranks that DeepSpeed's launcher has started under process `job` on this machine."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(job).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
                if any("--local_rank=" in word for word in child.cmdline()):
                    found.append((child, child.ppid()))
    # A rank's reader processes are forks of it, with its command line.
    pids = {child.pid for child, _ in found}
    return [child for child, parent in found if parent not in pids]


def ranks_left(group: int) -> list[psutil.Process]:
    """The ranks of a process group whose launcher is gone."""
    found = []
    for process in psutil.process_iter():
        # Gone, or another user's, meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if os.getpgid(process.pid) == group and any("--local_rank=" in w for w in process.cmdline()):
                found.append(process)
    return found


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
            words.append("--force_multi")
            arguments = [for_pdsh(word) for word in arguments]
    else:
        # Without this DeepSpeed would read /job/hostfile if the machine has one.
        words += ["--hostfile", os.devnull, *_cards(local_ranks(config))]
    return [*words, "--module", module, *arguments]


def _cards(ranks: int) -> list[str]:
    """Which cards DeepSpeed takes: with --num_gpus it forgets CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or not torch.cuda.is_available():
        return ["--num_gpus", str(ranks)]
    cards = visible.split(",")
    if not all(card.strip().isdigit() for card in cards):
        raise WanmoeError(
            f"CUDA_VISIBLE_DEVICES = {visible!r}: DeepSpeed's launcher takes numbers alone, such as 0,1"
        )
    if ranks > len(cards):
        raise WanmoeError(f"launch.ranks = {ranks}: CUDA_VISIBLE_DEVICES = {visible!r} has fewer cards")
    return ["--include", f"localhost:{','.join(cards[:ranks])}"]


def master_port(config: LaunchConfig) -> int:
    """The port where the ranks meet: as configured, else one that is free now; nodes need a fixed one."""
    if config.slurm:
        return slurm.port(config)
    if config.master_port or config.hostfile:
        return config.master_port or 29500
    return free_port()


def local_ranks(config: LaunchConfig) -> int:
    """Processes on this machine: as the hostfile or the config says, one per GPU, or one."""
    if hosts := slurm.hosts_of(config) if config.slurm else hosts_of(config):
        return list(hosts.values())[min(config.node_rank, len(hosts) - 1)]
    return config.ranks or max(torch.cuda.device_count(), 1)


def environment(config: LaunchConfig) -> dict[str, str]:
    """The environment of the ranks: DeepSpeed's CPU accelerator where there is no GPU, and cores shared
    fairly."""
    env = dict(os.environ)
    if config.slurm:
        # Of this machine, which may be a login node, the ranks get nothing else.
        env |= slurm.environment(config)
    elif not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
        threads = max(len(os.sched_getaffinity(0)) // local_ranks(config), 1)
        env.setdefault("OMP_NUM_THREADS", str(threads))
    if over_pdsh(config):
        env["PDSH_SSH_ARGS_APPEND"] = f"{env.get('PDSH_SSH_ARGS_APPEND', '')} {ALIVE}".strip()
    # ninja, which compiles DeepSpeed's shared-memory collectives at the first start, lies beside the
    # interpreter.
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", "")])
    return env
