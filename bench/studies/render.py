"""The figures of ``docs/benchmarks.md`` and ``docs/accuracy.md``, from the records alone.

``python -m triton_sparsity.bench.studies.render`` writes them between the markers, and the picture
beside the page; ``--check`` only tells whether they are up to date.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure.charts import sweeps
from ..measure.files import write_atomic
from ..measure.record import RESULTS, ROOT, load
from ..measure.tables import faster, faster_within, markdown, percent, seconds
from .accuracy import dense, tables
from .compare import verdict
from .gpu import EFFICIENCY
from .gpu import summary as efficiencies
from .memory import table_of

START, END = "<!-- figures: start -->", "<!-- figures: end -->"
FILES = ("compare.json", "memory.json", "profile.json", "gpu.json")


def render(results: Path) -> str:
    """Return the Markdown of all records in ``results``, one section a device.

    Raises:
        ValueError, OSError: a file is no record, or cannot be read.
    """
    parts = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        records = {name: load(folder / name) for name in FILES if (folder / name).exists()}
        if not records:
            continue
        device = next(iter(records.values()))["device"]
        parts.append(f"### {device}")
        if "compare.json" in records:
            parts.extend(_compare(records["compare.json"]))
        if "memory.json" in records:
            parts.extend(_memory(records["memory.json"]))
        if "profile.json" in records:
            parts.extend(_profile(records["profile.json"], f"../bench/results/{folder.name}"))
        if "gpu.json" in records:
            parts.extend(_gpu(records["gpu.json"], f"../bench/results/{folder.name}"))
        for path in sorted(folder.glob("algorithms*.json")):
            parts.extend(_algorithms(load(path)))
    return "\n\n".join(parts or ["Nothing was recorded yet."])


def studies(results: Path) -> str:
    """Return the Markdown of all accuracy studies in ``results``.

    Raises:
        ValueError, OSError: a file is no record, or cannot be read.
    """
    parts = []
    for path in sorted(results.glob("*/accuracy-*.json")):
        record = load(path)
        better = "higher" if record["higher_is_better"] else "lower"
        options = record["options"]
        steps = round(options["epochs"] * options["steps_per_epoch"])
        commits = ", ".join(dict.fromkeys(str(one["commit"]) for one in record["runs"]))
        ramp = options["ramp"]
        rising = "" if ramp is None else f", the level reached after {round(ramp * steps)}"
        parts.append(f"### {record['task']}: {record['metric']} after {steps:,} steps{rising}")
        parts.append(f"{better.capitalize()} is better. {dense(record)} Commits {commits}.")
        parts.append(tables(record))
    return "\n\n".join(parts or ["Nothing was recorded yet."])


def picture(results: Path) -> bytes | None:
    """Draw the page's picture, of the first device whose peers were compared; None without one."""
    found = sorted(results.glob("*/compare.json"))
    return sweeps(load(found[0])) if found else None


def _made(record: Mapping[str, Any]) -> str:
    threads = f", {record['threads']} threads" if record["threads"] else ""
    return (
        f"`{record['command']}`, {record['date'][:10]}, commit {record['commit']}, torch "
        f"{record['torch']}, triton {record['triton']}{threads}."
    )


def _compare(record: Mapping[str, Any]) -> list[str]:
    """One table of all comparisons: what was measured, and how much faster than its baseline."""
    named = baselines(record["rows"])
    measured = {(row["work"], row["subject"]): row for row in record["rows"]}
    rows: list[tuple[str, ...]] = []
    skipped: dict[str, str] = {}
    last = ""
    for row in record["rows"]:
        if row["status"] == "skipped":
            skipped[row["subject"]] = row["detail"]
            continue
        baseline = named.get(row["work"])
        work = "" if row["work"] == last else row["work"]
        last = row["work"]
        if row["status"] == "failed":
            rows.append((work, row["subject"], "FAILED", "", ""))
            continue
        other = measured.get((row["work"], baseline))
        speedup = "the baseline" if other is row else ""
        if other is not None and other is not row and other["status"] == "ok":
            speedup = faster_within(*speedup_over(row, other))
        rows.append((work, row["subject"], seconds(row["median_s"]), speedup, verdict(row)))
    headings = (
        "work:", "subject:", "median", "speed-up over the work's baseline (p20 to p80)", "target:"
    )  # fmt: skip
    parts = [f"Ours and others' in turn. {_made(record)}", markdown(headings, rows)]
    if skipped:
        left_out = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        parts.append(f"Left out: {left_out}.")
    return parts


def _memory(record: Mapping[str, Any]) -> list[str]:
    """What an update of each algorithm allocates."""
    weights = record["side"] ** 2
    return [
        "Peak bytes a weight that an update of the masks allocates on a CPU, beyond what was "
        f"there; at most {record['limit']:g}. Of weights of {weights / 1e6:.1f} M and an eighth "
        f"of it. {_made(record)}",
        markdown(*table_of(record)),
    ]


def baselines(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return for each work the subject that the others' speed-ups are over.

    Records made before there were speed-ups name it where they name a target.
    """
    named: dict[str, str] = {}
    for row in rows:
        name = row.get("baseline")
        if name is None and row.get("ratio_target") is not None:
            name = row["compared_with"].removeprefix("what ").removesuffix(" adds")
        if name is not None:
            named.setdefault(row["work"], name)
    return named


def speedup_over(row: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return how many times as fast ``row`` is as ``other``, and the p20 and p80 of that.

    Of rounds in pairs, where they were recorded; else of the medians, its spread then as wide as
    those of both times allow.
    """
    if row.get("baseline") == other["subject"]:
        return row["speedup"], row["speedup_p20"], row["speedup_p80"]
    if row.get("compared_with") == other["subject"]:
        return 1 / row["ratio"], 1 / row["ratio_p80"], 1 / row["ratio_p20"]
    return (
        other["median_s"] / row["median_s"],
        other["p20_s"] / row["p80_s"],
        other["p80_s"] / row["p20_s"],
    )


def _profile(record: Mapping[str, Any], folder: str) -> list[str]:
    """What is measured at the middle level, median over the shapes."""
    levels = sorted({row["level"] for row in record["rows"]})
    level = levels[len(levels) // 2]
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    failed = 0
    for row in record["rows"]:
        failed += row["status"] == "failed"
        if row["level"] == level and row["status"] == "ok":
            found.setdefault((row["operation"], row["pattern"]), []).append(row)
    rows = []
    for (operation, pattern), mine in found.items():
        row = mine[0]
        shape = "all layers" if "," in row["shape"] else row["shape"]
        rows.append(
            (operation, pattern, shape, seconds(row["median_s"]), percent(row["of_bound"]),
             row["bound"], faster(row["speedup"]))
        )  # fmt: skip
    ceilings = record["ceilings"]
    gemm = max(ceilings["gemm"].values())
    headings = (
        "operation:", "pattern:", "tokens x in x out:", "median", "of its bound", "bound:",
        "speed-up over dense",
    )  # fmt: skip
    return [
        f"Each operation at {100 * level:g} % sparsity, against ceilings measured in the same "
        f"run: copy {ceilings['copy'] / 1e9:,.0f} GB/s, GEMM {gemm / 1e12:.3g} TFLOP/s. "
        f"{_made(record)}",
        markdown(headings, rows),
        f"All levels: [{folder}/profile.csv]({folder}/profile.csv), "
        f"[roofline]({folder}/roofline.png), [speed-up over sparsity]({folder}/speedup.png)."
        + (f" {failed} results failed their check." if failed else ""),
    ]


def _gpu(record: Mapping[str, Any], folder: str) -> list[str]:
    """Efficiency by block and product beside the targets, and the other promises."""
    rows = []
    for pattern, operation, efficiency in efficiencies(record):
        side = int(pattern.rpartition("x")[2])
        target = EFFICIENCY[operation].get(side)
        rows.append(
            (pattern, operation, f"{efficiency:.2f}", "" if target is None else f"{target:.2f}")
        )
    headings = ("pattern:", "product:", "efficiency against dense", "target")
    lines = "\n".join(f"- {line}" for line in record["lines"])
    return [
        f"Block-sparse products. {_made(record)}",
        markdown(headings, rows),
        lines,
        f"All of it: [{folder}/gpu.csv]({folder}/gpu.csv), "
        f"[roofline]({folder}/gpu-roofline.png), [speed-up]({folder}/gpu-speedup.png).",
    ]


def _algorithms(record: Mapping[str, Any]) -> list[str]:
    """What each algorithm ended at, by seed, and which is no worse than which."""
    seeds = list(next(iter(record["results"].values())))
    rows = []
    for name, by_seed in record["results"].items():
        values = [by_seed[seed]["metric"] for seed in seeds]
        level = statistics.mean(by_seed[seed]["level"] for seed in seeds)
        numbers = [f"{value:.4f}" for value in (statistics.mean(values), *values)]
        rows.append((name, *numbers, percent(level)))
    headings = ("algorithm:", "mean", *(f"seed {seed}" for seed in seeds), "sparsity")
    lines = "\n".join(
        f"- {claim['subject']} {'is no worse' if claim['holds'] else 'IS WORSE'} than "
        f"{claim['other']}: {'worse' if claim['difference'] < 0 else 'better'} by "
        f"{abs(claim['difference']):.4f}, standard error {claim['error']:.4f} of {len(seeds)} "
        "seeds."
        for claim in record["claims"]
    )
    better = "higher" if record["higher_is_better"] else "lower"
    return [
        f"{record['task']}, {record['metric']} of the stripped models ({better} is better), equal "
        f"steps. {_made(record)}",
        markdown(headings, rows),
        lines,
    ]


def insert(text: str, figures: str) -> str:
    """Return ``text`` with ``figures`` between the markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page must have {START} and {END}")
    return f"{before}{START}\n{figures}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if old")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    options = parser.parse_args(arguments)
    benchmarks = options.docs / "benchmarks.md"
    pages = {benchmarks: render, options.docs / "accuracy.md": studies}
    try:
        for page, figures in pages.items():
            text = page.read_text()
            new = insert(text, figures(options.results))
            if options.check and new != text:
                sys.exit(f"{page}: its figures are not up to date")
            if new != text:
                write_atomic(page, new.encode())
        if not options.check and (drawn := picture(options.results)) is not None:
            write_atomic(benchmarks.with_suffix(".png"), drawn)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
