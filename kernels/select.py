"""Exact selection: the k-th smallest magnitude of a list of tensors, without sorting or joining.

``key = float32(|t|) * scale``. Keys that are no NaN order as their bit patterns do: 31 bits, or 15
if all tensors are of one 16-bit type and unscaled. So this is a search over integers, which
narrows a bracket of patterns until one is left.

1. A sample (everything, if that is little) is counted into bins: over all patterns and, if these
   are more than the bins, again over the bracket that this gave, k -+ six standard deviations. Of
   everything the bracket is a single pattern then, and nothing follows.
2. A full read counts the keys below the bracket, and by bin those inside. As a rule each pattern
   of the bracket has its own bin, and k's bin is the answer: one read.
3. If k turns out to lie outside the bracket (the counts of a full read are exact, so this shows)
   or in a bin of several patterns, the next full read goes on with the part that holds it.

Floor: one read, ``sum(numel * itemsize)`` bytes; the samples add 1/64 of that, or 1/32, to large
lists. At most two full reads for patterns of 15 bits, which have a bin each, and three for those
of 31. On the GPU all passes are launched, and those with nothing left to do return before they
read: nothing waits for the host.

No ``tl.histogram``: 2048 bins cost it 64 population counts an element, some 35 times the read.
Only the few keys inside the bracket are binned, by integer additions to memory, whose sums do not
depend on their order. A bracket of one or two 16-bit patterns, as a large sample leaves, takes no
bins: keys are compared with its bounds two at a time, 8 instructions an element instead of 19.

Reading order: reference -> kernels -> launcher -> plain torch -> operator -> public function.
"""

# in a kernel one constexpr decides what is bound and what is used
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bits import count_kept
from .grid import ceil_div
from .launch import FUSED, Backend, is_plain, on_device, tl, triton, upload, use_triton
from .table import addresses, alike
from .tiles import device_of

Reduce = Callable[[Tensor], Tensor]

# the pattern of +Inf; larger ones are NaN
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_BINS_LOG2 = 18
# The least that is sampled: on the GPU enough for a bracket of fewer patterns than bins. The CPU
# keeps the keys inside its bracket, so that it need not read again.
_SAMPLE, _SAMPLE_CPU = 1 << 21, 1 << 18
_WHOLE = 1 << 24  # elements: two reads of no more are over before the launches for a sample are
_BINS_FEW = 1 << 12
BINS_SHARED = 1 << 17  # where ranks add them up: a megabyte
_CHUNK = 1 << 17  # elements that a CPU thread handles at a time: they stay in its cache
_KEPT = 1 << 19  # keys that it keeps at most

_HEADER = 4  # counts before the bins
_COARSE = 512  # groups of bins, searched first
NARROW_WARPS = 16  # of one program: a thread has few bins, and spills nothing
_SEARCH = 256  # tensors of the list that a program looks at together to find where it begins
_LO, _KEEP_TIES, _NONFINITE, _READS = 1, 6, 7, 8  # what the host takes from the state


class Threshold(NamedTuple):
    """What separates the k smallest keys from the others.

    Attributes:
        value: 0-d float32, the k-th smallest key; -inf if k is 0.
        keep_ties: 0-d int64, how many of the keys equal to ``value`` are not among the k smallest.
        nonfinite: 0-d int64, how many keys are NaN or Inf; if any, the others mean nothing.
    """

    value: Tensor
    keep_ties: Tensor
    nonfinite: Tensor


def select_reference(tensors: Sequence[Tensor], k: int, scales: Tensor | None = None) -> Threshold:
    """Define the semantics: plain torch, any device, on data small enough to join and sort."""
    keys = torch.cat([t.detach().abs().float().flatten() for t in tensors])
    if scales is not None:
        keys *= scales.repeat_interleave(
            torch.tensor([t.numel() for t in tensors], device=scales.device)
        )
    value = keys.sort().values[k - 1] if k else keys.new_tensor(-torch.inf)
    return Threshold(value, (keys <= value).sum() - k, (~keys.isfinite()).sum())


# The kernels' int64 vectors.
#
# State: 0 done; 1 lo, 2 hi: the answer is in [lo, hi); 3 start, 4 last: patterns in [start, last)
# are binned; 5 shift: a bin holds 2^shift patterns; 6 keep_ties; 7 nonfinite; 8 full reads so far.
# If start > lo or last < hi, that end of the bracket is a pattern which many keys may share: these
# are compared and counted in registers, as additions to one address queue up.
#
# Counts: 0 keys below start; 1 equal to lo; 2 equal to hi - 1; 3 nonfinite (or whether there are
# any, which is cheaper, and then the next full read counts them); 4... bins.
#
# Table: n addresses, n sizes, n positions in the list, n + 1 first tiles.


@triton.jit
def _count_pairs(
    table_ptr,
    first_tile_ptr,
    counts_ptr,
    i,
    tile,
    end,
    tensors,
    lo,
    hi,
    start,
    last,
    INFINITY: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Count 16-bit patterns, two in a word, against a bracket [lo, hi) of one or two.

    So narrow the first full read of a long list finds it. A pattern with the 16th bit set, less a
    bound, keeps that bit if it reaches the bound, and borrows nothing from its neighbour.
    """
    PAIR: tl.constexpr = 0x10001
    offs_r = tl.arange(0, ROWS)
    offs_w = tl.arange(0, WORDS)
    size_of_tile: tl.constexpr = ROWS * WORDS * 2
    seen = tl.zeros((), tl.int64)
    from_lo = tl.zeros((), tl.int64)
    from_next = tl.zeros((), tl.int64)
    from_second = tl.zeros((), tl.int64)
    reached = tl.zeros((ROWS,), tl.int32)
    while tile < end:
        x_ptr = tl.multiple_of(tl.load(table_ptr + i).to(tl.pointer_type(tl.int32)), 16)
        size = tl.load(table_ptr + tensors + i)
        first = tl.load(first_tile_ptr + i)
        stop = tl.load(first_tile_ptr + i + 1)
        # before a half of a word could overflow, by 4 a tile
        part = tl.minimum(tl.minimum(stop, end), tile + 8192)
        at_lo = tl.zeros((ROWS,), tl.int32)
        at_next = tl.zeros((ROWS,), tl.int32)
        at_second = tl.zeros((ROWS,), tl.int32)
        for t in range(tile - first, part - first):
            offset = tl.full((), size_of_tile, tl.int64) * t
            left = tl.minimum(size - offset, size_of_tile).to(tl.int32)
            x = tl.load(
                x_ptr + offset // 2 + offs_r[None, :] * WORDS + offs_w[:, None],
                mask=(offs_r * (2 * WORDS) < left)[None, :] & (offs_w >= 0)[:, None],
                other=0,  # as small as any
            )  # [WORDS, ROWS]
            x = (x & 0x7FFF7FFF) | -0x7FFF8000
            at_lo += tl.sum((x - lo * PAIR) >> 15 & PAIR, 0)
            at_next += tl.sum((x - (lo + 1) * PAIR) >> 15 & PAIR, 0)
            at_second += tl.sum((x - (lo + 2) * PAIR) >> 15 & PAIR, 0)
            reached |= tl.reduce(x - INFINITY * PAIR, 0, _either)
            seen += left
        from_lo += tl.sum(((at_lo & 0xFFFF) + (at_lo >> 16)).to(tl.int64))
        from_next += tl.sum(((at_next & 0xFFFF) + (at_next >> 16)).to(tl.int64))
        from_second += tl.sum(((at_second & 0xFFFF) + (at_second >> 16)).to(tl.int64))
        i += (part == stop).to(tl.int32)
        tile = part
    # what lies past an end counts as zeros, which nothing but a bound of 0 counts
    from_lo = tl.where(lo == 0, seen, from_lo)
    equal_lo = from_lo - from_next
    equal_next = tl.where(hi - lo == 2, from_next - from_second, 0)
    tied = start > lo
    tl.atomic_add(counts_ptr, seen - tl.where(tied, from_next, from_lo), sem="relaxed")
    tl.atomic_add(counts_ptr + tl.where(tied, 1, 4), equal_lo, sem="relaxed")
    tl.atomic_add(counts_ptr + tl.where(last < hi, 2, 5), equal_next, sem="relaxed")
    nonfinite = tl.sum(((reached & -0x7FFF8000) != 0).to(tl.int64))
    tl.atomic_add(counts_ptr + 3, nonfinite, sem="relaxed")


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["tensors", "stride"])
def _count_kernel(
    table_ptr,
    scales_ptr,
    state_ptr,
    counts_ptr,
    tensors,
    stride,
    DTYPE: tl.constexpr,
    PATTERN: tl.constexpr,
    INFINITY: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    SAMPLED: tl.constexpr,
    COUNT_NONFINITE: tl.constexpr,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    RUN: tl.constexpr,
    SEARCH: tl.constexpr,
    PAIRS: tl.constexpr,
):
    lo = tl.load(state_ptr + 1).to(tl.int32)
    hi = tl.load(state_ptr + 2).to(tl.int32)
    start = tl.load(state_ptr + 3).to(tl.int32)
    last = tl.load(state_ptr + 4).to(tl.int32)
    shift = tl.load(state_ptr + 5).to(tl.int32)
    # no key is -1
    lo_tie = tl.where(start > lo, lo, -1)
    hi_tie = tl.where(last < hi, last, -1)
    has_ties = (lo_tie >= 0) | (hi_tie >= 0)
    width = (last - start).to(tl.uint32)

    first_tile_ptr = table_ptr + 3 * tensors
    # a finished search has no tiles left
    tiles = tl.where(tl.load(state_ptr) != 0, 0, tl.load(first_tile_ptr + tensors))
    pid = tl.program_id(0).to(tl.int64)
    tile = tiles * pid // tl.num_programs(0)
    end = tiles * (pid + 1) // tl.num_programs(0)
    i = -1
    for start_n in range(0, tensors, SEARCH):
        offs_n = start_n + tl.arange(0, SEARCH)
        first_tiles = tl.load(first_tile_ptr + offs_n, mask=offs_n < tensors, other=1 << 62)
        i += tl.sum((first_tiles <= tile).to(tl.int32))

    counts_ptr += (pid % COPIES) * (4 + BINS)
    # the full read of a list of one 16-bit type, if all goes as it should
    # (in two conditions, as the first alone is known when compiling)
    if PAIRS and ALIGNED and not SAMPLED and not COUNT_NONFINITE:  # noqa: SIM102
        if hi > lo and hi - lo <= 2:
            _count_pairs(
                table_ptr, first_tile_ptr, counts_ptr, i, tile, end, tensors, lo, hi, start, last,
                INFINITY, ROWS, VEC // 2,
            )  # fmt: skip
            end = tile
    weight = tl.full((), 1, tl.int64) * stride
    offs_r = tl.arange(0, ROWS)
    offs_v = tl.arange(0, VEC)
    below = tl.zeros((ROWS,), tl.int32)
    at_lo = tl.zeros((ROWS,), tl.int32)
    at_hi = tl.zeros((ROWS,), tl.int32)
    nonfinite = tl.zeros((ROWS,), tl.int32)
    largest = tl.zeros((ROWS,), tl.int32)
    while tile < end:
        x_ptr = tl.load(table_ptr + i).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            # the compiler knows nothing of an address that was loaded
            x_ptr = tl.multiple_of(x_ptr, 16)
        size = tl.load(table_ptr + tensors + i)
        first = tl.load(first_tile_ptr + i)
        stop = tl.minimum(tl.load(first_tile_ptr + i + 1), end)
        if SCALED:
            scale = tl.load(scales_ptr + tl.load(table_ptr + 2 * tensors + i))
        for t in range(tile - first, stop - first):
            # 64-bit up to the tile, 32-bit inside it
            offset = weight * (ROWS * VEC) * t
            left = tl.minimum(size - offset, ROWS * VEC * stride).to(tl.int32)
            row = offs_r
            if SAMPLED:
                # one run of every `stride`, drawn: a fixed step would see the same columns only
                run = offs_r // RUN
                draw = tl.randint(0, ((first + t) * (ROWS // RUN)).to(tl.int32) + run)
                run = run * stride + (draw.to(tl.int32) & (stride - 1))
                row = run * RUN + offs_r % RUN
            # sizes are multiples of VEC: one predicate a vector lets it be one load
            in_row = row * VEC < left
            x = tl.load(
                x_ptr + offset + row[None, :] * VEC + offs_v[:, None],
                mask=in_row[None, :] & (offs_v >= 0)[:, None],
                other=float("nan") if DTYPE.is_floating() else PATTERN,
            )  # [VEC, ROWS]; NaN, being above every bracket, is counted nowhere
            if DTYPE.is_floating():
                x = x.to(tl.float32)
                if SCALED:
                    x *= scale
                x = x.to(tl.int32, bitcast=True)
            key = x.to(tl.int32) & PATTERN
            above = key - start
            below += tl.sum((above < 0).to(tl.int32), 0)
            if COUNT_NONFINITE:
                nonfinite += tl.where(in_row, tl.sum((key >= INFINITY).to(tl.int32), 0), 0)
            else:
                largest = tl.maximum(largest, tl.where(in_row, tl.max(key, 0), 0))
            if has_ties:
                at_lo += tl.sum((key == lo_tie).to(tl.int32), 0)
                at_hi += tl.sum((key == hi_tie).to(tl.int32), 0)
            in_bins = above.to(tl.uint32, bitcast=True) < width
            offs_b = above if BINS > PATTERN else above >> shift
            tl.atomic_add(counts_ptr + 4 + offs_b, weight, mask=in_bins, sem="relaxed")
        tile = stop
        i += 1
    tl.atomic_add(counts_ptr, tl.sum(below.to(tl.int64)) * weight, sem="relaxed")
    tl.atomic_add(counts_ptr + 1, tl.sum(at_lo.to(tl.int64)) * weight, sem="relaxed")
    tl.atomic_add(counts_ptr + 2, tl.sum(at_hi.to(tl.int64)) * weight, sem="relaxed")
    if not COUNT_NONFINITE:
        nonfinite = (largest >= INFINITY).to(tl.int32)
    tl.atomic_add(counts_ptr + 3, tl.sum(nonfinite.to(tl.int64)), sem="relaxed")


@triton.jit
def _locate(
    rank,
    state_ptr,
    counts_ptr,
    coarse_ptr,
    TOP: tl.constexpr,
    BINS: tl.constexpr,
    COARSE: tl.constexpr,
):
    """Return the patterns [left, right) that hold the key of ``rank``; keys before, up to it."""
    below_start = tl.load(counts_ptr)
    at_lo = tl.load(counts_ptr + 1)
    at_hi = tl.load(counts_ptr + 2)
    lo = tl.load(state_ptr + 1)
    hi = tl.load(state_ptr + 2)
    start = tl.load(state_ptr + 3)
    last = tl.load(state_ptr + 4)
    shift = tl.load(state_ptr + 5)

    FINE: tl.constexpr = BINS // COARSE
    offs_c = tl.arange(0, COARSE)
    offs_f = tl.arange(0, FINE)
    coarse = tl.load(coarse_ptr + offs_c)
    short = below_start + tl.cumsum(coarse, 0) < rank
    c = tl.minimum(tl.sum(short.to(tl.int32)), COARSE - 1)
    before = below_start + tl.sum(tl.where(offs_c < c, coarse, 0))
    fine = tl.load(counts_ptr + 4 + c * FINE + offs_f)
    short = before + tl.cumsum(fine, 0) < rank
    f = tl.minimum(tl.sum(short.to(tl.int32)), FINE - 1)
    before += tl.sum(tl.where(offs_f < f, fine, 0))
    upto = before + tl.sum(tl.where(offs_f == f, fine, 0))
    left = start + ((c * FINE + f).to(tl.int64) << shift)
    right = tl.minimum(left + (tl.full((), 1, tl.int64) << shift), last)

    below_last = below_start + tl.sum(coarse)
    if rank <= below_start:
        left, right, before, upto = lo, start, below_start - at_lo, below_start
    if rank <= below_start - at_lo:
        left, right, before, upto = lo * 0, lo, at_lo * 0, below_start - at_lo
    if rank > below_last:
        left, right, before, upto = last, hi, below_last, below_last + at_hi
    if rank > below_last + at_hi:
        left, right, before, upto = hi, hi * 0 + TOP, below_last + at_hi, below_last + at_hi
    return left, right, before, upto


@triton.jit(do_not_specialize=["k"])
def _narrow_kernel(
    state_ptr,
    counts_ptr,
    coarse_ptr,
    pool_ptr,
    out_ptr,
    k,
    SAMPLED: tl.constexpr,
    COUNT_NONFINITE: tl.constexpr,
    TOP: tl.constexpr,
    BINS: tl.constexpr,
    COARSE: tl.constexpr,
):
    total = tl.load(pool_ptr)
    spread = tl.load(pool_ptr + 1) if SAMPLED else total * 0
    exact = spread == 0
    if SAMPLED:
        # as in _margin
        share = k / tl.maximum(total, 1).to(tl.float32)
        margin = 6 * tl.sqrt(spread * share * (1 - share)) + 64 * (spread / tl.maximum(total, 1))
        margin = tl.ceil(margin).to(tl.int64)
        lo, _, before, _ = _locate(
            k - margin, state_ptr, counts_ptr, coarse_ptr, TOP, BINS, COARSE
        )
        _, hi, _, upto = _locate(k + margin, state_ptr, counts_ptr, coarse_ptr, TOP, BINS, COARSE)
    else:
        lo, hi, before, upto = _locate(k, state_ptr, counts_ptr, coarse_ptr, TOP, BINS, COARSE)

    has_ties = upto - before > total // 32
    start = tl.where(has_ties, lo + 1, lo)
    last = tl.where(has_ties, tl.maximum(hi - 1, start), hi)
    # the narrowest bins that reach across
    reach = tl.full((16,), BINS, tl.int64) << tl.arange(0, 16)
    shift = tl.sum((reach < last - start).to(tl.int64))

    nonfinite = tl.load(counts_ptr + 3)
    was_done = tl.load(state_ptr)
    running = was_done == 0
    # nothing is between them if k falls among NaN
    found = exact & (hi - lo <= 1)
    if not COUNT_NONFINITE:
        found = found & (nonfinite == 0)
    tl.store(out_ptr, was_done | found.to(tl.int64))
    tl.store(out_ptr + 1, tl.where(running, lo, tl.load(state_ptr + 1)))
    tl.store(out_ptr + 2, tl.where(running, hi, tl.load(state_ptr + 2)))
    tl.store(out_ptr + 3, tl.where(running, start, tl.load(state_ptr + 3)))
    tl.store(out_ptr + 4, tl.where(running, last, tl.load(state_ptr + 4)))
    tl.store(out_ptr + 5, tl.where(running, shift, tl.load(state_ptr + 5)))
    tl.store(out_ptr + 6, tl.where(running, upto - k, tl.load(state_ptr + 6)))
    tl.store(out_ptr + 7, tl.where(running & exact, nonfinite, tl.load(state_ptr + 7)))
    tl.store(out_ptr + 8, tl.load(state_ptr + 8) + (running & exact).to(tl.int64))


class _Plan(NamedTuple):
    """What a search works with: the type whose bit patterns are compared, and what follows."""

    kind: torch.dtype
    top: int  # the end of the patterns that can be found: +Inf can, NaN cannot
    bins: int
    samples: int  # sampled passes that it takes to tell single patterns apart


def _plan(tensors: Sequence[Tensor], scales: Tensor | None, reduce: Reduce | None = None) -> _Plan:
    kinds = {t.dtype for t in tensors}
    narrow = scales is None and kinds in ({torch.bfloat16}, {torch.float16})
    kind = kinds.pop() if narrow else torch.float32
    bits = 8 * kind.itemsize - 1
    samples = 1 if bits <= _BINS_LOG2 else 2
    bins = 1 << min(bits, _BINS_LOG2)
    bins = bins if reduce is None else min(bins, BINS_SHARED)
    return _Plan(kind, _INFINITY[kind] + 1, bins, samples)


def _shift(width: int, bins: int) -> int:
    """Return log2 of the narrowest bins that reach across ``width`` patterns."""
    return max(0, (width - 1).bit_length() - (bins - 1).bit_length())


def _margin(k: int, total: int, spread: int) -> float:
    """Return six standard deviations of a sampled rank, and some for the extremes.

    Of ``total`` elements one in ``step`` was sampled; ``spread = (step - 1) * total``.
    """
    return 6 * (spread * (k / total) * (1 - k / total)) ** 0.5 + 64 * spread / total


def _sample_step(total: int, least: int) -> int:
    """Return of how many elements one is sampled: of 64, within limits."""
    return max(1, total // min(max(total // 64, least), 2 * _SAMPLE))


def _flat(tensor: Tensor) -> Tensor | None:
    """Return a view of the elements in the order of memory; None if there are gaps or overlaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    dense = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return dense.view(-1) if dense.is_contiguous() else None


class _Launch(NamedTuple):
    """One launch of the count kernel: memory of one dtype, all of it aligned or none."""

    dtype: torch.dtype
    aligned: bool
    rows: int
    vec: int
    step: int
    pieces: int
    tiles: int
    table: Tensor


def _launches(tensors: Sequence[Tensor], step: int) -> list[_Launch]:
    """Divide flat tensors into whole aligned 16-byte vectors and the rest; lay tiles over both."""
    address, size = addresses(tensors), np.array([t.numel() for t in tensors])
    launches = []
    for dtype, at in alike(t.dtype for t in tensors).items():
        begin, length, position = address[at], size[at], np.array(at)
        whole = np.where(begin % 16 == 0, length - length % (16 // dtype.itemsize), 0)
        aligned = begin, whole, position
        tails = begin + whole * dtype.itemsize, length - whole, position
        for is_aligned, pieces in ((True, aligned), (False, tails)):
            pieces = np.stack(pieces)[:, pieces[1] > 0]
            if not pieces.size:
                continue
            rows, vec = (512, 16 // dtype.itemsize) if is_aligned else (2048, 1)
            ends = ceil_div(pieces[1], rows * vec * step).cumsum()
            table = _upload(np.concatenate([pieces.ravel(), [0], ends]), tensors[0].device)
            sizes = rows, vec, step, pieces.shape[1], int(ends[-1])
            launches.append(_Launch(dtype, is_aligned, *sizes, table))
    return launches


def _upload(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    return upload(torch.from_numpy(np.array(values, np.int64)), device)


def _launch_count(
    launch: _Launch,
    plan: _Plan,
    scales: Tensor | None,
    state: Tensor,
    counts: Tensor,
    exactly: bool,
) -> None:
    programs = 3
    if state.is_cuda:
        # as many as run at a time, at up to 96 registers a thread
        programs = 5 * torch.cuda.get_device_properties(state.device).multi_processor_count
    dtype = str(launch.dtype).removeprefix("torch.")
    if launch.dtype == plan.kind and scales is None:
        dtype = f"int{8 * launch.dtype.itemsize}"
    _count_kernel[(min(programs, launch.tiles),)](
        launch.table, scales, state, counts, launch.pieces, launch.step,
        DTYPE=getattr(tl, dtype), PATTERN=2 ** (8 * plan.kind.itemsize - 1) - 1,
        INFINITY=_INFINITY[plan.kind], ALIGNED=launch.aligned, SCALED=scales is not None,
        SAMPLED=launch.step > 1, COUNT_NONFINITE=exactly, BINS=plan.bins, COPIES=len(counts),
        # 32 bytes are sampled at one place: a sector
        ROWS=launch.rows, VEC=launch.vec, RUN=32 // (launch.vec * launch.dtype.itemsize),
        SEARCH=_SEARCH,
        # elsewhere than on Hopper the two ways together spill
        PAIRS=plan.kind.itemsize == 2 and device_of(state).capability[0] == 9,
    **FUSED,)  # fmt: skip


def _search_triton(
    tensors: Sequence[Tensor], k: int, scales: Tensor | None, reduce: Reduce | None
) -> Tensor:
    """Return the final state; nothing here waits for the device."""
    device = tensors[0].device
    plan = _plan(tensors, scales, reduce)
    total = sum(t.numel() for t in tensors)
    # a power of two, so that a masked random number is uniform
    step = 1 << _sample_step(total, _SAMPLE).bit_length() - 1
    if total <= _WHOLE and reduce is None:
        step = 1
    # unless something is sampled, the first read finds the bin, the second the pattern
    passes = 2 * plan.samples + 1 if step > 1 or reduce is not None else plan.samples
    # several copies of the bins, where many additions would meet at few addresses
    copies = 1 if total <= _SAMPLE else (1 << 20) // plan.bins
    flat = [t if t.is_contiguous() or _flat(t) is not None else t.contiguous() for t in tensors]
    scales = None if scales is None else scales.contiguous()
    with on_device(tensors[0]):
        full = _launches(flat, 1)
        sample = _launches(flat, step) if step > 1 else full
        pool = _upload([total, (step - 1) * total], device)
        if reduce is not None:
            pool = reduce(pool)
        hi = plan.top if k else 0
        state = _upload([0, 0, hi, 0, hi, _shift(hi, plan.bins), 0, 0, 0], device)
        size = copies, _HEADER + plan.bins
        fresh = torch.zeros(passes, *size, dtype=torch.int64, device=device).unbind()
        for n, counts in enumerate(fresh) if k else [(plan.samples + 1, fresh[0])]:
            sampled = n < plan.samples
            # the first full read is to be fast: as a rule it is the last
            exactly = n != plan.samples or (step == 1 and reduce is None)
            for launch in sample if sampled else full:
                _launch_count(launch, plan, scales, state, counts, exactly)
            counts = counts.sum(0) if copies > 1 else counts[0]
            if reduce is not None:
                counts = reduce(counts)
            coarse = counts[_HEADER:].view(_COARSE, -1).sum(1)
            narrowed = torch.empty_like(state)
            _narrow_kernel[(1,)](
                state, counts, coarse, pool, narrowed, k,
                SAMPLED=sampled, COUNT_NONFINITE=exactly,
                TOP=plan.top, BINS=plan.bins, COARSE=_COARSE,
                num_warps=NARROW_WARPS, **FUSED,
            )  # fmt: skip
            state = narrowed
    return state


def _select_triton(
    tensors: Sequence[Tensor], k: int, scales: Tensor | None, reduce: Reduce | None = None
) -> Threshold:
    state = _search_triton(tensors, k, scales, reduce)
    found = (state[n].clone() for n in (_LO, _KEEP_TIES, _NONFINITE))
    return _threshold(k, _plan(tensors, scales).kind, *found)


def _threshold(
    k: int, kind: torch.dtype, pattern: Tensor, keep_ties: Tensor, nonfinite: Tensor
) -> Threshold:
    if k == 0:
        value = torch.full((), -torch.inf, dtype=torch.float32, device=pattern.device)
        return Threshold(value, torch.zeros_like(keep_ties), nonfinite)
    bits = pattern.to(torch.int32 if kind == torch.float32 else torch.int16)
    return Threshold(bits.view(kind).float(), keep_ties, nonfinite)


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
        flat = _flat(tensor)
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


def _count(chunks: Iterable[np.ndarray], plan: _Plan, lo: int, hi: int, shift: int) -> _Counts:
    infinity = _INFINITY[plan.kind]
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


def _read(pieces: Sequence[_Piece], plan: _Plan, step: int, *bracket: int) -> _Counts:
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


def _search_torch(
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

    plan = _plan(tensors, scales, reduce)
    total = sum(t.numel() for t in tensors)
    if among is not None:
        (kept,) = count_kept([among.mask])
        total = kept if among.kept else total - kept
    # odd: a power of two would see the same columns of every row
    step = _sample_step(total, _SAMPLE_CPU) | 1
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
        shift = _shift(hi - lo, plan.bins)
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
        rank, margin = (k * (seen / total), _margin(k, total, spread)) if sampled else (k, 0)
        # segment 0 is [0, lo), the last is [hi, top), the bins are those between
        first, final = np.searchsorted(upto, (rank - margin, rank + margin)).tolist()
        left = 0 if first == 0 else min(lo + (first - 1 << shift), hi)
        right = plan.top if final > plan.bins else min(lo + (final << shift), hi)
        if left < lo or right > hi:
            inside = None
        lo, hi = left, right
        if not sampled and (hi - lo <= 1 or k == 0):
            return lo, int(upto[min(final, plan.bins)]) - k, nonfinite, reads


def _select_torch(
    tensors: Sequence[Tensor],
    k: int,
    scales: Tensor | None,
    reduce: Reduce | None = None,
    among: Among | None = None,
) -> Threshold:
    *found, _ = _search_torch(tensors, k, scales, reduce, among)
    found = (torch.tensor(n, device=tensors[0].device) for n in found)
    return _threshold(k, _plan(tensors, scales).kind, *found)


def _runs_triton(tensors: Sequence[Tensor], backend: Backend) -> bool:
    wide = any(t.dtype == torch.float64 for t in tensors)
    if wide and backend == "triton":
        raise ValueError(
            "select: tensors must be of 16 or 32 bits for backend='triton', got float64"
        )
    return use_triton("select", backend, tensors[0]) and not wide


@torch.library.custom_op("triton_sparsity::select", mutates_args=())
def _op(tensors: list[Tensor], k: int, scales: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _select_triton if _runs_triton(tensors, "auto") else _select_torch
    value, keep_ties, nonfinite = implementation(tensors, k, scales)
    return value, keep_ties, nonfinite


@_op.register_fake
def _(tensors: list[Tensor], k: int, scales: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    first = tensors[0]
    value = first.new_empty((), dtype=torch.float32)
    return value, first.new_empty((), dtype=torch.int64), first.new_empty((), dtype=torch.int64)


def select(
    tensors: Sequence[Tensor],
    k: int,
    *,
    scales: Tensor | None = None,
    reduce: Reduce | None = None,
    backend: Backend = "auto",
) -> Threshold:
    """Return the exact k-th smallest of ``float32(|t|) * scale`` over all elements of all tensors.

    Args:
        tensors: of one device, any shapes and strides, float32, bfloat16 or float16 (float64 is
            rounded to float32, without Triton). Empty ones are fine. A tensor whose elements leave
            gaps in memory is copied: by Triton's backend as a whole, else by a few rows at a time.
        k: from 0 to the number of elements.
        scales: float32 ``(len(tensors),)``, on the same device, finite and not negative.
        reduce: makes this one selection over the tensors of several ranks: it gets an int64 vector
            and returns the sum of all ranks' vectors, on the same device. ``k`` then counts in
            the elements of all, and all return the same. The ranks must agree on the set of
            dtypes, on whether there are ``scales``, and on the backend; Triton's, which never
            learns how many elements there are, returns NaN for a ``k`` beyond them.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, which counts in the host's memory.

    Returns:
        ``Threshold`` on the tensors' device, bit-equal on every run and backend. Triton's backend
        does not wait for the device, but it cannot be captured in a CUDA graph: the addresses
        are copied from the host.

    Raises:
        ValueError: an argument is not as above.
    """
    if not tensors:
        raise ValueError("select: tensors must be at least one tensor, got none")
    device = tensors[0].device
    for t in tensors:
        if t.dtype not in (*_INFINITY, torch.float64):
            kinds = "float32, bfloat16, float16 or float64"
            raise ValueError(f"select: tensors must be {kinds}, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"select: tensors must be on one device, got {device} and {t.device}")
    if scales is not None and (
        scales.shape != (len(tensors),) or scales.dtype != torch.float32 or scales.device != device
    ):
        raise ValueError(
            f"select: scales must be float32 ({len(tensors)},) on {device}, "
            f"got {scales.dtype} {tuple(scales.shape)} on {scales.device}"
        )
    total = sum(t.numel() for t in tensors)
    if k < 0 or (reduce is None and k > total):
        raise ValueError(f"select: k must be from 0 to {total} elements, got {k}")

    runs_triton = _runs_triton(tensors, backend)
    tensors = [t.detach() for t in tensors]
    scales = None if scales is None else scales.detach()
    if reduce is None and backend == "auto" and not is_plain(*tensors):
        return Threshold(*_op(tensors, k, scales))
    return (_select_triton if runs_triton else _select_torch)(tensors, k, scales, reduce)


def select_among(scores: Tensor, k: int, among: Among) -> Threshold:
    """Return the exact k-th smallest |score| of some elements of a matrix, by plain torch: of a
    float dtype, any strides, with no copy but of a piece at a time.
    """
    return _select_torch([scores.detach()], k, None, among=among)


def kth_smallest(
    tensors: Sequence[Tensor],
    k: int,
    backend: Backend,
    shares: Sequence[int] | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Return the k-th smallest of signed values.

    Args:
        tensors: of the values.
        k: from 1.
        backend: as ``select``'s.
        shares: how often each value of a tensor counts; None: once.
        reduce: as ``select``'s.
    """
    shares = [1] * len(tensors) if shares is None else shares
    unit = math.gcd(*shares)
    times = [share // unit for share in shares]
    k = ceil_div(k, unit)
    size = sum(tensor.numel() * n for tensor, n in zip(tensors, times, strict=True))
    if reduce is not None:
        size = int(reduce(torch.tensor([size], device=tensors[0].device)))

    def counted(limits: dict[str, int]) -> list[Tensor]:
        clamped = [tensor.clamp(**limits).flatten() for tensor in tensors]
        return [t.expand(n, -1) for t, n in zip(clamped, times, strict=True)]

    # one of the two magnitudes is 0, or both are
    above = select(counted({"min": 0}), k, reduce=reduce, backend=backend)
    below = select(counted({"max": 0}), size - k + 1, reduce=reduce, backend=backend)
    return above.value - below.value
