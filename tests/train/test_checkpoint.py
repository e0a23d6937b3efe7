"""Resume states are whole or absent; a damaged one is named and the one before it is taken."""

import errno
import json

import pytest
import torch

from wanmoe.moe_lora import WanmoeError
from wanmoe.train import checkpoint


def commit(folder, step, keep=2):
    return checkpoint.commit(folder, {"param/x": torch.full((3,), float(step))}, {"step": step}, keep)


def test_the_newest_state_is_read_back_and_old_ones_are_pruned(tmp_path):
    for step in (5, 10, 15):
        commit(tmp_path, step)
    assert [p.name for p in checkpoint.states(tmp_path)] == ["step_00000010", "step_00000015"]
    path, complaints = checkpoint.latest(tmp_path)
    tensors, trainer = checkpoint.read(path)
    assert tensors["param/x"].tolist() == [15, 15, 15] and trainer == {"step": 15} and complaints == []


def test_a_state_never_prunes_itself_and_drops_those_of_an_abandoned_attempt(tmp_path):
    for step in (100, 200):
        commit(tmp_path, step)
    commit(tmp_path, 50)
    assert [p.name for p in checkpoint.states(tmp_path)] == ["step_00000050"]


def test_a_fresh_start_sets_old_states_aside(tmp_path):
    folder = tmp_path / "resume"
    assert checkpoint.set_aside(folder) is None
    for expected in ("resume-before-1", "resume-before-2"):
        commit(folder, 5)
        assert checkpoint.set_aside(folder).name == expected
        assert checkpoint.latest(folder) == (None, [])
    assert checkpoint.latest(tmp_path / "resume-before-1")[0] is not None


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: flip(state / "state.safetensors"),
        lambda state: (state / "state.safetensors").unlink(),
        lambda state: (state / "trainer.json").write_text("{}"),
        lambda state: (state / "manifest.json").write_text("{"),
        lambda state: (state / "manifest.json").write_text("[]"),
        lambda state: (state / "manifest.json").unlink(),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_is_taken(tmp_path, damage):
    commit(tmp_path, 5)
    damage(commit(tmp_path, 10))
    path, complaints = checkpoint.latest(tmp_path)
    assert path.name == "step_00000005"
    assert len(complaints) == 1 and "step_00000010" in complaints[0] and "\n" not in complaints[0]


def test_no_space_left_keeps_the_old_state_and_leaves_nothing_behind(tmp_path, monkeypatch):
    commit(tmp_path, 5)

    def full(*_arguments, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(WanmoeError, match=r"step_00000010: could not be saved .*No space left on device"):
        commit(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]
    assert json.loads((tmp_path / "step_00000005" / "trainer.json").read_text()) == {"step": 5}
