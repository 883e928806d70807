"""Exact selection among keys that lie on several ranks, many pools at a time, by counts alone.

A key is an integer of a known number of bits, and is searched a digit of some bits a pass: of each
pool the ranks add up how many keys lie below the values that the digit can have. What that sends
depends on the number of pools alone. Many bits are few passes, but many counts; ``select`` moves a
histogram a pool, which pays where there is one pool. The same search finds where ties end: its
keys are their positions.

Reading order: the search -> thresholds of tensors -> ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .bits import chunk_of, chunks
from .grid import ceil_div
from .prune_rows import Part
from .search import INFINITY_OF, Reduce, Threshold

_INFINITY = INFINITY_OF[torch.float32]
BITS, MOST = 31, 2**31 - 1  # of a key; no number is so great
MOST_SENT = 1 << 20  # bytes of all counts of a search, if it does not take two bits a pass
TIES_DIGIT = 3  # bits: each bound of a position reads a row


def digit_of(pools: int) -> int:
    """Return the bits of a digit by which the keys of so many pools are searched."""
    for digit in (8, 6, 4):
        if pools * search_bytes(BITS, digit) <= MOST_SENT:
            return digit
    return 2


def search_bytes(bits: int, digit: int) -> int:
    """Return how many bytes of counts the search of one pool adds up."""
    return 8 * ceil_div(bits, digit) * (2**digit - 1)


def kth_key(
    below: Callable[[Tensor, int], Tensor], k: Tensor, bits: int, digit: int, reduce: Reduce
) -> Tensor:
    """Return of each pool the ``k``-th smallest key, int64 ``(pools,)``; 0 where ``k`` is 0.

    Args:
        below: from ``low``, int64 ``(pools,)``, and ``shift`` how many keys that are here lie
            below ``low + (n << shift)``, int64 ``(pools, 2^digit - 1)``, for n from 1 on.
        k: int64 ``(pools,)``, no more than a pool has keys in all.
        bits: keys are less than ``2^bits``.
        digit: bits that a pass finds.
        reduce: adds up over the ranks, in place.
    """
    low = torch.zeros_like(k)
    for shift in reversed(range(0, bits, digit)):
        low += (reduce(below(low, shift)) < k[:, None]).sum(1) << shift
    return low


def keys_of(scores: Tensor, scale: Tensor | None) -> Tensor:
    """Return int32 bit patterns that order as ``float32(|scores|) * scale``."""
    sizes = scores.detach().abs().float()
    return (sizes if scale is None else sizes.mul_(scale)).view(torch.int32)


def select_spread(
    tensors: Sequence[Tensor],
    ks: Sequence[int],
    scales: Tensor | None,
    counted: Sequence[bool],
    reduce: Reduce,
) -> Threshold:
    """Find the threshold of each tensor: the ``ks``-th smallest key of what all ranks have of it.
    Waits for the device.

    Args:
        tensors: scores, what is here; ``scales`` a factor of each or None.
        ks: how many of all are pruned.
        counted: of each, whether this rank's part counts.
        reduce: adds up over the ranks, in place.

    Returns:
        As ``select``'s, a vector each.
    """
    device = tensors[0].device
    k = torch.tensor(ks, dtype=torch.int64, device=device)
    factors = [None] * len(ks) if scales is None else scales.unbind()
    digit = digit_of(len(ks))
    most = 2**digit - 1

    def here() -> Iterator[tuple[int, Tensor]]:
        """Yield the keys that count, chunk by chunk, each with the place of its tensor."""
        for i, (tensor, factor) in enumerate(zip(tensors, factors, strict=True)):
            for at in chunks(tensor.shape, chunk_of(device)) if counted[i] else ():
                yield i, keys_of(tensor[at], factor)

    def below(low: Tensor, shift: int) -> Tensor:
        found, own = k.new_zeros(len(ks), most + 2), low.int()
        for i, keys in here():
            digits = keys.sub_(own[i]).bitwise_right_shift_(shift).clamp_(-1, most).add_(1)
            found[i] += digits.flatten().bincount(minlength=most + 2)
        return found.cumsum(1)[:, 1:-1].contiguous()

    value = kth_key(below, k, BITS, digit, reduce)
    bounds = torch.stack([value + 1, torch.full_like(value, _INFINITY)], 1)
    ends, own = torch.zeros_like(bounds), bounds.clamp(max=MOST).int()
    for i, keys in here():
        ends[i] += torch.stack([(keys < bound).count_nonzero() for bound in own[i]])
    ends = reduce(ends)
    sizes = torch.tensor(
        [t.numel() * c for t, c in zip(tensors, counted, strict=True)], device=device
    )
    keep = torch.where(k > 0, ends[:, 0] - k, 0)
    values = torch.where(k > 0, value.int().view(torch.float32), -torch.inf)
    return Threshold(values, keep, reduce(sizes) - ends[:, 1])


def ties_kept(
    tensors: Sequence[Tensor],
    threshold: Threshold,
    scales: Tensor | None,
    places: Sequence[tuple[Part, Part]],
    counted: Sequence[bool],
    reduce: Reduce,
) -> Tensor:
    """Return how many of the keys that equal a threshold are kept of what is here of each tensor.

    The first are kept in the order of the tensors and, within one, of its rows, however it lies on
    the ranks: those before one position of the whole, which every rank can count to. Only of
    tensors of which some are kept and others are not the position is searched; of one threshold
    for all that is one. Waits for the device.

    Args:
        tensors, scales, counted, reduce: as ``select_spread``'s.
        threshold: of all tensors, or of each: what ``keep_ties`` counts.
        places: of each tensor which rows and which columns of the whole are here.
    """
    device = tensors[0].device
    values = threshold.value.expand(len(tensors)).contiguous().view(torch.int32)
    factors = [None] * len(tensors) if scales is None else scales.unbind()
    rows = []  # of each, how many keys of the first n rows are equal
    for tensor, factor, value in zip(tensors, factors, values, strict=True):
        equal = (keys_of(tensor, factor) == value).sum(1)
        rows.append(torch.nn.functional.pad(equal.cumsum(0), (1, 0)))
    here = torch.stack([own[-1] for own in rows])
    ties = reduce(here * here.new_tensor(counted))
    before = ties.cumsum(0) - ties if threshold.keep_ties.numel() == 1 else 0
    keep = (threshold.keep_ties - before).clamp(min=0).minimum(ties)
    kept = torch.where(keep < ties, 0, here)
    parted = [i for i, (n, of) in enumerate(torch.stack([keep, ties], 1).tolist()) if 0 < n < of]
    if not parted:
        return kept

    def equal_before(bounds: Tensor) -> Tensor:
        """Count the ties that are here before positions of the whole, (len(parted), n)."""
        found = torch.zeros_like(bounds)
        for out, i, positions in zip(found, parted, bounds, strict=True):
            if not tensors[i].numel():
                continue
            (first, _), (left, across) = places[i]
            row = positions // across - first
            inside = row.clamp(0, len(tensors[i]) - 1)
            columns = torch.arange(left, left + tensors[i].shape[1], device=device)
            part = columns < (positions % across)[:, None]
            part &= (keys_of(tensors[i][inside], factors[i]) == values[i]) & (row == inside)[
                :, None
            ]
            out.copy_(rows[i][row.clamp(0, len(tensors[i]))] + part.sum(1))
        return found

    spoken = torch.tensor([[counted[i]] for i in parted], device=device)
    wholes = [places[i][0].rows * places[i][1].rows for i in parted]
    steps = torch.arange(1, 2**TIES_DIGIT, device=device)
    last = kth_key(
        lambda low, shift: equal_before(low[:, None] + (steps << shift)) * spoken,
        *(keep[parted], max(wholes).bit_length(), TIES_DIGIT, reduce),
    )
    kept[parted] = equal_before(last[:, None] + 1)[:, 0]
    return kept
