"""Which method and criterion leave the best model, by pattern and level, in equal steps.

``python -m triton_sparsity.bench.studies.accuracy --task minilm``. Each cell is a run of
``finetune`` from the same dense model of its seed. Those that have ended are in the record, which
is written anew after each; a study that was stopped, or is asked for more seeds, goes on from it.
Cells come by level, 80 % first, then by seed: what there is of a study can be compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from ...kernels.pattern import maximum_level
from ..finetune.files import DENSE
from ..finetune.job import finetune
from ..finetune.options import Options
from ..finetune.tasks import load_task
from ..measure.files import write_atomic
from ..measure.record import commit, dump, environment, load, results_folder
from ..measure.spelling import find_device, parse_pattern
from ..measure.tables import markdown

PATTERNS = ("unstructured", "block:16", "block:32", "block:64", "nm:2:4")
LEVELS = (0.8, 0.5, 0.7, 0.9)
# by hand: what each method changes in the task's own recipe
METHODS: dict[str, dict[str, Any]] = {
    "one-shot": {"algorithm": "const"},
    "gradual": {"algorithm": "magnitude"},
    # its masks are to move in three quarters of the training
    "RigL": {"algorithm": "rigl", "ramp": 0.75},
}
CRITERIA = {
    "one-shot": ("normed_abs", "wanda", "snip", "taylor", "obs"),
    "gradual": ("normed_abs", "wanda", "snip", "taylor", "fisher"),
    "RigL": ("abs",),
}
NAMES = (*dict.fromkeys(name for names in CRITERIA.values() for name in names),)
TASKS: dict[str, dict[str, Any]] = {
    "minilm": {"epochs": 10, "steps_per_epoch": 10, "eval_batches": 4},
    "stdlib-lm": {"epochs": 12, "steps_per_epoch": 25},
}


@dataclass(frozen=True)
class Cell:
    """One run of the study; ``method`` is of ``METHODS``, or ``"dense"``, which prunes nothing."""

    seed: int
    level: float
    pattern: str
    method: str
    importance: str


def cells(
    seeds: Sequence[int],
    levels: Sequence[float],
    patterns: Sequence[str],
    criteria: Sequence[str] = NAMES,
) -> Iterator[Cell]:
    """Yield what is to be run. Of N:M there is one level, the pattern's own, and no RigL.

    Snip and taylor score a single element alike, so taylor runs in blocks only.
    """
    for i, level in enumerate(levels):
        for seed in seeds:
            for pattern in patterns:
                is_nm = pattern.startswith("nm:")
                if is_nm and i > 0:
                    continue
                at = maximum_level(parse_pattern(pattern)) if is_nm else level
                for method, importances in CRITERIA.items():
                    if is_nm and method == "RigL":
                        continue
                    for importance in importances:
                        is_new = importance != "taylor" or pattern.startswith("block:")
                        if importance in criteria and is_new:
                            yield Cell(seed, at, pattern, method, importance)
    for seed in seeds:
        yield Cell(seed, 0.0, "unstructured", "dense", "normed_abs")


def run(cell: Cell, base: Options, work: Path) -> dict[str, Any]:
    """Train one cell; return what its stripped model reached, or that its criterion refused.

    Args:
        cell: which.
        base: options of all cells.
        work: folder that keeps the dense model of each seed.
    """
    dense = work / f"dense-{base.task}-{cell.seed}.safetensors"
    options = replace(
        base,
        **METHODS.get(cell.method, {"algorithm": "magnitude"}),
        seed=cell.seed,
        level=cell.level,
        pattern=cell.pattern,
        importance=cell.importance,
    )
    if dense.exists():
        options = replace(options, checkpoint=str(dense), dense_epochs=0)
    started = time.perf_counter()
    done = asdict(cell) | {"commit": commit()}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        try:
            report = finetune(options, Path(folder, "run"))
        except RuntimeError as error:
            # no gradient ranks a layer that has died, or a student that equals its teacher
            if not str(error).startswith(f"{cell.importance}: "):
                raise
            return done | {"metric": None, "refused": str(error)}
        if not dense.exists():
            shutil.copy(Path(folder, "run", DENSE), dense)
    result = report["results"]["stripped"]
    return done | {
        "metric": result["metric"],
        "reached": result["level"],
        "before": report["results"]["dense"]["metric"],
        "seconds": time.perf_counter() - started,
    }


def subjects(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the runs of each method and criterion, in the study's order."""
    found = {(m, c): [] for m, criteria in CRITERIA.items() for c in criteria}
    for one in runs:
        if (subject := (one["method"], one["importance"])) in found:
            found[subject].append(one)
    return {subject: those for subject, those in found.items() if those}


def dense(record: Mapping[str, Any]) -> str:
    """Return in words what the dense model reaches in the same steps."""
    values = [one["metric"] for one in record["runs"] if one["method"] == "dense"]
    return f"Dense, trained alike: {spelled(values)}." if values else ""


def tables(record: Mapping[str, Any]) -> str:
    """Return the study as Markdown: a table a level, a column a pattern, the best in bold."""
    sign = 1 if record["higher_is_better"] else -1
    parts = []
    for level in sorted({one["level"] for one in record["runs"]} - {0.0}):
        at = [one for one in record["runs"] if one["level"] == level]
        patterns = [p for p in record["patterns"] if any(one["pattern"] == p for one in at)]
        found = {
            (subject, pattern): values
            for subject, those in subjects(at).items()
            for pattern in patterns
            if (values := [one["metric"] for one in those if one["pattern"] == pattern])
        }
        means = {key: sign * mean(v) for key, v in found.items() if None not in v}
        best = {
            p: max((m for (_, q), m in means.items() if p == q), default=None) for p in patterns
        }
        rows = []
        for method, importance in subjects(at):
            row = [method, f"`{importance}`"]
            for pattern in patterns:
                key = ((method, importance), pattern)
                text = spelled(found[key]) if key in found else ""
                is_best = key in means and means[key] == best[pattern]
                row.append(f"**{text}**" if is_best else text)
            rows.append(row)
        parts += [f"{100 * level:g} %", markdown(("method:", "criterion:", *patterns), rows)]
    return "\n\n".join(parts)


def spelled(values: Sequence[float | None]) -> str:
    """Return a mean and its standard error over seeds; of one seed there is none.

    None is of a run that was refused: what the others reached is no figure to compare.
    """
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        return "refused"
    if len(reached) == 1:
        return f"{reached[0]:.3f}"
    return f"{mean(reached):.3f} ± {stdev(reached) / len(reached) ** 0.5:.3f}"


def begin(path: Path, base: Options, patterns: Sequence[str]) -> dict[str, Any]:
    """Return the record in ``path``, or a new one.

    Raises:
        ValueError: the record is of other options.
    """
    options = json.loads(json.dumps(asdict(base)))
    if not path.exists():
        task = load_task(base.task)
        facts = {name: getattr(task, name) for name in ("metric", "higher_is_better", "data")}
        place = environment(find_device(base.device), base.backend) | {"task": base.task}
        return place | facts | {"options": options, "patterns": [*patterns], "runs": []}
    record = load(path)
    # an option that came later had its default before
    known = asdict(Options()) | record["options"]
    differing = [name for name, value in options.items() if known[name] != value]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path} has {name} {known[name]!r}, got {options[name]!r}; leave the "
            "option out, or write to another file"
        )
    record["patterns"] += [p for p in patterns if p not in record["patterns"]]
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS], default="stdlib-lm")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--criteria", default=",".join(NAMES))
    parser.add_argument("--minutes", type=float, help="begin no run after that; default: no limit")
    parser.add_argument("--output", type=Path, help="record; default: in bench/results")
    parser.add_argument("--work", type=Path, default=Path("runs", "accuracy"))
    parser.add_argument("--steps-per-epoch", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--ramp", type=float, help="share of the steps in which the level rises")
    asked = parser.parse_args(arguments)
    given = {name: getattr(asked, name) for name in ("epochs", "steps_per_epoch", "ramp")}
    budget = TASKS[asked.task] | {k: v for k, v in given.items() if v is not None}
    # one thread, so that as many studies can run side by side as there are cores
    base = Options(task=asked.task, threads=1, save_every=10**6, **budget)
    path = asked.output or results_folder(find_device(base.device)) / f"accuracy-{base.task}.json"
    patterns, levels = asked.patterns.split(","), [*map(float, asked.levels.split(","))]
    criteria = asked.criteria.split(",")
    if unknown := set(criteria).difference(NAMES):
        parser.error(f"--criteria must be of {', '.join(NAMES)}, got {', '.join(unknown)}")
    try:
        for pattern in patterns:
            parse_pattern(pattern)
        record = begin(path, base, patterns)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    asked.work.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    there = {Cell(**{f: one[f] for f in Cell.__dataclass_fields__}) for one in record["runs"]}
    console, began = Console(highlight=False), time.monotonic()
    for cell in cells(range(asked.seeds), levels, patterns, criteria):
        if cell in there:
            continue
        if asked.minutes is not None and time.monotonic() - began > 60 * asked.minutes:
            print(f"{path}: stopped after {asked.minutes:g} minutes", file=sys.stderr)
            break
        record["runs"].append(run(cell, base, asked.work))
        write_atomic(path, dump(record))
        console.print(record["runs"][-1])


if __name__ == "__main__":
    main()
