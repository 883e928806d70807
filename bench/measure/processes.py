"""Time several pieces of work in turn, each in a process of its own.

A library that patches torch at import cannot slow the others down then, and a slow minute of the
machine hits all of them alike.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ...kernels import tuning
from .apart import start_quietly
from .cases import first_line
from .timing import Timing, Work, on_gpu


def in_turn(
    subjects: Mapping[str, Callable[[], Work]],
    rounds: int,
    threads: int,
    device: torch.device | None = None,
) -> dict[str, Timing | str]:
    """Run every subject once a round, after one run each to warm up.

    Args:
        subjects: name -> a module-level function that sets up, checks its result against a
            reference, and returns the work.
        rounds: timed runs of each.
        threads: torch's threads in each process.
        device: where the work is done; a GPU tells the times itself, see ``timing.py``.

    Returns:
        By name the times; or what went wrong, in set-up, check or run, of which there is no time.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}  # connections, of a type that depends on the platform
    processes = []
    gpu = device is not None and device.type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    scratch: dict[str, int | None] = {}
    failures: dict[str, str] = {}
    try:
        for name, make in subjects.items():
            pipes[name], end = context.Pipe()
            arguments = (make, threads, device if gpu else None, end)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            start_quietly(process)
            # else a process that dies is waited for for ever
            end.close()
            processes.append(process)
            # one set-up at a time, or they would slow one another's warm-up
            _ask(name, pipes, failures)
        for _ in range(rounds):
            for name in subjects:
                if (answer := _ask(name, pipes, failures)) is not None:
                    seconds[name].append(answer[0])
                    scratch[name] = answer[1]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return {
        name: failures[name] if name in failures else Timing(tuple(times), scratch[name])
        for name, times in seconds.items()
    }


def _ask(
    name: str, pipes: Mapping[str, Any], failures: dict[str, str]
) -> tuple[float, int | None] | None:
    """Let a subject run once; None if it has failed."""
    if name in failures:
        return None
    try:
        pipes[name].send("run")
        answer = pipes[name].recv()
    except (EOFError, OSError):
        answer = "its process died"
    if isinstance(answer, str):
        failures[name] = answer
        return None
    return answer


def _serve(
    make: Callable[[], Work], threads: int, gpu: torch.device | None, pipe: Connection
) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message=tuning.IGNORED)
    try:
        pipe.recv()
        work = make()
        run = partial(_run, work) if gpu is None else partial(_run_on_gpu, on_gpu([work], gpu))
        pipe.send(run())
        while True:
            pipe.recv()
            pipe.send(run())
    except (EOFError, BrokenPipeError):
        return
    except BaseException as error:
        traceback.print_exc()
        pipe.send(first_line(error))


def _run(work: Work) -> tuple[float, int | None]:
    before = _resident("VmRSS", reset=True)
    start = time.perf_counter()
    work()
    elapsed = time.perf_counter() - start
    peak = _resident("VmHWM")
    return elapsed, None if before is None or peak is None else max(peak - before, 0)


def _run_on_gpu(run: Callable[[int], list[Timing]]) -> tuple[float, int | None]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (timing,) = run(1)
    return timing.median, torch.cuda.max_memory_allocated() - before


def _resident(field: str, *, reset: bool = False) -> int | None:
    """Read this process's resident memory in bytes; ``reset`` lets its peak start anew."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
