"""On the CPU a rank holds what `wanmoe plan` says, all blocks resident or most of them in shared memory."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch

from wanmoe.launch.config import parse_config
from wanmoe.launch.plan import job_of
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import save_dit
from wanmoe.train.planner import Planner, Settings, this_host

WIDE = WanConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=10, text_dim=16, text_len=8, freq_dim=16)


def held(pid):
    """(process, bytes that it cannot give back: its own and what it shares) of a process and its children."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return {}
    fields = dict(line.split(":", 1) for line in status.splitlines())
    own = sum(int(fields.get(key, "0").split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))
    return {pid: own} | {key: value for child in children for key, value in held(child).items()}


def peak(config, path):
    """Bytes of the rank at its highest."""
    path.write_text(tomli_w.dumps(config))
    command = [sys.executable, "-m", "wanmoe.launch", "train", "--config", str(path)]
    most = 0
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None:
            most = max(most, *held(str(process.pid)).values(), 0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
    assert process.returncode == 0
    return most


def planned(config, settings):
    job = job_of(parse_config(config, "test"), None, None, None, 1, host=True)
    return Planner(job, this_host()).needs(settings).peak


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wide") / "model.safetensors"
    save_dit(WanDiT(WIDE), path)
    return path


def test_the_peak_of_a_rank_grows_as_planned(config, wide, tmp_path):
    """Weights of 0.7 GB, over what a rank takes with hardly any."""
    config["train"] |= {"steps": 2}
    config["deepspeed"], config["launch"] = {}, {"ranks": 1}
    small = peak(config, tmp_path / "small.toml"), planned(config, Settings())
    config["model"]["dit"] = str(wide)
    for name, ring in (("resident", 0), ("ring", 6)):
        config["ring"] = {"blocks": ring}
        config["train"]["run"] = str(tmp_path / name)
        found = peak(config, tmp_path / f"{name}.toml") - small[0]
        expected = planned(config, Settings(stream=ring)) - small[1]
        assert expected > 6e8 and found == pytest.approx(expected, rel=0.1), name
