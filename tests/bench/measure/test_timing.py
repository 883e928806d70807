import time
from types import SimpleNamespace

import pytest
import torch

from triton_sparsity.bench.measure import timing
from triton_sparsity.bench.measure.timing import (
    Timing,
    measure,
    measure_in_turn,
    pool,
    profiler_overhead,
)

CPU = torch.device("cpu")


def wait(seconds):
    """Take exactly so long, whatever else the machine does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_quantiles_are_of_the_sorted_runs():
    found = Timing((5.0, 1.0, 4.0, 2.0, 3.0, 6.0))
    assert found.median == 3.5
    assert (found.quantile(0), found.quantile(0.2), found.quantile(1)) == (1, 2, 6)


def test_a_known_time_is_found_with_one_reading_of_the_clock_on_top(monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1e-7
        return now[0]

    def work():
        now[0] += 0.005

    monkeypatch.setattr(timing.time, "perf_counter", clock)
    found = measure(work, CPU, budget=0, least=9)
    assert found.seconds == pytest.approx([0.005 + 1e-7] * 9, rel=1e-9)


def test_doing_nothing_takes_less_than_two_percent_of_what_is_measured():
    # the shortest operations of a profile take some 20 microseconds
    assert measure(lambda: None, CPU, least=50).median < 0.02 * 20e-6


def test_the_profiler_moves_no_median_by_more_than_two_percent():
    # in turn with a bare loop; a machine that does other work adds noise, which is no overhead
    assert any(abs(profiler_overhead(CPU)) < 0.02 for _ in range(6))


def test_the_budget_bounds_the_runs():
    calls = []
    measure(lambda: calls.append(wait(0.001)), CPU, budget=0.02, least=2)
    assert 2 + 1 < len(calls) < 40
    calls.clear()
    found = measure(lambda: calls.append(wait(0.001)), CPU, budget=100, least=2, most=7)
    assert len(found.seconds) == 7


def test_slow_work_is_given_up_after_three_runs():
    calls = []
    found = measure(lambda: calls.append(wait(0.002)), CPU, budget=1, least=5, give_up=0.001)
    assert len(calls) == 4
    assert len(found.seconds) == 3
    assert found.median > 0.001


def test_works_are_timed_in_turn_and_their_mean_counts():
    calls = []

    def work(name, seconds):
        return lambda: calls.append((name, wait(seconds))[0])

    quick, slow = measure_in_turn(
        [work("quick", 0.001), work("slow", 0.003)], CPU, budget=0.02, least=2
    )
    assert calls == ["quick", "slow"] * (len(calls) // 2)
    assert len(quick.seconds) == len(slow.seconds) == len(calls) // 2 - 1
    # 2 ms on average, ten times within the budget
    assert 2 <= len(quick.seconds) <= 10
    assert 0.001 <= min(quick.seconds) < min(slow.seconds)


def test_passes_are_pooled():
    found = pool([Timing((1.0, 5.0), 3, 0.1), Timing((2.0,), 7, 0.3)])
    assert found == Timing((1.0, 5.0, 2.0), 7, 0.2)
    assert pool([Timing((1.0,))]) == Timing((1.0,))


class FakeGpu:
    """What ``timing`` asks of CUDA, on a clock of its own that queued work moves."""

    def __init__(self):
        self.log, self.now = [], 0.0

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace()

        def record():
            self.log.append("event")
            event.at = self.now

        event.record = record
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def work(self):
        self.log.append("work")
        self.now += 0.002


def test_a_gpu_is_flushed_and_held_busy_before_every_run(monkeypatch):
    gpu = FakeGpu()
    empty = torch.empty

    def buffer(size, dtype, device):
        assert size * dtype.itemsize == 4 * 1024
        found = SimpleNamespace(made=empty(size, dtype=dtype))
        found.zero_ = lambda: gpu.log.append("flush")
        return found

    monkeypatch.setattr(timing.torch, "empty", buffer)
    for name, value in {
        "device": lambda device: torch.no_grad(),
        "synchronize": lambda *_: gpu.log.append("wait"),
        "Event": gpu.event,
        "_sleep": lambda cycles: gpu.log.append("hold"),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = measure(gpu.work, torch.device("cuda"), budget=0.02, least=4)
    assert found.median == pytest.approx(0.002)
    assert len(found.seconds) == 10
    assert found.host < 0.002
    assert found.wall > 0
    run = ["flush", "hold", "event", "work", "event"]
    assert gpu.log == ["work", "wait", *["work"] * 3, "wait", *run * 3, "wait", *run * 7, "wait"]
