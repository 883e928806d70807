"""``make demo``: a language model, dense and with 80 % of its 64-blocks pruned, side by side.

Its steps run one after the other, on a machine that does other things too; so what a step takes is
measured once more at the end, of all models in turn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .finetune.comparison import Entry
from .finetune.files import CURVES, DENSE, STRIPPED, load_checkpoint
from .finetune.job import control
from .finetune.loop import Job, make_optimizer, update
from .finetune.options import Options
from .finetune.report import results_table, rows, summary
from .finetune.series import run_series
from .finetune.tasks import load_task
from .measure.progress import progress_bars
from .measure.timing import Work, measure_in_turn

FOLDER = Path("runs", "demo")
# an eighth of what is held out: all of it would take longer than the training
BLOCKS = Options(task="stdlib-lm-wide", pattern="block:64", eval_batches=2)
RUNS = (
    # what the same additional steps do without pruning: the other is to be measured against it
    Entry("dense, trained on", "dense", replace(BLOCKS, level=0.0)),
    Entry("80 % in 64x64 blocks", "blocks", BLOCKS),
)
SECONDS = 1.0  # of timed steps of a model, and of forward passes


def main() -> None:
    """Train, prune, print the table; files go to ``runs/demo``."""
    started = time.perf_counter()
    reports = run(FOLDER)
    first = next(iter(reports.values()))
    table = timed_rows(FOLDER, reports)
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary(first))
    console.print(results_table(first["metric"], table))
    console.print(
        "step: a training step at the final level, its mask update included; forward: a held-out "
        "batch under the controller. Medians of turns."
    )
    dense, sparse = (table[label]["seconds_per_step"] for label in ("dense", RUNS[-1].label))
    seconds = time.perf_counter() - started
    console.print(
        f"A sparse step is {dense / sparse:.2f}x as fast as a dense one. {FOLDER / CURVES} shows "
        f"how they got there; {seconds:.0f} s in all"
    )


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


def timed_rows(
    folder: Path, reports: Mapping[str, Mapping[str, Any]], seconds: float = SECONDS
) -> dict[str, dict[str, Any]]:
    """Return the table's rows, with times that the models took in turn.

    Args:
        folder: of ``run``'s files.
        reports: of ``run``.
        seconds: to spend on a model's training steps, and on its forward passes.
    """
    table = rows(reports)
    models = [
        trained(folder / RUNS[0].name / DENSE, reports[RUNS[0].label], sparse=False),
        *(trained(folder / run.name / STRIPPED, reports[run.label], sparse=True) for run in RUNS),
    ]
    for what, works in zip(("step", "batch"), zip(*models, strict=True), strict=True):
        timings = measure_in_turn(works, torch.device("cpu"), budget=seconds)
        for label, timing in zip(table, timings, strict=True):
            table[label] = table[label] | {f"seconds_per_{what}": timing.median}
    return table


def trained(weights: Path, report: Mapping[str, Any], *, sparse: bool) -> tuple[Work, Work]:
    """Return a training step of a model at the level it ended with, and a forward pass.

    Args:
        weights: the model's.
        report: of a run that ended with it.
        sparse: whether it is to be controlled, as in the run's last steps.
    """
    options = Options(**report["options"])
    assert options.lr is not None
    assert options.score_lr is not None
    assert options.batch_size is not None
    task = load_task(options.task)
    model = task.build()
    load_checkpoint(model, weights)
    # pruned from the first step on: the zeros that are there
    controller = control(model, replace(options, initial_level=options.level)) if sparse else None
    optimizer = make_optimizer(model, controller, options.lr, options.score_lr)
    job = Job(task, options, weights.parent, lambda *_: None, lambda: False)
    batch = task.batch(options.batch_size, options.seed, 0, 0)

    def step() -> None:
        if controller is not None:
            controller.scheduler.step()
        update(job, model, controller, optimizer, batch)

    @torch.no_grad()
    def forward() -> None:
        model(task.held_out[0][0])

    if controller is not None:
        controller.scheduler.epoch_step()
    return step, forward


if __name__ == "__main__":
    main()
