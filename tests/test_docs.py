"""The commands of the guide, run as they stand, in order, in an empty folder (trap A28)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def blocks(language, page=GUIDE):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def run(block, place):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # What a test process sets for itself is not the user's.
    ours = {name: own for name, own in os.environ.items() if name not in ("TRITON_INTERPRET", "WDS_SECURE")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=place,
        env=ours | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder after all commands; the test fails on the first that fails."""
    place = tmp_path_factory.mktemp("guide")
    assert len(blocks("bash")) == 7
    for block in blocks("bash"):
        run(block, place)
    return place


def test_the_commands_leave_what_the_guide_says(folder):
    for name in ("runs/base/model", "runs/a/adapter", "runs/b/adapter", "runs/c/adapter"):
        assert (folder / f"{name}.safetensors").stat().st_size > 10_000
    for name in ("suction.mp4", "mix.mp4", "b.json", "frozen.json", "runs/mlflow.db", "runs/a/metrics.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.rglob(".*tmp*"))


def run_python(code, place):
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_python_of_the_guide_runs(folder):
    (code,) = blocks("python")
    run_python(code, folder)
    assert (folder / "hook.mp4").stat().st_size > 0


def test_the_commands_of_the_page_on_generation(folder):
    commands = blocks("bash", (ROOT / "docs" / "generate.md").read_text(encoding="utf-8"))
    assert len(commands) == 2
    for block in commands:
        run(block, folder)
    for name in ("change.mp4", "change.gates.png", "clip-001.mp4", "mixed.mp4"):
        assert (folder / name).stat().st_size > 0


def test_the_commands_of_the_page_on_interoperation(folder):
    page = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    look, out, back = blocks("bash", page)
    assert "wanmoe-adapter/1" in run(look, folder)
    assert "rank 8, error" in run(out, folder)
    run(back, folder)
    for name in ("suction.safetensors", "mix-peft/adapter_config.json", "merged.safetensors"):
        assert (folder / name).stat().st_size > 0
    (code,) = blocks("python", page)
    assert run_python(code, folder).split()[2] == "0.0"  # an export without --rank is exact


def test_the_commands_of_the_page_on_training(folder):
    judges, joint, plans = blocks("bash", TRAINING)
    said = run(judges, folder)
    assert "held-out" in said
    for name in ("classifier.safetensors", "classifier.html", "detector.safetensors", "detector.html"):
        assert (folder / name).stat().st_size > 1000
    run(joint, folder)
    assert (folder / "runs" / "joint" / "adapter.safetensors").stat().st_size > 10_000
    assert "others that fit" in run(plans, folder) and "blocks = " in (folder / "ours.toml").read_text()


def test_the_table_of_stages_is_that_of_the_code():
    from wanmoe.train.stages import STAGES

    rows = {}
    for line in TRAINING.split("## Stages")[1].split("## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 6 and not set(cells[1]) <= {"-"}:
            rows[cells[0]] = cells[1:]
    stages = [STAGES[name] for name in ("a", "b+base", "b+base+router", "c", "pretrain")]
    assert [float(cell.split(",")[0]) for cell in rows["learning rate"]] == [stage.lr for stage in stages]
    words = {"base": "base adapter", "experts": "experts", "router": "router"}
    assert rows["trains"][:4] == [", ".join(words[part] for part in stage.trains) for stage in stages[:4]]
    loud = [{} if cell == "none" else json.loads(cell) for cell in rows["loudness of the experts"]]
    assert loud == [json.loads(json.dumps(dict(stage.loudness))) for stage in stages]
    schedule = [f"{stage.schedule}, {stage.warmup}" for stage in stages]
    assert rows["schedule, warm-up"] == schedule
    assert [float(cell) for cell in rows["epochs"]] == [stage.epochs for stage in stages]
    assert [json.loads(cell) for cell in rows["noise levels t"]] == [list(stage.t_range) for stage in stages]
    dropouts = [float(cell or 0) for cell in rows["rank dropout"]]
    assert dropouts == [stage.rank_dropout for stage in stages]
    losses: list[dict[str, float]] = []
    for cell in rows["loss"]:
        own = {term: float(weight) for weight, term in re.findall(r"([\d.]+) ([a-z_]+)", cell)}
        losses.append(({} if not cell.startswith("+") else losses[-1]) | own)
    assert losses == [dict(stage.weights) for stage in stages]


def test_the_commands_of_the_page_on_data(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    cut, encode, repair, bench = blocks("bash", page)
    run(cut, tmp_path)
    clips = (tmp_path / "clips.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(clips) == 7 and {json.loads(line)["frames"] for line in clips} == {17, 33}
    said = run(encode, tmp_path)
    assert "7 samples" in said and "FAULT" not in said
    assert (tmp_path / "sheet.png").stat().st_size > 10_000 and not (tmp_path / "shards.work").exists()
    assert "nothing to repair" in run(repair, tmp_path)
    assert "webdataset" in run(bench, tmp_path)


def test_the_command_of_the_page_on_the_engine(tmp_path):
    (command,) = blocks("bash", (ROOT / "docs" / "engine.md").read_text(encoding="utf-8"))
    assert "full graph, checkpointed" in run(command, tmp_path)
    assert len(list(tmp_path.glob("bench-results/engine/engine-*.json"))) == 1


def test_the_toml_of_the_guide_is_a_valid_set_of_experts(tmp_path):
    from wanmoe.launch.config import load_experts

    (text,) = blocks("toml")
    (tmp_path / "experts.toml").write_text(text, encoding="utf-8")
    assert load_experts(tmp_path / "experts.toml").names == ["Stapler", "Other"]


def test_the_figures_of_the_readme_are_those_of_the_committed_result():
    from wanmoe.infer.report import DemoResults
    from wanmoe.launch.demo import STAGES, Recipe, markdown

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = DemoResults.from_json((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
    shown = readme.split("<!-- demo -->")[1].split("<!-- /demo -->")[0].strip()
    assert shown == markdown(results)
    # Of today's demo, not of another recipe.
    steps = zip(STAGES, Recipe().steps, strict=True)
    assert results.facts["steps"] == ", ".join(f"{stage} {count}" for stage, count in steps)
    assert f"about {float(results.facts['wall time'].split()[0]):.0f} minutes" in readme


@pytest.mark.parametrize(("mark", "result"), [("main", "recipes"), ("search", "recipes-search")])
def test_the_tables_of_recipes_are_those_of_the_committed_results(mark, result):
    from wanmoe.launch.ablation_table import table

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    shown = page.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()
    assert shown == table(json.loads((ROOT / "docs" / f"{result}.json").read_text(encoding="utf-8")))


def test_the_commands_of_the_page_on_evaluation(tmp_path):
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    clips, of_a_run, ablations, blind, tally, report = blocks("bash", page)
    assert "tip PCK@5px ↑                  " in run(clips, tmp_path)
    assert of_a_run.startswith("wanmoe evaluate --run runs/stage_b ")  # it needs Wan's own codec
    told = run(ablations, tmp_path)
    assert "base + experts: b (400 steps)" in told and "frozen base: the base alone" in told
    run(blind, tmp_path)
    key = json.loads((tmp_path / "study.key.json").read_text())
    ((pair, sides),) = key["pairs"].items()
    left, right = sides["clips"]
    answer = {"pair": pair, "left": left, "right": right, "choice": "same"}
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "a.json").write_text(
        json.dumps({"format": "wanmoe-blind/1", "study": key["study"], "rater": "a", "answers": [answer]})
    )
    assert "no difference: 1" in run(tally, tmp_path)
    assert "wrote report.html: evaluation same" in run(report, tmp_path)
    (example,) = blocks("toml", page)
    (tmp_path / "example.toml").write_text(example)
    told = run("wanmoe ablate example.toml --dry", tmp_path)
    assert "router.top_k = 2, router.temperature = 2.0: b (300 steps)" in told


@pytest.mark.parametrize("name", ["ablation-axes"])
def test_the_table_of_the_ablation_is_that_of_the_committed_result(name):
    from wanmoe.launch.ablation_table import read_result, table

    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    shown = page.split("<!-- axes -->")[1].split("<!-- /axes -->")[0].strip()
    assert shown == table(read_result(ROOT / "docs" / f"{name}.json"))


def test_the_commands_of_the_page_on_kernels(tmp_path):
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    linear, block, resources, gpu = blocks("bash", page)
    assert "q: 5120 -> 5120" in run(linear, tmp_path)
    assert "wanmoe frozen" in run(block, tmp_path)
    assert len(list((tmp_path / "bench-results").glob("*.json"))) == 2
    assert "0 with a fault" in run(resources, tmp_path)
    # tests/kernels/bench/test_gpu.py runs what this starts, as far as it goes without a card.
    assert gpu.startswith("make gpu OUT=")


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/guide.md",
        "docs/generate.md",
        "docs/interop.md",
        "docs/data.md",
        "docs/training.md",
        "docs/recipes.md",
        "docs/evaluate.md",
        "docs/tracking.md",
        "docs/kernels.md",
        "csrc/README.md",
        "kernels/lora_moe/README.md",
    ],
)
def test_every_relative_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
