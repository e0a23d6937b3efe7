"""Rows: the truth is the reference's, a wrong variant is FAILED whatever its time, and a right one is not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from wanmoe.kernels.bench.ceilings import Ceilings, MatmulCeiling
from wanmoe.kernels.bench.linear import GATES, LINEARS, MODES, Part, Problem, make_inputs
from wanmoe.kernels.bench.measure import measure_group, modelled_ms
from wanmoe.kernels.bench.suites import SUITES, Group, chosen
from wanmoe.kernels.bench.timing import Protocol
from wanmoe.kernels.bench.truth import Truth, judge
from wanmoe.kernels.bench.variants import Prepared, Variant, linear_variants
from wanmoe.kernels.lora_moe import lora_moe_linear_reference, lora_moe_linears

CPU = torch.device("cpu")
CEILINGS = Ceilings("float32", 0.01, (MatmulCeiling(8, 8, 8, 0.05),))
ONCE = Protocol(warmup=0, repeats=2, least=2)
TRIO = Problem("qkv", (Part(48, 64, 2), Part(48, 32, 1)), 21, 2, "frame")
ONE = Problem("q", (Part(48, 64, 2),), 21)


def measured(problem, modes, extra=(), dtype=torch.float32, only=None):
    group = Group(problem, tuple(MODES[mode] for mode in modes), only=only, without=("loop compiled",))
    variants = [*linear_variants(problem, CPU), *extra]
    return measure_group(group, variants, dtype=dtype, device=CPU, ceilings=CEILINGS, protocol=ONCE)


def ours(change_inputs=lambda inputs: inputs, change_outputs=lambda outputs: outputs, name="ours"):
    """Our op with something done to what it is given or gives back."""

    def prepare(inputs):
        def forward():
            given = change_inputs(inputs)
            rest = (given.base_gates, given.expert_gates, given.tokens_per_row)
            return change_outputs(lora_moe_linears(given.x, given.linears, *rest))

        return Prepared(forward, inputs.leaves())

    return Variant(name, prepare)


def row_of(rows, variant, mode):
    return next(row for row in rows if (row.variant, row.mode) == (variant, mode))


@pytest.mark.parametrize("gates", GATES)
def test_the_truth_is_what_autograd_of_the_reference_gives(gates):
    problem = replace(TRIO, gates=gates)
    inputs = make_inputs(problem, dtype=torch.float64, device=CPU, seed=3).for_mode(MODES["router"])
    truth = Truth(inputs)
    rest = (inputs.base_gates, inputs.expert_gates, inputs.tokens_per_row)
    outputs = [
        lora_moe_linear_reference(
            inputs.x, *linear[:6], *rest, scale_base=linear.scale_base, scale_expert=linear.scale_expert
        )
        for linear in inputs.linears
    ]
    leaves = inputs.leaves()
    assert len(leaves) == 3 + 4 * 2
    gradients = dict(
        zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), inputs.dys), strict=True)
    )
    assert max(truth.output_errors(outputs).values()) < 1e-12
    assert max(truth.gradient_errors(gradients).values()) < 1e-12
    frozen = [F.linear(inputs.x, linear.weight, linear.bias) for linear in inputs.linears]
    assert max(truth.output_errors(frozen, adapted=False).values()) < 1e-12
    (dx,) = torch.autograd.grad(frozen, [inputs.x], inputs.dys)
    assert truth.gradient_errors({"x": dx}, adapted=False)["x"] < 1e-12
    # The frozen linear as an adapted one: all of what the adapters add is missing, neither more nor less.
    assert truth.output_errors(frozen)["y0"] == pytest.approx(1.0)


def test_adapters_are_small_beside_the_base_product_but_not_lost_in_it():
    inputs = make_inputs(ONE, dtype=torch.float32, device=CPU, seed=0)
    truth = Truth(inputs)
    share = truth._delta["y0"] / truth._whole["y0"]
    assert 0.03 < share < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_right_variant_passes_in_every_mode(dtype):
    rows = measured(TRIO, MODES, dtype=dtype)
    assert {row.mode for row in rows} == set(MODES)
    assert [row for row in rows if row.status == "FAILED"] == []
    for name in ("frozen", "frozen again", "loop", "packed", "auto", "auto one by one"):
        for mode in MODES:
            row = row_of(rows, name, mode)
            assert row.status == "ok" and row.ms and len(row.samples) == 2, row
            assert row.error is not None and row.ratio is not None and row.gbps
    assert row_of(rows, "single_pass", "fwd").note == "needs a CUDA device"
    assert "gate rows" in row_of(rows, "merged cached", "fwd").note


def test_merged_weights_are_right_and_for_inference_alone():
    rows = measured(ONE, ("fwd", "fwd+bwd"))
    for name in ("merged per call", "merged cached"):
        assert row_of(rows, name, "fwd").status == "ok"
        assert row_of(rows, name, "fwd+bwd").status == "absent"


def shifted_gates(inputs):
    return replace(inputs, expert_gates=inputs.expert_gates.roll(1, dims=1))


def shifted_rows(inputs):
    return replace(inputs, expert_gates=inputs.expert_gates.roll(1, dims=0))


def unwritten(outputs):
    holes = []
    for y in outputs:
        hole = torch.empty_like(y)
        hole[..., :-1, :] = y[..., :-1, :]
        holes.append(hole)
    return holes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_a_wrong_variant_is_failed(mode, dtype):
    broken = [
        ours(change_outputs=lambda outputs: [y * 0 for y in outputs], name="zeroed"),
        ours(change_inputs=shifted_gates, name="gates of the next expert"),
        ours(change_inputs=shifted_rows, name="gates of the next frame"),
        Variant("no adapters", linear_variants(TRIO, CPU)[0].prepare),
        ours(name="right"),
    ]
    if mode == "fwd":
        broken.append(ours(change_outputs=unwritten, name="last token unwritten"))
    rows = measured(TRIO, (mode,), broken, dtype=dtype)
    for variant in broken:
        expected = "ok" if variant.name == "right" else "FAILED"
        assert row_of(rows, variant.name, mode).status == expected, variant.name


def test_a_wrong_or_missing_gradient_is_failed():
    def scaled(inputs):
        prepared = ours().prepare(inputs)
        return prepared._replace(gradients=lambda found: found | {"1.expert_up": 1.5 * found["1.expert_up"]})

    def missing(inputs):
        prepared = ours().prepare(inputs)
        return prepared._replace(leaves={k: v for k, v in prepared.leaves.items() if k != "0.base_up"})

    rows = measured(TRIO, ("bwd",), [Variant("scaled", scaled), Variant("missing", missing)])
    assert row_of(rows, "scaled", "bwd").status == "FAILED"
    assert row_of(rows, "scaled", "bwd").tensor == "1.expert_up"
    assert row_of(rows, "missing", "bwd").status == "FAILED"
    assert "0.base_up" in row_of(rows, "missing", "bwd").note


def test_a_variant_that_raises_is_a_failed_row_and_the_others_are_measured():
    def prepare(inputs):
        raise RuntimeError("no kernel\nfor this card")

    rows = measured(ONE, ("fwd",), [Variant("broken", prepare)])
    assert row_of(rows, "broken", "fwd").status == "FAILED"
    assert row_of(rows, "broken", "fwd").note == "RuntimeError: no kernel"
    assert row_of(rows, "packed", "fwd").status == "ok"


def test_a_broken_yardstick_excuses_nobody():
    inputs = make_inputs(ONE, dtype=torch.float32, device=CPU, seed=0)
    truth = Truth(inputs)
    assert not judge({"y0": 1.0}, None, truth).ok
    assert judge({"y0": 1e-6}, None, truth).ok
    assert not judge({"y0": float("inf")}, {"y0": 1e-6}, truth).ok
    assert truth.output_errors([truth.outputs[0] * float("nan")])["y0"] == float("inf")
    verdict = judge({"y0": 1e-6, "x": 3e-3}, {"y0": 1e-6, "x": 2e-3}, truth)
    assert not verdict.ok and verdict.tensor == "x" and verdict.ratio == pytest.approx(1.5)


def test_counts_of_operations_and_bytes():
    problem = Problem("q", (Part(10, 30, 1),), 7, 2, experts=3)
    tokens, rank = 14, 4
    low_rank = 2 * tokens * rank
    base = 2 * tokens * 300
    assert problem.flops(MODES["fwd"], adapted=False) == base
    assert problem.flops(MODES["fwd"], adapted=True) == base + low_rank * 40
    assert problem.flops(MODES["bwd"], adapted=True) == base + low_rank * (2 * 30 + 2 * 10)
    assert problem.flops(MODES["no dx"], adapted=True) == base + low_rank * (40 + 2 * 30 + 10)
    assert problem.bytes(MODES["fwd"], 2, adapted=False) == 2 * (tokens * 40 + 300)
    adapters = 4 * rank * 40
    assert problem.bytes(MODES["fwd"], 2, adapted=True) == 2 * (tokens * 40 + 300) + adapters
    # dy once, x once and dx once; the weight; the adapters read and their gradients written.
    assert problem.bytes(MODES["bwd"], 2, adapted=True) == 2 * (tokens * 50 + 300) + 2 * adapters


def test_the_model_predicts_from_this_runs_ceilings():
    ceilings = Ceilings("bfloat16", 2.0, (MatmulCeiling(1, 1, 1, 312.0),))
    problem = Problem("k", (Part(5120, 5120, 4),), 5376)
    base_ms = 1e3 * problem.flops(MODES["fwd"], adapted=False) / 312e12
    added = modelled_ms(problem, MODES["fwd"], ceilings, torch.bfloat16, "packed")
    assert 100 * added / base_ms == pytest.approx(9.22, abs=0.01)
    assert modelled_ms(problem, MODES["fwd"], ceilings, torch.bfloat16, "auto") is None


def test_suites_hold_what_the_specification_asks_for():
    full = SUITES["full"].groups
    tokens = {group.problem.tokens for group in full if group.problem.linear != "kv"}
    assert tokens == {5376, 21504, 32760, 75600, 1, 17, 127, 5377}
    assert {group.problem.gates for group in full} == set(GATES)
    assert {group.problem.clips for group in full} == {1, 2}
    assert {sum(s.rank for s in group.problem.shapes) for group in full} == {20, 40, 80}
    assert {mode.name for group in full for mode in group.modes} == set(MODES)
    for suite in SUITES.values():
        names = [f"{group.problem.slug}/{mode.name}" for group in suite.groups for mode in group.modes]
        assert len(names) == len(set(names))
        for group in suite.groups:
            assert group.problem.all_tokens % group.problem.gate_rows == 0


def test_the_quick_suite_begins_with_qkv_and_compiles_nothing_but_kernels():
    quick = SUITES["quick"].groups
    assert quick[0].problem.slug.startswith("qkv-n5376-b1-clip")
    assert not any(group.takes(name) for group in quick for name in ("loop compiled", "PEFT compiled"))
    names = {f"{group.problem.slug}/{mode.name}" for group in quick for mode in group.modes}
    both = {f"{name}-n5376-b1-clip/{m}" for name in LINEARS if name != "kv" for m in ("fwd", "fwd+bwd")}
    assert names >= both | {
        "qkv-n21504-b1-clip/fwd+bwd",
        "k-n5376-b1-frame/fwd+bwd",
        "q-n5376-b1-clip/router",
    }
    assert len(names) <= 20


def test_rows_are_chosen_by_pattern():
    groups = chosen(SUITES["quick"], "q-n5376*/fwd+bwd, ffn.0-")
    assert [(g.problem.linear, [m.name for m in g.modes]) for g in groups] == [
        ("q", ["fwd+bwd"]),
        ("ffn.0", ["fwd", "fwd+bwd"]),
    ]
    with pytest.raises(ValueError, match=r"--rows x: nothing in suite cpu matches; it has q-n1024"):
        chosen(SUITES["cpu"], "x")
