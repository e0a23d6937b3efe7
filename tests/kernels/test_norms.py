"""The norms on the CPU: references against independent definitions, and the formulas of the opaque ops.

The CUDA kernels are tested in tests/csrc.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanmoe.kernels import cuda_library, norms
from wanmoe.kernels.norms import backend

EPS = 1e-6
B, L, D, HEADS = 2, 5, 24, 3
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


def randn(*shape: int, dtype: torch.dtype = F64, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_(grad)


def vectors(count: int, rows: int, dtype: torch.dtype = F64, grad: bool = False) -> list[Tensor]:
    return [randn(rows, 1, D, dtype=dtype, seed=10 + i, grad=grad) for i in range(count)]


def arguments(op: str, dtype: torch.dtype = F64, rows: int = B, *, grad: bool = False) -> tuple:
    """Of the op, in order, up to eps; vectors are wide."""
    wide = torch.promote_types(dtype, F32)
    x, h = (randn(B, L, D, dtype=dtype, seed=seed, grad=grad) for seed in (1, 2))
    scale, shift, gate = vectors(3, rows, wide, grad)
    weight, bias = (randn(D, dtype=dtype, seed=seed, grad=grad) for seed in (3, 4))
    angle = randn(L, D // HEADS // 2, seed=5)
    return {
        "adaln": (x, scale, shift, EPS),
        "layer_norm": (x, weight, bias, EPS),
        "residual_adaln": (x, h, gate, scale, shift, EPS),
        "residual_layer_norm": (x, h, gate, weight, bias, EPS),
        "ungated": (x, h, None, weight, bias, EPS),
        "gated_residual": (x, h, gate),
        "plain_residual": (x, h, None),
        "rms_norm_rope": (x, weight, angle.cos().to(wide), angle.sin().to(wide), HEADS, EPS),
        "rms_norm": (x, weight, None, None, HEADS, EPS),
    }[op]


FUNCTIONS = {
    "ungated": "residual_layer_norm",
    "plain_residual": "gated_residual",
    "rms_norm": "rms_norm_rope",
}
OPS = ["adaln", "layer_norm", "residual_adaln", "residual_layer_norm", "ungated", "gated_residual"]
OPS += ["plain_residual", "rms_norm_rope", "rms_norm"]


def function(op: str, suffix: str = "") -> object:
    return getattr(norms, FUNCTIONS.get(op, op) + suffix)


def outputs(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


# ---- the references ----


def test_adaln_is_a_modulated_layer_norm():
    x, scale, shift, _ = arguments("adaln")
    expected = F.layer_norm(x, (D,), eps=EPS) * (1 + scale) + shift
    assert torch.equal(norms.adaln_reference(x, scale, shift, EPS), expected)
    rows = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    torch.testing.assert_close(expected, rows * (1 + scale) + shift, rtol=1e-12, atol=1e-12)


def test_layer_norm_is_torchs_in_float32_whatever_the_dtype():
    x, weight, bias, _ = arguments("layer_norm", BF16)
    expected = F.layer_norm(x.float(), (D,), weight.float(), bias.float(), EPS)
    assert torch.equal(norms.layer_norm(x, weight, bias, EPS, F32), expected)
    assert torch.equal(norms.layer_norm(x, weight, bias, EPS), expected.to(BF16))


def test_rms_norm_rounds_before_and_after_the_weight():
    x, weight, *_ = arguments("rms_norm", BF16)
    norm = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(BF16)
    assert torch.equal(norms.rms_norm_rope(x, weight, None, None, HEADS, EPS), norm * weight)


def test_rope_is_a_multiplication_by_unit_complex_numbers():
    x, weight, cos, sin, _, _ = arguments("rms_norm_rope")
    rows = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    turned = torch.view_as_complex(rows.view(B, L, HEADS, -1, 2)) * torch.complex(cos, sin)[:, None]
    truth = torch.view_as_real(turned).reshape(B, L, D)
    found = norms.rms_norm_rope_reference(x, weight, cos, sin, HEADS, EPS)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    assert (found - rows).norm() > 0.2 * rows.norm(), "it must turn something"


@pytest.mark.parametrize("op", OPS)
def test_auto_is_the_reference_on_the_cpu(op):
    """To the bit, gradients included."""
    for dtype in (F32, BF16):
        args = arguments(op, dtype, grad=True)
        leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        runs = []
        for call in (function(op), function(op, "_reference")):
            out = outputs(call(*args))
            runs.append([*out, *torch.autograd.grad(out, leaves, [randn(*y.shape).to(y) for y in out])])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- the opaque ops ----


@pytest.mark.parametrize("rows", [B, 1])
@pytest.mark.parametrize("op", OPS)
def test_fused_equals_the_reference_and_its_gradients(op, rows):
    args = arguments(op, rows=rows, grad=True)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    truth, found = (
        outputs(f) for f in (function(op, "_reference")(*args), function(op)(*args, backend="fused"))
    )
    seeds = [randn(*y.shape, seed=20 + i) for i, y in enumerate(truth)]
    for y, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y, leaves, seeds) for y in (found, truth)]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.norm() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    args = arguments(op, grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: function(op)(*a, backend="fused"), args, fast_mode=True, eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_rounds_no_worse_than_the_reference(op, dtype):
    args = arguments(op, dtype)
    exact = [a.to(F64) if isinstance(a, Tensor) else a for a in args]
    truth = outputs(function(op, "_reference")(*exact))
    plain, found = function(op, "_reference")(*args), function(op)(*args, backend="fused")
    for y, other, expected in zip(outputs(found), outputs(plain), truth, strict=True):
        error, limit = ((v.double() - expected).norm() / expected.norm() for v in (y, other))
        assert y.dtype == other.dtype and error <= 1.05 * limit + 1e-6


@pytest.mark.parametrize("part", ["x", "y"])
def test_a_residual_norm_of_which_only_one_output_is_used(part):
    args = arguments("residual_adaln", grad=True)
    leaves = [a for a in args if isinstance(a, Tensor)][: 3 if part == "x" else 5]
    index = "xy".index(part)
    grads = [
        torch.autograd.grad(f(*args, **options)[index].square().sum(), leaves)
        for f, options in ((norms.residual_adaln, {"backend": "fused"}), (norms.residual_adaln_reference, {}))
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def op_samples() -> list[tuple[str, tuple]]:
    x, h, gate, scale, shift, _ = arguments("residual_adaln", F32, grad=True)
    dy, rows = randn(B, L, D, dtype=F32, seed=30), randn(B, L, dtype=F32, seed=31)
    _, weight, cos, sin, _, _ = arguments("rms_norm_rope", F32, grad=True)
    return [
        ("adaln", (x, h, gate, scale, shift, 1.0, EPS, BF16)),
        ("adaln", (x, None, None, scale, shift, 0.0, EPS, F32)),
        ("adaln_backward", (dy, dy, x, h, gate, scale, rows, rows, 1.0, BF16, True)),
        ("adaln_backward", (dy, None, x, None, None, scale, rows, rows, 0.0, None, False)),
        ("gated_residual", (x, h, gate)),
        ("gated_residual_backward", (dy, h, gate, BF16)),
        ("gated_residual_backward", (dy, None, gate, F32)),
        ("rms_norm_rope", (x, weight, cos, sin, HEADS, EPS)),
        ("rms_norm_rope_backward", (dy, x, weight, cos, sin, rows, HEADS, True)),
        ("rms_norm_rope_backward", (dy, x, weight, None, None, rows, HEADS, False)),
    ]


@pytest.mark.parametrize(("name", "args"), op_samples(), ids=[name for name, _ in op_samples()])
def test_opcheck(name, args):
    op = getattr(torch.ops.wanmoe, name).default
    detached = [a.detach() if name.endswith("backward") and isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(op, tuple(detached))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("which", ["auto", "fused"])
def test_compiles_into_one_graph(op, which):
    def call(*args):
        return sum(y.float().square().sum() for y in outputs(function(op)(*args, backend=which)))

    torch.compiler.reset()  # every case is a recompilation of one function
    args = arguments(op, F32, grad=True)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(*args), leaves) for f in (compiled, call))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_one_token():
    x, scale, shift = (randn(1, 1, D, seed=seed, grad=True) for seed in (1, 2, 3))
    y = norms.adaln(x, scale, shift, EPS, backend="fused")
    grads = torch.autograd.grad(y, (x, scale, shift), randn(1, 1, D, seed=4))
    truth = torch.autograd.grad(
        norms.adaln_reference(x, scale, shift, EPS), (x, scale, shift), randn(1, 1, D, seed=4)
    )
    for ours, theirs in zip(grads, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


# ---- what is refused, and what is said ----


def test_what_does_not_fit_is_refused():
    x, scale, shift, _ = arguments("adaln")
    weight, cos = torch.ones(D), torch.ones(L, D // HEADS // 2)
    for call, message in [
        (lambda: norms.adaln(x[0], scale, shift, EPS), r"x is .* expected floating \[B, L, D\]"),
        (lambda: norms.adaln(x, scale[..., :3], shift, EPS), r"scale is \(2, 1, 3\)"),
        (lambda: norms.adaln(x, scale, shift.squeeze(1), EPS), r"shift is \(2, 24\)"),
        (lambda: norms.layer_norm(x, weight[:3], weight, EPS), r"weight is \(3,\)"),
        (lambda: norms.gated_residual(x, x[:, :2], None), r"h is \(2, 2, 24\)"),
        (lambda: norms.rms_norm_rope(x, weight, cos, None, HEADS, EPS), "cos and sin are given together"),
        (lambda: norms.rms_norm_rope(x, weight, cos, cos[:2], HEADS, EPS), r"sin is \(2, 4\)"),
        (lambda: norms.rms_norm_rope(x, weight, None, None, 5, EPS), "D = 24 does not split into 5 heads"),
        (lambda: norms.adaln(x, scale, shift, EPS, backend="cuda"), "backend 'cuda' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_missing_library_is_said_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "libwanmoe_cuda.so")
    backend._announce.cache_clear()
    cuda_library.load.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            assert [backend._library_is_ready() for _ in range(3)] == [False] * 3
    finally:
        backend._announce.cache_clear()
    assert [record.message for record in caplog.records] == [
        f"norms, residual sums and RoPE run in plain PyTorch: {tmp_path}/libwanmoe_cuda.so is not built; "
        "in a checkout, with nvcc on PATH, run: python -m wanmoe.kernels.cuda_library"
    ]
    compiled = torch.compile(lambda: backend._library_is_ready(), fullgraph=True, backend="eager")
    assert compiled() is False
    backend._announce.cache_clear()
