"""Scores of gradients against their lines: each row, then each column, to a mean square of 1.

Where |g| is compared as it is, a few lines of a large |g| win all. So g is divided by the root
mean square of its row, and what that gives by that of its column, each rounded to g's type. A list
is three launches on a GPU for each dtype: rows, columns, scores; no copy of a gradient is made.

Squares are added up as integers, as multiples of a power of two that the greatest of a line says:
ranks that have parts of a line send an exponent and a sum of these, 5 bytes, and get the bits of
who has it whole. In models of very many lines some neighbours, a band, have one size in common, so
that ranks send no more than ``MOST_BANDS`` of them: ``lines_a_band`` says how many a band has.

Floor: five reads of the gradients.

Reading order: reference -> kernels -> launcher -> public function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bits import chunk_of
from .block_score import TILE, block_scores
from .grid import ceil_div
from .launch import FUSED, Backend, on_device, tl, triton, use_triton
from .pattern import Pattern
from .search import Reduce
from .table import Matrices, alike, device_table, find_tensor, first_of, list_index_type

# 8 MB on the wire; a model of 8 billion parameters has fewer columns
MOST_BANDS = 1_650_000
GOLDEN = 2654435769  # the golden section of 2^32: its multiples fill a circle evenly


class Piece(NamedTuple):
    """A matrix as a part of another one, of which other ranks have the rest.

    Attributes:
        first: its first row and column there.
        shape: of the other one.
        parted: whether columns, and rows, or bands of these, lie on several ranks.
        counted: this is the first copy.
    """

    first: tuple[int, int]
    shape: tuple[int, int]
    parted: tuple[bool, bool] = (False, False)
    counted: bool = True


def lines_a_band(shapes: Sequence[tuple[int, int]]) -> int:
    """Return how many neighbouring lines of a model's matrices have one size in common: a power of
    two; 1 where there are few columns. Each rank has whole rows then, as a rule; but not whole
    bands of rows, so that beyond 1 rows count too.

    Args:
        shapes: of all matrices, in full.
    """
    rows, cols = map(sum, zip(*shapes, strict=True))
    if cols <= MOST_BANDS:
        return 1
    return 1 << (ceil_div(rows + cols, MOST_BANDS) - 1).bit_length()


def norm_(gradient: Tensor, band: int = 1) -> None:
    """Divide a matrix by the root mean square of each row, then of each column, in place; of each
    ``band`` of so many rows, and of columns.
    """
    rows, cols = gradient.shape
    norm_all_([gradient], [Piece((0, 0), (rows, cols))], band)


def norm_all_(
    gradients: Sequence[Tensor],
    pieces: Sequence[Piece],
    band: int = 1,
    most: Reduce | None = None,
    add: Reduce | None = None,
) -> None:
    """``norm_`` matrices of which other ranks may have the rest: 5 bytes a band that is parted.

    Args:
        gradients: what is here.
        pieces: where each lies.
        band: of how many lines. The first band begins with the first line of the whole matrix.
        most, add: the greatest of uint8 vectors, and the sum of int32 vectors, of all ranks; None:
            all is here.
    """
    for dim in (1, 0):
        lines = [gradient.T if dim == 1 else gradient for gradient in gradients]
        firsts = [piece.first[1 - dim] for piece in pieces]
        each = zip(lines, firsts, strict=True)
        peaks = [_by_band(_peaks(own), first, band).amax(1) for own, first in each]
        peaks = _of_all(peaks, pieces, dim, band, most)
        squares = []
        for own, first, peak, of in zip(lines, firsts, peaks, pieces, strict=True):
            peak = _by_line(peak, first, band, own.shape[1])
            found = _squares(own, peak, of.first[dim], of.shape[dim] * band)
            squares.append(_by_band(found, first, band).sum(1, dtype=torch.int32))
        squares = _of_all(squares, pieces, dim, band, add)
        for own, first, peak, total, of in zip(lines, firsts, peaks, squares, pieces, strict=True):
            size = _size(total, peak, first // band, of.shape[1 - dim], of.shape[dim], band)
            size = _by_line(size, first, band, own.shape[1])
            for some, sizes in zip(_some(own, 0), size.split(_lines(own, 0)), strict=True):
                some.div_(sizes)


def _by_band(numbers: Tensor, first: int, band: int) -> Tensor:
    """Return a row for each band of what lines have, from line ``first`` on; 0 where none is."""
    before = first % band
    padded = torch.nn.functional.pad(numbers, (before, -(before + len(numbers)) % band))
    return padded.view(-1, band)


def _by_line(numbers: Tensor, first: int, band: int, count: int) -> Tensor:
    """Return what each of ``count`` lines, from ``first`` on, has of its band."""
    return numbers.repeat_interleave(band)[first % band :][:count] if band > 1 else numbers


def _of_all(
    vectors: Sequence[Tensor],
    pieces: Sequence[Piece],
    dim: int,
    band: int,
    reduce: Reduce | None,
) -> list[Tensor]:
    """Reduce numbers, one a band of lines along ``dim``, of which several ranks have parts."""
    places = [i for i, piece in enumerate(pieces) if piece.parted[dim]]
    found = list(vectors)
    if reduce is None or not places:
        return found
    full = [vectors[i].new_zeros(ceil_div(pieces[i].shape[1 - dim], band)) for i in places]
    starts = [pieces[i].first[1 - dim] // band for i in places]
    here = [slice(f, f + len(vectors[i])) for f, i in zip(starts, places, strict=True)]
    for whole, at, i in zip(full, here, places, strict=True):
        whole[at] = vectors[i] * pieces[i].counted
    reduced = reduce(torch.cat(full)).split([len(whole) for whole in full])
    for whole, at, i in zip(reduced, here, places, strict=True):
        found[i] = whole[at]
    return found


def _some(matrix: Tensor, dim: int) -> Sequence[Tensor]:
    """Part a matrix into some whole lines along ``dim`` at a time: what is divided by a double
    becomes one on the way.
    """
    return matrix.split(_lines(matrix, dim), 1 - dim)


def _lines(matrix: Tensor, dim: int) -> int:
    return max(1, chunk_of(matrix.device) // max(1, matrix.shape[dim]))


def _bits(length: int) -> int:
    """Return how many bits a square may have, so that an int32 holds the sum of so many."""
    return 31 - length.bit_length()


def _factors(lines: int, length: int, band: int) -> tuple[float, float]:
    """Return the factors of the norms of full bands and of the last, which may have less lines."""
    last = lines - (ceil_div(lines, band) - 1) * band
    full, rest = (max(length * n, 1) ** -0.5 for n in (band, last))
    return full, rest


def _power_above(peaks: Tensor) -> Tensor:
    """Return float64, a power of two above what has such an exponent."""
    return ((peaks.long() - 126 + 1023) << 52).view(torch.float64)


def _peaks(matrix: Tensor) -> Tensor:
    """Return uint8, the exponent of the greatest magnitude of each column, as float32 has it; that
    of Inf where there is a NaN.
    """
    parts = [torch.zeros(matrix.shape[1], device=matrix.device)]
    parts += [lines.abs().amax(0).float() for lines in _some(matrix, 1) if len(lines)]
    peaks = torch.stack(parts).amax(0)
    peaks = peaks.where(peaks.isfinite(), torch.inf)
    return (peaks.view(torch.int32) >> 23).to(torch.uint8)


def _squares(matrix: Tensor, peaks: Tensor, first: int, length: int) -> Tensor:
    """Return int32, the sum of squares of each column, as multiples of a power of two that its
    peak says: the same in whatever order, and whoever adds which. They are rounded up at as many
    places of a line as their fractions say, so that small ones are not lost beside a great one.

    Args:
        first: the place of the first row in a line.
        length: of all lines whose sums are added up.
    """
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    below = 1 / _power_above(peaks)
    places = torch.arange(first, first + len(matrix), device=matrix.device)[:, None]
    offsets = (places * GOLDEN & 2**32 - 1) * 2.0**-32
    step = _lines(matrix, 1)
    for lines, above in zip(_some(matrix, 1), offsets.split(step), strict=True):
        squares = (lines.double() * below).square_().mul_(2.0 ** _bits(length))
        total += squares.add_(above).floor_().sum(0)  # of integers, exact
    return total.nan_to_num_(0, 0, 0).int()


def _size(
    squares: Tensor, peaks: Tensor, first: int, lines: int, length: int, band: int
) -> Tensor:
    """Return float64, the root mean square of each band from ``first`` on; 1 of zeros, NaN of Inf
    and NaN.

    Args:
        squares, peaks: one a band.
        lines: how many the matrix has.
        length: of one.
    """
    full, last = _factors(lines, length, band)
    factors = torch.full_like(squares, full, dtype=torch.float64)
    factors[ceil_div(lines, band) - 1 - first :] = last
    size = (squares.double() * 2.0 ** -_bits(length * band)).sqrt() * _power_above(peaks)
    size = (size * factors).where(squares != 0, 1)
    return size.where(peaks < 255, torch.nan)


def line_scores_reference(
    gradient: Tensor, pattern: Pattern, backend: Backend, band: int = 1
) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype."""
    gradient = gradient.clone()
    norm_(gradient, band)
    (scores,), _ = block_scores([gradient], pattern, normed=False, backend=backend)
    return scores


# A table's columns: first program of the rows, of the columns and of the scores, the gradient's
# address, rows, columns, its strides, the first row, column and score, and of rows and columns the
# factors of the norms, those of the last band, and the scales of the squares, as the bits of a
# float64.


@triton.jit
def _gradient(entry, DTYPE: tl.constexpr, INDEX: tl.constexpr, N: tl.constexpr):
    """Read where a gradient lies, its rows and columns, and its strides."""
    x_ptr = tl.load(entry + 3 * N).to(tl.pointer_type(DTYPE))
    R, C = tl.load(entry + 4 * N).to(INDEX), tl.load(entry + 5 * N).to(INDEX)
    stride_r, stride_c = tl.load(entry + 6 * N).to(INDEX), tl.load(entry + 7 * N).to(INDEX)
    return x_ptr, R, C, stride_r, stride_c


@triton.jit
def _tile(x_ptr, offs_r, offs_c, R, C, stride_r, stride_c):
    """Read some rows of some columns, 0 past the edges."""
    return tl.load(
        x_ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c,
        mask=(offs_r < R)[:, None] & (offs_c < C)[None, :],
        other=0,
    )  # [TILE_R, TILE_C]


@triton.jit
def _divide(x, size, DTYPE: tl.constexpr):
    # a double becomes half or bfloat16 by way of a float, as in torch
    return (x.to(tl.float64) / size).to(tl.float32).to(DTYPE)


@triton.jit
def _magnitude(x):
    # a maximum need not keep a NaN
    return tl.where(x != x, float("inf"), tl.abs(x.to(tl.float32)))


@triton.jit
def _power(exponent):
    # of 2, as the bits of a float64
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _square(x, below, scale, places, GOLDEN: tl.constexpr):
    """Return a square as ``_squares`` counts it, int32."""
    above = ((places.to(tl.int64) * GOLDEN) & 0xFFFFFFFF).to(tl.float64) * 2.0**-32
    part = x.to(tl.float64) * below
    return (part * part * scale + above).to(tl.int32)


@triton.jit
def _to_lines(x, BAND: tl.constexpr, LINES: tl.constexpr):
    """Give each line what its band has."""
    return tl.reshape(tl.broadcast_to(x[:, None], (LINES // BAND, BAND)), (LINES,))


@triton.jit
def _peak_of_band(x, BAND: tl.constexpr, LINES: tl.constexpr):
    if BAND > 1:
        x = _to_lines(tl.max(tl.reshape(x, (LINES // BAND, BAND)), axis=1), BAND, LINES)
    return x


@triton.jit
def _sum_of_band(x, BAND: tl.constexpr, LINES: tl.constexpr):
    if BAND > 1:
        x = _to_lines(tl.sum(tl.reshape(x, (LINES // BAND, BAND)), axis=1), BAND, LINES)
    return x


@triton.jit
def _factor(entry, offs, lines, BAND: tl.constexpr, N: tl.constexpr):
    """Read the factor of each line's norm; ``entry`` is that of all but the last band."""
    full = tl.load(entry).to(tl.float64, bitcast=True)
    last = tl.load(entry + 2 * N).to(tl.float64, bitcast=True)
    return tl.where(offs // BAND == (lines - 1) // BAND, last, full)


@triton.jit
def _root(squares, exponent, scale, factor):
    """Return ``_size``."""
    size = tl.sqrt(squares.to(tl.float64) / scale) * _power(exponent - 126) * factor
    size = tl.where(squares == 0, 1.0, size)
    return tl.where(exponent == 255, float("nan"), size)


@triton.jit
def _row_size_kernel(
    table_ptr,
    rows_ptr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    GOLDEN: tl.constexpr,
    BAND: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr, N)
    tile = (tl.program_id(0) - tl.load(entry)).to(INDEX)
    x_ptr, R, C, stride_r, stride_c = _gradient(entry, DTYPE, INDEX, N)
    offs_r = tile * TILE_R + tl.arange(0, TILE_R)
    in_r = offs_r < R
    peaks = tl.zeros((TILE_R, TILE_C), tl.float32)
    for start in range(0, C, TILE_C):
        offs_c = start + tl.arange(0, TILE_C)
        x = _tile(x_ptr, offs_r, offs_c, R, C, stride_r, stride_c)
        peaks = tl.maximum(peaks, _magnitude(x))
    peak = _peak_of_band(tl.max(peaks, axis=1), BAND, TILE_R)
    exponent = peak.to(tl.int32, bitcast=True) >> 23  # [TILE_R]
    below = _power(126 - exponent)
    scale = tl.load(entry + 15 * N).to(tl.float64, bitcast=True)
    squares = tl.zeros((TILE_R, TILE_C), tl.int32)
    for start in range(0, C, TILE_C):
        offs_c = start + tl.arange(0, TILE_C)
        x = _tile(x_ptr, offs_r, offs_c, R, C, stride_r, stride_c)
        squares += _square(x, below[:, None], scale, offs_c[None, :], GOLDEN)
    factor = _factor(entry + 11 * N, offs_r, R, BAND, N)
    total = _sum_of_band(tl.sum(squares, axis=1), BAND, TILE_R)
    size = _root(total, exponent, scale, factor)
    tl.store(rows_ptr + tl.load(entry + 8 * N) + offs_r, size, mask=in_r)


@triton.jit
def _col_size_kernel(
    table_ptr,
    rows_ptr,
    cols_ptr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    GOLDEN: tl.constexpr,
    BAND: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr + N, N)
    tile = (tl.program_id(0) - tl.load(entry + N)).to(INDEX)
    x_ptr, R, C, stride_r, stride_c = _gradient(entry, DTYPE, INDEX, N)
    rows_ptr += tl.load(entry + 8 * N)
    offs_c = tile * TILE_C + tl.arange(0, TILE_C)
    in_c = offs_c < C
    peaks = tl.zeros((TILE_R, TILE_C), tl.float32)
    for start in range(0, R, TILE_R):
        offs_r = start + tl.arange(0, TILE_R)
        in_r = offs_r < R
        x = _tile(x_ptr, offs_r, offs_c, R, C, stride_r, stride_c)
        row = tl.load(rows_ptr + offs_r, mask=in_r, other=1)  # [TILE_R]
        peaks = tl.maximum(peaks, _magnitude(_divide(x, row[:, None], DTYPE)))
    peak = _peak_of_band(tl.max(peaks, axis=0), BAND, TILE_C)
    exponent = peak.to(tl.int32, bitcast=True) >> 23  # [TILE_C]
    below = _power(126 - exponent)
    scale = tl.load(entry + 16 * N).to(tl.float64, bitcast=True)
    squares = tl.zeros((TILE_R, TILE_C), tl.int32)
    for start in range(0, R, TILE_R):
        offs_r = start + tl.arange(0, TILE_R)
        in_r = offs_r < R
        x = _tile(x_ptr, offs_r, offs_c, R, C, stride_r, stride_c)
        row = tl.load(rows_ptr + offs_r, mask=in_r, other=1)  # [TILE_R]
        y = _divide(x, row[:, None], DTYPE)
        squares += _square(y, below[None, :], scale, offs_r[:, None], GOLDEN)
    factor = _factor(entry + 12 * N, offs_c, C, BAND, N)
    total = _sum_of_band(tl.sum(squares, axis=0), BAND, TILE_C)
    size = _root(total, exponent, scale, factor)
    tl.store(cols_ptr + tl.load(entry + 9 * N) + offs_c, size, mask=in_c)


@triton.jit
def _line_score_kernel(
    table_ptr,
    rows_ptr,
    cols_ptr,
    score_ptr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Score the blocks of one tile: several small ones, or a row of tall ones."""
    SPAN: tl.constexpr = max(ROWS, TILE_R)
    DOWN: tl.constexpr = SPAN // ROWS
    ACROSS: tl.constexpr = TILE_C // COLS
    entry = table_ptr + find_tensor(table_ptr + 2 * N, N)
    tile = (tl.program_id(0) - tl.load(entry + 2 * N)).to(INDEX)
    x_ptr, R, C, stride_r, stride_c = _gradient(entry, DTYPE, INDEX, N)
    rows_ptr += tl.load(entry + 8 * N)
    pid_r, pid_c = tile // tl.cdiv(C, TILE_C), tile % tl.cdiv(C, TILE_C)
    offs_c = pid_c * TILE_C + tl.arange(0, TILE_C)
    in_c = offs_c < C
    col = tl.load(cols_ptr + tl.load(entry + 9 * N) + offs_c, mask=in_c, other=1)  # [TILE_C]
    total = tl.zeros((TILE_R, TILE_C), tl.float32)
    for start in range(0, SPAN, TILE_R):
        offs_r = pid_r * SPAN + start + tl.arange(0, TILE_R)
        in_r = offs_r < R
        x = _tile(x_ptr, offs_r, offs_c, R, C, stride_r, stride_c)
        row = tl.load(rows_ptr + offs_r, mask=in_r, other=1)  # [TILE_R]
        y = _divide(_divide(x, row[:, None], DTYPE), col[None, :], DTYPE)
        total += tl.abs(y.to(tl.float32))
    offs_down = pid_r * DOWN + tl.arange(0, DOWN)
    offs_across = pid_c * ACROSS + tl.arange(0, ACROSS)
    mean = total
    if ROWS * COLS > 1:
        columns = tl.sum(tl.reshape(total, (DOWN, TILE_R // DOWN, ACROSS, COLS)), axis=1)
        tall = tl.minimum(R - offs_down * ROWS, ROWS)
        wide = tl.minimum(C - offs_across * COLS, COLS)
        # a block past the edge has none
        elements = tl.maximum(tall[:, None] * wide[None, :], 1)
        mean = tl.div_rn(tl.sum(columns, axis=2), elements.to(tl.float32))
    score_ptr += tl.load(entry + 10 * N)
    tl.store(
        score_ptr + offs_down[:, None] * tl.cdiv(C, COLS) + offs_across[None, :],
        mean,
        mask=(offs_down * ROWS < R)[:, None] & (offs_across * COLS < C)[None, :],
    )  # [DOWN, ACROSS]


def sizing_tiles(band: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tiles of programs that add up rows, and columns: of whole bands."""
    tall, wide, elements = max(8, band), max(64, band), 2048
    rows = {"TILE_R": tall, "TILE_C": max(elements // tall, 1)}
    return rows, {"TILE_R": max(elements // wide, 1), "TILE_C": wide}


def _launch(gradients: Sequence[Tensor], rows: int, cols: int, band: int) -> list[Tensor]:
    first, own = gradients[0], Matrices.of(gradients)
    down, across = ceil_div(own.rows, rows), ceil_div(own.cols, cols)
    starts = first_of(down * across)
    scores = first.new_empty(int((down * across).sum()), dtype=torch.float32)
    by_row, by_col = (
        first.new_empty(int(sides.sum()), dtype=torch.float64) for sides in (own.rows, own.cols)
    )
    by_lines = [(own.rows.tolist(), own.cols.tolist()), (own.cols.tolist(), own.rows.tolist())]
    factors = [[*map(_factors, *both, [band] * len(gradients))] for both in by_lines]
    scales = [[2.0 ** _bits(n * band) for n in lengths] for _, lengths in by_lines]
    ends = [[pair[i] for pair in pairs] for i in (0, 1) for pairs in factors]
    rows_tile, cols_tile = sizing_tiles(band)
    tiles = ceil_div(own.rows, max(rows, TILE["TILE_R"])) * ceil_div(own.cols, TILE["TILE_C"])
    counts = (
        ceil_div(own.rows, rows_tile["TILE_R"]),
        ceil_div(own.cols, cols_tile["TILE_C"]),
        tiles,
    )
    columns = (
        *(*own, first_of(own.rows), first_of(own.cols), starts),
        *(np.array(numbers).view(np.int64) for numbers in (*ends, *scales)),
    )
    with on_device(first):
        for dtype, at in alike(gradient.dtype for gradient in gradients).items():
            here = [np.where(tiles > 0, count, 0)[at] for count in counts]
            if not here[2].any():
                continue
            rest = [column[at] for column in columns]
            table, programs = device_table(
                first.device, (here[0], first_of(here[1]), first_of(here[2]), *rest)
            )
            meta = {
                "DTYPE": getattr(tl, str(dtype).removeprefix("torch.")),
                "INDEX": list_index_type(own),
                "N": table.shape[1],
            }
            _row_size_kernel[(programs,)](
                table,
                by_row,
                GOLDEN=GOLDEN,
                **meta,
                BAND=band,
                **rows_tile,
                **FUSED,
            )
            _col_size_kernel[(int(here[1].sum()),)](
                table,
                by_row,
                by_col,
                GOLDEN=GOLDEN,
                **meta,
                BAND=band,
                **cols_tile,
                **FUSED,
            )
            _line_score_kernel[(int(here[2].sum()),)](
                table,
                by_row,
                by_col,
                scores,
                ROWS=rows,
                COLS=cols,
                **meta,
                **TILE,
                num_warps=8,
                **FUSED,
            )
    grids = zip(down.tolist(), across.tolist(), starts.tolist(), strict=True)
    return [scores.as_strided((i, j), (j, 1), start) for i, j, start in grids]


@torch.no_grad()
def line_scores(
    gradients: Sequence[Tensor], pattern: Pattern, *, band: int = 1, backend: Backend = "auto"
) -> list[Tensor]:
    """Score every group by the mean size of its elements against their rows and columns.

    Args:
        gradients: one or more, float, shape ``(R, C)``, any strides, on one device. The Triton
            kernels take 16- and 32-bit floats; others go through plain torch.
        pattern: ``Block``, or ``Unstructured``.
        band: how many neighbouring rows, and columns, have one size in common; a power of two.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Scores, one matrix a gradient, one element a group; float32, but in plain torch of the
        gradient's dtype for ``Unstructured``. What holds a NaN or an Inf has scores that are not
        finite. Nothing waits for the device.

    Raises:
        ValueError: ``band`` is no power of two.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    if band < 1 or band & (band - 1):
        raise ValueError(f"line_scores: band must be a power of two, got {band!r}")
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    if use_triton("line_scores", backend, gradients[0]) and not wide:
        return _launch(gradients, pattern.rows, pattern.cols, band)
    # one by one: no more than one gradient's copy is there at a time
    return [line_scores_reference(gradient, pattern, backend, band) for gradient in gradients]
