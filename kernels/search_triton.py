"""The search for a magnitude by Triton's kernels: ``search.py``.

Floor: one read, ``sum(numel * itemsize)`` bytes; the samples add 1/64 of that, or 1/32, to large
lists. All passes are launched, and those with nothing left to do return before they read: nothing
waits for the host.

No ``tl.histogram``: 2048 bins cost it 64 population counts an element, some 35 times the read.
Only the few keys inside the bracket are binned, by integer additions to memory, whose sums do not
depend on their order. A bracket of one or two 16-bit patterns, as a large sample leaves, takes no
bins: keys are compared with its bounds two at a time, 8 instructions an element instead of 19.

Reading order: the vectors -> kernels -> launches -> the search.
"""

# in a kernel one constexpr decides what is bound and what is used
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .grid import ceil_div
from .launch import FUSED, on_device, tl, triton, upload
from .search import (
    INFINITY_OF,
    Plan,
    Reduce,
    Threshold,
    bin_shift,
    flat_view,
    plan_of,
    sample_step,
    threshold_of,
)
from .table import addresses, alike
from .tiles import device_of

# the least that is sampled: enough for a bracket of fewer patterns than bins
_SAMPLE = 1 << 21
_WHOLE = 1 << 24  # elements: two reads of no more are over before the launches for a sample are

_HEADER = 4  # counts before the bins
_COARSE = 512  # groups of bins, searched first
NARROW_WARPS = 16  # of one program: a thread has few bins, and spills nothing
_SEARCH = 256  # tensors of the list that a program looks at together to find where it begins
_LO, _KEEP_TIES, _NONFINITE, _READS = 1, 6, 7, 8  # what the host takes from the state

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
    plan: Plan,
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
        INFINITY=INFINITY_OF[plan.kind], ALIGNED=launch.aligned, SCALED=scales is not None,
        SAMPLED=launch.step > 1, COUNT_NONFINITE=exactly, BINS=plan.bins, COPIES=len(counts),
        # 32 bytes are sampled at one place: a sector
        ROWS=launch.rows, VEC=launch.vec, RUN=32 // (launch.vec * launch.dtype.itemsize),
        SEARCH=_SEARCH,
        # elsewhere than on Hopper the two ways together spill
        PAIRS=plan.kind.itemsize == 2 and device_of(state).capability[0] == 9,
    **FUSED,)  # fmt: skip


def _search(
    tensors: Sequence[Tensor], k: int, scales: Tensor | None, reduce: Reduce | None
) -> Tensor:
    """Return the final state; nothing here waits for the device."""
    device = tensors[0].device
    plan = plan_of(tensors, scales, reduce)
    total = sum(t.numel() for t in tensors)
    # a power of two, so that a masked random number is uniform
    step = 1 << sample_step(total, _SAMPLE).bit_length() - 1
    if total <= _WHOLE and reduce is None:
        step = 1
    # unless something is sampled, the first read finds the bin, the second the pattern
    passes = 2 * plan.samples + 1 if step > 1 or reduce is not None else plan.samples
    # several copies of the bins, where many additions would meet at few addresses
    copies = 1 if total <= _SAMPLE else (1 << 20) // plan.bins
    flat = [
        t if t.is_contiguous() or flat_view(t) is not None else t.contiguous() for t in tensors
    ]
    scales = None if scales is None else scales.contiguous()
    with on_device(tensors[0]):
        full = _launches(flat, 1)
        sample = _launches(flat, step) if step > 1 else full
        pool = _upload([total, (step - 1) * total], device)
        if reduce is not None:
            pool = reduce(pool)
        hi = plan.top if k else 0
        state = _upload([0, 0, hi, 0, hi, bin_shift(hi, plan.bins), 0, 0, 0], device)
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


def select_triton(
    tensors: Sequence[Tensor], k: int, scales: Tensor | None, reduce: Reduce | None = None
) -> Threshold:
    state = _search(tensors, k, scales, reduce)
    found = (state[n].clone() for n in (_LO, _KEEP_TIES, _NONFINITE))
    return threshold_of(k, plan_of(tensors, scales).kind, *found)
