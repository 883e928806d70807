"""Several runs from one dense baseline: the first trains it, the others go on from it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..measure.files import digest, only_writer, write_atomic
from ..measure.progress import Advance
from .comparison import Entry
from .curves import curves, metric_over_level
from .files import CURVES, DENSE, LEVELS, REPORT
from .job import finetune
from .options import checked


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
    with only_writer(folder):
        for label, name, options in entries:
            if dense is not None:
                first = next(iter(reports.values()))
                if digest(dense) != first["results"]["dense"]["sha256"]:
                    raise ValueError(
                        f"{dense} is damaged: its SHA-256 is not the one of when it was written"
                    )
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
