"""`wanmoe prepare` as a user meets it: killed and started again, on one rank and on two, and its options."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from wanmoe.launch import cli
from wanmoe.launch.config import LaunchConfig
from wanmoe.launch.prepare import join_sizes, parse_size, rank_count
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import ExpertSet
from wanmoe.moe_lora.video import write_video
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.moe_lora.wan.text import load_text_encoder
from wanmoe.train.data.clip_list import read_clip_list
from wanmoe.train.data.prepare import prepare
from wanmoe.train.data.router_prompts import router_prompts
from wanmoe.train.data.shards import ShardDataset, read_manifest
from wanmoe.train.data.spool import Spool
from wanmoe.train.data.store import open_store
from wanmoe.train.synth import synth_clips

SAMPLES = 40
OPTIONS = ("--vae", "haar", "--text", "hash", "--size", "64", "64", "--frames", "9")
BY_ITSELF = """
import os, signal, sys
from wanmoe.launch import cli
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.spool import Spool

place, name = {"add": (ShardWriter, "add"), "publish": (Spool, "__exit__")}[sys.argv.pop(1)]
real, calls = getattr(place, name), []

def dying(*arguments, **options):
    calls.append(name)
    if len(calls) == 3 or name == "__exit__":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

setattr(place, name, dying)
cli.main()
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth_clips(
        tmp_path_factory.mktemp("clips"), clips=SAMPLES - 4, val=4, height=64, width=64, frames=9
    )


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of a run that nothing disturbed, in one process."""
    out = tmp_path_factory.mktemp("whole") / "s"
    encoders: dict[str, Any] = {"codec": load_vae("haar"), "text_encoder": load_text_encoder("hash")}
    options: dict[str, Any] = {"size": (64, 64), "frames": 9, "fps": 16.0, "progress": False}
    prompts = router_prompts(ExpertSet())
    prepare(read_clip_list(clips), out, experts=ExpertSet(), router_prompts=prompts, **encoders, **options)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(clips: Path, out: Path, *words: str, by: Sequence[str] = ("-m", "wanmoe.launch")) -> Any:
    command = [sys.executable, *by, "prepare", "--clips", str(clips), "--out", str(out), *OPTIONS, *words]
    return subprocess.Popen(
        command,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: Any) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return str(output)


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """(inode, time of change) of every finished sample."""
    found = {}
    for path in Spool(out).folder.glob("*-w*.safetensors"):
        if not path.name.startswith("."):
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def kill_at(process: Any, out: Path, count: int) -> dict[str, tuple[int, int]]:
    """SIGKILL to the command and all that it started, once so many samples are finished."""
    while len(finished(out)) < count:
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.001)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.communicate()
    return finished(out)


def test_killed_at_any_moment_on_one_rank_it_gives_the_same_bytes(
    clips: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, left = tmp_path / "s", dict[str, tuple[int, int]]()
    for count in (1, 12):
        now = kill_at(start(clips, out), out, count)
        assert count <= len(now) < SAMPLES and not out.exists()
        assert now.items() >= left.items(), "what was finished stays as it was"
        left = now
    for moment in ("add", "publish"):  # while the shards are written, and when only the clean-up is left
        process = start(clips, out, by=("-c", BY_ITSELF, moment))
        told, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, told[-4000:]
        assert f"{len(left)} of {SAMPLES} samples are encoded already" in told
        now = finished(out)
        assert len(now) == SAMPLES and now.items() >= left.items()
        assert out.exists() == (moment == "publish")
        left = now
    assert "complete already" in finish(start(clips, out))
    assert contents(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_killed_on_two_ranks_it_gives_the_same_bytes(
    clips: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    left = kill_at(start(clips, out, "--ranks", "2"), out, 6)
    assert len(left) < SAMPLES and not out.exists()
    told = finish(start(clips, out, "--ranks", "2"))
    assert f"{len(left)} of {SAMPLES} samples are encoded already" in told
    assert "encode, 2 ranks: " in told
    assert contents(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_a_fault_on_the_second_rank_is_told_once_by_the_first(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", torch.zeros(9, 64, 64, 3, dtype=torch.uint8), 16)
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros(((9 if name == "a" else 3) * 64, 64), np.uint8))
        rows.append(f'{{"video_path": "{name}.mp4", "caption": "hook {name}", "masks": "{name}.png"}}\n')
    (tmp_path / "clips.jsonl").write_text("".join(rows))
    process = start(tmp_path / "clips.jsonl", tmp_path / "s", "--ranks", "2", "--val-fraction", "0")
    told, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "Traceback" not in told, told[-4000:]
    (line,) = (line for line in told.splitlines() if line.startswith("wanmoe: error"))
    assert line.startswith("wanmoe: error [rank 0]: on rank 1: ")
    assert "clips.jsonl:2: there are 3 masks, but 9 frames are used" in line
    # The first rank finishes its sample, or stops before it where the second fails sooner.
    assert not (tmp_path / "s").exists() and {name[:4] for name in finished(tmp_path / "s")} <= {"a_a-"}


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[Any, str]:
    """(exit code, what it said) of `wanmoe prepare words`."""
    monkeypatch.setattr(sys, "argv", ["wanmoe", "prepare", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err.strip()


def test_a_folder_that_another_process_prepares_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clips: Path, tmp_path: Path
) -> None:
    with Spool(tmp_path / "s") as spool:
        spool.open({})
        code, told = run(monkeypatch, capsys, "--clips", clips, "--out", tmp_path / "s", *OPTIONS)
    assert code == 2 and "\n" not in told and told.startswith("wanmoe: error: ")
    assert f"s.work: process {os.getpid()} on " in told and "give another --out" in told


def test_sizes_and_lengths_may_be_given_several_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c").mkdir()
    for name, size in (("wide", (32, 64)), ("tall", (64, 32))):
        pictures = torch.randint(0, 255, (14, *size, 3), dtype=torch.uint8)
        write_video(tmp_path / "c" / f"hook_{name}.mp4", pictures, 16)
    words = ("--size", 64, 32, "--frames", 9, "--size", 32, 64, "--frames", 5, "--val-fraction", 0)
    experts = tmp_path / "e.toml"
    experts.write_text('[adapter]\nexperts = [{name = "hook_wide"}, {name = "hook_tall"}]\n')
    common = ("--vae", "haar", "--text", "hash", "--experts", experts)
    code, told = run(monkeypatch, capsys, "--clips", tmp_path / "c", "--out", tmp_path / "s", *common, *words)
    assert code == 0, told
    manifest, _ = read_manifest(open_store(tmp_path / "s"))
    assert (manifest["sizes"], manifest["frames"]) == ([[64, 32], [32, 64]], [9, 5])
    counts = {bucket: len(own) for bucket, own in ShardDataset(tmp_path / "s").buckets.items()}
    assert counts == {(2, 4, 8): 1, (2, 8, 4): 1, (3, 4, 8): 1, (3, 8, 4): 1}


def test_prompts_of_a_router_are_made_from_the_keywords_or_read_or_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c").mkdir()
    write_video(tmp_path / "c" / "hook.mp4", torch.zeros(9, 64, 64, 3, dtype=torch.uint8), 16)
    (tmp_path / "own.jsonl").write_text('{"prompt": "钩", "instruments": ["hook"]}\n')
    words = ("--clips", tmp_path / "c", "--out", tmp_path / "s", *OPTIONS, "--val-fraction", 0)
    made = router_prompts(ExpertSet(), 5)
    for more, texts in (
        (("--seed", 5), tuple(prompt.text for prompt in made)),
        (("--router-prompts", tmp_path / "own.jsonl"), ("钩",)),
        (("--router-prompts", "none"), None),
    ):
        code, told = run(monkeypatch, capsys, *words, *more)
        assert code == 0, told
        found = ShardDataset(tmp_path / "s").router_prompts()
        assert (found and found.texts) == texts
    code, told = run(monkeypatch, capsys, *words, "--router-prompts", "nowhere.jsonl")
    assert code == 2 and told.startswith("wanmoe: error: nowhere.jsonl: the router prompts cannot be read: ")


def test_words_for_sizes() -> None:
    words = ["--size", "1", "2", "--frames", "9", "--size", "3", "4"]
    assert join_sizes(words) == ["--size", "1x2", "--frames", "9", "--size", "3x4"]
    assert join_sizes(["--size", "480x832"]) == ["--size", "480x832"] and join_sizes(["--size"]) == ["--size"]
    assert parse_size("480x832") == (480, 832)
    for wrong in ("480", "x", "480x", "axb", "-1x2"):
        with pytest.raises(WanmoeError, match=f"--size '{wrong}': expected height and width"):
            parse_size(wrong)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--vae", "haar", "--text", "hash"), "--clips must be given"),
        (("--clips", "c", "--text", "hash"), "--vae must be given"),
        (("--clips", "c", "--vae", "haar"), "--text must be given"),
        (("--clips", "c", *OPTIONS, "--ranks", "2", "--device", "cuda:1"), "--device cuda:1 is one device"),
        (("--clips", "none.jsonl", *OPTIONS), "none.jsonl"),
        (("--cache", "none"), "none: no such folder of caches"),
    ],
)
def test_what_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    write_video(tmp_path / "c" / "hook.mp4", torch.zeros(9, 32, 32, 3, dtype=torch.uint8), 16)
    code, told = run(monkeypatch, capsys, "--out", "s", *words)
    assert code == 2 and "\n" not in told and expected in told
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_every_gpu_gets_a_rank_unless_a_device_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clips: Path, tmp_path: Path
) -> None:
    started: list[tuple[int | None, list[str]]] = []

    def launch(config: LaunchConfig, words: Sequence[str]) -> int:
        started.append((config.ranks, list(words)))
        return 7

    monkeypatch.setattr("wanmoe.launch.launcher.launch", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["--clips", str(clips), "--out", str(tmp_path / "s"), *OPTIONS]
    code, _ = run(monkeypatch, capsys, *words)
    assert code == 7 and started == [(2, ["prepare", *words])]
    assert rank_count(None, "cuda:1") == rank_count(None, "cpu") == rank_count(1, None) == 1
    assert rank_count(3, "cpu") == 3
    with pytest.raises(WanmoeError, match="--ranks 3, but there are 2 GPUs"):
        rank_count(3, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert rank_count(None, None) == 1 and rank_count(4, None) == 4


def test_caches_of_musubi_need_no_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c").mkdir()
    latent = {"latents_3x4x6_bfloat16": torch.randn(16, 3, 4, 6).bfloat16()}
    save_file(latent, tmp_path / "c" / "a_00000-009_0854x0480_wan.safetensors", {"architecture": "wan"})
    text = {"varlen_t5_bfloat16": torch.randn(3, 64).bfloat16()}
    about = {"architecture": "wan", "caption1": "the hook"}
    save_file(text, tmp_path / "c" / "a_wan_te.safetensors", about)
    words = ("--cache", tmp_path / "c", "--out", tmp_path / "s")
    code, told = run(monkeypatch, capsys, *words)
    assert code == 0 and "kept 1 train samples in 2 shards" in told
    code, told = run(monkeypatch, capsys, *words, "--text", "hash", "--vae", "haar")
    assert code == 0, told
    data = ShardDataset(tmp_path / "s")
    assert data.null_context is not None and data.manifest["codec"]["fingerprint"] != "unknown"
