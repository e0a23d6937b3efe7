"""The whole fused path: public op, autograd, opaque op, binding, launch, kernel, against float64.

On a GPU with the library; elsewhere with the binding linked to the host emulation of the kernels, on CPU
tensors: all but the hardware.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanmoe.kernels import cuda_library, norms
from wanmoe.kernels.norms import backend
from wanmoe.kernels.norms.adaln_op import _adaln, _adaln_backward, _adaln_backward_cuda, _adaln_cuda
from wanmoe.kernels.norms.gated_residual import (
    _gated_residual,
    _gated_residual_backward,
    _gated_residual_backward_cuda,
    _gated_residual_cuda,
)
from wanmoe.kernels.norms.rms_norm_rope import (
    _rms_norm_rope,
    _rms_norm_rope_backward,
    _rms_norm_rope_backward_cuda,
    _rms_norm_rope_cuda,
)

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "csrc"
EPS = 1e-6
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CUDA_KERNELS = [
    (_adaln, _adaln_cuda),
    (_adaln_backward, _adaln_backward_cuda),
    (_gated_residual, _gated_residual_cuda),
    (_gated_residual_backward, _gated_residual_backward_cuda),
    (_rms_norm_rope, _rms_norm_rope_cuda),
    (_rms_norm_rope_backward, _rms_norm_rope_backward_cuda),
]
# Our error may be this times that of the plain code in the same dtype, plus a few units in the last place.
FACTOR, UNITS = 1.2, 4


def build_emulated(folder: Path) -> Path:
    """The binding, registered for the CPU, with the emulated kernels."""
    torch_folder, target = cuda_library.find_torch(), folder / "libwanmoe_emulated.so"
    nvcc, compiler = cuda_library.find_nvcc(), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip("needs nvcc, for the CUDA headers, and g++")
    _, binding, _ = cuda_library.commands(target, folder, [90])
    emulated = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{ROOT}/csrc"]
    emulated += [f"-I{HERE}", f"{HERE}/emulate_norms.cpp", f"{HERE}/emulate_shim.cpp", f"{folder}/binding.o"]
    emulated += ["-o", str(target), f"-L{torch_folder}/lib", "-Wl,--no-as-needed", "-ltorch"]
    for command in ([*binding, "-DWANMOE_DISPATCH_KEY=CPU"], emulated):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The device whose tensors reach the library."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cuda":
            if not cuda_library.LIBRARY.exists():
                if cuda_library.obstacle():
                    pytest.skip(f"the library is not built, and cannot be: {cuda_library.obstacle()}")
                patch.setattr(cuda_library, "LIBRARY", tmp_path_factory.mktemp("cuda") / "libwanmoe_cuda.so")
                cuda_library.build(cuda_library.LIBRARY)
            cuda_library.load.cache_clear()
            cuda_library.ops.cache_clear()
            backend._announce.cache_clear()
            cuda_library.ops()
            yield "cuda"
            return
        if torch.cuda.is_available():
            pytest.skip("the real library is tested instead: its ops have the same names")
        torch.ops.load_library(str(build_emulated(tmp_path_factory.mktemp("emulated"))))
        patch.setattr(cuda_library, "ops", lambda: torch.ops.wanmoe_cuda)
        for op, kernel in CUDA_KERNELS:
            op.register_kernel("cpu")(kernel)
        yield "cpu"
        # Other tests of this process get the formulas in PyTorch back.
        for op, _ in CUDA_KERNELS:
            op.register_kernel("cpu")(op._init_fn)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty gives is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


Op = Callable[..., Tensor | tuple[Tensor, ...]]


def inputs(op: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor | float | None]:
    """Arguments of the op: tensors of `dtype`, or of float32 where the kernels want them wide."""
    b, tokens, d, heads = size
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    # The six vectors of a block: strided over clips.
    scale, shift, gate, _, _, _ = randn(b, 6, 1, d).unbind(1)
    x, h = randn(b, tokens, d, dtype=dtype) + 1, randn(b, tokens, d, dtype=dtype)
    angle = randn(tokens, d // heads // 2)
    modulation = {"scale": scale, "shift": shift}
    affine = {"weight": randn(d, dtype=dtype), "bias": randn(d, dtype=dtype)}
    return {
        "adaln": {"x": x, **modulation, "eps": EPS},
        "layer_norm": {"x": x, **affine, "eps": EPS},
        "residual_adaln": {"x": x, "h": h, "gate": None, **modulation, "eps": EPS},
        "residual_layer_norm": {"x": x, "h": h, "gate": gate, **affine, "eps": EPS},
        "gated_residual": {"x": x, "h": h, "gate": gate},
        "rms_norm_rope": {"x": x, "weight": affine["weight"], "cos": angle.cos(), "sin": angle.sin()}
        | {"num_heads": heads, "eps": EPS},
    }[op]


def results(op: Op, arguments: dict[str, Tensor | float | None], **options: str) -> dict[str, Tensor]:
    """Outputs and the gradients of all floating arguments, for fixed gradients of the outputs."""
    leaves = {
        name: v.detach().requires_grad_(name not in ("cos", "sin"))
        for name, v in arguments.items()
        if isinstance(v, Tensor)
    }
    out = op(**{**arguments, **leaves}, **options)
    outputs = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(2)
    seeds = [torch.randn(y.shape, generator=g).to(y) for y in outputs]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(outputs, list(wanted.values()), seeds)
    return {f"y{i}": y.detach() for i, y in enumerate(outputs)} | dict(zip(wanted, grads, strict=True))


def moved(arguments: dict, device: str | torch.dtype) -> dict:
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in arguments.items()}


OPS = ["adaln", "layer_norm", "residual_adaln", "residual_layer_norm", "gated_residual", "rms_norm_rope"]
# (clips, tokens, D, heads): whole units of 8 numbers, several clips and chunks of 64 tokens, a tail.
SIZES = [(1, 3, 5120, 40), (2, 67, 64, 4), (3, 5, 100, 10)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_outputs_and_gradients(device, dtype, size, op):
    arguments = moved(inputs(op, size, dtype), device)
    reference = getattr(norms, f"{op}_reference")
    truth = results(reference, moved(arguments, torch.float64))
    plain = results(reference, arguments)
    found = results(getattr(norms, op), arguments, backend="fused")
    assert found.keys() == truth.keys()
    for name, value in found.items():
        norm = truth[name].norm()
        ours = (value.double() - truth[name]).norm() / norm
        theirs = (plain[name].double() - truth[name]).norm() / norm
        limit = FACTOR * theirs + UNITS * torch.finfo(F32).eps
        assert norm > 0.1 and value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        assert ours <= limit, f"{name}: error {ours:.1e}, of plain PyTorch {theirs:.1e}"


@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_equal_to_the_bit(device, op):
    arguments = moved(inputs(op, (2, 130, 256, 4), BF16), device)
    runs = [results(getattr(norms, op), arguments, backend="fused") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(device, op):
    torch.compiler.reset()  # every case is a recompilation of one function
    arguments = moved(inputs(op, (2, 5, 64, 4), BF16), device)
    eager = results(getattr(norms, op), arguments, backend="fused")
    compiled = torch.compile(getattr(norms, op), fullgraph=True, backend="aot_eager")
    found = results(compiled, arguments, backend="fused")
    assert all(torch.equal(found[name], eager[name]) for name in eager)


def test_only_what_is_asked_for_is_computed(device):
    """Frozen modulation, as in adapter training: x and h alone get gradients, by the same numbers."""
    arguments = moved(inputs("residual_layer_norm", (2, 5, 64, 4), BF16), device)
    full = results(norms.residual_layer_norm, arguments, backend="fused")
    x, h = arguments["x"].detach().requires_grad_(), arguments["h"].detach().requires_grad_()
    outputs = norms.residual_layer_norm(**{**arguments, "x": x, "h": h}, backend="fused")
    assert [kept is None for kept in outputs[0].grad_fn.saved_tensors] == [False, True, *[False] * 4]
    g = torch.Generator().manual_seed(2)
    seeds = [torch.randn(y.shape, generator=g).to(y) for y in outputs]
    dx, dh = torch.autograd.grad(outputs, (x, h), seeds)
    assert torch.equal(dx, full["x"]) and torch.equal(dh, full["h"])


def test_strided_and_expanded_tensors(device):
    arguments = moved(inputs("adaln", (2, 5, 64, 4), F32), device)
    x = arguments["x"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y = norms.adaln(**{**arguments, "x": x}, backend="fused")
    (dx,) = torch.autograd.grad(y.sum() + 0 * x.sum(), x)  # the gradient of a sum is one expanded number
    plain = norms.adaln_reference(**{**arguments, "x": x})
    (truth,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, truth, rtol=1e-5, atol=1e-5)


def test_the_binding_refuses_what_does_not_fit(device):
    ops = cuda_library.ops()
    x, gate = torch.zeros(2, 3, 64, device=device), torch.zeros(2, 1, 64, device=device)
    for values, message in [
        ((x, x[:, :, :32], gate, x), "h has another shape|has another shape than x"),
        ((x, x, gate.double(), x), "gate is not float32"),
        ((x, x, gate[:, :, :32], x), r"gate is not a \[2, 1, 64\]"),
        ((x.transpose(0, 1), x.transpose(0, 1), gate, x), "shape|not contiguous"),
        ((x.double(), x, gate, x), "neither float32, float16 nor bfloat16"),
        ((x, torch.zeros(1, 1, 16392, device=device), None, x), "D is 16392; the kernels take 1 to 16384"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.gated_sum(*values)
    none = torch.empty(2, 0, 64, device=device)
    ops.gated_sum(none, none, gate, none)


@pytest.mark.gpu
def test_auto_is_fused_on_a_gpu_and_follows_the_stream(device):
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    arguments = moved(inputs("adaln", (2, 67, 5120, 40), BF16), device)
    expected = norms.adaln(**arguments, backend="fused")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = norms.adaln(**arguments)
    stream.synchronize()
    assert torch.equal(found, expected) and backend.chosen("auto", arguments["x"]) == "fused"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = norms.adaln(**arguments)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
