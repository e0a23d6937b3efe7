"""The CUDA library as built: what its kernels need, what it links to, that torch takes it; and its packaging.

Everything here runs without a GPU; the compiler, its disassembler and the linker are the witnesses.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from wanmoe.kernels import cuda_library
from wanmoe.kernels.cuda_library import KernelResources, LibraryError

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {80, 89, 90}
ROW_KERNELS = {
    "adaln_forward",
    "adaln_backward",
    "gated_sum",
    "rms_norm_rope_forward",
    "rms_norm_rope_backward",
}
COLUMN_KERNELS = {"adaln_param_grads", "gate_grad", "rms_norm_rope_weight_grad"}


class Built(NamedTuple):
    path: Path
    log: str
    rows: list[KernelResources]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    obstacle = cuda_library.obstacle()
    if obstacle:
        pytest.skip(f"the library cannot be built: {obstacle}")
    if cuda_library.find_cuobjdump() is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton")
    path = tmp_path_factory.mktemp("library") / cuda_library.LIBRARY.name
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANMOE_CUDA_ARCHS", raising=False)
        log = cuda_library.build(path)
    return Built(path, log, cuda_library.resources(path))


def test_every_kernel_is_there_for_every_gpu(built):
    accesses = {"float32", "float16", "bfloat16", "any"}
    found = {(row.kernel, row.access, row.arch) for row in built.rows}
    assert found == {(k, a, g) for k in ROW_KERNELS | COLUMN_KERNELS for a in accesses for g in ARCHITECTURES}


def test_nothing_is_spilled(built):
    reports = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.log
    )
    assert len(reports) == len(built.rows) and set(reports) == {("0", "0", "0")}
    assert [row for row in built.rows if row.stack or row.spills] == []


def test_rows_move_16_bytes_at_a_time(built):
    """All but the mean and the deviation of a row; a column kernel has five rows of them, four unrolled."""
    for row in built.rows:
        if row.access == "any":
            continue
        assert row.loads_128 >= 8 and row.stores_128 >= 2, row
        assert row.loads - row.loads_128 <= (2 if row.kernel in ROW_KERNELS else 10), row
        assert row.stores - row.stores_128 <= (2 if row.kernel in ROW_KERNELS else 0), row


def test_registers_leave_room_for_a_full_row_and_for_other_ctas(built):
    for row in built.rows:
        # D = 16384 takes 512 threads, of 65536 registers.
        assert row.kernel in COLUMN_KERNELS or row.registers <= 128, row
        if row.access == "bfloat16":
            # At D = 5120 at least 4 rows are on their way at once: 40 KB a tensor.
            assert row.warps >= 20, row


def test_the_readme_has_the_compilers_figures(built):
    text = (ROOT / "csrc" / "README.md").read_text(encoding="utf-8")
    version = re.search(r"nvcc (\d+\.\d+\.\d+)", text)[1]
    here = subprocess.run([cuda_library.find_nvcc(), "--version"], capture_output=True, text=True).stdout
    if f"V{version}" not in here:
        pytest.skip(f"its figures are of nvcc {version}")
    rows: dict[str, list[KernelResources]] = {}
    for row in built.rows:
        if row.access == "bfloat16":
            rows.setdefault(row.kernel, []).append(row)
    for name, archs in rows.items():
        registers, warps = (" / ".join(str(getattr(r, key)) for r in archs) for key in ("registers", "warps"))
        assert f"| {name} | {registers} | {warps} | {archs[0].loads_128} | {archs[0].stores_128} |" in text


def test_links_to_torchs_stable_shim_and_the_c_runtime_alone(built):
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", built.path], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    ours = [name for name in symbols if "@" not in name and not name.startswith(("_ITM_", "__gmon_start__"))]
    assert [name for name in ours if not name.startswith(("aoti_torch_", "torch_"))] == []
    versions = {name.split("@")[1].split("_")[0] for name in symbols if "@" in name}
    assert versions <= {"GLIBC", "GLIBCXX", "CXXABI", "GCC"}
    assert "aoti_torch_get_current_cuda_stream" in ours


SHIM = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern "C" void torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) {}
extern "C" void torch_c10_cuda_free_error_msg(char*) {}
"""
LOAD = """
import ctypes, sys, torch
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
x = torch.zeros(1, 1, 8)
try:
    torch.ops.wanmoe_cuda.gated_sum(x, x, None, x)
except NotImplementedError as error:
    print(torch.ops.wanmoe_cuda.gated_sum.default._schema, "CPU" in str(error))
"""


def test_torch_takes_its_ops(built, tmp_path):
    """A torch without CUDA gets stand-ins for the three functions that it lacks, so that it can load it."""
    shim = tmp_path / "shim.so"
    source = tmp_path / "shim.cpp"
    source.write_text(SHIM)
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", shim], check=True)
    command = [sys.executable, "-c", LOAD, built.path, shim]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0].endswith(
        "gated_sum(Tensor? x, Tensor h, Tensor? gate, Tensor(a!) y) -> () True"
    )


# ---- messages ----


def test_a_library_of_other_sources_or_for_no_cuda_is_refused(monkeypatch, tmp_path):
    library = tmp_path / "libwanmoe_cuda.so"
    monkeypatch.setattr(cuda_library, "LIBRARY", library)
    load = cuda_library.load.__wrapped__
    with pytest.raises(LibraryError, match="is not built; in a checkout, with nvcc on PATH, run: python -m"):
        load()
    library.write_bytes(b"wanmoe-sources:0123456789abcdef")
    with pytest.raises(LibraryError, match="built from other sources"):
        load()
    library.write_bytes(f"wanmoe-sources:{cuda_library.fingerprint()}".encode())
    message = "is a build without CUDA" if torch.version.cuda is None else "does not load into torch"
    with pytest.raises(LibraryError, match=message):
        load()


@pytest.mark.parametrize(
    ("text", "expected"), [("9.0 8.0", [80, 90]), ("100;80", [80, 100]), ("", [80, 89, 90])]
)
def test_architectures(monkeypatch, text, expected):
    monkeypatch.setenv("WANMOE_CUDA_ARCHS", text)
    assert cuda_library.architectures() == expected


@pytest.mark.parametrize(
    ("text", "message"), [("75;80", "has 75; the kernels need 80"), ("sm_80", "expected")]
)
def test_architectures_that_cannot_be(monkeypatch, text, message):
    monkeypatch.setenv("WANMOE_CUDA_ARCHS", text)
    with pytest.raises(LibraryError, match=message):
        cuda_library.architectures()


def test_resident_warps():
    # 64 registers: 8 warps a scheduler, 32 in all, hence 6 CTAs of 5. 78 become 80: 6 a scheduler, 4 CTAs.
    found = [cuda_library.resident_warps(80, registers, 160) for registers in (64, 78, 24)]
    assert found == [30, 20, 60]
    assert cuda_library.resident_warps(89, 24, 32) == 24, "CTAs run out before warps"


# ---- packaging, with a stand-in for the compiler ----

NVCC = """#!/bin/sh
[ -n "$BROKEN" ] && { echo "norms.cu(1): error: expected a ';'" >&2; exit 2; }
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done
"""


def build_wheel(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    tree, home = tmp_path / "tree", tmp_path / "cuda"
    skipped = shutil.ignore_patterns(
        ".*", "runs", "build", "dist", "tests", "docs", "*.egg-info", "__pycache__", "*.so"
    )
    shutil.copytree(ROOT, tree, ignore=skipped)
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(NVCC)
    (home / "bin" / "nvcc").chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        tmp_path / "dist",
        tree,
    ]
    env = {**os.environ, "CUDA_HOME": str(home), **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_a_wheel_with_the_library_is_for_the_platform_and_any_python(tmp_path):
    done = build_wheel(tmp_path, WANMOE_BUILD_CUDA="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("wanmoe/kernels/libwanmoe_cuda.so") == b"compiled\n"


def test_a_wheel_without_the_library_says_why(tmp_path):
    done = build_wheel(tmp_path, WANMOE_BUILD_CUDA="0")
    assert "wanmoe: without the CUDA library, since WANMOE_BUILD_CUDA is 0" in done.stdout
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_compile_error_stops_the_build_and_says_the_way_out(tmp_path):
    done = build_wheel(tmp_path, WANMOE_BUILD_CUDA="1", BROKEN="1")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "norms.cu(1): error: expected a ';'" in said
    assert "WANMOE_BUILD_CUDA=0 installs without the CUDA library" in said
