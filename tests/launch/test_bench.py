"""`wanmoe bench` and `wanmoe bench block` from the command line to the files, at a small size."""

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import typer
from typer.testing import CliRunner

from wanmoe.kernels.bench import benchmark, suites
from wanmoe.kernels.bench.linear import MODES, Part, Problem
from wanmoe.kernels.bench.record import read_run
from wanmoe.kernels.bench.suites import Group, Suite
from wanmoe.kernels.bench.timing import Protocol
from wanmoe.launch import bench, bench_peers
from wanmoe.launch.bench_block import BlockTruth
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.wan.config import WanConfig

TINY = Protocol(warmup=1, repeats=2, least=2)


@pytest.fixture
def call(monkeypatch):
    """Runs `wanmoe bench ...` mounted as the command line mounts it, on two tiny problems."""
    parts = (Part(48, 64, 2),)
    groups = (
        Group(Problem("q", parts, 34), (MODES["fwd"], MODES["fwd+bwd"], MODES["router"])),
        Group(Problem("q", parts, 34, gates="frame"), (MODES["fwd"],)),
    )
    small = [replace(group, without=("loop compiled", "PEFT compiled")) for group in groups]
    monkeypatch.setitem(suites.SUITES, "cpu", Suite("cpu", tuple(small), TINY))
    measure = benchmark.measure_ceilings
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *a, **k: measure(*a, **k, copy_bytes=1 << 16))
    monkeypatch.setattr(bench_peers, "CPU", TINY)
    root = typer.Typer()
    root.add_typer(bench.app, name="bench")
    root.command("other")(lambda: None)
    return lambda *words: CliRunner().invoke(root, ["bench", *map(str, words)])


def test_bare_bench_runs_the_cpu_suite_with_peft_beside_it(call, tmp_path):
    done = call("--device", "cpu", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("cpu-*.json")
    peft = {(row.gates, row.mode): row for row in read_run(path).rows if row.variant == "PEFT"}
    assert set(peft) == {("clip", "fwd"), ("clip", "fwd+bwd"), ("clip", "router"), ("frame", "fwd")}
    if find_spec("peft") is None:
        assert {row.note for row in peft.values()} == {"peft is not installed (pip install peft)"}
        return
    assert peft["clip", "fwd+bwd"].status == "ok" and peft["clip", "fwd+bwd"].error_ratio < 1.2
    assert "gradient" in peft["clip", "router"].note and "mix experts" in peft["frame", "fwd"].note


def test_a_failed_row_is_exit_code_1(call, tmp_path, monkeypatch):
    prepare = bench_peers.peft_variants(Problem("q", (Part(8, 8, 1),), 4))

    def raising(inputs):
        raise RuntimeError("broken")

    broken = replace(prepare[0], prepare=raising, why_not=None)
    monkeypatch.setattr(bench_peers, "peft_variants", lambda problem: [broken])
    done = call("--device", "cpu", "--out", tmp_path, "--rows", "q-n34-b1-clip/fwd")
    assert done.exit_code == 1
    assert re.search(r"rows FAILED", done.output) and "broken" in done.output


def test_a_wrong_argument_is_one_line(call, tmp_path):
    done = call("--device", "cpu", "--suite", "fast", "--out", tmp_path)
    assert isinstance(done.exception, WanmoeError)
    assert str(done.exception) == "suite 'fast' is unknown; choose from quick, full, cpu"
    done = call("--device", "cpu", "--rows", "z", "--out", tmp_path)
    assert isinstance(done.exception, WanmoeError) and "it has q-n34-b1-clip/fwd" in str(done.exception)


def test_block_measures_ours_and_says_what_the_peer_needs(call, tmp_path):
    done = call("block", "--device", "cpu", "--preset", "tiny", "--tokens", "2x2x3", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("block-*.json")
    rows = {(row.variant, row.mode): row for row in read_run(path).rows}
    for mode in ("fwd", "bwd", "fwd+bwd"):
        assert rows["wanmoe", mode].ms and rows["wanmoe", mode].ratio
        assert rows["wanmoe frozen", mode].ratio == 1.0
        peer = rows["diffusers + PEFT", mode]
        if find_spec("peft") is None:
            assert "peft is not installed" in peer.note
        else:
            assert peer.status == "ok" and peer.error < 1e-4 and "times as long as wanmoe" in peer.note
    assert not [name for name, _ in rows if name.endswith("compiled")]
    assert path.with_suffix(".png").exists()
    assert "at twice the precision" in (tmp_path / "README.md").read_text()


def test_an_interrupted_block_keeps_the_modes_before(call, tmp_path, monkeypatch):
    def rows(taken, mode, *rest):
        if mode == "bwd":
            raise KeyboardInterrupt
        return mode_rows(taken, mode, *rest)

    mode_rows = bench_peers._mode_rows
    monkeypatch.setattr(bench_peers, "_mode_rows", rows)
    done = call("block", "--device", "cpu", "--preset", "tiny", "--tokens", "2x2x3", "--out", tmp_path)
    assert done.exit_code == 130, done.output
    (path,) = tmp_path.glob("block-*.json")
    found = read_run(path)
    assert {row.mode for row in found.rows} == {"fwd"} and not found.configuration["complete"]
    assert path.with_suffix(".png").exists()


def test_compiled_blocks_are_a_group_of_their_own_after_the_others(call, tmp_path, monkeypatch):
    def variants(*given, **more):
        return block_variants(*given, **more, compiler="eager")

    block_variants = bench_peers.block_variants
    monkeypatch.setattr(bench_peers, "block_variants", variants)
    words = ("--preset", "tiny", "--tokens", "1x2x2", "--compiled", "--out", tmp_path)
    done = call("block", "--device", "cpu", *words)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("block-*.json")
    found = read_run(path)
    assert found.configuration["complete"]
    assert list(dict.fromkeys(row.group for row in found.rows)) == ["block-n4", "block-n4-compiled"]
    compiled = [row for row in found.rows if row.group == "block-n4-compiled" and row.mode == "bwd"]
    assert {row.variant for row in compiled} == {
        "wanmoe compiled", "wanmoe frozen", "wanmoe frozen again", "diffusers + PEFT compiled",
    }  # fmt: skip
    ours = next(row for row in compiled if row.variant == "wanmoe compiled")
    assert ours.status == "ok" and ours.ratio
    if find_spec("peft") is not None:
        assert ours.error_ratio is not None


def test_a_block_far_from_the_truth_is_wrong():
    torch.manual_seed(0)
    y, frozen, grad = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 2)
    truth = BlockTruth(y.double(), frozen.double(), {"x": grad.double()})

    def judge(name, mode, output=y, **gradients):
        outputs = {"diffusers + PEFT": y + 1e-3, name: output}
        found = {"diffusers + PEFT": {"x": grad * 1.001}, name: gradients}
        return bench_peers._verdict(name, mode, bench_peers._Ran(outputs, found, {}, {}), truth)

    near = judge("wanmoe", "fwd+bwd", y + 1e-4, x=grad)
    assert near.ok and near.tensor == "y" and near.ratio == pytest.approx(0.1, rel=0.01)
    assert judge("wanmoe frozen", "fwd") is None
    assert not judge("wanmoe", "fwd", frozen).ok
    assert not judge("wanmoe", "fwd", y * float("nan")).ok
    assert not judge("wanmoe", "bwd", x=grad * 0).ok
    assert not judge("wanmoe", "bwd").ok


def test_token_grids():
    assert bench.parse_grids("21x16x16, 1x2x3") == [(21, 16, 16), (1, 2, 3)]
    for wrong in ("21x16", "ax1x1", "0x1x1", ""):
        with pytest.raises(WanmoeError, match="expected FxHxW, for example 21x16x16"):
            bench.parse_grids(wrong)


def test_the_default_blocks_exist():
    for preset in ("t2v-A14B", "t2v-1.3B"):
        assert WanConfig.preset(preset).dim > 0
