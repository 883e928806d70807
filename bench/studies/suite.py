"""``make bench``: the profile of this device and the comparison with the peers, kept in
``bench/results/<device>/``; within ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from .. import profile
from ..finetune.options import find_device
from ..finetune.report import progress_bars
from ..measure.record import claim_folder, results_folder
from ..measure.tables import show_profile
from ..measure.timing import measure
from . import compare


def profiler_overhead(device: torch.device, pairs: int = 15) -> float:
    """Return by which part the profiler moves the median of a known product's time.

    Runs of the profiler and of a bare loop take turns, and the median of their ratios counts, so
    that a machine at work does not look like an overhead.
    """
    gpu = device.type == "cuda"
    # on a GPU so large that neither the host nor an overwritten cache matters
    side = 8192 if gpu else 512
    a = torch.randn(side, side, device=device)

    def bare() -> float:
        if gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        if gpu:
            end.record()
            torch.cuda.synchronize(device)
            return begin.elapsed_time(end) * 1e-3 / 5
        return (time.perf_counter() - start) / 5

    bare()
    ratios = []
    for _ in range(pairs):
        seen = measure(lambda: a @ a, device, budget=0, least=5)
        ratios.append(statistics.mean(seen.seconds) / bare())
    return statistics.median(ratios) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", metavar="FOLDER", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        device = find_device(options.device)
        folder = options.output or results_folder(device)
        plan = profile.make_plan(device=options.device, threads=options.threads)
        claim_folder(folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    moved = profiler_overhead(device, pairs=75)
    with progress_bars(quiet=False) as progress:
        record = profile.profile(plan, progress)
    record["notes"].append(f"the profiler moved the median of a known product by {moved:+.1%}")
    names = profile.save(record, folder)
    show_profile(record, folder, names)
    place = compare.place_of(device)
    right = compare.run(place, options.threads or torch.get_num_threads(), folder)
    wrong = any(row["status"] == "failed" for row in record["rows"])
    print(f"{folder}: {time.perf_counter() - start:.0f} s in all")
    sys.exit(0 if right and not wrong else 1)


if __name__ == "__main__":
    main()
