"""The file of an ablation: what it spells out, and that faults are named before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from wanmoe.launch.ablate import PRESETS
from wanmoe.launch.ablation import FIGURES, over, read_ablation
from wanmoe.moe_lora import WanmoeError

HEAD = """
name = "small"
reference = "one"
[scenes.clips]
[scenes.few]
clips = 4
[common]
train = {steps = 10}
optimizer.lr = 1e-2
[stage.a]
train.stage = "a"
[stage.b]
train = {stage = "b", steps = 20}
"""


def written(tmp_path: Path, rows: str, head: str = HEAD) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(head + rows)
    return path


def test_rows_are_chains_with_their_keys(tmp_path: Path) -> None:
    plan = read_ablation(
        written(
            tmp_path,
            """
[[row]]
name = "base"
stages = []
[[row]]
name = "one"
axis = "stages"
stages = ["a", {use = "b", router.floor = 0.5, shards = "few"}]
[[row]]
name = "two"
like = "one"
set = {router = {floor = 0.25}, train.steps = 5}
""",
        )
    )
    assert plan.rows["base"] == [] and plan.reference == "one" and plan.axes["one"] == "stages"
    first, second = plan.rows["one"]
    assert first.use == "a" and first.shards == "clips"
    assert first.tree == {"train": {"steps": 10, "stage": "a"}, "optimizer": {"lr": 1e-2}}
    assert second.shards == "few" and second.tree["router"] == {"floor": 0.5}
    assert second.tree["train"] == {"steps": 20, "stage": "b"}
    same, changed = plan.rows["two"]
    assert same == first, "what two rows begin with alike is one training"
    assert changed.tree["router"] == {"floor": 0.25} and changed.tree["train"]["steps"] == 5
    assert changed.shards == "few"
    assert plan.base is not None and plan.base.tree["train"]["stage"] == "pretrain"


def test_a_grid_is_a_row_for_each_combination(tmp_path: Path) -> None:
    rows = """
[[row]]
name = "one"
stages = ["b"]
[[row]]
axis = "router"
like = "one"
grid = {"router.top_k" = [1, 2], "router.temperature" = [0.5, 2.0]}
[[row]]
name = "blocks"
like = "one"
grid = {"adapter.blocks" = [4, 6]}
"""
    plan = read_ablation(written(tmp_path, rows))
    assert list(plan.rows) == [
        "one",
        "router.top_k = 1, router.temperature = 0.5",
        "router.top_k = 1, router.temperature = 2.0",
        "router.top_k = 2, router.temperature = 0.5",
        "router.top_k = 2, router.temperature = 2.0",
        "blocks, adapter.blocks = 4",
        "blocks, adapter.blocks = 6",
    ]
    (step,) = plan.rows["router.top_k = 2, router.temperature = 0.5"]
    assert step.tree["router"] == {"top_k": 2, "temperature": 0.5}


def test_a_base_of_ones_own_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    head = HEAD.replace("[scenes.few]\nclips = 4\n", '[shards]\nmine = "../shards"\n')
    head = head.replace(
        "[common]", '[base]\nmodel.dit = "model.safetensors"\n[common]\nobjective.lpips = "alex.pth"'
    )
    (tmp_path / "in").mkdir()
    plan = read_ablation(written(tmp_path / "in", '[[row]]\nname = "one"\nstages = ["b"]\n', head))
    assert plan.base is None and plan.base_file == tmp_path / "in" / "model.safetensors"
    assert plan.spec.shards == {"mine": tmp_path / "shards"}
    assert plan.rows["one"][0].tree["objective"]["lpips"] == str(tmp_path / "in" / "alex.pth")


ONE = '[[row]]\nname = "one"\nstages = ["b"]\n'
LIKE = ONE + '[[row]]\nname = "x"\nlike = "one"\n'
X = ONE + '[[row]]\nname = "x"\n'


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('[[row]]\nname = "one"\nstages = ["c"]\n', "row 'one': no stage 'c'; there are a, b"),
        ('[[row]]\nname = "one"\nlike = "two"\n', "like: no row 'two' above it"),
        ('[[row]]\nname = "one"\n', "give its stages, or the row that it is like"),
        (ONE + ONE, "two rows are called 'one'"),
        (ONE + '[[row]]\nlike = "one"\n', "a row needs a name"),
        (ONE.replace("one", "two"), "reference: no row 'one'; nearest is 'two'"),
        (ONE + '[[row]]\nlike = "one"\ngrid = {"router.topk" = [1]}\n', "nearest is 'router.top_k'"),
        (
            ONE + '[[row]]\nname="x"\nlike = "one"\nset.router.floor = 2.0\n',
            "row 'x', stage 'b': router.floor",
        ),
        (LIKE + "set.routr.floor = 1.0\n", "unknown key 'routr'"),
        (
            ONE + '[[row]]\nname="x"\nstages = [{use = "b", shards = "no"}]\n',
            "no clips 'no'; there are clips, few",
        ),
        (
            ONE + '[[row]]\nname="x"\nstages = []\nset.router.floor = 1.0\n',
            "no stage whose keys could be set",
        ),
        (LIKE + "set.train.seed = 3\n", "row 'x', stage 'b': train.seed is given by the ablation"),
        (LIKE + 'grid = {"router.top_k" = []}\n', "row 'x': grid: router.top_k has no values"),
        (LIKE.replace("x", "x|y"), "no | and no line break"),
        (ONE + 'stage = "a"\n', "row.0.stage: Extra inputs"),
    ],
)
def test_faults_are_named_with_file_row_and_key(tmp_path: Path, rows: str, said: str) -> None:
    path = written(tmp_path, rows)
    with pytest.raises(WanmoeError) as fault:
        read_ablation(path)
    assert str(path) in str(fault.value) and said in str(fault.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('figures = ["los"]', "no figure 'los'; nearest is 'loss'"),
        ('figures = ["pairs"]', "needs its clips: pairs"),
        ('measure = "other"', "no clips 'other'; there are clips, few"),
        ("seeds = 0", "seeds"),
    ],
)
def test_faults_of_the_head_are_named(tmp_path: Path, change: str, said: str) -> None:
    path = written(tmp_path, ONE, change + HEAD)
    with pytest.raises(WanmoeError, match="small.toml") as fault:
        read_ablation(path)
    assert said in str(fault.value)


def test_trees_are_laid_over_without_being_changed() -> None:
    under: dict[str, Any] = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    assert over(under, {"a": {"y": {"w": 4}}, "b": {"c": 5}}) == {
        "a": {"x": 1, "y": {"z": 2, "w": 4}},
        "b": {"c": 5},
    }
    assert under == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}


def test_the_files_that_ship_are_right_and_use_known_figures() -> None:
    files = sorted(PRESETS.glob("*.toml"))
    assert {path.stem for path in files} == {"recipes", "seed-axes"}
    for path in files:
        plan = read_ablation(path)
        assert plan.reference in plan.rows and set(plan.spec.figures) <= set(FIGURES)
    axes = set(read_ablation(PRESETS / "seed-axes.toml").axes.values())
    assert {"adapter", "experts", "router", "noise level", "region"} <= axes, "the five of the seed"
