"""``make bench``: the profile of this device, the comparison with the peers and what updates
allocate, kept in ``bench/results/<device>/``; within ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from .. import profile
from ..measure.files import claim_folder
from ..measure.progress import progress_bars
from ..measure.record import results_folder
from ..measure.spelling import find_device
from ..measure.tables import show_profile
from ..measure.timing import profiler_overhead
from . import compare, memory


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
    small = memory.run(folder)
    wrong = any(row["status"] == "failed" for row in record["rows"])
    print(f"{folder}: {time.perf_counter() - start:.0f} s in all")
    sys.exit(0 if right and small and not wrong else 1)


if __name__ == "__main__":
    main()
