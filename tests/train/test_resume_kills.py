"""A run that is killed loses nothing but the steps since its last save, wherever the kill falls.

Ranks are killed with SIGKILL: at a step, at random moments of training and saving, and in a loop of saves
alone.
"""

import contextlib
import inspect
import json
import multiprocessing
import random
import re
import shutil
import signal
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


def shot_inside(commit, number, calls, told):
    """`commit` that is shot before its so-manieth call of a C function in the save of this number, or that
    tells a file how many calls there are if it lives that long."""
    import os
    import signal
    import sys
    from pathlib import Path

    saves = made = 0

    def count(frame, event, argument):
        nonlocal made
        if event == "c_call":
            if made == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            made += 1

    def counted(*arguments, **more):
        nonlocal saves
        saves += 1
        if saves != number:
            return commit(*arguments, **more)
        sys.setprofile(count)
        try:
            return commit(*arguments, **more)
        finally:
            sys.setprofile(None)
            Path(told).write_text(str(made))

    return counted


SHOT = """
from wanmoe.train import checkpoint
checkpoint.commit = shot_inside(checkpoint.commit, %r, %r, %r)
trainer.fit()
"""


def test_fifty_kills_at_random_moments(ranks, shards, base, tmp_path):
    """A run that saves at every second step is shot, and started again: half of the shots fall after a random
    time, half at a random call inside a save."""
    chance = random.Random(0)
    run, calls = tmp_path / "run", tmp_path / "calls"
    tree = plan(shards, base, run, "a", None)
    tree["train"] |= {"steps": 10**6, "global_batch": 1, "save_every": 2, "keep": 2}
    tree["deepspeed"] = {"zero": 0}
    before, least, lost = 0, 0, []
    for kill in range(51):
        # The first only counts the calls of a save that has others to prune.
        inside = kill % 2 == 0
        number = chance.randint(1, 3) if kill else 4
        at = chance.randrange(int(calls.read_text())) if kill else -1
        code = inspect.getsource(shot_inside) + SHOT % (number if inside else 0, at, str(calls))
        (process,) = ranks.start(tree, 1, code=code)
        offset = process.log.stat().st_size if process.log.exists() else 0
        if inside and kill:
            process.join(timeout=300)
            least = before + 2 * (number - 1)
        else:
            wanted = rf"step {before + 1}: loss"
            while not re.search(wanted, text_of(process, offset)) or not text_at(calls):
                assert process.is_alive(), text_of(process, offset)[-3000:]
                process.join(timeout=0.02)
            process.join(timeout=chance.uniform(0.0, 0.5))
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL, text_of(process, offset)[-3000:]
        text = text_of(process, offset)
        path, complaints = checkpoint.latest(run / "resume")
        step = 0 if path is None else int(checkpoint.read(path)[1]["step"])
        assert complaints == []
        # What was said to be saved is there; beyond it at most the save that was under way is gone.
        assert step >= max([before, least, *map(int, re.findall(r"step (\d+): wrote", text))])
        reached = max(map(int, re.findall(r"step (\d+): loss", text)))
        lost.append(reached - step)
        before = step
    assert before > 50 and max(lost) <= 4
    (run / "resume" / ".tmp-0123").mkdir()
    tree["train"]["steps"] = before + 2
    changed = json.loads(json.dumps(tree))
    assert "belongs to another run (train.steps was 1000000" in ranks.fail(changed, 1)
    assert not list((run / "resume").glob(".tmp-*"))  # the next start has cleared them away


def text_of(process, offset):
    return text_at(process.log)[offset:]


def text_at(path):
    return path.read_bytes().decode("latin-1") if path.exists() else ""


def save(commit, folder, step):
    """A state of which every value is its step."""
    commit(folder, {"param/x": torch.full((200_000,), float(step))}, {"step": step}, 2)


def saved(folder):
    """The step of the newest state, all of which must be of that step, once leftovers are cleared away."""
    path, complaints = checkpoint.latest(folder)
    assert complaints == []
    tensors, trainer = checkpoint.read(path)
    assert tensors["param/x"].unique().tolist() == [trainer["step"]]
    checkpoint.clear_leftovers(folder.parent)
    return trainer["step"]


def test_a_save_that_is_shot_at_any_of_its_calls_leaves_the_old_or_the_new_state(tmp_path):
    context, folder, calls = multiprocessing.get_context("fork"), tmp_path / "resume", tmp_path / "calls"
    torch.set_num_threads(1)
    for step in (1, 2):
        save(checkpoint.commit, folder, step)
    save(shot_inside(checkpoint.commit, 1, -1, calls), folder, 3)
    step, seen = 3, []
    total = int(calls.read_text())
    for call in range(0, total, max(total // 150, 1)):
        shot = shot_inside(checkpoint.commit, 1, call, calls)
        process = context.Process(target=save, args=(shot, folder, step + 1))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = saved(folder)
        assert now in (step, step + 1) and now >= max(seen, default=0)
        seen.append(now)
        step = now
    assert len(set(seen)) > 10 and seen[0] == 3


def save_for_ever(pipe, folder, step):
    while True:
        step += 1
        save(checkpoint.commit, folder, step)
        pipe.send(step)


def test_fifty_kills_at_random_times_of_saves(tmp_path):
    """In the middle of a write too, which is one call."""
    chance, context = random.Random(1), multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    folder, step = tmp_path / "resume", 0
    for _ in range(50):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(theirs, folder, step))
        process.start()
        theirs.close()
        said = ours.recv()
        process.join(timeout=chance.uniform(0.0, 0.03))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                said = ours.recv()
        step = saved(folder)
        assert said <= step <= said + 1
