"""``make demo``: a dense language model, and 80 % of it pruned in two patterns, side by side."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .files import CURVES, DENSE, REPORT, write_atomic
from .finetune import finetune
from .options import Options
from .report import curves, progress_bars, results_table, summary

FOLDER = Path("runs", "demo")
RUNS = (
    # what the same additional steps do without pruning: the others are to be measured against it
    ("dense, trained on", "dense", Options(level=0.0)),
    ("80 % unstructured", "unstructured", Options(pattern="unstructured")),
    ("80 % 16x16 blocks", "blocks", Options(pattern="block:16x16")),
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
        folder: gets a folder a run, and ``curves.png`` and ``report.json`` of them all.
        changes: options to change in every run.

    Returns:
        The reports by the model's name.
    """
    reports: dict[str, dict[str, Any]] = {}
    dense: Path | None = None
    with progress_bars(quiet=False) as progress:
        for label, name, options in RUNS:
            given = {"checkpoint": str(dense), "dense_epochs": 0} if dense else {}
            options = replace(options, **(changes or {}) | given)

            def advance(phase: str, done: int, total: int, note: str, label: str = label) -> None:
                progress("dense" if phase == "dense" else label, done, total, note)

            reports[label] = finetune(options, folder / name, force=True, progress=advance)
            dense = dense or folder / name / DENSE
    write_atomic(folder / CURVES, curves(reports))
    write_atomic(folder / REPORT, json.dumps(reports, allow_nan=False).encode())
    return reports


def rows(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the table's rows: the dense baseline, and of each run what was stripped."""
    first = next(iter(reports.values()))
    table = {"dense": first["results"]["dense"]}
    for label, report in reports.items():
        results = report["results"]
        step = {"seconds_per_step": results["sparse"]["seconds_per_step"]}
        table[label] = results["stripped"] | step
    return table


if __name__ == "__main__":
    main()
