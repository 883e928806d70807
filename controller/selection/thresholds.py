"""From scores to masks: pools of weights, their exact counts within limits, thresholds, masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.cut import Cut, find_cut
from ...kernels.group_mask import read_counts
from ...kernels.pattern import NM, Pattern, is_reachable, maximum_level
from ...kernels.table import alike
from ..config.algorithm import Pool
from ..masks.exchange import agree_counts, local_masks, others_of
from ..masks.ranks import ALONE
from ..masks.shards import local_part
from ..masks.weight import SparseWeight
from .allocation import Distribution, allocate, distribute, within


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
DistributionOf = Callable[[Sequence[SparseWeight]], Distribution | None]

DEFAULT_MAXIMUM = 0.98  # Intel Neural Compressor's


def pools(weights: Sequence[SparseWeight], pool: Pool = "global") -> list[list[SparseWeight]]:
    """Part the weights: each by itself, whose rows may be pools of their own, or by pattern, since
    in a mixed pool an element would count as much as a block.
    """
    if pool != "global":
        return [[weight] for weight in weights]
    found: dict[Pattern, list[SparseWeight]] = {}
    for weight in weights:
        found.setdefault(weight.pattern, []).append(weight)
    return list(found.values())


def check_reachable(what: str, level: float, patterns: Sequence[Pattern]) -> None:
    """Refuse a level that no weight can reach, naming ``what`` it is."""
    if not is_reachable(level, patterns):
        pattern = max(patterns, key=maximum_level)
        raise ValueError(
            f"{what} must be at most 1 - n/m = {maximum_level(pattern):g} under the pattern "
            f"{pattern}, got {level!r}"
        )


def limits(
    weights: Sequence[SparseWeight], level: float, *, rising: bool = True
) -> tuple[list[int], list[int]]:
    """Return how many groups, of N:M tuples, each of some weights of one pattern must, and may at
    most, give up at a level: by its own limits, each rounded.

    Without a maximum of its own a weight keeps ``1 - DEFAULT_MAXIMUM``, or at levels beyond that
    as much as all others. A ``rising`` level passes those below a weight's minimum on its way up.
    """
    highest = maximum_level(weights[0].pattern)
    at_present = level / highest if rising else 1.0
    found: dict[tuple[float, float | None, int], tuple[int, int]] = {}  # most weights are alike
    least, most = [], []
    for weight in weights:
        target, groups = weight.target, weight.choices
        key = target.minimum_level, target.maximum_level, groups
        if key not in found:
            lowest, maximum, _ = key
            maximum = max(DEFAULT_MAXIMUM, level) if maximum is None else maximum
            above = round(min(maximum / highest, 1.0) * groups)
            below = round(min(lowest / highest, at_present, 1.0) * groups)
            found[key] = min(below, above), above
        at_least, at_most = found[key]
        least.append(at_least)
        most.append(at_most)
    return least, most


class _Shared(NamedTuple):
    """Weights with a threshold in common, how many groups go, and of each at least, at most."""

    weights: list[SparseWeight]
    total: int
    least: list[int]
    most: list[int]


class Masks(NamedTuple):
    """Masks that are found and yet to be set.

    Attributes:
        weights, masks, counts: ``set_masks``'s arguments.
        thresholds: of each weight by name, on the device; None where there is none.
    """

    weights: list[SparseWeight]
    masks: list[Tensor]
    counts: list[list[int]]
    thresholds: dict[str, Tensor | None]


def find_masks(
    weights: Sequence[SparseWeight],
    level: float,
    scores: ScoresOf,
    *,
    pool: Pool = "global",
    distribution: DistributionOf = lambda _: None,
    limited: bool = True,
) -> Masks:
    """Find the masks of a level: ``round(level * groups)`` groups of each pool are pruned, of N:M
    tuples that share of what it can prune. Waits for the device once, and once more for each round
    in which a common threshold takes a weight past its limits.

    Args:
        weights: of any patterns; those of one pattern are compared.
        level: in [0, 1).
        scores: scores every group of the weights given.
        pool: what is compared.
        distribution: of several weights that are pools by themselves; None: the same level.
        limited: each weight keeps within its limits; a total that misses them by rounding alone is
            taken to the nearest they allow.

    Raises:
        ValueError: the level is beyond what the limits allow; scores hold NaN or Inf.
    """
    shared, alone = _plan(weights, level, pool, distribution, limited)
    prunings = [_prune(one.weights, one.total, scores) for one in shared]
    rest = _prune_each(alone, scores, pool == "row")
    found = _masks_of(prunings + rest)
    # as a rule no limit is met, and nothing was found in vain
    pruned = iter(_pruned(found))
    again = False
    parted = []
    for place, one in enumerate(shared):
        known = [next(pruned) for _ in one.weights]
        within_limits = [a <= n <= b for a, n, b in zip(one.least, known, one.most, strict=True)]
        if all(within_limits):
            parted.append(prunings[place])
        else:
            again = True
            prunings[place] = Pruning([], None)  # its scores are found anew: let go of them
            parted += _part(one, known, scores)
    return _masks_of(parted + rest) if again else found


def check_limits(weights: Sequence[SparseWeight], level: float) -> None:
    """Refuse a level that the limits of the weights will not let masks reach."""
    planned(weights, level, "global", shifts=False)


def planned(weights: Sequence[SparseWeight], level: float, pool: Pool, *, shifts: bool) -> int:
    """Return how many groups a level prunes in all; ``shifts``: levels differ over weights."""

    def distribution(members: Sequence[SparseWeight]) -> Distribution | None:
        return Distribution([1.0] * len(members)) if shifts else None

    shared, alone = _plan(weights, level, pool, distribution, len(weights) > 1)
    sizes = [(one.weights[0].pattern, one.total) for one in shared]
    sizes += [(weight.pattern, count) for weight, count in alone]
    return sum(n * (p.dropped if isinstance(p, NM) else 1) for p, n in sizes)


def _plan(
    weights: Sequence[SparseWeight],
    level: float,
    pool: Pool,
    distribution: DistributionOf,
    limited: bool,
) -> tuple[list[_Shared], list[tuple[SparseWeight, int]]]:
    """Return the pools of several weights; the weights that are pools by themselves, or of rows,
    with their counts.
    """
    shared: list[_Shared] = []
    alone: list[tuple[SparseWeight, int]] = []
    for members in pools(weights):
        share = min(level / maximum_level(members[0].pattern), 1.0)
        groups = [weight.choices for weight in members]
        least, most = limits(members, level) if limited else ([0] * len(members), groups)
        total = round(share * sum(groups))
        several = len(members) > 1
        if several and pool == "global":
            total = within(level, "prune", total, least, most, sum(groups))
            shared.append(_Shared(members, total, least, most))
            continue
        counts = [round(share * n) for n in groups]
        chosen = distribution(members) if several and total else None
        if chosen or any(n < a or n > b for a, n, b in zip(least, counts, most, strict=True)):
            total = within(level, "prune", total, least, most, sum(groups))
            kept = [[n - m for n, m in zip(groups, ends, strict=True)] for ends in (most, least)]
            chosen = chosen or Distribution([1.0] * len(members))
            keeps = distribute(sum(groups) - total, groups, chosen, *kept)
            counts = [n - keep for n, keep in zip(groups, keeps, strict=True)]
        alone += zip(members, counts, strict=True)
    return shared, alone


def _pruned(found: Masks) -> list[int]:
    """Return how many groups, or tuples, each mask prunes."""
    return [
        (weight.groups - kept) // (weight.pattern.dropped if isinstance(weight.pattern, NM) else 1)
        for weight, (kept, _) in zip(found.weights, found.counts, strict=True)
    ]


def _prune_each(
    alone: Sequence[tuple[SparseWeight, int]], scores: ScoresOf, rows: bool = False
) -> list[Pruning]:
    found = []
    # shards by pattern: they may be of several kinds, and of others on other ranks; what is pruned
    # completely, which N:M may be, has no threshold
    kinds = [
        (w.kind if w.shard is None else w.pattern, count > 0, count == w.choices)
        for w, count in alone
    ]
    for (kind, prunes, _), places in alike(kinds).items():
        pattern = kind if isinstance(kind, Pattern) else kind.pattern
        if isinstance(pattern, NM) and not rows and not isinstance(kind, Pattern):
            found += [_prune([alone[place][0]], alone[place][1], scores) for place in places]
            continue
        members, counts = zip(*(alone[place] for place in places), strict=True)
        found.append(_prune([*members], [*counts] if prunes else 0, scores, rows))
    return found


def _part(pool: _Shared, known: list[int], scores: ScoresOf) -> list[Pruning]:
    """Return the weights that meet a limit, cut each by itself, and the others, cut together.

    ``known`` is what each gives up with one threshold for all.
    """
    weights = pool.weights
    latest: Pruning | None = None

    # waits for the device once a round: which weights meet a limit decides what is searched next
    def natural(members: list[int], k: int) -> list[int]:
        nonlocal latest
        if len(members) == len(weights):
            return known
        latest = None  # and its scores
        latest = _prune([weights[i] for i in members], k, scores)
        return [0] * len(members) if latest.cut is None else latest.cut.pruned()

    fixed, free, _ = allocate(pool.total, pool.least, pool.most, natural)
    found = _prune_each([(weights[i], count) for i, count in fixed.items()], scores)
    return [latest, *found] if free and latest else found


def _masks_of(prunings: Sequence[Pruning]) -> Masks:
    """Find the masks, and how many groups and elements each keeps. Refuses scores that hold NaN or
    Inf, by their weight. Waits for the device once.
    """
    weights, masks, thresholds = [], [], {}
    for members, cut in prunings:
        weights += members
        masks += (
            [weight.full_mask() for weight in members]
            if cut is None
            else local_masks(members, cut.masks())
        )
        values = [None] * len(members) if cut is None else cut.values()
        thresholds |= zip((weight.name for weight in members), values, strict=True)
    nonfinite = [cut.nonfinite for _, cut in prunings if cut is not None]
    counts, bad = read_counts(weights, masks, nonfinite)
    if any(bad):
        check_finite(prunings)
    return Masks(weights, masks, agree_counts(weights, masks, counts), thresholds)


def check_finite(prunings: Sequence[Pruning]) -> None:
    """Refuse scores that hold NaN or Inf, by their weight."""
    found = [(pruning.weights, pruning.cut) for pruning in prunings if pruning.cut is not None]
    for weights, cut in found:
        if not bool(cut.nonfinite.any()):
            continue
        # of a sharded weight not every rank has what is not finite
        ranks = ALONE if cut.others is None else weights[0].ranks
        with ranks.together(weights[0].mask.device):
            _name_nonfinite(weights, cut)


def _name_nonfinite(weights: list[SparseWeight], cut: Cut) -> None:
    for i, weight in enumerate(weights):
        if cut.finite(i):
            continue
        here = torch.isfinite(local_part(weight.weight)).all()
        what = "importance" if here else "weight"
        raise ValueError(
            f"set_sparsity_level: the {what} of {weight.name!r} holds NaN or Inf; masks are left "
            "as they were"
        )


def _prune(
    weights: list[SparseWeight], pruned: int | list[int], scores: ScoresOf, rows: bool = False
) -> Pruning:
    if not pruned:
        # a criterion need not have its evidence, and no weight is read
        return Pruning(weights, None)
    (tensors, scales), first = scores(weights), weights[0]
    others = others_of(weights)
    cut = find_cut(tensors, pruned, first.pattern, scales, first.backend, rows, others)
    return Pruning(weights, cut)
