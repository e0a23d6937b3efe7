"""The public op on library products: against its specification, as PyTorch sees it, and clear refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from wanmoe.kernels.lora_moe import lora_moe_linear, lora_moe_linears

# The compiled Triton kernels take 16-bit values.
HALF = torch.float16 if torch.cuda.is_available() else torch.float32
if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu  # part of `make gpu` where there is a card; on the CPU they run anyway
TOLERANCE = {torch.float64: 1e-12, torch.float32: 8e-6, torch.bfloat16: 8e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outs", [(11,), (11, 7), (11, 7, 9)])
@pytest.mark.parametrize(("rows", "per_row", "experts"), [(1, 1, 1), (3, 5, 4), (9, 13, 6), (2, 3, 0)])
def test_packed_equals_reference_forward_and_gradients(case, check, dtype, outs, rows, per_row, experts):
    given = case(outs, d_in=10, rows=rows, per_row=per_row, experts=experts, dtype=dtype)
    check(given.run("packed"), given.wide().run("reference"), TOLERANCE[dtype])


def test_a_linear_without_bias(case, check):
    given = case((11, 7))
    given.linears = [linear._replace(bias=None) for linear in given.linears]
    check(given.run("packed"), given.run("reference"), 1e-12)


def test_a_group_equals_its_linears_one_by_one(case):
    given = case((11, 7))
    together = given.forward("packed")
    for linear, y in zip(given.linears, together, strict=True):
        alone = lora_moe_linear(
            given.x,
            *linear[:6],
            given.base_gates,
            given.expert_gates,
            given.tokens_per_row,
            scale_base=linear.scale_base,
            scale_expert=linear.scale_expert,
        )
        torch.testing.assert_close(y, alone, rtol=1e-12, atol=1e-12)


def test_every_packed_column_belongs_to_its_expert_and_rank(case):
    given = case((11,), ranks=[(3, 2)], rows=1, per_row=4, frozen=True)
    (linear,) = given.linears
    plain = F.linear(given.x, linear.weight, linear.bias)
    for expert in range(4):
        for column in range(2):
            with torch.no_grad():
                given.expert_gates.zero_()[0, expert] = 1
                given.base_gates.zero_()
                up = torch.zeros_like(linear.expert_up)
                up[expert, :, column] = linear.expert_up[expert, :, column]
                given.linears = [linear._replace(expert_up=up)]
                expected = (
                    1.5 * (given.x @ linear.expert_down[expert, column])[..., None] * up[expert, :, column]
                )
                assert expected.norm() > 0.1
                torch.testing.assert_close(given.forward("packed")[0] - plain, expected)


def test_gate_row_is_token_over_tokens_per_row(case):
    given = case((11,), rows=6, per_row=3)
    (whole,) = given.forward("packed")
    for row in range(6):
        part = slice(row, row + 1)
        (one,) = lora_moe_linears(
            given.x[part], given.linears, given.base_gates[part], given.expert_gates[part], 3
        )
        torch.testing.assert_close(one, whole[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_up_projections_leave_the_linears_bit_equal(case, dtype):
    given = case((11, 7), dtype=dtype)
    with torch.no_grad():
        for linear in given.linears:
            linear.base_up.zero_()
            linear.expert_up.zero_()
    for linear, y in zip(given.linears, given.forward("packed"), strict=True):
        assert torch.equal(y, F.linear(given.x, linear.weight, linear.bias))


def test_leading_axes_and_strides_do_not_matter(case):
    given = case((11,), d_in=8, rows=2, per_row=6)
    (y,) = given.forward("packed")
    given.x = given.x.detach().view(2, 2, 3, 8)
    assert torch.equal(given.forward("packed")[0], y.view(2, 2, 3, 11))
    given.x = given.x.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(given.forward("packed")[0], y.view(2, 2, 3, 11))


# ---- as PyTorch sees it ----


def op_arguments(given):
    weights, biases, *adapters = ([linear[i] for linear in given.linears] for i in range(6))
    x = given.x.detach().flatten(0, 1).requires_grad_()
    scales = [0.5] * len(weights), [1.5] * len(weights)
    return (
        x,
        weights,
        biases,
        *adapters,
        given.base_gates,
        given.expert_gates,
        given.tokens_per_row,
        *scales,
    )


@pytest.mark.parametrize("backend", ["packed", "triton"])
@pytest.mark.parametrize("outs", [(11,), (11, 7, 9)])
def test_opcheck(case, outs, backend):
    pytest.importorskip("triton")
    given = case(outs, d_in=10, rows=2, per_row=3, dtype=HALF)
    torch.library.opcheck(torch.ops.wanmoe.lora_moe, (*op_arguments(given), backend, True))


@pytest.mark.parametrize("backend", ["packed", "triton"])
def test_strides_of_x_do_not_matter_to_the_op_itself(case, backend):
    pytest.importorskip("triton")
    given = case((11,), d_in=10, rows=2, per_row=3, dtype=HALF)
    x, *rest = op_arguments(given)
    turned = x.detach().t().contiguous().t().requires_grad_()
    assert not turned.is_contiguous()
    outs = [torch.ops.wanmoe.lora_moe(each, *rest, backend, True)[0] for each in (x, turned)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(y.sum(), each)[0] for y, each in zip(outs, (x, turned), strict=True)]
    assert torch.equal(*grads)


def test_an_output_that_nobody_uses(case, relative):
    given = case((11, 7))
    with_zero = torch.autograd.grad(
        sum((y * f).sum() for y, f in zip(given.forward("packed"), (1, 0), strict=True)), given.x
    )[0]
    alone = torch.autograd.grad(given.forward("packed")[0].sum(), given.x)[0]
    assert relative(alone, with_zero) < 1e-12


def test_opcheck_without_what_a_backward_needs(case):
    with torch.no_grad():
        given = case((11, 7), d_in=10, rows=2, per_row=3)
        arguments = op_arguments(given)
        values = [value.detach() if torch.is_tensor(value) else value for value in arguments]
        values[1:7] = [[tensor.detach() for tensor in several] for several in values[1:7]]
        torch.library.opcheck(torch.ops.wanmoe.lora_moe, (*values, "packed", False))


def test_opcheck_of_the_backward(case):
    given = case((11, 7), d_in=10, rows=2, per_row=3)
    with torch.no_grad():
        arguments = op_arguments(given)
        *_, h, down, gates, up_q, up_k = torch.ops.wanmoe.lora_moe(*arguments, "packed", True)
        x, weights = arguments[0].detach(), [weight.detach() for weight in arguments[1]]
    dys = [seed.flatten(0, 1) for seed in given.seeds]
    ranks = [3, 2], [2, 1], 4
    wanted = True, True, True, [True, False], [False, True]
    torch.library.opcheck(
        torch.ops.wanmoe.lora_moe_backward,
        (dys, x, weights, h, down, gates, [up_q, up_k], *ranks, 3, "packed", *wanted),
    )


@pytest.mark.parametrize("backend", ["packed", "triton"])
def test_compiles_in_one_graph(case, check, backend):
    pytest.importorskip("triton")
    given = case((11, 7), dtype=HALF)
    eager = given.run(backend)
    given.forward = torch.compile(given.forward, fullgraph=True, backend="aot_eager")
    check(given.run(backend), eager, 1e-6)


@pytest.mark.parametrize("backend", ["packed", "triton"])
def test_a_recompute_gives_the_same_bits(case, backend):
    pytest.importorskip("triton")
    given = case((11, 7), dtype=HALF)
    straight = given.run(backend)
    plain = given.forward
    given.forward = lambda name: checkpoint(plain, name, use_reentrant=False)
    again = given.run(backend)
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_nothing_is_kept_without_a_gradient(case):
    given = case((11,))
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        (y,) = given.forward("packed")
    assert not kept and not y.requires_grad


def test_a_gradient_through_a_call_that_kept_nothing_is_an_error(case):
    given = case((11,))
    with pytest.raises(RuntimeError, match="save=False and then asked for a gradient"):
        torch.ops.wanmoe.lora_moe(*op_arguments(given), "packed", False)


# ---- refusals ----


def zeros(*shape, **kind):
    return torch.zeros(shape, **({"dtype": torch.float64} | kind))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens_per_row": 4}, "3 gate rows x 4 tokens per row do not make 15 tokens"),
        ({"base_gates": zeros(2)}, "base_gates has shape (2,), expected (3,)"),
        ({"expert_up": zeros(4, 2, 11)}, "expert_up has shape (4, 2, 11), expected (4, 11, 2)"),
        ({"expert_gates": zeros(3)}, "must have 2, 2, 3 and 2 axes"),
        ({"base_down": zeros(3, 7, device="meta")}, "base_down is on meta, x is on cpu"),
        ({"weight": zeros(11, 7, device="meta")}, "weight is on meta, x is on cpu"),
        ({"x": zeros(15, 7, dtype=torch.int64)}, "x is torch.int64, expected a floating dtype"),
        ({"expert_up": zeros(4, 11, 2, dtype=torch.int8)}, "expert_up is torch.int8, expected a float"),
        ({"expert_gates": zeros(3, 4, dtype=torch.bool)}, "expert_gates is torch.bool, expected a float"),
        (
            {"weight": zeros(11, 7, dtype=torch.float32)},
            "weight is torch.float32, x is torch.float64; convert",
        ),
        ({"bias": zeros(11, dtype=torch.bfloat16)}, "bias is torch.bfloat16, x is torch.float64"),
        ({"tokens_per_row": 0}, "x (15, 7) has 15 tokens, 0 per gate row; both must be 1 or more"),
        ({"tokens_per_row": -5}, "-5 per gate row; both must be 1 or more"),
        ({"x": zeros(0, 7)}, "x (0, 7) has 0 tokens, 5 per gate row"),
        ({"x": torch.tensor(1.0, dtype=torch.float64)}, "x has shape (), expected (7,)"),
        ({"expert_down": zeros(4, 0, 7), "expert_up": zeros(4, 11, 0)}, "must have a rank of 1 or more"),
        ({"backend": "cuda"}, "'cuda' is unknown; choose from auto, packed, triton, reference"),
    ],
)
def test_wrong_shapes_dtypes_devices_and_backends_are_named(change, words):
    right = {
        "x": zeros(15, 7), "weight": zeros(11, 7), "bias": zeros(11), "base_down": zeros(3, 7),
        "base_up": zeros(11, 3), "expert_down": zeros(4, 2, 7), "expert_up": zeros(4, 11, 2),
        "base_gates": zeros(3), "expert_gates": zeros(3, 4), "tokens_per_row": 5,
    }  # fmt: skip
    with pytest.raises(ValueError) as caught:
        lora_moe_linear(**right | change, scale_base=0.5, scale_expert=1.5)
    assert words in str(caught.value)


def test_linears_that_do_not_belong_together_are_refused(case):
    given, other = case((11, 7)), case((9,), experts=3)
    given.linears = [*given.linears, *other.linears]
    with pytest.raises(ValueError, match="expert_gates has shape"):
        given.forward("packed")
    given.linears = []
    with pytest.raises(ValueError, match="linears is empty"):
        given.forward("packed")
