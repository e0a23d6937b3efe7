"""A small set of labelled shards, a base and configs that train on it in a second or two a run."""

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch
import torch.distributed as dist

from wanmoe.launch.config import LaunchConfig
from wanmoe.launch.hosts import free_port
from wanmoe.launch.launcher import command, environment
from wanmoe.moe_lora.instruments import SURGICAL
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import save_dit
from wanmoe.train.data.router_prompts import RouterPrompt
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.judges.judge import Classifier, JudgeInfo, save_judge

NAMES = ("Scissors", "Hook/Electrocautery", "Suction", "Other")
SERVER = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
STAND_IN = {"name": "test", "fingerprint": "0" * 64, "stand_in": True}
CONFIG = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=3, text_dim=16, text_len=8, freq_dim=16)


def write_shards(
    root: Path,
    labelled: bool = True,
    count: int = 12,
    marks: bool = True,
    codec: dict | None = None,
    image: bool = False,
) -> Path:
    """Clips whose latent has a pattern of their instrument, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 16, 2, 4, 4, generator=generator)
    with ShardWriter(root, codec or STAND_IN, STAND_IN, null_context=torch.ones(1, 16)) as writer:
        prompts = [RouterPrompt(f"prompt {n}", {NAMES[n % 4]: 1.0}) for n in range(8)]
        if labelled:
            pooled = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
            writer.set_router_prompts(pooled.half(), prompts)
        for index in range(count + 4):
            label = index % 4
            latent = patterns[label] + 0.3 * torch.randn(16, 2, 4, 4, generator=generator)
            context = torch.randn(1 + index % 5, 16, generator=generator) + label
            instruments = [{"name": NAMES[label], "weight": 1.0}] if labelled else []
            split = "train" if index < count else "val"
            meta = {"caption": "a clip", "instruments": instruments, "source": f"{split}{index}"}
            region = torch.zeros(2, 4, 4, dtype=torch.uint8)
            region[:, label : label + 1, 1:3] = 255
            parts = {
                "roi": region,
                "flow": 0.5 * torch.randn(1, 2, 4, 4, generator=generator).half(),
                "visible": torch.full((1, 4, 4), 255, dtype=torch.uint8),
            }
            more = parts if marks else {}
            if image:
                more = more | {"image_latent": torch.randn(20, 2, 4, 4, generator=generator)}
            writer.add(f"{split}_{index:03d}_abcdef01", split, latent, context, meta, **more)
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "clips")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """Random base weights, the head too, so that the adapter has gradients from the first step."""
    torch.manual_seed(0)
    dit = WanDiT(CONFIG)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_dit(dit, path)
    return path


@pytest.fixture
def config(shards, base, tmp_path) -> dict:
    """Stage A on two blocks; tests change what they need."""
    return {
        "model": {"dit": str(base)},
        "adapter": {"blocks": 2, "ffn_blocks": 1},
        "data": {"shards": str(shards), "batch": 1, "workers": 0},
        "objective": {"identity": 0},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"stage": "a", "run": str(tmp_path / "run"), "steps": 6, "log_every": 1},
        "deepspeed": {"zero": 3},
        "tracking": {"enabled": False},
        "launch": {"ranks": 2},
    }


def start(tree: dict, path: Path, through_wanmoe: bool = False) -> subprocess.Popen:
    """Starts the real deepspeed launcher on a config; directly, or as `wanmoe train` does."""
    tree = tree | {"launch": {"master_port": free_port()} | tree["launch"]}
    path.write_text(tomli_w.dumps(tree))
    launch = LaunchConfig(**tree["launch"])
    words = command(launch, ["train", "--config", str(path)])
    if through_wanmoe:
        words = [sys.executable, "-m", "wanmoe.launch", "train", "--config", str(path)]
    return subprocess.Popen(
        words, env=environment(launch), stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )


def run(tree: dict, path: Path) -> str:
    """Trains under the real launcher and returns its output; fails the test when it fails."""
    process = start(tree, path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


class Ranks:
    """Starts ranks of the real Trainer as forks of a server that has imported torch and DeepSpeed already: a
    second each, where the launcher takes ten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "deepspeed", "wanmoe.train.loop"])

    def start(self, tree: dict, world: int | None = None, **job) -> list:
        """The processes; what they print goes to one file, `job` is told in rank_process.py."""
        world = world or tree.get("launch", {}).get("ranks", 1)
        log, port = self.folder / f"{tree['train']['stage']}-{free_port()}.log", free_port()
        jobs = [
            {"config": tree, "rank": rank, "world": world, "port": port, "log": str(log), **job}
            for rank in range(world)
        ]
        program = str(Path(__file__).with_name("rank_process.py"))
        started = [
            self.context.Process(
                target=runpy.run_path, args=(program,), kwargs={"init_globals": {"JOB": one}}
            )
            for one in jobs
        ]
        # For the server, which the first start brings up. The launcher's PATH: another ninja than its own
        # would compile DeepSpeed's collectives anew, and be followed by it.
        wanted = SERVER | {"PATH": environment(LaunchConfig(ranks=1))["PATH"]}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            for process in started:
                process.log = log
                process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return started

    def join(self, started: list) -> tuple[list[int | None], str]:
        """(exit codes, what the ranks said), once all have ended; one that does not is killed."""
        for process in started:
            process.join(timeout=300)
        for process in started:
            process.kill()
            process.join()
        return [process.exitcode for process in started], started[0].log.read_text(errors="replace")

    def run(self, tree: dict, world: int | None = None, **job) -> str:
        """What the ranks said, all of which must end well."""
        codes, text = self.join(self.start(tree, world, **job))
        assert set(codes) == {0}, text[-4000:]
        return text

    def fail(self, tree: dict, world: int | None = None) -> str:
        """What the ranks said, none of which may end well."""
        codes, text = self.join(self.start(tree, world))
        assert 0 not in codes and None not in codes, text[-4000:]
        return text


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Ranks:
    """`run` a training config on some ranks of this machine, without the launcher."""
    return Ranks(tmp_path_factory.mktemp("ranks"))


def two_nodes(folder: Path, slots: int) -> list[dict]:
    """Sections `launch` of two nodes on this machine, each with a launcher of its own."""
    hostfile = folder / "hosts"
    hostfile.write_text(f"node-a slots={slots}\nnode-b slots={slots}\n")
    common = {
        "hostfile": str(hostfile),
        "no_ssh": True,
        "master_addr": "127.0.0.1",  # the names of the file are made up
        "master_port": free_port(),
    }
    return [common | {"node_rank": rank} for rank in (0, 1)]


@pytest.fixture(scope="session")
def launcher() -> SimpleNamespace:
    """`start` and `run` of a training config under the deepspeed launcher, `two_nodes` and a `free_port`."""
    return SimpleNamespace(start=start, run=run, two_nodes=two_nodes, free_port=free_port)


class MlflowServer:
    """A real `mlflow server` of one folder on 127.0.0.1, which tests start, kill and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def launch(self) -> None:
        """Starts it where it does not run, without waiting until it answers."""
        if self.process is not None:
            return
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        ours = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        # Its workers are processes of their own, which only the group's end ends.
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                words, env=ours, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def start(self) -> None:
        self.launch()
        deadline = time.monotonic() + 120
        while not self.answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"no MLflow server: {(self.folder / 'server.log').read_text()[-3000:]}")
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    """A `MlflowServer` that does not run yet: `uri`, `launch()`, `start()`, `kill()`."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def database(tmp_path_factory) -> Path:
    """A database of MLflow without a run; its tables take seconds to make."""
    from mlflow import MlflowClient  # for those who track: it takes seconds

    folder = tmp_path_factory.mktemp("database")
    MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture(name="run")
def run_folder(tmp_path, database) -> Path:
    """An empty run folder beside an empty database."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    shutil.copy(database, folder.parent)
    return folder


@pytest.fixture
def unreachable() -> str:
    """Address at which nobody listens, for as long as the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(scope="session")
def make_shards():
    """`write_shards`, for tests that need a set of their own."""
    return write_shards


@pytest.fixture(scope="session")
def random_classifier(shards):
    """`random_classifier(path, experts, space)` writes a classifier of these shards, of random weights: for
    tests in which it is only asked."""

    def write(path: Path, experts=SURGICAL, space: str = "latent") -> Path:
        torch.manual_seed(0)
        info = JudgeInfo(
            space=space,
            experts=experts,
            sizes=("2x4x4",),
            codec=ShardDataset(shards, "train").manifest["codec"],
            shards_sha256="",
            clips=12,
            steps=1,
            batch=1,
            lr=1.0,
            seed=0,
            held_out={},
            versions={},
        )
        save_judge(Classifier(info), path)
        return path

    return write


@pytest.fixture(scope="session")
def classifier(random_classifier, tmp_path_factory) -> Path:
    """A classifier of the four families with random weights."""
    return random_classifier(tmp_path_factory.mktemp("judge") / "classifier.safetensors")


@pytest.fixture(scope="module")
def lone_group(tmp_path_factory):
    """A process group of one, for what asks its ranks."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
