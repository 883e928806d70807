"""How far long work is: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Advance = Callable[[str, int, int, str], None]
"""Told after each step: the phase, steps done, steps in all, and a note."""


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Advance]:
    """Yield what long work calls after each step: bars on a terminal's stderr, else lines.

    Args:
        quiet: neither bars nor lines.
    """
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:

        def line(phase: str, done: int, total: int, note: str) -> None:
            if done == total:
                console.print(f"{phase}: {total} steps, {note}")

        yield line
        return

    with Bars(
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as progress:
        bars: dict[str, Any] = {}

        def advance(phase: str, done: int, total: int, note: str) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(phase, note="")
            progress.update(bars[phase], completed=done, total=total, note=note)

        yield advance
