"""The packed op against its specification: forward, every gradient, every packed column, and clear
refusals."""

import pytest
import torch

from wanmoe.kernels.lora_moe import lora_moe_linear, lora_moe_linear_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
NAMES = (
    "x",
    "weight",
    "bias",
    "base_down",
    "base_up",
    "expert_down",
    "expert_up",
    "base_gates",
    "expert_gates",
)


def inputs(
    dtype=torch.float64, rows=3, per_row=5, d_in=7, d_out=11, rank=2, base_rank=3, experts=4, bias=True
):
    generator = torch.Generator().manual_seed(rows * 1000 + per_row)

    def draw(*shape, kind=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).requires_grad_()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": draw(rows * per_row, d_in),
        "weight": draw(d_out, d_in),
        "bias": draw(d_out) if bias else None,
        "base_down": draw(base_rank, d_in, kind=wide),
        "base_up": draw(d_out, base_rank, kind=wide),
        "expert_down": draw(experts, rank, d_in, kind=wide),
        "expert_up": draw(experts, d_out, rank, kind=wide),
        "base_gates": draw(rows, kind=wide),
        "expert_gates": draw(rows, experts, kind=wide),
        "tokens_per_row": per_row,
    }


def call(op, given, **more):
    positional = {k: v for k, v in given.items()}
    return op(**positional, scale_base=0.5, scale_expert=1.5, **more)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "per_row", "experts", "bias"), [(1, 1, 1, True), (3, 5, 4, False), (6, 13, 5, True)]
)
def test_packed_equals_reference_forward_and_gradients(dtype, rows, per_row, experts, bias):
    given = inputs(dtype, rows, per_row, experts=experts, bias=bias)
    twin = {k: v.detach().clone().requires_grad_() if torch.is_tensor(v) else v for k, v in given.items()}
    found, expected = call(lora_moe_linear, given), call(lora_moe_linear_reference, twin)
    plain = given["x"].detach() @ given["weight"].detach().t() + (given["bias"].detach() if bias else 0)
    # The delta alone, so that a missing adapter cannot hide behind the base product.
    assert relative(found - plain, expected - plain) < 4 * TOLERANCE[dtype]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name in NAMES:
        if given[name] is not None:
            assert relative(given[name].grad, twin[name].grad) < 4 * TOLERANCE[dtype], name


def test_every_packed_column_belongs_to_its_expert_and_rank():
    given = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(rows=1, per_row=4).items()}
    plain = given["x"] @ given["weight"].t() + given["bias"]
    for expert in range(4):
        for column in range(2):
            gates = torch.zeros(1, 4, dtype=torch.float64)
            gates[0, expert] = 1.0
            up = torch.zeros_like(given["expert_up"])
            up[expert, :, column] = given["expert_up"][expert, :, column]
            one = given | {
                "expert_gates": gates,
                "expert_up": up,
                "base_gates": torch.zeros(1, dtype=torch.float64),
            }
            delta = 1.5 * torch.outer(
                given["x"] @ given["expert_down"][expert, column], up[expert, :, column]
            )
            assert delta.norm() > 0.1
            torch.testing.assert_close(call(lora_moe_linear, one) - plain, delta)


def test_gate_row_is_token_over_tokens_per_row():
    given = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(rows=6, per_row=3).items()}
    whole = call(lora_moe_linear, given)
    for row in range(6):
        part = slice(3 * row, 3 * row + 3)
        one = given | {
            "x": given["x"][part],
            "expert_gates": given["expert_gates"][row : row + 1],
            "base_gates": given["base_gates"][row : row + 1],
        }
        torch.testing.assert_close(call(lora_moe_linear, one), whole[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_up_projections_leave_the_linear_bit_equal(dtype):
    given = inputs(dtype, rows=2, per_row=9)
    with torch.no_grad():
        given["base_up"].zero_()
        given["expert_up"].zero_()
    expected = torch.nn.functional.linear(given["x"], given["weight"], given["bias"])
    assert torch.equal(call(lora_moe_linear, given), expected)


def test_leading_axes_are_kept():
    given = inputs(rows=2, per_row=6)
    flat = call(lora_moe_linear, given)
    shaped = call(lora_moe_linear, given | {"x": given["x"].view(2, 2, 3, 7)})
    assert torch.equal(shaped, flat.view(2, 2, 3, 11))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens_per_row": 4}, "3 gate rows x 4 tokens per row do not make 15 tokens"),
        ({"base_gates": torch.zeros(2)}, "base_gates has shape (2,), expected (3,)"),
        ({"expert_up": torch.zeros(4, 2, 11)}, "expert_up has shape (4, 2, 11), expected (4, 11, 2)"),
        ({"expert_gates": torch.zeros(3)}, "must have 2, 2, 3 and 2 axes"),
        ({"base_down": torch.zeros(3, 7, device="meta")}, "base_down is on meta, x is on cpu"),
        ({"weight": torch.zeros(11, 7, device="meta")}, "weight is on meta, x is on cpu"),
        ({"x": torch.zeros(15, 7, dtype=torch.int64)}, "x is torch.int64, expected a floating dtype"),
        ({"expert_up": torch.zeros(4, 11, 2, dtype=torch.int8)}, "expert_up is torch.int8, expected a float"),
        (
            {"expert_gates": torch.ones(3, 4, dtype=torch.bool)},
            "expert_gates is torch.bool, expected a float",
        ),
        ({"weight": torch.zeros(11, 7)}, "weight is torch.float32, x is torch.float64; convert one"),
        ({"bias": torch.zeros(11, dtype=torch.bfloat16)}, "bias is torch.bfloat16, x is torch.float64"),
        ({"tokens_per_row": 0}, "x (15, 7) has 15 tokens, 0 per gate row; both must be 1 or more"),
        ({"tokens_per_row": -5}, "-5 per gate row; both must be 1 or more"),
        ({"x": torch.zeros(0, 7, dtype=torch.float64)}, "x (0, 7) has 0 tokens, 5 per gate row"),
        ({"x": torch.tensor(1.0, dtype=torch.float64)}, "x has shape (), expected (7,)"),
    ],
)
def test_wrong_shapes_dtypes_and_devices_are_named(change, words):
    with pytest.raises(ValueError) as caught:
        call(lora_moe_linear, inputs() | change)
    assert words in str(caught.value)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'cuda' is unknown; choose from auto, packed, reference"):
        call(lora_moe_linear, inputs(), backend="cuda")
