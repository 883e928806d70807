"""How long work takes: on a GPU by its own events, on a CPU by the clock.

On a GPU every run starts with the L2 cache overwritten, and with the device held busy until the
host has queued the run: what is timed is then the device's work, without the gaps in which it
would wait for Python. How long the host takes is kept beside it. Clocks are left alone.

On a CPU nothing is flushed: what a step works on was touched by the step before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Work = Callable[[], object]

HOLD_CYCLES = 2e9  # a second of any GPU's clock, or somewhat more
MAX_HOLD = 0.02  # seconds
FLUSH_FACTOR = 4  # times the L2


@dataclass(frozen=True)
class Timing:
    """Times of one piece of work, in seconds.

    Attributes:
        seconds: one entry a run, in the order of the runs.
        scratch: bytes of memory beyond what it started with; None where nobody can tell.
        host: median time the host takes to queue one run on a GPU; None on a CPU.
    """

    seconds: tuple[float, ...]
    scratch: int | None = None
    host: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """Return the run at fraction ``q`` of the sorted times."""
        return sorted(self.seconds)[round(q * (len(self.seconds) - 1))]


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
        give_up: a time in seconds; when the first three runs are all slower, no more follow.
    """
    if device.type == "cuda":
        return _measure_cuda(work, device, budget, least, most, give_up)
    return _measure_cpu(work, budget, least, most, give_up)


def _runs(estimate: float, budget: float, least: int, most: int, give_up: float | None) -> int:
    if give_up is not None and estimate > give_up:
        return 0
    return max(least, min(most, int(budget / max(estimate, 1e-9))))


def _measure_cpu(
    work: Work, budget: float, least: int, most: int, give_up: float | None
) -> Timing:
    clock = time.perf_counter
    work()

    def timed(count: int) -> list[float]:
        seconds = [0.0] * count
        for i in range(count):
            start = clock()
            work()
            seconds[i] = clock() - start
        return seconds

    first = timed(min(3, least))
    return Timing(tuple(timed(_runs(min(first), budget, least, most, give_up)) or first))


def _measure_cuda(
    work: Work,
    device: torch.device,
    budget: float,
    least: int,
    most: int,
    give_up: float | None,
) -> Timing:
    with torch.cuda.device(device):
        size = FLUSH_FACTOR * l2_bytes(device)
        flush = torch.empty(size // 4, dtype=torch.int32, device=device)
        # the first call compiles, the second shows what the host takes
        work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        torch.cuda.synchronize()

        def timed(count: int) -> tuple[list[float], list[float]]:
            events, hosts = [], []
            for _ in range(count):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                _hold(min(2 * host, MAX_HOLD))
                begin.record()
                start = time.perf_counter()
                work()
                hosts.append(time.perf_counter() - start)
                end.record()
                events.append((begin, end))
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) * 1e-3 for begin, end in events], hosts

        first, hosts = timed(3)
        host = min(hosts)
        count = _runs(min(first), budget, least, most, give_up)
        seconds, hosts = timed(count) if count else (first, hosts)
    return Timing(tuple(seconds), host=statistics.median(hosts))


def _hold(seconds: float) -> None:
    """Keep the device busy, so that what is queued behind starts without gaps."""
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(int(seconds * HOLD_CYCLES))


def l2_bytes(device: torch.device) -> int:
    """Return the size of a GPU's L2 cache."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 2**26
