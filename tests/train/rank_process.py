"""What a test runs as one rank: the real Trainer on a config, without the launcher's start.

`runpy` runs this file in a fork of a server that has imported torch and DeepSpeed already, so that a rank
takes a second and not ten. `JOB` says what to do: config, rank, world, port, and optionally `steps` (stop
after so many), `result` (file for what it found) and `code` (what to do with the `trainer`).
"""

import json
import os
import sys
from pathlib import Path

job = globals()["JOB"]
os.environ |= {
    "RANK": str(job["rank"]),
    "LOCAL_RANK": str(job["rank"]),
    "WORLD_SIZE": str(job["world"]),
    "LOCAL_SIZE": str(job["world"]),
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(job["port"]),
    "DS_ACCELERATOR": "cpu",
}
log = open(job["log"], "a", buffering=1)  # noqa: SIM115 - for as long as the process lives
os.dup2(log.fileno(), 1)
os.dup2(log.fileno(), 2)

import torch  # noqa: E402

torch.set_num_threads(1)

from wanmoe.launch.config import parse_config  # noqa: E402
from wanmoe.moe_lora import WanmoeError  # noqa: E402
from wanmoe.train.loop import Trainer, train  # noqa: E402
from wanmoe.train.ranks import init_distributed  # noqa: E402
from wanmoe.train.watchdog import watch_over  # noqa: E402

try:
    config = parse_config(job["config"], "test")
    if "code" in job:
        rank, world, device = init_distributed()
        with watch_over(config.train, rank, world) as watchdog:
            trainer = Trainer(config, rank, world, device, watchdog)
            found = {"trainer": trainer, "torch": torch, "json": json}
            exec(job["code"], found)
            if "result" in found:
                Path(job["result"]).write_text(json.dumps(found["result"]))
            trainer.close()
    else:
        train(config)
except WanmoeError as error:
    sys.stderr.write(f"wanmoe: error [rank {job['rank']}]: {error}\n")
    sys.exit(error.exit_code)
