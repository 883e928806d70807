"""How many bytes work allocates on a CPU: the most at a time, and the largest of them."""

from __future__ import annotations

import gc
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.autograd.profiler import profile, record_function


class Allocated(NamedTuple):
    """What torch's allocator gave out in a while, in bytes, beyond what there was before.

    Attributes:
        peak: the most at a time.
        largest: the largest tensor.
    """

    peak: int
    largest: int


class Session:
    """What was allocated while ``allocations`` was open; known once it is closed."""

    def __init__(self) -> None:
        self._changes: list[tuple[int, int]] = []  # when, and by how many bytes
        self._spans: dict[str, list[tuple[int, int]]] = {}

    def __call__(self) -> Allocated:
        """Return what was allocated in all."""
        return _allocated(self._changes)

    def inside(self, name: str) -> list[Allocated]:
        """Return what was allocated in each ``span(name)``, in the order of time."""
        times = [time for time, _ in self._changes]
        return [
            _allocated(self._changes[bisect_left(times, begin) : bisect_right(times, end)])
            for begin, end in sorted(self._spans.get(name, []))
        ]


def _allocated(changes: Sequence[tuple[int, int]]) -> Allocated:
    now = peak = largest = 0
    for _, size in changes:
        now += size
        peak, largest = max(peak, now), max(largest, size)
    return Allocated(peak, largest)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Mark a time of which a session is asked."""
    with record_function(name):
        yield


@contextmanager
def allocations() -> Iterator[Session]:
    """Count every byte that torch's allocator gives out on the CPU, inside operators too, while
    the context is open: the same at every run. What numpy takes is not seen.
    """
    gc.collect()
    session, collects = Session(), gc.isenabled()
    gc.disable()  # what it gave back of earlier work would hide what this has got
    try:
        with profile(profile_memory=True) as profiler:
            yield session
    finally:
        if collects:
            gc.enable()
    recorder: Any = profiler
    for event in recorder.kineto_results.events():
        if event.name() == "[memory]":
            session._changes.append((event.start_ns(), event.nbytes()))
        elif event.is_user_annotation():
            begin, length = event.start_ns(), event.duration_ns()
            session._spans.setdefault(event.name(), []).append((begin, begin + length))
    session._changes.sort(key=lambda change: change[0])
