"""Hostfiles, and ports to meet at."""

import random
import socket
from pathlib import Path

import pytest

from wanmoe.launch.config import LaunchConfig
from wanmoe.launch.hosts import free_port, hosts_of, read_hostfile
from wanmoe.moe_lora import WanmoeError


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_hosts_come_in_the_order_of_the_file(tmp_path):
    path = write(tmp_path, "# ours\nnode-b slots=8  # the fast one\n\n  node-a\tslots=4\n10.0.0.7 slots=1")
    assert list(read_hostfile(path).items()) == [("node-b", 8), ("node-a", 4), ("10.0.0.7", 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node-a slots=8\nnode-b\n", "line 2: 'node-b' is not a line like `host1 slots=8`"),
        ("node-a slots=0\n", "line 1: 'node-a slots=0' is not a line like"),
        ("node-a slots=eight\n", "line 1: 'node-a slots=eight' is not a line like"),
        ("node-a slots=8\n#\nnode-a slots=8\n", "line 3: node-a stands there twice"),
        ("\n# none\n", "names no host; it holds lines like `host1 slots=8`"),
        ("me@node-a slots=8\n", "line 1: 'me@node-a': the ranks meet at the names of hosts"),
        ("fd00::7 slots=8\n", "put users and addresses with colons into ~/.ssh/config and /etc/hosts"),
        (b"node-\xff slots=8\n", "cannot read the hostfile; it holds lines like `host1 slots=8`"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path, text, told):
    path = write(tmp_path, text)
    with pytest.raises(WanmoeError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"{path}") and told in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(WanmoeError, match="none: cannot read the hostfile"):
        read_hostfile(tmp_path / "none")


def test_a_part_of_the_hosts_is_chosen_as_deepspeed_reads_it(tmp_path):
    path = write(tmp_path, "node-a slots=8\nnode-b slots=8\nnode-c slots=4\n")
    assert hosts_of(LaunchConfig(hostfile=path)) == {"node-a": 8, "node-b": 8, "node-c": 4}
    assert hosts_of(LaunchConfig(hostfile=path, include="node-a:0,3@node-c")) == {"node-a": 2, "node-c": 4}
    with pytest.raises(WanmoeError, match=r"launch.include = 'node-x': .*node-x"):
        hosts_of(LaunchConfig(hostfile=path, include="node-x"))
    with pytest.raises(WanmoeError, match=r"launch.include = 'node-a:9': "):
        hosts_of(LaunchConfig(hostfile=path, include="node-a:9"))


def test_without_a_file_it_is_this_machine():
    assert hosts_of(LaunchConfig()) == {}


def test_a_free_port_is_none_that_the_system_hands_to_connections(monkeypatch):
    """Else a connection of another program could take it before the ranks listen there."""
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and all(1024 < port < 32768 for port in ports)
    with socket.socket() as taken:
        taken.bind(("", min(ports)))
        drawn = iter([min(ports), max(ports)])
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *_: next(drawn))
        assert free_port() == max(ports)
