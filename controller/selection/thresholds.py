"""From scores to masks: pools of weights, their exact counts within limits, thresholds, masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.cut import Cut, find_cut
from ...kernels.group_mask import read_counts
from ...kernels.pattern import NM, Pattern, maximum_level
from ...kernels.table import alike
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
    pools: Sequence[list[SparseWeight]], level: float, scores: ScoresOf, *, limits: bool
) -> list[Pruning]:
    """Find the thresholds of pools; several of one where limits hold some weights apart.

    Args:
        pools: the weights, those of each of one pattern.
        level: ``round(level * groups)`` groups are pruned; of N:M tuples that share of what it
            can prune.
        scores: scores every group of the weights given.
        limits: each weight keeps within its own; a total that misses them by rounding alone is
            taken to the nearest they allow.

    Raises:
        ValueError: the level is beyond what the limits allow.
    """
    found: list[Pruning] = []
    alone: list[tuple[SparseWeight, int]] = []  # cut each by itself, but searched together
    most = {
        weight.kind: maximum_level(weight.pattern) for weights in pools for weight in weights[:1]
    }
    for weights in pools:
        highest = most[weights[0].kind]
        share = min(level / highest, 1.0)
        groups = [weight.choices for weight in weights]
        total = round(share * sum(groups))
        targets = [weight.target for weight in weights] if limits else []
        if any(t.minimum_level > 0 or t.maximum_level < 1 for t in targets):
            pairs = [*zip(groups, targets, strict=True)]
            maximum = [round(min(t.maximum_level / highest, 1.0) * n) for n, t in pairs]
            # a schedule passes levels below a weight's minimum on its way up
            minimum = [round(min(t.minimum_level / highest, share) * n) for n, t in pairs]
            minimum = [*map(min, minimum, maximum)]
            total = within(level, "prune", total, minimum, maximum, sum(groups))
            if len(weights) > 1:
                fixed, weights, total = _allocate(weights, total, minimum, maximum, scores)
                alone += fixed
        if len(weights) == 1:
            alone.append((weights[0], total))
        elif weights:
            found.append(_prune(weights, total, scores))
    return found + _prune_each(alone, scores)


def _prune_each(alone: Sequence[tuple[SparseWeight, int]], scores: ScoresOf) -> list[Pruning]:
    found = []
    for (kind, prunes), places in alike((w.kind, count > 0) for w, count in alone).items():
        if isinstance(kind.pattern, NM):
            found += [_prune([alone[place][0]], alone[place][1], scores) for place in places]
            continue
        members, counts = zip(*(alone[place] for place in places), strict=True)
        found.append(_prune([*members], [*counts] if prunes else 0, scores))
    return found


def _allocate(
    weights: list[SparseWeight], total: int, least: list[int], most: list[int], scores: ScoresOf
) -> tuple[list[tuple[SparseWeight, int]], list[SparseWeight], int]:
    """Return the weights that meet a limit with their counts; the others, and the count of all."""

    # waits for the device once a round: which weights meet a limit decides what is searched next
    def natural(members: list[int], k: int) -> list[int]:
        pruning = _prune([weights[i] for i in members], k, scores)
        check_finite([pruning])
        return [0] * len(members) if pruning.cut is None else pruning.cut.pruned()

    fixed, free, left = allocate(total, least, most, natural)
    return [(weights[i], count) for i, count in fixed.items()], [weights[i] for i in free], left


def find_masks(
    prunings: Sequence[Pruning],
) -> tuple[list[SparseWeight], list[Tensor], list[list[int]]]:
    """Find the masks, compact, and how many groups and elements each keeps: ``set_masks``'s
    arguments. Refuses scores that hold NaN or Inf, by their weight. Waits for the device once.
    """
    weights, masks = [], []
    for members, cut in prunings:
        weights += members
        masks += [weight.full_mask() for weight in members] if cut is None else cut.masks()
    nonfinite = [cut.nonfinite for _, cut in prunings if cut is not None]
    counts, bad = read_counts(weights, masks, nonfinite)
    if any(bad):
        check_finite(prunings)
    return weights, masks, counts


def check_finite(prunings: Sequence[Pruning]) -> None:
    """Refuse scores that hold NaN or Inf, by their weight."""
    found = [(pruning.weights, pruning.cut) for pruning in prunings if pruning.cut is not None]
    if found and any(bool(cut.nonfinite.any()) for _, cut in found):
        for weights, cut in found:
            for weight, tensor in zip(weights, cut.scores, strict=True):
                if not torch.isfinite(tensor).all():
                    what = "importance" if torch.isfinite(weight.weight).all() else "weight"
                    raise ValueError(
                        f"set_sparsity_level: the {what} of {weight.name!r} holds NaN "
                        "or Inf; masks are left as they were"
                    )


def _prune(weights: list[SparseWeight], pruned: int | list[int], scores: ScoresOf) -> Pruning:
    if not pruned:
        # a criterion need not have its evidence, and no weight is read
        return Pruning(weights, None)
    (tensors, scales), first = scores(weights), weights[0]
    return Pruning(weights, find_cut(tensors, pruned, first.pattern, scales, first.backend))
