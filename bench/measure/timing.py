"""How long work takes: on a GPU by its own events, on a CPU by the clock.

On a GPU every run starts with the L2 cache overwritten, and with the device held busy until the
host has queued the run: what is timed is then the device's work, without the gaps in which it
would wait for Python. How long the host takes is kept beside it, and what a few runs in a row take
by the clock, gaps and all. The GPU's clocks are left alone.

On a CPU nothing is flushed: what a step works on was touched by the step before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], object]

HOLD_CYCLES = 2e9  # a second of any GPU's clock, or somewhat more
MAX_HOLD = 0.2  # seconds; a mask update of a whole model takes the host some 0.04
FLUSH_FACTOR = 4  # times the L2
IN_A_ROW = 3


@dataclass(frozen=True)
class Timing:
    """Times of one piece of work, in seconds.

    Attributes:
        seconds: one entry a run, in the order of the runs.
        scratch: bytes of memory beyond what it started with; None where nobody can tell.
        host: median time the host takes to queue one run on a GPU; None on a CPU.
        wall: one run of some in a row on a GPU, by the clock; None on a CPU, where all are.
    """

    seconds: tuple[float, ...]
    scratch: int | None = None
    host: float | None = None
    wall: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """Return the run at fraction ``q`` of the sorted times."""
        return sorted(self.seconds)[round(q * (len(self.seconds) - 1))]


def spread(timings: Sequence[Timing]) -> tuple[float, float]:
    """Return the p20 of the fastest and the p80 of the slowest of several timings of one work."""
    return min(t.quantile(0.2) for t in timings), max(t.quantile(0.8) for t in timings)


def pool(timings: Sequence[Timing]) -> Timing:
    """Return the runs of several timings of the same work as one timing."""
    hosts = [timing.host for timing in timings if timing.host is not None]
    scratch = [timing.scratch for timing in timings if timing.scratch is not None]
    walls = [timing.wall for timing in timings if timing.wall is not None]
    return Timing(
        tuple(second for timing in timings for second in timing.seconds),
        max(scratch, default=None),
        statistics.median(hosts) if hosts else None,
        statistics.median(walls) if walls else None,
    )


def measure(
    work: Work,
    device: torch.device,
    *,
    budget: float = 0.2,
    least: int = 5,
    most: int = 100,
    give_up: float | None = None,
) -> Timing:
    """Time ``work`` after warming up.

    Args:
        work: does the same in every call.
        device: where it runs.
        budget: seconds to spend on timed runs; the first, slow calls come on top.
        least, most: bounds of the number of timed runs, whatever the budget is.
        give_up: a time in seconds; when the first runs, at most three, are all slower, no more
            follow.
    """
    (timing,) = measure_in_turn(
        [work], device, budget=budget, least=least, most=most, give_up=give_up
    )
    return timing


def measure_in_turn(
    works: Sequence[Work],
    device: torch.device,
    *,
    budget: float = 0.2,
    least: int = 5,
    most: int = 100,
    give_up: float | None = None,
) -> list[Timing]:
    """Time several works, each once a round, so that a slow moment hits all of them alike.

    Args:
        works: as ``measure``'s.
        device: where they run.
        budget: seconds to spend on timed runs of one of them, on average.
        least, most: bounds of the number of rounds.
        give_up: as ``measure``'s, of their mean.
    """
    run = on_gpu(works, device) if device.type == "cuda" else _on_cpu(works)
    first = run(min(3, least))
    estimate = statistics.mean(min(timing.seconds) for timing in first)
    if give_up is not None and estimate > give_up:
        return first
    more = max(least, min(most, int(budget / max(estimate, 1e-9)))) - min(3, least)
    return [pool(parts) for parts in zip(first, run(more), strict=True)] if more > 0 else first


def _on_cpu(works: Sequence[Work]) -> Callable[[int], list[Timing]]:
    """Warm up; return what runs so many rounds."""
    clock = time.perf_counter
    for work in works:
        work()

    def run(rounds: int) -> list[Timing]:
        seconds = [[0.0] * rounds for _ in works]
        for i in range(rounds):
            for work, times in zip(works, seconds, strict=True):
                start = clock()
                work()
                times[i] = clock() - start
        return [Timing(tuple(times)) for times in seconds]

    return run


def on_gpu(works: Sequence[Work], device: torch.device) -> Callable[[int], list[Timing]]:
    """Warm up; return what runs so many rounds."""
    with torch.cuda.device(device):
        flush = torch.empty(FLUSH_FACTOR * l2_bytes(device) // 4, dtype=torch.int32, device=device)
        hosts, walls = [], []
        for work in works:
            # the first call compiles, the others show what the host takes
            work()
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            hosts.append(time.perf_counter() - start)
            for _ in range(IN_A_ROW - 1):
                work()
            torch.cuda.synchronize()
            walls.append((time.perf_counter() - start) / IN_A_ROW)

    def once(work: Work, host: float) -> tuple[torch.cuda.Event, torch.cuda.Event, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        _hold(min(2 * host, MAX_HOLD))
        begin.record()
        start = time.perf_counter()
        work()
        taken = time.perf_counter() - start
        end.record()
        return begin, end, taken

    def run(rounds: int) -> list[Timing]:
        with torch.cuda.device(device):
            queued = [
                [once(work, host) for work, host in zip(works, hosts, strict=True)]
                for _ in range(rounds)
            ]
            torch.cuda.synchronize()
        return [
            Timing(
                tuple(begin.elapsed_time(end) * 1e-3 for begin, end, _ in runs),
                host=statistics.median(taken for *_, taken in runs),
                wall=wall,
            )
            for runs, wall in zip(zip(*queued, strict=True), walls, strict=True)
        ]

    return run


def _hold(seconds: float) -> None:
    """Keep the device busy, so that what is queued behind starts without gaps."""
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(int(seconds * HOLD_CYCLES))


def l2_bytes(device: torch.device) -> int:
    """Return the size of a GPU's L2 cache."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 2**26


def overhead(device: torch.device) -> float:
    """Return what the measurement itself adds to a time: that of doing nothing."""
    return measure(lambda: None, device, least=20).median


def profiler_overhead(device: torch.device, pairs: int = 15) -> float:
    """Return by which part the profiler moves the median of a known product's time.

    Runs of the profiler and of a bare loop take turns, and the median of their ratios counts, so
    that a machine at work does not look like an overhead.
    """
    gpu = device.type == "cuda"
    # on a GPU so large that neither the host nor an overwritten cache matters
    side = 8192 if gpu else 512
    a = torch.randn(side, side, device=device)

    def bare() -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * gpu)]
        for event in events[:1]:
            event.record()
        start = time.perf_counter()
        for _ in range(5):
            torch.mm(a, a)
        if not gpu:
            return (time.perf_counter() - start) / 5
        events[1].record()
        torch.cuda.synchronize(device)
        return events[0].elapsed_time(events[1]) * 1e-3 / 5

    bare()
    ratios = []
    for _ in range(pairs):
        seen = measure(lambda: a @ a, device, budget=0, least=5)
        ratios.append(statistics.mean(seen.seconds) / bare())
    return statistics.median(ratios) - 1
