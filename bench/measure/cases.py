"""One operation on one operand: set up, checked, timed, and the row that comes of it.

What fails its check is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...kernels.pattern import Pattern
from .ceilings import Ceilings
from .memory import shortage
from .record import Row, times
from .shapes import Shape, spell_shapes
from .spelling import spell_pattern
from .timing import Timing, Work, measure_in_turn, pool, spread

LEAST = 3  # runs of each operation in a pass


class Built(NamedTuple):
    """An operation that is set up.

    Attributes:
        run: what is timed.
        check: runs it once and returns what is wrong with the result, or None.
        dense: the same work without sparsity, if there is such.
    """

    run: Work
    check: Callable[[], str | None]
    dense: Work | None = None


@dataclass(frozen=True)
class Case:
    """One operation on one operand.

    Attributes:
        operation: of ``OPERATIONS``.
        shapes: one, or those of a whole model.
        dtype, pattern, level, mask: of the weights and their masks.
        bytes, flops: the least that must be moved and done, by the formulas of ``counts.py``.
        cache_bytes: what the kernel's tiles read from the L2 cache; None where nobody counts it.
        build: sets it up.
        dense_flops: of the same work without sparsity; 0 where there are none.
    """

    operation: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    pattern: Pattern
    level: float
    mask: str
    bytes: int
    flops: int
    cache_bytes: float | None
    build: Callable[[], Built]
    dense_flops: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of measuring one case once.

    Attributes:
        status, detail: a row's.
        timing, dense: of the operation, and of the same work without sparsity, if there is such.
    """

    status: str
    detail: str = ""
    timing: Timing | None = None
    dense: Timing | None = None


def measure_case(
    case: Case, device: torch.device, budget: float, *, check: bool = True
) -> Outcome:
    """Set one case up, check it, and only if it is right, time it.

    Args:
        case: what.
        device: where.
        budget: seconds of timed runs.
        check: whether it is checked, or was in an earlier pass.
    """
    try:
        built = case.build()
        if check and (problem := built.check()) is not None:
            return Outcome("failed", problem)
        works = [built.run] if built.dense is None else [built.run, built.dense]
        timings = measure_in_turn(works, device, budget=budget, least=LEAST)
    except ModuleNotFoundError as error:
        return Outcome("skipped", str(error))
    # whatever a kernel does on a device that nobody has seen, the others are still measured
    except Exception as error:
        if (asked := shortage(error)) is not None:
            return Outcome("skipped", f"out of memory: {asked}")
        return Outcome("failed", first_line(error))
    timing, *dense = timings
    return Outcome("ok", "", timing, dense[0] if dense else None)


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def to_row(case: Case, outcomes: Sequence[Outcome], ceilings: Ceilings) -> Row:
    """Return the row of a case that was measured in one pass or several.

    Args:
        case: what.
        outcomes: one a pass.
        ceilings: of the same run.
    """
    head = {
        "operation": case.operation,
        "shape": spell_shapes(case.shapes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "pattern": spell_pattern(case.pattern),
        "level": case.level,
        "mask": case.mask,
        "bytes": case.bytes,
        "flops": case.flops,
    }
    for outcome in outcomes:
        if outcome.status != "ok":
            return Row(**head, status=outcome.status, detail=outcome.detail)
    passes = [o.timing for o in outcomes if o.timing is not None]
    dense = [o.dense for o in outcomes if o.dense is not None]
    timing = pool(passes)
    found = rates(case, timing.median, ceilings, pool(dense) if dense else None)
    found["low_s"], found["high_s"] = spread(passes)
    if dense:
        found["dense_low_s"], found["dense_high_s"] = spread(dense)
    return Row(**head, status="ok", **times(timing), **found)


def rates(case: Case, seconds: float, ceilings: Ceilings, dense: Timing | None) -> dict[str, Any]:
    """Return the columns that follow from a time, the counts and the ceilings."""
    gemm = ceilings.gemm[str(case.dtype).removeprefix("torch.")]
    bounds = {"copy": case.bytes / ceilings.copy}
    if case.flops:
        bounds["gemm"] = case.flops / gemm
    if case.cache_bytes:
        bounds["cache"] = case.cache_bytes / ceilings.cache
    bound = max(bounds, key=lambda name: bounds[name])
    found: dict[str, Any] = {
        "gb_per_s": case.bytes / seconds / 1e9,
        "tflop_per_s": case.flops / seconds / 1e12 if case.flops else None,
        "of_copy": bounds["copy"] / seconds,
        "of_cache": bounds["cache"] / seconds if "cache" in bounds else None,
        "of_gemm": bounds["gemm"] / seconds if "gemm" in bounds else None,
        "bound": bound,
        "bound_s": bounds[bound],
        "of_bound": bounds[bound] / seconds,
    }
    if dense is not None:
        found |= {
            "dense_s": dense.median,
            "dense_p20_s": dense.quantile(0.2),
            "dense_p80_s": dense.quantile(0.8),
            "dense_wall_s": dense.wall,
            "speedup": dense.median / seconds,
        }
        if case.dense_flops:
            found["efficiency"] = case.flops / case.dense_flops * dense.median / seconds
    return found
