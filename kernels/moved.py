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
from .grid import block_counts, ceil_div
from .launch import index_type, on_device, tl, triton
from .table import device_table, find_tensor

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


def _entry(w: Tensor, values: Tensor, mask: Tensor, rows: int, cols: int) -> tuple[int, ...]:
    """Return an entry but for the first of the blocks' places."""
    (M, W), (stride_m, stride_n), (mask_m, mask_n) = w.shape, w.stride(), mask.stride()
    packed = mask.dtype == torch.uint8
    value_m, value_n = values.stride() if packed else (0, 0)
    whole, rest = divmod(W, cols)
    turned = stride_m < stride_n
    if turned:
        M, W, stride_m, stride_n, mask_m, mask_n = W, M, stride_n, stride_m, mask_n, mask_m
        value_m, value_n, rows, cols = value_n, value_m, cols, rows
    unit = 16 // w.element_size()
    runs = stride_n == 1 and not (stride_m % unit or W % unit or w.data_ptr() % 16)
    runs = runs and values.data_ptr() % 16 == 0
    if packed:
        runs = runs and value_n == 1 and value_m % unit == 0
    else:
        # values of a block that is walked down its columns, or is narrower, lie otherwise
        runs = runs and not turned and not rest
    return (
        ceil_div(M, TILE["TILE_M"]) * ceil_div(W, TILE["CHUNKS"] * TILE["WIDTH"]),
        *(w.data_ptr(), values.data_ptr(), M, W, stride_m, stride_n, mask.data_ptr()),
        *(mask_m, mask_n, value_m, value_n, rows.bit_length() - 1, cols.bit_length() - 1),
        *(int(runs), int(turned), whole, rest),
    )


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
    sides = (1, 8) if packed else (rows, cols)
    launches: dict[torch.dtype, list[tuple[int, ...]]] = {}
    places = 0
    for w, own, mask in zip(weights, values, masks, strict=True):
        if not w.numel():
            continue
        entry = _entry(w, own, mask, *sides)
        launches.setdefault(WORDS[w.element_size()], []).append((*entry[:15], places, *entry[15:]))
        down, across = block_counts(w.shape, rows, cols)
        places += 0 if packed else down * across
    if not launches:
        return
    first = weights[0]
    place = torch.empty(max(places, 1), dtype=torch.int64, device=first.device)
    index = index_type(*weights, *(v for v in values if packed), *masks)
    with on_device(first):
        for word, entries in launches.items():
            table, programs = device_table(first.device, entries)
            n = table.shape[1]
            if not packed:
                _place_kernel[(len(entries),)](
                    table, place, N=n, ROWS=rows, COLS=cols, CHUNK=CHUNK, num_warps=8
                )
            _move_kernel[(programs,)](
                table,
                place,
                WORD=getattr(tl, str(word).removeprefix("torch.")),
                TAKE=take,
                PACKED=packed,
                BROAD=min(entry[13] for entry in entries) >= 3,
                INDEX=index,
                N=n,
                **TILE,
                num_warps=8 if packed else 4,
            )
