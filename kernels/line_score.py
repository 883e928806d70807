"""Scores of gradients against their lines: each row, then each column, to a mean square of 1.

Where |g| is compared as it is, a few lines of a large |g| win all. So g is divided by the root
mean square of its row, and what that gives by that of its column, each rounded to g's type. A list
is three launches on a GPU for each dtype: rows, columns, scores; no copy of a gradient is made.

Floor: three reads of the gradients.

Reading order: reference -> kernels -> launcher -> public function.
"""

from __future__ import annotations

from collections.abc import Sequence

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

# of a program that adds up rows, or columns
ROWS_TILE = {"TILE_R": 8, "TILE_C": 256}
COLS_TILE = {"TILE_R": 32, "TILE_C": 64}


def norm_(gradient: Tensor) -> None:
    """Divide a matrix by the root mean square of each row, then of each column, in place."""
    norm_all_([gradient], [gradient.shape[0]])


def norm_all_(
    gradients: Sequence[Tensor],
    rows: Sequence[int],
    counted: Sequence[bool] | None = None,
    most: Reduce | None = None,
    add: Reduce | None = None,
) -> None:
    """``norm_`` matrices, of which other ranks may have further rows: 16 bytes a column.

    Args:
        gradients: of whole rows.
        rows: how many each has on all ranks.
        counted: whether these rows are of the first copy.
        most, add: the greatest, and the sum, of float64 or int64 vectors of all ranks; None: all
            rows are here.
    """
    for gradient in gradients:
        for lines in _some(gradient, 1):
            norm = torch.linalg.vector_norm(lines, dim=1, keepdim=True, dtype=torch.float64)
            _divide_by(lines, norm * gradient.shape[1] ** -0.5)
    own = [g if counted is None or counted[i] else g[:0] for i, g in enumerate(gradients)]
    widths = [gradient.shape[1] for gradient in own]
    peaks = torch.cat([*map(_column_peaks, own)])
    peaks = peaks.where(peaks.isfinite(), torch.inf)
    peaks = peaks if most is None else most(peaks)
    each = zip(own, peaks.split(widths), rows, strict=True)
    squares = torch.cat([_column_squares(*one) for one in each])
    squares = squares if add is None else add(squares)
    for gradient, total, peak, n in zip(
        gradients, squares.split(widths), peaks.split(widths), rows, strict=True
    ):
        norm = (total.double() * 2.0 ** -_bits(n)).sqrt() * _power_above(peak) * n**-0.5
        norm = norm.where(peak.isfinite(), torch.nan)
        pairs = zip(_some(gradient, 0), norm.split(_lines(gradient, 0)), strict=True)
        for lines, sizes in pairs:
            _divide_by(lines, sizes)


def _some(matrix: Tensor, dim: int) -> Sequence[Tensor]:
    """Part a matrix into some whole lines along ``dim`` at a time: what is divided by a double
    becomes one on the way.
    """
    return matrix.split(_lines(matrix, dim), 1 - dim)


def _lines(matrix: Tensor, dim: int) -> int:
    return max(1, chunk_of(matrix.device) // max(1, matrix.shape[dim]))


def _divide_by(lines: Tensor, norm: Tensor) -> None:
    lines.div_(norm.masked_fill(norm == 0, 1))


def _bits(rows: int) -> int:
    """Return how many bits a square may have, so that an int64 holds the sum of so many."""
    return 62 - rows.bit_length()


def _power_above(peaks: Tensor) -> Tensor:
    """Return the power of two above each of some numbers, 1 for 0 and what is not finite."""
    exponents = torch.frexp(peaks.where(peaks.isfinite(), 0)).exponent
    return torch.ldexp(torch.ones_like(peaks), exponents)


def _column_peaks(matrix: Tensor) -> Tensor:
    """Return float64, the greatest magnitude of each column; NaN where there is one."""
    parts = [torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)]
    parts += [lines.abs().amax(0).double() for lines in _some(matrix, 1) if len(lines)]
    return torch.stack(parts).amax(0)


def _column_squares(matrix: Tensor, peaks: Tensor, rows: int) -> Tensor:
    """Return int64, the sum of squares of each column, as multiples of a power of two that its
    peak says: the same in whatever order, and whoever adds which.
    """
    total = torch.zeros(matrix.shape[1], dtype=torch.int64, device=matrix.device)
    below = 1 / _power_above(peaks)
    for lines in _some(matrix, 1):
        squares = (lines.double() * below).nan_to_num_(0, 0, 0).square_()
        total += (squares * 2.0 ** _bits(rows)).round_().long().sum(0)
    return total


def line_scores_reference(gradient: Tensor, pattern: Pattern, backend: Backend) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype."""
    gradient = gradient.clone()
    norm_(gradient)
    (scores,), _ = block_scores([gradient], pattern, normed=False, backend=backend)
    return scores


# A table's columns: first program of the rows, of the columns and of the scores, the gradient's
# address, rows, columns, its strides, the first row, column and score, and the factors of both
# norms, as the bits of a float64.


@triton.jit
def _gradient(entry, DTYPE: tl.constexpr, INDEX: tl.constexpr, N: tl.constexpr):
    """Read where a gradient lies, its rows and columns, and its strides."""
    x_ptr = tl.load(entry + 3 * N).to(tl.pointer_type(DTYPE))
    R, C = tl.load(entry + 4 * N).to(INDEX), tl.load(entry + 5 * N).to(INDEX)
    stride_r, stride_c = tl.load(entry + 6 * N).to(INDEX), tl.load(entry + 7 * N).to(INDEX)
    return x_ptr, R, C, stride_r, stride_c


@triton.jit
def _divide(x, size, DTYPE: tl.constexpr):
    # a double becomes half or bfloat16 by way of a float, as in torch
    return (x.to(tl.float64) / size).to(tl.float32).to(DTYPE)


@triton.jit
def _root(squares, factor_bits):
    size = tl.sqrt(squares) * factor_bits.to(tl.float64, bitcast=True)
    return tl.where(size == 0, 1.0, size)


@triton.jit
def _row_size_kernel(
    table_ptr,
    rows_ptr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr, N)
    tile = (tl.program_id(0) - tl.load(entry)).to(INDEX)
    x_ptr, R, C, stride_r, stride_c = _gradient(entry, DTYPE, INDEX, N)
    offs_r = tile * TILE_R + tl.arange(0, TILE_R)
    in_r = offs_r < R
    squares = tl.zeros((TILE_R, TILE_C), tl.float64)
    for start in range(0, C, TILE_C):
        offs_c = start + tl.arange(0, TILE_C)
        x = tl.load(
            x_ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c,
            mask=in_r[:, None] & (offs_c < C)[None, :],
            other=0,
        ).to(tl.float64)  # [TILE_R, TILE_C]
        squares += x * x
    size = _root(tl.sum(squares, axis=1), tl.load(entry + 11 * N))
    tl.store(rows_ptr + tl.load(entry + 8 * N) + offs_r, size, mask=in_r)


@triton.jit
def _col_size_kernel(
    table_ptr,
    rows_ptr,
    cols_ptr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr + N, N)
    tile = (tl.program_id(0) - tl.load(entry + N)).to(INDEX)
    x_ptr, R, C, stride_r, stride_c = _gradient(entry, DTYPE, INDEX, N)
    rows_ptr += tl.load(entry + 8 * N)
    offs_c = tile * TILE_C + tl.arange(0, TILE_C)
    in_c = offs_c < C
    squares = tl.zeros((TILE_R, TILE_C), tl.float64)
    for start in range(0, R, TILE_R):
        offs_r = start + tl.arange(0, TILE_R)
        in_r = offs_r < R
        x = tl.load(
            x_ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c,
            mask=in_r[:, None] & in_c[None, :],
            other=0,
        )  # [TILE_R, TILE_C]
        row = tl.load(rows_ptr + offs_r, mask=in_r, other=1)  # [TILE_R]
        y = _divide(x, row[:, None], DTYPE).to(tl.float64)
        squares += y * y
    size = _root(tl.sum(squares, axis=0), tl.load(entry + 12 * N))
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
        x = tl.load(
            x_ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c,
            mask=in_r[:, None] & in_c[None, :],
            other=0,
        )  # [TILE_R, TILE_C]
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


def _launch(gradients: Sequence[Tensor], rows: int, cols: int) -> list[Tensor]:
    first, own = gradients[0], Matrices.of(gradients)
    down, across = ceil_div(own.rows, rows), ceil_div(own.cols, cols)
    starts = first_of(down * across)
    scores = first.new_empty(int((down * across).sum()), dtype=torch.float32)
    by_row, by_col = (
        first.new_empty(int(sides.sum()), dtype=torch.float64) for sides in (own.rows, own.cols)
    )
    # an empty matrix has no programs
    factors = (np.maximum(sides, 1).astype(np.float64) ** -0.5 for sides in (own.cols, own.rows))
    tiles = ceil_div(own.rows, max(rows, TILE["TILE_R"])) * ceil_div(own.cols, TILE["TILE_C"])
    counts = (
        ceil_div(own.rows, ROWS_TILE["TILE_R"]),
        ceil_div(own.cols, COLS_TILE["TILE_C"]),
        tiles,
    )
    columns = (
        *(*own, first_of(own.rows), first_of(own.cols), starts),
        *(factor.view(np.int64) for factor in factors),
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
                **meta,
                **ROWS_TILE,
                **FUSED,
            )
            _col_size_kernel[(int(here[1].sum()),)](
                table,
                by_row,
                by_col,
                **meta,
                **COLS_TILE,
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
    gradients: Sequence[Tensor], pattern: Pattern, *, backend: Backend = "auto"
) -> list[Tensor]:
    """Score every group by the mean size of its elements against their rows and columns.

    Args:
        gradients: one or more, float, shape ``(R, C)``, any strides, on one device. The Triton
            kernels take 16- and 32-bit floats; others go through plain torch.
        pattern: ``Block``, or ``Unstructured``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Scores, one matrix a gradient, one element a group; float32, but in plain torch of the
        gradient's dtype for ``Unstructured``. What holds a NaN or an Inf has scores that are not
        finite. Nothing waits for the device.

    Raises:
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    if use_triton("line_scores", backend, gradients[0]) and not wide:
        return _launch(gradients, pattern.rows, pattern.cols)
    # one by one: no more than one gradient's copy is there at a time
    return [line_scores_reference(gradient, pattern, backend) for gradient in gradients]
