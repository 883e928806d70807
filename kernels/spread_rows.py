"""Masks that prune the same share of each row, of rows whose parts lie on several ranks.

``prune_rows`` for tensor parallelism: thousands of rows are searched at once, so that bytes count:
what ranks add up is one number a row and round, which holds several counts.

Reading order: the search -> ties -> masks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .grid import ceil_div
from .prune_rows import Part, row_counts
from .search import INFINITY_OF, Reduce
from .spread import BITS, MOST, keys_of


class RowCut(NamedTuple):
    """Where rows are cut, int64 ``(rows,)`` each.

    Attributes:
        bound: keys from here on are kept.
        room: how many of the keys ``bound - 1`` are kept; 0 where all of them go.
        ties: how many such keys there are, where some are kept.
    """

    bound: Tensor
    room: Tensor
    ties: Tensor


class _Bracket(NamedTuple):
    """Between which keys rows are cut, int64 ``(rows,)`` each.

    Attributes:
        low, high: fewer keys than are pruned lie below the one, more below the other.
        under, upto: how many.
    """

    low: Tensor
    high: Tensor
    under: Tensor
    upto: Tensor


def cut_rows(
    ordered: Tensor, k: Tensor, first: int, across: int, parts: int, bits: int, reduce: Reduce
) -> RowCut:
    """Find where the ``k`` lowest keys of each row end, whose parts lie on several ranks.

    A round counts the keys below several bounds of each row, and goes on between those that its
    cut lies between. The counts of a round share one int64: as many as have room, the more the
    fewer keys are left. The first bounds lie about the mean of the parts' own quantiles, later
    ones about where the cut would be if keys were spread evenly, and one halves what is left, so
    that no keys take more than ``bits`` rounds. Rows that are cut are asked for no more. Normal
    weights of 16 bits take two rounds, of 32 bits five: 24 to 31 bytes a row in all.

    Args:
        ordered: int32, the keys that are here and count, in order within each row.
        k: int64 ``(rows,)`` of all rows, no more than a row has keys.
        first: which row comes first here.
        across: how many keys a row has on all ranks.
        parts: how many parts a row has.
        bits: keys are less than ``2^bits``.
        reduce: adds up over the ranks, in place. Each round waits for the device.
    """
    bound, room, ties = torch.where(k == across, 1 << bits, 0), k * 0, k * 0
    rows = ((k > 0) & (k < across)).nonzero()[:, 0]
    if not len(rows):
        return RowCut(bound, room, ties)

    def here(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of these rows are here, and their keys."""
        at = ((rows >= first) & (rows < first + len(ordered))).nonzero()[:, 0]
        return at, ordered[rows[at] - first]

    at, keys = here(rows)
    middle, reach = _quantiles(keys, k[rows], at, across, parts, bits, reduce)
    none = torch.zeros_like(rows)
    bracket = _Bracket(none, none + (1 << bits), none, none + across)
    while True:
        bounds, below = _counted(keys, at, bracket, middle, reach, reduce)
        bracket = _narrowed(bracket, bounds, below, k[rows])
        low, high, under, upto = bracket
        exact = below == k[rows, None]
        cut = exact.any(1)
        bound[rows] = torch.where(cut, torch.where(exact, bounds, 0).amax(1), high)
        room[rows] = torch.where(cut, 0, upto - k[rows])
        ties[rows] = upto - under

        left = ~(cut | (high - low == 1))
        rows, bracket = rows[left], _Bracket(*(of[left] for of in bracket))
        if not len(rows):
            return RowCut(bound, room, ties)
        at, keys = here(rows)
        low, high, under, upto = (of.double() for of in bracket)
        middle = low + (high - low) * (k[rows] - under) / (upto - under)
        reach = 2 * (high - low) / (upto - under).sqrt()


def _quantiles(
    keys: Tensor, k: Tensor, at: Tensor, across: int, parts: int, bits: int, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """Return about where rows are cut, and how far from there the cut may lie, float64: from each
    part's keys a little before and behind the place that would be its own cut.
    """
    coarse = max(0, bits + (parts - 1).bit_length() - 31)  # so that two sums share a number
    total, own = torch.zeros_like(k), keys.shape[1]
    if len(at):
        place, margin = k[at] * own // across, 1 + int(own**0.5 / 5)
        ends = torch.stack([place - margin, place + margin], 1).clamp_(0, own - 1)
        before, behind = (keys.gather(1, ends).long() >> coarse).unbind(1)
        total[at] = before | behind << 31
    reduce(total)
    before, behind = (ends.double() * 2**coarse / parts for ends in (total & MOST, total >> 31))
    return (before + behind) / 2, behind - before


def _counted(
    keys: Tensor, at: Tensor, bracket: _Bracket, middle: Tensor, reach: Tensor, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """Return bounds within a bracket, and how many keys lie below each, int64 ``(rows, n)``."""
    low, _, under, upto = bracket
    width = int((upto - under).max()).bit_length()
    bounds = _bounds(bracket, middle, reach, 63 // width)
    shifts = width * torch.arange(63 // width, device=low.device)
    total = torch.zeros_like(low)
    from_low = torch.cat([low[:, None], bounds], 1)[at].clamp_(max=MOST).int()
    below = torch.searchsorted(keys, from_low)
    total[at] = (below[:, 1:] - below[:, :1] << shifts).sum(1)
    reduce(total)
    return bounds, (total[:, None] >> shifts & (1 << width) - 1) + under[:, None]


def _bounds(bracket: _Bracket, middle: Tensor, reach: Tensor, count: int) -> Tensor:
    """Return keys within a bracket: all that there are, or else some evenly about ``middle`` and
    the one that halves it.
    """
    low, high = bracket.low[:, None], bracket.high[:, None]
    steps = torch.arange(count, device=low.device)
    bounds = (middle[:, None] + reach[:, None] * (steps / max(count - 1, 1) - 0.5)).long()
    bounds[:, :1] = (low + high) // 2
    bounds = torch.where(high - low <= count + 1, low + 1 + steps, bounds)
    return bounds.maximum(low + 1).minimum(high - 1)


def _narrowed(bracket: _Bracket, bounds: Tensor, below: Tensor, k: Tensor) -> _Bracket:
    """Return the bracket between those of its bounds that ``k`` lies between."""
    low, high, under, upto = (of[:, None] for of in bracket)
    before, behind = below < k[:, None], below > k[:, None]
    return _Bracket(
        torch.where(before, bounds, low).amax(1),
        torch.where(behind, bounds, high).amin(1),
        torch.where(before, below, under).amax(1),
        torch.where(behind, below, upto).amin(1),
    )


def _before(number: Tensor, most: Tensor, slot: int, slots: int, reduce: Reduce) -> Tensor:
    """Return how many each row has on the ranks before this one, of what each has here.

    Args:
        number: int64 ``(rows,)``.
        most: how many a row has in all.
        slot: which of the ``slots`` parts is here.
        reduce: adds up over the ranks, in place.
    """
    width = int(most.max()).bit_length()
    share = 63 // width
    told = torch.zeros(
        len(number), ceil_div(slots, share), dtype=torch.int64, device=number.device
    )
    told[:, slot // share] = number << width * (slot % share)
    reduce(told)
    shifts = width * torch.arange(share, device=number.device)
    every = (told[:, :, None] >> shifts & (1 << width) - 1).flatten(1)
    return every[:, :slot].sum(1)


def prune_rows_spread(
    scores: Tensor,
    k: int,
    place: tuple[Part, Part],
    edges: Sequence[int],
    counted: bool,
    reduce: Reduce,
) -> tuple[Tensor, Tensor]:
    """Mask the lowest magnitudes of each row of a matrix whose rows lie on several ranks, as
    ``prune_rows``. The ranks add up some 30 bytes a row (``cut_rows``), and where a row's ties are
    parted some bits for each part of it. Scratch: 12 bytes an element that is here, on a GPU 16
    while its rows are sorted.

    Args:
        scores: what is here of the matrix.
        k: how many elements of the whole are pruned.
        place: which rows and which columns of the whole are here.
        edges: the first column of each part, and behind them the number of columns.
        counted: whether this rank's part counts.
        reduce: adds up over the ranks, in place.

    Returns:
        The bool mask of what is here; int64, 0-d, how many scores that are here are NaN or Inf.
    """
    (first, rows), (left, across) = place
    keys, bits, infinity = _row_keys(scores)
    device = scores.device
    pruned = torch.from_numpy(row_counts(k, rows)).to(device)
    here = slice(first, first + len(scores))
    ordered = _in_order(keys if counted and keys.shape[1] else keys[:0])
    parts = sum(a < b for a, b in pairwise(edges))
    cut = cut_rows(ordered, pruned, first, across, parts, bits, reduce)
    # keys from `bound` on are kept, and of those just below it, which are alike, the first `room`
    keep = keys >= cut.bound[here, None]
    tied = cut.room.nonzero()[:, 0]
    if len(tied):
        local = (tied >= first) & (tied < here.stop)
        own = tied[local] - first
        equal = keys[own] == cut.bound[tied[local], None] - 1
        number = torch.zeros_like(tied)
        number[local] = equal.sum(1)
        slots = len(edges) - 1
        slot = min(bisect_right(edges, left), slots) - 1  # of no columns: any
        before = _before(number * counted, cut.ties[tied], slot, slots, reduce)
        room = (cut.room[tied] - before)[local]
        keep[own] |= equal & (equal.cumsum(1, dtype=torch.int32) <= room[:, None])
    return keep, (keys >= infinity).sum()


def _row_keys(scores: Tensor) -> tuple[Tensor, int, int]:
    """Return int32 bit patterns that order as ``|scores|``, how many bits they have, and that of
    infinity.
    """
    if scores.dtype in (torch.bfloat16, torch.float16):
        keys = (scores.detach().contiguous().view(torch.int16) & 2**15 - 1).int()
        return keys, 15, INFINITY_OF[scores.dtype]
    return keys_of(scores, None), BITS, INFINITY_OF[torch.float32]


def _in_order(keys: Tensor) -> Tensor:
    """Return the keys of each row in order."""
    if keys.is_cpu:  # numpy's is several times as fast
        return torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return keys.sort(dim=1).values
