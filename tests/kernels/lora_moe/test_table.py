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


def write(folder, *rows, arch="sm_77"):
    (folder / f"{arch}.json").write_text(json.dumps({"format": table.FORMAT, "rows": rows}))


def row(form, tokens, d_out=(5120,), width=64):
    plan = table.to_json(table.default_plan(form))
    return {"d_in": 5120, "d_out": [*d_out], "width": width, "tokens": tokens, "plan": plan}


def test_the_nearest_number_of_tokens_decides(folder):
    write(folder, row("single_pass", 5376), row("epilogue", 10000))
    forms = {n: table.lookup("sm_77", 5120, (5120,), 64, n).form for n in (2688, 5376, 7000, 8000, 20000)}
    assert forms == {
        2688: "single_pass", 5376: "single_pass", 7000: "single_pass", 8000: "epilogue", 20000: "epilogue",
    }  # fmt: skip
    # Nobody measured these.
    assert [table.lookup("sm_77", 5120, (5120,), 64, n) for n in (1, 2600, 20001)] == [None] * 3


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
def test_a_plan_survives_its_file(folder, form):
    write(folder, row(form, 5376))
    (found,) = table.read_table(folder / "sm_77.json", "sm_77")
    assert found == table.Row(5120, (5120,), 64, 5376, table.default_plan(form))


HOPPER_ONLY = [128, 256, 64, 1, 8, 3]


def broken(**change):
    whole = row("delta_first", 5376)
    plan = {key: change.pop(key) for key in ("form", "launches") if key in change}
    return whole | change | {"plan": whole["plan"] | plan}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (broken(form="fast"), "row 1: form 'fast' is unknown"),
        (broken(launches={}), "row 1: form delta_first has no launch of expand, shrink"),
        (
            broken(launches={"shrink": [512, 0, 512, 1, 4, 9], "expand": [1] * 6}),
            "shrink (512, 0, 512, 1, 4, 9) is",
        ),
        (
            broken(form="epilogue", launches={"shrink": [64, 0, 64, 1, 4, 4], "gemm": HOPPER_ONLY}),
            "for sm_77",
        ),
        (broken(launches={"shrink": [1] * 5, "expand": [1] * 6}), "row 1: TypeError"),
        (broken(tokens=0), "must be 1 or more"),
        (broken(width=256), "width at most 128"),
        ({}, "row 1: KeyError 'd_out'"),
        (7, "row 1: TypeError"),
    ],
)
def test_a_row_that_could_not_run_is_named_and_the_library_runs(folder, caplog, bad, words):
    write(folder, row("delta_first", 5376), bad)
    path = folder / "sm_77.json"
    with pytest.raises(ValueError, match=r"tune again with `wanmoe bench tune`") as caught:
        table.read_table(path, "sm_77")
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert table.lookup("sm_77", 5120, (5120,), 64, 5376) is None
    assert words in caplog.text and "run library products" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}', '{"format": "wanmoe-table/1"}'])
def test_a_file_that_is_no_table_is_named(folder, text):
    path = folder / "sm_77.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="sm_77.json is no table"):
        table.read_table(path, "sm_77")
    assert table.lookup("sm_77", 5120, (5120,), 64, 5376) is None


def test_a_row_of_the_user_replaces_ours_and_the_others_stay(folder, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(table, "shipped_folder", lambda: shipped)
    write(shipped, row("library", 5376), row("epilogue", 21504))
    write(folder, row("single_pass", 5376))
    forms = [table.lookup("sm_77", 5120, (5120,), 64, n).form for n in (5376, 21504)]
    assert forms == ["single_pass", "epilogue"]


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="'fast' is unknown; choose from library"):
        table.default_plan("fast")


def test_a_card_that_is_not_listed_gets_the_launches_of_the_smallest():
    for kernel in table.CANDIDATES:
        assert table.candidates(kernel, 64, "sm_120") == table.candidates(kernel, 64, "sm_86") != []


def test_ranks_compare_what_their_card_would_run(folder, monkeypatch):
    card = torch.device("cuda")
    monkeypatch.setattr(table, "architecture", lambda device: "sm_77")
    digests = []
    for form in ("library", "epilogue"):
        write(folder, row(form, 5376))
        table._rows.cache_clear()
        digests.append(table.digest(card))
    assert digests[0] != digests[1] and table.digest(torch.device("cpu")) == ""


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


@pytest.mark.parametrize("path", sorted(table.shipped_folder().glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_that_ship_are_valid(path):
    assert table.read_table(path, path.stem)
