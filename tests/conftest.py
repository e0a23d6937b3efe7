"""What every test shares: one thread per process, no network, the real data, and the `gpu` marker."""

import os
from pathlib import Path

# Read when torch and the hub client are first imported, so set before that; child processes inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Read when Triton is first imported: the kernels then run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real clips: the variable WANMOE_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("WANMOE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set WANMOE_DATA to a folder that has it")
    return folder.resolve()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
