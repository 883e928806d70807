"""The search for a magnitude by plain torch, in the host's memory: ``search.py``.

The keys inside the bracket are kept, if they are few, so that nothing need be read again. A thread
handles a piece at a time that stays in its cache.

Reading order: what counts -> pieces -> counts -> the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bits import count_kept
from .search import (
    INFINITY_OF,
    Plan,
    Reduce,
    Threshold,
    bin_shift,
    flat_view,
    plan_of,
    rank_margin,
    sample_step,
    threshold_of,
)

_SAMPLE = 1 << 18  # the least that is sampled
_BINS_FEW = 1 << 12
_CHUNK = 1 << 17  # elements that a thread handles at a time
_KEPT = 1 << 19  # keys that it keeps at most


class Among(NamedTuple):
    """Which elements of a matrix count: those that a compact mask keeps, or prunes."""

    mask: Tensor  # bool, or uint8 with one bit an element
    kept: bool

    def rows(self, at: slice) -> Among:
        return Among(self.mask[at], self.kept)

    def flags(self, cols: int, skip: int, step: int) -> np.ndarray:
        """Return a bool for one element in ``step``, row-major, behind the first ``skip``."""
        bits = self.mask.cpu().numpy()
        if bits.dtype == np.bool_:
            found = bits.reshape(-1)[skip::step]
        elif step == 1:
            found = np.unpackbits(bits, axis=1, count=cols, bitorder="little").reshape(-1)[skip:]
        else:  # all bits of a sample's piece would take more memory than the piece
            row, col = np.divmod(np.arange(skip, len(bits) * cols, step), cols)
            found = bits[row, col >> 3] >> (col & 7).astype(np.uint8) & 1
        return found.astype(np.bool_, copy=False) == self.kept


class _Piece(NamedTuple):
    """Memory that the CPU reads at a time, how many of its elements to skip, and their scale."""

    values: Tensor
    skip: int
    scale: float | None
    among: Among | None = None  # of its rows


def _pieces(
    tensors: Sequence[Tensor], scales: Tensor | None, step: int, among: Among | None = None
) -> list[_Piece]:
    """Divide the tensors; one element in ``step`` will be read, as if all were joined."""
    factors = [None] * len(tensors) if scales is None else scales.tolist()
    pieces, skip = [], 0
    if among is not None:
        (tensor,), (scale,) = tensors, factors
        height = max(1, _CHUNK * step // max(1, tensor.shape[1]))
        for start in range(0, len(tensor), height):
            rows = slice(start, start + height)
            pieces.append(_Piece(tensor[rows], skip, scale, among.rows(rows)))
            skip = (skip - pieces[-1].values.numel()) % step
        return pieces
    for tensor, scale in zip(tensors, factors, strict=True):
        flat = flat_view(tensor)
        if flat is not None:
            parts = flat.split(_CHUNK * step)
        else:
            parts = tensor.split(max(1, _CHUNK * step * tensor.shape[0] // tensor.numel()))
        for values in parts:
            pieces.append(_Piece(values, skip, scale))
            skip = (skip - values.numel()) % step
    return pieces


def _patterns(piece: _Piece, kind: torch.dtype, step: int) -> np.ndarray:
    keys = _patterns_of_all(piece, kind, step)
    if piece.among is None:
        return keys
    flags = piece.among.flags(piece.values.shape[1], piece.skip, step)
    return keys[np.flatnonzero(flags)]


def _patterns_of_all(piece: _Piece, kind: torch.dtype, step: int) -> np.ndarray:
    values = piece.values.detach().reshape(-1)[piece.skip :: step].cpu()
    if kind != torch.float32:
        return values.view(torch.int16).numpy() & 0x7FFF
    if values.dtype == torch.bfloat16:
        x = (values.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    else:
        x = values.numpy().astype(np.float32, copy=False)
    if piece.scale is not None:
        x = x * np.float32(piece.scale)
    return x.view(np.int32) & 0x7FFFFFFF


class _Counts(NamedTuple):
    """Numbers of keys (0 below the bracket, 1 nonfinite, 2 all, 3... bins); the keys inside it."""

    numbers: np.ndarray
    inside: list[np.ndarray] | None  # None if they are too many to keep


def _count(chunks: Iterable[np.ndarray], plan: Plan, lo: int, hi: int, shift: int) -> _Counts:
    infinity = INFINITY_OF[plan.kind]
    below = nonfinite = seen = held = 0
    bins = np.zeros(plan.bins, np.int64)
    inside: list[np.ndarray] = []
    keeps = True

    def add_to_bins() -> None:
        if inside:
            joined = np.concatenate(inside)
            if not keeps:
                inside.clear()
            joined -= lo
            joined >>= shift
            bins[:] += np.bincount(joined, minlength=plan.bins)

    for keys in chunks:
        is_below = keys < lo
        is_inside = (keys < hi) ^ is_below
        seen += keys.size
        below += np.count_nonzero(is_below)
        if keys.max(initial=0) >= infinity:
            nonfinite += np.count_nonzero(keys >= infinity)
        if hi - lo > 1:
            inside.append(keys[np.flatnonzero(is_inside)])
            held += inside[-1].size
        else:
            bins[0] += np.count_nonzero(is_inside)
        if held > _KEPT:
            keeps = False
            add_to_bins()
            held = 0
    add_to_bins()
    numbers = np.concatenate([[below, nonfinite, seen], bins])
    return _Counts(numbers, inside if keeps else None)


def _read(pieces: Sequence[_Piece], plan: Plan, step: int, *bracket: int) -> _Counts:
    """Count one element in ``step``, on as many threads as torch would use."""

    def count(share: Sequence[_Piece]) -> _Counts:
        with np.errstate(all="ignore"):
            return _count((_patterns(p, plan.kind, step) for p in share), plan, *bracket)

    threads = max(1, min(torch.get_num_threads(), 8, len(pieces)))
    if threads == 1:
        return count(pieces)
    with ThreadPoolExecutor(threads) as pool:
        shares = list(pool.map(count, (pieces[n::threads] for n in range(threads))))
    inside = [share.inside for share in shares if share.inside is not None]
    keeps = len(inside) == len(shares)
    numbers = np.sum([share.numbers for share in shares], axis=0)
    return _Counts(numbers, list(chain(*inside)) if keeps else None)


def _search(
    tensors: Sequence[Tensor],
    k: int,
    scales: Tensor | None,
    reduce: Reduce | None,
    among: Among | None = None,
) -> tuple[int, int, int, int]:
    """Return the pattern, keep_ties, nonfinite, and how many full reads it took."""

    def agree(numbers: np.ndarray | list[int]) -> np.ndarray:
        if reduce is None:
            return np.asarray(numbers)
        return reduce(torch.tensor(numbers, device=tensors[0].device)).cpu().numpy()

    plan = plan_of(tensors, scales, reduce)
    total = sum(t.numel() for t in tensors)
    if among is not None:
        (kept,) = count_kept([among.mask])
        total = kept if among.kept else total - kept
    # odd: a power of two would see the same columns of every row
    step = sample_step(total, _SAMPLE) | 1
    total, spread = agree([total, (step - 1) * total]).tolist()
    if k > total:
        raise ValueError(f"select: k must be at most the {total} elements of all ranks, got {k}")
    if not spread:
        # few keys, which are kept: to add up many bins would take longer than to count again
        plan = plan._replace(bins=min(plan.bins, _BINS_FEW))
    pieces = _pieces(tensors, scales, 1, among)
    sample = _pieces(tensors, scales, step, among)
    samples = plan.samples if k and spread else 0
    lo, hi, reads = 0, plan.top if k else 0, 0
    inside, elsewhere = None, np.zeros(2, np.int64)
    while True:
        sampled = samples > 0
        shift = bin_shift(hi - lo, plan.bins)
        if sampled:
            numbers = step * _read(sample, plan, step, lo, hi, shift).numbers
            samples -= 1
        elif inside is None:
            numbers, inside = _read(pieces, plan, 1, lo, hi, shift)
            reads += 1
        else:
            numbers, inside = _count(inside, plan, lo, hi, shift)
            numbers[:2] = np.add(elsewhere, (numbers[0], 0))
        elsewhere = numbers[:2]
        numbers = agree(numbers)
        below, nonfinite, seen = numbers[:3].tolist()
        upto = np.concatenate([[below], below + np.cumsum(numbers[3:])])
        rank, margin = (k * (seen / total), rank_margin(k, total, spread)) if sampled else (k, 0)
        # segment 0 is [0, lo), the last is [hi, top), the bins are those between
        first, final = np.searchsorted(upto, (rank - margin, rank + margin)).tolist()
        left = 0 if first == 0 else min(lo + (first - 1 << shift), hi)
        right = plan.top if final > plan.bins else min(lo + (final << shift), hi)
        if left < lo or right > hi:
            inside = None
        lo, hi = left, right
        if not sampled and (hi - lo <= 1 or k == 0):
            return lo, int(upto[min(final, plan.bins)]) - k, nonfinite, reads


def select_torch(
    tensors: Sequence[Tensor],
    k: int,
    scales: Tensor | None,
    reduce: Reduce | None = None,
    among: Among | None = None,
) -> Threshold:
    *found, _ = _search(tensors, k, scales, reduce, among)
    found = (torch.tensor(n, device=tensors[0].device) for n in found)
    return threshold_of(k, plan_of(tensors, scales).kind, *found)
