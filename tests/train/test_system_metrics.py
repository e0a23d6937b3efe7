"""What MLflow's own monitors measure comes under the names that its pages expect."""

import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from mlflow.system_metrics.metrics import gpu_monitor

from wanmoe.train.system_metrics import SystemMetrics


def measured() -> list[dict[str, float]]:
    """The figures of two intervals."""
    lines: list[dict[str, float]] = []
    enough = threading.Event()

    def log(values):
        lines.append(dict(values))
        if len(lines) == 2:
            enough.set()

    metrics = SystemMetrics(0.05, log)
    assert enough.wait(300)
    metrics.close()
    return lines[:2]


def test_cpu_memory_disk_and_network_are_measured():
    first, second = measured()
    assert (
        first.keys()
        == second.keys()
        >= {
            "system/cpu_utilization_percentage",
            "system/system_memory_usage_megabytes",
            "system/disk_usage_percentage",
            "system/network_receive_megabytes",
        }
    )
    assert 0 < first["system/system_memory_usage_percentage"] < 100
    assert all(type(value) is float for value in first.values())


def test_nothing_comes_after_the_end():
    lines: list[object] = []
    metrics = SystemMetrics(1e-3, lines.append)
    metrics.close()
    count = len(lines)
    assert not metrics._thread.is_alive() and len(lines) == count


def test_gpus_are_measured_where_their_driver_answers(monkeypatch):
    """NVML's Python module is a stand-in: it says what one GPU would."""
    nvml = ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetCount = lambda: 1
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=3e9, total=4e9)
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=70)
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 200_000
    nvml.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 400_000
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    values = measured()[0]
    assert values["system/gpu_0_utilization_percentage"] == 70
    assert values["system/gpu_0_memory_usage_percentage"] == 75
    assert values["system/gpu_0_power_usage_watts"] == pytest.approx(200)
