"""An ablation from its file to its table, at the smallest sizes."""

import json
import math
import multiprocessing
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from wanmoe.launch import ablation_shared, cli
from wanmoe.launch.ablate_run import run_ablation
from wanmoe.launch.ablation import read_ablation
from wanmoe.launch.ablation_shared import Shared
from wanmoe.launch.ablation_table import columns, difference, read_result, table, write_result
from wanmoe.moe_lora import WanmoeError

SMALL = """
name = "small"
reference = "base"
figures = [
  "parameters", "loss", "roi", "pairs", "withheld", "wrong", "identity", "pck", "warped_psnr", "kid",
  "router_agreement", "train_s",
]
pairs = "pairs"
judge_steps = 4
seeds = 2
[scenes.clips]
clips = 8
val = 4
size = [64, 64]
frames = 9
router_prompts = true
[scenes.pairs]
clips = 1
val = 6
size = [64, 64]
frames = 9
instruments = 2
[base]
train.steps = 2
data.batch = 2
[common]
data.batch = 2
adapter = {blocks = 2, ffn_blocks = 2}
[stage.a]
train = {stage = "a", steps = 2}
[stage.b]
train = {stage = "b", steps = 2}
[[row]]
name = "frozen"
stages = []
[[row]]
name = "base"
stages = ["a"]
[[row]]
name = "experts"
axis = "after it"
stages = ["a", "b"]
[[row]]
name = "two experts"
axis = "after it"
stages = ["b"]
set.adapter.experts = [
  {name = "One", keywords = ["Scissors", "Suction"]},
  {name = "Two", keywords = ["Hook/Electrocautery", "Other"]},
]
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any], list[str]]:
    """(file, folder, result, lines) of four rows with two seeds."""
    root, said = tmp_path_factory.mktemp("ablation"), []
    (root / "small.toml").write_text(SMALL)
    plan = read_ablation(root / "small.toml")
    result = run_ablation(plan, root / "out", 2, CPU, ["wanmoe", "ablate"], said.append)
    return root / "small.toml", root / "out", result, said


def test_rows_are_trained_once_where_they_are_alike_and_measured(
    done: tuple[Path, Path, dict[str, Any], list[str]],
) -> None:
    _, out, result, said = done
    assert result["failed"] == {}
    assert "6 trainings, 0 of them there; 7 rows" in said, "stage a is one for two rows, the frozen base one"
    stages = [path.name[0] for path in (out / "stages").iterdir() if path.is_dir()]
    assert sorted(stages) == ["a", "a", "b", "b", "b", "b"]
    frozen, base, experts = (result["rows"][name][0]["figures"] for name in ("frozen", "base", "experts"))
    assert frozen["parameters"]["value"] == 0 < base["parameters"]["value"] < experts["parameters"]["value"]
    assert "wrong" not in base and "wrong" in experts
    assert len(experts["loss"]["each"]) == 4
    assert experts["loss"]["value"] == pytest.approx(sum(experts["loss"]["each"]) / 4)
    assert frozen["pairs"]["value"] != frozen["roi"]["value"] > 0
    assert experts["kid"]["each"] is None and 0 < experts["warped_psnr"]["value"] < 100
    assert base["train_s"]["value"] < experts["train_s"]["value"]
    assert len(result["commits"]) == 1
    # Nobody was trained against who judges; other experts have a classifier of their own.
    assert (out / "judge.safetensors").read_bytes() != (out / "classifier.safetensors").read_bytes()
    assert len(list(out.glob("classifier-*.safetensors"))) == 1
    json.dumps(result)


def test_a_second_call_takes_what_is_there_and_more_rows_are_added(
    done: tuple[Path, Path, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, result, _ = done
    monkeypatch.setattr(ablation_shared, "run_logged", lambda *_: pytest.fail("something was trained again"))
    said: list[str] = []
    again = run_ablation(read_ablation(file), out, 1, CPU, [], said.append, names=["experts"])
    assert "6 trainings, 6 of them there; 7 rows" in said
    assert again["rows"] == result["rows"], "what was measured before stays in the table"


def test_a_training_that_was_cut_off_goes_on(done: tuple[Path, Path, dict[str, Any], list[str]]) -> None:
    """Without made.json it is not done; wanmoe train itself finds nothing left to do."""
    file, out, result, _ = done
    shared = Shared(read_ablation(file), out, CPU)
    key = shared.key(shared.plan.rows["base"][0], 0, None, "")
    (out / "stages" / key / "made.json").unlink()
    assert not shared.is_made(key)
    again = run_ablation(shared.plan, out, 1, CPU, [], lambda _: None, names=["base"])
    assert again["failed"] == {} and shared.is_made(key)
    same = ("loss", "roi", "identity")
    for name in same:
        assert again["rows"]["base"][0]["figures"][name] == result["rows"]["base"][0]["figures"][name]


def test_other_seeds_stages_and_keys_are_other_trainings(
    done: tuple[Path, Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    file, out, _, _ = done
    shared = Shared(read_ablation(file), out, CPU)
    (step,) = shared.plan.rows["base"]
    other = step.model_copy(update={"tree": {**step.tree, "optimizer": {"lr": 1.0}}})
    keys = [
        shared.key(step, 0, None, ""),
        shared.key(step, 1, None, ""),
        shared.key(step, 0, "a-1", ""),
        shared.key(other, 0, None, ""),
    ]
    assert len(set(keys)) == 4 and keys[0] == shared.key(step, 0, None, "")


def test_a_failure_costs_its_own_rows_alone(
    done: tuple[Path, Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    out = done[1]
    bad = tmp_path / "small.toml"
    # More blocks than the model has: the schema takes it, the run does not.
    bad.write_text(SMALL + '[[row]]\nname = "broken"\nstages = [{use = "a", adapter.blocks = 99}, "b"]\n')
    said: list[str] = []
    found = run_ablation(read_ablation(bad), out, 1, CPU, [], said.append, names=["base", "broken"])
    assert set(found["rows"]) == {"frozen", "base", "experts", "two experts"}, "others stay as they were"
    written = write_result(found, tmp_path).with_suffix(".md").read_text()
    assert "Failed: broken, seed 0: " in written
    assert set(found["failed"]) == {"broken, seed 0", "broken, seed 1"}
    fault = found["failed"]["broken, seed 0"]
    assert re.fullmatch(r"/.*\.log: exit code 2: wanmoe: error.*: .*99.*", fault), fault
    assert any(line.startswith("broken, seed 0: ") for line in said)


def test_a_worker_that_the_system_kills_is_told(
    done: tuple[Path, Path, dict[str, Any], list[str]],
) -> None:
    def say(line: str) -> None:
        if "trainings" in line:
            for worker in multiprocessing.active_children():
                worker.kill()

    with pytest.raises(WanmoeError, match="a worker was killed.*the same command goes on from here"):
        run_ablation(read_ablation(done[0]), done[1], 1, CPU, [], say)


def test_a_folder_of_another_ablation_or_of_other_things_is_refused(
    done: tuple[Path, Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    file, out, _, _ = done
    other = tmp_path / "small.toml"
    other.write_text(SMALL.replace("train.steps = 2\n", "train.steps = 3\n"))
    with pytest.raises(WanmoeError, match="holds an ablation of other clips or another base"):
        run_ablation(read_ablation(other), out, 1, CPU, [], lambda _: None)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(WanmoeError, match="is not empty and holds no ablation"):
        run_ablation(read_ablation(file), tmp_path, 1, CPU, [], lambda _: None)


def test_a_base_may_be_a_folder_and_other_shards_are_another_ablation(
    done: tuple[Path, Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    """As Wan2.2 comes: its files in a folder."""
    _, out, _, _ = done
    (tmp_path / "wan").mkdir()
    shutil.copy(out / "base" / "model.safetensors", tmp_path / "wan")
    own = SMALL.replace("[base]\ntrain.steps = 2\ndata.batch = 2", '[base]\nmodel.dit = "wan"')
    for name in ("clips", "pairs"):
        own = re.sub(rf"\[scenes\.{name}\](\n\w+ = .*)+", f'[shards]\n{name} = "{out}/shards/{name}"', own)
    own = own.replace("[shards]\npairs", "pairs")
    (tmp_path / "own.toml").write_text(own)
    shared = Shared(read_ablation(tmp_path / "own.toml"), tmp_path / "out", CPU)
    assert shared.base == tmp_path / "wan" and shared.shards("pairs") == out / "shards" / "pairs"
    shared.claim()
    shutil.copy(out / "classifier.safetensors", shared.classifier())
    (step,) = shared.plan.rows["base"]
    assert shared.key(step, 0, None, "").startswith("a-")
    (tmp_path / "own.toml").write_text(own.replace("shards/pairs", "shards/clips"))
    other = Shared(read_ablation(tmp_path / "own.toml"), tmp_path / "out", CPU)
    with pytest.raises(WanmoeError, match="of other clips or another base"):
        other.claim()


def test_the_command(
    done: tuple[Path, Path, dict[str, Any], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file, out, result, _ = done

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wanmoe", "ablate", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        return int(stop.value.code or 0), told.out, (told.err.strip().splitlines() or [""])[-1]

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code, text, _ = run(file, "--out", out, "--track", uri)
    assert code == 0 and "| after it: two experts |" in text
    assert read_result(out / "ablation.json")["rows"].keys() == result["rows"].keys()
    runs = mlflow.MlflowClient(uri).search_runs(["1"])
    parents = {run_.data.tags.get("mlflow.parentRunId") for run_ in runs}
    assert len(runs) == 8 and len(parents) == 2, "one run of the ablation, and seven under it"
    code, text, _ = run(file, "--dry", "--rows", "experts")
    assert code == 0 and text.splitlines() == [
        "experts: a (2 steps) -> b (2 steps)",
        "4 trainings with 2 seeds, besides base and judges",
    ]
    code, _, line = run(file, "--rows", "base; expert")
    assert code == 2 and "no row 'expert'; there are: frozen; base; experts" in line
    code, _, line = run("nowhere")
    assert code == 2 and "nowhere: no such file; ablations that ship are recipes, seed-axes" in line


def result_of(rows: dict[str, list[dict[str, Any]]], reference: str = "one") -> dict[str, Any]:
    """A result of figures: by row and seed, key -> value or (value, each)."""

    def figure(value: Any) -> dict[str, Any]:
        value, each = value if isinstance(value, tuple) else (value, None)
        return {"value": value, "each": each}

    keys = list(dict.fromkeys(key for by_seed in rows.values() for row in by_seed for key in row))
    return {
        "format": "wanmoe-ablation/1",
        "reference": reference,
        "seeds": list(range(max(map(len, rows.values())))),
        "figures": keys,
        "axes": dict.fromkeys(rows, ""),
        "failed": {},
        "rows": {
            name: {
                seed: {"figures": {key: figure(value) for key, value in row.items()}}
                for seed, row in enumerate(by_seed)
            }
            for name, by_seed in rows.items()
        },
    }


def test_differences_are_paired_by_clip_and_their_interval_narrows() -> None:
    """Clips that differ much among themselves and little between two rows."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(60, generator=generator) * 10
    better = clips - 0.5 + 0.1 * torch.randn(60, generator=generator)
    one, two = ((float(values.mean()), values.tolist()) for values in (clips, better))
    found = difference(result_of({"one": [{"loss": one}], "two": [{"loss": two}]}), "two", "loss")
    assert found is not None and found.value == pytest.approx(-0.5, abs=0.05)
    assert found.low < found.value < found.high < 0 and found.high - found.low < 0.1


def test_seeds_that_disagree_widen_the_interval() -> None:
    clips = [1.0] * 30
    one = [{"loss": (1.0, clips)} for _ in range(3)]
    two = [{"loss": (1 + shift, [1 + shift] * 30)} for shift in (-0.3, 0.1, 0.2)]
    found = difference(result_of({"one": one, "two": two}), "two", "loss")
    assert found is not None and found.value == pytest.approx(0) and found.low < -0.1 and found.high > 0.1


@pytest.mark.parametrize(("seeds", "clips"), [(0.01, 0.03), (0.003, 0.07), (0.02, 0.02)])
def test_the_interval_over_three_seeds_holds_the_truth(seeds: float, clips: float) -> None:
    """Whichever of the two differs more among its kind; 95 % is the aim, seeds are few."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        apart = (
            seeds * rng.normal(size=(3, 1)) + clips * rng.normal(size=48) + 0.01 * rng.normal(size=(3, 48))
        )
        rows = {"one": np.zeros((3, 48)), "two": apart}
        by_seed = {
            name: [{"loss": (float(one.mean()), one.tolist())} for one in values]
            for name, values in rows.items()
        }
        found = difference(result_of(by_seed), "two", "loss")
        assert found is not None
        inside += found.low <= 0 <= found.high
    assert inside / 200 >= 0.88


def test_clips_without_the_figure_are_left_out() -> None:
    rows = {"one": [{"roi": (1.0, [1.0, None, 1.0])}], "two": [{"roi": (2.0, [1.5, None, 2.5])}]}
    found = difference(result_of(rows), "two", "roi")
    assert found is not None and (found.value, found.low, found.high) == (1.0, 0.5, 1.5)


def test_a_figure_of_a_set_has_an_interval_from_three_seeds_on() -> None:
    rows = {"one": [{"kid": 1.0}] * 3, "two": [{"kid": 1.1}, {"kid": 1.2}, {"kid": 1.3}]}
    found = difference(result_of(rows), "two", "kid")
    assert found is not None and found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(
        4.3027 * 0.1 / math.sqrt(3), rel=1e-4
    )  # Student, 2 degrees
    few = difference(result_of({name: values[:2] for name, values in rows.items()}), "two", "kid")
    assert few is not None and math.isnan(few.low)


def test_the_table_says_what_is_there_and_marks_what_is_sure(tmp_path: Path) -> None:
    both = (0, 0.2)
    rows: dict[str, list[dict[str, Any]]] = {
        "frozen": [{"loss": (3.0, [3.0] * 8), "parameters": 0.0}],
        "one": [{"loss": (2.0 + s, [2.0 + s] * 8), "parameters": 1234.0} for s in both],
        "two": [
            {"loss": (2.0 + s, [1.9 + s, 2.1 + s] * 4), "wrong": 0.5, "parameters": 1234.0} for s in (0, 0.2)
        ],
    }
    result = result_of(rows)
    assert columns(result) == ["loss", "parameters", "wrong"]
    text = table(result)
    assert "| row | held-out loss | trained parameters | wrong expert less right |" in text
    assert "| one | 2.100 ± 0.141 | 1,234 |  |" in text and "| frozen | 3.000 | 0 |  |" in text
    assert "over 8 held-out clips and 2 seeds:" in text
    assert "| frozen | +0.900 (−0.371 to +2.171) | −1,234 |  |" in text, "two seeds say little"
    two = next(line for line in text.splitlines()[8:] if line.startswith("| two"))
    assert "+0.000 (−0" in two and "**" not in two
    path = write_result(result, tmp_path)
    assert table(read_result(path)) == text and path.with_suffix(".md").read_text() == text + "\n"
    path.write_text("{}")
    with pytest.raises(WanmoeError, match="not the result of an ablation"):
        read_result(path)
