"""Ranks started by srun: what to call, and what a task learns of its place from Slurm.

Not by DeepSpeed's own `--launcher slurm`, which takes the hosts from a hostfile, as an allocation has none,
and gives its tasks neither RANK nor LOCAL_RANK.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from ..moe_lora import WanmoeError
from .config import LaunchConfig

# Says that srun's tasks are ranks: the script of a job has a SLURM_PROCID, too.
MARK = "WANMOE_SRUN"


def command(config: LaunchConfig, arguments: Sequence[str], module: str) -> list[str]:
    """The srun command line of a job within an allocation, whose ranks run a module.

    Raises:
        WanmoeError: there is no allocation, or no srun.
    """
    hosts = hosts_of(config)
    each = next(iter(hosts.values()))
    # --ntasks: else that of the allocation holds. --wait: rank 0 may send its last figures in peace.
    words = ["srun", "--kill-on-bad-exit=1", "--wait=0", f"--nodes={len(hosts)}"]
    words += [f"--ntasks={len(hosts) * each}", f"--ntasks-per-node={each}"]
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not read it since Slurm 22.05
        words.append(f"--cpus-per-task={cores}")
    return [*words, sys.executable, "-u", "-m", module, *arguments]


def hosts_of(config: LaunchConfig) -> dict[str, int]:
    """Ranks by host of the allocation.

    Raises:
        WanmoeError: there is no allocation, or no srun.
    """
    if "SLURM_JOB_ID" not in os.environ or shutil.which("srun") is None:
        raise WanmoeError(
            "--slurm starts ranks within an allocation: run it in a script for sbatch, or after salloc"
        )
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        told = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise WanmoeError(f"cannot ask scontrol for the hosts of {nodes!r} ({error})") from error
    return dict.fromkeys(told.stdout.split(), config.ranks or _cards_of_a_node())


def _cards_of_a_node() -> int:
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):  # the latter may be a100:8
        number = os.environ.get(name, "").rpartition(":")[2]
        if number.isdigit():
            return int(number)
    raise WanmoeError("Slurm does not say how many GPUs a node has; give the number of its ranks as --ranks")


def environment(config: LaunchConfig) -> dict[str, str]:
    """What all tasks of a job share: where they meet."""
    first = config.master_addr or next(iter(hosts_of(config)))
    return {MARK: "1", "MASTER_ADDR": first, "MASTER_PORT": str(port(config))}


def port(config: LaunchConfig) -> int:
    """Where the ranks meet: two jobs on one node do not take the same."""
    return config.master_port or 29500 + int(os.environ["SLURM_JOB_ID"]) % 1000


def take_place() -> None:
    """Gives a task of srun the variables that a rank is known by."""
    if MARK not in os.environ or "RANK" in os.environ:
        return
    # Of heterogeneous jobs "2(x3),1": the first number, as our own srun asks for the same on every node.
    each = os.environ["SLURM_TASKS_PER_NODE"].split("(")[0].split(",")[0]
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_SIZE": each,
    }
