"""The levels that the job ``sensitivity`` scans, and those that it proposes for a budget.

Nothing here needs torch: what is wrong with an option is told before it is imported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from ..kernels.pattern import NM
from .measure.spelling import parse_pattern

LEVELS = (0.5, 0.7, 0.8, 0.9)
PATTERNS = ("unstructured", "block:16")
BUDGET = 0.8

# of each weight: level -> how much the loss rose
Curves = Mapping[str, Mapping[float, float]]


def check_levels(patterns: Sequence[str], levels: Sequence[float], budget: float) -> None:
    """See that a scan of ``levels`` can tell how to reach the budget by each pattern.

    Raises:
        ValueError: a pattern is unknown, a level out of its range, or all of them are too low.
    """
    spelled = ", ".join(map(str, levels)) or "none"
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels must be in (0, 1), got {spelled}")
    # of N:M the pattern's own level is the only one
    named = [pattern for pattern in patterns if not isinstance(parse_pattern(pattern), NM)]
    if named and budget > max(levels):
        raise ValueError(
            f"levels must go up to the level {budget:g} that is to be reached, got {spelled}"
        )


def allocate(sizes: Mapping[str, int], curves: Curves, level: float) -> dict[str, float]:
    """Return a level for each weight that together prune a share of all elements and cost least.

    Args:
        sizes: elements of each weight.
        curves: how much the loss rises by each weight at some levels; at 0 it does not.
        level: share of all elements, at most what the highest levels of all weights make.

    Returns:
        Levels at corners of the lower convex hulls of the curves, but for one at most.
    """
    pieces = sorted(
        ((end[1] - start[1]) / ((end[0] - start[0]) * sizes[name]), name, start[0], end[0])
        for name, curve in curves.items()
        for start, end in itertools.pairwise(_hull(curve))
    )
    levels = dict.fromkeys(sizes, 0.0)
    rest = level * sum(sizes.values())
    # slopes of a hull rise, so that a weight's pieces come in order
    for _, name, start, end in pieces:
        taken = min(1.0, rest / ((end - start) * sizes[name]))
        levels[name] = end if taken == 1.0 else start + taken * (end - start)
        rest -= taken * (end - start) * sizes[name]
        if rest <= 0:
            break
    return levels


def _hull(curve: Mapping[float, float]) -> list[tuple[float, float]]:
    """Return the corners of the lower convex hull, from (0, 0) on; a fall counts as 0."""
    corners: list[tuple[float, float]] = []
    highest = 0.0
    for level, increase in [(0.0, 0.0), *sorted(curve.items())]:
        # more pruning does not help: where it seems to, that is noise
        highest = max(highest, increase) if math.isfinite(increase) else math.inf
        point = (level, min(highest, 1e9))
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
