"""Masks from scores and a threshold, exact under ties.

An element is kept if its key ``float32(|t|) * scale`` is above the threshold, or equal to it and
among the first ``keep_ties`` equal ones in the order of the list, then row-major; or of its own
tensor, where each has a threshold. Which those are is known only once all were seen. So one pass
over the scores writes which keys are above and, as scratch, which are equal, and a second, over
bits, adds the equal ones that stay.

Cost floor: one read of the scores and one write of the masks.

Reading order: reference -> kernels -> launcher -> operators -> public function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bits import (
    WORDS,
    Packer,
    bytes_of,
    chunk_size,
    chunks,
    expand_mask,
    pack,
    packed_shape,
    unpack,
    word_mask,
)
from .grid import ceil_div, pad_to_blocks
from .launch import FUSED, Backend, is_plain, on_device, takes_kernels, tl, triton, use_triton
from .pattern import NM, Pattern, Unstructured
from .semi_structured import nm_complete
from .table import Column, Matrices, alike, device_table, find_tensor, first_of, list_index_type

if TYPE_CHECKING:
    from .search import Threshold

__all__ = [
    "WORDS",
    "expand_mask",
    "make_mask",
    "make_mask_reference",
    "pack",
    "unpack",
    "word_mask",
]

TILE_BYTES = 32768  # of scores that a program compares where they lie in one run
STRIDED_TILE = 4096  # elements that a program compares elsewhere
PIECE = 1024  # longest part of a row in a tile of several rows
TIES_TILE = {True: 32768, False: 8192}  # elements that a program completes; True: one run, packed
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def make_mask_reference(
    tensors: Sequence[Tensor],
    value: Tensor,
    keep_ties: Tensor,
    scales: Tensor | None,
    packed: bool,
    out: Sequence[Tensor],
) -> None:
    """Define the semantics: plain torch, any device, any float dtype, a few MB of scratch."""
    values, ties = value.expand(len(tensors)), keep_ties.expand(len(tensors)).tolist()
    left = ties[0]
    for i, (tensor, mask) in enumerate(zip(tensors, out, strict=True)):
        value = values[i]
        left = ties[i] if keep_ties.ndim else left
        buffer = tensor.new_empty(chunk_size(tensor.shape), dtype=torch.float32)
        packer = Packer(tensor) if packed else None
        # keys lie as the scores do: bools are transposed in a fifth of the time (measured)
        turned = tensor.stride(0) < tensor.stride(1)
        for chunk in chunks(tensor.shape):
            score = tensor[chunk]
            key = buffer[: score.numel()]
            key = key.view(score.T.shape).T if turned else key.view(score.shape)
            key.copy_(score).abs_()
            if scales is not None:
                key.mul_(scales[i])
            keep = packer.buffer(*score.shape) if packer else mask[chunk]
            torch.gt(key, value, out=keep)
            if left:
                tie = key == value
                count = int(tie.count_nonzero())
                if count > left:
                    tie &= tie.flatten().cumsum(0).view(score.shape) <= left
                keep |= tie
                left -= min(count, left)
            if packer:
                packer.write(mask[bytes_of(chunk)])


# A list goes into one launch as a table, int64, (11, N): of each tensor the first program of both
# passes, the addresses of scores and mask, rows, columns, their strides, the first unit, the first
# byte of equal bits, and the place in the list.


@triton.jit
def _compare_kernel(
    table_ptr,
    value_ptr,
    scales_ptr,
    equal_ptr,
    count_ptr,
    DTYPE: tl.constexpr,
    EACH: tl.constexpr,
    PACKED: tl.constexpr,
    LAYOUT: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr, N)
    tile = (tl.program_id(0) - tl.load(entry)).to(INDEX)
    x_ptr = tl.load(entry + 2 * N).to(tl.pointer_type(DTYPE))
    out_ptr = tl.load(entry + 3 * N).to(tl.pointer_type(tl.uint8))
    R = tl.load(entry + 4 * N).to(INDEX)
    C = tl.load(entry + 5 * N).to(INDEX)
    stride_r = tl.load(entry + 6 * N).to(INDEX)
    stride_c = tl.load(entry + 7 * N).to(INDEX)
    # of a number from memory the compiler knows nothing: without these it loads one by one
    if LAYOUT == "flat":
        x_ptr = tl.multiple_of(x_ptr, 16)
        C = tl.multiple_of(C, 16)
        stride_c = 1
        if not PACKED:  # packed, every thread stores the bytes it has; wider would cost a detour
            out_ptr = tl.multiple_of(out_ptr, 16)
    if LAYOUT == "columns":
        x_ptr = tl.multiple_of(x_ptr, 16)
        R = tl.multiple_of(R, 8)
        stride_r = 1
        stride_c = tl.multiple_of(stride_c, 8)

    pieces = tl.cdiv(C, BLOCK_C)
    if LAYOUT == "flat":
        offs_r = tl.arange(0, 1).to(INDEX)
        piece = tile
    else:
        offs_r = tile // pieces * BLOCK_R + tl.arange(0, BLOCK_R)
        piece = tile % pieces
    offs_c = piece * BLOCK_C + tl.arange(0, BLOCK_C)
    in_r = offs_r < R
    # not offs_c < C: past the end of a row of nearly 2^31 elements, offs_c overflows
    in_x = in_r[:, None] & (tl.arange(0, BLOCK_C) < C - piece * BLOCK_C)[None, :]
    x = tl.load(
        x_ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c,
        mask=in_x,
        other=float("nan"),  # neither above nor equal
    )  # [BLOCK_R, BLOCK_C]
    key = tl.abs(x.to(tl.float32))
    if scales_ptr is not None:
        key *= tl.load(scales_ptr + tl.load(entry + 10 * N))
    value = tl.load(value_ptr + tl.load(entry + 10 * N) if EACH else value_ptr)

    # one sum for three: bits 0 to 7 are those above, 8 to 15 the equal, 16 to 19 count the equal
    above = 1 << (tl.arange(0, BLOCK_C) % 8)[None, :]
    code = tl.where(key > value, above, tl.where(key == value, (above << 8) + 65536, 0))
    code = tl.sum(code.reshape([BLOCK_R, BLOCK_C // 8, 8]), axis=2)  # [BLOCK_R, BLOCK_C // 8]

    unit = tl.load(entry + 8 * N) + offs_r * pieces + piece
    tl.store(count_ptr + unit, tl.sum(code >> 16, axis=1), mask=in_r)
    width = tl.cdiv(C, 8)
    offs_b = piece * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    in_b = in_r[:, None] & (offs_b < width)[None, :]
    offs_b = offs_r[:, None] * width + offs_b[None, :]
    tl.store(equal_ptr + tl.load(entry + 9 * N) + offs_b, (code >> 8).to(tl.uint8), mask=in_b)
    if PACKED:
        tl.store(out_ptr + offs_b, code.to(tl.uint8), mask=in_b)
    else:
        offs_x = offs_r[:, None] * C + offs_c[None, :]
        tl.store(out_ptr + offs_x, (key > value).to(tl.uint8), mask=in_x)


@triton.jit
def _add_ties(
    out_ptr,
    equal_ptr,
    unit,
    room,
    C,
    CUT: tl.constexpr,
    PACKED: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
):
    """Keep the equal elements of every unit with room, or if ``CUT`` their first ``room``."""
    U: tl.constexpr = unit.shape[0]
    if LAYOUT == "flat":
        row, piece = tl.zeros_like(unit), unit
        width = tl.multiple_of(C // 8, 16)
    else:
        row, piece = unit // tl.cdiv(C, BLOCK_C), unit % tl.cdiv(C, BLOCK_C)
        width = tl.cdiv(C, 8)
    seen = tl.zeros([U, 1], tl.int32)
    for start in range(0, BLOCK_C // 8, STEP):
        offs_b = piece[:, None] * (BLOCK_C // 8) + start + tl.arange(0, STEP)[None, :]
        in_b = (room > 0)[:, None] & (offs_b < width)
        offs_c = piece[:, None] * BLOCK_C + start * 8 + tl.arange(0, STEP * 8)[None, :]
        offs_b += row[:, None] * width
        equal = tl.load(equal_ptr + offs_b, mask=in_b, other=0)  # [U, STEP]
        if CUT:
            count = tl.zeros([U, STEP], tl.int32)
            for j in tl.static_range(8):
                count += (equal >> j) & 1
            rank = seen + tl.cumsum(count, axis=1) - count
            seen += tl.sum(count, axis=1)[:, None]
            first = tl.zeros([U, STEP], tl.int32)
            for j in tl.static_range(8):
                bit = ((equal >> j) & 1).to(tl.int32)
                rank += bit
                first |= tl.where(rank <= room[:, None], bit << j, 0)
            equal = first.to(tl.uint8)
        if PACKED:
            above = tl.load(out_ptr + offs_b, mask=in_b, other=0)
            tl.store(out_ptr + offs_b, above | equal, mask=in_b)
        else:
            bits = (equal[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1
            bits = bits.reshape([U, STEP * 8])
            tl.store(out_ptr + row[:, None] * C + offs_c, bits, mask=bits != 0)


@triton.jit
def _ties_kernel(
    table_ptr,
    keep_ties_ptr,
    equal_ptr,
    count_ptr,
    end_ptr,
    EACH: tl.constexpr,
    PACKED: tl.constexpr,
    LAYOUT: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr + N, N)
    tile = (tl.program_id(0) - tl.load(entry + N)).to(INDEX)
    out_ptr = tl.load(entry + 3 * N).to(tl.pointer_type(tl.uint8))
    R = tl.load(entry + 4 * N).to(INDEX)
    C = tl.load(entry + 5 * N).to(INDEX)
    start = tl.load(entry + 8 * N)
    equal_ptr += tl.load(entry + 9 * N)
    if LAYOUT == "flat":
        out_ptr = tl.multiple_of(out_ptr, 16)
        equal_ptr = tl.multiple_of(equal_ptr, 16)
        C = tl.multiple_of(C, 128)

    unit = tile * BLOCK_U + tl.arange(0, BLOCK_U)
    in_u = unit < R * tl.cdiv(C, BLOCK_C)
    count = tl.load(count_ptr + start + unit, mask=in_u, other=0)
    end = tl.load(end_ptr + start + unit, mask=in_u, other=0)
    # how many of a unit's equals are kept: all, none, or in one unit of the threshold's some
    if EACH:
        keep_ties_ptr += tl.load(entry + 10 * N)
        end -= tl.load(end_ptr + start - 1, mask=start > 0, other=0)
    room = tl.load(keep_ties_ptr) - (end - count)
    room = tl.maximum(tl.minimum(room, count), 0).to(tl.int32)
    whole = tl.where(room == count, room, 0)
    some = room - whole
    BYTES: tl.constexpr = BLOCK_C // 8
    if tl.max(whole, axis=0) > 0:
        _add_ties(out_ptr, equal_ptr, unit, whole, C, False, PACKED, LAYOUT, BLOCK_C, BYTES)
    if tl.max(some, axis=0) > 0:
        # in short steps, since ranks need registers
        STEP: tl.constexpr = min(BYTES, 256)
        one = tl.sum(tl.where(some > 0, unit, 0), axis=0) + tl.zeros([1], INDEX)
        first = tl.max(some, axis=0) + tl.zeros([1], tl.int32)
        _add_ties(out_ptr, equal_ptr, one, first, C, True, PACKED, LAYOUT, BLOCK_C, STEP)


class _Tiling(NamedTuple):
    """How matrices are seen, and the tiles they are compared in: one number a matrix.

    A matrix in one run, whose packed rows are in one run too, is seen as one row: a tile is then
    no longer bound to the matrix's width.
    """

    layout: Column  # in LAYOUTS
    rows: Column
    cols: Column
    row_stride: Column
    col_stride: Column
    block_r: Column
    block_c: Column


LAYOUTS = ("any", "flat", "columns")


def _tiling(own: Matrices, out: Column, widths: Column, packed: bool) -> _Tiling:
    _, rows, cols, row_stride, col_stride = own
    aligned = (own.address | out) % 16 == 0
    one_run = ((col_stride == 1) | (cols == 1)) & ((row_stride == cols) | (rows == 1))
    if packed:
        one_run &= cols % 8 == 0
    size = rows * cols
    flat = one_run & aligned & (size % 128 == 0)
    along = aligned & (row_stride == 1) & ((rows | col_stride) % 8 == 0) & ~one_run
    # pieces of rows, of a power of two
    piece = np.minimum(cols, PIECE)
    piece = np.maximum(8, 1 << np.ceil(np.log2(np.maximum(piece, 1))).astype(np.int64))
    block_c = np.where(along, STRIDED_TILE // 64, piece)
    block_c = np.where(one_run, np.where(flat, TILE_BYTES // widths, STRIDED_TILE), block_c)
    return _Tiling(
        np.where(flat, 1, np.where(along, 2, 0)),
        np.where(one_run, 1, rows),
        np.where(one_run, size, cols),
        np.where(one_run, size, row_stride),
        np.where(one_run, 1, col_stride),
        np.where(one_run, 1, STRIDED_TILE // block_c),
        block_c,
    )


def _launch(
    tensors: Sequence[Tensor],
    value: Tensor,
    keep_ties: Tensor,
    scales: Tensor | None,
    packed: bool,
    out: Sequence[Tensor],
) -> None:
    # Tensors of one dtype, layout and tile share a launch, which costs more than a small tensor's
    # work. A unit is what a tile has of one row: a run of consecutive elements. Units are numbered
    # in the order of the list, row-major, so the running sum of their equals gives ranks.
    own, masks = Matrices.of(tensors), Matrices.of(out)
    widths = np.array([tensor.element_size() for tensor in tensors])
    tiling = _tiling(own, masks.address, widths, packed)
    layout, rows, cols, *strides, block_r, block_c = tiling
    pieces = ceil_div(cols, block_c)
    units, equal_bytes = rows * pieces, ceil_div(rows * ceil_div(cols, 8), 16) * 16
    if not units.any():
        return
    ties_tile = np.where(layout == 1, TIES_TILE[packed], TIES_TILE[False])
    block_u = np.maximum(1, ties_tile // block_c)
    columns = (
        *(ceil_div(rows, block_r) * pieces, ceil_div(units, block_u), own.address, masks.address),
        *(rows, cols, *strides, first_of(units), first_of(equal_bytes), np.arange(len(tensors))),
    )
    equal = value.new_empty(int(equal_bytes.sum()), dtype=torch.uint8)
    count = value.new_empty(int(units.sum()), dtype=torch.int32)
    index = list_index_type(own, masks)
    kinds = zip(
        (t.dtype for t in tensors),
        *(column.tolist() for column in (layout, block_r, block_c, block_u)),
        strict=True,
    )
    ties_launches = []
    with on_device(value):
        for (dtype, how, BLOCK_R, BLOCK_C, BLOCK_U), at in alike(kinds).items():
            programs, ties_programs, *rest = (column[at] for column in columns)
            if not programs.any():
                continue
            table, total = device_table(value.device, (programs, first_of(ties_programs), *rest))
            meta = {
                "EACH": value.ndim > 0,
                "PACKED": packed,
                "LAYOUT": LAYOUTS[how],
                "INDEX": index,
                "N": table.shape[1],
            }
            meta |= {"BLOCK_C": BLOCK_C, "num_warps": 8}
            _compare_kernel[(total,)](
                table, value, scales, equal, count,
                DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), BLOCK_R=BLOCK_R, **meta,
            **FUSED,)  # fmt: skip
            meta["BLOCK_U"] = BLOCK_U
            ties_launches.append((int(ties_programs.sum()), table, meta))
        end = torch.cumsum(count, 0)
        for programs, table, meta in ties_launches:
            _ties_kernel[(programs,)](
                table,
                keep_ties,
                equal,
                count,
                end,
                **meta,
                **FUSED,
            )


def _new_masks(tensors: Sequence[Tensor], packed: bool) -> list[Tensor]:
    if packed:
        return [t.new_empty(packed_shape(t.shape), dtype=torch.uint8) for t in tensors]
    return [t.new_empty(t.shape, dtype=torch.bool) for t in tensors]


def _make_new(
    tensors: Sequence[Tensor],
    value: Tensor,
    keep_ties: Tensor,
    scales: Tensor | None,
    packed: bool,
) -> list[Tensor]:
    out = _new_masks(tensors, packed)
    _write(tensors, value, keep_ties, scales, packed, out)
    return out


def _write(
    tensors: Sequence[Tensor],
    value: Tensor,
    keep_ties: Tensor,
    scales: Tensor | None,
    packed: bool,
    out: Sequence[Tensor],
) -> None:
    write = _launch if takes_kernels(value.device) else make_mask_reference
    write(tensors, value, keep_ties, scales, packed, out)


_out_op = torch.library.custom_op("triton_sparsity::make_mask_out", _write, mutates_args=("out",))
_op = torch.library.custom_op("triton_sparsity::make_mask", _make_new, mutates_args=())


@_out_op.register_fake
def _(tensors, value, keep_ties, scales, packed, out) -> None:
    return None


@_op.register_fake
def _(tensors, value, keep_ties, scales, packed) -> list[Tensor]:
    return _new_masks(tensors, packed)


def _check_lists(
    tensors: Sequence[Tensor],
    scales: Tensor | None,
    packed: bool,
    out: Sequence[Tensor] | None,
) -> None:
    device = tensors[0].device
    for i, t in enumerate(tensors):
        if t.ndim != 2 or t.dtype not in FLOATS or t.device != device:
            raise ValueError(
                f"make_mask: tensors must be floating-point matrices on one device ({device}), "
                f"got {t.dtype} {tuple(t.shape)} on {t.device} at {i}"
            )
    if scales is not None and (
        scales.shape != (len(tensors),) or scales.dtype != torch.float32 or scales.device != device
    ):
        raise ValueError(
            f"make_mask: scales must be float32 ({len(tensors)},) on {device}, "
            f"got {scales.dtype} {tuple(scales.shape)} on {scales.device}"
        )
    if out is None:
        return
    if len(out) != len(tensors):
        raise ValueError(f"make_mask: out must have {len(tensors)} masks, got {len(out)}")
    dtype = torch.uint8 if packed else torch.bool
    for i, (t, mask) in enumerate(zip(tensors, out, strict=True)):
        shape = packed_shape(t.shape) if packed else t.shape
        if (
            mask.shape != shape
            or mask.dtype != dtype
            or mask.device != device
            or not mask.is_contiguous()
        ):
            raise ValueError(
                f"make_mask: out must be contiguous {dtype} {tuple(shape)} on {device}, "
                f"got {mask.dtype} {tuple(mask.shape)} on {mask.device} "
                f"with strides {mask.stride()} at {i}"
            )


def make_mask(
    tensors: Sequence[Tensor],
    threshold: Threshold,
    *,
    scales: Tensor | None = None,
    packed: bool,
    out: Sequence[Tensor] | None = None,
    backend: Backend = "auto",
) -> list[Tensor]:
    """Keep the elements above a threshold, and of those equal to it the first few.

    Element ``j`` of tensor ``i`` has the key ``float32(|t[i][j]|) * scales[i]``, an IEEE float32
    product. It is kept if ``key > threshold.value``, or if ``key == threshold.value`` and fewer
    than ``threshold.keep_ties`` equal keys come before it in the list, row-major. A value of -inf
    keeps everything. With ``select``'s threshold exactly k elements are pruned. A threshold of
    ``select_each``, whose numbers are one a tensor, is for each tensor by itself.

    On a GPU nothing waits for the device. Scratch is one bit an element and 12 bytes per run of
    4096 to 16384 elements (of 8 to 1024 in matrices with gaps or transposed).

    Args:
        tensors: scores or weights, matrices of any float dtype and strides, on one device;
            float64 takes plain torch.
        threshold: ``value`` float32 and ``keep_ties`` int64, both 0-d and on that device.
        scales: float32, one factor a tensor, on that device; None is 1.
        packed: whether masks have one bit an element, uint8 ``(R, ceil(C / 8))``, or are bool.
        out: contiguous masks to write in place; their storage stays where it is.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; plain torch waits for the device.

    Returns:
        A mask for every tensor, 1 or True where kept: ``out``'s tensors if given.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or layout.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    if not tensors:
        return []
    _check_lists(tensors, scales, packed, out)
    value, keep_ties = threshold.value, threshold.keep_ties
    for name, t, dtype in (
        ("value", value, torch.float32),
        ("keep_ties", keep_ties, torch.int64),
    ):
        shapes = (), (len(tensors),)
        if t.shape not in shapes or t.dtype != dtype or t.device != tensors[0].device:
            raise ValueError(
                f"make_mask: threshold.{name} must be 0-d, or one a tensor, {dtype} on "
                f"{tensors[0].device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if value.shape != keep_ties.shape:
        raise ValueError(
            f"make_mask: threshold.keep_ties must have value's shape {tuple(value.shape)}, got "
            f"{tuple(keep_ties.shape)}"
        )
    on_triton = use_triton("make_mask", backend, tensors[0])
    has_float64 = any(t.dtype == torch.float64 for t in tensors)
    if has_float64 and backend == "triton":
        raise ValueError("make_mask: tensors must not be float64 with backend='triton'")
    plain = backend == "torch" or (on_triton and has_float64)
    if scales is not None:
        scales = scales.contiguous()
    with torch.no_grad():
        if out is None and not plain:
            make = _make_new if is_plain(*tensors) else _op
            return make(tensors, value, keep_ties, scales, packed)
        out = _new_masks(tensors, packed) if out is None else out
        fill = make_mask_reference if plain else _out_op
        fill(tensors, value, keep_ties, scales, packed, out)
    return list(out)


def nonzero_groups(matrix: Tensor, pattern: Pattern) -> Tensor:
    """Return a bool grid: True where a group has an element that is not zero.

    Under N:M the grid is of elements, and a tuple of more than n that are not zero is kept whole.
    """
    nonzero = matrix != 0
    if isinstance(pattern, NM):
        return nm_complete(nonzero, pattern)
    if isinstance(pattern, Unstructured):
        return nonzero
    return pad_to_blocks(nonzero, pattern.rows, pattern.cols).any(3).any(1)
