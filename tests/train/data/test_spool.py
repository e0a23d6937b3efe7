"""Finished samples on disk: what comes back is what was written, and no two processes write there at once."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data.spool import DamagedError, Spool

RECIPE: dict[str, Any] = {
    "codec": {"fingerprint": "a"},
    "settings": {"fps": None},
    "samples": {"x": "1", "y": "2"},
}


def opened(out: Path, recipe: dict[str, Any] = RECIPE) -> Spool:
    spool = Spool(out)
    assert spool.open(recipe) is None
    return spool


def test_a_sample_comes_back_as_it_was_put(tmp_path: Path) -> None:
    spool = opened(tmp_path / "s")
    tensors = {
        "latent": torch.randn(16, 3, 4, 6).to(torch.bfloat16),
        "roi": torch.arange(72, dtype=torch.uint8).reshape(3, 4, 6),
        "cut": torch.randn(5, 7).half()[:, 1:4],
        "none": torch.zeros(0, 2),
    }
    meta = {"caption": "电凝钩", "fps": 25.0, "tips": [{"x": 0.1}], "phase": None}
    spool.put("a_b-w000_0", tensors, meta)
    found, told = spool.get("a_b-w000_0")
    assert told == meta and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    spool.put("left", {}, {"dropped": "why"})
    assert spool.get("left") == ({}, {"dropped": "why"})
    assert spool.sound("left") is True and spool.sound("never") is None


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    spool = opened(tmp_path / "s")
    spool.put(
        "x", {"latent": torch.randn(2, 3), "roi": torch.ones(3, dtype=torch.uint8)}, {"caption": "hook"}
    )
    whole = spool.path("x").read_bytes()
    for place in range(8, len(whole)):
        if whole[place : place + 1] == b" ":
            continue  # the padding of the header
        spool.path("x").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert spool.sound("x") is False, place
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        spool.path("x").write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"s\.work/x\.safetensors: ") as caught:
            spool.get("x")
        assert "\n" not in str(caught.value)


def test_a_failed_run_keeps_what_is_finished_and_a_good_one_nothing(tmp_path: Path) -> None:
    def run(*names: str, fail: bool) -> None:
        with Spool(tmp_path / "s") as spool:
            spool.open(RECIPE)
            for name in names:
                spool.put(name, {}, {})
            if fail:
                raise WanmoeError("no more")

    with pytest.raises(WanmoeError, match="no more"):
        run(fail=True)
    assert list(tmp_path.iterdir()) == [], "an empty folder is not left behind"
    with pytest.raises(WanmoeError, match="no more"):
        run("x", fail=True)
    assert Spool(tmp_path / "s").sound("x") is True
    run("y", fail=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"codec": {"fingerprint": "b"}}, "codec.fingerprint is b, it was a"),
        ({"settings": {"fps": 16.0}}, "settings.fps is 16.0, it was None"),
        ({"samples": {"x": "1", "z": "3"}}, "the clips differ: 1 new or changed, 1 gone"),
        ({"samples": {"x": "9", "y": "2"}}, "the clips differ: 1 new or changed, 0 gone"),
        ({"samples": {"y": "2", "x": "1"}}, "another order"),
        ({"format": "2"}, "format is 2, it was None"),
    ],
)
def test_samples_of_another_recipe_are_removed_and_the_difference_told(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(WanmoeError), opened(tmp_path / "s") as spool:
        spool.put("x", {}, {})
        raise WanmoeError
    with pytest.raises(WanmoeError), opened(tmp_path / "s") as spool:
        assert spool.sound("x") is True, "an equal recipe keeps them"
        raise WanmoeError
    again = Spool(tmp_path / "s")
    assert again.open(RECIPE | change) == why
    assert again.sound("x") is None
    assert sorted(path.name for path in again.folder.iterdir()) == ["lock", "plan.json"]


def test_a_damaged_plan_is_another_plan(tmp_path: Path) -> None:
    with pytest.raises(WanmoeError), opened(tmp_path / "s") as spool:
        spool.put("x", {}, {})
        (spool.folder / "plan.json").write_text('{"codec": ')
        raise WanmoeError
    again = Spool(tmp_path / "s")
    assert again.open(RECIPE) is not None and again.sound("x") is None


def test_what_a_killed_process_left_half_way_is_removed(tmp_path: Path) -> None:
    folder = opened(tmp_path / "s").folder
    (folder / ".x.safetensors.77-ab.partial").write_bytes(b"half")
    again = opened(tmp_path / "s")  # the first one's lock went with it
    again.stop()
    assert again.stopping
    del again
    assert not opened(tmp_path / "s").stopping
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "plan.json"]


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    with opened(tmp_path / "s"):
        with pytest.raises(WanmoeError, match=rf"s\.work: process {os.getpid()} on .* wait for it"):
            Spool(tmp_path / "s").open(RECIPE)
        with opened(tmp_path / "other"):
            pass
    with opened(tmp_path / "s"):
        pass


def test_a_lock_on_a_folder_that_was_just_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = fcntl.flock

    def flock(file: Any, how: int) -> None:
        if not calls:
            shutil.rmtree(tmp_path / "s.work")  # by the process that held it
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with opened(tmp_path / "s"):
        assert len(calls) == 2
        with pytest.raises(WanmoeError, match="is preparing there"):
            Spool(tmp_path / "s").open(RECIPE)
