"""A run that is killed loses nothing but the steps since its last save, wherever the kill falls.

Ranks are killed with SIGKILL: at a step, at random moments of training and saving, and in a loop of saves
alone.
"""

import json
import multiprocessing
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wanmoe.moe_lora.adapter_file import read_adapter
from wanmoe.train import checkpoint
from wanmoe.train.tracking import read_metrics

STEPS, KILLED = 20, 7

# What a rank does until it is shot: every rank at the end of a step, after the save of an earlier one.
UNTIL = """
import os, signal
step = trainer.train_step
def counted(side):
    told = step(side)
    if trainer.step == %d:
        trainer.saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return told
trainer.train_step = counted
trainer.fit()
"""


@pytest.fixture(scope="module")
def files(ranks, shards, base, tmp_path_factory):
    """What each stage starts from."""
    root = tmp_path_factory.mktemp("start")
    starts = {}
    for stage, before in (("a", None), ("b", None), ("c", "b")):
        tree = plan(shards, base, root / stage, stage, starts.get(before))
        ranks.run(tree, 2)
        starts[stage] = root / stage / "adapter.safetensors"
    return starts


def plan(shards, base, run, stage, adapter):
    tree = {
        "model": {"dit": str(base)} | ({} if adapter is None else {"adapter": str(adapter)}),
        "data": {"shards": str(shards), "batch": 1, "workers": 0},
        "objective": {"identity": 0},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "train": {
            "stage": stage,
            "run": str(run),
            "steps": STEPS,
            "global_batch": 4,
            "log_every": 1,
            "save_every": KILLED,
            "keep": 9,
        },
        "deepspeed": {"zero": 3},
        "tracking": {"enabled": False},
    }
    if stage == "a" or adapter is None:
        tree["adapter"] = {"blocks": 2, "ffn_blocks": 1}
    if stage == "c":
        tree["router"] = {"mode": "learned"}
    return tree


def state(run, step=STEPS):
    return load_file(Path(run) / "resume" / f"step_{step:08d}" / "state.safetensors")


def losses(run):
    return {line["step"]: line["train/loss"] for line in read_metrics(run) if "train/loss" in line}


@pytest.mark.parametrize(
    ("stage", "zero", "world"), [("a", 3, 2), ("b", 3, 2), ("c", 3, 2), ("b", 1, 2), ("b", 0, 1)]
)
def test_straight_is_bit_equal_to_seven_a_kill_and_thirteen(
    ranks, shards, base, files, tmp_path, stage, zero, world
):
    tree = plan(shards, base, tmp_path / "straight", stage, files["b"] if stage == "c" else None)
    tree["deepspeed"] = {"zero": zero}
    ranks.run(tree, world)
    straight = state(tmp_path / "straight")
    tree["train"]["run"] = str(tmp_path / "killed")
    codes, _ = ranks.join(ranks.start(tree, world, code=UNTIL % (KILLED + 2)))
    assert codes == [-signal.SIGKILL] * world
    assert [path.name for path in checkpoint.states(tmp_path / "killed" / "resume")] == ["step_00000007"]
    assert f"at step {KILLED}" in ranks.run(tree, world)
    resumed = state(tmp_path / "killed")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    ours, theirs = (read_adapter(tmp_path / run / "adapter.safetensors")[1] for run in ("killed", "straight"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# The gradients of the second step are not finite; the run ends with its third, or with its last.
SKIPPED = """
update = type(trainer.sides[0]).update
def spoiled(side):
    if side.step == 1:
        next(iter(side.trainable.values())).grad.fill_(float("nan"))
    return update(side)
type(trainer.sides[0]).update = spoiled
trainer.fit()
"""


def test_a_resume_after_a_skipped_step_is_bit_equal(ranks, shards, base, tmp_path):
    """Adam has not counted that step, nor may it after the resume."""
    tree = plan(shards, base, tmp_path / "straight", "b", None)
    tree["deepspeed"] = {"zero": 0}
    tree["train"] |= {"steps": 6, "save_every": 3}
    assert "step 2: the gradient is not finite" in ranks.run(tree, 1, code=SKIPPED)
    straight = state(tmp_path / "straight", 6)
    run = tmp_path / "again"
    (run / "resume").mkdir(parents=True)
    third = "resume/step_00000003"
    shutil.copytree(tmp_path / "straight" / third, run / third)
    tree["train"]["run"] = str(run)
    assert "at step 3" in ranks.run(tree, 1)
    assert all(torch.equal(state(run, 6)[name], value) for name, value in straight.items())
    assert json.loads((run / "resume" / "step_00000006" / "trainer.json").read_text())["skipped"] == 1


def test_a_run_moves_from_two_ranks_to_four_to_one(ranks, shards, base, tmp_path):
    """The same samples at each step, and the same run but for the order of sums; other ZeRO stages too."""
    tree = plan(shards, base, tmp_path / "straight", "b", None)
    ranks.run(tree, 2)
    tree["train"]["run"] = str(tmp_path / "moved")
    for world, zero, until in ((2, 3, 7 + 1), (4, 3, 14 + 1), (1, 0, None)):
        tree["deepspeed"] = {"zero": zero}
        if until is None:
            assert "at step 14" in ranks.run(tree, world)
        else:
            codes, _ = ranks.join(ranks.start(tree, world, code=UNTIL % until))
            assert codes == [-signal.SIGKILL] * world
    expected = losses(tmp_path / "straight")
    assert losses(tmp_path / "moved") == {
        step: pytest.approx(loss, abs=1e-5) for step, loss in expected.items()
    }
    files = (tmp_path / run / "adapter.safetensors" for run in ("moved", "straight"))
    ours, theirs = (read_adapter(file)[1] for file in files)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


def test_fifty_kills_at_random_moments(ranks, shards, base, tmp_path):
    """A run that saves at every second step is shot after a random time, and started again."""
    chance = random.Random(0)
    run = tmp_path / "run"
    tree = plan(shards, base, run, "a", None)
    tree["train"] |= {"steps": 10**6, "global_batch": 1, "save_every": 2, "keep": 2}
    tree["deepspeed"] = {"zero": 0}
    before, lost, inside = 0, [], 0
    for _ in range(50):
        (process,) = ranks.start(tree, 1)
        offset = process.log.stat().st_size if process.log.exists() else 0
        until = time.monotonic() + 120
        while not re.search(rf"step {before + 1}: loss", text_of(process, offset)):
            assert process.is_alive() and time.monotonic() < until, text_of(process, offset)[-3000:]
            process.join(timeout=0.02)
        process.join(timeout=chance.uniform(0.0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        text = text_of(process, offset)
        inside += any((run / "resume").glob(".tmp-*"))
        path, complaints = checkpoint.latest(run / "resume")
        step = 0 if path is None else int(checkpoint.read(path)[1]["step"])
        assert complaints == []
        # What was said to be saved is there; beyond it at most the save that was under way is gone.
        assert step >= max([before, *map(int, re.findall(r"step (\d+): wrote", text))])
        reached = max(map(int, re.findall(r"step (\d+): loss", text)))
        lost.append(reached - step)
        before = step
    assert before > 50 and max(lost) <= 4
    assert inside > 0, "no kill has met a save"
    tree["train"]["steps"] = before + 2
    changed = json.loads(json.dumps(tree))
    assert "belongs to another run (steps was 1000000" in ranks.fail(changed, 1)
    assert not list((run / "resume").glob(".tmp-*"))  # the next start has cleared them away


def text_of(process, offset):
    return process.log.read_bytes()[offset:].decode(errors="replace") if process.log.exists() else ""


def commit_for_ever(folder, step):
    """Saves a growing step as fast as it can; each acknowledged by a byte in a pipe."""
    tensors = {"param/x": torch.full((200_000,), float(step))}
    while True:
        step += 1
        tensors["param/x"].fill_(step)
        checkpoint.commit(folder, tensors, {"step": step}, 2)
        with open(folder / "said", "w") as file:
            file.write(str(step))


def test_two_hundred_kills_inside_of_saves(tmp_path):
    chance, context = random.Random(1), multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    folder, step, inside = tmp_path / "resume", 0, 0
    folder.mkdir()
    for _ in range(200):
        process = context.Process(target=commit_for_ever, args=(folder, step))
        process.start()
        process.join(timeout=chance.uniform(0.005, 0.05))
        process.kill()
        process.join()
        inside += any(folder.glob(".tmp-*"))
        said = (folder / "said").read_text() if (folder / "said").exists() else ""
        path, complaints = checkpoint.latest(folder)
        now = 0 if path is None else checkpoint.read(path)[1]["step"]
        assert complaints == [] and now >= max(int(said or 0), step)
        if path is not None:
            assert checkpoint.read(path)[0]["param/x"].unique().tolist() == [now]
        step = now
        checkpoint.clear_leftovers(tmp_path)
    assert step > 100 and inside > 20
