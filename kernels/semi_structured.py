"""N:M selection: which n of every m consecutive inputs are kept, in one read of the weight.

Of each m-tuple the n elements of largest magnitude are kept; among equal ones the first. A
transposable 2:4 weight is cut into tiles of 4 x 4, of each of which two elements a row and a
column are kept: of the 90 such patterns that of the largest sum of magnitudes, the first in
lexicographic order if several have it (Hubara et al. 2021, https://arxiv.org/abs/2102.08124, solve
the same problem as a min-cost flow).

Masks have one bit an element, packed as ``bits.py`` says, so that whatever applies an unstructured
mask applies these. A tuple may straddle bytes: eight tuples fill m bytes.

Cost floor: one read of the weight and one write of a bit an element. Ranks are comparisons of all
pairs of a tuple in registers: (m - 1) / 2 an element, where a sort needs exchanges.

Reading order: references -> kernels -> launcher -> operators -> public functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import combinations, product
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import Packer, bytes_of, packed_shape
from .grid import ceil_div
from .launch import FUSED, Backend, index_type, on_device, tl, triton, use_triton
from .pattern import NM

CHUNK = 2**17  # elements that plain torch handles at a time: keys and ranks stay in cache
TILE = 4096  # elements of a program: two to eight 16-byte loads in flight for each thread
PIECE = 1024  # longest part of a row in a tile of several rows
TILE_LARGEST = 2.0**124  # of a tile's elements: eight add up to what float32 holds
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

PAIRS = tuple(combinations(range(4), 2))  # the two columns that a row of a tile keeps
# all patterns of a tile: of each row the number of its pair
TILES = tuple(
    rows
    for rows in product(range(6), repeat=4)
    if all(sum(col in PAIRS[p] for p in rows) == 2 for col in range(4))
)
# the same as 16 bits, row-major, and with these the kernel's table
_CODES = tuple(
    sum(1 << (4 * row + col) for row, p in enumerate(rows) for col in PAIRS[p]) for rows in TILES
)
TILE_SCRATCH = 24 + 36 + 36 + 2 * len(TILES)
_TABLE = tuple((*rows, code) for rows, code in zip(TILES, _CODES, strict=True))


class NMMask(NamedTuple):
    """An N:M mask.

    Attributes:
        mask: packed bits, uint8 ``(R, ceil(C / 8))``.
        nonfinite: 0-d int64, how many groups hold a NaN or an Inf, or how many tiles what float32
            could not add up; if any does, the mask means nothing.
    """

    mask: Tensor
    nonfinite: Tensor


def _rank_reference(keys: Tensor, n: int) -> Tensor:
    """Tell which elements are kept of tuples that lie along the first dimension."""
    m = keys.shape[0]
    # its rank among the elements before it, were each larger; every pair then corrects both
    rank = torch.arange(m, dtype=torch.uint8, device=keys.device)[:, None].repeat(
        1, keys[0].numel()
    )
    keys = keys.view(rank.shape)
    for distance in range(1, m):
        later_wins = (keys[distance:] > keys[:-distance]).view(torch.uint8)
        rank[:-distance] += later_wins
        rank[distance:] -= later_wins
    return rank < n


def _tile_reference(keys: Tensor, scratch: Tensor) -> Tensor:
    """Tell which elements are kept of 4 x 4 tiles that lie, row-major, along the first.

    ``scratch`` has ``TILE_SCRATCH`` float32 a tile: fresh memory would cost more than the work.
    """
    device, tiles, count = keys.device, keys.shape[1], len(TILES)
    sizes = (24, 36, 36, count, count)
    pairs, upper, lower, total, other = scratch[: sum(sizes) * tiles].view(-1, tiles).split(sizes)
    first, second = torch.tensor(PAIRS, device=device).T
    rows, pairs = keys.view(4, 4, -1), pairs.view(4, 6, -1)
    torch.add(rows[:, first], rows[:, second], out=pairs)
    torch.add(pairs[0, :, None], pairs[1], out=upper.view(6, 6, -1))
    torch.add(pairs[2, :, None], pairs[3], out=lower.view(6, 6, -1))
    a, b, c, d = torch.tensor(TILES, device=device).T
    torch.index_select(upper, 0, 6 * a + b, out=total)
    total += torch.index_select(lower, 0, 6 * c + d, out=other)
    # the first of the largest, in a quarter of the time that argmax takes (measured)
    is_best = other.flatten().view(torch.bool)[: count * tiles].view(count, tiles)
    torch.eq(total, total.amax(0), out=is_best)
    behind = torch.arange(count, 0, -1, dtype=torch.uint8, device=device)[:, None]
    best = count - is_best.view(torch.uint8).mul_(behind).amax(0)
    bits = torch.tensor(_CODES, device=device)[:, None] >> torch.arange(16, device=device)
    # where all sums are NaN none is the best
    return (bits & 1 != 0)[best.clamp_(max=count - 1).long()].T


def _chunks(pattern: NM, shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into parts of whole groups and whole bytes, of about ``CHUNK`` elements."""
    height, step = pattern.group[0], lcm(pattern.m, 8)
    rows, cols = shape
    width = max(step, min(CHUNK // height // step, ceil_div(cols, step)) * step)
    height *= max(1, CHUNK // (height * width))
    for row in range(0, rows, height):
        for col in range(0, cols, width):
            yield slice(row, min(row + height, rows)), slice(col, min(col + width, cols))


def _reference(
    weight: Tensor, pattern: NM, whole: Tensor | None, out: Tensor | None, scores: Tensor | None
) -> Tensor:
    """Define the semantics: plain torch, any device, any float dtype; some MB of scratch."""
    tall, wide = pattern.group
    most = TILE_LARGEST if pattern.transposable else torch.inf
    nonfinite = torch.zeros((), dtype=torch.int64, device=weight.device)
    packer = None if out is None else Packer(weight)
    buffer = scratch = torch.empty(0, dtype=torch.float32, device=weight.device)
    for chunk in _chunks(pattern, weight.shape):
        part = weight[chunk]
        rows, cols = part.shape[0] // tall, part.shape[1] // wide
        groups = (
            slice(chunk[0].start // tall, chunk[0].start // tall + rows),
            slice(chunk[1].start // wide, chunk[1].start // wide + cols),
        )
        split = (rows, tall, cols, wide)
        if buffer.numel() < part.numel():  # the first is the largest
            buffer = buffer.new_empty(part.numel())
            if pattern.transposable:
                scratch = buffer.new_empty(TILE_SCRATCH * rows * cols)
        keys = buffer[: part.numel()].view(tall, wide, rows, cols)
        keys.copy_(part.unflatten(1, split[2:]).unflatten(0, split[:2]).permute(1, 3, 0, 2)).abs_()
        keys = keys.view(tall * wide, rows * cols)
        infinite = ~(keys.amax(0) < most) if keys.numel() else keys.new_zeros(0) != 0
        nonfinite += infinite.sum()
        if pattern.transposable:
            keep = _tile_reference(keys, scratch)
        else:
            keep = _rank_reference(keys, pattern.n)
        if scores is not None:
            # five times as fast as a selection (measured); a group with Inf becomes NaN anyway
            dropped = keys.mul_(keep.logical_not())
            total = dropped[0]
            for element in dropped[1:]:
                total += element
            scores[groups] = total.masked_fill_(infinite, torch.nan).view(rows, cols)
        if packer is not None and out is not None:
            if whole is not None:
                keep = keep | whole[groups].reshape(-1)
            bits = packer.buffer(*part.shape).unflatten(1, split[2:]).unflatten(0, split[:2])
            bits.copy_(keep.view(tall, wide, rows, cols).permute(2, 0, 3, 1))
            packer.write(out[bytes_of(chunk)])
    return nonfinite


@triton.jit
def _columns(x):
    """Return the N tensors [A, B] that [A, B, N] consists of."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    if N == 1:
        return (x.reshape([A, B]),)
    else:  # noqa: RET505  the compiler visits what follows a return
        low, high = tl.split(x.reshape([A, B, 2, N // 2]).permute(0, 1, 3, 2))
        return _columns(low) + _columns(high)


@triton.jit
def _ranks(keys, M: tl.constexpr):
    """Return how many keys of its tuple come before each; of equal ones the first does."""
    ranks = ()
    for j in tl.static_range(M):
        # those before it, were each of them larger; every pair then corrects both
        rank = tl.full(keys[j].shape, j, tl.int32)
        for i in tl.static_range(j):
            later_wins = (keys[j] > keys[i]).to(tl.int32)
            rank -= later_wins
            # the compiler knows no starred expression
            ranks = ranks[:i] + (ranks[i] + later_wins,) + ranks[i + 1 :]  # noqa: RUF005
        ranks += (rank,)
    return ranks


@triton.jit
def _code(ranks, KEPT: tl.constexpr, M: tl.constexpr):
    """Return which elements of each tuple are kept, as the bits of an integer."""
    code = tl.zeros(ranks[0].shape, tl.int32)
    for j in tl.static_range(M):
        code |= (ranks[j] < KEPT).to(tl.int32) << j
    return code


@triton.jit
def _store_scores(keys, code, inside, score_ptrs, N: tl.constexpr, MOST: tl.constexpr):
    """Store what each group drops, all but ``code``'s; tell which have NaN, or ``MOST``."""
    total = tl.zeros(code.shape, tl.float32)
    largest = tl.zeros(code.shape, tl.float32)
    for j in tl.static_range(N):
        total += tl.where((code >> j) & 1 != 0, 0.0, keys[j])
        largest = tl.maximum(largest, keys[j], propagate_nan=tl.PropagateNan.ALL)
    infinite = inside & ((largest < MOST) == 0)
    if score_ptrs is not None:
        tl.store(score_ptrs, tl.where(infinite, float("nan"), total), mask=inside)
    return infinite


@triton.jit
def _join(code, M: tl.constexpr):
    """Join the bits of tuples of 2, 4 or 8, [R, T], to bytes; return these and their offsets."""
    R: tl.constexpr = code.shape[0]
    BYTES: tl.constexpr = code.shape[1] * M // 8
    code = code.reshape([R, BYTES, 8 // M])
    code = tl.sum(code << (tl.arange(0, 8 // M) * M)[None, None, :], axis=2)
    return code, tl.arange(0, BYTES)[None, :]


@triton.jit
def _nm_kernel(
    x_ptr,
    whole_ptr,
    out_ptr,
    score_ptr,
    count_ptr,
    R,
    C,
    stride_xr,
    stride_xc,
    KEPT: tl.constexpr,
    M: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TUPLES: tl.constexpr,
):
    """Tuples whose length is a power of two."""
    tuples = C // M
    pieces = tl.cdiv(tuples, TUPLES)
    piece = (tl.program_id(0) % pieces).to(INDEX)
    offs_r = (tl.program_id(0) // pieces).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    in_r = offs_r < R
    # not offs_t < tuples: past the end of a row of nearly 2^31 elements, offs_t overflows
    inside = in_r & (tl.arange(0, TUPLES) < tuples - piece * TUPLES)[None, :]
    offs_t = piece * TUPLES + tl.arange(0, TUPLES)[None, :]
    x_ptr += offs_r * stride_xr
    if M * x_ptr.dtype.element_ty.primitive_bitwidth < 128:
        # a load of 16 bytes spans several tuples
        offs_c = piece * (TUPLES * M) + tl.arange(0, TUPLES * M)[None, :]
        in_c = (tl.arange(0, TUPLES * M) < C - piece * (TUPLES * M))[None, :]
        x = tl.load(x_ptr + offs_c * stride_xc, mask=in_r & in_c, other=0.0)
        x = x.reshape([BLOCK_R, TUPLES, M])
    else:
        offs_c = offs_t[:, :, None] * M + tl.arange(0, M)[None, None, :]
        x = tl.load(x_ptr[:, :, None] + offs_c * stride_xc, mask=inside[:, :, None], other=0.0)
    keys = _columns(tl.abs(x.to(tl.float32)))  # each [BLOCK_R, TUPLES]

    code = _code(_ranks(keys, M), KEPT, M)
    score_ptrs = None if score_ptr is None else score_ptr + offs_r * tuples + offs_t
    infinite = _store_scores(keys, code, inside, score_ptrs, M, float("inf"))
    tl.store(count_ptr + tl.program_id(0), tl.sum(infinite.to(tl.int32)))
    if out_ptr is not None:
        if whole_ptr is not None:
            whole = tl.load(whole_ptr + offs_r * tuples + offs_t, mask=inside, other=0)
            code = tl.where(whole != 0, (1 << M) - 1 if M < 32 else -1, code)
        width = tl.cdiv(C, 8)
        out_ptr += offs_r * width
        if M > 8:
            # joined to one tensor, the compiler would let several threads rank the same tuple
            for byte in tl.static_range(M // 8):
                offs_b = offs_t * (M // 8) + byte
                tl.store(out_ptr + offs_b, (code >> (8 * byte)).to(tl.uint8), mask=inside)
        else:
            start = piece * (TUPLES * M // 8)
            bits, offs_b = _join(tl.where(inside, code, 0), M)
            in_b = in_r & (offs_b < width - start)
            tl.store(out_ptr + start + offs_b, bits.to(tl.uint8), mask=in_b)


@triton.jit
def _straddling_kernel(
    x_ptr,
    whole_ptr,
    out_ptr,
    score_ptr,
    count_ptr,
    R,
    C,
    stride_xr,
    stride_xc,
    KEPT: tl.constexpr,
    M: tl.constexpr,
    LANES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Tuples of any length: a unit of eight is M bytes, written as its tuples come along."""
    tuples = C // M
    pieces = tl.cdiv(tl.cdiv(tuples, 8), UNITS)
    piece = (tl.program_id(0) % pieces).to(INDEX)
    offs_r = (tl.program_id(0) // pieces).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    in_r = offs_r < R
    unit = tl.arange(0, UNITS)[None, :]
    offs_u = piece * UNITS + unit
    lane = tl.arange(0, LANES)[None, None, :]
    width = tl.cdiv(C, 8)
    x_ptr += offs_r * stride_xr

    count = tl.zeros([BLOCK_R, UNITS], tl.int32)
    pending = tl.zeros([BLOCK_R, UNITS], tl.int64)  # bits that do not fill a byte yet
    for u in range(8):
        offs_t = offs_u * 8 + u
        inside = in_r & (unit * 8 + u < tuples - piece * (UNITS * 8))
        x = tl.load(
            x_ptr[:, :, None] + (offs_t[:, :, None] * M + lane) * stride_xc,
            mask=inside[:, :, None] & (lane < M),
            other=0.0,
        )  # [BLOCK_R, UNITS, LANES]
        keys = _columns(tl.abs(x.to(tl.float32)))
        code = _code(_ranks(keys, M), KEPT, M)
        score_ptrs = None if score_ptr is None else score_ptr + offs_r * tuples + offs_t
        count += _store_scores(keys, code, inside, score_ptrs, M, float("inf")).to(tl.int32)
        if out_ptr is not None:
            if whole_ptr is not None:
                whole = tl.load(whole_ptr + offs_r * tuples + offs_t, mask=inside, other=0)
                code = tl.where(whole != 0, (1 << M) - 1, code)
            first = u * M // 8
            full = (u + 1) * M // 8 - first
            pending |= tl.where(inside, code, 0).to(tl.int64) << (u * M % 8)
            for byte in tl.static_range((M + 7) // 8):
                offs_b = unit * M + first + byte
                in_b = in_r & (offs_b < width - piece * (UNITS * M)) & (byte < full)
                tl.store(
                    out_ptr + offs_r * width + piece * (UNITS * M) + offs_b,
                    (pending >> (8 * byte)).to(tl.uint8),
                    mask=in_b,
                )
            pending >>= 8 * full
    tl.store(count_ptr + tl.program_id(0), tl.sum(count))


@triton.jit
def _tile_kernel(
    x_ptr,
    whole_ptr,
    out_ptr,
    score_ptr,
    count_ptr,
    R,
    C,
    stride_xr,
    stride_xc,
    TABLE: tl.constexpr,
    MOST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    across = C // 4
    pieces = tl.cdiv(across, BLOCK_C)
    piece = (tl.program_id(0) % pieces).to(INDEX)
    offs_r = (tl.program_id(0) // pieces).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    offs_t = piece * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_r = offs_r < R // 4
    inside = in_r & (tl.arange(0, BLOCK_C) < across - piece * BLOCK_C)[None, :]
    offs_c = piece * (BLOCK_C * 4) + tl.arange(0, BLOCK_C * 4)[None, :]
    in_c = (tl.arange(0, BLOCK_C * 4) < C - piece * (BLOCK_C * 4))[None, :]
    keys = ()
    for row in tl.static_range(4):
        x = tl.load(
            x_ptr + (offs_r * 4 + row) * stride_xr + offs_c * stride_xc,
            mask=in_r & in_c,
            other=0.0,
        )  # [BLOCK_R, BLOCK_C * 4]
        x = tl.abs(x.to(tl.float32))
        keys += _columns(x.reshape([BLOCK_R, BLOCK_C, 4]))

    pairs = ()
    for row in tl.static_range(4):
        for i in tl.static_range(3):
            for j in tl.static_range(i + 1, 4):
                pairs += (keys[4 * row + i] + keys[4 * row + j],)
    best = tl.full([BLOCK_R, BLOCK_C], -1.0, tl.float32)
    code = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for t in tl.static_range(len(TABLE)):
        upper = pairs[TABLE[t][0]] + pairs[6 + TABLE[t][1]]
        lower = pairs[12 + TABLE[t][2]] + pairs[18 + TABLE[t][3]]
        better = upper + lower > best
        best = tl.where(better, upper + lower, best)
        code = tl.where(better, TABLE[t][4], code)

    score_ptrs = None if score_ptr is None else score_ptr + offs_r * across + offs_t
    infinite = _store_scores(keys, code, inside, score_ptrs, 16, MOST)
    tl.store(count_ptr + tl.program_id(0), tl.sum(infinite.to(tl.int32)))
    if out_ptr is not None:
        if whole_ptr is not None:
            whole = tl.load(whole_ptr + offs_r * across + offs_t, mask=inside, other=0)
            code = tl.where(whole != 0, 0xFFFF, code)
        code = tl.where(inside, code, 0)
        width = tl.cdiv(C, 8)
        start = piece * (BLOCK_C // 2)
        for row in tl.static_range(4):
            bits, offs_b = _join((code >> (4 * row)) & 15, 4)
            tl.store(
                out_ptr + (offs_r * 4 + row) * width + start + offs_b,
                bits.to(tl.uint8),
                mask=in_r & (offs_b < width - start),
            )


class _Plan(NamedTuple):
    """How the kernels see a weight."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    block_r: int  # rows of groups in a tile
    block_c: int  # groups across a tile; units of eight where they straddle bytes
    programs: int


def _plan(weight: Tensor, pattern: NM) -> _Plan:
    """Choose the view of ``weight`` and the tile.

    A matrix in one run, whose packed rows are in one run too, is seen as one row: a tile is then
    no longer bound to the matrix's width.
    """
    shape, strides = (weight.shape[0], weight.shape[1]), weight.stride()
    tall, wide = pattern.group
    lanes = triton.next_power_of_2(wide)
    # a loop over the eight tuples of a unit holds one of them at a time
    unit = 1 if wide == lanes else 8
    most = TILE // (tall * lanes)
    piece = most
    if tall == 1 and weight.is_contiguous() and shape[1] % 8 == 0:
        shape, strides = (1, weight.numel()), (weight.numel(), 1)
    else:
        # neighbours down a column, as in a weight stored transposed, are read together too
        piece = min(most, max(8, (64 if strides[0] < strides[1] else PIECE) // lanes))
    across = ceil_div(shape[1], wide * unit)
    block_c = min(piece, max(8, triton.next_power_of_2(across)))
    block_r = 1 if shape[0] == 1 else most // block_c
    down = shape[0] // tall
    programs = ceil_div(down, block_r) * ceil_div(across, block_c)
    return _Plan(shape, (strides[0], strides[1]), block_r, block_c, programs)


def _launch(
    weight: Tensor, pattern: NM, whole: Tensor | None, out: Tensor | None, scores: Tensor | None
) -> Tensor:
    if weight.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=weight.device)
    plan = _plan(weight, pattern)
    grid = (plan.programs,)
    count = torch.empty(grid, dtype=torch.int32, device=weight.device)
    flags = None if whole is None else whole.contiguous().view(torch.uint8)
    arguments = (weight, flags, out, scores, count, *plan.shape, *plan.strides)
    n, m, block_r, block_c = pattern.n, pattern.m, plan.block_r, plan.block_c
    index = index_type(weight, *(t for t in (out, scores) if t is not None))
    with on_device(weight):
        if pattern.transposable:
            _tile_kernel[grid](
                *arguments,
                TABLE=_TABLE,
                MOST=TILE_LARGEST,
                INDEX=index,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                **FUSED,
            )
        elif m & (m - 1) == 0:
            _nm_kernel[grid](
                *arguments, KEPT=n, M=m, INDEX=index, BLOCK_R=block_r, TUPLES=block_c, **FUSED
            )
        else:
            _straddling_kernel[grid](
                *arguments, KEPT=n, M=m, LANES=triton.next_power_of_2(m), INDEX=index,
                BLOCK_R=block_r, UNITS=block_c,
                **FUSED,
            )  # fmt: skip
    return count.sum()


def _select(
    weight: Tensor, pattern: NM, whole: Tensor | None, out: Tensor | None, scores: Tensor | None
) -> Tensor:
    on_triton = use_triton("nm_mask", "auto", weight) and weight.dtype != torch.float64
    return (_launch if on_triton else _reference)(weight, pattern, whole, out, scores)


def _new_scores(weight: Tensor, pattern: NM) -> Tensor:
    tall, wide = pattern.group
    shape = weight.shape[0] // tall, weight.shape[1] // wide
    return weight.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("triton_sparsity::nm_mask_out", mutates_args=("out",))
def _mask_out_op(
    weight: Tensor, n: int, m: int, transposable: bool, whole: Tensor | None, out: Tensor
) -> Tensor:
    return _select(weight, NM(n, m, transposable), whole, out, None)


@torch.library.custom_op("triton_sparsity::nm_mask", mutates_args=())
def _mask_op(
    weight: Tensor, n: int, m: int, transposable: bool, whole: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = weight.new_empty(packed_shape(weight.shape), dtype=torch.uint8)
    return out, _select(weight, NM(n, m, transposable), whole, out, None)


@torch.library.custom_op("triton_sparsity::nm_score", mutates_args=())
def _score_op(weight: Tensor, n: int, m: int, transposable: bool) -> Tensor:
    pattern = NM(n, m, transposable)
    scores = _new_scores(weight, pattern)
    _select(weight, pattern, None, None, scores)
    return scores


@_mask_out_op.register_fake
def _(weight, n, m, transposable, whole, out) -> Tensor:
    return weight.new_empty((), dtype=torch.int64)


@_mask_op.register_fake
def _(weight, n, m, transposable, whole) -> tuple[Tensor, Tensor]:
    mask = weight.new_empty(packed_shape(weight.shape), dtype=torch.uint8)
    return mask, weight.new_empty((), dtype=torch.int64)


@_score_op.register_fake
def _(weight, n, m, transposable) -> Tensor:
    return _new_scores(weight, NM(n, m, transposable))


def _takes_operator(operation: str, weight: Tensor, pattern: NM, backend: Backend) -> bool:
    """Validate the arguments; tell whether the operator runs, or the reference in its stead."""
    if not isinstance(pattern, NM):
        raise TypeError(f"{operation}: pattern must be NM(n, m), got {pattern!r}")
    if weight.ndim != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            f"{operation}: weight must be a floating-point matrix, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    for side, length, step in zip(("rows", "columns"), weight.shape, pattern.group, strict=True):
        if length % step:
            raise ValueError(
                f"{operation}: weight must have {side} divisible by {step} for {pattern}, "
                f"got {tuple(weight.shape)}"
            )
    on_triton = use_triton(operation, backend, weight)
    if weight.dtype == torch.float64 and backend == "triton":
        raise ValueError(f"{operation}: weight must not be float64 with backend='triton'")
    return on_triton or backend == "auto"


@torch.no_grad()
def nm_mask(
    weight: Tensor,
    pattern: NM,
    *,
    whole: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> NMMask:
    """Keep n of every m consecutive elements of a row: those of the largest magnitudes.

    Among equal magnitudes, in float32, the first are kept. Under a transposable pattern each 4 x 4
    tile keeps the two elements a row and a column that have the largest sum; see above.

    Args:
        weight: float ``(R, C)``, any strides; or scores of its elements. float64 takes plain
            torch.
        pattern: which divides ``weight`` into groups: m-tuples, or tiles of 4 x 4.
        whole: bool, one element a group, ``(R, C / m)`` or ``(R / 4, C / 4)``: True where a group
            is kept as a whole.
        out: a contiguous mask to write in place; its storage stays where it is.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        The packed mask, ``out`` if given, and ``NMMask``'s ``nonfinite``.

    Raises:
        TypeError: ``pattern`` is no ``NM``.
        ValueError: an argument has a wrong shape, dtype, device or layout.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    takes_operator = _takes_operator("nm_mask", weight, pattern, backend)
    tall, wide = pattern.group
    for name, tensor, dtype, shape in (
        ("whole", whole, torch.bool, (weight.shape[0] // tall, weight.shape[1] // wide)),
        ("out", out, torch.uint8, packed_shape(weight.shape)),
    ):
        if tensor is not None and (
            tensor.shape != shape
            or tensor.dtype != dtype
            or tensor.device != weight.device
            or not (name == "whole" or tensor.is_contiguous())
        ):
            raise ValueError(
                f"nm_mask: {name} must be {'contiguous ' * (name == 'out')}{dtype} {shape} on "
                f"{weight.device}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} "
                f"with strides {tensor.stride()}"
            )
    spelled = pattern.n, pattern.m, pattern.transposable
    if takes_operator:
        if out is None:
            return NMMask(*_mask_op(weight, *spelled, whole))
        return NMMask(out, _mask_out_op(weight, *spelled, whole, out))
    if out is None:
        out = weight.new_empty(packed_shape(weight.shape), dtype=torch.uint8)
    return NMMask(out, _reference(weight, pattern, whole, out, None))


@torch.no_grad()
def nm_score(weight: Tensor, pattern: NM, *, backend: Backend = "auto") -> Tensor:
    """Return what pruning a group would cost: the sum of the magnitudes that ``nm_mask`` drops.

    Args:
        weight: as for ``nm_mask``.
        pattern: as for ``nm_mask``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        float32, one element a group, ``(R, C / m)`` or ``(R / 4, C / 4)``, added up in float32 in
        row-major order. NaN where a group holds a NaN or an Inf, or a tile 2^124 or more.

    Raises:
        TypeError, ValueError, RuntimeError: as ``nm_mask``.
    """
    if _takes_operator("nm_score", weight, pattern, backend):
        return _score_op(weight, pattern.n, pattern.m, pattern.transposable)
    scores = _new_scores(weight, pattern)
    _reference(weight, pattern, None, None, scores)
    return scores


def pack_semi_structured(weight: Tensor) -> Tensor:
    """Turn a 2:4 weight into PyTorch's semi-structured tensor, by PyTorch's own packing.

    Args:
        weight: float16 or bfloat16 ``(R, C)``, contiguous, on a GPU of compute capability 8.0 or
            later, with two zeros at least in every four elements of a row.

    Raises:
        ValueError: it is not such, or of a shape that the device's library refuses.
    """
    obstacle = _obstacle(weight)
    if obstacle is not None:
        raise ValueError(f"pack_semi_structured: {obstacle}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        try:
            return torch.sparse.to_sparse_semi_structured(weight)
        except RuntimeError as error:
            raise ValueError(f"pack_semi_structured: {error}") from error


def _obstacle(weight: Tensor) -> str | None:
    """Say why the device cannot multiply ``weight`` as a semi-structured tensor."""
    if not weight.is_cuda:
        return f"weight must be on a CUDA device, got {weight.device}"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        return f"the device must have compute capability 8.0 or later, got {capability}"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"weight must be float16 or bfloat16, got {weight.dtype}"
    return None


def nm_complete(kept: Tensor, pattern: NM) -> Tensor:
    """Return a bool matrix in which the groups that keep more than n:m are kept whole.

    Args:
        kept: bool ``(R, C)``, divided into groups without remainder.
        pattern: whose n holds for each tuple, and for each row and column of a tile.
    """
    tall, wide = pattern.group
    rows, cols = kept.shape[0] // tall, kept.shape[1] // wide
    groups = kept.reshape(rows, tall, cols, wide)
    ones = groups.view(torch.uint8)  # of bools a sum would make int64 of each first
    fits = (ones.sum(3, dtype=torch.uint8) <= pattern.n).all(1)
    if pattern.transposable:
        fits &= (ones.sum(1, dtype=torch.uint8) <= pattern.n).all(2)
    return (groups | ~fits[:, None, :, None]).view(kept.shape)


def nm_fits(kept: Tensor, pattern: NM) -> bool:
    """Tell whether of every group of a bool matrix n:m at most is kept, or all."""
    return not nm_misfits(kept, pattern)


def nm_misfits(kept: Tensor, pattern: NM) -> Tensor:
    """Return whether ``nm_fits`` does not hold: 0-d, on the device, which is not waited for."""
    return (nm_complete(kept, pattern) != kept).any()
