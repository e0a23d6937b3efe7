"""The harness: all run equally often, in changing order, over all input sets; fresh memory really is NaN."""

import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from wanmoe.kernels.bench import ceilings
from wanmoe.kernels.bench.ceilings import measure_ceilings
from wanmoe.kernels.bench.memory import peak_bytes, poisoned, saved_bytes
from wanmoe.kernels.bench.timing import (
    GPU,
    QUICK,
    Protocol,
    Timed,
    graph_times,
    input_sets,
    interleaved,
    percentile,
    summary,
)

CPU = torch.device("cpu")


def counting(log, name):
    return Timed(name, lambda index: index, lambda index: log.append((name, index)))


def test_variants_are_interleaved_and_inputs_rotate():
    log = []
    names = [f"v{i}" for i in range(5)]
    protocol = Protocol(warmup=2, repeats=7)
    samples = interleaved([counting(log, n) for n in names], device=CPU, sets=3, protocol=protocol)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys(names, 7)
    assert all(time >= 0 for times in samples.values() for time in times)
    rounds = [tuple(name for name, _ in log[i : i + 5]) for i in range(0, len(log), 5)]
    assert len(rounds) == 9
    assert all(sorted(order) == names for order in rounds)
    # In the timed rounds the order changes, and no two calls in a row see the same inputs.
    assert len(set(rounds[2:])) > 1
    assert all(a[1] != b[1] for a, b in itertools.pairwise(log))


def test_a_budget_cuts_repeats_but_not_below_the_least():
    spent = Timed("slow", lambda index: None, lambda given: sum(range(200_000)))
    protocol = Protocol(warmup=1, repeats=50, least=3, budget_s=1e-6)
    assert len(interleaved([spent], device=CPU, sets=1, protocol=protocol)["slow"]) == 3


def test_what_is_not_timed_runs_before_and_the_context_around_both():
    log = []

    @contextmanager
    def around():
        log.append("in")
        yield
        log.append("out")

    one = Timed("one", lambda index: log.append("before"), lambda given: log.append("run"), around)
    interleaved([one], device=CPU, sets=1, protocol=Protocol(warmup=0, repeats=2))
    assert log == ["in", "before", "out", "in", "run", "out"] * 2


def test_between_a_forward_and_its_timed_backward_lies_the_next_ones_forward():
    log = []

    def logged(name):
        return Timed(name, lambda i: log.append(f"{name} forward {i}"), lambda given: log.append(name))

    interleaved([logged("a"), logged("b")], device=CPU, sets=2, protocol=Protocol(warmup=1, repeats=0))
    assert log == ["a forward 0", "b forward 1", "a", "b"]


def test_a_budget_ends_the_warm_up_too():
    log = []
    slow = Timed("slow", log.append, lambda given: sum(range(100_000)))
    interleaved([slow], device=CPU, sets=1, protocol=Protocol(warmup=1000, repeats=1, least=1, budget_s=1e-6))
    assert len(log) == 2
    assert all(protocol.warmup >= 25 and protocol.repeats >= 100 for protocol in (GPU, QUICK))
    assert QUICK.budget_s < GPU.budget_s


def test_percentiles():
    assert percentile([3.0], 0.2) == 3.0
    assert percentile([4.0, 1.0, 2.0, 3.0, 5.0], 0.5) == 3.0
    assert summary(list(map(float, range(11)))) == {"median": 5.0, "p20": 2.0, "p80": 8.0}


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    weight = torch.randn(8, 4, requires_grad=True)
    x = torch.randn(5, 4, requires_grad=True)
    assert saved_bytes(lambda: F.linear(x, weight), [weight]) == x.nbytes
    assert saved_bytes(lambda: (F.linear(x, weight), F.linear(x, weight)), [weight]) == x.nbytes
    assert saved_bytes(lambda: F.linear(x, weight), []) == x.nbytes + weight.nbytes
    assert saved_bytes(lambda: (x * 2).exp(), []) == x.nbytes


def test_there_is_no_peak_on_the_cpu():
    assert peak_bytes(lambda: torch.randn(10), CPU) is None


def test_fresh_memory_is_nan_inside_and_the_settings_are_put_back():
    before = torch.get_deterministic_debug_mode()
    with poisoned(CPU, 0):
        assert torch.empty(7, 5).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert torch.get_deterministic_debug_mode() == before


def test_ceilings_are_positive_and_name_their_shapes():
    protocol = Protocol(warmup=1, repeats=3)
    found = measure_ceilings(
        [(8, 16, 4), (8, 16, 4)], dtype=torch.float32, device=CPU, protocol=protocol, copy_bytes=1 << 16
    )
    (only,) = found.matmuls
    assert (only.tokens, only.d_in, only.d_out) == (8, 16, 4)
    assert found.tflops == only.tflops > 0 and found.copy_tbps > 0
    by_arithmetic = found.floor_ms(found.tflops * 1e12, 0)
    assert by_arithmetic == pytest.approx(1e3)
    assert found.floor_ms(0, 2 * found.copy_tbps * 1e12) == pytest.approx(2e3)


def test_nothing_is_faster_than_its_ceiling(monkeypatch):
    times = {"rows": [3.0, 2.0, 9.0], "columns": [4.0, 1.0, 9.0], "copy": [5.0, 2.5, 9.0]}
    monkeypatch.setattr(ceilings, "interleaved", lambda timed, **_: {t.name: times[t.name] for t in timed})
    found = measure_ceilings([(8, 16, 4)], dtype=torch.float32, device=CPU, protocol=GPU, copy_bytes=1000)
    assert found.tflops == pytest.approx(2 * 8 * 16 * 4 / 1.0 / 1e9)
    assert found.copy_tbps == pytest.approx(2 * 1000 / 2.5 / 1e9)


def test_input_sets_on_the_cpu():
    assert input_sets(1, CPU) == 2


@pytest.mark.gpu
def test_on_a_gpu_memory_is_poisoned_rotated_and_replayed():
    device = torch.device("cuda")
    x = torch.randn(256, 256, device=device)
    square = Timed("square", lambda index: x, lambda given: given @ given)
    protocol = Protocol(warmup=3, repeats=5)
    assert len(interleaved([square], device=device, sets=1, protocol=protocol)["square"]) == 5
    replays, why_not = graph_times([square], device=device, sets=2, protocol=protocol)
    assert len(replays["square"]) == 5 and not why_not
    reader = Timed("reads", lambda index: x, lambda given: given.sum().item())
    assert "reads" in graph_times([reader], device=device, sets=1, protocol=protocol)[1]
    assert peak_bytes(lambda: torch.empty(1 << 20, device=device), device) == 4 << 20
    with poisoned(device, 64 << 20):
        assert torch.empty(1 << 20, device=device).isnan().all()
        assert torch.empty(100, device=device).isnan().all()
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    assert input_sets(1 << 20, device, most=10_000) * (1 << 20) > 2 * cache
