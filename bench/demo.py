"""``make demo``: a dense language model, and 80 % of it pruned in two patterns, side by side."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .finetune.files import CURVES
from .finetune.options import Options
from .finetune.report import results_table, rows, summary
from .finetune.series import Entry, run_series
from .measure.progress import progress_bars

FOLDER = Path("runs", "demo")
RUNS = (
    # what the same additional steps do without pruning: the others are to be measured against it
    Entry("dense, trained on", "dense", Options(level=0.0)),
    Entry("80 % unstructured", "unstructured", Options(pattern="unstructured")),
    Entry("80 % 16x16 blocks", "blocks", Options(pattern="block:16x16")),
)


def main() -> None:
    """Train, prune, print the table; files go to ``runs/demo``."""
    started = time.perf_counter()
    reports = run(FOLDER)
    first = next(iter(reports.values()))
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary(first))
    console.print(results_table(first["metric"], rows(reports)))
    seconds = time.perf_counter() - started
    console.print(f"{FOLDER / CURVES} shows how they got there; {seconds:.0f} s in all")


def run(folder: Path, changes: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Train the dense model in the first run and go on from it in the others.

    Args:
        folder: gets what ``run_series`` writes.
        changes: options to change in every run.

    Returns:
        The reports by the model's name.
    """
    entries = [entry._replace(options=replace(entry.options, **(changes or {}))) for entry in RUNS]
    with progress_bars(quiet=False) as progress:
        return run_series(entries, folder, force=True, progress=progress)


if __name__ == "__main__":
    main()
