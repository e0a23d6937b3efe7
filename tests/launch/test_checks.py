"""What the doctor says of facts: those of GPUs and limits that a machine of tests may not have."""

import pytest

from wanmoe.launch.checks import examine

CARD = {"name": "NVIDIA A100-SXM4-80GB", "memory": 85 * 10**9}
PAIR = {"node1": 2, "node2": 2}


def facts(**changed):
    return {
        "versions": {"python": "3.11.7", "wanmoe": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8"},
        "variables": {},
        "interfaces": ["lo", "eth0", "ib0"],
        "locked_memory": -1,
        "port_taken": False,
        "paths": {"/w/dit.safetensors": 100},
        "folders": {"/runs/a": {"fault": None, "own": "1", "seen": ["1", "2"], "free": 10**12}},
        "cards": [CARD, CARD],
        "cuda": "13.0",
        "nccl": "2.28.9",
        "broken": None,
        "offset": 0.0,
    } | changed


def said(first=None, second=None, hosts=PAIR):
    told = {"node1": facts(**(first or {})), "node2": facts(**(second or {}))}
    return [("error" if one.fatal else "note", one.text) for one in examine(hosts, told)]


def test_two_alike_have_no_fault():
    assert said() == []


FOLDER = facts()["folders"]["/runs/a"]
FAULTS = {
    "a package missing": (
        {"versions": {"python": "3.11.7", "wanmoe": "0.1.0", "torch": "2.13.0"}},
        "error",
        "node2: deepspeed is not installed",
    ),
    "another torch": (
        {"versions": facts()["versions"] | {"torch": "2.12.0"}},
        "error",
        "the version of torch differs: node1 2.13.0, node2 2.12.0",
    ),
    "a broken torch": ({"broken": "torch: libcudart.so.13: cannot open"}, "error", "node2: torch: libcudart"),
    "another NCCL": ({"nccl": "2.27.1"}, "error", "the version of NCCL differs: node1 2.28.9, node2 2.27.1"),
    "another CUDA": ({"cuda": "12.8"}, "error", "the version of CUDA differs"),
    "a card that fell off": ({"cards": [CARD]}, "error", "node2: slots=2, but it has 1 GPUs"),
    "no driver": ({"cards": []}, "error", "node2: slots=2, but it has 0 GPUs"),
    "idle cards": ({"cards": [CARD] * 3}, "note", "node2: slots=2 of 3 GPUs; the others stay idle"),
    "another card": ({"cards": [CARD | {"name": "L4"}] * 2}, "note", "different GPUs: L4, NVIDIA A100"),
    "a taken port": ({"port_taken": True}, "error", "node2: the port where the ranks meet is taken"),
    "no such network": (
        {"variables": {"NCCL_SOCKET_IFNAME": "ens5"}},
        "error",
        "node2: NCCL_SOCKET_IFNAME names ens5, which it does not have; it has lo, eth0, ib0",
    ),
    "another setting": (
        {"variables": {"NCCL_IB_DISABLE": "1"}},
        "error",
        "NCCL_IB_DISABLE differs: node1 None, node2 1",
    ),
    "locked memory": ({"locked_memory": 65536}, "note", "node2: only 65536 bytes may be locked"),
    "a clock ahead": ({"offset": 31.0}, "error", "node2: its clock is +31.0 s from this machine's"),
    "a clock behind": ({"offset": -3.5}, "error", "node2: its clock is -3.5 s"),
    "weights missing": (
        {"paths": {"/w/dit.safetensors": None}},
        "error",
        "node2: /w/dit.safetensors is not there",
    ),
    "weights cut": (
        {"paths": {"/w/dit.safetensors": 99}},
        "error",
        "the size of /w/dit.safetensors differs: node1 100, node2 99",
    ),
    "read only": (
        {"folders": {"/runs/a": FOLDER | {"fault": "/runs: Read-only file system"}}},
        "error",
        "node2: cannot write to /runs/a (/runs: Read-only file system)",
    ),
    "full": (
        {"folders": {"/runs/a": FOLDER | {"free": 10**9}}},
        "note",
        "node2: 1.00 GB are free at /runs/a",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_alone(fault):
    changed, weight, text = FAULTS[fault]
    (found,) = said(second=changed)
    assert found[0] == weight and text in found[1]


@pytest.mark.parametrize(
    ("name", "fine"), [("^docker,lo", True), ("ib", True), ("=eth0", True), ("eth0,eth7", False)]
)
def test_names_of_networks_are_as_nccl_reads_them(name, fine):
    """^ excludes, = is exact, else it is a beginning (NCCL's user guide, NCCL_SOCKET_IFNAME)."""
    assert (said(second={"variables": {"NCCL_SOCKET_IFNAME": name}}) == []) is fine


def test_a_folder_that_is_another_on_each_host_is_told():
    """Each sees its own token alone."""
    own = [{"folders": {"/runs/a": FOLDER | {"own": name, "seen": [name]}}} for name in ("1", "2")]
    ((weight, text),) = said(*own)
    assert weight == "error" and text.startswith("/runs/a is not one folder on all hosts (node1, node2)")


def test_the_last_sees_the_tokens_of_all():
    """The first has looked before the other came."""
    second = {"folders": {"/runs/a": FOLDER | {"own": "2"}}}
    assert said({"folders": {"/runs/a": FOLDER | {"seen": ["1"]}}}, second) == []


def test_hosts_have_the_same_number_of_ranks():
    first = {"cards": [CARD]}
    ((weight, text),) = said(first, hosts={"node1": 1, "node2": 2})
    assert weight == "error" and "different numbers of ranks (node1 1, node2 2)" in text


def test_hosts_without_gpus_need_none():
    assert said({"cards": [], "nccl": None}, {"cards": [], "nccl": None}) == []
