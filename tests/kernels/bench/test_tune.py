"""The tuner: what it compares, what it keeps, and the file that it leaves."""

import json

import pytest
import torch

from wanmoe.kernels.bench import tune
from wanmoe.kernels.bench.linear import Part, Problem
from wanmoe.kernels.bench.timing import Protocol
from wanmoe.kernels.lora_moe import table

LAUNCHES = {
    kernel: [candidate.launch for candidate in candidates] for kernel, candidates in table.CANDIDATES.items()
}


def stopwatch(cost):
    """A `fastest` that asks a cost model instead of a clock."""

    def fastest(plans):
        times = {name: cost(plan) for name, plan in plans.items()}
        return min(times, key=lambda name: times[name]), times

    return fastest


def test_the_cheapest_launch_of_the_cheapest_form_is_found():
    best = {"shrink": LAUNCHES["shrink"][2], "expand": LAUNCHES["expand"][1]}

    def cost(plan):
        base = {"library": 10, "single_pass": 9, "delta_first": 5, "epilogue": 7}[plan.form]
        return base + sum(plan.launches.get(kernel) != launch for kernel, launch in best.items())

    plan, times = tune._forward(stopwatch(cost), LAUNCHES.get, linears=1)
    assert plan.form == "delta_first" and best.items() <= plan.launches.items()
    assert times["delta_first"] == 5 and set(times) == set(table.FORMS)


def test_library_products_stay_unless_beaten_by_more_than_noise():
    plan, _ = tune._forward(stopwatch(lambda plan: 10 if plan.form == "library" else 9.9), LAUNCHES.get, 3)
    assert plan == table.Plan()
    wanted = LAUNCHES["down_grad"][1]

    def cost(plan):
        slow = ("up_grad" in plan.launches) + ("dx" in plan.launches)
        return 10 + slow - (plan.launches.get("down_grad") == wanted)

    plan, times = tune._backward(stopwatch(cost), LAUNCHES.get, table.default_plan("delta_first"))
    assert plan.launches["down_grad"] == wanted and not {"up_grad", "dx"} & plan.launches.keys()
    assert times == {"library": 10, "chosen": 9}


@pytest.mark.parametrize("parts", [1, 2])
def test_a_real_run_gives_rows_that_the_table_reads(parts, tmp_path, monkeypatch):
    """On the CPU in Triton's interpreter: the times mean nothing, the way does."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    monkeypatch.setattr(table, "CANDIDATES", {kernel: few[:2] for kernel, few in table.CANDIDATES.items()})
    problem = Problem("q", tuple(Part(48, 40, 4) for _ in range(parts)), 33)
    said = []
    rows = tune.tune(
        [problem], arch="sm_80", device=device, dtype=dtype, protocol=Protocol(0, 1, 1), say=said.append
    )
    path = tmp_path / "sm_80.json"
    tune.write_table(rows, path, {"gpu": "none"})
    monkeypatch.setenv("WANMOE_TABLES", str(tmp_path))
    table._rows.cache_clear()
    plan = table.lookup("sm_80", 48, [40] * parts, 32 * parts, 33)
    table._rows.cache_clear()
    assert table.to_json(plan) == rows[0]["plan"]
    assert len(said) == 1 and said[0].startswith("q-n33")
    assert set(rows[0]["ms"]["forward"]) == set(table.FORMS)


def test_a_new_table_keeps_the_rows_of_other_shapes(tmp_path):
    def row(tokens, form):
        plan = table.to_json(table.default_plan(form))
        return {"d_in": 8, "d_out": [8], "width": 32, "tokens": tokens, "plan": plan}

    broken = tmp_path / "sm_90.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="sm_90.json is no table"):
        tune.write_table([row(1, "library")], broken, {})
    assert broken.read_text() == "{"

    path = tmp_path / "sub" / "sm_80.json"
    tune.write_table([row(1, "library"), row(2, "library")], path, {"gpu": "a"})
    tune.write_table([row(2, "epilogue"), row(3, "library")], path, {"gpu": "b"})
    found = json.loads(path.read_text())
    assert [(r["tokens"], r["plan"]["form"]) for r in found["rows"]] == [
        (1, "library"), (2, "epilogue"), (3, "library"),
    ]  # fmt: skip
    assert [child.name for child in path.parent.iterdir()] == ["sm_80.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_one_line_and_code_2(capsys):
    assert tune.main(["--linears", "zzz"]) == 2
    assert "'zzz' is unknown; choose from q, k" in capsys.readouterr().err
    assert tune.main([]) == 2
    assert capsys.readouterr().err.startswith("error: tuning needs a CUDA device")
