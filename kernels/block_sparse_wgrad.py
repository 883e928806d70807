"""Weight gradient of a block-sparse linear: ``out = a^T b`` on the kept blocks, zero elsewhere.

``a`` holds the gradient of the output and ``b`` the input; for a weight stored transposed it is
the other way round, so that ``out`` always lies row by row. ``block_sparse_linear.py`` has the
operators and the reference.

**Tiles.** The reduction runs over the tokens: all tiles are equally long. A tile is a block of the
*lone* side, 128 wide at most, times a *bundle* of kept blocks on the other side (``topology.py``),
256 wide in all. Sharing the lone operand is what raises the intensity; a block by itself has
r c / (r + c), in FLOP a byte of 16-bit operands:

    block   alone   tile         bundled   operands of a step
    256     128     128 x 256    85        bulk copies: 1 + 1
    128     64      128 x 2*128  85        bulk copies: 1 + 2, two dots with one operand in common
    64      32      64 x 4*64    51        bulk copies: 1 + 4, four dots
    32      16      8*32 x 32    28        cp.async; the bundle is M, since wgmma wants 64 rows
    16      8       16*16 x 16   15        likewise

Absent blocks of a bundle are not fetched, but multiplied. So what a line of blocks has left over,
if it is no more than half of a bundle, is a tile of half the width, which takes half the time.

**Schedule.** One program a multiprocessor (two where tiles are small) walks its tiles; what says
where the next one lies was loaded a tile ahead. All programs go through the tokens in step, so
that what they share stays in L2: in whole rounds, of wide tiles and then of narrow ones. The tiles
that fill no round are one row of steps, of which each program takes an equal share, however that
cuts tiles. The float32 sums of those that were cut go to a scratch of two tiles a program, and a
second launch adds them up in a fixed order. Only the device knows how many tiles there are, so it
decides the split. ``schedule.py`` has the same arithmetic in numpy.

**Zeros.** The same loop writes the pruned blocks, a strip a step: stores that drain while the
tensor cores work. As a launch of their own they would take a tenth of the whole at 80 % sparsity
and a fifth at 90 %. Past that, device memory is the floor: 8192 tokens of 4096 -> 14336 read
0.30 GB and write 0.12, 0.1 ms, while 5 % of the blocks are 0.06 ms of arithmetic.

Reading order: kernels -> launcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grid import ceil_div
from .launch import FUSED, index_type, on_device, tl, triton
from .pattern import Block
from .tiles import (
    Device,
    Tile,
    bulk_copies,
    descriptor,
    device_of,
    dot_precision,
    wgrad_tile,
)
from .topology import BUNDLE_WIDTH, Topology, bundling
from .tuning import tuned_tile

MIN_STEPS = 8  # of a part: below, writing and adding up the parts costs more than it saves
STRIP_ROWS = 16  # divides every block's rows


@triton.jit
def _row_of(wide, narrow, steps, programs, MIN_STEPS: tl.constexpr):
    """Return the row of the tiles that fill no round: where the wide ones end, its length, and how
    many programs share it. A step of a wide tile is two long.
    """
    wide_end = 2 * (wide % programs) * steps
    row = wide_end + narrow % programs * steps
    sharers = tl.where(
        steps >= 2 * MIN_STEPS, tl.minimum(programs, tl.cdiv(row, 2 * MIN_STEPS)), programs
    )
    return wide_end, row, tl.maximum(sharers, 1)


@triton.jit
def _begin(program, sharers, row, wide_end, steps, MIN_STEPS: tl.constexpr):
    """Return where a program's share of the row begins: between steps, or, where tiles are short,
    between tiles.
    """
    at = (tl.minimum(program, sharers).to(tl.int64) * row // sharers).to(tl.int32)
    grain = tl.where(steps >= 2 * MIN_STEPS, 1, tl.maximum(steps, 1))
    return at - tl.where(at < wide_end, at % (2 * grain), (at - wide_end) % grain)


@triton.jit
def _ordinal(at, wide_end, steps):
    """Return which tile of the row lies at a position."""
    steps = tl.maximum(steps, 1)
    return tl.where(at < wide_end, at // (2 * steps), (wide_end // 2 + at - wide_end) // steps)


@triton.jit
def _in_row(ordinal, wide, narrow, wide_end, steps, programs):
    """Return a tile of the row, where it begins there, and how long its steps are."""
    late = ordinal - wide % programs
    tile = tl.where(late < 0, wide + late, wide + narrow - narrow % programs + late)
    start = tl.where(late < 0, 2 * ordinal * steps, wide_end + late * steps)
    return tile, start, tl.where(late < 0, 2, 1)


@triton.jit
def _work(item, begin, stop, wide, narrow, wide_end, steps):
    """Return this program's ``item``: its tile, whether that is narrow, and which steps of it.

    Whole rounds first, then its share of the row. Past a program's last item, any tile.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    wide_rounds = wide // programs
    is_narrow = item >= wide_rounds
    tile = program + item * programs + tl.where(is_narrow, wide % programs, 0)
    first, end = 0, steps
    place = item - wide_rounds - narrow // programs
    if place >= 0:
        ordinal = _ordinal(begin, wide_end, steps) + place
        tile, start, each = _in_row(ordinal, wide, narrow, wide_end, steps, programs)
        is_narrow = each == 1
        first = tl.maximum(begin - start, 0) // each
        end = tl.minimum((stop - start) // each, steps)
    return tl.minimum(tile, tl.maximum(wide + narrow - 1, 0)), is_narrow, first, end


@triton.jit
def _place(index_ptr, entry, count, elements, absent, SIDE_V: tl.constexpr):
    """Return where a bundle's ``elements`` lie in their operand; past its end if absent."""
    member = elements // SIDE_V
    block = tl.load(index_ptr + entry + member, mask=member < count, other=absent)
    return block * SIDE_V + elements % SIDE_V


@triton.jit
def _places(
    index_ptr,
    entry,
    count,
    absent,
    SIDE_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOTS: tl.constexpr,
    BULK: tl.constexpr,
):
    """Return where each dot's bundled operand begins, or where each of its elements lies."""
    places = ()
    for i in tl.static_range(DOTS):
        elements = i * BLOCK_V + (0 if BULK else tl.arange(0, BLOCK_V))
        places += (_place(index_ptr, entry, count, elements, absent, SIDE_V),)
    return places


@triton.jit
def _zeros(ROWS: tl.constexpr, COLS: tl.constexpr, DOTS: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(DOTS):
        zeros += (tl.zeros((ROWS, COLS), tl.float32),)
    return zeros


@triton.jit
def _columns(x_ptr, t, offs, T, N, stride_t, stride_n, INDEX: tl.constexpr, BLOCK_T: tl.constexpr):
    offs_t = t + tl.arange(0, BLOCK_T)
    return tl.load(
        x_ptr + offs_t.to(INDEX)[:, None] * stride_t + offs.to(INDEX)[None, :] * stride_n,
        mask=(offs_t < T)[:, None] & (offs < N)[None, :],
        other=0.0,
    )  # [BLOCK_T, len(offs)]


@triton.jit
def _store_block(
    out_ptr,
    offs_a,
    offs_b,
    values,
    NA,
    NB,
    stride_oa,
    stride_ob,
    TURN: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Store ``values``, [len(offs_a), len(offs_b)], or the other way round if TURN."""
    at_a, at_b = offs_a.to(INDEX) * stride_oa, offs_b.to(INDEX) * stride_ob
    if TURN:
        at = at_b[:, None] + at_a[None, :]
        inside = (offs_b < NB)[:, None] & (offs_a < NA)[None, :]
    else:
        at = at_a[:, None] + at_b[None, :]
        inside = (offs_a < NA)[:, None] & (offs_b < NB)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _strip_flags(
    kept_ptr,
    down,
    across,
    NA,
    NB,
    stride_ka,
    stride_kb,
    SIDE_A: tl.constexpr,
    SIDE_B: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    STRIP_COLS: tl.constexpr,
):
    """Tell which columns of a strip lie in kept blocks; past the last strip, all."""
    block_a = down * STRIP_ROWS // SIDE_A
    offs_b = across * STRIP_COLS + tl.arange(0, STRIP_COLS)
    return tl.load(
        kept_ptr + block_a.to(tl.int64) * stride_ka + offs_b // SIDE_B * stride_kb,
        mask=(offs_b < NB) & (down * STRIP_ROWS < NA),
        other=1,
    )  # [STRIP_COLS]


@triton.jit
def _zero_strip(
    out_ptr,
    flags,
    down,
    across,
    NA,
    stride_oa,
    stride_ob,
    INDEX: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    STRIP_COLS: tl.constexpr,
):
    offs_a = down * STRIP_ROWS + tl.arange(0, STRIP_ROWS)
    offs_b = across * STRIP_COLS + tl.arange(0, STRIP_COLS)
    tl.store(
        out_ptr + offs_a.to(INDEX)[:, None] * stride_oa + offs_b.to(INDEX)[None, :] * stride_ob,
        tl.zeros((STRIP_ROWS, STRIP_COLS), out_ptr.dtype.element_ty),
        mask=(offs_a < NA)[:, None] & (flags == 0)[None, :],
    )


@triton.jit
def _next_strip(down, across, width, more_down, more_across):
    """Return the strip that comes so much later; no division in a loop."""
    across += more_across
    wraps = across >= width
    return down + more_down + wraps.to(tl.int32), across - tl.where(wraps, width, 0)


@triton.jit
def _tile(
    a,
    b,
    out,
    out_ptr,
    slot_ptr,
    index_ptr,
    kept_ptr,
    u,
    entry,
    count,
    first,
    end,
    is_part,
    down,
    across,
    width,
    more_down,
    more_across,
    T,
    NA,
    NB,
    absent,
    stride_at,
    stride_aa,
    stride_bt,
    stride_bb,
    stride_oa,
    stride_ob,
    stride_ka,
    stride_kb,
    LONE_A: tl.constexpr,
    SIDE_A: tl.constexpr,
    SIDE_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TURN: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    STRIP_COLS: tl.constexpr,
    SLOT_COLS: tl.constexpr,
    BULK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Compute a tile, or a part of it; write a strip of zeros a step, and return the next one."""
    SIDE_V: tl.constexpr = SIDE_B if LONE_A else SIDE_A
    U_DOWN: tl.constexpr = LONE_A != TURN
    ACC_ROWS: tl.constexpr = BLOCK_U if U_DOWN else BLOCK_V
    ACC_COLS: tl.constexpr = BLOCK_V if U_DOWN else BLOCK_U
    places = _places(index_ptr, entry, count, absent, SIDE_V, BLOCK_V, DOTS, BULK)
    flags = _strip_flags(
        kept_ptr, down, across, NA, NB, stride_ka, stride_kb,
        SIDE_A, SIDE_B, STRIP_ROWS, STRIP_COLS,
    )  # fmt: skip
    # not one loop over all items, as in the forward pass: several sums that outlive their loop
    # make the assembler serialise wgmma, and here a tile is long
    accs = _zeros(ACC_ROWS, ACC_COLS, DOTS)
    for step in range(first, end):
        t = step * BLOCK_T
        sums = ()  # which a type checker takes for what it stays
        if not BULK:
            offs_u = u + tl.arange(0, BLOCK_U)
            offs_a = offs_u if LONE_A else places[0]
            offs_b = places[0] if LONE_A else offs_u
            x = _columns(a, t, offs_a, T, NA, stride_at, stride_aa, INDEX, BLOCK_T)
            y = _columns(b, t, offs_b, T, NB, stride_bt, stride_bb, INDEX, BLOCK_T)
            acc = accs[0]  # pyright: ignore[reportGeneralTypeIssues]
            if TURN:
                sums += (tl.dot(y.T, x, acc, input_precision=PRECISION),)
            else:
                sums += (tl.dot(x.T, y, acc, input_precision=PRECISION),)
        elif LONE_A:
            lone = a.load([t, u]).T
            for i in tl.static_range(DOTS):
                y = b.load([t, places[i]])
                sums += (tl.dot(lone, y, accs[i], input_precision=PRECISION),)
        else:
            lone = b.load([t, u])
            for i in tl.static_range(DOTS):
                x = a.load([t, places[i]]).T
                sums += (tl.dot(x, lone, accs[i], input_precision=PRECISION),)
        accs = sums

        _zero_strip(
            out_ptr, flags, down, across, NA, stride_oa, stride_ob,
            INDEX, STRIP_ROWS, STRIP_COLS,
        )  # fmt: skip
        down, across = _next_strip(down, across, width, more_down, more_across)
        flags = _strip_flags(
            kept_ptr, down, across, NA, NB, stride_ka, stride_kb,
            SIDE_A, SIDE_B, STRIP_ROWS, STRIP_COLS,
        )  # fmt: skip

    if is_part:
        # as a wide tile lies there, so that adding up need not tell them apart
        rows, cols = tl.arange(0, ACC_ROWS)[:, None], tl.arange(0, ACC_COLS)[None, :]
        for i in tl.static_range(DOTS):
            tl.store(slot_ptr + i * (ACC_ROWS * ACC_COLS) + rows * SLOT_COLS + cols, accs[i])
    elif BULK:
        for i in tl.static_range(DOTS):
            block = accs[i].to(out_ptr.dtype.element_ty)  # pyright: ignore[reportAttributeAccessIssue]
            if LONE_A:
                out.store([u, places[i]], block)
            else:
                out.store([places[i], u], block)
    else:
        offs_u = u + tl.arange(0, BLOCK_U)
        offs_a = offs_u if LONE_A else places[0]
        offs_b = places[0] if LONE_A else offs_u
        acc = accs[0]  # pyright: ignore[reportGeneralTypeIssues]
        _store_block(out_ptr, offs_a, offs_b, acc, NA, NB, stride_oa, stride_ob, TURN, INDEX)
    return down, across


@triton.jit(do_not_specialize=["T", "absent"])
def _block_sparse_wgrad_kernel(
    a,  # BULK: descriptors of a, b and out; else their pointers
    b,
    out,
    out_ptr,
    scratch_ptr,
    bundle_ptr,
    bundle_count_ptr,
    index_ptr,
    kept_ptr,
    T,
    NA,
    NB,
    absent,
    stride_at,
    stride_aa,
    stride_bt,
    stride_bb,
    stride_oa,
    stride_ob,
    stride_ka,
    stride_kb,
    LONE_A: tl.constexpr,
    SIDE_A: tl.constexpr,
    SIDE_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TURN: tl.constexpr,
    ACC_ROWS: tl.constexpr,
    ACC_COLS: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    STRIP_COLS: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    BULK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    SIDE_U: tl.constexpr = SIDE_A if LONE_A else SIDE_B
    SIDE_V: tl.constexpr = SIDE_B if LONE_A else SIDE_A
    PER_BUNDLE: tl.constexpr = SIDE_U // BLOCK_U
    # a narrow tile; a bundle of one block has none
    HALVES: tl.constexpr = DOTS * BLOCK_V > SIDE_V
    HALF_DOTS: tl.constexpr = DOTS // 2 if DOTS > 1 else 1
    HALF_V: tl.constexpr = BLOCK_V // 2 if HALVES and DOTS == 1 else BLOCK_V

    program, programs = tl.program_id(0), tl.num_programs(0)
    wide = tl.load(bundle_count_ptr) * PER_BUNDLE
    narrow = tl.load(bundle_count_ptr + 1) * PER_BUNDLE
    steps = tl.cdiv(T, BLOCK_T)
    wide_end, row, sharers = _row_of(wide, narrow, steps, programs, MIN_STEPS)
    begin = _begin(program, sharers, row, wide_end, steps, MIN_STEPS)
    stop = _begin(program + 1, sharers, row, wide_end, steps, MIN_STEPS)
    whole = wide // programs + narrow // programs
    items = whole
    if begin < stop:
        last = _ordinal(stop - 1, wide_end, steps)
        items += last - _ordinal(begin, wide_end, steps) + 1

    # what comes next is loaded a whole tile ahead of its use
    tile, is_narrow, first, end = _work(0, begin, stop, wide, narrow, wide_end, steps)
    bundle = bundle_ptr + tile // PER_BUNDLE * 3
    line, entry, count = tl.load(bundle), tl.load(bundle + 1), tl.load(bundle + 2)

    width = tl.cdiv(NB, STRIP_COLS)
    down, across = program // width, program % width
    more_down, more_across = programs // width, programs % width
    for item in range(items):
        u = line * SIDE_U + tile % PER_BUNDLE * BLOCK_U
        is_part = (first > 0) | (end < steps)
        slot = 2 * program + (item > whole).to(tl.int32)
        slot_ptr = scratch_ptr + slot.to(tl.int64) * (DOTS * ACC_ROWS * ACC_COLS)
        now_narrow, now_entry, now_count, now_first, now_end = is_narrow, entry, count, first, end
        tile, is_narrow, first, end = _work(item + 1, begin, stop, wide, narrow, wide_end, steps)
        bundle = bundle_ptr + tile // PER_BUNDLE * 3
        line, entry, count = tl.load(bundle), tl.load(bundle + 1), tl.load(bundle + 2)
        if now_narrow & HALVES:
            down, across = _tile(
                a, b, out, out_ptr, slot_ptr, index_ptr, kept_ptr, u, now_entry, now_count,
                now_first, now_end, is_part, down, across, width, more_down, more_across, T, NA,
                NB, absent, stride_at, stride_aa, stride_bt, stride_bb, stride_oa, stride_ob,
                stride_ka, stride_kb, LONE_A, SIDE_A, SIDE_B, BLOCK_U, HALF_V, HALF_DOTS, BLOCK_T,
                TURN, STRIP_ROWS, STRIP_COLS, ACC_COLS, BULK, PRECISION, INDEX,
            )  # fmt: skip
        else:
            down, across = _tile(
                a, b, out, out_ptr, slot_ptr, index_ptr, kept_ptr, u, now_entry, now_count,
                now_first, now_end, is_part, down, across, width, more_down, more_across, T, NA,
                NB, absent, stride_at, stride_aa, stride_bt, stride_bb, stride_oa, stride_ob,
                stride_ka, stride_kb, LONE_A, SIDE_A, SIDE_B, BLOCK_U, BLOCK_V, DOTS, BLOCK_T,
                TURN, STRIP_ROWS, STRIP_COLS, ACC_COLS, BULK, PRECISION, INDEX,
            )  # fmt: skip

    # the strips that the steps were too few for
    while down * STRIP_ROWS < NA:
        flags = _strip_flags(
            kept_ptr, down, across, NA, NB, stride_ka, stride_kb,
            SIDE_A, SIDE_B, STRIP_ROWS, STRIP_COLS,
        )  # fmt: skip
        _zero_strip(
            out_ptr, flags, down, across, NA, stride_oa, stride_ob,
            INDEX, STRIP_ROWS, STRIP_COLS,
        )  # fmt: skip
        down, across = _next_strip(down, across, width, more_down, more_across)


@triton.jit(do_not_specialize=["T", "absent", "programs"])
def _block_sparse_wgrad_sum_kernel(
    out_ptr,
    scratch_ptr,
    bundle_ptr,
    bundle_count_ptr,
    index_ptr,
    T,
    NA,
    NB,
    absent,
    programs,  # of the launch that wrote the parts
    stride_oa,
    stride_ob,
    LONE_A: tl.constexpr,
    SIDE_A: tl.constexpr,
    SIDE_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TURN: tl.constexpr,
    ACC_ROWS: tl.constexpr,
    ACC_COLS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Add up the parts of the tiles that were cut, in order; SUM_ROWS rows at a time."""
    SIDE_U: tl.constexpr = SIDE_A if LONE_A else SIDE_B
    SIDE_V: tl.constexpr = SIDE_B if LONE_A else SIDE_A
    PER_BUNDLE: tl.constexpr = SIDE_U // BLOCK_U
    U_DOWN: tl.constexpr = LONE_A != TURN
    PIECES: tl.constexpr = ACC_ROWS // SUM_ROWS
    wide = tl.load(bundle_count_ptr) * PER_BUNDLE
    narrow = tl.load(bundle_count_ptr + 1) * PER_BUNDLE
    steps = tl.cdiv(T, BLOCK_T)
    wide_end, row, sharers = _row_of(wide, narrow, steps, programs, MIN_STEPS)
    pieces = (wide % programs + narrow % programs) * (DOTS * PIECES)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        ordinal = piece // (DOTS * PIECES)
        tile, start, each = _in_row(ordinal, wide, narrow, wide_end, steps, programs)
        after = start + each * steps
        part = (start.to(tl.int64) * sharers // row).to(tl.int32)
        part += (_begin(part + 1, sharers, row, wide_end, steps, MIN_STEPS) <= start).to(tl.int32)
        if _begin(part + 1, sharers, row, wide_end, steps, MIN_STEPS) < after:
            dot, rows = piece // PIECES % DOTS, piece % PIECES * SUM_ROWS + tl.arange(0, SUM_ROWS)
            cols = tl.arange(0, ACC_COLS)
            within = dot * (ACC_ROWS * ACC_COLS) + rows[:, None] * ACC_COLS + cols[None, :]
            bundle = bundle_ptr + tile // PER_BUNDLE * 3
            start_u = tl.load(bundle) * SIDE_U + tile % PER_BUNDLE * BLOCK_U
            entry, count = tl.load(bundle + 1), tl.load(bundle + 2)
            # nothing was written of absent blocks
            if U_DOWN:
                there = (dot * BLOCK_V + cols < count * SIDE_V)[None, :]
            else:
                there = (dot * BLOCK_V + rows < count * SIDE_V)[:, None]
            total = tl.zeros((SUM_ROWS, ACC_COLS), tl.float32)
            begin = _begin(part, sharers, row, wide_end, steps, MIN_STEPS)
            while begin < after:
                # the first tile of a share, or a later one
                slot = (2 * part + (begin < start).to(tl.int32)).to(tl.int64)
                part_ptr = scratch_ptr + slot * (DOTS * ACC_ROWS * ACC_COLS)
                total += tl.load(part_ptr + within, mask=there, other=0.0)
                part += 1
                begin = _begin(part, sharers, row, wide_end, steps, MIN_STEPS)

            offs_a = cols if TURN else rows
            offs_b = rows if TURN else cols
            if LONE_A:
                offs_a = start_u + offs_a
                offs_b = _place(index_ptr, entry, count, dot * BLOCK_V + offs_b, absent, SIDE_V)
            else:
                offs_a = _place(index_ptr, entry, count, dot * BLOCK_V + offs_a, absent, SIDE_V)
                offs_b = start_u + offs_b
            _store_block(out_ptr, offs_a, offs_b, total, NA, NB, stride_oa, stride_ob, TURN, INDEX)


def layout(
    tile: Tile, lone_a: bool, side_a: int, side_b: int, bulk: bool, device: Device
) -> dict[str, Any]:
    """Return the compile-time arguments that both kernels share, from a tile."""
    side_v = side_b if lone_a else side_a
    widest = 256 if device.capability[0] == 9 else 128  # sm_100 spills with wider ones
    block_v = min(side_v, widest) if bulk else BUNDLE_WIDTH
    block_a, block_b = (tile.m, block_v) if lone_a else (block_v, tile.m)
    # without bulk copies a tile may lie either way: with its longer side along M, because wgmma
    # wants 64 rows; for mma.sync the shorter, because it takes a transposed M through registers
    turn = not bulk and (block_a < block_b if device.capability[0] >= 9 else not lone_a)
    rows, cols = (block_b, block_a) if turn else (block_a, block_b)
    return {
        "LONE_A": lone_a,
        "SIDE_A": side_a,
        "SIDE_B": side_b,
        "BLOCK_U": tile.m,
        "BLOCK_V": block_v,
        "DOTS": BUNDLE_WIDTH // block_v,
        "BLOCK_T": tile.k,
        "TURN": turn,
        "ACC_ROWS": rows,
        "ACC_COLS": cols,
        "MIN_STEPS": MIN_STEPS,
    }


def takes_bulk_copies(side_u: int, side_v: int, precision: str) -> bool:
    """Tell whether the sides suit the copy engine: a wgmma from each copied block."""
    return min(side_u, side_v) >= 64 and precision != "ieee"


def strip_cols(tile: Tile, dtype: torch.dtype) -> int:
    """Return the width of a strip of zeros: 16 bytes a thread."""
    return tile.warps * 32 * 16 // dtype.itemsize // STRIP_ROWS


def launch_wgrad(
    grad: Tensor, x: Tensor, topology: Topology, rows: int, cols: int, out: Tensor
) -> None:
    """Write ``out = grad^T x`` on the kept blocks and zero elsewhere.

    Args:
        grad: ``(T, R)``, of unit stride along the rows.
        x: ``(T, C)``, likewise.
        topology: of the block mask.
        rows, cols: sides of a block.
        out: ``(R, C)``, any strides.
    """
    grid = topology.kept.shape[0], topology.kept.shape[1]
    lone_a = by_rows = bundling(Block(rows, cols), grid)[0]
    index, absent = (topology.col_index, grid[1]) if by_rows else (topology.row_index, grid[0])
    a, b, kept, side_a, side_b = grad, x, topology.kept.view(torch.uint8), rows, cols
    if out.stride(0) < out.stride(1):
        a, b, kept, side_a, side_b = b, a, kept.T, side_b, side_a
        out, lone_a = out.T, not lone_a
    T, NA, NB = a.shape[0], a.shape[1], b.shape[1]
    device, precision = device_of(grad), dot_precision(grad.dtype)
    side_u, side_v = (side_a, side_b) if lone_a else (side_b, side_a)
    bulk = takes_bulk_copies(side_u, side_v, precision) and bulk_copies(device, a, b, out)
    shape = grad.shape[1], x.shape[1]
    tuned = tuned_tile("wgrad", shape, Block(rows, cols), grad.dtype, grad.device)
    tile = tuned or wgrad_tile(side_u, side_v, grad.dtype, device, precision=precision, bulk=bulk)
    shared = layout(tile, lone_a, side_a, side_b, bulk, device)
    programs = device.processors * tile.programs
    elements = shared["DOTS"] * shared["ACC_ROWS"] * shared["ACC_COLS"]
    split = ceil_div(T, tile.k) >= 2 * MIN_STEPS
    scratch = grad.new_empty(2 * programs * elements if split else 0, dtype=torch.float32)
    if bulk:
        ops = (
            descriptor(a, tile.k, tile.m if lone_a else shared["BLOCK_V"]),
            descriptor(b, tile.k, shared["BLOCK_V"] if lone_a else tile.m),
            descriptor(out, shared["ACC_ROWS"], shared["ACC_COLS"]),
        )
    else:
        ops = a, b, out
    index_width = index_type(a, b, out)
    with on_device(grad):
        _block_sparse_wgrad_kernel[(programs,)](
            *ops, out, scratch, topology.bundles, topology.bundle_count, index, kept,
            T, NA, NB, absent, *a.stride(), *b.stride(), *out.stride(), *kept.stride(),
            STRIP_ROWS=STRIP_ROWS,
            STRIP_COLS=strip_cols(tile, out.dtype),
            BULK=bulk,
            PRECISION=precision,
            INDEX=index_width,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **shared,
            **FUSED,
        )  # fmt: skip
        if split:
            _block_sparse_wgrad_sum_kernel[(programs,)](
                out, scratch, topology.bundles, topology.bundle_count, index,
                T, NA, NB, absent, programs, *out.stride(),
                SUM_ROWS=min(16, shared["ACC_ROWS"]),
                INDEX=index_width,
                num_warps=4,
                **shared,
                **FUSED,
            )  # fmt: skip
