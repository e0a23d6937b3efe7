"""What is wrong among some machines, by what each says of itself (`probe`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]

SKEW = 2.0
"""Seconds between clocks from which on signs of life and files are misread."""
NEEDED = ("wanmoe", "torch", "deepspeed")
"""Packages without which nothing starts."""
ROOM = 2e9
"""Bytes that a run folder should have left: some resume states and videos."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what to do."""

    text: str
    fatal: bool = True
    """Whether a job cannot run, or not rightly."""


def examine(hosts: Mapping[str, int], told: Mapping[str, Facts]) -> list[Finding]:
    """Findings about all hosts of a job.

    Args:
        hosts: ranks by host.
        told: what each host that answered says (`probe`), with `offset`, its clock against ours in seconds.
    """
    checks: tuple[Callable[[Mapping[str, int], Mapping[str, Facts]], Iterator[Finding]], ...] = (
        _software,
        _cards,
        _network,
        _clocks,
        _paths,
        _folders,
    )
    return [finding for check in checks for finding in check(hosts, told)]


def _software(hosts: Mapping[str, int], told: Mapping[str, Facts]) -> Iterator[Finding]:
    for host, facts in told.items():
        if facts["broken"]:
            yield Finding(f"{host}: {facts['broken']}; reinstall it there")
        for name in NEEDED:
            if name not in facts["versions"]:
                yield Finding(f"{host}: {name} is not installed in the Python that ssh finds there")
    for name in sorted({name for facts in told.values() for name in facts["versions"]}):
        found = {host: facts["versions"].get(name) for host, facts in told.items()}
        if name in NEEDED:  # told above where it is missing
            found = {host: version for host, version in found.items() if version}
        yield from _alike(found, f"the version of {name}")
    for what in ("cuda", "nccl"):
        yield from _alike(
            {host: facts[what] for host, facts in told.items()}, f"the version of {what.upper()}"
        )


def _cards(hosts: Mapping[str, int], told: Mapping[str, Facts]) -> Iterator[Finding]:
    some = any(facts["cards"] for facts in told.values())
    for host, facts in told.items():
        cards = facts["cards"]
        if some and len(cards) < hosts[host]:
            yield Finding(f"{host}: slots={hosts[host]}, but it has {len(cards)} GPUs; lower slots")
        elif len(cards) > hosts[host]:
            yield Finding(
                f"{host}: slots={hosts[host]} of {len(cards)} GPUs; the others stay idle", fatal=False
            )
    kinds = {card["name"] for facts in told.values() for card in facts["cards"]}
    if len(kinds) > 1:
        yield Finding(f"different GPUs: {', '.join(sorted(kinds))}; the slowest sets the pace", fatal=False)
    if len(set(hosts.values())) > 1:
        slots = ", ".join(f"{host} {count}" for host, count in hosts.items())
        yield Finding(f"different numbers of ranks ({slots}): give all hosts the same slots")


def _network(hosts: Mapping[str, int], told: Mapping[str, Facts]) -> Iterator[Finding]:
    for host, facts in told.items():
        if facts["port_taken"]:
            yield Finding(f"{host}: the port where the ranks meet is taken; give another --master-port")
        for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            wanted = facts["variables"].get(key, "").lstrip("^=")
            names = [name for name in wanted.split(",") if name]
            excluded = facts["variables"].get(key, "").startswith("^")
            missing = [n for n in names if not any(have.startswith(n) for have in facts["interfaces"])]
            if missing and not excluded:
                have = ", ".join(facts["interfaces"])
                yield Finding(f"{host}: {key} names {missing[0]}, which it does not have; it has {have}")
        limit = facts["locked_memory"]
        if facts["cards"] and 0 <= limit < 2**30:
            yield Finding(
                f"{host}: only {limit} bytes may be locked (ulimit -l), too few for InfiniBand and pinned "
                "copies; set `* - memlock unlimited` in /etc/security/limits.conf",
                fatal=False,
            )
    for key in sorted({key for facts in told.values() for key in facts["variables"]}):
        values = {host: facts["variables"].get(key) for host, facts in told.items()}
        if not key.endswith("_SOCKET_IFNAME"):  # hosts may name their network differently
            yield from _alike(values, key)


def _clocks(hosts: Mapping[str, int], told: Mapping[str, Facts]) -> Iterator[Finding]:
    for host, facts in told.items():
        if abs(facts["offset"]) > SKEW:
            yield Finding(
                f"{host}: its clock is {facts['offset']:+.1f} s from this machine's; turn on chrony or ntpd"
            )


def _paths(hosts: Mapping[str, int], told: Mapping[str, Facts]) -> Iterator[Finding]:
    for path in next(iter(told.values()), {"paths": {}})["paths"]:
        for host, facts in told.items():
            if facts["paths"][path] is None:
                yield Finding(f"{host}: {path} is not there; share the folder, or copy it to the same place")
        sizes = {host: facts["paths"][path] for host, facts in told.items()}
        there = {host: size for host, size in sizes.items() if size is not None}
        yield from _alike(there, f"the size of {path}")


def _folders(hosts: Mapping[str, int], told: Mapping[str, Facts]) -> Iterator[Finding]:
    for path in next(iter(told.values()), {"folders": {}})["folders"]:
        there: dict[str, Any] = {}
        for host, facts in told.items():
            folder = facts["folders"][path]
            if folder["fault"]:
                yield Finding(f"{host}: cannot write to {path} ({folder['fault']})")
                continue
            if folder["free"] < ROOM:
                yield Finding(f"{host}: {folder['free'] / 1e9:.2f} GB are free at {path}", fatal=False)
            there[host] = folder
        # The last was asked when all others had left their tokens.
        last = list(there.values())[-1] if there else {"seen": []}
        apart = [host for host, folder in there.items() if folder["own"] not in last["seen"]]
        if apart:
            names = ", ".join(there)
            yield Finding(f"{path} is not one folder on all hosts ({names}); share it, as NFS or Lustre do")


def _alike(values: Mapping[str, object], what: str) -> Iterator[Finding]:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{host} {value}" for host, value in values.items())
        yield Finding(f"{what} differs: {listed}; make it the same everywhere")
