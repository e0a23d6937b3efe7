"""Jobs as `wanmoe launch` starts, stops and restarts them. Stand-ins for pdsh, ssh and srun run here what the
real ones run on other machines, with no more of this shell than these would take along."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import tomli_w
import torch

from wanmoe.launch.config import load_config
from wanmoe.launch.hosts import free_port
from wanmoe.launch.launcher import local_rank_processes
from wanmoe.moe_lora.adapter_file import read_adapter
from wanmoe.moe_lora.wan.weights import load_dit, save_dit
from wanmoe.train.tracking import read_metrics
from wanmoe.train.watchdog import TRY_AGAIN

PDSH = """#!{python}
import os, re, subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
while words[0].startswith("-"):
    words = words[1 if words[0] == "-S" else 2:]
keep = ("PATH", "HOME", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
env = {{name: os.environ[name] for name in keep if name in os.environ}}
ends = []
for n, host in enumerate(hosts):
    filled = {{"n": str(n), "h": host, "u": "me", "%": "%"}}
    line = re.sub("%([nhu%])", lambda at: filled[at[1]], " ".join(words))
    told, tell = os.pipe()
    if os.fork() == 0:  # no child of ours: on another machine there is none
        os.setsid()
        if os.fork() == 0:
            code = subprocess.run(["sh", "-c", line], env=env, cwd="/").returncode
            os.write(tell, str(abs(code)).encode())
        os._exit(0)
    os.close(tell)
    os.wait()
    ends.append(told)
sys.exit(max(int(os.read(told, 9)) for told in ends))
"""
SSH = "#!/bin/sh\nexit 0\n"
# As the real one: SIGUSR1 reaches the tasks, SIGTERM kills them, and so does the bad end of one.
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
given = {{}}
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    given[name] = value
nodes, each = int(given["--nodes"]), int(given["--ntasks-per-node"])
jobs = []
for number in range(nodes * each):
    place = {{
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number % each),
        "SLURM_NTASKS": str(nodes * each),
        "SLURM_TASKS_PER_NODE": f"{{each}}(x{{nodes}})",
        "SLURMD_NODENAME": f"node-{{number // each}}",
    }}
    jobs.append(subprocess.Popen(words, env=os.environ | place))
def to_all(number, frame=None):
    for job in jobs:
        job.send_signal(number)
signal.signal(signal.SIGUSR1, to_all)
signal.signal(signal.SIGTERM, lambda number, frame: to_all(signal.SIGKILL))
codes = [job.wait() for job in jobs]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = "#!/bin/sh\necho node-0\necho node-1\n"


@pytest.fixture
def path(tmp_path, monkeypatch):
    """PATH with the stand-ins before all else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"pdsh": PDSH, "ssh": SSH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text.format(python=sys.executable) if "{python}" in text else text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def straight(ranks, shards, base, tmp_path_factory):
    """(config, losses, adapter) of a run that nothing happened to, on two ranks."""
    run = tmp_path_factory.mktemp("straight")
    tree = {
        "model": {"dit": str(base)},
        "adapter": {"blocks": 2, "ffn_blocks": 1},
        "data": {"shards": str(shards), "batch": 1, "workers": 0},
        "objective": {"identity": 0},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "train": {
            "stage": "a",
            "run": str(run),
            "steps": 40,
            "global_batch": 4,
            "log_every": 1,
            "save_every": 5,
        },
        "tracking": {"enabled": False},
    }
    ranks.run(tree, 2)
    return tree, losses(run), read_adapter(run / "adapter.safetensors")[1]


def losses(run):
    return {line["step"]: line["train/loss"] for line in read_metrics(run) if "train/loss" in line}


def launch(tree, run, *words):
    """`wanmoe launch <options> train` on a config beside the run folder, as a process."""
    config = run.with_name("config.toml")
    config.write_text(tomli_w.dumps(tree | {"train": tree["train"] | {"run": str(run)}}))
    split = words.index("train") if "train" in words else len(words)
    words = ["launch", *words[:split], "train", "--config", str(config), *words[split + 1 :]]
    return subprocess.Popen(
        [sys.executable, "-m", "wanmoe.launch", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(process, text):
    """What a process has said when it says `text`."""
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return "".join(said)
    pytest.fail(f"ended without {text!r}: {''.join(said)[-4000:]}")


def ended(process):
    text, _ = process.communicate(timeout=300)
    return process.returncode, text


def test_a_job_that_lost_a_rank_starts_again_and_loses_nothing(straight, tmp_path):
    job = launch(straight[0], tmp_path / "run", "--ranks", 2, "--restarts", 1)
    until(job, "step 7: loss")
    rank = next(one for one in local_rank_processes(job.pid) if "--local_rank=1" in one.cmdline())
    rank.kill()
    code, text = ended(job)
    assert code == 0, text[-4000:]
    assert "the job lost a rank (" in text and f"resuming {tmp_path / 'run'} at step" in text
    _, expected, adapter = straight
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    found = read_adapter(tmp_path / "run" / "adapter.safetensors")[1]
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in adapter.items())


def test_without_restarts_a_lost_rank_is_named_and_the_job_may_be_tried_again(straight, tmp_path):
    job = launch(straight[0], tmp_path / "run", "--ranks", 2)
    until(job, "step 7: loss")
    rank = next(one for one in local_rank_processes(job.pid) if "--local_rank=1" in one.cmdline())
    rank.kill()
    code, text = ended(job)
    assert code == TRY_AGAIN and f"rank 1 (process {rank.pid} on " in text, text[-4000:]
    assert "it starts again" not in text


def test_a_launcher_that_is_killed_is_no_good_end(straight, tmp_path):
    """DeepSpeed's runner ends with 0 then, and the ranks train on by themselves."""
    job = launch(straight[0], tmp_path / "run", "--ranks", 2)
    until(job, "step 7: loss")
    local_rank_processes(job.pid)[0].parent().kill()
    code, text = ended(job)
    assert code == TRY_AGAIN and "the ranks' launcher was killed; they save and end" in text, text[-4000:]
    assert "stopped by signal at step" in text and (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_fault_that_only_the_ranks_find_is_not_started_again(straight, base, tmp_path):
    dit = load_dit(base)
    with torch.no_grad():
        dit.head.head.weight.fill_(float("nan"))
    save_dit(dit, tmp_path / "model.safetensors")
    tree = straight[0] | {"model": {"dit": str(tmp_path / "model.safetensors")}}
    code, text = ended(launch(tree, tmp_path / "run", "--ranks", 2, "--restarts", 3))
    assert code == 2, text[-4000:]
    assert "steps in a row were skipped" in text and "it starts again" not in text


def stopped(job, run, straight, number):
    """Sends a signal to a job that has begun: it saves and ends well, and its steps were the right ones."""
    said = until(job, "step 7: loss")
    job.send_signal(number)
    code, text = ended(job)
    assert code == 0 and "stopped by signal at step" in text, text[-4000:]
    done = losses(run)
    assert 7 <= len(done) < 40
    assert done == pytest.approx({step: straight[1][step] for step in done}, abs=1e-5)
    assert (run / "adapter.safetensors").exists()
    return said


@pytest.mark.parametrize("moment", ["launcher", "ranks"])
def test_what_is_stopped_before_it_works_is_no_failure(straight, tmp_path, moment):
    job = launch(straight[0], tmp_path / "run", "--ranks", 2)
    until(job, "wanmoe: starting 2 ranks")
    while moment == "ranks" and len(local_rank_processes(job.pid)) < 2:
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    code, text = ended(job)
    assert code == 0 and "stopped while no rank was at work" in text, text[-4000:]
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_what_is_stopped_when_its_work_is_done_is_no_failure(straight, tmp_path):
    tree = straight[0] | {"train": straight[0]["train"] | {"steps": 5}}
    job = launch(tree, tmp_path / "run", "--ranks", 2)
    until(job, "step 1: loss")
    rank = local_rank_processes(job.pid)[0]  # which may be gone as soon as it has written
    until(job, "step 5: wrote")
    ends = False
    while not ends:
        job.send_signal(signal.SIGTERM)
        ends = not psutil.wait_procs([rank], timeout=0.5)[1]
    code, text = ended(job)
    assert code == 0 and (tmp_path / "run" / "adapter.safetensors").exists(), text[-4000:]


def test_a_fault_that_all_ranks_share_is_said_once(straight, tmp_path):
    ended(launch(straight[0], tmp_path / "run", "--ranks", 2))
    job = launch(straight[0], tmp_path / "run", "--ranks", 2, "train", "--optimizer.weight_decay", 0.5)
    code, text = ended(job)
    assert code == 2 and text.count("wanmoe: error") == 1, text[-4000:]
    assert "(optimizer.weight_decay was 0.01, is 0.5)" in text


def test_hosts_that_do_not_answer_are_all_named_before_anything_starts(straight, path, tmp_path):
    (tmp_path / "bin" / "ssh").write_text(
        '#!/bin/sh\ncase "$*" in *node-b*) exit 0;; esac\necho no route >&2\nexit 255\n'
    )
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\nnode-c slots=1\n")
    code, text = ended(launch(straight[0], tmp_path / "run", "--hostfile", tmp_path / "hosts"))
    assert code == 2 and "Traceback" not in text
    assert (
        "node-a does not answer (no route); node-c does not answer (no route); `wanmoe launch doctor`" in text
    )


def test_two_hosts_by_pdsh_get_every_word_and_stop_together(straight, path, tmp_path):
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    name = 'it costs $5 `ls` "q" 100%n'
    words = ["--hostfile", tmp_path / "hosts", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    run = tmp_path / "a run"
    job = launch(straight[0], run, *words, "train", "--tracking.name", name)
    stopped(job, run, straight, signal.SIGTERM)
    assert load_config(run / "config.toml").model_dump()["tracking"]["name"] == name


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_two_nodes_by_srun_save_and_stop(straight, path, tmp_path, monkeypatch, number):
    """SIGUSR1 as Slurm warns; SIGTERM would kill the tasks if srun got it."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-[0-1]")
    words = ["--slurm", "--ranks", 2, "--master-addr", "127.0.0.1", "--master-port", free_port()]
    job = launch(straight[0], tmp_path / "run", *words)
    said = stopped(job, tmp_path / "run", straight, number)
    assert "global batch 4 on 4 ranks" in said
