"""`wanmoe launch doctor`: asks every host about itself, and lets all ranks add up numbers together."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from ..moe_lora import WanmoeError
from ..train.data.store import is_url
from . import probe, slurm
from .checks import Finding
from .checks import examine as find
from .config import Config, LaunchConfig
from .hosts import hosts_of, is_here
from .launcher import local_ranks, master_port, start
from .meet import MEET

# Seconds: for a host to answer, in which it imports torch over a slow file system; and for the dry run.
ANSWER, DRY = 120, MEET + 60


def examine(launch: LaunchConfig, config: Config | None, fake: str | None) -> int:
    """Prints what is wrong, and returns 1 where something is, else 0.

    Args:
        config: the places that it names are looked at, too.
        fake: "2x2": the dry run is of so many nodes of so many ranks, all on this machine, each by a
            launcher of its own.
    """
    shape = None if fake is None else _shape(fake)
    if launch.slurm:
        hosts = slurm.hosts_of(launch)
    else:
        hosts = hosts_of(launch) or {socket.gethostname(): local_ranks(launch)}
    if shape is None:
        counts = (f"{host} ({count} {'rank' if count == 1 else 'ranks'})" for host, count in hosts.items())
        typer.echo(f"hosts: {', '.join(counts)}")
    told, findings = ask(hosts, launch, config)
    for host, facts in told.items():
        typer.echo(f"{host}: {_describe(facts)}")
    findings += find(hosts, told)
    for finding in findings:
        typer.echo(f"{'error' if finding.fatal else 'note'}: {finding.text}")
    if any(finding.fatal for finding in findings):
        typer.echo("no dry run before these are mended")
        return 1
    fault = dry_run(launch, shape)
    typer.echo(f"error: {fault}" if fault else "all ranks found each other; nothing is wrong")
    return int(bool(fault))


def ask(
    hosts: Mapping[str, int], launch: LaunchConfig, config: Config | None
) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """What each host that answers says of itself (`probe.probe`), and who did not answer."""
    token = secrets.token_hex(4)
    paths, folders = _places(config)
    question = {"port": master_port(launch), "paths": paths, "folders": folders, "token": token}
    if launch.no_ssh:
        # Every node asks itself.
        names = [list(hosts)[min(launch.node_rank, len(hosts) - 1)]]
    else:
        names = list(hosts)

    def answers_of(some: Sequence[str]) -> dict[str, dict[str, Any] | Finding]:
        if launch.slurm:
            return _by_srun(some, question)
        with ThreadPoolExecutor(max_workers=32) as pool:
            asked = [question | {"first": host == next(iter(hosts))} for host in some]
            return dict(zip(some, pool.map(partial(_of_host, launch), some, asked), strict=True))

    answers = answers_of(names)
    told = {host: answer for host, answer in answers.items() if not isinstance(answer, Finding)}
    if folders and len(told) > 1:
        # Once more, now that all have left their tokens.
        last = list(told)[-1]
        again = answers_of([last])[last]
        answers |= {last: again} if isinstance(again, Finding) else {}
        told[last] = told[last] | ({} if isinstance(again, Finding) else {"folders": again["folders"]})
    for folder in folders:
        for left in _nearest(Path(folder)).glob(f".wanmoe-doctor-{token}-*"):
            left.unlink(missing_ok=True)
    return told, [answer for answer in answers.values() if isinstance(answer, Finding)]


def _of_host(launch: LaunchConfig, host: str, question: dict[str, Any]) -> dict[str, Any] | Finding:
    words = [sys.executable, "-m", probe.__name__, json.dumps(question)]
    if launch.hostfile is not None and not launch.no_ssh and not is_here(host):
        # As DeepSpeed's launcher goes there: the same folder, the same Python, the same variables.
        there = ["env", *(f"{key}={value}" for key, value in exported().items()), *words]
        remote = f"cd {shlex.quote(os.getcwd())} && {shlex.join(there)}"
        words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", host, remote]
    began = time.time()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(f"{host}: does not answer ({error})")
    told = _facts(done.stdout, began, time.time())
    if done.returncode != 0 or not told:
        why = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return Finding(f"{host}: does not answer: {why}; `ssh {host}` must work without a password")
    return told[0]


def _by_srun(hosts: Sequence[str], question: dict[str, Any]) -> dict[str, dict[str, Any] | Finding]:
    words = ["srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1"]
    words += [f"--nodelist={','.join(hosts)}"]
    words += [sys.executable, "-m", probe.__name__, json.dumps(question | {"first": None})]
    began = time.time()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {host: Finding(f"{host}: does not answer ({error})") for host in hosts}
    told = {facts["host"]: facts for facts in _facts(done.stdout, began, time.time())}
    why = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return {host: told.get(host) or Finding(f"{host}: does not answer to srun: {why}") for host in hosts}


def _facts(text: str, began: float, ended: float) -> list[dict[str, Any]]:
    """What probes have printed, a line each, with `offset`: their clock against ours in seconds."""
    # Shells may greet before it, without a line of its own.
    lines = [line.partition(probe.MARK)[2] for line in text.splitlines() if probe.MARK in line]
    every = [json.loads(line) for line in lines]
    for facts in every:
        # They were started and ended somewhere between: what lies within is no skew.
        early, late = facts["time"] - ended, facts["began"] - began
        facts["offset"] = 0.0 if early <= 0 <= late else (early if early > 0 else late)
    return every


def exported() -> dict[str, str]:
    """The variables of this shell that DeepSpeed's launcher sets on all hosts."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher.runner import (
        DEEPSPEED_ENVIRONMENT_NAME,
        DEEPSPEED_ENVIRONMENT_PATHS,
        EXPORT_ENVS,
    )

    prefixes = (*EXPORT_ENVS, *get_accelerator().export_envs())
    found = {key: value for key, value in os.environ.items() if key.startswith(prefixes)}
    for folder in DEEPSPEED_ENVIRONMENT_PATHS:
        file = Path(folder) / DEEPSPEED_ENVIRONMENT_NAME
        if file.is_file():
            pairs = (line.partition("=") for line in file.read_text().splitlines() if "=" in line)
            found |= {key.strip(): value.strip() for key, _, value in pairs}
    return found


def _places(config: Config | None) -> tuple[list[str], list[str]]:
    """(what must be there, folders that are written to) of a config."""
    if config is None:
        return [], []
    model, objective = config.model, config.objective
    files = [model.dit, model.dit_high_noise, model.adapter, model.adapter_high_noise, objective.classifier]
    shards = [] if is_url(config.data.shards) else [config.data.shards]
    return [str(path) for path in (*files, *shards) if path is not None], [str(config.train.run)]


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _describe(facts: Mapping[str, Any]) -> str:
    cards = facts["cards"]
    what = f"{len(cards)} x {cards[0]['name']}, {cards[0]['memory'] / 1e9:.0f} GB" if cards else "no GPU"
    names = ("python", "torch", "deepspeed", "wanmoe")
    versions = ", ".join(f"{name} {facts['versions'].get(name, 'missing')}" for name in names)
    return f"{what}; {versions}; clock {facts['offset']:+.1f} s"


def _shape(fake: str) -> tuple[int, int]:
    nodes, _, each = fake.partition("x")
    if not (nodes.isdigit() and each.isdigit() and int(nodes) and int(each)):
        raise WanmoeError(f"--fake {fake}: not nodes x ranks, such as 2x2")
    return int(nodes), int(each)


def dry_run(launch: LaunchConfig, fake: tuple[int, int] | None) -> str | None:
    """Starts all ranks as a job would, and lets them add up numbers; what went wrong, or None.

    Args:
        fake: (nodes, ranks of each) of a dry run on this machine alone.
    """
    if fake is None:
        return _wait([launch])
    nodes, each = fake
    with TemporaryDirectory() as folder:
        hostfile = Path(folder) / "hosts"
        hostfile.write_text("".join(f"node{n} slots={each}\n" for n in range(nodes)))
        port = launch.master_port or master_port(LaunchConfig())
        common = {"hostfile": hostfile, "no_ssh": True, "master_addr": "127.0.0.1", "master_port": port}
        return _wait([LaunchConfig(**common, node_rank=n) for n in range(nodes)])


def _wait(starts: Sequence[LaunchConfig]) -> str | None:
    with TemporaryDirectory() as folder:
        # Files, not pipes, which fill up.
        logs = [Path(folder, str(number)) for number in range(len(starts))]
        jobs = []
        for one, log in zip(starts, logs, strict=True):
            with log.open("w") as file:
                jobs.append(start(one, [], "wanmoe.launch.meet", stdout=file, stderr=subprocess.STDOUT))
        until = time.monotonic() + DRY
        try:
            for job in jobs:
                job.wait(timeout=max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            return (
                f"the ranks did not meet within {DRY} s: does a firewall close the port, is the first "
                "host's name known on all others (--master-addr), is NCCL_SOCKET_IFNAME right?"
            )
        finally:
            for job in jobs:
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGKILL)
                    job.wait()
        texts = [log.read_text(errors="replace") for log in logs]
    for line in (line for text in texts for line in text.splitlines() if "ranks: " in line):
        typer.echo(line[line.index("ranks: ") :])  # pdsh says before it which host it is
    bad = next((text for job, text in zip(jobs, texts, strict=True) if job.returncode != 0), None)
    return None if bad is None else "the dry run failed:\n" + "\n".join(bad.strip().splitlines()[-15:])
