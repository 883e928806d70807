"""Counts of what compact masks keep: groups, and the elements in them.

A list is one launch on a GPU. Nothing waits for the device; whoever needs the numbers reads those
of all masks at once. Integers are added in memory, whose sum does not depend on their order.

Reading order: reference -> kernel -> launcher -> operator -> public function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .grid import ceil_div, side_lengths
from .launch import FUSED, Backend, is_plain, on_device, takes_kernels, tl, triton, use_triton
from .pattern import Block, Pattern
from .table import Matrices, device_table, find_tensor

BYTES = 8192  # of a mask that a program counts


def kept_counts_reference(
    masks: Sequence[Tensor], rows: int, cols: int, heights: Sequence[int], widths: Sequence[int]
) -> Tensor:
    """Define the semantics: plain PyTorch, any device."""
    counts = []
    bits = torch.tensor([byte.bit_count() for byte in range(256)], device=masks[0].device)
    for mask, *shape in zip(masks, heights, widths, strict=True):
        if mask.dtype == torch.uint8:
            count = torch.bincount(mask.flatten(), minlength=256) @ bits
            counts.append(torch.stack([count, count]))
            continue
        tall, wide = side_lengths(shape, rows, cols, device=mask.device)
        across = mask.sum(0) if rows * mask.shape[0] == shape[0] else None
        # whole rows of blocks are alike: what is multiplied out is a line, not the grid
        elements = (
            rows * (across * wide).sum() if across is not None else (mask * tall * wide).sum()
        )
        counts.append(torch.stack([mask.count_nonzero(), elements]))
    return torch.stack(counts)


# A table's columns: first program, the mask's address, its bytes, bytes a row, the matrix's rows
# and columns, the place in the list.


@triton.jit
def _count_kernel(
    table_ptr,
    count_ptr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    N: tl.constexpr,
    BYTES: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr, N)
    offset = (tl.program_id(0) - tl.load(entry)) * BYTES
    mask_ptr = tl.load(entry + N).to(tl.pointer_type(tl.uint8)) + offset
    if ALIGNED:
        mask_ptr = tl.multiple_of(mask_ptr, 16)
    offs = tl.arange(0, BYTES)
    left = tl.load(entry + 2 * N) - offset
    if left >= BYTES:  # a predicate a byte would split the loads
        flags = tl.load(mask_ptr + offs).to(tl.int32)  # [BYTES]
    else:
        flags = tl.load(mask_ptr + offs, mask=offs < left, other=0).to(tl.int32)
    at = count_ptr + 2 * tl.load(entry + 6 * N)
    if PACKED:
        flags -= (flags >> 1) & 0x55
        flags = (flags & 0x33) + ((flags >> 2) & 0x33)
        groups = tl.sum((flags + (flags >> 4)) & 0x0F)
        elements = groups
    else:
        across = tl.load(entry + 3 * N)
        down = (offset + offs) // across
        tall = tl.minimum(tl.load(entry + 4 * N) - down * ROWS, ROWS).to(tl.int32)
        wide = tl.load(entry + 5 * N) - (offset + offs - down * across) * COLS
        groups = tl.sum(flags)
        elements = tl.sum(flags * tall * tl.minimum(wide, COLS).to(tl.int32))
    tl.atomic_add(at, groups.to(tl.int64), mask=groups > 0)
    tl.atomic_add(at + 1, elements.to(tl.int64), mask=groups > 0)


def _launch(
    masks: Sequence[Tensor], rows: int, cols: int, heights: Sequence[int], widths: Sequence[int]
) -> Tensor:
    counts = torch.zeros(len(masks), 2, dtype=torch.int64, device=masks[0].device)
    own = Matrices.of(masks)
    sizes = own.rows * own.cols
    if sizes.any():
        with on_device(masks[0]):
            columns = own.address, sizes, own.cols, heights, widths, np.arange(len(masks))
            table, programs = device_table(masks[0].device, (ceil_div(sizes, BYTES), *columns))
            _count_kernel[(programs,)](
                table,
                counts,
                ROWS=rows,
                COLS=cols,
                PACKED=masks[0].dtype == torch.uint8,
                ALIGNED=not (own.address % 16).any(),
                N=table.shape[1],
                BYTES=BYTES,
                num_warps=8,
                **FUSED,
            )
    return counts


def _count(
    masks: Sequence[Tensor], rows: int, cols: int, heights: Sequence[int], widths: Sequence[int]
) -> Tensor:
    counted = _launch if takes_kernels(masks[0].device) else kept_counts_reference
    return counted(masks, rows, cols, heights, widths)


_op = torch.library.custom_op("triton_sparsity::kept_counts", _count, mutates_args=())


@_op.register_fake
def _(masks, rows, cols, heights, widths) -> Tensor:
    return masks[0].new_empty((len(masks), 2), dtype=torch.int64)


def kept_counts(
    masks: Sequence[Tensor],
    pattern: Pattern,
    shapes: Sequence[tuple[int, int]],
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Count what compact masks keep. On a GPU one launch, and nothing waits for it.

    Args:
        masks: one or more, contiguous, on one device: bool, one element a block, or packed uint8
            ``(R, ceil(C / 8))`` for other patterns than ``Block``.
        pattern: that of all masks.
        shapes: ``(R, C)`` of each one's matrix.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        int64 ``(len(masks), 2)``, on their device: the kept groups of each mask, and the kept
        elements of its matrix; blocks at the edges have fewer than others.

    Raises:
        ValueError: a mask has another dtype, device or layout.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    dtype = torch.bool if isinstance(pattern, Block) else torch.uint8
    for mask in masks:
        if mask.dtype != dtype or mask.device != masks[0].device or not mask.is_contiguous():
            raise ValueError(
                f"kept_counts: masks must be contiguous {dtype} on {masks[0].device} for "
                f"{pattern}, got {mask.dtype} on {mask.device} with strides {mask.stride()}"
            )
    use_triton("kept_counts", backend, masks[0])
    heights, widths = (list(sides) for sides in zip(*shapes, strict=True))
    counted = kept_counts_reference
    if backend != "torch":
        counted = _count if is_plain(*masks) else _op
    return counted(list(masks), pattern.rows, pattern.cols, heights, widths)
