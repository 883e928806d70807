"""Block topology: the lists by which the block-sparse kernels walk a block mask.

No size depends on how many blocks are kept and no address changes, so building the lists waits
for no GPU, and a mask update that rewrites them in place may sit in a CUDA graph. Two launches
build those of any number of masks: one program a line (a block row or a block column) counts, then
one program a line finds its place among the counts and writes what is its own, the padding
included. No atomics.

Reading order: layout -> reference -> kernels -> launcher -> operator -> public functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .grid import ceil_div
from .launch import FUSED, Backend, on_device, tl, triton, use_triton
from .pattern import Pattern
from .table import Matrices, addresses, alike, device_table, find_tensor

BUNDLE_WIDTH = 256  # elements: the widest tile of a weight gradient
CHUNK = 256


class Topology(NamedTuple):
    """The kept blocks of one weight, for its forward pass and both of its gradients.

    ``Rb`` block rows, ``Cb`` block columns, ``n`` kept blocks. A task is ``(line, first entry,
    entries)``; those with the most entries come first, so that the longest work starts first, and
    equal ones stay in order. All but ``kept`` are int32; what is not meant is padding.
    """

    row_tasks: Tensor  # (Rb, 3): the block rows
    col_index: Tensor  # (Rb * Cb,): block column of each entry, row by row; from n on, Cb
    col_tasks: Tensor  # (Cb, 3): the block columns
    row_index: Tensor  # (Rb * Cb,): block row of each entry, column by column; from n on, Rb
    bundles: Tensor  # (capacity, 3): tasks of neighbours in one line, see bundling; then zeros
    bundle_count: Tensor  # (2,): how many are wide, and how many narrow; the wide ones come first
    kept: Tensor  # (Rb, Cb), bool: the mask


def bundling(pattern: Pattern, grid: tuple[int, int]) -> tuple[bool, int]:
    """Return which kept blocks share a tile of the weight gradient.

    The blocks of a block row multiply the same columns of the output's gradient; those of a block
    column, the same columns of the input. Bundles lie along the rows of a tall weight and along
    the columns of a wide one: then the tiles in flight at one time read a part of the wider
    activation and all of the narrower one. What a line has left over is a narrow bundle, if it is
    no more than half of one.

    Returns:
        True for neighbours in a block row, False for a block column; how many at most.
    """
    by_rows = grid[0] * pattern.rows >= grid[1] * pattern.cols
    return by_rows, max(BUNDLE_WIDTH // (pattern.cols if by_rows else pattern.rows), 1)


def capacities(grid: tuple[int, int], pattern: Pattern) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a topology's tensors."""
    (Rb, Cb), (by_rows, size) = grid, bundling(pattern, grid)
    bundles = Rb * ceil_div(Cb, size) if by_rows else Cb * ceil_div(Rb, size)
    return (Rb, 3), (Rb * Cb,), (Cb, 3), (Rb * Cb,), (bundles, 3), (2,), (Rb, Cb)


def runs(grid: Tensor) -> Iterator[list[tuple[int, int]]]:
    """Yield for each line of a bool grid the runs of True, as first and one past the last."""
    padded = np.pad(grid.cpu().numpy(), ((0, 0), (1, 1)))
    # a run begins where False turns to True, and ends where it turns back
    line, turn = (padded[:, 1:] != padded[:, :-1]).nonzero()
    ends = np.searchsorted(line, np.arange(1, len(padded) + 1)).tolist()
    turns, start = turn.tolist(), 0
    for end in ends:
        yield [*zip(turns[start:end:2], turns[start + 1 : end : 2], strict=True)]
        start = end


def empty_topology(mask: Tensor, pattern: Pattern) -> Topology:
    shapes = capacities((mask.shape[0], mask.shape[1]), pattern)
    kinds = [torch.int32] * 6 + [torch.bool]
    return Topology(
        *(mask.new_empty(s, dtype=kind) for s, kind in zip(shapes, kinds, strict=True))
    )


def _lines_reference(kept: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tasks, index list, and bundles of up to ``size`` of the rows of ``kept``: the wide
    and the narrow ones.
    """
    lines, length = kept.shape
    counts = kept.sum(1)
    first = counts.cumsum(0) - counts
    order = counts.argsort(descending=True, stable=True)
    entries = torch.arange(length, device=kept.device).expand(lines, -1)[kept]
    index = torch.nn.functional.pad(entries, (0, lines * length - len(entries)), value=length)

    pieces = (counts + size - 1) // size
    line = torch.arange(lines, device=kept.device).repeat_interleave(pieces)
    done = (torch.arange(len(line), device=kept.device) - (pieces.cumsum(0) - pieces)[line]) * size
    bundles = torch.stack([line, first[line] + done, (counts[line] - done).clamp(max=size)], 1)
    narrow = bundles[:, 2] <= size // 2
    tasks = torch.stack([order, first[order], counts[order]], 1)
    return tasks, index, bundles[~narrow], bundles[narrow]


def topology_reference(mask: Tensor, pattern: Pattern) -> Topology:
    """Define the lists: plain PyTorch, any device."""
    by_rows, size = bundling(pattern, (mask.shape[0], mask.shape[1]))
    rows, cols = _lines_reference(mask, size), _lines_reference(mask.T, size)
    wide, narrow = (rows if by_rows else cols)[2:]
    out = empty_topology(mask, pattern)
    for target, source in zip(out[:4], rows[:2] + cols[:2], strict=True):
        target.copy_(source)
    out.bundles.zero_()[: len(wide) + len(narrow)] = torch.cat([wide, narrow])
    out.bundle_count.copy_(torch.tensor([len(wide), len(narrow)]))
    out.kept.copy_(mask)
    return out


# A table's columns: first program, the mask's address, its blocks down and across, its strides,
# whether bundles lie along the rows, and the addresses of the lists, in the order of Topology.


@triton.jit
def _topology_count_kernel(table_ptr, counts_ptr, N: tl.constexpr, CHUNK: tl.constexpr):
    """Count the kept blocks of one line; copy the mask, row by row."""
    entry = table_ptr + find_tensor(table_ptr, N)
    line = (tl.program_id(0) - tl.load(entry)).to(tl.int32)
    ROWS = tl.load(entry + 2 * N).to(tl.int32)
    COLS = tl.load(entry + 3 * N).to(tl.int32)
    stride_mr = tl.load(entry + 4 * N)
    stride_mc = tl.load(entry + 5 * N)
    kept_ptr = tl.load(entry + 13 * N).to(tl.pointer_type(tl.uint8))
    is_row = line < ROWS
    line = tl.where(is_row, line, line - ROWS)
    length = tl.where(is_row, COLS, ROWS)
    mask_ptr = tl.load(entry + N).to(tl.pointer_type(tl.uint8))
    mask_ptr += line.to(tl.int64) * tl.where(is_row, stride_mr, stride_mc)
    stride = tl.where(is_row, stride_mc, stride_mr)
    count = 0
    for start in range(0, length, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        inside = offs < length
        flags = tl.load(mask_ptr + offs.to(tl.int64) * stride, mask=inside, other=0)  # [CHUNK]
        count += tl.sum((flags != 0).to(tl.int32))
        tl.store(kept_ptr + line.to(tl.int64) * COLS + offs, flags, mask=inside & is_row)
    tl.store(counts_ptr + tl.program_id(0), count)


@triton.jit
def _pieces(count, SIZE: tl.constexpr):
    """Return how many bundles ``count`` blocks make, and how many of these are wide."""
    return (count + SIZE - 1) // SIZE, (count + SIZE - SIZE // 2 - 1) // SIZE


@triton.jit
def _list_line(
    mask_ptr,  # the first block of the line
    stride,
    counts_ptr,
    tasks_ptr,
    index_ptr,
    bundles_ptr,
    bundle_count_ptr,
    line,
    lines,
    length,
    SIZE: tl.constexpr,
    BUNDLED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write one line's task, entries and bundles where they stand among those of all lines."""
    count = tl.load(counts_ptr + line)
    total, first, rank = 0, 0, 0
    all_wide, first_wide, all_pieces, first_piece = 0, 0, 0, 0
    for start in range(0, lines, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        others = tl.load(counts_ptr + offs, mask=offs < lines, other=-1)  # [CHUNK]
        before = offs < line
        total += tl.sum(tl.maximum(others, 0))
        first += tl.sum(tl.where(before, others, 0))
        rank += tl.sum(((others > count) | ((others == count) & before)).to(tl.int32))
        pieces, wide = _pieces(tl.maximum(others, 0), SIZE)
        all_pieces += tl.sum(pieces)
        first_piece += tl.sum(tl.where(before, pieces, 0))
        all_wide += tl.sum(wide)
        first_wide += tl.sum(tl.where(before, wide, 0))
    tl.store(tasks_ptr + rank * 3, line)
    tl.store(tasks_ptr + rank * 3 + 1, first)
    tl.store(tasks_ptr + rank * 3 + 2, count)

    # this line's share of the padding lies after that of the lines before it
    kept, pruned = first, total + line * length - first
    for start in range(0, length, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        inside = offs < length
        flags = tl.load(mask_ptr + offs.to(tl.int64) * stride, mask=inside, other=0)  # [CHUNK]
        keep = (flags != 0).to(tl.int32)
        drop = (inside & (flags == 0)).to(tl.int32)
        place = tl.where(
            keep != 0,
            kept + tl.cumsum(keep, 0) - 1,
            pruned + tl.cumsum(drop, 0) - 1,
        )
        tl.store(index_ptr + place, tl.where(keep != 0, offs, length), mask=inside)
        kept += tl.sum(keep)
        pruned += tl.sum(drop)

    if BUNDLED:
        room = (length + SIZE - 1) // SIZE
        pieces, wide = _pieces(count, SIZE)
        narrow = all_wide + first_piece - first_wide
        unused = all_pieces + line * room - first_piece
        for start in range(0, room, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            used = offs < pieces
            place = tl.where(offs < wide, first_wide + offs, narrow)
            at = bundles_ptr + tl.where(used, place, unused + offs - pieces) * 3
            tl.store(at, tl.where(used, line, 0), mask=offs < room)
            tl.store(at + 1, tl.where(used, first + offs * SIZE, 0), mask=offs < room)
            size = tl.minimum(count - offs * SIZE, SIZE)
            tl.store(at + 2, tl.where(used, size, 0), mask=offs < room)
        tl.store(bundle_count_ptr, all_wide, mask=line == 0)
        tl.store(bundle_count_ptr + 1, all_pieces - all_wide, mask=line == 0)


@triton.jit
def _list_of(entry, row_column, col_column, is_row):
    """Return where a row's or a column's list is."""
    address = tl.where(is_row, tl.load(entry + row_column), tl.load(entry + col_column))
    return address.to(tl.pointer_type(tl.int32))


@triton.jit
def _topology_list_kernel(
    table_ptr,
    counts_ptr,
    N: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    COL_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr, N)
    first = tl.load(entry)
    line = (tl.program_id(0) - first).to(tl.int32)
    ROWS = tl.load(entry + 2 * N).to(tl.int32)
    COLS = tl.load(entry + 3 * N).to(tl.int32)
    is_row = line < ROWS
    counts_ptr += first + tl.where(is_row, 0, ROWS)
    line = tl.where(is_row, line, line - ROWS)
    lines = tl.where(is_row, ROWS, COLS)
    length = tl.where(is_row, COLS, ROWS)
    mask_ptr = tl.load(entry + 13 * N).to(tl.pointer_type(tl.uint8))
    mask_ptr += line.to(tl.int64) * tl.where(is_row, COLS, 1)
    stride = tl.where(is_row, 1, COLS)
    tasks_ptr = _list_of(entry, 7 * N, 9 * N, is_row)
    index_ptr = _list_of(entry, 8 * N, 10 * N, is_row)
    bundles_ptr = tl.load(entry + 11 * N).to(tl.pointer_type(tl.int32))
    bundle_count_ptr = tl.load(entry + 12 * N).to(tl.pointer_type(tl.int32))
    bundled = is_row == (tl.load(entry + 6 * N) != 0)
    if bundled and is_row:
        _list_line(
            mask_ptr, stride, counts_ptr, tasks_ptr, index_ptr, bundles_ptr, bundle_count_ptr,
            line, lines, length, ROW_SIZE, True, CHUNK,
        )  # fmt: skip
    elif bundled:
        _list_line(
            mask_ptr, stride, counts_ptr, tasks_ptr, index_ptr, bundles_ptr, bundle_count_ptr,
            line, lines, length, COL_SIZE, True, CHUNK,
        )  # fmt: skip
    else:
        _list_line(
            mask_ptr, stride, counts_ptr, tasks_ptr, index_ptr, bundles_ptr, bundle_count_ptr,
            line, lines, length, ROW_SIZE, False, CHUNK,
        )  # fmt: skip


def _launch(masks: Sequence[Tensor], rows: int, cols: int, *lists: Any) -> None:
    own = Matrices.of(masks)
    by_rows = own.rows * rows >= own.cols * cols  # as bundling says of one
    longest = max(16, int(own.rows.max()), int(own.cols.max()))
    chunk = min(CHUNK, 1 << (longest - 1).bit_length())
    columns = (own.rows + own.cols, *own, by_rows, *map(addresses, lists))
    with on_device(masks[0]):
        table, programs = device_table(masks[0].device, columns)
        counts = torch.empty(programs, dtype=torch.int32, device=masks[0].device)
        n = table.shape[1]
        _topology_count_kernel[(programs,)](table, counts, N=n, CHUNK=chunk, **FUSED)
        _topology_list_kernel[(programs,)](
            table,
            counts,
            N=n,
            ROW_SIZE=max(BUNDLE_WIDTH // cols, 1),
            COL_SIZE=max(BUNDLE_WIDTH // rows, 1),
            CHUNK=chunk,
            **FUSED,
        )


@torch.library.custom_op("triton_sparsity::block_topology_", mutates_args={*Topology._fields})
def _op(
    masks: list[Tensor],
    rows: int,
    cols: int,
    row_tasks: list[Tensor],
    col_index: list[Tensor],
    col_tasks: list[Tensor],
    row_index: list[Tensor],
    bundles: list[Tensor],
    bundle_count: list[Tensor],
    kept: list[Tensor],
) -> None:
    lists = row_tasks, col_index, col_tasks, row_index, bundles, bundle_count, kept
    _launch(masks, rows, cols, *lists)


@_op.register_fake
def _(masks, rows, cols, *lists) -> None:
    return None


def block_topology(
    mask: Tensor, pattern: Pattern, *, out: Topology | None = None, backend: Backend = "auto"
) -> Topology:
    """Build the lists that ``block_sparse_linear`` walks.

    Args:
        mask: bool ``(Rb, Cb)``, any strides, True = kept.
        pattern: the blocks of the mask.
        out: a topology of a mask of the same shape, device and pattern; its tensors are rewritten
            in place and returned. A captured CUDA graph may do so.
        backend: ``"auto"``, ``"triton"`` or ``"torch"`` (which waits for the GPU).

    Raises:
        ValueError: the mask is no bool matrix, or ``out`` belongs to another shape or device.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    return block_topologies([mask], pattern, out=[out], backend=backend)[0]


def block_topologies(
    masks: Sequence[Tensor],
    pattern: Pattern,
    *,
    out: Sequence[Topology | None] | None = None,
    backend: Backend = "auto",
) -> list[Topology]:
    """Build the lists of several masks of one pattern and device, in two launches on a GPU.

    Args:
        masks: as ``block_topology``'s.
        pattern: the blocks of all masks.
        out: one a mask, as ``block_topology``'s.
        backend: as ``block_topology``'s.

    Raises:
        ValueError, RuntimeError: as ``block_topology``; or devices differ. No list was written.
    """
    given = [*zip(masks, out or [None] * len(masks), strict=True)]
    traced = torch.compiler.is_compiling()  # which looks once, and traces no getter of shapes
    kinds = range(len(given)) if traced else (_kind(*pair) for pair in given)
    for places in alike(kinds).values():
        _check(*given[places[0]], pattern, masks[0].device)
    found = [empty_topology(mask, pattern) if target is None else target for mask, target in given]
    triton_runs = bool(masks) and use_triton("block_topology", backend, masks[0])
    write_topologies(masks, pattern, found, triton_runs)
    return found


def write_topologies(
    masks: Sequence[Tensor], pattern: Pattern, found: Sequence[Topology], triton_runs: bool
) -> None:
    """Write the lists of masks to topologies that are known to fit: nothing is checked.

    Args:
        masks: as ``block_topologies``'s.
        pattern: the blocks of all masks.
        found: one a mask, of its shape and device.
        triton_runs: whether kernels write, in two launches.
    """
    pairs = []
    for mask, topology in zip(masks, found, strict=True):
        if triton_runs and mask.numel():
            pairs.append((mask, topology))
            continue
        for target, source in zip(topology, topology_reference(mask, pattern), strict=True):
            target.copy_(source)
    if pairs:
        given, lists = zip(*pairs, strict=True)
        sides = pattern.rows, pattern.cols
        if torch.compiler.is_compiling():
            _op([*given], *sides, *map(list, zip(*lists, strict=True)))
        else:  # without the operator's Python, which takes longer than all else, a tensor
            _launch(given, *sides, *zip(*lists, strict=True))
            torch.autograd.graph.increment_version([t for topology in lists for t in topology])


_shape = attrgetter("shape")


def _kind(mask: Tensor, out: Topology | None) -> tuple[Any, ...]:
    """Return all that is checked: a model's masks are of a few kinds."""
    its = () if out is None else (out.kept.device, *map(_shape, out))
    return mask.dtype, mask.shape, mask.device, *its


def _check(mask: Tensor, out: Topology | None, pattern: Pattern, device: torch.device) -> None:
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(
            f"block_topology: mask must be a bool matrix, got {mask.dtype} {tuple(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(
            f"block_topology: mask must be on the others' {device}, got {mask.device}"
        )
    grid = mask.shape[0], mask.shape[1]
    if out is None:
        return
    if tuple(t.shape for t in out) != capacities(grid, pattern):
        raise ValueError(
            f"block_topology: out must be of a mask {grid} of pattern {pattern}, got one of a "
            f"mask {tuple(out.kept.shape)}"
        )
    if out.kept.device != mask.device:
        raise ValueError(
            f"block_topology: out must be on the mask's {mask.device}, got {out.kept.device}"
        )
