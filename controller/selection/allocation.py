"""How many groups each weight of a pool gives up when some have a least or a most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

OWL_SPAN = 0.08  # how far a weight's level may lie from the middle


def allocate(
    total: int,
    minimum: Sequence[int],
    maximum: Sequence[int],
    natural: Callable[[list[int], int], list[int]],
) -> tuple[dict[int, int], list[int], int]:
    """Split ``total`` pruned groups over the weights of one pool.

    The result is what one threshold gives when each weight's count is held within its limits:
    weights that meet a limit are fixed there, the others share a threshold. Fixing the limits of
    the side that weighs more, and looking again, ends at that threshold after at most one round a
    weight, because a weight below its minimum stays below it as the threshold falls (and above a
    maximum as it rises).

    Args:
        total: groups to prune, between the sums of ``minimum`` and ``maximum``.
        minimum, maximum: groups each weight must, and may at most, give up.
        natural: ``natural(members, k)`` gives the counts of those members when the ``k`` lowest
            groups among them are pruned.

    Returns:
        The weights that are fixed with their counts; the others; how many groups these give up
        together.
    """
    fixed: dict[int, int] = {}
    free = list(range(len(minimum)))
    while free:
        left = total - sum(fixed.values())
        counts = dict(zip(free, natural(free, left), strict=True))
        under = {i: minimum[i] for i in free if counts[i] < minimum[i]}
        over = {i: maximum[i] for i in free if counts[i] > maximum[i]}
        if not under and not over:
            break
        deficit = sum(bound - counts[i] for i, bound in under.items())
        excess = sum(counts[i] - bound for i, bound in over.items())
        fixed |= under if deficit >= excess else over
        free = [i for i in free if i not in fixed]
    return fixed, free, total - sum(fixed.values())


def within(
    level: float,
    verb: str,
    total: int,
    minimum: Sequence[int],
    maximum: Sequence[int],
    groups: int,
) -> int:
    """Return how many of ``groups`` to prune, or keep: ``total``, or the nearest within limits.

    Each limit was rounded by itself: together they may miss the total by a group a weight. A total
    further off is refused.
    """
    least, most = sum(minimum), sum(maximum)
    if not least - len(minimum) < total < most + len(maximum):
        raise ValueError(
            f"set_sparsity_level: level {level} cannot be reached within the limits minimum_level "
            f"and maximum_level: {total} of {groups} groups to {verb}, between {least} and {most} "
            "allowed"
        )
    return min(max(total, least), most)


def erdos_renyi(shape: Sequence[int]) -> float:
    """Return the density, up to a common factor, that Erdos-Renyi-Kernel gives a weight.

    It is the sum of the sides over their product (Mocanu et al., https://arxiv.org/abs/1707.04780;
    with a convolution's kernel sides, Evci et al., https://arxiv.org/abs/1911.11134).
    """
    return sum(shape) / math.prod(shape)


class Distribution(NamedTuple):
    """How levels differ over the weights of a pool.

    Attributes:
        densities: one a weight: shares kept, up to what all have in common.
        adds: what they have in common is a term; else a positive factor.
    """

    densities: list[float]
    adds: bool = False


def outlier_densities(ratios: Sequence[float]) -> Distribution:
    """Return OWL's distribution: the more outliers a weight has, the more of it is kept.

    The densities lie within ``OWL_SPAN`` of their middle, in proportion to the ratios (Yin et al.,
    https://arxiv.org/abs/2310.05175, with the paper's lambda of 0.08).

    Args:
        ratios: of each weight's elements those that are outliers.
    """
    least, span = min(ratios), max(ratios) - min(ratios)
    return Distribution(
        [2 * OWL_SPAN * (ratio - least) / span if span else 0.0 for ratio in ratios], adds=True
    )


def distribute(
    total: int,
    groups: Sequence[int],
    distribution: Distribution,
    least: Sequence[int],
    most: Sequence[int],
) -> list[int]:
    """Split ``total`` kept groups over weights by their densities, within limits.

    Weight i keeps ``x * densities[i] * groups[i]`` groups, or ``(x + densities[i]) * groups[i]``,
    held within its limits; x is where the counts add up. They are rounded to integers by largest
    remainders, the first weight first, so that the sum is exact.

    Args:
        total: groups to keep, between the sums of ``least`` and ``most``.
        groups: how many each weight has.
        distribution: densities, positive where they have a factor in common.
        least, most: groups that each weight must, and may at most, keep.

    Returns:
        How many groups each weight keeps.
    """
    densities, adds = distribution

    def shares(x: float) -> list[float]:
        return [
            min(max((x + d if adds else x * d) * n, float(low)), float(high))
            for d, n, low, high in zip(densities, groups, least, most, strict=True)
        ]

    low = -max(densities) if adds else 0.0
    high = 1.0 - min(densities) if adds else 1.0 / min(densities)
    # the sum grows with x; 100 halvings leave less than a float can tell
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < total else (low, middle)
    wanted = shares(high)
    counts = [math.floor(share) for share in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda i: counts[i] - wanted[i])
    while (left := total - sum(counts)) > 0:
        room = [i for i in by_remainder if counts[i] < most[i]]
        for i in room[:left]:
            counts[i] += 1
    return counts
