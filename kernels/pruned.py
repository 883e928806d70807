"""Pruned elements in place: clear them in a list of tensors, or count those that are not zero.

One kernel for both. A list of any sizes and strides is one launch for each width of element: its
table says what the weights' own types and shapes cannot, so what a compiler would know of them (a
stride of 1, rows that begin at 16 bytes) is asked at run time, once a program. A tensor is walked
along its memory: one that is stored transposed, with its mask transposed too.

Floor: a bool mask costs one read of itself and one write of the pruned elements, or to count them
one read. Bits of a fine mask: chunks of 8 elements that lose one are read and written back.

Reading order: kernels -> launcher.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .bits import WORDS
from .grid import ceil_div
from .launch import FUSED, on_device, tl, triton
from .table import Column, Matrices, alike, device_table, find_tensor, list_index_type, swap

# two to eight 16-byte accesses of a thread; a chunk is 16 bytes of a 16-bit float
TILE = {"TILE_M": 16, "CHUNKS": 32, "WIDTH": 8}
WARPS = {False: 4, True: 8}  # True: of fine masks, whose bits need registers


@triton.jit
def _visit_tile(
    w_ptr,
    mask_ptr,
    tile,
    M,
    N,
    stride_wm,
    stride_wn,
    stride_mm,
    stride_mn,
    log_rows,
    log_cols,
    COUNT: tl.constexpr,
    PACKED: tl.constexpr,
    BROAD: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Clear one tile's pruned elements; or return how many of them are not zero."""
    tiles_n = tl.cdiv(N, CHUNKS * WIDTH)
    offs_m = ((tile // tiles_n) * TILE_M + tl.arange(0, TILE_M)).to(INDEX)[:, None, None]
    chunk = ((tile % tiles_n) * CHUNKS + tl.arange(0, CHUNKS)).to(INDEX)[None, :, None]
    offs_n = chunk * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    inside = (offs_m < M) & (offs_n < N)

    # where a mask byte covers a chunk, it is read once for it
    masked_n = chunk * WIDTH if BROAD else offs_n
    flags = tl.load(
        mask_ptr + (offs_m >> log_rows) * stride_mm + (masked_n >> log_cols) * stride_mn,
        mask=(offs_m < M) & (masked_n < N),
        other=0,
    )  # [TILE_M, CHUNKS, 1] or [TILE_M, CHUNKS, WIDTH]
    if PACKED:
        # eight elements of a row share a byte, so one of the two terms is 0
        bit = (offs_m & ((1 << log_rows) - 1)) + (offs_n & ((1 << log_cols) - 1))
        pruned = inside & (((flags.to(tl.int32) >> bit.to(tl.int32)) & 1) == 0)
        if BROAD:
            visited = inside & (flags != 255)
        else:
            visited = inside & (tl.max(pruned.to(tl.int32), axis=2, keep_dims=True) != 0)
    else:
        pruned = inside & (flags == 0)
        visited = pruned

    at = w_ptr + offs_m * stride_wm + offs_n * stride_wn
    leaks = 0
    if COUNT:
        w = tl.load(at, mask=visited, other=0)  # [TILE_M, CHUNKS, WIDTH]
        leaks += tl.sum((pruned & (w + w != 0)).to(tl.int32))  # without the sign
    elif PACKED:
        w = tl.load(at, mask=visited, other=0)  # [TILE_M, CHUNKS, WIDTH]
        tl.store(at, tl.where(pruned, 0, w), mask=visited)
    else:
        tl.store(at, 0, mask=pruned)
    return leaks


# A table's columns: first program, addresses of weight and mask, rows, columns, the strides of
# both, the block's sides as powers of two, whether rows are whole runs of 16 bytes, the place in
# the list.


@triton.jit
def _pruned_kernel(
    table_ptr,
    count_ptr,
    WORD: tl.constexpr,
    COUNT: tl.constexpr,
    PACKED: tl.constexpr,
    BROAD: tl.constexpr,
    INDEX: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILE_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    UNIT: tl.constexpr = 128 // WORD.primitive_bitwidth
    entry = table_ptr + find_tensor(table_ptr, ENTRIES)
    tile = (tl.program_id(0) - tl.load(entry)).to(tl.int32)
    w_ptr = tl.load(entry + ENTRIES).to(tl.pointer_type(WORD))
    mask_ptr = tl.load(entry + 2 * ENTRIES).to(tl.pointer_type(tl.uint8))
    M = tl.load(entry + 3 * ENTRIES).to(INDEX)
    N = tl.load(entry + 4 * ENTRIES).to(INDEX)
    stride_wm = tl.load(entry + 5 * ENTRIES).to(INDEX)
    stride_wn = tl.load(entry + 6 * ENTRIES).to(INDEX)
    stride_mm = tl.load(entry + 7 * ENTRIES).to(INDEX)
    stride_mn = tl.load(entry + 8 * ENTRIES).to(INDEX)
    log_rows = tl.load(entry + 9 * ENTRIES).to(INDEX)
    log_cols = tl.load(entry + 10 * ENTRIES).to(INDEX)
    if tl.load(entry + 11 * ENTRIES) != 0:
        # of a number from memory the compiler knows nothing: without these it stores one by one
        leaks = _visit_tile(
            tl.multiple_of(w_ptr, 16), mask_ptr, tile, M, tl.multiple_of(N, UNIT),
            tl.multiple_of(stride_wm, UNIT), 1, stride_mm, stride_mn, log_rows, log_cols,
            COUNT, PACKED, BROAD, INDEX, TILE_M, CHUNKS, WIDTH,
        )  # fmt: skip
    else:
        leaks = _visit_tile(
            w_ptr, mask_ptr, tile, M, N, stride_wm, stride_wn,
            stride_mm, stride_mn, log_rows, log_cols,
            COUNT, PACKED, BROAD, INDEX, TILE_M, CHUNKS, WIDTH,
        )  # fmt: skip
    if COUNT:
        # integers: in whichever order they are added, the sum is the same
        at = count_ptr + tl.load(entry + 12 * ENTRIES)
        tl.atomic_add(at, leaks.to(tl.int64), mask=leaks > 0)


def _columns(
    tensors: Matrices, masks: Matrices, rows: int, cols: int, width: int
) -> tuple[Column, ...]:
    turned = tensors.turned
    M, N = swap(turned, tensors.rows, tensors.cols)
    stride_m, stride_n = swap(turned, tensors.row_stride, tensors.col_stride)
    mask_m, mask_n = swap(turned, masks.row_stride, masks.col_stride)
    log_rows, log_cols = swap(turned, rows.bit_length() - 1, cols.bit_length() - 1)
    unit = 16 // width
    runs = (stride_n == 1) & ((stride_m % unit | N % unit | tensors.address % 16) == 0)
    programs = ceil_div(M, TILE["TILE_M"]) * ceil_div(N, TILE["CHUNKS"] * TILE["WIDTH"])
    return (
        *(programs, tensors.address, masks.address, M, N, stride_m, stride_n, mask_m, mask_n),
        *(log_rows, log_cols, runs),
    )


def launch_pruned(
    tensors: Sequence[Tensor],
    masks: Sequence[Tensor],
    rows: int,
    cols: int,
    counts: Tensor | None = None,
) -> None:
    """Clear the pruned elements; or add to ``counts``, one a tensor, how many are not zero.

    Args:
        tensors: one or more; matrices, floats of 16, 32 or 64 bits, any strides, any devices.
        masks: compact, all of one form, each on its tensor's device.
        rows, cols: sides of the pattern.
        counts: int64, on the tensors' one device.
    """
    packed = masks[0].dtype == torch.uint8
    sides = (1, 8) if packed else (rows, cols)
    # the number of a device is compared faster than the device
    kinds = alike((t.get_device(), t.element_size()) for t in tensors)
    for (_, width), places in kinds.items():
        device = tensors[places[0]].device
        own = Matrices.of([tensors[place] for place in places])
        their_masks = Matrices.of([masks[place] for place in places])
        columns = _columns(own, their_masks, *sides, width)
        if not columns[0].any():
            continue
        with on_device(tensors[places[0]]):
            table, programs = device_table(device, [*columns, np.array(places)])
            _pruned_kernel[(programs,)](
                table,
                table if counts is None else counts,
                WORD=getattr(tl, str(WORDS[width]).removeprefix("torch.")),
                COUNT=counts is not None,
                PACKED=packed,
                BROAD=bool(columns[10].min() >= 3),
                INDEX=list_index_type(own, their_masks),
                ENTRIES=table.shape[1],
                **TILE,
                num_warps=WARPS[packed],
                **FUSED,
            )
