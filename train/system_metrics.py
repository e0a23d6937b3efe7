"""CPU, memory, disk, network and GPUs of this host, measured by MLflow's own monitors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

SAMPLES = 5
"""Readings that one logged figure is the mean of."""


class SystemMetrics:
    """Logs `system/...` at intervals from a thread of its own, until `close`.

    Args:
        every: seconds between two lines of figures.
        log: is given the figures of one interval, named as MLflow's pages expect them.
    """

    def __init__(self, every: float, log: Callable[[Mapping[str, float]], object]) -> None:
        self._every, self._log = every, log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops measuring; an interval that has begun is not logged."""
        self._stop.set()
        self._thread.join(5.0)  # a driver that hangs must not hold up the end of a run

    def _work(self) -> None:
        monitors = _monitors()
        for monitor in monitors:  # the first reading of the CPU is since its last one, which there is none of
            monitor.collect_metrics()
            monitor.clear_metrics()
        while True:
            for _ in range(SAMPLES):
                if self._stop.wait(self._every / SAMPLES):
                    return
                for monitor in monitors:
                    monitor.collect_metrics()
            values: dict[str, float] = {}
            for monitor in monitors:
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self._log({f"system/{name}": float(value) for name, value in values.items()})


def _monitors() -> list[Any]:
    """MLflow's monitors; those of GPUs where their drivers answer (NVIDIA's need nvidia-ml-py)."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            monitors.append(kind())
        except (ImportError, RuntimeError):  # how both say that there is no such GPU
            continue
    return monitors
