"""Sums over a weight whose bits are the same on any number of ranks, and its norm of these.

A line of a weight, as it lies in memory, is parted into pieces, and each piece is added up by
itself, a kernel's by segments: whoever has it gets the same numbers. These are then added up as
integers, in whatever order: multiples of one power of two, which the greatest says. So ranks that
hold parts of a weight reduce two numbers for it, and get the bits of one process that holds all.

Reading order: pieces -> sums of a piece in plain torch -> sums of all -> kernels -> launcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .grid import ceil_div
from .launch import FUSED, Backend, on_device, tl, triton, use_triton
from .pattern import MAX_BLOCK_SIDE
from .search import Reduce
from .table import Column, addresses, device_table

PIECES = 16  # of a line
# elements: a chunk and its squares stay in the cache between the passes over them
CPU_CHUNK = 2**19
# between which float32 holds a sum of squares well
_LEAST, _MOST = 2.0**-60, 2.0**120
# numbers that a program adds up, and at a time; bits of the greatest, of which 2^28 may be added
_SUM = {"CHUNK": 2**14, "BLOCK": 1024, "BITS": 34}


def pieces_of(length: int) -> int:
    """Return into how many equal pieces a line of a matrix is parted, each of which is added up by
    itself, so that ranks that have some of them get the bits of one that has them all.
    """
    return PIECES if length % PIECES == 0 else 1


def segment_of(length: Column) -> Column:
    """Return how many neighbours in pieces of these lengths a kernel adds up by themselves, powers
    of two. The last segment may be shorter.
    """
    common = np.gcd(length, MAX_BLOCK_SIDE)
    most = np.clip(length, 1, MAX_BLOCK_SIDE)
    above = np.left_shift(1, np.ceil(np.log2(most)).astype(np.int64))
    return np.where(common >= MAX_BLOCK_SIDE // 4, common, above)


def in_pieces(matrix: Tensor, pieces: int | None = None) -> Tensor:
    """Return a matrix with a row for each piece of each row; None: ``pieces_of`` it."""
    pieces = pieces_of(matrix.shape[1]) if pieces is None else pieces
    if pieces == 1:
        return matrix
    return matrix.reshape(len(matrix) * pieces, matrix.shape[1] // max(pieces, 1))


def row_squares(matrix: Tensor, pieces: int | None = None) -> Tensor:
    """Return the sum of squares of each piece of each row, float64, as ``(rows * pieces,)``: the
    same bits whatever lies beside. Of a matrix that lies turned in memory columns take the place
    of rows.

    Squares are added up in float32, and of the pieces where it does not hold them in float64.

    Args:
        matrix: float, ``(R, C)``.
        pieces: of a row, all as long; None: ``pieces_of`` it.
    """
    matrix = matrix.T if matrix.stride(0) < matrix.stride(1) else matrix
    matrix = in_pieces(matrix, pieces)
    squares = _squares(matrix, torch.promote_types(matrix.dtype, torch.float32))
    far = ~((squares > _LEAST) & (squares < _MOST))
    if far.any():
        squares[far] = _squares(matrix[far], torch.float64)
    return squares


def row_sums(matrix: Tensor, pieces: int | None = None) -> Tensor:
    """Return the sum of each piece of each row, float64, as ``(rows * pieces,)``: the same bits
    whatever lies beside. Arguments are ``row_squares``'.
    """
    matrix = in_pieces(matrix, pieces)
    if not matrix.is_cpu:
        return torch.cat([_by_pairs(part.double()) for part in _chunks(matrix)])
    if len(matrix) == 1:  # a single sum would be parted among threads
        return matrix.expand(2, -1).sum(1, dtype=torch.float64)[:1]
    return matrix.sum(1, dtype=torch.float64)


def _squares(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of each row's squares, added up in ``dtype``; float64."""
    if not matrix.is_cpu:
        return torch.cat([_by_pairs(part.to(dtype).square()) for part in _chunks(matrix)]).double()
    if len(matrix) == 1:  # a single sum would be parted among threads
        return _squares(matrix.expand(2, -1), dtype)[:1]
    parts = _chunks(matrix) if dtype == torch.float64 else [matrix]
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in parts]
    return torch.cat(norms).double().square()


def _chunks(matrix: Tensor) -> Sequence[Tensor]:
    return matrix.split(max(1, CPU_CHUNK // max(1, matrix.shape[1])))


def _by_pairs(matrix: Tensor) -> Tensor:
    """Return the sum of each row: neighbours are added, then neighbours among these sums.

    A GPU's own sum over a dimension may go by the number of rows.
    """
    while (length := matrix.shape[1]) > 1:
        even = length - length % 2
        pairs = matrix[:, 0:even:2] + matrix[:, 1:even:2]
        matrix = torch.cat([pairs, matrix[:, even:]], 1) if length % 2 else pairs
    return matrix.sum(1)


class Places(NamedTuple):
    """Where vectors of float64 lie on a device.

    Attributes:
        held: what they are parts of.
        address, length: of each.
    """

    held: Sequence[Tensor]
    address: Column
    length: Column

    @classmethod
    def of(cls, vectors: Sequence[Tensor]) -> Places:
        lengths = np.fromiter((vector.numel() for vector in vectors), np.int64, len(vectors))
        return cls(vectors, addresses(vectors), lengths)


def inverse_norms(
    squares: Sequence[Tensor] | Places,
    most: Reduce | None = None,
    add: Reduce | None = None,
    backend: Backend = "torch",
) -> Tensor:
    """Return ``1 / ||w||_2`` of each weight from sums of its squares; 1 for a weight of zeros, Inf
    where float32 ends.

    Args:
        squares: of each weight what ``row_squares`` returns, or of some of its rows. ``Places``
            are for kernels, of one process.
        most, add, backend: as ``exact_sums``'s.

    Returns:
        float32 ``(len(squares),)``.
    """
    if isinstance(squares, Places):
        return _norms_at(squares)
    if most is None and use_triton("inverse_norms", backend, squares[0]):
        return _norms_at(Places.of(squares))
    norms = exact_sums(squares, most, add, backend=backend).sqrt()
    # scores that are not finite are refused
    return norms.where(norms > 0, 1).reciprocal().float()


def exact_sums(
    vectors: Sequence[Tensor],
    most: Reduce | None = None,
    add: Reduce | None = None,
    counts: Sequence[int] | None = None,
    backend: Backend = "torch",
) -> Tensor:
    """Return the sum of each vector: the same bits in whatever order, and whoever adds which.

    Numbers are added up as integers, multiples of one power of two a vector.

    Args:
        vectors: float64, contiguous, not negative.
        most, add: the greatest, and the sum, of float64 or int64 vectors of several ranks, which
            have the other numbers; None: all are here.
        counts: how many numbers at most each has on all ranks; None: 2^28.
        backend: of two launches for all vectors, or some operators for each; the same bits. The
            former is for ``counts=None``.

    Returns:
        float64 ``(len(vectors),)``; NaN where a number is NaN or Inf.
    """
    by_kernel = counts is None and use_triton("exact_sums", backend, vectors[0])
    places = Places.of(vectors) if by_kernel else None
    peaks = _peaks(vectors) if places is None else _launch(places).amax(1).view(torch.float64)
    peaks = peaks.where(peaks.isfinite(), torch.inf)
    peaks = peaks if most is None else most(peaks)
    bits = (
        _SUM["BITS"] if counts is None else peaks.new_tensor([62 - n.bit_length() for n in counts])
    )
    shifts = bits - torch.frexp(peaks.where(peaks.isfinite(), 0)).exponent
    if places is None:
        totals = _totals(vectors, _power(shifts))
    else:
        totals = _launch(places, peaks.view(torch.int64)[:, None]).sum(1)
    totals = totals if add is None else add(totals)
    return (totals.double() * _power(-shifts)).where(peaks.isfinite(), torch.nan)


def _peaks(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.max() if len(v) else v.new_zeros(()) for v in vectors])


def _totals(vectors: Sequence[Tensor], units: Tensor) -> Tensor:
    """Return the sum of each vector in multiples of its unit's inverse, int64."""
    scaled = [v * unit for v, unit in zip(vectors, units, strict=True)]
    return torch.stack([v.nan_to_num(0, 0, 0).round().long().sum() for v in scaled])


def _power(exponents: Tensor) -> Tensor:
    """Return 2^n in float64, exact, which ``torch.pow`` need not be."""
    return ((exponents.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


@triton.jit
def segment_squares(values, SEGMENT: tl.constexpr):
    """Return the sum of squares of each segment of a float32 tile's rows, float64.

    Squares are added up as integers of 22 bits at most, multiples of a power of two that the
    greatest of the segment says, so that the bits go by no layout of threads.
    """
    SEGMENTS: tl.constexpr = values.shape[1] // SEGMENT
    parts = tl.reshape(values, (values.shape[0], SEGMENTS, SEGMENT))
    peaks = tl.max(parts.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)  # their bits
    # a subnormal's exponent is that of the normal number which is 2^64 times as large, less 64
    small = tl.where(peaks < 0x00800000, peaks, 0).to(tl.float32, bitcast=True)
    normal = (small * 18446744073709551616.0).to(tl.int32, bitcast=True)
    exponents = tl.where(normal > 0, (normal >> 23) - 64, peaks >> 23)
    # the greatest comes to lie between 2^10 and 2^11; one factor alone may exceed float32
    shifts = tl.where(peaks > 0, 137 - exponents, 0)
    more = tl.maximum(shifts - 127, 0)
    first = (shifts - more + 127 << 23).to(tl.float32, bitcast=True)
    second = (more + 127 << 23).to(tl.float32, bitcast=True)
    scaled = parts * first[:, :, None] * second[:, :, None]
    # what is added to 2^23 is rounded to a whole number, which its last bits are then
    whole = tl.fma(scaled, scaled, 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    unit = (1023 - 2 * shifts).to(tl.int64) << 52
    sums = tl.sum(whole, axis=2).to(tl.float64) * unit.to(tl.float64, bitcast=True)
    return tl.where(peaks < 0x7F800000, sums, float("inf"))  # [rows, SEGMENTS]


@triton.jit
def _most(peak_ptr, parts, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Return the greatest of some bits, and by what power of two that becomes one of ``BITS``."""
    found = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, parts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(peak_ptr + offs, mask=offs < parts, other=0))
    peak = tl.max(found)
    finite = (peak > 0) & (peak < 0x7FF0000000000000)
    return peak, tl.where(finite, BITS + 1022 - (peak >> 52), BITS)


@triton.jit
def _power_of_two(exponent):
    """Return 2^n in float64."""
    bits = (tl.minimum(tl.maximum(exponent, -1022), 1023) + 1023) << 52
    return bits.to(tl.float64, bitcast=True)


# A table's columns: programs, the vector's address, its length.


@triton.jit(do_not_specialize=["programs", "parts"])
def _exact_sum_kernel(
    table_ptr,
    peak_ptr,
    out_ptr,
    programs,
    parts,
    N: tl.constexpr,
    SUMMED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """Find the bits of the greatest of a chunk of a vector, or its sum in multiples of what the
    greatest of the vector says, of which there are ``parts``.
    """
    INFINITY: tl.constexpr = 0x7FF0000000000000
    vector, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    value_ptr = tl.load(table_ptr + N + vector).to(tl.pointer_type(tl.int64))
    length = tl.load(table_ptr + 2 * N + vector)
    found = tl.zeros((BLOCK,), tl.int64)
    first = part.to(tl.int64) * CHUNK
    unit = tl.full((), 1.0, tl.float64)
    if SUMMED:
        _, shift = _most(peak_ptr + vector * parts, parts, BLOCK, BITS)
        unit = _power_of_two(shift)
    for start in range(first, tl.minimum(first + CHUNK, length), BLOCK):
        offs = start + tl.arange(0, BLOCK)
        bits = tl.load(value_ptr + offs, mask=offs < length, other=0)  # [BLOCK]
        bits &= 0x7FFFFFFFFFFFFFFF  # of a NaN with a sign
        if SUMMED:
            finite = tl.where(bits < INFINITY, bits, 0)
            scaled = finite.to(tl.float64, bitcast=True) * unit
            # beyond 2^52 there are whole numbers alone
            found += (scaled + 4503599627370496.0 - 4503599627370496.0).to(tl.int64)
        else:
            # of numbers that are not negative, bits order as they do
            found = tl.maximum(found, bits)
    tl.store(out_ptr + tl.program_id(0), tl.sum(found) if SUMMED else tl.max(found))


@triton.jit(do_not_specialize=["parts"])
def _inverse_norm_kernel(
    peak_ptr, total_ptr, out_ptr, parts, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """Do what ``inverse_norms`` does of the greatest and the sums of a vector's chunks."""
    vector = tl.program_id(0)
    peak, shift = _most(peak_ptr + vector * parts, parts, BLOCK, BITS)
    found = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, parts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        found += tl.load(total_ptr + vector * parts + offs, mask=offs < parts, other=0)
    norm = tl.sqrt(tl.sum(found).to(tl.float64) * _power_of_two(-shift))
    held = (norm > 0) & (peak < 0x7FF0000000000000)
    tl.store(out_ptr + vector, (1.0 / tl.where(held, norm, 1.0)).to(tl.float32))


def _launch(places: Places, peaks: Tensor | None = None) -> Tensor:
    """Return of each chunk of each vector ``_peaks``' bits, or ``_totals``' where these are given
    of chunks or of vectors; int64 ``(vectors, chunks)``, ``chunks`` as the longest has.
    """
    first = places.held[0]
    programs = max(1, ceil_div(int(places.length.max()), _SUM["CHUNK"]))
    with on_device(first):
        columns = programs, places.address, places.length
        table, total = device_table(first.device, columns)
        found = first.new_empty(len(places.length), programs, dtype=torch.int64)
        _exact_sum_kernel[(total,)](
            table,
            found if peaks is None else peaks,
            found,
            programs,
            1 if peaks is None else peaks.shape[1],
            N=table.shape[1],
            SUMMED=peaks is not None,
            **_SUM,
            **FUSED,
        )
    return found


def _norms_at(places: Places) -> Tensor:
    peaks = _launch(places)
    totals = _launch(places, peaks)
    found = peaks.new_empty(len(peaks), dtype=torch.float32)
    with on_device(found):
        _inverse_norm_kernel[(len(peaks),)](
            peaks,
            totals,
            found,
            peaks.shape[1],
            BLOCK=_SUM["BLOCK"],
            BITS=_SUM["BITS"],
            **FUSED,
        )
    return found
