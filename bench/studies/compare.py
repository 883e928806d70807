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
from dataclasses import dataclass
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
from ..measure.tables import console, seconds, table
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


@dataclass(frozen=True)
class Comparison:
    """Subjects that do the same work.

    Attributes:
        title: what the work is.
        subjects: name -> set-up, or why it cannot be measured; the first is what the others are
            compared with.
        targets: name -> the largest ratio of its time to another's that is acceptable: (other,
            ratio).
        beyond: what the ratios compare is the time beyond this subject's, if one is named.
        weights: number of weights, for scratch memory a weight; 0 where it does not matter.
        rounds: timed runs of each.
    """

    title: str
    subjects: Mapping[str, Callable[[], Work] | str]
    targets: Mapping[str, tuple[str, float]]
    beyond: str | None = None
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
    targets = {**dict.fromkeys((0.0, 0.05, 0.15, 0.3, 0.5), 1.05), 0.9: 1 / gain}
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
        {names[level]: ("dense", limit) for level, limit in targets.items()},
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
        {ours: ("dense", 1.0)},
    )


def comparisons(place: Place) -> list[Comparison]:
    """List the work and the ratios that the project must reach."""
    reason = nncf.available()
    if place.device != "cpu":
        reason = reason or "NNCF's sparsity is compared on the CPU"
    large, small = place.batches
    width = place.width

    def by_nncf(make: Callable[..., Work], *arguments: Any) -> Callable[[], Work] | str:
        return reason or partial(make, place, *arguments)

    def steps(tokens: int, targets: Mapping[str, tuple[str, float]]) -> Comparison:
        return Comparison(
            f"Training step: {LAYERS} x Linear({width}), batch {tokens}, 80 % pruned",
            {
                "dense": partial(dense_step, place, tokens),
                "ours, unstructured": partial(our_step, place, Unstructured(), tokens),
                "ours, 32x32 blocks": partial(our_step, place, BLOCK, tokens),
                "NNCF": by_nncf(nncf_step, tokens),
                "torch.nn.utils.prune": partial(torch_step, place, tokens),
            },
            targets,
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
            {"ours": ("NNCF", 1 / 25)},
            weights=place.layers * width**2,
            rounds=3,
        ),
        Comparison(
            f"Mask update: one {rows} x {cols} weight, 32 x 32 blocks",
            {
                "ours": partial(our_block_update, place),
                "WeightNormSparsifier": partial(weight_norm_update, place),
            },
            {"ours": ("WeightNormSparsifier", 1 / 25)},
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
            {"ours": ("torch.kthvalue", 1.0)},
            weights=4 * width**2,
            rounds=3,
        ),
        *(products(place, Block(side, side)) for side in (32, 128)),
        layers(place, Block(64, 64), False, 2.0),
        layers(place, Block(64, 64), True, 1.7),
        steps(
            large, {"ours, unstructured": ("dense", 1.15), "ours, 32x32 blocks": ("dense", 1.05)}
        ),
        steps(small, {"ours, unstructured": ("NNCF", 1.0), "ours, 32x32 blocks": ("NNCF", 1.0)}),
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
                {"ours, unstructured": ("NNCF", share), "ours, 32x32 blocks": ("NNCF", share)},
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
            {"ours, unstructured": ("dense", 1.02), "ours, 32x32 blocks": ("dense", 1.02)},
            rounds=41,
        ),
        Comparison(
            f"Strip: {LAYERS} x Linear({width})",
            {"ours": partial(our_strip, place), "NNCF": by_nncf(nncf_strip)},
            {"ours": ("NNCF", 1.0)},
            rounds=5,
        ),
    ]


def ratios(
    timings: Mapping[str, Timing], name: str, other: str, beyond: str | None = None
) -> list[float]:
    """Return ``name``'s time over ``other``'s in each round, sorted.

    Both without the time of ``beyond`` in that round, if one is named.
    """
    base = timings[beyond].seconds if beyond else (0.0,) * len(timings[name].seconds)
    triples = zip(timings[name].seconds, timings[other].seconds, base, strict=True)
    return sorted((mine - less) / (theirs - less) for mine, theirs, less in triples)


def rows(comparison: Comparison, results: Mapping[str, Timing | str]) -> list[dict[str, Any]]:
    """Put one comparison's figures into plain values, one row a subject.

    Ratios are of one round each; their median, 20th and 80th percentile are kept.
    """
    timings = {name: found for name, found in results.items() if isinstance(found, Timing)}
    reference = next(iter(comparison.subjects))
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
        target, limit = comparison.targets.get(name, (None, None))
        other = target if target in timings else reference if reference in timings else None
        if other is not None and other != name:
            beyond = comparison.beyond if other == target else None
            if beyond is not None and beyond not in timings:
                found.append(row)
                continue
            sorted_ratios = ratios(timings, name, other, beyond)
            last = len(sorted_ratios) - 1
            row |= {
                "compared_with": f"what {other} adds" if beyond else other,
                "ratio": sorted_ratios[round(0.5 * last)],
                "ratio_p20": sorted_ratios[round(0.2 * last)],
                "ratio_p80": sorted_ratios[round(0.8 * last)],
                "ratio_target": limit if other == target else None,
            }
        found.append(row)
    return found


def draw(title: str, found: list[dict[str, Any]]) -> Table:
    headings = (
        "subject:", "median", "p20 to p80", "scratch a weight", "ratio", "spread", "target",
    )  # fmt: skip
    lines = []
    for row in found:
        if row["status"] != "ok":
            lines.append((row["subject"], row["status"].upper(), *[""] * 5))
            continue
        scratch, ratio = row.get("scratch_bytes_per_weight"), row.get("ratio")
        limit = row.get("ratio_target")
        lines.append(
            (
                row["subject"],
                seconds(row["median_s"]),
                f"{seconds(row['p20_s'])} to {seconds(row['p80_s'])}",
                "" if scratch is None else f"{scratch:.1f} bytes",
                "" if ratio is None else f"{ratio:.3f} of {row['compared_with']}",
                "" if ratio is None else f"{row['ratio_p20']:.3f} to {row['ratio_p80']:.3f}",
                ""
                if limit is None
                else f"<= {limit:.3g} {'reached' if ratio <= limit else 'MISSED'}",
            )
        )
    return table(title, headings, lines)


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
