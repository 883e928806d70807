"""Several runs from one dense baseline: the first trains it, the others go on from it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..measure.files import write_atomic
from ..measure.progress import Advance
from .curves import curves, metric_over_level
from .files import CURVES, DENSE, LEVELS, REPORT
from .job import finetune
from .options import ALGORITHMS, Options, checked


class Entry(NamedTuple):
    """One run of a series: how it is called, its folder's name, what it does."""

    label: str
    name: str
    options: Options


def run_series(
    entries: Sequence[Entry],
    folder: Path,
    *,
    given: Collection[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Advance = lambda phase, done, total, note: None,
) -> dict[str, dict[str, Any]]:
    """Train each entry on the same data, with the same seed and budget, from one dense model.

    Args:
        entries: with the same options but for what is compared.
        folder: gets a folder a run, ``curves.png``, ``levels.png`` and ``report.json`` of them
            all.
        given, resume, force: as ``finetune``'s.
        progress: called after each step with phase or label, steps done, steps in all, and a note.

    Returns:
        The reports by label.

    Raises:
        ValueError, OSError, KeyboardInterrupt: as ``finetune``.
    """
    for entry in entries:
        # what is wrong with the last is to fail now, not after the others
        checked(entry.options)
    reports: dict[str, dict[str, Any]] = {}
    dense: Path | None = None
    for label, name, options in entries:
        if dense is not None:
            options = replace(options, checkpoint=str(dense), dense_epochs=0)

        def advance(phase: str, done: int, total: int, note: str, label: str = label) -> None:
            progress("dense" if phase == "dense" else label, done, total, note)

        reports[label] = finetune(
            options, folder / name, given=given, resume=resume, force=force, progress=advance
        )
        dense = dense or folder / name / DENSE
    write_atomic(folder / CURVES, curves(reports))
    write_atomic(folder / LEVELS, metric_over_level(reports))
    write_atomic(folder / REPORT, json.dumps(reports, allow_nan=False).encode())
    return reports


def comparison(
    options: Options, algorithms: Sequence[str], levels: Sequence[float | None]
) -> list[Entry]:
    """Return the runs that compare ``algorithms`` at each of ``levels``.

    Raises:
        ValueError: an algorithm is unknown or there twice, or there is none.
    """
    if not algorithms or len(set(algorithms)) < len(algorithms):
        raise ValueError(f"compare must name algorithms, each once, got {','.join(algorithms)!r}")
    for algorithm in algorithms:
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"compare must name some of {', '.join(ALGORITHMS)}, got {algorithm!r}"
            )
    entries = []
    for algorithm in algorithms:
        entries += [
            Entry(
                algorithm
                if level is None or len(levels) == 1
                else f"{algorithm} {100 * level:g} %",
                algorithm if level is None or len(levels) == 1 else f"{algorithm}-{level:g}",
                replace(options, algorithm=algorithm, level=level),
            )
            for level in levels
        ]
    return entries
