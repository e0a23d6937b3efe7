"""The stored table: which plan a shape gets, and that only what is compiled in the tests can be named."""

import json

import pytest
import torch

from wanmoe.kernels.lora_moe import table


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WANMOE_TABLES", str(tmp_path))
    table._rows.cache_clear()
    yield tmp_path
    table._rows.cache_clear()


def write(folder, *rows):
    (folder / "sm_77.json").write_text(json.dumps({"rows": rows}))


def row(form, tokens, d_out=(5120,), width=64):
    plan = table.to_json(table.default_plan(form))
    return {"d_in": 5120, "d_out": [*d_out], "width": width, "tokens": tokens, "plan": plan}


def test_the_nearest_number_of_tokens_decides(folder):
    write(folder, row("single_pass", 5376), row("epilogue", 75600))
    forms = {n: table.lookup("sm_77", 5120, (5120,), 64, n).form for n in (1, 5376, 19000, 22000, 10**6)}
    assert forms == {
        1: "single_pass", 5376: "single_pass", 19000: "single_pass", 22000: "epilogue", 10**6: "epilogue",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "d_in", "d_out", "width"),
    [
        ("sm_70", 5120, (5120,), 64),
        ("sm_77", 1536, (5120,), 64),
        ("sm_77", 5120, (5120, 5120), 64),
        ("sm_77", 5120, (5120,), 32),
    ],
)
def test_another_card_or_shape_has_no_row(folder, arch, d_in, d_out, width):
    write(folder, row("epilogue", 5376))
    assert table.lookup(arch, d_in, d_out, width, 5376) is None


@pytest.mark.parametrize("form", table.FORMS)
def test_a_plan_survives_its_file(form):
    plan = table.default_plan(form)
    assert table.from_json(json.loads(json.dumps(table.to_json(plan)))) == plan


def test_what_is_not_compiled_cannot_be_named(folder):
    bad = row("delta_first", 5376)
    bad["plan"]["launches"]["shrink"] = [512, 0, 512, 1, 4, 9]
    write(folder, bad)
    with pytest.raises(ValueError, match="does not compile; tune again"):
        table.lookup("sm_77", 5120, (5120,), 64, 5376)
    with pytest.raises(ValueError, match="form 'fast'"):
        table.from_json({"form": "fast", "launches": {}})
    with pytest.raises(ValueError, match="'fast' is unknown; choose from library"):
        table.default_plan("fast")


def test_a_launch_that_would_spill_at_a_width_is_left_to_the_library():
    plan = table.default_plan("delta_first")
    assert plan.launch("up_grad", 64) is not None
    assert plan.launch("up_grad", 128) is None
    assert plan.launch("dx", 64) is None


def test_an_override_ends_with_its_block():
    x = torch.zeros(4, 8)
    plan = table.default_plan("epilogue")
    with table.override(plan):
        assert table.plan_for(x, (8,), 32) is plan
    assert table.plan_for(x, (8,), 32) is not plan


def test_the_tables_that_ship_are_valid():
    for path in (table.shipped_folder()).glob("*.json"):
        for stored in json.loads(path.read_text())["rows"]:
            table.from_json(stored["plan"])
            assert stored["width"] <= 128 and stored["tokens"] > 0
