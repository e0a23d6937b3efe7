"""What the compiler makes of every launch that a table can name, for four architectures, without a card."""

import os

import pytest
import torch

from wanmoe.kernels.lora_moe import resources, table

pytest.importorskip("triton")


@pytest.fixture(scope="module", params=table.SHARED_MEMORY)
def compiled(request):
    return resources.compile_apart(
        [request.param], workers=2 if "PYTEST_XDIST_WORKER" not in os.environ else 1
    )


def test_no_launch_spills_and_all_use_the_tensor_cores(compiled):
    arch = compiled[0].arch
    assert {(r.kernel, r.launch, r.width) for r in compiled if r.launch} == {
        (kernel, launch, width)
        for kernel in table.CANDIDATES
        for width in resources.WIDTHS
        for launch in table.candidates(kernel, width, arch)
    }
    faults = {f"{r.kernel} {r.launch} width {r.width}": r.fault() for r in compiled if r.fault()}
    assert faults == {}
    assert all(0 < r.registers <= 255 for r in compiled)


def test_a_spill_is_found():
    row = resources.Resources(
        "shrink", table.CANDIDATES["shrink"][0].launch, 64, "sm_80", 255, 8, 2, 1024, 16
    )
    assert "spills" in row.fault()
    assert "shared memory" in row._replace(stack=0, spills=0, shared=200_000).fault()
    assert row._replace(stack=0, spills=0, tensor_core=0).fault() == "no tensor-core instruction"
    assert row._replace(stack=0, spills=0).fault() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles in this process")
def test_an_interpreting_process_says_so():
    with pytest.raises(RuntimeError, match="interprets in this process"):
        resources.measure("shrink", table.CANDIDATES["shrink"][0].launch, 32, "sm_80")
