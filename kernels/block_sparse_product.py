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
W streams by, each tile of it read by neighbours at the same time. Of few tokens programs have
equal shares of all steps, and whoever began a tile waits for the sums of the programs behind it,
which compute theirs first.

Past 90 % sparsity the floor is device memory, not arithmetic: 8192 tokens of 4096 -> 14336 read
and write 0.3 GB, 0.07 ms, as long as 6 % of the blocks' arithmetic at the full rate.

Reading order: parts of a step -> places in a row of steps -> parts of tiles -> kernel -> launcher.
"""

from __future__ import annotations

from functools import cache

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


@triton.jit
def _wait(flag_ptr):
    """Wait until a part is there, and take its flag down."""
    while tl.atomic_cas(flag_ptr, 1, 0, sem="acquire") == 0:
        pass


@triton.jit
def _store_sum(
    y_ptr,
    bias_ptr,
    scratch_ptr,
    flag_ptr,
    acc,
    program,
    programs,
    row,
    end,
    m,
    n,
    M,
    N,
    stride_ym,
    stride_yn,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OUT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Store the tile of which this program has the first part, and others what comes up to
    ``end`` of the row. All are added up in order: the sum does not depend on who is done when.
    """
    first = program + 1
    last = first
    while _share(last, programs, row) < end:
        if _share(last + 1, programs, row) > _share(last, programs, row):
            _wait(flag_ptr + last)
        last += 1

    QUARTER: tl.constexpr = BLOCK_N // 4
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, QUARTER)
    halves = _halves(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(2):
        quarters = _halves(halves[i], BLOCK_M, BLOCK_N // 2)
        for j in tl.static_range(2):
            offs_n = (2 * i + j) * QUARTER + cols
            at = rows[:, None] * BLOCK_N + offs_n[None, :]
            sums = quarters[j]
            part = first
            while part < last:
                if _share(part + 1, programs, row) > _share(part, programs, row):
                    sums += tl.load(scratch_ptr + part.to(tl.int64) * (BLOCK_M * BLOCK_N) + at)
                part += 1
            if HAS_BIAS:
                bias = tl.load(bias_ptr + n + offs_n, mask=n + offs_n < N, other=0.0)
                sums += bias.to(tl.float32)[None, :]
            places = (m + rows).to(INDEX)[:, None] * stride_ym
            places += (n + offs_n).to(INDEX)[None, :] * stride_yn
            inside = (m + rows < M)[:, None] & (n + offs_n < N)[None, :]
            tl.store(y_ptr + places, sums.to(OUT), mask=inside)


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
    y_ptr,  # SPLIT: also,
    scratch_ptr,  # float32 [programs, BLOCK_M, BLOCK_N], and
    flag_ptr,  # int32 [programs], zeros before and after: whether a part is there
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
    row, stop, last_steps, last_offset, own_part_ptr = 0, 0, 0, 0, scratch_ptr
    if SPLIT:
        # who waits for a part has been launched after whom it waits for
        program = programs - 1 - program
        row = _row(task_ptr, num_m, bands, PER_TASK, PARTS, END_STEPS)
        begin, stop = _share(program, programs, row), _share(program + 1, programs, row)
        tile, steps, offset, before = _tile_at(
            begin, task_ptr, num_m, bands, PER_TASK, PARTS, END_STEPS
        )
        _, last_steps, last_offset, after = _tile_at(
            stop, task_ptr, num_m, bands, PER_TASK, PARTS, END_STEPS
        )
        total = after - before
        own_part_ptr += program.to(tl.int64) * (BLOCK_M * BLOCK_N)
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
    for _ in range(total):
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
        part += 1
        if part == PARTS:
            part = 0
            entry += 1
        if ended:
            m, n = tile_m * BLOCK_M, next_line * SIDE_N + band % PER_TASK * BLOCK_N
            entry, end = next_entry, next_entry + next_entries
            left, part = _steps(next_entries, PARTS), 0
            turn += 1
            tile = tl.minimum(tile + 1 if SPLIT else _dealt(turn, shift), tiles - 1)
            tile_m, band = _place(tile, num_m, bands, group)
            task = task_ptr + band // PER_TASK * 3
        # outside of the branch, because its end would wait for them
        next_line = tl.load(task, mask=ended, other=next_line)
        next_entry = tl.load(task + 1, mask=ended, other=next_entry)
        next_entries = tl.load(task + 2, mask=ended, other=next_entries)
        block = tl.load(index_ptr + entry, mask=entry < end, other=absent)
        if ended:
            if SPLIT:
                if is_whole:
                    _store(
                        y, bias_ptr, acc, out_m, out_n, M, N, stride_ym, stride_yn,
                        HAS_BIAS, BLOCK_M, BLOCK_N, STORES, OUT, BULK, INDEX,
                    )  # fmt: skip
                else:
                    _store_part(own_part_ptr, acc, BLOCK_M, BLOCK_N)
                is_whole = ended
            else:
                _store(
                    y, bias_ptr, acc, out_m, out_n, M, N, stride_ym, stride_yn,
                    HAS_BIAS, BLOCK_M, BLOCK_N, STORES, OUT, BULK, INDEX,
                )  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if SPLIT:
        goes_on = (total > 0) & (last_offset > 0) & (last_offset < last_steps)
        if goes_on & (is_whole == 0):
            _store_part(own_part_ptr, acc, BLOCK_M, BLOCK_N)
        if (total > 0) & (offset > 0):
            # here, because a loop with a barrier is not pipelined
            tl.debug_barrier()
            tl.atomic_xchg(flag_ptr + program, 1, sem="release")
        if goes_on & is_whole:
            _store_sum(
                y_ptr, bias_ptr, scratch_ptr, flag_ptr, acc, program, programs, row,
                stop - last_offset + last_steps, m, n, M, N, stride_ym, stride_yn,
                HAS_BIAS, BLOCK_M, BLOCK_N, OUT, INDEX,
            )  # fmt: skip


def rows_of(matrix: Tensor) -> Tensor:
    """Return ``matrix`` with unit stride along its rows: an activation may be copied."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _flags(device: torch.device, programs: int) -> Tensor:
    """Return zeros for the flags of a launch, which leaves them zeros for the next one of its
    stream. What is being captured may be replayed beside others: it brings zeros of its own.
    """
    if device.type != "cuda":
        return _lasting_flags(device, 0, programs)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(programs, dtype=torch.int32, device=device)
    return _lasting_flags(device, torch.cuda.current_stream(device).cuda_stream, programs)


@cache
def _lasting_flags(device: torch.device, stream: int, programs: int) -> Tensor:
    return torch.zeros(programs, dtype=torch.int32, device=device)


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
    # later parts of tiles; who has no split has no use for either
    scratch = flags = x
    if plan.split:
        scratch = x.new_empty(programs * tile.m * tile.n, dtype=torch.float32)
        flags = _flags(x.device, programs)
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
            ceil_div(K, side_k), plan.group, plan.shift, y, scratch, flags,
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
    return y
