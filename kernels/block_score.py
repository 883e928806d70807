"""Block scores: the mean magnitude of every block of a weight, in one read of it.

A list of weights is one launch for each dtype and direction in memory. The norms of the weights
come from the same read: each program leaves the sum of its tile's squares, and a second launch
adds them up in one order, so that two runs agree to the bit.

Reading order: reference -> plain torch in chunks -> kernels -> launcher -> operators -> public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .grid import block_counts, ceil_div, expand_blocks, pad_to_blocks, side_lengths
from .launch import FUSED, Backend, on_device, takes_kernels, tl, triton, use_triton
from .pattern import MAX_BLOCK_SIDE, Pattern, Unstructured
from .search import Reduce
from .table import Matrices, alike, device_table, find_tensor, first_of, list_index_type, swap

# no block is wider than the tile; four or eight 16-byte loads of a thread are in flight at once
TILE = {"TILE_R": 16, "TILE_C": MAX_BLOCK_SIDE}
# how many sums of squares are added at a time; between which bounds float32 holds their total
# well, and by what weights are multiplied whose squares it does not
NORM = {"BLOCK": 1024, "LEAST": 2.0**-60, "MOST": 2.0**120, "UP": 2.0**88, "DOWN": 2.0**-72}
# elements: a chunk and its magnitudes stay in the cache between the passes over them
CPU_CHUNK = 2**19
PIECES = 16  # of a line
_ROW_BITS = 38  # of the greatest number: 2^24 such may be added


def block_score_reference(weight: Tensor, pattern: Pattern, *, squared: bool) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype, differentiable."""
    rows, cols = pattern.rows, pattern.cols
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    size = exact.square() if squared else exact.abs()
    sums = pad_to_blocks(size, rows, cols).sum((1, 3))
    tall, wide = side_lengths(weight.shape, rows, cols, device=weight.device)
    return (sums / tall / wide).to(torch.float32)


def inverse_norms_reference(weights: Sequence[Tensor]) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype."""
    return inverse_norms([row_norms(weight) for weight in weights])


def pieces_of(length: int) -> int:
    """Return into how many equal pieces a line of a matrix is parted, each of which is added up by
    itself, so that ranks that have some of them get the bits of one that has them all.
    """
    return PIECES if length % PIECES == 0 else 1


def row_norms(matrix: Tensor, pieces: int | None = None) -> Tensor:
    """Return the 2-norm of each piece of each row, float64, as ``(rows * pieces,)``: the same bits
    whatever lies beside. Of a matrix that lies turned in memory columns take the place of rows.

    Squares are added up in float32, and of the pieces where it does not hold them in float64.

    Args:
        matrix: float, ``(R, C)``.
        pieces: of a row, all as long; None: ``pieces_of`` it.
    """
    matrix = matrix.T if matrix.stride(0) < matrix.stride(1) else matrix
    matrix = _in_pieces(matrix, pieces)
    norms = _row_norms(matrix, torch.promote_types(matrix.dtype, torch.float32)).double()
    far = ~((norms > NORM["LEAST"] ** 0.5) & (norms < NORM["MOST"] ** 0.5))
    if far.any():
        rows = matrix[far]
        parts = rows.split(max(1, CPU_CHUNK // max(1, rows.shape[1])))
        norms[far] = torch.cat([_row_norms(part, torch.float64) for part in parts])
    return norms


def row_sums(matrix: Tensor, pieces: int | None = None) -> Tensor:
    """Return the sum of magnitudes of each piece of each row, float64, as ``(rows * pieces,)``;
    ``pieces`` as ``row_norms``'.
    """
    return _row_norms(_in_pieces(matrix, pieces), torch.float64, 1)


def _in_pieces(matrix: Tensor, pieces: int | None) -> Tensor:
    pieces = pieces_of(matrix.shape[1]) if pieces is None else pieces
    if pieces == 1:
        return matrix
    return matrix.reshape(len(matrix) * pieces, matrix.shape[1] // max(pieces, 1))


def _row_norms(matrix: Tensor, dtype: torch.dtype, order: int = 2) -> Tensor:
    if len(matrix) == 1:  # a single sum would be parted among threads
        return torch.linalg.vector_norm(matrix.expand(2, -1), order, dim=1, dtype=dtype)[:1]
    return torch.linalg.vector_norm(matrix, order, dim=1, dtype=dtype)


def inverse_norms(
    rows: Sequence[Tensor], most: Reduce | None = None, add: Reduce | None = None
) -> Tensor:
    """Return ``1 / ||w||_2`` of each weight from the norms of its rows; 1 for a weight of zeros,
    Inf where float32 ends.

    Args:
        rows: of each weight what ``row_norms`` returns, or of some of its rows.
        most, add: as ``exact_sums``'s.

    Returns:
        float32 ``(len(rows),)``.
    """
    norms = exact_sums([row.square() for row in rows], most, add).sqrt()
    # scores that are not finite are refused
    return norms.where(norms > 0, 1).reciprocal().float()


def exact_sums(
    vectors: Sequence[Tensor],
    most: Reduce | None = None,
    add: Reduce | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Return the sum of each vector: the same bits in whatever order, and whoever adds which.

    Numbers are added up as integers, multiples of one power of two a vector.

    Args:
        vectors: float64, not negative.
        most, add: the greatest, and the sum, of float64 or int64 vectors of several ranks, which
            have the other numbers; None: all are here.
        counts: how many numbers at most each has on all ranks; None: 2^24.

    Returns:
        float64 ``(len(vectors),)``; NaN where a number is NaN or Inf.
    """
    peaks = torch.stack([v.max() if len(v) else v.new_zeros(()) for v in vectors])
    peaks = peaks.where(peaks.isfinite(), torch.inf)
    peaks = peaks if most is None else most(peaks)
    bits = _ROW_BITS if counts is None else peaks.new_tensor([62 - n.bit_length() for n in counts])
    shifts = bits - torch.frexp(peaks.where(peaks.isfinite(), 0)).exponent
    scaled = [v * unit for v, unit in zip(vectors, _power(shifts), strict=True)]
    totals = torch.stack([v.nan_to_num(0, 0, 0).round().long().sum() for v in scaled])
    totals = totals if add is None else add(totals)
    return (totals.double() * _power(-shifts)).where(peaks.isfinite(), torch.nan)


def _power(exponents: Tensor) -> Tensor:
    """Return 2^n in float64, exact, which ``torch.pow`` need not be."""
    return ((exponents.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def _in_chunks(
    weight: Tensor, rows: int, cols: int, squared: bool, norms: list[Tensor] | None = None
) -> Tensor:
    """Compute the reference with no temporary but a chunk of whole block rows.

    ``norms`` gets those of every chunk's rows, which are in the cache then.
    """
    if weight.stride(0) < weight.stride(1):
        return _in_chunks(weight.T, cols, rows, squared, norms).T.contiguous()
    R, C = weight.shape
    down, across = block_counts(weight.shape, rows, cols)
    scores = weight.new_empty(
        (down, across), dtype=torch.promote_types(weight.dtype, torch.float32)
    )
    step = max(1, min(down, CPU_CHUNK // max(1, rows * C))) * rows
    # the padding stays zero, so that edge blocks are summed like the others
    sizes = scores.new_zeros((step, across * cols))
    for start in range(0, R, step):
        chunk = weight[start : start + step]
        height, first = chunk.shape[0], start // rows
        size = sizes[:height, :C]
        exact = chunk if chunk.dtype == size.dtype else size.copy_(chunk)
        if norms is not None:
            norms.append(row_norms(exact))
        (torch.square if squared else torch.abs)(exact, out=size)
        sizes[height:].zero_()
        blocks = ceil_div(height, rows)
        columns = sizes[: blocks * rows]
        if rows > 1:
            columns = columns.view(blocks, rows, across * cols).sum(1)
        torch.sum(columns.view(blocks, across, cols), 2, out=scores[first : first + blocks])
    tall, wide = side_lengths(weight.shape, rows, cols, device=weight.device)
    return scores.div_(tall).div_(wide).to(torch.float32)


@triton.jit
def _score_tile(
    w_ptr,
    score_ptr,
    tile,
    R,
    C,
    stride_wr,
    stride_wc,
    stride_sr,
    stride_sc,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SQUARED: tl.constexpr,
    SCORED: tl.constexpr,
    NORMED: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Score the blocks of one tile; return the sum of its squares."""
    # a program covers several small blocks, or walks down one row of tall ones
    SPAN: tl.constexpr = max(ROWS, TILE_R)
    DOWN: tl.constexpr = SPAN // ROWS
    ACROSS: tl.constexpr = TILE_C // COLS
    tiles_c = tl.cdiv(C, TILE_C)
    pid_r, pid_c = tile // tiles_c, tile % tiles_c
    offs_c = (pid_c * TILE_C + tl.arange(0, TILE_C)).to(INDEX)
    in_c = offs_c < C

    total = tl.zeros((TILE_R, TILE_C), tl.float32)
    squares = tl.zeros((TILE_R, TILE_C), tl.float32)
    for start in range(0, SPAN, TILE_R):
        offs_r = (pid_r * SPAN + start + tl.arange(0, TILE_R)).to(INDEX)
        w = tl.load(
            w_ptr + offs_r[:, None] * stride_wr + offs_c[None, :] * stride_wc,
            mask=(offs_r < R)[:, None] & in_c[None, :],
            other=0.0,
        ).to(tl.float32)  # [TILE_R, TILE_C]
        total += w * w if SQUARED else tl.abs(w)
        if NORMED:
            squares += w * w

    if SCORED:
        offs_down = (pid_r * DOWN + tl.arange(0, DOWN)).to(INDEX)
        offs_across = (pid_c * ACROSS + tl.arange(0, ACROSS)).to(INDEX)
        if ROWS * COLS == 1:
            mean = total
        else:
            # rows first: a thread holds whole columns of the tile, so only partial sums change
            # hands
            columns = tl.sum(tl.reshape(total, (DOWN, TILE_R // DOWN, ACROSS, COLS)), axis=1)
            tall = tl.minimum(R - offs_down * ROWS, ROWS)
            wide = tl.minimum(C - offs_across * COLS, COLS)
            # a block past the edge has none
            elements = tl.maximum(tall[:, None] * wide[None, :], 1)
            mean = tl.div_rn(tl.sum(columns, axis=2), elements.to(tl.float32))
        tl.store(
            score_ptr + offs_down[:, None] * stride_sr + offs_across[None, :] * stride_sc,
            mean,
            mask=(offs_down * ROWS < R)[:, None] & (offs_across * COLS < C)[None, :],
        )  # [DOWN, ACROSS]
    return tl.sum(squares)


# A table's columns: first program, programs, the weight's address, rows, columns, its strides, the
# first score, the scores' strides, whether its rows are whole runs of 16 bytes, the place in the
# list.


@triton.jit
def _block_score_kernel(
    table_ptr,
    score_ptr,
    square_ptr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SQUARED: tl.constexpr,
    SCORED: tl.constexpr,
    NORMED: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    UNIT: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    entry = table_ptr + find_tensor(table_ptr, N)
    tile = (tl.program_id(0) - tl.load(entry)).to(tl.int32)
    w_ptr = tl.load(entry + 2 * N).to(tl.pointer_type(DTYPE))
    R = tl.load(entry + 3 * N).to(INDEX)
    C = tl.load(entry + 4 * N).to(INDEX)
    stride_wr = tl.load(entry + 5 * N).to(INDEX)
    stride_wc = tl.load(entry + 6 * N).to(INDEX)
    # the scores' places are multiples of 16
    score_ptr += tl.multiple_of(tl.load(entry + 7 * N), 16)
    stride_sr = tl.load(entry + 8 * N).to(INDEX)
    stride_sc = tl.load(entry + 9 * N).to(INDEX)
    if tl.load(entry + 10 * N) != 0:
        # of a number from memory the compiler knows nothing: without these it loads one by one
        squares = _score_tile(
            tl.multiple_of(w_ptr, 16), score_ptr, tile, R, tl.multiple_of(C, UNIT),
            tl.multiple_of(stride_wr, UNIT), 1, stride_sr, stride_sc,
            ROWS, COLS, SQUARED, SCORED, NORMED, INDEX, TILE_R, TILE_C,
        )  # fmt: skip
    else:
        squares = _score_tile(
            w_ptr, score_ptr, tile, R, C, stride_wr, stride_wc, stride_sr, stride_sc,
            ROWS, COLS, SQUARED, SCORED, NORMED, INDEX, TILE_R, TILE_C,
        )  # fmt: skip
    if NORMED:
        tl.store(square_ptr + tl.program_id(0), squares)


@triton.jit
def _norm_kernel(
    table_ptr,
    square_ptr,
    out_ptr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
):
    """Add up the squares of one weight, in an order that its shape alone decides."""
    entry = table_ptr + tl.program_id(0)
    square_ptr += tl.load(entry)
    programs = tl.load(entry + N)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(square_ptr + offs, mask=offs < programs, other=0.0)  # [BLOCK]
    total = tl.sum(total)
    unit = tl.full((), 1.0, tl.float32)
    if (total < LEAST) | (total > MOST):
        # so rare that one program may read the weight again, multiplied by what lets squares be
        unit = tl.where(total < LEAST, unit * UP, unit * DOWN)
        w_ptr = tl.load(entry + 2 * N).to(tl.pointer_type(DTYPE))
        R, C = tl.load(entry + 3 * N).to(INDEX), tl.load(entry + 4 * N).to(INDEX)
        stride_wr, stride_wc = tl.load(entry + 5 * N).to(INDEX), tl.load(entry + 6 * N).to(INDEX)
        lines = tl.zeros((BLOCK,), tl.float32)
        for row in range(R):
            line = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, C, BLOCK):
                offs_c = first + tl.arange(0, BLOCK)
                w = tl.load(
                    w_ptr + row * stride_wr + offs_c * stride_wc, mask=offs_c < C, other=0.0
                ).to(tl.float32)  # [BLOCK]
                line += (w * unit) * (w * unit)
            lines += line
        total = tl.sum(lines)
    norm = tl.sqrt_rn(total)
    # a weight of zeros has importance 0, whatever it is divided by
    tl.store(out_ptr + tl.load(entry + 11 * N), tl.div_rn(unit, tl.where(norm > 0, norm, unit)))


def _launch(
    weights: Sequence[Tensor], rows: int, cols: int, squared: bool, scored: bool, normed: bool
) -> tuple[list[Tensor], Tensor]:
    """Return the scores, parts of one tensor, and the inverse norms."""
    first, own = weights[0], Matrices.of(weights)
    down, across = ceil_div(own.rows, rows), ceil_div(own.cols, cols)
    sizes = down * across if scored else np.zeros_like(down)
    starts = first_of(ceil_div(sizes, 16) * 16)
    scores = first.new_empty(int((starts + sizes).max()), dtype=torch.float32)
    inverse = first.new_empty(len(weights) if normed else 0, dtype=torch.float32)
    # along their memory; blocks that are no squares are others then
    turned = own.turned
    R, C = swap(turned, own.rows, own.cols)
    stride_r, stride_c = swap(turned, own.row_stride, own.col_stride)
    stride_sr, stride_sc = swap(turned, across, 1)
    tall, wide = swap(turned, rows, cols)
    programs = ceil_div(R, np.maximum(tall, TILE["TILE_R"])) * ceil_div(C, TILE["TILE_C"])
    index = list_index_type(own)
    kinds = zip((w.dtype for w in weights), tall.tolist(), wide.tolist(), strict=True)
    with on_device(first):
        for (dtype, ROWS, COLS), at in alike(kinds).items():
            unit = 16 // dtype.itemsize
            runs = (stride_c == 1) & ((stride_r % unit | C % unit | own.address % 16) == 0)
            columns = (
                *(programs, programs, own.address, R, C, stride_r, stride_c),
                *(starts, stride_sr, stride_sc, runs, np.arange(len(weights))),
            )
            table, total = device_table(first.device, [column[at] for column in columns])
            squares = first.new_empty(max(total, 1) if normed else 1, dtype=torch.float32)
            if total:
                _block_score_kernel[(total,)](
                    table,
                    scores if scored else squares,
                    squares,
                    DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
                    ROWS=ROWS,
                    COLS=COLS,
                    SQUARED=squared,
                    SCORED=scored,
                    NORMED=normed,
                    INDEX=index,
                    N=table.shape[1],
                    **TILE,
                    **FUSED,
                )
            if normed:
                _norm_kernel[(len(at),)](
                    table,
                    squares,
                    inverse,
                    DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
                    INDEX=index,
                    N=table.shape[1],
                    **NORM,
                    **FUSED,
                )
    grids = zip(down.tolist(), across.tolist(), starts.tolist(), strict=True)
    found = [scores.as_strided((i, j), (j, 1), start) for i, j, start in grids] if scored else []
    return found, inverse


def _launch_one(weight: Tensor, rows: int, cols: int, squared: bool) -> Tensor:
    (scores,), _ = _launch([weight], rows, cols, squared, scored=True, normed=False)
    return scores


def _score(weight: Tensor, rows: int, cols: int, squared: bool) -> Tensor:
    one = _launch_one if takes_kernels(weight.device) else _in_chunks
    return one(weight, rows, cols, squared)


_op = torch.library.custom_op("triton_sparsity::block_score", _score, mutates_args=())


@_op.register_fake
def _(weight: Tensor, rows: int, cols: int, squared: bool) -> Tensor:
    return weight.new_empty(block_counts(weight.shape, rows, cols), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.rows, ctx.cols, ctx.squared = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (weight,) = ctx.saved_tensors
    tall, wide = side_lengths(weight.shape, ctx.rows, ctx.cols, device=weight.device)
    share = expand_blocks(grad / tall / wide, ctx.rows, ctx.cols, weight.shape)
    slope = share * weight * 2 if ctx.squared else share * weight.sign()
    return slope.to(weight.dtype), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _runs_triton(operation: str, weights: Sequence[Tensor], backend: Backend) -> bool:
    device = weights[0].device
    for weight in weights:
        if not weight.is_floating_point():
            raise TypeError(f"{operation}: weight must be of a float dtype, got {weight.dtype}")
        if weight.ndim != 2:
            shape = tuple(weight.shape)
            raise ValueError(f"{operation}: weight must be a matrix, got shape {shape}")
        if weight.device != device:
            raise ValueError(
                f"{operation}: weight must be on the others' {device}, got {weight.device}"
            )
    on_triton = use_triton(operation, backend, weights[0])
    if on_triton and any(weight.dtype == torch.float64 for weight in weights):
        if backend == "triton":
            raise ValueError(f"{operation}: weight must not be float64 with backend='triton'")
        return False
    return on_triton


def block_score(
    weight: Tensor,
    pattern: Pattern,
    *,
    norm: Literal["l1", "l2"] = "l1",
    backend: Backend = "auto",
) -> Tensor:
    """Score every block of ``weight`` by the mean size of its elements.

    The score of a block is the mean, over the elements that exist, of ``|w|`` (``"l1"``) or
    ``w^2`` (``"l2"``), so that edge blocks compare fairly with whole ones. A block that holds a
    NaN or an Inf, or whose sum exceeds float32's range, has a score that is not finite.

    Args:
        weight: float, shape ``(R, C)``, any strides. The Triton kernel takes 16- and 32-bit
            floats; ``"auto"`` computes float64 in plain torch.
        pattern: ``Block``, or ``Unstructured``: each element is a group of its own.
        norm: ``"l1"`` or ``"l2"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        float32, shape ``(ceil(R / rows), ceil(C / cols))``, contiguous; accumulated in float32
        (float64 for a float64 weight). Two runs agree to the bit. The gradient is that of the
        mean, ``sign(w) / n`` or ``2 w / n``, in the weight's dtype.

    Raises:
        TypeError: ``weight`` is not of a float dtype.
        ValueError: ``weight`` is no matrix, ``norm`` or ``backend`` is none of the above, or
            ``"triton"`` is asked for with a float64 weight.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"block_score: norm must be 'l1' or 'l2', got {norm!r}")
    on_triton = _runs_triton("block_score", [weight], backend)
    squared = norm == "l2"
    if on_triton or (weight.is_cpu and not takes_kernels(weight.device)):
        return _op(weight, pattern.rows, pattern.cols, squared)
    return block_score_reference(weight, pattern, squared=squared)


@torch.no_grad()
def block_scores(
    weights: Sequence[Tensor], pattern: Pattern, *, normed: bool, backend: Backend = "auto"
) -> tuple[list[Tensor], Tensor | None]:
    """Score every block of a list of weights, as ``block_score``, without a gradient.

    On a GPU one launch for all weights of one dtype (one more for those stored transposed), and
    one for their norms. Each weight is read once, for both.

    Args:
        weights: one or more, as ``block_score``'s, on one device.
        pattern: as ``block_score``'s; of ``Unstructured`` the weights are their own scores, and
            are returned as they are.
        normed: whether norms are asked for.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        float32 scores, one contiguous matrix a weight. On a GPU they are parts of one tensor.
        And, if ``normed``, float32 ``(len(weights),)``: ``1 / ||w||_2`` of each weight, the
        squares added up in one order, scaled or in float64 where float32 does not hold them; 1
        for a weight of zeros, Inf where the quotient exceeds float32. Else None.

    Raises:
        TypeError, ValueError, RuntimeError: as ``block_score``; or devices differ.
    """
    scored = not isinstance(pattern, Unstructured)
    rows, cols = pattern.rows, pattern.cols
    if _runs_triton("block_scores", weights, backend):
        if not scored and not normed:
            return list(weights), None
        found, inverse = _launch(weights, rows, cols, False, scored, normed)
        return found if scored else list(weights), inverse if normed else None
    if not scored:
        return list(weights), inverse_norms_reference(weights) if normed else None
    if not weights[0].is_cpu or takes_kernels(weights[0].device):
        found = [block_score_reference(w, pattern, squared=False) for w in weights]
        return found, inverse_norms_reference(weights) if normed else None
    found, norms = [], []
    for weight in weights:
        parts = [row_norms(weight[:0])]  # of an empty one
        found.append(_in_chunks(weight, rows, cols, False, parts if normed else None))
        norms.append(torch.cat(parts))
    return found, inverse_norms(norms) if normed else None
