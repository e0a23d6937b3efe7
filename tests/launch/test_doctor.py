"""`wanmoe launch doctor` on two hosts that are this machine: a stand-in for ssh runs what it is given here,
with what is wrong on a host put before it."""

import json
import os
import socket
import subprocess
import sys

import pytest

from wanmoe.launch.hosts import free_port

# Answers as ssh does. `<host>.json` tells what is wrong there: an exit, variables, a folder of Python code
# that comes first, paths that lead to something else on that host.
SSH = """#!{python}
import json, os, pathlib, subprocess, sys
host, command = sys.argv[-2:]
wrong = json.loads(pathlib.Path(__file__).with_name(host + ".json").read_text())
if "exit" in wrong:
    sys.exit(wrong["exit"])
paths = wrong.get("paths", {{}})
for path, other in paths.items():
    command = command.replace(path, other)
if "code" in wrong:
    path = wrong["code"] + os.pathsep + os.environ.get("PYTHONPATH", "")
    command = command.replace(" {python} ", " PYTHONPATH=" + path + " {python} ")
env = os.environ | wrong.get("variables", {{}})
done = subprocess.run(["sh", "-c", command], env=env, stdout=subprocess.PIPE, text=True)
for path, other in paths.items():
    done.stdout = done.stdout.replace(other, path)
sys.stdout.write(done.stdout)
sys.exit(done.returncode)
"""


@pytest.fixture
def site(tmp_path):
    """(folder of the fake ssh, words of a doctor over node-a and node-b with a config)."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.format(python=sys.executable))
    ssh.chmod(0o755)
    for host in ("node-a", "node-b"):
        plant(tmp_path, host)
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    (tmp_path / "dit.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    (tmp_path / "a.toml").write_text(
        '[model]\ndit = "dit.safetensors"\n[data]\nshards = "shards"\n[train]\nstage = "a"\nrun = "runs/a"\n'
    )
    return tmp_path


def plant(site, host, **wrong):
    (site / "bin" / f"{host}.json").write_text(json.dumps(wrong))


def doctor(site, *words, options=(), **variables):
    """(exit code, what it said)."""
    env = os.environ | {"PATH": f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"} | variables
    command = [sys.executable, "-m", "wanmoe.launch", "launch", *options, "doctor", *words]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_two_sound_hosts_meet(site):
    options = ["--hostfile", site / "hosts", "--master-port", free_port()]
    # What DeepSpeed's launcher takes along to all hosts is the same on all of them.
    code, text = doctor(
        site, "--config", site / "a.toml", "--fake", "2x1", options=options, UCX_TLS="tcp", PYTHONHASHSEED="0"
    )
    assert code == 0, text
    # The ranks stand on made-up nodes here, so no line says that they stand on the hosts.
    assert "node-a: " in text and "node-b: " in text and "hosts: " not in text
    assert "error" not in text and "differs" not in text
    assert "ranks: 2 on 2 nodes (gloo), 64 MB added up in" in text
    assert text.endswith("all ranks found each other; nothing is wrong\n")
    assert [path.name for path in (site / "runs").iterdir()] == []


def test_planted_faults_are_found_by_name(site):
    other = site / "other"
    (other / "deepspeed-0.15.1.dist-info").mkdir(parents=True)
    (other / "deepspeed-0.15.1.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.15.1\n")
    (other / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 90\n")
    (site / "disk-b").mkdir()
    (site / "cut.safetensors").write_bytes(b"x" * 10)
    paths = {
        str(site / "dit.safetensors"): str(site / "cut.safetensors"),
        str(site / "shards"): str(site / "nowhere"),
        str(site / "runs"): str(site / "disk-b"),
    }
    variables = {"NCCL_IB_HCA": "mlx5_3", "NCCL_SOCKET_IFNAME": "ens99"}
    plant(site, "node-b", code=str(other), paths=paths, variables=variables)
    plant(site, "node-c", exit="node-c: Permission denied (publickey).")
    with (site / "hosts").open("a") as hosts:
        hosts.write("node-c slots=1\n")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ["--hostfile", site / "hosts", "--master-port", port]
        code, text = doctor(site, "--config", site / "a.toml", "--fake", "2x1", options=options)
    assert code == 1
    for expected in (
        "error: node-c: does not answer: node-c: Permission denied (publickey).; `ssh node-c` must work",
        "error: the version of deepspeed differs: node-a ",
        ", node-b 0.15.1; make it the same everywhere",
        "error: node-a: the port where the ranks meet is taken; give another --master-port",
        "error: node-b: NCCL_SOCKET_IFNAME names ens99, which it does not have; it has ",
        "error: NCCL_IB_HCA differs: node-a None, node-b mlx5_3",
        "error: node-b: its clock is +",
        f"{site}/dit.safetensors differs: node-a 1000, node-b ",
        f"error: node-b: {site}/shards is not there; share the folder",
        f"error: {site}/runs/a is not one folder on all hosts (node-a, node-b)",
    ):
        assert expected in text, text
    assert text.count("error: ") == 9
    assert text.endswith("no dry run before these are mended\n")


def test_this_machine_alone_is_asked_without_ssh(site):
    plant(site, socket.gethostname(), exit="not by ssh")
    code, text = doctor(site, options=["--ranks", 2])
    assert code == 0, text
    assert "ranks: 2 on 1 node (gloo)" in text


def test_ranks_that_cannot_meet_are_told_with_what_they_said(site, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os\nif 'LOCAL_RANK' in os.environ:\n    raise SystemExit('libnccl.so: cannot open')\n"
    )
    code, text = doctor(
        site, options=["--ranks", 2], PYTHONPATH=f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    assert code == 1
    assert "error: the dry run failed:" in text and "libnccl.so: cannot open" in text


@pytest.mark.parametrize("fake", ["2", "2x", "0x2", "axb"])
def test_a_fake_that_is_none_is_one_line(site, fake):
    code, text = doctor(site, "--fake", fake, options=["--ranks", 1])
    assert code == 2
    assert text.endswith(f"wanmoe: error: --fake {fake}: not nodes x ranks, such as 2x2\n")


def test_options_that_do_not_go_together_are_one_line(site):
    code, text = doctor(site, options=["--no-ssh"])
    assert code == 2
    assert text.count("\n") == 1 and "launch.no_ssh needs launch.hostfile, the same on every node" in text


# As the real one: without --ntasks the number of the allocation's tasks holds; nodes are those asked for.
SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
given = {{}}
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    given[name] = value
nodes = given.get("--nodelist", "node-0,node-1").split(",")
count = int(given.get("--ntasks", os.environ["SLURM_NTASKS"]))
each = count // len(nodes)
jobs = []
for task in range(count):
    place = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % each), "SLURM_NTASKS": str(count)}}
    place |= {{"SLURM_TASKS_PER_NODE": f"{{each}}(x{{len(nodes)}})", "SLURMD_NODENAME": nodes[task // each]}}
    jobs.append(subprocess.Popen(words, env=os.environ | place))
sys.exit(max(job.wait() for job in jobs))
"""


def test_an_allocation_is_asked_by_srun(site):
    scripts = {"srun": SRUN.format(python=sys.executable), "scontrol": "#!/bin/sh\necho node-0 node-1\n"}
    for name, text in scripts.items():
        (site / "bin" / name).write_text(text)
        (site / "bin" / name).chmod(0o755)
    allocation = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_NTASKS": "16"}
    port = free_port()
    options = ["--slurm", "--ranks", 1, "--master-addr", "127.0.0.1", "--master-port", port]
    code, text = doctor(site, "--config", site / "a.toml", options=options, **allocation)
    assert code == 0, text
    assert "hosts: node-0 (1 rank), node-1 (1 rank)" in text
    assert "ranks: 2 on 2 nodes (gloo)" in text and "error" not in text
    assert [path.name for path in (site / "runs").iterdir()] == []
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        options[-1] = taken.getsockname()[1]
        (site / "dit.safetensors").unlink()
        code, text = doctor(site, "--config", site / "a.toml", options=options, **allocation)
    assert code == 1
    assert "error: node-0: the port where the ranks meet is taken" in text
    for node in ("node-0", "node-1"):
        assert f"error: {node}: {site}/dit.safetensors is not there" in text
    assert text.count("error: ") == 3
