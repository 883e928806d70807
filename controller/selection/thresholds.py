"""From scores to masks: pools of weights, their exact counts within limits, thresholds, masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.bits import count_kept
from ...kernels.cut import Cut, find_cut
from ...kernels.pattern import Pattern, maximum_level
from ..config.algorithm import Pool
from ..masks.weight import SparseWeight
from .allocation import allocate, within


class Scores(NamedTuple):
    """Importance of the groups of several weights.

    Attributes:
        tensors: one matrix a weight, of a block pattern's grid, or of the weight itself where
            every element is a group: its magnitude is the score, and no copy is made. Under N:M
            the weight's too: its elements compete inside their tuple.
        scales: float32 factor of each tensor, or None.
    """

    tensors: list[Tensor]
    scales: Tensor | None


class Pruning(NamedTuple):
    """Where some weights of one pattern are cut; None: nothing is pruned."""

    weights: list[SparseWeight]
    cut: Cut | None


ScoresOf = Callable[[Sequence[SparseWeight]], Scores]


def pools(weights: Sequence[SparseWeight], pool: Pool = "global") -> list[list[SparseWeight]]:
    """Part the weights: each by itself, or by pattern, since in a mixed pool an element would
    count as much as a block.
    """
    if pool == "weight":
        return [[weight] for weight in weights]
    found: dict[Pattern, list[SparseWeight]] = {}
    for weight in weights:
        found.setdefault(weight.pattern, []).append(weight)
    return list(found.values())


def is_reachable(level: float, patterns: Sequence[Pattern]) -> bool:
    """Tell whether any of the patterns can express ``level``: N:M goes up to 1 - n/m."""
    most = max(map(maximum_level, patterns))
    # 2/3 is not 1 - 1/3 in floating point
    return level <= most or math.isclose(level, most, rel_tol=1e-9)


def check_reachable(what: str, level: float, patterns: Sequence[Pattern]) -> None:
    """Refuse a level that no weight can reach, naming ``what`` it is."""
    if not is_reachable(level, patterns):
        pattern = max(patterns, key=maximum_level)
        raise ValueError(
            f"{what} must be at most 1 - n/m = {maximum_level(pattern):g} under the pattern "
            f"{pattern}, got {level!r}"
        )


def find_prunings(
    weights: list[SparseWeight], level: float, scores: ScoresOf, *, limits: bool
) -> list[Pruning]:
    """Find the thresholds of one pool; several where limits hold some weights apart.

    Args:
        weights: the weights, of one pattern.
        level: ``round(level * groups)`` groups are pruned; of N:M tuples that share of what it
            can prune.
        scores: scores every group of the weights given.
        limits: each weight keeps within its own; a total that misses them by rounding alone is
            taken to the nearest they allow.

    Raises:
        ValueError: the level is beyond what the limits allow. Whether scores are finite is for
            ``check_finite`` to say.
    """
    groups = [weight.choices for weight in weights]
    most = maximum_level(weights[0].pattern)
    share = min(level / most, 1.0)
    total = round(share * sum(groups))
    targets = [weight.target for weight in weights]
    if not limits or all(t.minimum_level <= 0 and t.maximum_level >= 1 for t in targets):
        return [_prune(weights, total, scores)]
    # a schedule passes levels below a weight's minimum on its way up
    least = [min(target.minimum_level / most, share) for target in targets]
    minimum = [round(part * n) for part, n in zip(least, groups, strict=True)]
    greatest = [min(target.maximum_level / most, 1.0) for target in targets]
    maximum = [round(part * n) for part, n in zip(greatest, groups, strict=True)]
    minimum = [min(low, high) for low, high in zip(minimum, maximum, strict=True)]
    total = within(level, "prune", total, minimum, maximum, sum(groups))

    def natural(members: list[int], k: int) -> list[int]:
        pruning = _prune([weights[i] for i in members], k, scores)
        check_finite([pruning])
        if pruning.cut is None or pruning.cut.threshold is None:
            return [groups[i] if k else 0 for i in members]
        kept = count_kept(pruning.cut.kept())
        return [groups[i] - n for i, n in zip(members, kept, strict=True)]

    fixed, free, left = allocate(total, minimum, maximum, natural)
    prunings = [_prune([weights[i]], count, scores) for i, count in fixed.items()]
    if free:
        prunings.append(_prune([weights[i] for i in free], left, scores))
    return prunings


def check_finite(prunings: Sequence[Pruning]) -> None:
    """Refuse scores that hold NaN or Inf, by their weight, in one wait for the device."""
    found = [(pruning.weights, pruning.cut) for pruning in prunings if pruning.cut is not None]
    if found and torch.stack([cut.nonfinite for _, cut in found]).any():
        for weights, cut in found:
            for weight, tensor in zip(weights, cut.scores, strict=True):
                if not torch.isfinite(tensor).all():
                    what = "importance" if torch.isfinite(weight.weight).all() else "weight"
                    raise ValueError(
                        f"set_sparsity_level: the {what} of {weight.name!r} holds NaN "
                        "or Inf; masks are left as they were"
                    )


def apply_prunings(prunings: Sequence[Pruning]) -> None:
    """Write the masks, in place. The parameters are the caller's to bring in line."""
    for weights, cut in prunings:
        if cut is not None:
            cut.write([weight.mask for weight in weights])
            continue
        for weight in weights:
            weight.mask.copy_(weight.full_mask())
    weights = [weight for pruning in prunings for weight in pruning.weights]
    counts = count_kept([weight.mask for weight in weights])
    for weight, kept in zip(weights, counts, strict=True):
        weight.set_(None, kept)


def _prune(weights: list[SparseWeight], pruned: int, scores: ScoresOf) -> Pruning:
    if not pruned:
        # a criterion need not have its evidence, and no weight is read
        return Pruning(weights, None)
    (tensors, scales), first = scores(weights), weights[0]
    return Pruning(weights, find_cut(tensors, pruned, first.pattern, scales, first.backend))
