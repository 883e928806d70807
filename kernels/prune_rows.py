"""Masks that prune the same share of each row: a search and a mask a row, fused.

Every row is a pool by itself, as Wanda compares (https://arxiv.org/abs/2306.11695). A tensor's
count is shared out over its rows as evenly as whole numbers allow: row r of R prunes
``floor((r + 1) k / R) - floor(r k / R)``; where a tensor is a part of another, r and R are of
that. On a GPU one launch for all tensors of one dtype and width: a program holds a few rows in the
first-level cache, searches their patterns two bits a pass as ``select_each`` does, and writes
their masks. On a CPU numpy partitions the rows, which orders them no further than is needed.

Cost floor: one read of the scores and one write of the masks.

Reading order: reference -> kernel -> launcher -> numpy -> public function.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bits import pack, packed_shape
from .grid import ceil_div
from .launch import FUSED, Backend, on_device, tl, triton, use_triton
from .select_each import bounds
from .table import Matrices, addresses, alike, device_table, find_tensor, list_index_type

TILE = 1024  # elements that a program compares at a time
WARPS = 8
NARROWEST = 32  # columns of a tile: many rows take many registers
WIDEST_TURNED = 128  # columns of a tile where neighbours lie down the columns
_CHUNK = 1 << 17  # elements that a CPU thread handles at a time: they stay in its cache
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


class Part(NamedTuple):
    """Which rows of a tensor are here: from ``first``, of ``rows`` in all."""

    first: int
    rows: int


def row_counts(k: int, rows: int, part: Part | None = None) -> np.ndarray:
    """Return how many of ``k`` each of some rows prunes, int64 ``(rows,)``."""
    first, whole = part or Part(0, rows)
    return np.diff(np.arange(first, first + rows + 1) * k // max(whole, 1))


def prune_rows_reference(
    tensor: Tensor, k: int, packed: bool, part: Part | None = None
) -> tuple[Tensor, Tensor]:
    """Define the semantics for one tensor: plain torch, any device, any float dtype."""
    keys = tensor.detach().abs().float()
    rows, cols = keys.shape
    kept = torch.from_numpy(cols - row_counts(k, rows, part)).to(keys.device)
    # of equals the first are kept
    place = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    mask = place < kept[:, None]
    return pack(mask, backend="torch") if packed else mask, (~keys.isfinite()).sum()


# A table's columns: first program, addresses of scores and mask, rows, columns, the scores'
# strides, k, the place in the list, the first row and the rows of the tensor that it is of.


@triton.jit
def _prune_rows_kernel(
    table_ptr,
    nonfinite_ptr,
    DTYPE: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr, N)
    x_ptr = tl.load(entry + N).to(tl.pointer_type(DTYPE))
    out_ptr = tl.load(entry + 2 * N).to(tl.pointer_type(tl.uint8))
    R, C = tl.load(entry + 3 * N).to(INDEX), tl.load(entry + 4 * N).to(INDEX)
    stride_r, stride_c = tl.load(entry + 5 * N).to(INDEX), tl.load(entry + 6 * N).to(INDEX)
    k = tl.load(entry + 7 * N)
    tile = (tl.program_id(0) - tl.load(entry)).to(INDEX)
    offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = offs_r < R
    wide_r, whole = tl.load(entry + 9 * N) + offs_r, tl.load(entry + 10 * N)
    pruned = ((wide_r + 1) * k // whole - wide_r * k // whole).to(tl.int32)  # [BLOCK_R]
    x_ptr += offs_r[:, None] * stride_r

    lo = tl.zeros((BLOCK_R,), tl.int32)
    upto = tl.zeros((BLOCK_R,), tl.int32)
    nonfinite = tl.zeros((BLOCK_R,), tl.int32)
    for n in range(17):
        part, one, two, three = bounds(lo, n)
        below_one = tl.zeros((BLOCK_R,), tl.int32)
        below_two = tl.zeros((BLOCK_R,), tl.int32)
        below_three = tl.zeros((BLOCK_R,), tl.int32)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            in_x = in_r[:, None] & (offs_c < C)[None, :]
            x = tl.load(x_ptr + offs_c[None, :] * stride_c, mask=in_x, other=float("nan"))
            # NaN is above every bound
            key = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF  # [BLOCK_R, BLOCK_C]
            below_one += tl.sum((key < one[:, None]).to(tl.int32), axis=1)
            below_two += tl.sum((key < two[:, None]).to(tl.int32), axis=1)
            below_three += tl.sum((key < three[:, None]).to(tl.int32), axis=1)
        if n == 0:
            nonfinite = C.to(tl.int32) - below_three
            lo = tl.where(below_one < pruned, part, lo)
        elif n == 16:
            upto = below_one
        else:
            steps = (below_one < pruned).to(tl.int32) + (below_two < pruned).to(tl.int32)
            lo += part * (steps + (below_three < pruned).to(tl.int32))

    # every key is above -1
    value = tl.where(pruned > 0, lo, -1)
    room = upto - pruned
    seen = tl.zeros((BLOCK_R,), tl.int32)
    width = tl.cdiv(C, 8)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        in_x = in_r[:, None] & (offs_c < C)[None, :]
        x = tl.load(x_ptr + offs_c[None, :] * stride_c, mask=in_x, other=0.0)
        key = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF  # [BLOCK_R, BLOCK_C]
        equal = ((key == value[:, None]) & in_x).to(tl.int32)
        rank = seen[:, None] + tl.cumsum(equal, axis=1)
        seen += tl.sum(equal, axis=1)
        keep = (key > value[:, None]) | ((equal != 0) & (rank <= room[:, None]))
        keep = (keep & in_x).to(tl.int32)
        if PACKED:
            bits = keep << (tl.arange(0, BLOCK_C) % 8)[None, :]
            bits = tl.sum(bits.reshape([BLOCK_R, BLOCK_C // 8, 8]), axis=2).to(tl.uint8)
            offs_b = start // 8 + tl.arange(0, BLOCK_C // 8)
            in_b = in_r[:, None] & (offs_b < width)[None, :]
            tl.store(out_ptr + offs_r[:, None] * width + offs_b[None, :], bits, mask=in_b)
        else:
            offs_x = offs_r[:, None] * C + offs_c[None, :]
            tl.store(out_ptr + offs_x, keep.to(tl.uint8), mask=in_x)
    bad = tl.sum(tl.where(in_r, nonfinite, 0)).to(tl.int64)
    tl.atomic_add(nonfinite_ptr + tl.load(entry + 8 * N), bad, mask=bad > 0)


def _block_c(cols: int, turned: bool) -> int:
    """Return the width of a tile: a power of two, so that few launches cover a model's widths."""
    most = WIDEST_TURNED if turned else TILE
    return max(NARROWEST, min(1 << max(cols - 1, 0).bit_length(), most))


def _launch(
    tensors: Sequence[Tensor],
    ks: Sequence[int],
    parts: Sequence[Part],
    out: Sequence[Tensor],
    packed: bool,
) -> Tensor:
    first, own = tensors[0], Matrices.of(tensors)
    nonfinite = torch.zeros(len(tensors), dtype=torch.int64, device=first.device)
    widths = [*map(_block_c, own.cols.tolist(), own.turned.tolist())]
    programs = ceil_div(own.rows, TILE // np.array(widths)) * (own.cols > 0)
    firsts, whole = zip(*parts, strict=True)
    columns = (programs, own.address, addresses(out), *own[1:], ks, range(len(ks)), firsts, whole)
    columns = [np.asarray(column) for column in columns]
    kinds = zip((tensor.dtype for tensor in tensors), widths, strict=True)
    with on_device(first):
        for (dtype, BLOCK_C), at in alike(kinds).items():
            table, total = device_table(first.device, [column[at] for column in columns])
            if total:
                _prune_rows_kernel[(total,)](
                    table, nonfinite,
                    DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), PACKED=packed,
                    INDEX=list_index_type(own, Matrices.of(out)), N=table.shape[1],
                    BLOCK_R=TILE // BLOCK_C, BLOCK_C=BLOCK_C, num_warps=WARPS,
                **FUSED,)  # fmt: skip
    return nonfinite


def _keys(scores: Tensor) -> np.ndarray:
    """Return bit patterns that order as |scores|, in memory of their own."""
    if scores.dtype not in _INFINITY:
        scores = scores.float()
    bits = scores.contiguous().view(torch.int16 if scores.element_size() == 2 else torch.int32)
    numbers = bits.numpy()
    return numbers & numbers.dtype.type(np.iinfo(numbers.dtype).max)


def _prune_chunk(keys: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """Return which keys are kept; row r loses ``pruned[r]``, those of lowest keys."""
    value = np.full((len(keys), 1), -1, keys.dtype)
    for count in np.unique(pruned):
        if count:
            rows = pruned == count
            own = keys.copy() if rows.all() else keys[rows]
            own.partition(count - 1, axis=1)
            value[rows] = own[:, count - 1 : count]
    keep = keys > value
    room = keys.shape[1] - pruned - np.count_nonzero(keep, axis=1)
    tied = np.flatnonzero(room)
    if len(tied):
        row, col = np.nonzero(keys[tied] == value[tied])
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        first = rank < room[tied[row]]
        keep[tied[row[first]], col[first]] = True
    return keep


def _prune_numpy(tensor: Tensor, k: int, part: Part, out: Tensor, packed: bool) -> int:
    """Write the mask; return how many scores are NaN or Inf."""
    rows, cols = tensor.shape
    if not rows * cols:
        return 0
    mask, pruned = out.numpy(), row_counts(k, rows, part)
    infinity = _INFINITY.get(tensor.dtype, _INFINITY[torch.float32])
    step = max(1, _CHUNK // cols)

    def prune(start: int) -> int:
        chunk = slice(start, start + step)
        keys = _keys(tensor[chunk])
        keep = _prune_chunk(keys, pruned[chunk])
        mask[chunk] = np.packbits(keep, axis=1, bitorder="little") if packed else keep
        return int(np.count_nonzero(keys >= infinity)) if keys.max() >= infinity else 0

    starts = range(0, rows, step)
    threads = max(1, min(torch.get_num_threads(), 8, len(starts)))
    if threads == 1:
        return sum(map(prune, starts))
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(prune, starts))


@torch.no_grad()
def prune_rows(
    tensors: Sequence[Tensor],
    ks: Sequence[int],
    *,
    packed: bool,
    parts: Sequence[Part] | None = None,
    backend: Backend = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Mask the lowest magnitudes of each row of each tensor, the same share of every row.

    Args:
        tensors: one or more float matrices on one device, any strides. Triton's backend takes 16-
            and 32-bit floats; float64 is rounded to float32.
        ks: how many elements of each tensor are pruned; its rows' counts, as even as whole numbers
            allow, add up to it. Of equal scores the first of the row are kept.
        packed: whether the masks have one bit an element, as ``pack``, or are bool.
        parts: where the tensors are parts of others, which of their rows: ``ks`` are of these.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Masks, True = kept; int64 ``(len(tensors),)``, how many scores are NaN or Inf: if any are,
        that tensor's mask means nothing. Nothing waits for a GPU. Bit-equal on every run and
        backend.

    Raises:
        ValueError: ``ks`` does not fit the tensors; one is no float matrix.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    if not tensors or len(tensors) != len(ks):
        raise ValueError(f"prune_rows: ks must be {len(tensors)}, at least 1, got {len(ks)}")
    parts = [Part(0, len(tensor)) for tensor in tensors] if parts is None else parts
    for tensor, k, (first, rows) in zip(tensors, ks, parts, strict=True):
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(
                "prune_rows: tensors must be float matrices, got "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
        scores = rows * tensor.shape[1]
        if not 0 <= k <= scores:
            raise ValueError(f"prune_rows: k must be from 0 to {scores} scores, got {k}")
        if not 0 <= first <= rows - len(tensor):
            raise ValueError(
                f"prune_rows: parts must have {len(tensor)} rows each, got {Part(first, rows)}"
            )
    if not use_triton("prune_rows", backend, tensors[0]) and not tensors[0].is_cpu:
        each = zip(tensors, ks, parts, strict=True)
        found = [prune_rows_reference(t, k, packed, part) for t, k, part in each]
        return [mask for mask, _ in found], torch.stack([bad for _, bad in found])
    dtype = torch.uint8 if packed else torch.bool
    shapes = [packed_shape(t.shape) if packed else t.shape for t in tensors]
    out = [t.new_empty(s, dtype=dtype) for t, s in zip(tensors, shapes, strict=True)]
    if use_triton("prune_rows", backend, tensors[0]):
        narrow = [t.float() if t.dtype == torch.float64 else t for t in tensors]
        return out, _launch(narrow, ks, parts, out, packed)
    cases = zip(tensors, ks, parts, out, strict=True)
    return out, torch.tensor([_prune_numpy(*case, packed) for case in cases])
