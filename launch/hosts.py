"""Hostfiles: the machines of a job, and the ranks on each."""

from __future__ import annotations

import errno
import os
import random
import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..moe_lora import WanmoeError
from .config import LaunchConfig

_LINE = re.compile(r"^(?P<host>\S+)\s+slots=(?P<slots>\d+)$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host, in the order of the file; the first host is where the ranks meet.

    Raises:
        WanmoeError: it cannot be read, a line is not `host slots=N`, a host stands there twice, or none does.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WanmoeError(f"{path}: cannot read the hostfile; it holds lines like `host1 slots=8`") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        if match is None or int(match["slots"]) < 1:
            raise WanmoeError(f"{path}, line {number}: {text!r} is not a line like `host1 slots=8`")
        if set(match["host"]) & set(":@"):
            raise WanmoeError(
                f"{path}, line {number}: {match['host']!r}: the ranks meet at the names of hosts; put "
                "users and addresses with colons into ~/.ssh/config and /etc/hosts"
            )
        if match["host"] in hosts:
            raise WanmoeError(f"{path}, line {number}: {match['host']} stands there twice; give it one line")
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise WanmoeError(f"{path}: names no host; it holds lines like `host1 slots=8`")
    return hosts


def free_port() -> int:
    """A TCP port of this machine that nothing listens at.

    It lies below those that the system gives to connections (Linux: from 32768 on): between this answer and
    the seconds until a rank listens there, one of these could take it.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32768)  # the same seed shall not give the same port
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


def is_here(host: str) -> bool:
    """Whether a host of a hostfile is this machine."""
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def check_reachable(hosts: Sequence[str]) -> None:
    """Raises WanmoeError, naming all that do not, unless ssh reaches every host without a password."""
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20"]
    words += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))  # a port, a key

    def ask(host: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, host, "true"], capture_output=True, text=True)

    with ThreadPoolExecutor(max_workers=32) as pool:
        done = list(pool.map(ask, hosts))
    faults = [
        f"{host} does not answer ({(one.stderr.strip().splitlines() or ['no word'])[-1]})"
        for host, one in zip(hosts, done, strict=True)
        if one.returncode
    ]
    if faults:
        raise WanmoeError(f"{'; '.join(faults)}; `wanmoe launch doctor` looks at the hosts more closely")


def hosts_of(config: LaunchConfig) -> dict[str, int]:
    """Ranks by host as `launch.hostfile` and `launch.include` say; empty for this machine alone."""
    if config.hostfile is None:
        return {}
    hosts = read_hostfile(config.hostfile)
    if not config.include:
        return hosts
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    try:
        chosen = parse_inclusion_exclusion(hosts, config.include, "")
    except ValueError as error:
        raise WanmoeError(f"launch.include = {config.include!r}: {error}") from error
    return {host: len(slots) for host, slots in chosen.items()}
