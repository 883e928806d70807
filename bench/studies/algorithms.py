"""Which algorithm ends better: ours and NNCF's on the same data, seeds, steps and dense baselines.

``python -m triton_sparsity.bench.studies.algorithms``. For each seed one dense language model of
Python's source is trained, and every subject fine-tunes it to the same level in the same loop.
NNCF is left out, with the reason, where it is not installed.

Of two subjects the first is no worse if the mean over the seeds of the paired differences is in
its favour, or within one standard error of zero.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ...controller.config.schedule import PolynomialSchedule
from ..finetune.files import DENSE, load_checkpoint
from ..finetune.job import finetune, start
from ..finetune.loop import Job, evaluate, train
from ..finetune.options import Options, checked, with_defaults
from ..finetune.sparsity import schedule
from ..finetune.tasks import load_task
from ..measure.files import write_atomic
from ..measure.progress import Advance, progress_bars
from ..measure.record import environment
from ..measure.spelling import find_device
from ..peers import nncf

SUBJECTS: dict[str, dict[str, Any]] = {
    "magnitude": {"algorithm": "magnitude"},
    "RigL": {"algorithm": "rigl", "initial_masks": "random"},
    "RigL normed": {
        "algorithm": "rigl",
        "initial_masks": "random",
        "growth": "normed_gradient",
    },
    "SET": {"algorithm": "set", "initial_masks": "random"},
    # masks that are drawn in the same way and stay
    "random static": {"algorithm": "set", "initial_masks": "random", "alpha": 0.0},
    "const": {"algorithm": "const"},
}
PEER = "NNCF magnitude"
# what starts sparse may take another pattern than NNCF's only one
REGROWTH = ("RigL", "RigL normed", "SET", "random static")
# the first is to be no worse than the second
CLAIMS = (("magnitude", PEER), ("RigL", "SET"), ("SET", "random static"))


@dataclass(frozen=True)
class Verdict:
    """Whether ``subject`` is no worse than ``other``, over the seeds.

    Attributes:
        difference: mean of its metric minus the other's, turned so that positive is better.
        error: standard error of that mean; 0 for one seed.
    """

    subject: str
    other: str
    difference: float
    error: float

    @property
    def holds(self) -> bool:
        return self.difference >= -self.error


def judge(
    results: Mapping[str, Mapping[int, Mapping[str, float]]], *, higher_is_better: bool
) -> list[Verdict]:
    """Hold the results against what is claimed; a claim with an absent subject is left out.

    Args:
        results: subject -> seed -> stripped model's result.
        higher_is_better: which way the metric improves.
    """
    verdicts = []
    for subject, other in CLAIMS:
        if subject not in results or other not in results:
            continue
        sign = 1 if higher_is_better else -1
        differences = [
            sign * (results[subject][seed]["metric"] - results[other][seed]["metric"])
            for seed in results[subject]
        ]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        error = spread / len(differences) ** 0.5
        verdicts.append(Verdict(subject, other, statistics.mean(differences), error))
    return verdicts


def run(
    base: Options,
    changes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    progress: Advance,
) -> tuple[dict[str, dict[int, dict[str, float]]], dict[str, Any]]:
    """Train all subjects with every seed.

    Args:
        base: options of all runs.
        changes: subject, of ``SUBJECTS`` or ``PEER`` -> what it changes in them.
        seeds: of weights, data order and masks.
        progress: as ``finetune``'s.

    Returns:
        Subject -> seed -> what its stripped model reached; and a description of the runs.
    """
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in changes}
    description: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            options = replace(base, seed=seed)
            dense: Path | None = None
            for name in changes:
                if dense is not None:
                    options = replace(options, checkpoint=str(dense), dense_epochs=0)

                def advance(
                    phase: str, done: int, total: int, note: str, who: str = f"{name} {seed}"
                ) -> None:
                    progress(f"dense {who[-1]}" if phase == "dense" else who, done, total, note)

                where = Path(folder, f"{name}-{seed}")
                if name == PEER:
                    results[name][seed] = train_peer(options, where, advance)
                    continue
                report = finetune(replace(options, **changes[name]), where, progress=advance)
                results[name][seed] = report["results"]["stripped"]
                description = report
                dense = dense or where / DENSE
    return results, description


def train_peer(options: Options, folder: Path, progress: Advance) -> dict[str, float]:
    """Drive NNCF's controller by the loop that drives ours; return what its model reached."""
    task = load_task(options.task)
    options = with_defaults(checked(options), task.recipe)
    assert options.checkpoint is not None
    assert options.batch_size is not None
    torch.manual_seed(options.seed)
    model = task.build()
    load_checkpoint(model, Path(options.checkpoint))
    targets = [n for n, m in model.named_modules() if n.startswith("layers") and is_linear(m)]
    job = Job(task, options, folder, progress, lambda: False)
    state = start(job, model) | {"phase": "sparse"}
    ramp = schedule(options)
    assert isinstance(ramp, PolynomialSchedule)
    length = task.held_out[0][0].shape[1]
    controller, compressed, strip = nncf.gradual_magnitude(
        model, (options.batch_size, length), ramp, r".*layers.*"
    )
    train(job, compressed, controller, state)
    compressed.eval()
    stripped = copy.deepcopy(task.build())
    weights = strip().state_dict()
    # NNCF's modules keep the names
    stripped.load_state_dict({name: weights[name] for name in stripped.state_dict()})
    pruned = [stripped.get_parameter(f"{name}.weight") for name in targets]
    zeros = sum(int((weight == 0).sum()) for weight in pruned)
    level = zeros / sum(weight.numel() for weight in pruned)
    return evaluate(job, stripped) | {"level": level}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def draw(
    metric: str,
    results: Mapping[str, Mapping[int, Mapping[str, float]]],
    verdicts: Sequence[Verdict],
) -> tuple[Table, Table]:
    """Return a table of the results and one of the claims."""
    seeds = list(next(iter(results.values())))
    table = Table(title=f"{metric} of the stripped models", title_justify="left")
    for heading in ("", "mean", *(f"seed {seed}" for seed in seeds), "level"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, by_seed in results.items():
        values = [by_seed[seed]["metric"] for seed in seeds]
        level = statistics.mean(by_seed[seed]["level"] for seed in seeds)
        numbers = (f"{value:.4f}" for value in values)
        table.add_row(name, f"{statistics.mean(values):.4f}", *numbers, f"{100 * level:.2f} %")
    claims = Table(title="No worse than, over the seeds", title_justify="left")
    for heading in ("", "than", "better by", "standard error", ""):
        claims.add_column(
            heading, justify="right" if heading.endswith(("by", "error")) else "left"
        )
    for verdict in verdicts:
        claims.add_row(
            verdict.subject,
            verdict.other,
            f"{verdict.difference:.4f}",
            f"{verdict.error:.4f}",
            "holds" if verdict.holds else "MISSED",
        )
    return table, claims


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison that the arguments ask for and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--level", type=float, default=0.8)
    parser.add_argument(
        "--regrowth-pattern",
        default="unstructured",
        help="of RigL, SET and random static (default unstructured, as the others)",
    )
    parser.add_argument("--alpha", type=float, default=0.3, help="of RigL and SET")
    parser.add_argument("--delta-t", type=int, help="of RigL and SET; default: ramp / 20")
    parser.add_argument("--dense-epochs", type=int, help="default: the task's")
    parser.add_argument("--epochs", type=int, help="default: the task's")
    parser.add_argument("--steps-per-epoch", type=int, help="default: the task's")
    parser.add_argument("--eval-batches", type=int, help="default: all that is held out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", help="subjects, by commas", default=None)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    asked = parser.parse_args(arguments)
    subjects = [*SUBJECTS]
    reason = nncf.available()
    if reason is None:
        subjects.insert(1, PEER)
    else:
        print(f"NNCF is left out: {reason}", file=sys.stderr)
    if asked.only:
        subjects = [name for name in subjects if name in asked.only.split(",")]
    changes = {name: dict(SUBJECTS.get(name, {})) for name in subjects}
    for name in changes:
        if name in REGROWTH:
            changes[name] = {
                "pattern": asked.regrowth_pattern,
                "delta_t": asked.delta_t,
                "alpha": asked.alpha,
            } | changes[name]
    base = Options(
        pattern="unstructured",
        level=asked.level,
        dense_epochs=asked.dense_epochs,
        epochs=asked.epochs,
        steps_per_epoch=asked.steps_per_epoch,
        eval_batches=asked.eval_batches,
        threads=asked.threads,
        save_every=10**6,
    )
    with progress_bars(quiet=False) as progress:
        results, report = run(base, changes, range(asked.seeds), progress)
    verdicts = judge(results, higher_is_better=report["higher_is_better"])
    console = Console()
    for table in draw(report["metric"], results, verdicts):
        console.print(table)
    if asked.json:
        content = environment(find_device(base.device), report["backend"]) | {
            **{key: report[key] for key in ("task", "metric", "higher_is_better", "data")},
            "options": asdict(replace(base, seed=0)),
            "changes": changes,
            "results": results,
            "claims": [asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts],
        }
        write_atomic(Path(asked.json), json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    main()
