"""The kernels of csrc/norms on the host, from the sources that nvcc compiles: arithmetic, indexing, traffic.

A host emulation (tests/csrc/emulate.h) compiled by g++: it shows no data races of hardware and no timing.
The truth is the references of kernels/norms in float64 and their autograd.
"""

import ctypes
import shutil
import subprocess
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from wanmoe.kernels import norms

ROOT = Path(__file__).resolve().parents[2]
EPS = 1e-6
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Largest error of a result over the largest number in it: one rounding of the dtype, or float32 sums.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# (clips, tokens, D, heads): A14B; the widest; a quarter of a warp; two chunks of rows; tails of 4 and of 6.
SIZES = [
    (1, 3, 5120, 40),
    (1, 1, 16384, 128),
    (2, 5, 64, 4),
    (2, 67, 72, 3),
    (3, 5, 100, 10),
    (1, 2, 1030, 5),
]


class Shape(Structure):
    _fields_ = [("clips", c_int64), ("tokens", c_int64), ("width", c_int)]


class Array(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int)]


class Vector(Structure):
    _fields_ = [("data", c_void_p), ("clip_stride", c_int64)]


def structure(name: str, fields: str) -> type[Structure]:
    """The struct of that name in norms.h, from "field:kind field:kind"."""
    kinds = {"a": Array, "v": Vector, "p": c_void_p, "i": c_int, "f": c_float}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (Structure,), {"_fields_": [("shape", Shape)] + [(n, kinds[k]) for n, k in pairs]})


STRUCTURES = {
    name: structure(name, fields)
    for name, fields in {
        "AdalnForward": "x:a h:a gate:v scale:v shift:v x_new:a y:a mean:p rstd:p offset:f eps:f",
        "AdalnBackward": "dy:a dx_new:a x:a gate:v scale:v mean:p rstd:p dx:a dh:a offset:f",
        "AdalnParamGrads": "dy:a x:a mean:p rstd:p dscale:p dshift:p",
        "GatedSum": "x:a h:a gate:v y:a",
        "GateGrad": "dy:a h:a dgate:p",
        "RmsRopeForward": "head:i x:a weight:p cos:p sin:p y:a rstd:p eps:f",
        "RmsRopeBackward": "head:i dy:a x:a weight:p cos:p sin:p rstd:p dx:a",
        "RmsRopeWeightGrad": "head:i dy:a x:a cos:p sin:p rstd:p dweight:p",
    }.items()
}


class Emulator:
    """Calls the kernels with tensors; `moved` holds the bytes of the last call."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.moved = dict.fromkeys(("streamed", "shared", "scalar", "written"), 0)

    def run(self, name: str, shape: torch.Size, **values: object) -> None:
        args = STRUCTURES[name](shape=Shape(*shape))
        for field, kind in STRUCTURES[name]._fields_[1:]:
            value = values.pop(field, None)
            if isinstance(value, torch.Tensor):
                value = self.pass_tensor(kind, value)
            if value is not None:
                setattr(args, field, value)
        assert not values, values
        function = getattr(self.library, f"run_{name}")
        function.restype, function.argtypes = c_char_p, [POINTER(STRUCTURES[name])]
        failed = function(byref(args))
        if failed:
            raise RuntimeError(failed.decode())
        counts = (c_int64 * 4)()
        self.library.moved(counts)
        self.moved = dict(zip(self.moved, counts, strict=True))

    @staticmethod
    def pass_tensor(kind: type, value: torch.Tensor) -> object:
        if kind is Array:
            assert value.is_contiguous()
            return Array(value.data_ptr(), DTYPES[value.dtype])
        assert value.dtype is F32
        if kind is Vector:
            return Vector(value.data_ptr(), value.stride(0) if value.shape[0] > 1 else 0)
        return value.data_ptr()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("emulated") / "norms.so"
    here = ROOT / "tests" / "csrc"
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{here}", str(here / "emulate_norms.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Emulator(library)


class Margins:
    """Tensors in the middle of NaN: a number read beside one spoils a result, one written beside it is
    found."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.buffers: list[tuple[torch.Tensor, int, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype = F32, shift: int = 0) -> torch.Tensor:
        """All NaN; `shift` moves it off its alignment by so many numbers."""
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 4096,), float("nan"), dtype=dtype)
        first = next(
            i for i in range(2048) if (buffer.data_ptr() + (2000 + i) * buffer.element_size()) % 64 == 0
        )
        first += 2000 + shift
        self.buffers.append((buffer, first, first + count))
        return buffer[first : first + count].view(shape)

    def randn(self, *shape: int, dtype: torch.dtype = F32, shift: int = 0, mean: float = 0.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator) + mean
        return self.empty(*shape, dtype=dtype, shift=shift).copy_(values)

    def check(self) -> None:
        for buffer, first, last in self.buffers:
            assert not buffer[first:last].isnan().any(), (
                "a number was not written, or made of what lies beside"
            )
            assert buffer[:first].isnan().all() and buffer[last:].isnan().all(), "written out of bounds"


def close(found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Within one rounding of `dtype` of the largest number; a result of zeros is not."""
    truth = truth.detach()
    scale = truth.abs().max()
    assert scale > 0.05 and found.shape == truth.shape
    error = (found.double() - truth).abs().max() / scale
    assert error <= TOLERANCE[dtype], f"error {error:.1e} of the largest, {TOLERANCE[dtype]:.0e} allowed"


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.double().requires_grad_()


def chunks(tokens: int) -> int:
    return -(-tokens // 64)


def test_structs_are_those_of_the_header(emulator):
    for name, kind in STRUCTURES.items():
        size = getattr(emulator.library, f"size_{name}")
        size.restype = c_int64
        assert size() == ctypes.sizeof(kind), name


@pytest.mark.parametrize("form", ["adaln", "affine", "residual", "ungated"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_adaln(emulator, dtype, size, form):
    b, tokens, d, _ = size
    m, shape = Margins(), torch.Size((b, tokens, d))
    offset = 0.0 if form == "affine" else 1.0
    x = m.randn(*shape, dtype=dtype, mean=3.0)
    h = m.randn(*shape, dtype=dtype) if form in ("residual", "ungated") else None
    modulation = m.randn(b, 3, 1, d)
    scale, shift, gate = modulation.unbind(1)  # strided over clips, as the block has them
    if form == "affine":
        scale, shift = m.randn(1, 1, d), m.randn(1, 1, d)
    gate = gate if form == "residual" else None
    x_new = m.empty(*shape, dtype=dtype) if h is not None else None
    y, mean, rstd = m.empty(*shape, dtype=dtype), m.empty(b, tokens), m.empty(b, tokens)
    emulator.run(
        *("AdalnForward", shape),
        **dict(x=x, h=h, gate=gate, scale=scale, shift=shift, x_new=x_new),
        **dict(y=y, mean=mean, rstd=rstd, offset=offset, eps=EPS),
    )
    m.check()

    rows = leaf(x if x_new is None else x_new)
    scale_t, shift_t = leaf(scale), leaf(shift)
    truth = norms.adaln_reference(rows, scale_t + (offset - 1), shift_t, EPS)
    close(y, truth, dtype)
    if h is not None:
        close(x_new, norms.gated_residual_reference(x.double(), h.double(), gate), dtype)

    dy = m.randn(*shape, dtype=dtype)
    dx_new = m.randn(*shape, dtype=dtype) if h is not None else None
    dx = m.empty(*shape, dtype=dtype)
    dh = m.empty(*shape, dtype=dtype) if gate is not None else None
    saved = dict(mean=mean, rstd=rstd)
    values = dict(dy=dy, dx_new=dx_new, x=rows.detach().to(dtype), gate=gate, scale=scale, dx=dx, dh=dh)
    values["x"] = x if x_new is None else x_new
    emulator.run("AdalnBackward", shape, **values, **saved, offset=offset)
    sums = [m.empty(b, chunks(tokens), d) for _ in range(2)]
    emulator.run("AdalnParamGrads", shape, dy=dy, x=values["x"], **saved, dscale=sums[0], dshift=sums[1])
    m.check()
    truths = torch.autograd.grad(truth, (rows, scale_t, shift_t), dy.double())
    dx_truth = truths[0] + (0 if dx_new is None else dx_new.double())
    close(dx, dx_truth, dtype)
    if dh is not None:
        close(dh, dx_truth * gate, dtype)
    for partial, full in zip(sums, truths[1:], strict=True):
        close(partial.sum(1, keepdim=True).sum_to_size(full.shape), full, F32)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_gated_residual(emulator, dtype, size, gated):
    b, tokens, d, _ = size
    m, shape = Margins(), torch.Size((b, tokens, d))
    x, h, dy = (m.randn(*shape, dtype=dtype) for _ in range(3))
    gate = m.randn(b, 1, d) if gated else None
    y = m.empty(*shape, dtype=dtype)
    emulator.run("GatedSum", shape, x=x, h=h, gate=gate, y=y)
    close(y, norms.gated_residual_reference(x.double(), h.double(), gate), dtype)
    if gate is not None:
        h_t, gate_t = leaf(h), leaf(gate)
        truth = norms.gated_residual_reference(x.double(), h_t, gate_t)
        dh, sums = m.empty(*shape, dtype=dtype), m.empty(b, chunks(tokens), d)
        emulator.run("GatedSum", shape, h=dy, gate=gate, y=dh)
        emulator.run("GateGrad", shape, dy=dy, h=h, dgate=sums)
        dh_truth, dgate_truth = torch.autograd.grad(truth, (h_t, gate_t), dy.double())
        close(dh, dh_truth, dtype)
        close(sums.sum(1, keepdim=True), dgate_truth, F32)
    m.check()


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rms_norm_rope(emulator, dtype, size, rotated):
    b, tokens, d, heads = size
    m, shape, head = Margins(), torch.Size((b, tokens, d)), d // heads
    x, dy = m.randn(*shape, dtype=dtype, mean=0.5), m.randn(*shape, dtype=dtype)
    weight, angle = m.randn(d), torch.randn(tokens, head // 2, generator=m.generator)
    cos, sin = m.empty(tokens, head // 2).copy_(angle.cos()), m.empty(tokens, head // 2).copy_(angle.sin())
    tables = dict(cos=cos, sin=sin) if rotated else {}
    y, rstd = m.empty(*shape, dtype=dtype), m.empty(b, tokens)
    emulator.run("RmsRopeForward", shape, head=head, x=x, weight=weight, **tables, y=y, rstd=rstd, eps=EPS)
    dx, sums = m.empty(*shape, dtype=dtype), m.empty(b, chunks(tokens), d)
    emulator.run("RmsRopeBackward", shape, head=head, dy=dy, x=x, weight=weight, **tables, rstd=rstd, dx=dx)
    emulator.run("RmsRopeWeightGrad", shape, head=head, dy=dy, x=x, **tables, rstd=rstd, dweight=sums)
    m.check()

    x_t, weight_t = leaf(x), leaf(weight)
    wide_tables = [t.double() for t in tables.values()] or [None, None]
    truth = norms.rms_norm_rope_reference(x_t, weight_t, *wide_tables, heads, EPS)
    close(y, truth, dtype)
    dx_truth, dweight_truth = torch.autograd.grad(truth, (x_t, weight_t), dy.double())
    close(dx, dx_truth, dtype)
    # The weight multiplies the rounded norm; of float64 nothing is rounded.
    close(sums.sum((0, 1)), dweight_truth, dtype)


def test_rounds_where_the_reference_rounds(emulator):
    """The RMS norm rounds three times: in bfloat16 nearly every number equals the reference's to the bit."""
    m, shape = Margins(), torch.Size((2, 7, 256))
    x, weight, angle = m.randn(*shape, dtype=BF16), m.randn(256), torch.randn(7, 32, generator=m.generator)
    tables = [m.empty(7, 32).copy_(angle.cos()), m.empty(7, 32).copy_(angle.sin())]
    y, rstd = m.empty(*shape, dtype=BF16), m.empty(2, 7)
    values = dict(x=x, weight=weight, cos=tables[0], sin=tables[1], y=y, rstd=rstd)
    emulator.run("RmsRopeForward", shape, head=64, **values, eps=EPS)
    same = y == norms.rms_norm_rope_reference(x, weight, *tables, 4, EPS)
    # Where the float32 norms differ in the last bit, a number may round to the other side.
    assert same.float().mean() > 0.99


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(F32, BF16), (F32, F16), (BF16, F32)])
def test_mixed_dtypes(emulator, x_dtype, y_dtype):
    m, shape = Margins(), torch.Size((2, 3, 64))
    x, h = m.randn(*shape, dtype=x_dtype), m.randn(*shape, dtype=y_dtype)
    gate, scale, shift = (m.randn(2, 1, 64) for _ in range(3))
    x_new, y = m.empty(*shape, dtype=x_dtype), m.empty(*shape, dtype=y_dtype)
    mean, rstd = m.empty(2, 3), m.empty(2, 3)
    values = dict(x=x, h=h, gate=gate, scale=scale, shift=shift, x_new=x_new, y=y, mean=mean, rstd=rstd)
    emulator.run("AdalnForward", shape, **values, offset=1.0, eps=EPS)
    m.check()
    close(x_new, norms.gated_residual_reference(x.double(), h.double(), gate), x_dtype)
    close(y, norms.adaln_reference(x_new.double(), scale, shift, EPS), y_dtype)


@pytest.mark.parametrize("shifted", ["x", "y", "scale"])
def test_misaligned_tensors_take_the_narrow_path(emulator, shifted):
    m, shape = Margins(), torch.Size((1, 3, 64))
    off = {name: int(name == shifted) for name in ("x", "y", "scale")}
    x, y = m.randn(*shape, dtype=BF16, shift=off["x"]), m.empty(*shape, dtype=BF16, shift=off["y"])
    scale, shift = m.randn(1, 1, 64, shift=off["scale"]), m.randn(1, 1, 64)
    values = dict(x=x, scale=scale, shift=shift, y=y, mean=m.empty(1, 3), rstd=m.empty(1, 3))
    emulator.run("AdalnForward", shape, **values, offset=1.0, eps=EPS)
    m.check()
    close(y, norms.adaln_reference(x.double(), scale, shift, EPS), BF16)
    assert emulator.moved["streamed"] == 0 and emulator.moved["scalar"] > 0


def test_the_same_call_twice_gives_the_same_bits(emulator):
    m, shape = Margins(), torch.Size((1, 130, 264))
    dy, x = m.randn(*shape, dtype=BF16), m.randn(*shape, dtype=BF16)
    mean, rstd = m.randn(1, 130), m.randn(1, 130)
    runs = [[m.empty(1, 3, 264) for _ in range(2)] for _ in range(2)]
    for dscale, dshift in runs:
        values = dict(dy=dy, x=x, mean=mean, rstd=rstd, dscale=dscale, dshift=dshift)
        emulator.run("AdalnParamGrads", shape, **values)
    m.check()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_each_row_is_read_once_and_written_once(emulator):
    """The least that can be moved: each [B, L, D] tensor of a call once, and the few numbers of a row."""
    m, shape = Margins(), torch.Size((1, 3, 5120))
    one = shape.numel() * 2
    x, h, dy, dx_new, y, x_new, dx, dh = (m.randn(*shape, dtype=BF16) for _ in range(8))
    gate, scale, shift = (m.randn(1, 1, 5120) for _ in range(3))
    weight, cos, sin = m.randn(5120), m.randn(3, 64), m.randn(3, 64)
    stats = dict(mean=m.randn(1, 3), rstd=m.randn(1, 3))
    found = {}

    def count(case: str, name: str, **values: object) -> None:
        emulator.run(name, shape, **values)
        found[case] = (emulator.moved["streamed"] / one, emulator.moved["written"] // one)

    vectors = dict(scale=scale, shift=shift, offset=1.0, eps=EPS)
    count("adaln", "AdalnForward", x=x, y=y, **vectors, **stats)
    count("residual", "AdalnForward", x=x, h=h, gate=gate, x_new=x_new, y=y, **vectors, **stats)
    count("adaln dx", "AdalnBackward", dy=dy, x=x, scale=scale, dx=dx, offset=1.0, **stats)
    pair = dict(dy=dy, dx_new=dx_new, x=x, gate=gate, scale=scale, dx=dx, dh=dh, offset=1.0)
    count("residual dx", "AdalnBackward", **pair, **stats)
    count("gated sum", "GatedSum", x=x, h=h, gate=gate, y=y)
    count("gated sum dh", "GatedSum", h=dy, gate=gate, y=dh)
    rope = dict(head=128, x=x, weight=weight, cos=cos, sin=sin, rstd=stats["rstd"])
    count("rope", "RmsRopeForward", **rope, y=y, eps=EPS)
    count("rope dx", "RmsRopeBackward", **rope, dy=dy, dx=dx)
    assert found == {
        "adaln": (1, 1),
        "residual": (2, 2),
        "adaln dx": (2, 1),
        "residual dx": (3, 2),
        "gated sum": (2, 1),
        "gated sum dh": (1, 1),
        "rope": (1, 1),
        "rope dx": (2, 1),
    }
