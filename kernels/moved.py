"""Pruned values of a list of weights: moved out, zeros left behind, and moved back.

Of blocks the values lie one after another, so the first launch finds where those of each block
begin: one program a weight walks its mask. The second moves them, a tile of the weight a program,
along the weight's memory. Fine patterns need the second alone. Neither waits for the device.

Floor: the pruned elements, read and written once, and zeros written once more where they are
taken. Fine patterns: one read and two writes of the weight to take, one more read to put back.

Reading order: kernels -> launcher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bits import WORDS
from .grid import ceil_div
from .launch import FUSED, on_device, tl, triton
from .table import (
    Column,
    Matrices,
    addresses,
    alike,
    device_table,
    find_tensor,
    first_of,
    list_index_type,
    swap,
)

CHUNK = 2048  # blocks that a program places at a time
# two to eight 16-byte accesses of a thread; a chunk is 16 bytes of a 16-bit float
TILE = {"TILE_M": 16, "CHUNKS": 32, "WIDTH": 8}

# A table's columns: first program, the weight's address, its values', rows and columns as the
# weight is walked, its strides, the mask's address and strides (of fine patterns in bytes), the
# values' strides, the block's sides as powers of two, whether rows are whole runs of 16 bytes. Of
# blocks also: the first of their places, whether the weight is walked down its columns, columns of
# blocks that are whole, and how wide the last one is.


@triton.jit
def _place_kernel(
    table_ptr,
    place_ptr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write where the values of every pruned block of one weight begin; -1 for kept ones."""
    entry = table_ptr + tl.program_id(0)
    turned = tl.load(entry + 16 * N) != 0
    M, W = tl.load(entry + 3 * N), tl.load(entry + 4 * N)
    R, C = tl.where(turned, W, M), tl.where(turned, M, W)
    mask_ptr = tl.load(entry + 7 * N).to(tl.pointer_type(tl.uint8))
    stride_m, stride_n = tl.load(entry + 8 * N), tl.load(entry + 9 * N)
    stride_r = tl.where(turned, stride_n, stride_m)
    stride_c = tl.where(turned, stride_m, stride_n)
    place_ptr += tl.load(entry + 15 * N)
    across = tl.cdiv(C, COLS)
    begin = tl.zeros((), tl.int64)
    # whole blocks, then those at the right edge, at the bottom edge, and in the corner
    for region in tl.static_range(4):
        down_n = tl.where(R % ROWS != 0, 1, 0) if region >= 2 else R // ROWS
        across_n = tl.where(C % COLS != 0, 1, 0) if region % 2 else C // COLS
        size = (R % ROWS if region >= 2 else ROWS) * (C % COLS if region % 2 else COLS)
        # blocks are few enough for 32 bits, in which a division is short
        count, line = (down_n * across_n).to(tl.int32), tl.maximum(across_n, 1).to(tl.int32)
        for start in range(0, count, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            inside = offs < count
            i, j = (offs // line).to(tl.int64), (offs % line).to(tl.int64)
            if region >= 2:
                i += R // ROWS
            if region % 2:
                j += C // COLS
            flags = tl.load(
                mask_ptr + i * stride_r + j * stride_c, mask=inside, other=1
            )  # [CHUNK]
            pruned = (flags == 0).to(tl.int32)
            place = begin + (tl.cumsum(pruned, 0) - 1).to(tl.int64) * size
            tl.store(place_ptr + i * across + j, tl.where(flags == 0, place, -1), mask=inside)
            begin += tl.sum(pruned).to(tl.int64) * size


@triton.jit
def _move_tile(
    w_ptr,
    values_ptr,
    mask_ptr,
    place_ptr,
    tile,
    M,
    W,
    stride_wm,
    stride_wn,
    stride_mm,
    stride_mn,
    stride_vm,
    stride_vn,
    log_rows,
    log_cols,
    turned,
    whole,
    rest,
    TAKE: tl.constexpr,
    PACKED: tl.constexpr,
    BROAD: tl.constexpr,
    RUNS: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles_n = tl.cdiv(W, CHUNKS * WIDTH)
    offs_m = ((tile // tiles_n) * TILE_M + tl.arange(0, TILE_M)).to(INDEX)[:, None, None]
    chunk = ((tile % tiles_n) * CHUNKS + tl.arange(0, CHUNKS)).to(INDEX)[None, :, None]
    offs_n = chunk * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    inside = (offs_m < M) & (offs_n < W)
    w_at = w_ptr + offs_m * stride_wm + offs_n * stride_wn
    # where a mask element covers a chunk, it is read once for it
    masked_n = chunk * WIDTH if BROAD else offs_n
    in_mask = (offs_m < M) & (masked_n < W)
    at = (offs_m >> log_rows) * stride_mm + (masked_n >> log_cols) * stride_mn
    if PACKED:
        flags = tl.load(mask_ptr + at, mask=in_mask, other=0)  # [TILE_M, CHUNKS, 1 or WIDTH]
        # eight elements of a row share a byte, so one of the two terms is 0
        bit = (offs_m & ((1 << log_rows) - 1)) + (offs_n & ((1 << log_cols) - 1))
        pruned = ((flags.to(tl.int32) >> bit.to(tl.int32)) & 1) == 0
        values_at = values_ptr + offs_m * stride_vm + offs_n * stride_vn
        w = tl.load(w_at, mask=inside, other=0)  # [TILE_M, CHUNKS, WIDTH]
        if TAKE:
            tl.store(values_at, tl.where(pruned, w, 0), mask=inside)
            tl.store(w_at, tl.where(pruned, 0, w), mask=inside)
        else:
            tl.store(w_at, w | tl.load(values_at, mask=inside, other=0), mask=inside)
    else:
        place = tl.load(place_ptr + at, mask=in_mask, other=-1)  # [TILE_M, CHUNKS, 1 or WIDTH]
        # in a block that is pruned, as it lies in row-major order
        down, right = offs_m & ((1 << log_rows) - 1), offs_n & ((1 << log_cols) - 1)
        if RUNS:
            # a chunk is in one block: its values are neighbours
            right = masked_n & ((1 << log_cols) - 1)
            first = tl.multiple_of(place + (down << log_cols) + right, [1, 1, 8])
            values_at = values_ptr + first + tl.arange(0, WIDTH)[None, None, :]
        else:
            column = tl.where(turned, offs_m >> log_rows, offs_n >> log_cols)
            wide = tl.where(turned, 1 << log_rows, 1 << log_cols)
            wide = tl.where(column < whole, wide, rest)
            offset = tl.where(turned, right * wide + down, down * wide + right)
            values_at = values_ptr + place + offset
        moved = inside & (place >= 0)
        if TAKE:
            w = tl.load(w_at, mask=moved, other=0)  # [TILE_M, CHUNKS, WIDTH]
            tl.store(values_at, w, mask=moved)
            tl.store(w_at, 0, mask=moved)
        else:
            tl.store(w_at, tl.load(values_at, mask=moved, other=0), mask=moved)


@triton.jit
def _move_kernel(
    table_ptr,
    place_ptr,
    WORD: tl.constexpr,
    TAKE: tl.constexpr,
    PACKED: tl.constexpr,
    BROAD: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    TILE_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    UNIT: tl.constexpr = 128 // WORD.primitive_bitwidth
    entry = table_ptr + find_tensor(table_ptr, N)
    tile = (tl.program_id(0) - tl.load(entry)).to(tl.int32)
    w_ptr = tl.load(entry + N).to(tl.pointer_type(WORD))
    values_ptr = tl.load(entry + 2 * N).to(tl.pointer_type(WORD))
    M = tl.load(entry + 3 * N).to(INDEX)
    W = tl.load(entry + 4 * N).to(INDEX)
    stride_wm = tl.load(entry + 5 * N).to(INDEX)
    stride_wn = tl.load(entry + 6 * N).to(INDEX)
    mask_ptr = tl.load(entry + 7 * N).to(tl.pointer_type(tl.uint8))
    stride_mm = tl.load(entry + 8 * N).to(INDEX)
    stride_mn = tl.load(entry + 9 * N).to(INDEX)
    stride_vm = tl.load(entry + 10 * N).to(INDEX)
    stride_vn = tl.load(entry + 11 * N).to(INDEX)
    log_rows = tl.load(entry + 12 * N).to(INDEX)
    log_cols = tl.load(entry + 13 * N).to(INDEX)
    turned, whole, rest = W < 0, W, W
    if not PACKED:
        place_ptr += tl.load(entry + 15 * N)
        turned = tl.load(entry + 16 * N) != 0
        whole = tl.load(entry + 17 * N).to(INDEX)
        rest = tl.load(entry + 18 * N).to(INDEX)
        # the places lie as the grid does
        across = whole + tl.where(rest > 0, 1, 0)
        stride_mm = tl.where(turned, 1, across)
        stride_mn = tl.where(turned, across, 1)
    if tl.load(entry + 14 * N) != 0:
        # of a number from memory the compiler knows nothing: without these it moves one by one
        if PACKED:
            stride_vm, stride_vn = tl.multiple_of(stride_vm, UNIT), 1
        _move_tile(
            tl.multiple_of(w_ptr, 16), tl.multiple_of(values_ptr, 16), mask_ptr, place_ptr, tile,
            M, tl.multiple_of(W, UNIT), tl.multiple_of(stride_wm, UNIT), 1,
            stride_mm, stride_mn, stride_vm, stride_vn, log_rows, log_cols, turned, whole, rest,
            TAKE, PACKED, BROAD, BROAD, INDEX, TILE_M, CHUNKS, WIDTH,
        )  # fmt: skip
    else:
        _move_tile(
            w_ptr, values_ptr, mask_ptr, place_ptr, tile, M, W, stride_wm, stride_wn,
            stride_mm, stride_mn, stride_vm, stride_vn, log_rows, log_cols, turned, whole, rest,
            TAKE, PACKED, BROAD, False, INDEX, TILE_M, CHUNKS, WIDTH,
        )  # fmt: skip


def _columns(
    weights: Matrices,
    values: Column,
    value_strides: tuple[Column | int, Column | int],
    masks: Matrices,
    rows: int,
    cols: int,
    width: int,
) -> list[Column]:
    """Return the columns but for those that blocks alone have."""
    turned = weights.turned
    M, W = swap(turned, weights.rows, weights.cols)
    stride_m, stride_n = swap(turned, weights.row_stride, weights.col_stride)
    mask_m, mask_n = swap(turned, masks.row_stride, masks.col_stride)
    value_m, value_n = swap(turned, *value_strides)
    log_rows, log_cols = swap(turned, rows.bit_length() - 1, cols.bit_length() - 1)
    unit = 16 // width
    runs = (stride_n == 1) & ((stride_m % unit | W % unit | (weights.address | values) % 16) == 0)
    programs = ceil_div(M, TILE["TILE_M"]) * ceil_div(W, TILE["CHUNKS"] * TILE["WIDTH"])
    return [
        *(programs, weights.address, values, M, W, stride_m, stride_n, masks.address),
        *(mask_m, mask_n, value_m, value_n, log_rows, log_cols, runs),
    ]


def launch_moved(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    rows: int,
    cols: int,
    *,
    take: bool,
) -> None:
    """Move the pruned values out of weights, or back.

    Args:
        weights: matrices, floats of 16, 32 or 64 bits, any strides, on one device.
        values: as ``take_pruned`` returns them.
        masks: compact, all of one form.
        rows, cols: sides of the pattern.
        take: out of the weights, which are zero then; else back.
    """
    packed = masks[0].dtype == torch.uint8
    for width, at in alike(weight.element_size() for weight in weights).items():
        own, their_masks = (Matrices.of([t[place] for place in at]) for t in (weights, masks))
        if packed:
            kept_at = Matrices.of([values[place] for place in at])
            columns = _columns(own, kept_at.address, kept_at[3:], their_masks, 1, 8, width)
            columns[14] &= (columns[11] == 1) & (columns[10] % (16 // width) == 0)
            index, blocks = list_index_type(own, their_masks, kept_at), 1
        else:
            kept_at = addresses(values[place] for place in at)
            columns = _columns(own, kept_at, (0, 0), their_masks, rows, cols, width)
            whole, rest = own.cols // cols, own.cols % cols
            # values of a block that is walked down its columns, or is narrower, lie otherwise
            columns[14] &= ~own.turned & (rest == 0)
            grid = ceil_div(own.rows, rows) * ceil_div(own.cols, cols)
            columns += [first_of(grid), own.turned, whole, rest]
            index, blocks = list_index_type(own, their_masks), int(grid.sum())
        if not columns[0].any():
            continue
        with on_device(weights[0]):
            place = torch.empty(blocks, dtype=torch.int64, device=weights[0].device)
            table, programs = device_table(weights[0].device, columns)
            n = table.shape[1]
            if not packed:
                _place_kernel[(len(at),)](
                    table,
                    place,
                    N=n,
                    ROWS=rows,
                    COLS=cols,
                    CHUNK=CHUNK,
                    num_warps=8,
                    **FUSED,
                )
            _move_kernel[(programs,)](
                table,
                place,
                WORD=getattr(tl, str(WORDS[width]).removeprefix("torch.")),
                TAKE=take,
                PACKED=packed,
                BROAD=bool(columns[13].min() >= 3),
                INDEX=index,
                N=n,
                **TILE,
                num_warps=8 if packed else 4,
                **FUSED,
            )
