"""Resume states are whole or absent; a damaged one is named and the one before it is taken."""

import contextlib
import errno
import functools
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from wanmoe.moe_lora import WanmoeError
from wanmoe.train import checkpoint, resume


def commit(folder, step, keep=2):
    return checkpoint.commit(folder, {"param/x": torch.full((3,), float(step))}, {"step": step}, keep)


def test_the_newest_state_is_read_back_and_old_ones_are_pruned(tmp_path):
    for step in (5, 10, 15):
        commit(tmp_path, step)
    assert [p.name for p in checkpoint.states(tmp_path)] == ["step_00000010", "step_00000015"]
    path, complaints = checkpoint.latest(tmp_path)
    tensors, trainer = checkpoint.read(path)
    assert tensors["param/x"].tolist() == [15, 15, 15] and trainer == {"step": 15} and complaints == []


def test_a_state_never_prunes_itself_and_sets_those_of_an_abandoned_attempt_aside(tmp_path, caplog):
    for step in (100, 200):
        commit(tmp_path, step)
    commit(tmp_path, 50)
    assert [p.name for p in checkpoint.states(tmp_path)] == ["step_00000050"]
    for step in (100, 200):
        tensors, _ = checkpoint.read(tmp_path / f"aside-step_{step:08d}-1")
        assert tensors["param/x"].tolist() == [step] * 3
        assert f"is kept as {tmp_path}/aside-step_{step:08d}-1" in caplog.text


def test_states_are_ordered_by_their_number(tmp_path):
    last = 10**8
    for step in (last - 1, last, last + 1):
        commit(tmp_path, step)
    assert [checkpoint.read(p)[1]["step"] for p in checkpoint.states(tmp_path)] == [last, last + 1]
    assert checkpoint.latest(tmp_path)[0].name == "step_100000001"


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


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def other_format(state):
    manifest = json.loads((state / "manifest.json").read_text())
    (state / "manifest.json").write_text(json.dumps(manifest | {"format": "wanmoe-resume/0"}))


DAMAGES = {
    "flipped": lambda state: flip(state / "state.safetensors"),
    "cut": lambda state: cut(state / "state.safetensors"),
    "empty": lambda state: (state / "state.safetensors").write_bytes(b""),
    "missing": lambda state: (state / "state.safetensors").unlink(),
    "other trainer": lambda state: (state / "trainer.json").write_text("{}"),
    "missing trainer": lambda state: (state / "trainer.json").unlink(),
    "manifest cut": lambda state: cut(state / "manifest.json"),
    "manifest empty": lambda state: (state / "manifest.json").write_text(""),
    "manifest a list": lambda state: (state / "manifest.json").write_text("[]"),
    "manifest no text": lambda state: (state / "manifest.json").write_bytes(b"\xff\x00"),
    "manifest missing": lambda state: (state / "manifest.json").unlink(),
    "other format": other_format,
    "one more": lambda state: (state / "optim.safetensors").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_is_taken(tmp_path, damage):
    commit(tmp_path, 5)
    DAMAGES[damage](commit(tmp_path, 10))
    path, complaints = checkpoint.latest(tmp_path)
    assert path.name == "step_00000005"
    assert len(complaints) == 1 and "step_00000010" in complaints[0] and "\n" not in complaints[0]


def test_states_none_of_which_verifies_are_no_fresh_start(tmp_path, lone_group):
    folder = tmp_path / "resume"
    for step in (5, 10):
        flip(commit(folder, step) / "state.safetensors")
    with pytest.raises(WanmoeError, match=r"step_00000010: .*; .*step_00000005: .* train.resume = false"):
        resume.find(tmp_path, True, 0, print)
    # As told: they are set aside, and none is lost.
    assert resume.find(tmp_path, False, 0, print) == (None, {})
    assert len(checkpoint.states(tmp_path / "resume-before-1")) == 2


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("what", ["folder", "manifest.json", "state.safetensors"])
def test_storage_that_is_away_is_neither_damage_nor_a_fresh_start(tmp_path, monkeypatch, fault, what):
    commit(tmp_path, 5)
    commit(tmp_path, 10)
    file = tmp_path / "step_00000010" / what

    def away(real, wanted):
        def call(path, *more):
            if Path(path) == wanted:
                raise OSError(fault, os.strerror(fault), str(path))
            return real(path, *more)

        return call

    if what == "folder":
        file = tmp_path
        monkeypatch.setattr(os, "listdir", away(os.listdir, file))
    elif what == "manifest.json":
        monkeypatch.setattr(Path, "read_bytes", away(Path.read_bytes, file))
    else:
        monkeypatch.setattr(checkpoint, "file_sha256", away(checkpoint.file_sha256, file))
    told = f"{file}: could not be read .{os.strerror(fault)}.*train.resume = false"
    with pytest.raises(WanmoeError, match=told):
        checkpoint.latest(tmp_path)
    with pytest.raises(WanmoeError, match="could not be read"):
        commit(tmp_path, 10)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.states(tmp_path)] == ["step_00000005", "step_00000010"]
    assert checkpoint.latest(tmp_path)[1] == []


def test_a_state_that_is_gone_when_it_is_read_is_one_line(tmp_path):
    with pytest.raises(WanmoeError, match="step_00000007.*could not be read"):
        checkpoint.read(checkpoint.state_of(tmp_path, 7))


def in_a_fork(action):
    """(what a child process sent, its exit code); `action` is given the way to send."""
    parent, child = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=action, args=(child,))
    process.start()
    child.close()
    told = []
    with contextlib.suppress(EOFError):
        while True:
            told.append(parent.recv())
    process.join()
    return told, process.exitcode


def test_a_disk_that_fills_while_it_is_written_keeps_the_old_state_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for a quota: safetensors tells it by an error of its own."""
    commit(tmp_path, 5)

    def limited(pipe):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.commit(tmp_path, {"param/x": torch.zeros(100_000)}, {"step": 10}, 2)
        except WanmoeError as error:
            pipe.send(str(error))

    ((told,), code) = in_a_fork(limited)
    assert code == 0 and "\n" not in told
    assert "step_00000010: could not be saved (" in told and os.strerror(errno.EFBIG) in told
    assert "choose another train.run" in told
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]
    assert checkpoint.read(tmp_path / "step_00000005")[1] == {"step": 5}


def test_an_old_state_that_cannot_be_removed_is_told_and_fails_no_save(tmp_path, monkeypatch, caplog):
    for step in (5, 10):
        commit(tmp_path, step)
    real = os.rename

    def held(source, target):
        if Path(source).name == "step_00000005":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", held)
    assert commit(tmp_path, 15).name == "step_00000015"
    assert "step_00000015 is saved, but what it replaces could not be removed" in caplog.text
    monkeypatch.undo()
    commit(tmp_path, 20)
    assert [p.name for p in checkpoint.states(tmp_path)] == ["step_00000015", "step_00000020"]


def test_a_state_that_does_not_read_back_prunes_nothing(tmp_path, monkeypatch):
    for step in (5, 10):
        commit(tmp_path, step)
    real = os.rename

    def spoiled(source, target):
        real(source, target)
        flip(Path(target) / "state.safetensors")

    monkeypatch.setattr(os, "rename", spoiled)
    with pytest.raises(WanmoeError, match="step_00000015: is not what was written there .*checksum"):
        commit(tmp_path, 15)
    assert checkpoint.latest(tmp_path)[0].name == "step_00000010"
    assert len(checkpoint.states(tmp_path)) == 3


def watched(monkeypatch, seen):
    """Tells `seen` of what a save does to the disk: (when, what, name)."""

    def watch(owner, name, of):
        real = getattr(owner, name)

        def call(*arguments, **more):
            seen("before", name, of(arguments))
            result = real(*arguments, **more)
            seen("after", name, of(arguments))
            return result

        monkeypatch.setattr(owner, name, call)

    def where(path):
        return "staging" if Path(path).name.startswith(".tmp-") else Path(path).name

    watch(checkpoint, "save_file", lambda arguments: where(arguments[1]))
    watch(Path, "write_text", lambda arguments: where(arguments[0]))
    watch(os, "fsync", lambda arguments: where(os.readlink(f"/proc/self/fd/{arguments[0]}")))
    watch(os, "rename", lambda arguments: f"{where(arguments[0])} to {where(arguments[1])}")
    watch(checkpoint, "_verify", lambda arguments: where(arguments[0]))
    watch(checkpoint.shutil, "rmtree", lambda arguments: where(arguments[0]))


def test_what_is_flushed_comes_before_what_relies_on_it(tmp_path, monkeypatch):
    """What a power cut would lose is never what a later entry names."""
    folder = tmp_path / "run" / "resume"
    for step in (5, 10):
        commit(folder, step)
    done = []
    watched(monkeypatch, lambda when, *what: done.append(what) if when == "after" else None)
    commit(folder, 15)
    names = ["state.safetensors", "trainer.json", "manifest.json"]
    written = [("save_file", names[0]), ("write_text", names[1]), ("write_text", names[2])]
    assert done[:3] == written
    assert sorted(done[3:6]) == sorted(("fsync", name) for name in names)
    assert done[6:] == [
        ("fsync", "staging"),
        ("rename", "staging to step_00000015"),
        ("fsync", "resume"),
        ("fsync", "run"),
        ("fsync", tmp_path.name),
        ("rmtree", "staging"),  # nothing is there any more
        ("_verify", "step_00000015"),
        ("rename", "step_00000005 to staging"),
        ("rmtree", "staging"),
    ]


def test_a_kill_at_every_point_of_a_save_leaves_the_newest_whole_state(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    for step in (5, 10):
        commit(tmp_path / "resume", step)
    points = []
    with monkeypatch.context() as patch:
        watched(patch, lambda *point: points.append(point))
        shutil.copytree(tmp_path / "resume", tmp_path / "straight")
        commit(tmp_path / "straight", 15)
    renamed = points.index(("after", "rename", "staging to step_00000015"))
    assert len(points) > 20

    def killed(pipe, folder, number):
        count = itertools.count()
        watched(monkeypatch, lambda *point: number == next(count) and os.kill(os.getpid(), signal.SIGKILL))
        commit(folder, 15)

    for number in range(len(points)):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "resume", run / "resume")
        _, code = in_a_fork(functools.partial(killed, folder=run / "resume", number=number))
        assert code == -signal.SIGKILL
        expected = 15 if number >= renamed else 10
        checkpoint.clear_leftovers(run)
        path, complaints = checkpoint.latest(run / "resume")
        assert (checkpoint.read(path)[1]["step"], complaints) == (expected, []), points[number]
        assert {p.name[:5] for p in (run / "resume").iterdir()} == {"step_"}, points[number]
        # The next save is as any other.
        commit(run / "resume", 20)
        assert [p.name for p in checkpoint.states(run / "resume")] == [
            f"step_{expected:08d}",
            "step_00000020",
        ]
