"""How many groups each weight of a pool gives up when some have a least or a most."""

from __future__ import annotations

from collections.abc import Callable, Sequence


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
