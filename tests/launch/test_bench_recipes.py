"""The table of recipes: a real run at the smallest sizes, and what the table makes of figures."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from wanmoe.launch import bench, bench_recipes
from wanmoe.launch.bench_recipes import Sizes, run_recipes, table, write_result
from wanmoe.launch.recipes import BASE_LINE, MAIN, RECIPES
from wanmoe.moe_lora import WanmoeError

STAGED = "A, then B: base frozen, one expert a clip"
SMALL = Sizes(
    size=(64, 64),
    frames=9,
    clips=8,
    val=4,
    background=8,
    few=4,
    pairs=6,
    batch=2,
    pretrain_steps=2,
    steps=4,
    judge_steps=4,
)
FEW = "base + experts (rule), few clips"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, result, lines) of three recipes with one seed."""
    out, said = tmp_path_factory.mktemp("recipes") / "out", []
    names = ["frozen base", STAGED, FEW]
    result = run_recipes(names, [0], out, SMALL, 2, ["wanmoe", "bench", "recipes"], said.append)
    return out, result, said


def test_recipes_are_trained_and_measured_with_their_parameters(done):
    out, result, said = done
    (frozen,), (staged,) = result["rows"]["frozen base"], result["rows"][STAGED]
    assert frozen["parameters"] == 0 and staged["parameters"] > 10_000
    assert "wrong" not in frozen and "wrong" in staged
    # Nobody was trained against who judges.
    assert (out / "judge.safetensors").read_bytes() != (out / "classifier.safetensors").read_bytes()
    assert "classifier.safetensors" in next((out / "configs").glob("*few-clips-0-0.toml")).read_text()
    assert frozen["loss"] != staged["loss"] and 0 <= staged["pck"] <= 1 and 0 <= staged["identity"] <= 1
    assert frozen["pairs"] != staged["pairs"] > 0
    log = next((out / "runs").glob("*few-clips-0")) / "0-b" / "config.toml"
    assert str(out / "shards" / "few") in log.read_text()
    assert len(list(out.glob("runs/*-0/1-b/adapter.safetensors"))) == 1
    assert any(line.startswith(f"{STAGED}, seed 0: ") for line in said)
    json.dumps(result)


def test_a_second_call_takes_what_is_there(done, monkeypatch):
    out, result, _ = done
    monkeypatch.setattr(bench_recipes, "_run", lambda *_: pytest.fail("something was trained again"))
    again = run_recipes([STAGED], [0], out, SMALL, 1, [], lambda _: None)
    assert again["rows"][STAGED] == result["rows"][STAGED]
    assert (result["rows_found"], again["rows_found"]) == (0, 1)
    assert again["commits"] == result["commits"]


def test_a_folder_of_other_sizes_or_other_things_is_refused(done, tmp_path):
    with pytest.raises(WanmoeError, match="holds recipes of other sizes; choose another --out"):
        run_recipes(["frozen base"], [0], done[0], Sizes(), 1, [], lambda _: None)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(WanmoeError, match="is not empty and holds no recipes"):
        run_recipes(["frozen base"], [0], tmp_path, SMALL, 1, [], lambda _: None)


def test_an_unknown_recipe_is_named_with_those_there_are(tmp_path):
    with pytest.raises(WanmoeError, match="no recipe 'base adaptor'; there are: frozen base, "):
        run_recipes(["base adaptor"], [0], tmp_path, SMALL, 1, [], lambda _: None)


def test_a_failure_is_told_before_what_still_runs_has_ended(done, tmp_path):
    out, said = tmp_path / "out", []
    shutil.copytree(done[0], out)
    (out / "judge.safetensors").write_bytes(b"no classifier")
    with pytest.raises(WanmoeError, match=r"judge\.safetensors"):
        run_recipes(["frozen base"], [0], out, SMALL, 1, [], said.append)
    assert "judge.safetensors" in said[-1] and said[-1].endswith("; ending what still runs")


def test_a_training_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_recipes.sys, "executable", "false")
    with pytest.raises(WanmoeError, match=r"classifier\.log: exit code 1"):
        bench_recipes.Shared(tmp_path, SMALL).make_classifier()


def test_the_table_has_means_deviations_and_differences_by_seed(tmp_path):
    rows = {
        "frozen base": [{"loss": 3.0, "parameters": 0.0}, {"loss": 3.0, "parameters": 0.0}],
        BASE_LINE: [{"loss": 2.0, "parameters": 1234.0}, {"loss": 2.2, "parameters": 1234.0}],
        "experts": [{"loss": 1.9, "wrong": 0.5, "parameters": 1234.0}, {"loss": 2.0, "parameters": 1234.0}],
    }
    text = table({"rows": rows})
    assert "| recipe | trained parameters | held-out loss | wrong expert less right |" in text
    assert "| experts | 1,234 | 1.950 ± 0.071 | 0.500 |" in text
    assert "| experts | +0 | -0.150 ± 0.071 |  |" in text  # -0.1 and -0.2
    path = write_result({"rows": rows, "format": "x"}, tmp_path / "new")
    assert json.loads(path.read_text())["rows"] == rows
    assert path.with_suffix(".md").read_text() == text + "\n"


def test_the_main_rows_are_those_that_are_asked_for():
    assert set(MAIN) <= set(RECIPES) and BASE_LINE in MAIN and MAIN[0] == "frozen base"
    for recipe in RECIPES.values():
        assert not recipe.stages or sum(stage.share for stage in recipe.stages) == pytest.approx(1.0)


def test_the_command_takes_names_with_semicolons(tmp_path):
    words = ["recipes", "--rows", "frozen base; base adaptor", "--out", str(tmp_path / "out")]
    error = CliRunner().invoke(bench.app, words).exception
    assert isinstance(error, WanmoeError) and "no recipe 'base adaptor'" in str(error)
