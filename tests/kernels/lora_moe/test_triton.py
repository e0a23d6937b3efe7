"""Every form on the Triton kernels against the reference, forward and all gradients.

Without a card the kernels run in Triton's interpreter, on small sizes: it proves the arithmetic and the
indexing, neither speed nor that the hardware takes them (test_resources compiles them for that).
"""

import pytest
import torch

from wanmoe.kernels.lora_moe import lora_moe_linear, table

pytest.importorskip("triton")
# fp16 and bf16 round h, u, dh and y once each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Compiled, the kernels take two-byte values; interpreted, every dtype but bf16.
DTYPES = [torch.float16, torch.bfloat16]
if not torch.cuda.is_available():
    DTYPES = [torch.float64, torch.float32, torch.float16]
EXACT = DTYPES[0]
if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu  # part of `make gpu` where there is a card; interpreted, they run anyway
GROUPS = [(40,), (56, 24), (40, 56, 70)]


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned():
    """torch.empty gives NaN: an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", table.FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outs", GROUPS)
def test_every_form_equals_the_reference(case, check, form, dtype, outs):
    given = case(outs, dtype=dtype)
    with table.override(table.default_plan(form)):
        found = given.run("triton")
    check(found, given.wide().run("reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("form", table.FORMS)
@pytest.mark.parametrize(
    ("rows", "per_row"), [(1, 1), (1, 17), (1, 127), (2, 33), (9, 13), (21, 1)]
)  # gates per clip, folded; then per frame, more rows than are folded
def test_ragged_tokens_and_gate_rows(case, check, form, rows, per_row):
    given = case((50, 24, 24), d_in=37, rows=rows, per_row=per_row, dtype=EXACT)
    with table.override(table.default_plan(form)):
        found = given.run("triton")
    check(found, given.wide().run("reference"), TOLERANCE[EXACT])


@pytest.mark.parametrize("experts", [0, 1, 4, 6])
@pytest.mark.parametrize("ranks", [(1, 1), (8, 8), (5, 3)])
def test_any_number_of_experts_and_any_ranks(case, check, experts, ranks):
    given = case((40,), ranks=[ranks], experts=experts, rows=2, per_row=9, dtype=EXACT)
    with table.override(table.default_plan("delta_first")):
        found = given.run("triton")
    check(found, given.wide().run("reference"), TOLERANCE[EXACT])


CANDIDATES = [
    (kernel, candidate.launch)
    for kernel, several in table.CANDIDATES.items()
    for candidate in several
    if kernel != "dx"
]


@pytest.mark.parametrize(("kernel", "launch"), CANDIDATES, ids=str)
def test_every_launch_that_a_table_can_name(case, check, kernel, launch):
    """Sizes above the tiles, so that every loop runs more than once and every edge is ragged."""
    given = case((150,), d_in=280, rows=2, per_row=70, dtype=EXACT)
    form = {"single_pass": "single_pass", "gemm": "epilogue"}.get(kernel, "delta_first")
    plan = table.default_plan(form)
    launches = plan.launches | {kernel: launch} | ({"dx": launch} if kernel == "gemm" else {})
    with table.override(table.Plan(form, launches)):
        found = given.run("triton")
    check(found, given.wide().run("reference"), TOLERANCE[EXACT])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels take no float64")
@pytest.mark.parametrize("form", table.FORMS)
def test_gradients_by_finite_differences(case, form):
    given = case((6, 4), d_in=5, rows=2, per_row=2, ranks=((2, 1), (1, 1)), experts=2)
    leaves = given.leaves()

    def op(*values):
        named = dict(zip(leaves, values, strict=True))
        return lora_moe_linear(
            named["x"],
            *(named[f"{part}.0"] for part in ("weight", "bias", "base_down", "base_up")),
            *(named[f"{part}.0"] for part in ("expert_down", "expert_up")),
            named["base_gates"],
            named["expert_gates"],
            2,
            scale_base=0.5,
            scale_expert=1.5,
            backend="triton",
        )

    given.linears = given.linears[:1]
    leaves = given.leaves()
    with table.override(table.default_plan(form)):
        assert torch.autograd.gradcheck(op, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("form", table.FORMS)
def test_a_zero_gate_gives_zero_to_its_expert_alone(case, check, form):
    given = case((40,), rows=2, per_row=9, dtype=EXACT)
    with torch.no_grad():
        given.expert_gates[:, 2] = 0
    with table.override(table.default_plan(form)):
        found = given.run("triton")
    truth = given.wide().run("reference")
    for name in ("expert_down.0", "expert_up.0"):
        assert found[name][2].abs().max() == 0 and truth[name][2].abs().max() == 0
    check(found, truth, TOLERANCE[EXACT])


@pytest.mark.parametrize("form", table.FORMS)
def test_every_packed_column_belongs_to_its_expert_and_rank(case, relative, form):
    given = case((24, 40), ranks=((2, 3), (1, 2)), rows=1, per_row=4, frozen=True, dtype=EXACT)
    for j, linear in enumerate(given.linears):
        experts, rank, _ = linear.expert_down.shape
        for expert in range(experts):
            for column in range(rank):
                with torch.no_grad():
                    given.expert_gates.zero_()[0, expert] = 1
                    given.base_gates.zero_()
                    up = torch.zeros_like(linear.expert_up)
                    up[expert, :, column] = linear.expert_up[expert, :, column]
                    x = given.x[0]
                    one = [*given.linears]
                    one[j] = linear._replace(expert_up=up)
                    h = x.to(up.dtype) @ linear.expert_down[expert, column]
                    expected = 1.5 * torch.outer(h, up[expert, :, column])
                    plain = torch.nn.functional.linear(x, linear.weight, linear.bias)
                    kept, given.linears = given.linears, one
                    with table.override(table.default_plan(form)):
                        y = given.forward("triton")[j][0]
                    given.linears = kept
                assert expected.norm() > 0.1
                assert relative(y - plain, expected) < 4 * TOLERANCE[EXACT]


def test_a_delta_of_zero_fails_the_comparison(case, check):
    given = case((40,))
    truth = given.run("reference")
    with pytest.raises(AssertionError, match=r"delta\.0"):
        check(truth | {"delta.0": torch.zeros_like(truth["delta.0"])}, truth, 4e-3)


def test_more_gate_rows_than_a_grid_has_in_its_second_axis(case, check):
    """A gate row per token: 70000 of them, of which the kernels get 32 times as many lanes as they need."""
    if not torch.cuda.is_available():
        pytest.skip("hours in the interpreter")
    given = case((40,), d_in=32, rows=70000, per_row=1, dtype=EXACT)
    with table.override(table.default_plan("delta_first")):
        found = given.run("triton")
    check(found, given.wide().run("reference"), TOLERANCE[EXACT])


@pytest.mark.parametrize("experts", [4, 31])
def test_wide_ranks_are_packed_in_blocks(case, check, experts):
    """64 and 512 columns; beyond 128 the products are the library's."""
    given = case((24,), d_in=40, ranks=[(8, 14)], experts=experts, rows=2, per_row=5, dtype=EXACT)
    with table.override(table.Plan()):
        found = given.run("triton")
    check(found, given.wide().run("reference"), TOLERANCE[EXACT])


@pytest.mark.parametrize("form", table.FORMS)
def test_two_runs_give_the_same_bits(case, form):
    given = case((40, 24), rows=9, per_row=13, dtype=EXACT)
    with table.override(table.default_plan(form)):
        first, second = given.run("triton"), given.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_trains_gets_a_gradient(case, relative):
    """Stage C trains the router alone: d_gates without d_up and d_down."""
    given = case((40,), rows=2, per_row=9, frozen=True, dtype=EXACT)
    truth = given.wide().run("reference")
    for linear in given.linears:
        for part in linear[2:6]:
            part.requires_grad_(False)
    with table.override(table.default_plan("delta_first")):
        found = given.run("triton")
    assert sorted(found) == ["base_gates", "delta.0", "expert_gates", "x"]
    for name, value in found.items():
        assert relative(value, truth[name]) < TOLERANCE[EXACT], name


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
def test_bf16_is_refused_by_the_interpreter(case):
    with pytest.raises(ValueError, match="computes bf16 wrongly in Triton's interpreter"):
        case((40,), dtype=torch.bfloat16).forward("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("form", table.FORMS)
@pytest.mark.parametrize("tokens", [1, 17, 127, 5377])
@pytest.mark.parametrize("outs", [(5120,), (13824,), (5120, 5120, 5120)])
def test_bf16_is_as_exact_as_the_loop_over_experts(case, relative, form, tokens, outs):
    """Error against float64: at most 1.2 x that of the loop over experts in bf16.

    A gradient of few numbers (gates; adapters of one token) has an error that is luck in either: it must be
    small.
    """
    given = case(outs, d_in=5120, rows=1, per_row=tokens, ranks=((8, 8), (4, 4), (4, 4)), frozen=True,
                 dtype=torch.bfloat16)  # fmt: skip
    truth = given.wide().run("reference")
    with table.override(table.default_plan(form)):
        ours = given.run("triton")
    eager = given.run("loop")
    for name, expected in truth.items():
        limit = 1.2 * relative(eager[name], expected)
        if not name.startswith("delta") and name != "x":
            limit = max(limit, 3e-2 if name.endswith("gates") else 5e-3)
        assert relative(ours[name], expected) <= limit, name
