"""Work in a process of its own, for what may never return: a kernel that waits for ever on a GPU
can be ended only with the process that launched it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

ENDING = 10.0  # seconds to wait for a killed process


def start_quietly(process: Any) -> None:
    """Start a process that leaves a terminal's Ctrl-C to this one, which is to end it."""
    # it spawns the tracker of a process's resources, and lets signals through when it has
    resource_tracker.ensure_running()
    # a process has the mask of the one that starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def apart(work: Callable[..., Any], *arguments: Any, limit: float) -> Any:
    """Return what ``work`` returns in a process of its own; None if it fails, dies or takes longer
    than ``limit`` seconds, from the start of the process on.

    Args:
        work: a function of a module, which the other process imports anew.
        arguments: its own; they and the result are pickled.
        limit: seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments), daemon=True)
    start_quietly(process)
    # the other process's end alone is open then, and its death is seen
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join(ENDING)
        receiver.close()


def _send(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        found = work(*arguments)
    # whatever it is, the caller goes on without it
    except Exception:
        found = None
    # who started it may have been killed, and nobody hears it then
    with suppress(BrokenPipeError):
        sender.send(found)
