"""Ours and the peers' on the same work, in turn: mask update, thresholds, products, training step,
evaluation, strip.

``python -m triton_sparsity.bench.studies.compare``. Every subject checks its own result before it
is timed, in a process of its own; what is wrong has no time. Peers that are not installed are
named with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ...kernels import tuning
from ...kernels.pattern import Block, Unstructured
from ..measure.files import claim_folder, write_atomic
from ..measure.processes import in_turn
from ..measure.record import dump, environment, results_folder
from ..measure.spelling import find_device
from ..measure.tables import console, faster, faster_within, percent, seconds, table
from ..measure.timing import Timing, Work
from ..peers import blksprs, dense, nncf, semi_structured, stk, thresholds
from .products import dense_layer, our_layer, our_product, peer_product
from .setup import BLOCK, CPU, GPU, LAYERS, TRIAL, Place
from .subjects import (
    dense_evaluation,
    dense_step,
    nncf_global_update,
    nncf_learning_step,
    nncf_step,
    nncf_strip,
    our_block_update,
    our_evaluation,
    our_global_update,
    our_learning_step,
    our_step,
    our_strip,
    our_threshold,
    their_threshold,
    torch_global_update,
    torch_step,
    weight_norm_update,
)

NO_SLOWER = 1 / 1.05  # but for the noise of a machine


@dataclass(frozen=True)
class Comparison:
    """Subjects that do the same work.

    Attributes:
        title: what the work is.
        subjects: name -> set-up, or why it cannot be measured.
        baselines: names of what all others' speed-ups are over: the first that was measured.
        targets: name -> the least speed-up over the first of ``baselines`` that is acceptable.
        shares: name -> the largest acceptable share of what the first of ``baselines`` adds to
            ``beyond``'s time.
        beyond: see ``shares``.
        weights: number of weights, for scratch memory a weight; 0 where it does not matter.
        rounds: timed runs of each.
    """

    title: str
    subjects: Mapping[str, Callable[[], Work] | str]
    baselines: tuple[str, ...] = ()
    targets: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    beyond: str = ""
    weights: int = 0
    rounds: int = 15


def layers(place: Place, block: Block, backward: bool, gain: float) -> Comparison:
    """Return a block-sparse linear at several levels against the dense one.

    Args:
        place: where and how large.
        block: its pattern.
        backward: with both gradients.
        gain: what must be reached at 90 %; at no level may it be slower.
    """
    targets = {**dict.fromkeys((0.0, 0.05, 0.15, 0.3, 0.5), NO_SLOWER), 0.9: gain}
    names = {level: f"ours, {100 * level:.0f} % pruned" for level in targets}
    subjects: dict[str, Callable[[], Work] | str] = {
        "dense": partial(dense_layer, place, block, backward)
    }
    for level, name in names.items():
        subjects[name] = partial(our_layer, place, block, level, backward)
    what = "forward and backward" if backward else "forward"
    return Comparison(
        f"Block-sparse linear, {what}: {place.batches[0]} tokens, {place.width} x {place.width} "
        f"weight, {block.rows} x {block.cols} blocks",
        subjects,
        ("dense",),
        {names[level]: least for level, least in targets.items()},
    )


def products(place: Place, block: Block) -> Comparison:
    """Return the forward products of one layer; a peer that cannot be run is a reason."""
    sides = (block.rows, block.cols)
    reasons = {
        "dense": None,
        "dense, compiled": dense.compiler(place.kind),
        "torch BSR": None,
        "STK": stk.available(place.kind, sides),
        "blksprs": blksprs.available(place.kind, sides),
        "2:4 by cuSPARSELt": semi_structured.available(place.kind),
    }
    ours = f"ours, {block.rows}x{block.cols} blocks"
    subjects: dict[str, Callable[[], Work] | str] = {ours: partial(our_product, place, block)}
    for name, reason in reasons.items():
        subjects[name] = reason or partial(peer_product, place, block, name)
    width = place.width
    return Comparison(
        f"Forward product: {place.batches[0]} tokens, {width} x {width} weight, "
        f"{block.rows} x {block.cols} blocks, 80 % pruned (2:4: 50 %)",
        subjects,
        ("dense",),
        {ours: 1.0},
    )


def comparisons(place: Place) -> list[Comparison]:
    """List the work and the speed-ups that the project must reach."""
    reason = nncf.available()
    if place.device != "cpu":
        reason = reason or "NNCF's sparsity is compared on the CPU"
    large, small = place.batches
    width = place.width

    def by_nncf(make: Callable[..., Work], *arguments: Any) -> Callable[[], Work] | str:
        return reason or partial(make, place, *arguments)

    def steps(tokens: int, baselines: tuple[str, ...], *least: float) -> Comparison:
        return Comparison(
            f"Training step: {LAYERS} x Linear({width}), batch {tokens}, 80 % pruned",
            {
                "dense": partial(dense_step, place, tokens),
                "ours, unstructured": partial(our_step, place, Unstructured(), tokens),
                "ours, 32x32 blocks": partial(our_step, place, BLOCK, tokens),
                "NNCF": by_nncf(nncf_step, tokens),
                "torch.nn.utils.prune": partial(torch_step, place, tokens),
            },
            baselines,
            dict(zip(("ours, unstructured", "ours, 32x32 blocks"), least, strict=True)),
        )

    rows, cols = place.big
    return [
        Comparison(
            f"Mask update: {place.layers} weights {width} x {width}, unstructured, one pool",
            {
                "ours": partial(our_global_update, place),
                "NNCF": by_nncf(nncf_global_update),
                "torch.nn.utils.prune": partial(torch_global_update, place),
            },
            ("NNCF", "torch.nn.utils.prune"),
            {"ours": 25.0},
            weights=place.layers * width**2,
            rounds=3,
        ),
        Comparison(
            f"Mask update: one {rows} x {cols} weight, 32 x 32 blocks",
            {
                "ours": partial(our_block_update, place),
                "WeightNormSparsifier": partial(weight_norm_update, place),
            },
            ("WeightNormSparsifier",),
            {"ours": 25.0},
            weights=rows * cols,
            rounds=7,
        ),
        Comparison(
            f"Threshold: the 80th percentile of {4 * width**2 / 1e6:.1f} M magnitudes",
            {
                "ours": partial(our_threshold, place),
                "torch.sort": partial(their_threshold, place, thresholds.by_sort),
                "torch.topk": partial(their_threshold, place, thresholds.by_topk),
                "torch.kthvalue": partial(their_threshold, place, thresholds.by_kthvalue),
            },
            ("torch.kthvalue",),
            {"ours": 1.0},
            weights=4 * width**2,
            rounds=3,
        ),
        *(products(place, Block(side, side)) for side in (32, 128)),
        layers(place, Block(64, 64), False, 2.0),
        layers(place, Block(64, 64), True, 1.7),
        steps(large, ("dense",), 1 / 1.15, NO_SLOWER),
        steps(small, ("NNCF", "dense"), 1.0, 1.0),
        *(
            Comparison(
                f"Training step: {LAYERS} x Linear({width}), batch {small}, {algorithm}",
                {
                    "dense": partial(dense_step, place, small),
                    **{
                        f"ours, {name}": partial(our_learning_step, place, algorithm, p, small)
                        for name, p in (("unstructured", Unstructured()), ("32x32 blocks", BLOCK))
                    },
                    "NNCF": by_nncf(nncf_learning_step, algorithm, small),
                },
                ("NNCF", "dense"),
                shares={"ours, unstructured": share, "ours, 32x32 blocks": share},
                beyond="dense",
                rounds=7,
            )
            for algorithm, share in ((nncf.RB, 1 / 4), (nncf.MOVEMENT, 1 / 8))
        ),
        Comparison(
            f"Evaluation forward: {LAYERS} x Linear({width}), batch {large}, 80 % pruned",
            {
                "dense": partial(dense_evaluation, place, large),
                "ours, unstructured": partial(our_evaluation, place, Unstructured(), large),
                "ours, 32x32 blocks": partial(our_evaluation, place, BLOCK, large),
            },
            ("dense",),
            {"ours, unstructured": 1 / 1.02, "ours, 32x32 blocks": 1 / 1.02},
            rounds=41,
        ),
        Comparison(
            f"Strip: {LAYERS} x Linear({width})",
            {"ours": partial(our_strip, place), "NNCF": by_nncf(nncf_strip)},
            ("NNCF",),
            {"ours": 1.0},
            rounds=5,
        ),
    ]


def quotients(
    timings: Mapping[str, Timing], above: str, below: str, beyond: str = ""
) -> tuple[float, float, float]:
    """Return ``above``'s time over ``below``'s in the same round: median, p20 and p80.

    Both without the time of ``beyond`` in that round, if one is named.
    """
    base = timings[beyond].seconds if beyond else (0.0,) * len(timings[above].seconds)
    triples = zip(timings[above].seconds, timings[below].seconds, base, strict=True)
    found = sorted((one - less) / (other - less) for one, other, less in triples)
    last = len(found) - 1
    return found[round(0.5 * last)], found[round(0.2 * last)], found[round(0.8 * last)]


def rows(comparison: Comparison, results: Mapping[str, Timing | str]) -> list[dict[str, Any]]:
    """Put one comparison's figures into plain values, one row a subject.

    All speed-ups are over one baseline. Each is of one round; their median, 20th and 80th
    percentile are kept.
    """
    timings = {name: found for name, found in results.items() if isinstance(found, Timing)}
    baseline = next((name for name in comparison.baselines if name in timings), None)
    first = baseline is not None and baseline == comparison.baselines[0]
    found = []
    for name, subject in comparison.subjects.items():
        row: dict[str, Any] = {"work": comparison.title, "subject": name}
        if isinstance(subject, str):
            found.append(row | {"status": "skipped", "detail": subject})
            continue
        if name not in timings:
            found.append(row | {"status": "failed", "detail": results[name]})
            continue
        timing = timings[name]
        row |= {"status": "ok", "detail": ""}
        row |= {"median_s": timing.median, "p20_s": timing.quantile(0.2)}
        row |= {"p80_s": timing.quantile(0.8), "runs": len(timing.seconds)}
        if comparison.weights and timing.scratch is not None:
            row["scratch_bytes_per_weight"] = timing.scratch / comparison.weights
        if baseline is not None:
            row["baseline"] = baseline
        if baseline is not None and name != baseline:
            names = "speedup", "speedup_p20", "speedup_p80"
            row |= zip(names, quotients(timings, baseline, name), strict=True)
            row["speedup_target"] = comparison.targets.get(name) if first else None
        if (
            baseline is not None
            and first
            and name in comparison.shares
            and comparison.beyond in timings
        ):
            share, *_ = quotients(timings, name, baseline, comparison.beyond)
            row |= {"share": share, "share_target": comparison.shares[name]}
        found.append(row)
    return found


def draw(title: str, found: list[dict[str, Any]]) -> Table:
    """Return the table of one comparison."""
    baseline = next((row["baseline"] for row in found if row.get("baseline")), None)
    headings = (
        "subject:", "median", "p20 to p80", "scratch a weight",
        f"speed-up over {baseline}" if baseline else "speed-up", "target:",
    )  # fmt: skip
    lines = []
    for row in found:
        if row["status"] != "ok":
            lines.append((row["subject"], row["status"].upper(), *[""] * 4))
            continue
        scratch = row.get("scratch_bytes_per_weight")
        lines.append(
            (
                row["subject"],
                seconds(row["median_s"]),
                f"{seconds(row['p20_s'])} to {seconds(row['p80_s'])}",
                "" if scratch is None else f"{scratch:.1f} bytes",
                "baseline"
                if row["subject"] == baseline
                else faster_within(
                    row.get("speedup"), row.get("speedup_p20"), row.get("speedup_p80")
                ),
                verdict(row),
            )
        )
    return table(title, headings, lines)


def verdict(row: Mapping[str, Any]) -> str:
    """Say whether a row reaches its target, if it has one."""
    if (least := row.get("speedup_target")) is not None:
        reached = row["speedup"] >= least
        limit = faster(least) if least >= 1 else f"no more than {faster(least)}"
        return f"{limit}: {'reached' if reached else 'MISSED'}"
    if (most := row.get("share_target")) is not None:
        reached = row["share"] <= most
        return (
            f"adds at most {percent(most)} of what {row['baseline']} adds: "
            f"{percent(row['share'])}, {'reached' if reached else 'MISSED'}"
        )
    return ""


def place_of(device: torch.device) -> Place:
    """Return what is measured on a device."""
    return (GPU if device.type == "cuda" else CPU)._replace(device=str(device))


def compare(
    place: Place, threads: int, *, rounds: int | None = None, only: str = ""
) -> dict[str, Any]:
    """Measure all comparisons, printing each, and return the record.

    Args:
        place: where and how large.
        threads: of torch, in each process.
        rounds: timed runs of each; None takes each comparison's own number.
        only: the comparisons whose title has this text.
    """
    out = console()
    # one warning about a table that is no good, here rather than in every process
    tuning.table(place.kind)
    found: list[dict[str, Any]] = []
    for comparison in comparisons(place):
        if only not in comparison.title:
            continue
        subjects = {
            name: make for name, make in comparison.subjects.items() if not isinstance(make, str)
        }
        results = in_turn(subjects, rounds or comparison.rounds, threads, place.kind)
        drawn = rows(comparison, results)
        found.extend(drawn)
        out.print(draw(comparison.title, drawn))
        for row in drawn:
            if row["status"] != "ok":
                out.print(f"{row['status']}: {row['subject']}: {row['detail']}")
    torch.set_num_threads(threads)
    return environment(place.kind, "auto") | {"rows": found}


def run(
    place: Place, threads: int, folder: Path, *, rounds: int | None = None, only: str = ""
) -> bool:
    """Measure all comparisons, write ``compare.json``, and tell whether ours were all right."""
    record = compare(place, threads, rounds=rounds, only=only)
    write_atomic(folder / "compare.json", dump(record))
    failed = [row for row in record["rows"] if row["status"] == "failed"]
    return not any(row["subject"].startswith("ours") for row in failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="where compare.json goes; by default with the repository's results of this device",
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="the work whose title has it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trial", action="store_true", help="tiny sizes, no figures")
    options = parser.parse_args()
    try:
        device = find_device(options.device)
        folder = options.output or results_folder(device)
        if options.trial and options.output is None:
            parser.error("--trial needs --output: its figures are none")
        if options.only and options.output is None:
            parser.error("--only needs --output: the repository's results are of all the work")
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        titles = [comparison.title for comparison in comparisons(place_of(device))]
        if not any(options.only in title for title in titles):
            what = "; ".join(titles)
            parser.error(f"--only must be part of a title, got {options.only!r}: {what}")
        claim_folder(folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    place = TRIAL if options.trial else place_of(device)
    rounds = 2 if options.trial else None
    right = run(place, options.threads, folder, rounds=rounds, only=options.only)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
