"""The product of a block-sparse linear: ``y = x (W * M)^T + b``, reading the kept blocks alone.

The forward pass and the input gradient are this one kernel: the same product with the roles of
rows and columns exchanged, and the transposed lists of ``topology.py``. Which program computes
which tile is ``schedule.py``. ``block_sparse_linear.py`` has the reference and the operators.

**Tiles.** An output tile is BLOCK_M tokens by one block's rows; its reduction walks the kept
columns. A step reads BLOCK_M + BLOCK_N elements a column for BLOCK_M * BLOCK_N multiplications, an
intensity of m n / (m + n) FLOP a byte (16 bit). A random mask shares no activations between block
rows, so n is the block's and only m is free; two registers in three hold float32 sums:

    block   tile        intensity   share of 790 TFLOP/s at 7 TB/s of L2
    256     128 x 256   85          0.76
    128     256 x 128   85          0.76
    64      512 x 64    57          0.50
    32      512 x 32    30          0.27
    16      512 x 16    15          0.14

Both numbers are estimates, to be replaced by measured ones; dense Triton GEMMs with the tiles of
the first two lines reach 0.85 to 0.9 of cuBLAS on Hopper. Multicasting W's tile over a cluster of
two tiles of tokens would lift 256 x 128 to 102, and is out of reach of plain Triton. Where a table
has measured it to be faster, ``block_sparse_gluon.py`` computes the same with a producer warp.

**One loop.** A program (one a multiprocessor: 8 warps, 160 to 230 registers, 200 KB of shared
memory) walks its tiles in a single loop over all their steps, so that the copy engine fetches the
next tile's operands while the last one is converted and stored, itself by a bulk copy. Nothing in
the loop waits for a list: a step's block index is loaded in the step before, a tile's task a whole
tile ahead. One ``wgmma`` group stays in flight across steps.

**Balance, L2.** ``schedule.py``: tiles are dealt out so that programs have equally much to do
whatever the mask, panel by panel, so that a panel's activations stay in L2 while the kept part of
W streams by, each tile of it read by neighbours at the same time.

Past 90 % sparsity the floor is device memory, not arithmetic: 8192 tokens of 4096 -> 14336 read
and write 0.3 GB, 0.07 ms, as long as 6 % of the blocks' arithmetic at the full rate.

Reading order: parts of a step -> places in a row of steps -> kernel -> sums -> launcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import ceil_div
from .launch import FUSED, index_type, on_device, tl, triton
from .schedule import plan_product
from .tiles import (
    Tile,
    bulk_copies,
    descriptor,
    device_of,
    dot_precision,
    linear_tiles,
    stores,
)


@triton.jit
def _place(tile, num_m, bands, group):
    """Return which tokens and which band of outputs a tile is: ``schedule.tile_order``."""
    panel = tile // (group * bands)
    first = panel * group
    width = tl.maximum(tl.minimum(num_m - first, group), 1)
    within = tile - first * bands
    band = within // width
    return first + within - band * width, band


@triton.jit
def _dealt(turn, shift):
    """Return which tile this program takes in round ``turn``: ``schedule.dealt``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    rank = (program + turn // 2 * shift) % programs
    return turn * programs + tl.where(turn % 2 == 1, programs - 1 - rank, rank)


@triton.jit
def _steps(entries, PARTS: tl.constexpr):
    """Return the steps of a tile: an empty one takes a step, over zeros, to be written at all."""
    return tl.maximum(entries * PARTS, 1)


@triton.jit
def _load(
    source,
    row,
    col,
    rows,
    cols,
    stride_row,
    stride_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BULK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Load a tile [ROWS, COLS] of a matrix; zeros outside of it."""
    if BULK:
        tile = source.load([row, col])
    else:
        offs_row, offs_col = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        at = offs_row.to(INDEX)[:, None] * stride_row + offs_col.to(INDEX)[None, :] * stride_col
        inside = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        tile = tl.load(source + at, mask=inside, other=0.0)
    return tile


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the left and the right half of a tile."""
    return tile.reshape((ROWS, 2, COLS // 2)).permute((0, 2, 1)).split()


@triton.jit
def _store(
    y,
    bias_ptr,
    acc,
    m,
    n,
    M,
    N,
    stride_ym,
    stride_yn,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORES: tl.constexpr,
    OUT: tl.constexpr,
    BULK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Store a tile [BLOCK_M, BLOCK_N], the bias added."""
    offs_n = n + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)  # [BLOCK_N]
        acc += bias.to(tl.float32)[None, :]
    if BULK and STORES == 2:
        # one half after the other through a buffer of one
        halves = _halves(acc, BLOCK_M, BLOCK_N)
        y.store([m, n], halves[0].to(OUT))
        y.store([m, n + BLOCK_N // 2], halves[1].to(OUT))
    elif BULK:
        y.store([m, n], acc.to(OUT))
    else:
        offs_m = m + tl.arange(0, BLOCK_M)
        at = offs_m.to(INDEX)[:, None] * stride_ym + offs_n.to(INDEX)[None, :] * stride_yn
        tl.store(y + at, acc.to(OUT), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _store_part(part_ptr, acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the sums of a part of a tile, a quarter after the other through a buffer of one."""
    QUARTER: tl.constexpr = BLOCK_N // 4
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, QUARTER)[None, :]
    halves = _halves(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(2):
        quarters = _halves(halves[i], BLOCK_M, BLOCK_N // 2)
        for j in tl.static_range(2):
            tl.store(part_ptr + at + (2 * i + j) * QUARTER, quarters[j])


@triton.jit
def _share(program, programs, row):
    """Return where a program's share of ``row`` steps begins."""
    return (program.to(tl.int64) * row // programs).to(tl.int32)


@triton.jit
def _band_row(
    task_ptr, first, bands, PER_TASK: tl.constexpr, PARTS: tl.constexpr, END_STEPS: tl.constexpr
):
    """Return how much of the row a tile of 128 bands takes, from ``first`` on: its steps and its
    end; past the last band, nothing.
    """
    band = first + tl.arange(0, 128)
    entries = tl.load(task_ptr + band // PER_TASK * 3 + 2, mask=band < bands, other=0)
    return tl.where(band < bands, _steps(entries, PARTS) + END_STEPS, 0)  # [128]


@triton.jit
def _row(
    task_ptr, num_m, bands, PER_TASK: tl.constexpr, PARTS: tl.constexpr, END_STEPS: tl.constexpr
):
    """Return the length of the row of all tiles."""
    row = 0
    for first in range(0, bands, 128):
        row += tl.sum(_band_row(task_ptr, first, bands, PER_TASK, PARTS, END_STEPS)) * num_m
    return row


@triton.jit
def _tile_at(
    at,
    task_ptr,
    num_m,
    bands,
    PER_TASK: tl.constexpr,
    PARTS: tl.constexpr,
    END_STEPS: tl.constexpr,
):
    """Return the tile in which a place of the row lies, its steps, and where in the tile the place
    is: among its steps or, from there on, in its end. And how many steps come before the place.
    """
    before, band, passed = 0, 0, 0
    for first in range(0, bands, 128):
        lengths = _band_row(task_ptr, first, bands, PER_TASK, PARTS, END_STEPS) * num_m
        ends = passed + tl.cumsum(lengths, 0)
        behind = (ends <= at) & (lengths > 0)
        band += tl.sum(behind.to(tl.int32))
        before = tl.maximum(before, tl.max(tl.where(behind, ends, 0)))
        passed += tl.sum(lengths)
    ended = band * num_m
    band = tl.minimum(band, bands - 1)
    steps = _steps(tl.load(task_ptr + band // PER_TASK * 3 + 2), PARTS)
    within = (at - before) // (steps + END_STEPS)
    offset = (at - before) % (steps + END_STEPS)
    done = before + within * steps + tl.minimum(offset, steps) - ended * END_STEPS
    return band * num_m + within, steps, offset, done


@triton.jit(do_not_specialize=["M", "TASKS", "absent", "group", "shift"])
def _block_sparse_linear_kernel(
    x,  # BULK: descriptors of x, w and y; else their pointers
    w,
    y,
    bias_ptr,
    task_ptr,
    index_ptr,
    M,
    N,
    K,
    TASKS,
    absent,  # a block index past the last column
    group,  # as the plan's, and
    shift,
    scratch_ptr,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ym,
    stride_yn,
    HAS_BIAS: tl.constexpr,
    W_BY_K: tl.constexpr,  # w lies with its N elements side by side
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STORES: tl.constexpr,
    END_STEPS: tl.constexpr,  # as the plan's
    OUT: tl.constexpr,
    BULK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    SPLIT: tl.constexpr = END_STEPS > 0
    PARTS: tl.constexpr = SIDE_K // BLOCK_K
    PER_TASK: tl.constexpr = SIDE_N // BLOCK_N
    num_m, bands = tl.cdiv(M, BLOCK_M), TASKS * PER_TASK
    tiles = num_m * bands

    program, programs = tl.program_id(0), tl.num_programs(0)
    if SPLIT:
        row = _row(task_ptr, num_m, bands, PER_TASK, PARTS, END_STEPS)
        begin, stop = _share(program, programs, row), _share(program + 1, programs, row)
        tile, steps, offset, before = _tile_at(
            begin, task_ptr, num_m, bands, PER_TASK, PARTS, END_STEPS
        )
        _, _, _, after = _tile_at(stop, task_ptr, num_m, bands, PER_TASK, PARTS, END_STEPS)
        total = after - before
        if offset >= steps:  # the tile's steps are another's
            tile, offset = tl.minimum(tile + 1, tiles - 1), 0
    else:
        total, offset, tile = 0, 0, program
        for first in range(0, tl.cdiv(tiles, programs), 128):
            mine = _dealt(first + tl.arange(0, 128), shift)
            _, band = _place(mine, num_m, bands, group)
            entries = tl.load(task_ptr + band // PER_TASK * 3 + 2, mask=mine < tiles, other=0)
            total += tl.sum(tl.where(mine < tiles, _steps(entries, PARTS), 0))

    tile_m, band = _place(tile, num_m, bands, group)
    task = task_ptr + band // PER_TASK * 3
    m, n = tile_m * BLOCK_M, tl.load(task) * SIDE_N + band % PER_TASK * BLOCK_N
    entry, entries = tl.load(task + 1), tl.load(task + 2)
    end, left, part = entry + entries, _steps(entries, PARTS) - offset, offset % PARTS
    entry += offset // PARTS
    is_whole = offset == 0
    block = tl.load(index_ptr + entry, mask=entry < end, other=absent)

    # what comes next is loaded a whole tile ahead of its use
    turn = 1
    tile = tl.minimum(tile + 1 if SPLIT else _dealt(turn, shift), tiles - 1)
    tile_m, band = _place(tile, num_m, bands, group)
    task = task_ptr + band // PER_TASK * 3
    next_line, next_entry, next_entries = tl.load(task), tl.load(task + 1), tl.load(task + 2)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(total):
        k = block * SIDE_K + part * BLOCK_K
        xs = _load(x, m, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, BULK, INDEX)
        if W_BY_K:
            ws = _load(w, k, n, K, N, stride_wk, stride_wn, BLOCK_K, BLOCK_N, BULK, INDEX)
        else:
            ws = _load(w, n, k, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, BULK, INDEX).T
        acc = tl.dot(xs, ws, acc, input_precision=PRECISION)

        out_m, out_n = m, n
        left -= 1
        ended = left == 0
        done = ended | (step == total - 1) if SPLIT else ended
        part += 1
        if part == PARTS:
            part = 0
            entry += 1
        if done:
            m, n = tile_m * BLOCK_M, next_line * SIDE_N + band % PER_TASK * BLOCK_N
            entry, end = next_entry, next_entry + next_entries
            left, part = _steps(next_entries, PARTS), 0
            turn += 1
            tile = tl.minimum(tile + 1 if SPLIT else _dealt(turn, shift), tiles - 1)
            tile_m, band = _place(tile, num_m, bands, group)
            task = task_ptr + band // PER_TASK * 3
        # outside of the branch, because its end would wait for them
        next_line = tl.load(task, mask=done, other=next_line)
        next_entry = tl.load(task + 1, mask=done, other=next_entry)
        next_entries = tl.load(task + 2, mask=done, other=next_entries)
        block = tl.load(index_ptr + entry, mask=entry < end, other=absent)
        if done:
            if SPLIT:
                if is_whole & ended:
                    _store(
                        y, bias_ptr, acc, out_m, out_n, M, N, stride_ym, stride_yn,
                        HAS_BIAS, BLOCK_M, BLOCK_N, STORES, OUT, BULK, INDEX,
                    )  # fmt: skip
                else:
                    # the last part of a tile lies apart from one that others go on with
                    slot = (2 * program + 1 - ended.to(tl.int32)).to(tl.int64)
                    _store_part(scratch_ptr + slot * (BLOCK_M * BLOCK_N), acc, BLOCK_M, BLOCK_N)
                is_whole = ended
            else:
                _store(
                    y, bias_ptr, acc, out_m, out_n, M, N, stride_ym, stride_yn,
                    HAS_BIAS, BLOCK_M, BLOCK_N, STORES, OUT, BULK, INDEX,
                )  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit(do_not_specialize=["M", "TASKS", "programs"])
def _block_sparse_linear_sum_kernel(
    y_ptr,
    bias_ptr,
    task_ptr,
    scratch_ptr,
    M,
    N,
    TASKS,
    programs,  # of the launch that wrote the parts
    stride_ym,
    stride_yn,
    HAS_BIAS: tl.constexpr,
    PER_TASK: tl.constexpr,
    PARTS: tl.constexpr,
    END_STEPS: tl.constexpr,
    SIDE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    OUT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Add up the parts of the tiles that were cut, in order; SUM_ROWS rows at a time.

    A tile is added up where the first share begins that begins within its steps.
    """
    PIECES: tl.constexpr = BLOCK_M // SUM_ROWS
    num_m, bands = tl.cdiv(M, BLOCK_M), TASKS * PER_TASK
    row = _row(task_ptr, num_m, bands, PER_TASK, PARTS, END_STEPS)
    for piece in range(tl.program_id(0), programs * PIECES, tl.num_programs(0)):
        part = piece // PIECES
        begin = _share(part, programs, row)
        tile, steps, offset, _ = _tile_at(
            begin, task_ptr, num_m, bands, PER_TASK, PARTS, END_STEPS
        )
        start = begin - offset
        earlier = _share(tl.maximum(part - 1, 0), programs, row)
        if (begin < row) & (offset > 0) & (offset < steps) & (earlier <= start):
            rows = piece % PIECES * SUM_ROWS + tl.arange(0, SUM_ROWS)
            cols = tl.arange(0, BLOCK_N)
            within = rows[:, None] * BLOCK_N + cols[None, :]
            total = tl.zeros((SUM_ROWS, BLOCK_N), tl.float32)
            part -= 1
            while _share(part, programs, row) < start + steps:
                after = _share(part + 1, programs, row)
                slot = (2 * part + (after < start + steps).to(tl.int32)).to(tl.int64)
                if after > _share(part, programs, row):
                    total += tl.load(scratch_ptr + slot * (BLOCK_M * BLOCK_N) + within)
                part += 1

            tile_m, band = tile % num_m, tile // num_m
            line = tl.load(task_ptr + band // PER_TASK * 3)
            offs_m = tile_m * BLOCK_M + rows
            offs_n = line * SIDE_N + band % PER_TASK * BLOCK_N + cols
            if HAS_BIAS:
                bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)  # [BLOCK_N]
                total += bias.to(tl.float32)[None, :]
            at = offs_m.to(INDEX)[:, None] * stride_ym + offs_n.to(INDEX)[None, :] * stride_yn
            inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            tl.store(y_ptr + at, total.to(OUT), mask=inside)


def rows_of(matrix: Tensor) -> Tensor:
    """Return ``matrix`` with unit stride along its rows: an activation may be copied."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def launch_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tasks: Tensor,
    index: Tensor,
    side_n: int,
    side_k: int,
    tuned: Tile | None,
) -> Tensor:
    """Return ``x weight^T + bias`` over the blocks that ``tasks`` and ``index`` list."""
    x = rows_of(x)
    bias = None if bias is None else bias.contiguous()
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    if K == 0:
        return y.copy_(bias.expand(M, N)) if bias is not None else y.zero_()
    device, precision = device_of(x), dot_precision(x.dtype)
    by_k = weight.stride(0) < weight.stride(1)
    stored = weight.T if by_k else weight
    bulk = precision != "ieee" and bulk_copies(device, x, stored, y)
    tiles = linear_tiles(side_n, side_k, x.dtype, device, precision=precision, bulk=bulk)
    if tuned is not None:
        # what was measured is better known than what is modelled, for tokens enough
        fills = ceil_div(M, tuned.m) * len(tasks) * (side_n // tuned.n) >= device.processors
        tiles = (tuned,) if fills else (tuned, *tiles[1:])
    sizes = M, K, len(tasks), side_n, side_k, x.element_size()
    plan = plan_product(*sizes, device.processors, tiles)
    tile, programs = plan.tile, plan.programs
    if tile.specialised and bulk and x.element_size() == 2 and not plan.split:
        # only what was measured comes here: nobody else needs Gluon
        from .block_sparse_gluon import launch_specialised

        launch_specialised(x, stored, bias, y, tasks, index, side_n, side_k, by_k, plan)
        return y
    parts = 2 * programs * tile.m * tile.n if plan.split else 0
    scratch = x.new_empty(parts, dtype=torch.float32)
    kind = getattr(tl, str(x.dtype).removeprefix("torch."))
    if bulk:
        ops = (
            descriptor(x, tile.m, tile.k),
            descriptor(stored, *((tile.k, tile.n) if by_k else (tile.n, tile.k))),
            descriptor(y, tile.m, tile.n // stores(tile.n)),
        )
    else:
        ops = x, weight, y
    with on_device(x):
        _block_sparse_linear_kernel[(programs,)](
            *ops, x if bias is None else bias, tasks, index, M, N, K, len(tasks),
            ceil_div(K, side_k), plan.group, plan.shift, scratch,
            *x.stride(), *weight.stride(), *y.stride(),
            HAS_BIAS=bias is not None,
            W_BY_K=by_k,
            SIDE_N=side_n,
            SIDE_K=side_k,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            STORES=stores(tile.n),
            END_STEPS=plan.end_steps,
            OUT=kind,
            BULK=bulk,
            PRECISION=precision,
            INDEX=tl.int32 if bulk else index_type(x, weight, y),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **FUSED,
        )  # fmt: skip
        if plan.split:
            _block_sparse_linear_sum_kernel[(device.processors * 8,)](
                y, x if bias is None else bias, tasks, scratch, M, N, len(tasks), programs,
                *y.stride(),
                HAS_BIAS=bias is not None,
                PER_TASK=side_n // tile.n,
                PARTS=side_k // tile.k,
                END_STEPS=plan.end_steps,
                SIDE_N=side_n,
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                SUM_ROWS=16,
                OUT=kind,
                INDEX=index_type(y),
                num_warps=4,
                **FUSED,
            )  # fmt: skip
    return y
