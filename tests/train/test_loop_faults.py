"""Faults in a run on two ranks, under every ZeRO stage: nothing changes that should not, and all are told."""

import json

import pytest
import torch
from safetensors.torch import load_file

from wanmoe.train import checkpoint
from wanmoe.train.tracking import read_metrics

# One gradient of one rank is spoiled at one step; what the adapter was before and after that step.
SPOILED = """
from wanmoe.train.optimizer_state import gather_state
side = trainer.sides[0]
now = {"on": False}
parameter = next(iter(side.trainable.values()))
parameter.register_hook(lambda gradient: gradient * float("VALUE") if now["on"] else gradient)
step = trainer.train_step
states = []
def watched(side):
    now["on"] = trainer.rank == 1 and trainer.step == 3
    told = step(side)
    states.append(gather_state(side.engine, side.trainable))
    return told
trainer.train_step = watched
trainer.fit()
same = [all(torch.equal(one[k], two[k]) for k in one) for one, two in zip(states, states[1:])]
if trainer.rank == 0:
    result = {"same": same}
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    ranks, config, tmp_path, zero, precision, value
):
    config["deepspeed"] = {"zero": zero}
    config["train"] |= {"precision": precision}
    text = ranks.run(config, 2, code=SPOILED.replace("VALUE", value), result=str(tmp_path / "found.json"))
    # Between the states after steps 3 and 4 nothing has moved; before and after, everything did.
    assert json.loads((tmp_path / "found.json").read_text())["same"] == [False, False, True, False, False]
    assert "step 4: the gradient is not finite; skipped on all ranks; samples: train_" in text
    skipped = [line["train/skipped_steps"] for line in read_metrics(tmp_path / "run") if "train/lr" in line]
    assert skipped == [0, 0, 0, 1, 1, 1]
    state = load_file(tmp_path / "run" / "resume" / "step_00000006" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


# The loss of one forward of the third step is NaN on all ranks.
LOST = """
from wanmoe.train.optimizer_state import gather_state
side, forwards = trainer.sides[0], 0
class Spoiled:
    def __call__(self, *args):
        global forwards
        forwards += 1
        loss = real(*args)
        return loss._replace(total=loss.total * float("nan")) if forwards == BAD else loss
    def __getattr__(self, name):
        return getattr(real, name)
real, side.objective = side.objective, Spoiled()
trainer.fit()
state = gather_state(side.engine, side.trainable)
if trainer.rank == 0:
    torch.save(state, STATE)
"""


@pytest.mark.parametrize(("zero", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "bf16")])
def test_a_step_is_dropped_whole_whichever_of_its_forwards_was_lost(ranks, config, tmp_path, zero, precision):
    """What the first forward has left behind must not reach the next step (ZeRO-2 keeps sums of its own)."""
    found = []
    for forward in (5, 6):
        config["deepspeed"] = {"zero": zero}
        config["train"] |= {"precision": precision, "accumulation": 2, "steps": 4}
        config["train"]["run"] = str(tmp_path / f"run{forward}")
        code = LOST.replace("BAD", str(forward)).replace("STATE", repr(str(tmp_path / f"{forward}.pt")))
        assert "step 3: the loss is not finite" in ranks.run(config, 2, code=code)
        found.append(torch.load(tmp_path / f"{forward}.pt"))
    first, second = found
    assert all(torch.equal(first[name], value) for name, value in second.items())


FULL = """
import collections
from wanmoe.train import checkpoint
usage = collections.namedtuple("usage", "total used free")
real = checkpoint.shutil.disk_usage
def full(path):
    return usage(100, 100, 0) if 2 <= trainer.step <= LAST else real(path)
checkpoint.shutil.disk_usage = full
trainer.fit()
"""


def test_a_full_disk_ends_the_run_and_keeps_the_last_save(ranks, config, tmp_path):
    config["train"] |= {"steps": 20, "save_every": 1, "keep": 9}
    codes, text = ranks.join(ranks.start(config, 2, code=FULL.replace("LAST", "20")))
    assert set(codes) == {2}, text[-3000:]
    assert "could not be saved" in text and "0.0 MB are free" in text and "Traceback" not in text
    states = checkpoint.states(tmp_path / "run" / "resume")
    assert [path.name for path in states] == ["step_00000001"]
    assert checkpoint.latest(tmp_path / "run" / "resume")[1] == []
    # There is room again.
    config["train"]["steps"] = 20
    assert "at step 1" in ranks.run(config, 2)


def test_a_run_may_go_on_until_there_is_room_again(ranks, config, tmp_path):
    config["train"] |= {"steps": 8, "save_every": 1, "keep": 9, "save_failure": "go_on"}
    text = ranks.run(config, 2, code=FULL.replace("LAST", "5"))
    assert "training goes on (train.save_failure)" in text
    states = checkpoint.states(tmp_path / "run" / "resume")
    assert states[0].name == "step_00000001" and states[-1].name == "step_00000008"
    assert len(states) < 8 and torch.isfinite(torch.tensor(read_metrics(tmp_path / "run")[-1]["val/loss"]))


def test_two_nodes_keep_frozen_shards_of_their_own(launcher, ranks, config, tmp_path):
    """Two fake nodes of two ranks: the base is sharded over all four, and once more within each node."""
    config["train"] |= {"global_batch": 4}
    nodes = [
        launcher.start(config | {"launch": section}, tmp_path / f"node{rank}.toml")
        for rank, section in enumerate(launcher.two_nodes(tmp_path, 2))
    ]
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts[0][-3000:]
    assert "global batch 4 on 4 ranks" in texts[0] and "base read in shards" in texts[0]
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    alone = tmp_path / "alone"
    config["train"] |= {"run": str(alone)}
    config["deepspeed"] = {"zero": 0}
    ranks.run(config, 1)
    expected = [line["train/loss"] for line in read_metrics(alone) if "train/loss" in line]
    assert losses == pytest.approx(expected, abs=1e-5)


def test_parameters_that_no_step_reaches_end_the_run_by_name(ranks, config):
    """Below the first band the experts have no share: a run would leave them as they are (trap A)."""
    config["train"] |= {"stage": "b", "steps": 30}
    config["objective"] |= {"t_range": [0.0, 0.1]}
    config["router"] = {"bands": [[0.0, 0.0], [0.2, 0.5]], "floor": 0.0}
    text = ranks.fail(config, 1)
    assert "parameters have had no gradient in" in text and "expert_" in text
    assert "is objective.t_range within router.bands, has every expert clips?" in text
    assert "Traceback" not in text
