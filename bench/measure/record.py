"""Records of what was measured: where, with what, by which command, and one row a measurement.

The columns of ``Row`` are the schema of the CSV and JSON files. Columns may be added at the end;
none is renamed or given another meaning.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...kernels.launch import HAS_TRITON, INTERPRET, triton
from ...kernels.tuning import device_name, slug
from .timing import Timing

SCHEMA = 1
BENCH = Path(__file__).parent.parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"


@dataclass(frozen=True)
class Row:
    """One measurement. What was not measured is None; what failed its check has no speed.

    Attributes:
        operation: its name in ``operations.py`` or ``steps.py``.
        shape: ``TOKENSxINxOUT``, or several of them with commas between.
        dtype: of weights and activations.
        pattern: as on the command line.
        level: fraction of the groups that is pruned.
        mask: ``"random"``, ``"skewed"``, or ``"magnitude"``: found from the weights.
        status: ``"ok"``, ``"failed"`` (its result was wrong, or none), ``"skipped"``.
        detail: why it failed or was skipped.
        median_s, p20_s, p80_s: seconds.
        runs: how many were timed.
        host_s: seconds the host takes to queue one run on a GPU.
        bytes, flops: counted by formula: the least that must be moved and done.
        gb_per_s, tflop_per_s: both over the median, in powers of ten.
        of_copy, of_cache, of_gemm: fractions of the ceilings measured in the same run; of the
            cache's with the bytes that the kernel's tiles read from it.
        bound: which ceiling bounds the operation: ``"copy"``, ``"cache"`` or ``"gemm"``.
        bound_s: seconds at that bound.
        of_bound: bound over median.
        dense_s: median of the same work without sparsity.
        speedup: dense over median.
        efficiency: FLOP rate over the dense product's.
        dense_p20_s, dense_p80_s: seconds.
        low_s, high_s, dense_low_s, dense_high_s: seconds; the spread over passes: the p20 of the
            fastest and the p80 of the slowest.
        wall_s, dense_wall_s: seconds by the clock, of one of a few runs in a row on a GPU, with
            the gaps in which it waits for the host.
    """

    operation: str
    shape: str
    dtype: str
    pattern: str
    level: float
    mask: str
    status: str
    detail: str = ""
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    runs: int | None = None
    host_s: float | None = None
    bytes: int | None = None
    flops: int | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    of_copy: float | None = None
    of_cache: float | None = None
    of_gemm: float | None = None
    bound: str | None = None
    bound_s: float | None = None
    of_bound: float | None = None
    dense_s: float | None = None
    speedup: float | None = None
    efficiency: float | None = None
    dense_p20_s: float | None = None
    dense_p80_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    dense_low_s: float | None = None
    dense_high_s: float | None = None
    wall_s: float | None = None
    dense_wall_s: float | None = None


def environment(device: torch.device, backend: str) -> dict[str, Any]:
    """Return where and with what a record is made."""
    try:
        version = metadata.version("triton-sparsity")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "schema": SCHEMA,
        "device": device_name(device),
        "device_type": device.type,
        "backend": backend + (" (interpreted)" if backend == "triton" and INTERPRET else ""),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "version": version,
        "commit": commit(),
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command() -> str:
    """Return what was typed, without the path of this machine's interpreter or checkout."""
    path = Path(sys.argv[0])
    name = path.name
    if path.suffix == ".py" and path.resolve().is_relative_to(BENCH.resolve()):
        inside = path.resolve().relative_to(BENCH.resolve()).with_suffix("")
        name = ".".join(("python -m triton_sparsity.bench", *inside.parts))
    # a folder of somebody's machine is nobody's business
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return f"{name} {shlex.join(arguments)}".rstrip()


@functools.cache
def commit() -> str | None:
    """Return the checkout's commit, ``-dirty`` behind it if files differ; None outside of one.

    As it was when first asked: what a job writes afterwards does not count.
    """
    try:
        found = subprocess.run(
            [
                "git",
                "-C",
                str(ROOT),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=12",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def times(timing: Timing) -> dict[str, Any]:
    """Return a timing's columns."""
    return {
        "median_s": timing.median,
        "p20_s": timing.quantile(0.2),
        "p80_s": timing.quantile(0.8),
        "runs": len(timing.seconds),
        "host_s": timing.host,
        "wall_s": timing.wall,
    }


def dump(record: Mapping[str, Any]) -> bytes:
    """Return a record as JSON that can be read and reviewed: of its lists, a line an entry."""
    parts = []
    for name, value in record.items():
        if isinstance(value, list) and value:
            lines = ",\n  ".join(json.dumps(_short(v), allow_nan=False) for v in value)
            parts.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(_short(value), allow_nan=False)}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def _short(value: Any) -> Any:
    """Round floats to five digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_short(v) for v in value]
    return value


def load(path: Path) -> dict[str, Any]:
    """Return a record as it was written.

    Raises:
        ValueError: it is no record, or of a newer schema.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_bytes())
        schema = record["schema"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} must be a record of measurements, got {error!r}") from None
    if schema != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {schema!r}")
    return record


def to_csv(rows: Sequence[Row], where: Mapping[str, Any]) -> bytes:
    """Return rows as CSV; each tells where it was measured, so that files can be joined."""
    places = ("device", "torch", "triton", "commit", "date", "command", "backend", "threads")
    buffer = io.StringIO()
    columns = [*(f.name for f in fields(Row)), *places]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(_short({**asdict(row), **{name: where.get(name) for name in places}}))
    return buffer.getvalue().encode()


def results_folder(device: torch.device) -> Path:
    """Return where the repository keeps a device's results."""
    return RESULTS / slug(device_name(device))
