"""The job ``doctor``: what is here, what would run and why, and whether every kernel is right."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch

from ..kernels import tuning
from ..kernels.launch import HAS_TRITON, INTERPRET, Backend, use_triton
from .doctor_checks import checks
from .measure.cases import first_line
from .measure.record import environment
from .measure.spelling import find_device

PEERS = ("nncf", "stk", "blksprs")


def doctor(device: str | None = None, backend: str | None = None) -> dict[str, Any]:
    """Look at the device and check every operator.

    Args:
        device: as on the command line; None takes the GPU where there is one.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; None is ``"auto"``.

    Returns:
        The record: where, why this backend, the tuning table, and a row a check.

    Raises:
        ValueError: the device or the backend is not there.
    """
    place = find_device(device or "auto")
    asked = backend or "auto"
    try:
        triton_runs = use_triton("doctor", asked, torch.empty(0, device=place))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    kind: Backend = "triton" if triton_runs else "torch"
    start = time.perf_counter()
    rows = []
    for name, check in checks(place, kind):
        try:
            problem = check()
        # a kernel may fail in any way; the others are to be checked all the same
        except Exception as error:
            problem = first_line(error)
        rows.append({"check": name, "status": "ok" if problem is None else "failed"})
        rows[-1]["detail"] = problem or ""
    return environment(place, kind) | {
        "why": why(asked, kind, place),
        "facts": facts(place),
        "table": table_state(place),
        "optional": {name: importlib.util.find_spec(name) is not None for name in PEERS},
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }


def why(asked: str, backend: Backend, device: torch.device) -> str:
    """Say why this backend runs."""
    if asked != "auto":
        return "it was asked for"
    if backend == "triton":
        return "Triton's interpreter is on" if INTERPRET else "Triton compiles for this GPU"
    if not HAS_TRITON:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return f"Triton does not run on {device.type}"


def facts(device: torch.device) -> dict[str, Any]:
    """Return what a GPU says of itself."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "capability": f"{major}.{minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "L2": getattr(found, "L2_cache_size", None),
    }


def table_state(device: torch.device) -> str:
    """Say which tuning table would be used, or why there is none."""
    wanted = tuning.identity(device)
    own = tuning.user_file(wanted.device)
    shipped = tuning.SHIPPED / f"{tuning.slug(wanted.device)}.json"
    for path in (own, shipped):
        if path is None or not path.exists():
            continue
        try:
            tuning.read(path, wanted)
        except (OSError, ValueError) as error:
            return f"{path} is ignored: {error}"
        return str(path)
    return (
        "none: built-in tiles and break-even densities; `triton-sparsity autotune` measures them"
    )
