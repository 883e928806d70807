"""Time several pieces of work in turn, each in a process of its own.

A library that patches torch at import cannot slow the others down then, and a slow minute of the
machine hits all of them alike.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .timing import Timing, Work


def in_turn(
    subjects: Mapping[str, Callable[[], Work]], rounds: int, threads: int
) -> dict[str, Timing]:
    """Run every subject once a round, after one run each to warm up.

    Args:
        subjects: name -> a module-level function that sets up, checks its result against a
            reference, and returns the work.
        rounds: timed runs of each.
        threads: torch's threads in each process.

    Raises:
        RuntimeError: a subject failed, in its set-up or its check; its traceback is in the
            message.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, make in subjects.items():
            pipes[name], end = context.Pipe()
            process = context.Process(target=_serve, args=(make, threads, end), daemon=True)
            process.start()
            processes.append(process)
            # one set-up at a time, or they would slow one another's warm-up
            _ask(name, pipes[name], "warm up")
        seconds: dict[str, list[float]] = {name: [] for name in subjects}
        scratch: dict[str, int | None] = {}
        for _ in range(rounds):
            for name, pipe in pipes.items():
                elapsed, scratch[name] = _ask(name, pipe, "run")
                seconds[name].append(elapsed)
        return {name: Timing(tuple(seconds[name]), scratch[name]) for name in subjects}
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _ask(name: str, pipe: Connection, request: str) -> tuple[float, int | None]:
    pipe.send(request)
    answer = pipe.recv()
    if isinstance(answer, str):
        raise RuntimeError(f"{name}: {answer}")
    return answer


def _serve(make: Callable[[], Work], threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        work = None
        while True:
            pipe.recv()
            if work is None:
                work = make()
            pipe.send(_run(work))
    except EOFError:
        return
    except BaseException:
        pipe.send(traceback.format_exc())


def _run(work: Work) -> tuple[float, int | None]:
    before = _resident("VmRSS", reset=True)
    start = time.perf_counter()
    work()
    elapsed = time.perf_counter() - start
    peak = _resident("VmHWM")
    return elapsed, None if before is None or peak is None else max(peak - before, 0)


def _resident(field: str, *, reset: bool = False) -> int | None:
    """Read this process's resident memory in bytes; ``reset`` lets its peak start anew."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
