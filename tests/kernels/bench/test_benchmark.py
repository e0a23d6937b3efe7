"""The command from end to end at a small size: files, page, plot, exit code, and what a reader is told."""

import json
import re
from dataclasses import replace

import pytest
import torch

from wanmoe.kernels.bench import benchmark, suites
from wanmoe.kernels.bench.__main__ import main
from wanmoe.kernels.bench.benchmark import Options, no_peers, run_linear
from wanmoe.kernels.bench.linear import MODES, Part, Problem
from wanmoe.kernels.bench.provenance import checkout, provenance
from wanmoe.kernels.bench.record import device_slug, read_run, write_run
from wanmoe.kernels.bench.report import folder_page, run_text
from wanmoe.kernels.bench.suites import Group, Suite
from wanmoe.kernels.bench.timing import Protocol
from wanmoe.kernels.bench.variants import Prepared, Variant

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The suite cpu, with the same groups at a hundredth of their width."""
    groups = [
        Group(
            replace(group.problem, parts=tuple(Part(48, 64, p.rank) for p in group.problem.parts), tokens=34),
            group.modes,
            group.only,
        )
        for group in suites.SUITES["cpu"].groups
    ]
    small = Suite("cpu", tuple(groups), Protocol(warmup=1, repeats=3, least=2, budget_s=1.0))
    monkeypatch.setitem(suites.SUITES, "cpu", small)
    measure = benchmark.measure_ceilings
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *a, **k: measure(*a, **k, copy_bytes=1 << 16))


def zeroed(inputs):
    sizes = [linear.weight.shape[0] for linear in inputs.linears]

    def forward():
        anchor = sum(leaf.sum() for leaf in inputs.leaves().values()) * 0
        return [inputs.x.new_zeros(*inputs.x.shape[:-1], size) + anchor for size in sizes]

    return Prepared(forward, inputs.leaves())


def run(out, *, peers=None, **options):
    said = []
    peers = peers or no_peers("not here")
    code = run_linear(
        Options(out=out, device=CPU, argv=["/bin/wanmoe", "bench"], **options), peers, said.append
    )
    return code, "\n".join(said)


def test_the_cpu_suite_writes_json_page_and_plot_and_prints_tables(tmp_path):
    code, said = run(tmp_path / "new" / "folder")
    assert code == 0, said
    (path,) = (tmp_path / "new" / "folder").glob("cpu-*.json")
    found = read_run(path)
    assert {row.variant for row in found.rows if row.ms} >= {"frozen", "frozen again", "loop", "packed"}
    assert {row.note for row in found.rows if row.variant == "PEFT"} == {"not here"}
    assert all(row.ratio for row in found.rows if row.status == "ok")
    assert found.ceilings is not None and found.ceilings.dtype == "float32"
    assert found.configuration["protocol"]["repeats"] == 3
    assert path.with_suffix(".png").stat().st_size > 10_000
    page = (path.parent / "README.md").read_text()
    assert path.name in page and path.with_suffix(".png").name in page
    assert all(title in page for title in ("34 tokens, gates: clip - fwd+bwd", "gates: frame - fwd+bwd"))
    assert page.count("MODELLED, not measured") == 1
    assert "MODELLED, not measured" in said and "not run: PEFT (not here)" in said
    assert not [left for left in path.parent.iterdir() if left.name.startswith(".")]


def test_a_wrong_row_decides_the_exit_code(tmp_path):
    code, said = run(tmp_path, peers=lambda problem: [Variant("PEFT", zeroed)], rows="q-*/fwd+bwd")
    assert code == 1
    assert re.search(r"^\d rows FAILED:$", said, re.MULTILINE) and "PEFT FAILED" in said
    (path,) = tmp_path.glob("*.json")
    failed = read_run(path).failed
    assert failed and {row.variant for row in failed} == {"PEFT"}
    assert all(row.error > 0.5 for row in failed)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    def peers(problem):
        if problem.linear == "qkv":
            raise KeyboardInterrupt
        return []

    code, said = run(tmp_path, peers=peers)
    assert code == 130 and "interrupted: this is what was" in said and "suite cpu (interrupted)" in said
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".png").exists() and "(interrupted)" in (tmp_path / "README.md").read_text()
    found = read_run(path)
    assert {row.linear for row in found.rows} == {"q"} and not found.configuration["complete"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "nothing", peers=peers, rows="qkv-")


def test_variants_are_chosen_by_name_and_the_yardsticks_always_run(tmp_path):
    code, _ = run(tmp_path, rows="qkv-", variants="packed")
    (path,) = tmp_path.glob("*.json")
    assert code == 0
    assert {row.variant for row in read_run(path).rows} == {"frozen", "frozen again", "loop", "packed"}
    with pytest.raises(ValueError, match="variant pakced is unknown; choose from PEFT"):
        run(tmp_path, variants="pakced")


def test_what_cannot_run_is_said(tmp_path):
    with pytest.raises(ValueError, match="suite 'fast' is unknown; choose from quick, full, cpu"):
        run(tmp_path, suite="fast")
    with pytest.raises(ValueError, match="suite quick needs a CUDA device"):
        run(tmp_path, suite="quick")


def test_results_survive_the_file(tmp_path):
    run(tmp_path, rows="q-n34-b1-clip/fwd")
    (path,) = tmp_path.glob("*.json")
    found = read_run(path)
    again = tmp_path / "again.json"
    write_run(found, again)
    assert read_run(again) == found
    wrong = [replace(found.rows[0], status="FAILED", error=float("inf"), note="wrong: y0")]
    write_run(replace(found, rows=tuple(wrong)), again)
    assert read_run(again).rows[0].error == float("inf")
    assert "Infinity" not in again.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="wanmoe-bench/9"), "wanmoe-bench/9"),
        (lambda data: data["rows"][0].pop("error"), "error"),
        (lambda data: data["rows"][0].update(speed=1), "speed"),
        (lambda data: data["rows"][0].update(status="fine"), "fine"),
        (lambda data: data["rows"][0].update(ms=None), "needs ms"),
        (lambda data: data.pop("provenance"), "provenance"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, change, message):
    run(tmp_path, rows="q-n34-b1-clip/fwd")
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(path.name)) as caught:
        read_run(path)
    assert message in str(caught.value)


def test_the_page_shows_the_newest_run_of_a_suite_and_names_the_others(tmp_path):
    run(tmp_path, rows="q-n34-b1-clip/fwd")
    (path,) = tmp_path.glob("*.json")
    found = read_run(path)
    newer = replace(found, provenance=found.provenance | {"utc": "2999-01-01T00:00:00+00:00"})
    write_run(newer, tmp_path / "cpu-newer.json")
    page = folder_page(tmp_path).read_text()
    assert "data: [cpu-newer.json]" in page and f"- [{path.name}]" in page


def test_provenance_says_on_what_and_by_which_command(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    found = provenance(CPU, ["/usr/bin/wanmoe", "bench", "--suite", "cpu"])
    assert found["command"] == "wanmoe bench --suite cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["model"] and found["device"].startswith("CPU ") and found["gpu"] is None
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    assert "TRITON_CACHE_DIR" not in found["environment"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["utc"])
    if checkout() and (checkout() / ".git").exists() and found["commit"]:
        assert re.fullmatch(r"[0-9a-f]{40}", found["commit"]["hash"])
        assert isinstance(found["commit"]["dirty"], bool)
    json.dumps(found)


def test_a_devices_folder():
    assert device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert device_slug("///") == "device"


def test_colours_only_where_asked(tmp_path):
    run(tmp_path, rows="q-n34-b1-clip/fwd")
    (path,) = tmp_path.glob("*.json")
    assert "\033[" not in run_text(read_run(path))
    assert "\033[1m" in run_text(read_run(path), colour=True)


def test_without_the_command_lines_packages(tmp_path, capsys):
    words = ["--suite", "cpu", "--device", "cpu", "--rows", "q-n34-b1-clip/fwd", "--out", str(tmp_path)]
    assert main(words) == 0
    (path,) = tmp_path.glob("*.json")
    assert read_run(path).provenance["command"].startswith("python -m wanmoe.kernels.bench --suite cpu")
    assert main(["--suite", "quick", "--device", "cpu"]) == 2
    assert "error: suite quick needs a CUDA device" in capsys.readouterr().err


def test_modes_have_the_names_that_the_rows_carry():
    assert list(MODES) == ["fwd", "bwd", "fwd+bwd", "no dx", "router"]
    assert Problem("q", (Part(8, 8, 1),), 4, 2, "one zero").slug == "q-n4-b2-one-zero"
