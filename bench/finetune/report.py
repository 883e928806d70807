"""What a run prints of its report: lines and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..measure.tables import where
from .files import CURVES, LEVELS, REPORT


def summary(report: Mapping[str, Any]) -> str:
    """Return one line on what ran where."""
    options = report["options"]
    return (
        f"{report['task']} on {report['device']}, backend {report['backend']}, "
        f"{options['dtype']}, {options['threads']} threads, seed {options['seed']}"
    )


def print_report(report: Mapping[str, Any], folder: Path) -> None:
    """Print what was done and, for the dense, sparse and stripped model, what came of it."""
    options = report["options"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary(report))
    scheduled = f"level {options['level']} by {options['schedule']} schedule"
    how = {
        "magnitude": scheduled,
        "rb": scheduled,
        "const": "the masks it started with",
        "movement": f"regularization {options['regularization']}"
        if options["level"] is None
        else scheduled,
    }
    algorithm = options["algorithm"]
    console.print(
        f"{algorithm}, pattern {options['pattern']}, "
        + how.get(algorithm, f"level {options['level']} from the start")
    )
    console.print(results_table(report["metric"], report["results"]))
    _print_paths(console, report)
    console.print(f"{folder}: {', '.join(report['files'].values())}")


def print_pretrained(report: Mapping[str, Any], folder: Path) -> None:
    """Print what was done to a model of the user's own, and what came of it."""
    recipe, data = report["recipe"], report["data"]
    console = Console(highlight=False, soft_wrap=True)
    guessed = ", guessed from its architecture" if report["guessed"] else ""
    console.print(f"{report['model']}, {report['objective']}{guessed}; {where(report)}")
    target = "" if recipe["level"] is None else f", level {recipe['level']}"
    console.print(f"{recipe['algorithm']}, pattern {recipe['pattern']}{target}")
    console.print(
        f"{data['train']} {data['examples']}; held out {data['held_out']}: {data['split']}"
    )
    console.print(results_table(report["metric"], report["results"]))
    _print_paths(console, report)
    console.print(f"{folder}: {', '.join(report['files'].values())}, {REPORT}")


def _print_paths(console: Console, report: Mapping[str, Any]) -> None:
    paths = Counter(layer["path"] for layer in report["layers"])
    layers = ", ".join(f"{count} {path}" for path, count in paths.most_common())
    console.print(f"products of the {len(report['layers'])} sparse layers: {layers}")


def print_comparison(reports: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Print a table of the stripped models that several runs ended with."""
    console = Console(highlight=False, soft_wrap=True)
    first = next(iter(reports.values()))
    console.print(summary(first))
    console.print(results_table(first["metric"], rows(reports)))
    console.print(f"{folder}: {LEVELS}, {CURVES}, {REPORT}, and a folder a run")


def rows(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a table's rows: the dense baseline, and of each run what was stripped."""
    first = next(iter(reports.values()))
    table = {"dense": first["results"]["dense"]}
    for label, report in reports.items():
        results = report["results"]
        step = {"seconds_per_step": results["sparse"]["seconds_per_step"]}
        table[label] = results["stripped"] | step
    return table


def results_table(metric: str, results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of one row a model: a training step's time, a held-out batch's, and the size.

    Args:
        metric: its name.
        results: by the model's name; a time or size that was not measured is absent or None.
    """
    table = Table()
    table.add_column("model", no_wrap=True)
    for title in (metric, "level", "step", "forward", "deflated"):
        table.add_column(title, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['metric']:.4f}",
            f"{100 * result['level']:.1f} %",
            _milliseconds(result.get("seconds_per_step")),
            _milliseconds(result["seconds_per_batch"]),
            f"{result['compressed_bytes'] / 2**20:.2f} MiB"
            if "compressed_bytes" in result
            else "",
        )
    return table


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f} ms"
