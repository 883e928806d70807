"""Block scores: the mean magnitude of every block of a weight, in one read of it.

A list of weights is one launch for each dtype and direction in memory. The norms of the weights
come from the same read: each program leaves the sums of squares of its tile's segments, which
``exact_sum.py`` adds up, so that a weight and the parts of it that ranks hold have one norm.

Reading order: reference -> plain torch in chunks -> kernels -> launcher -> operators -> public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .exact_sum import (
    CPU_CHUNK,
    PIECES,
    Places,
    in_pieces,
    inverse_norms,
    row_squares,
    segment_of,
    segment_squares,
)
from .grid import block_counts, ceil_div, expand_blocks, pad_to_blocks, side_lengths
from .launch import FUSED, Backend, on_device, takes_kernels, tl, triton, use_triton
from .pattern import MAX_BLOCK_SIDE, Pattern, Unstructured
from .table import Matrices, alike, device_table, find_tensor, first_of, list_index_type, swap

# no block is wider than the tile; four or eight 16-byte loads of a thread are in flight at once
TILE = {"TILE_R": 16, "TILE_C": MAX_BLOCK_SIDE}


def block_score_reference(weight: Tensor, pattern: Pattern, *, squared: bool) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype, differentiable."""
    rows, cols = pattern.rows, pattern.cols
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    size = exact.square() if squared else exact.abs()
    sums = pad_to_blocks(size, rows, cols).sum((1, 3))
    tall, wide = side_lengths(weight.shape, rows, cols, device=weight.device)
    return (sums / tall / wide).to(torch.float32)


def _in_chunks(
    weight: Tensor, rows: int, cols: int, squared: bool, squares: list[Tensor] | None = None
) -> Tensor:
    """Compute the reference with no temporary but a chunk of whole block rows.

    ``squares`` gets those of every chunk's rows, which are in the cache then.
    """
    if weight.stride(0) < weight.stride(1):
        return _in_chunks(weight.T, cols, rows, squared, squares).T.contiguous()
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
        if squares is not None:
            squares.append(row_squares(exact))
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
    square_ptr,
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
    SEGMENT: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Score the blocks of one tile, and add up the squares of segments, where there are any."""
    # a program covers several small blocks, or walks down one row of tall ones
    SPAN: tl.constexpr = max(ROWS, TILE_R)
    DOWN: tl.constexpr = SPAN // ROWS
    ACROSS: tl.constexpr = TILE_C // COLS
    tiles_c = tl.cdiv(C, TILE_C)
    pid_r, pid_c = tile // tiles_c, tile % tiles_c
    offs_c = (pid_c * TILE_C + tl.arange(0, TILE_C)).to(INDEX)
    in_c = offs_c < C

    total = tl.zeros((TILE_R, TILE_C), tl.float32)
    for start in range(0, SPAN, TILE_R):
        offs_r = (pid_r * SPAN + start + tl.arange(0, TILE_R)).to(INDEX)
        w = tl.load(
            w_ptr + offs_r[:, None] * stride_wr + offs_c[None, :] * stride_wc,
            mask=(offs_r < R)[:, None] & in_c[None, :],
            other=0.0,
        ).to(tl.float32)  # [TILE_R, TILE_C]
        total += w * w if SQUARED else tl.abs(w)
        if SEGMENT:
            offs_s = (pid_c * (TILE_C // SEGMENT) + tl.arange(0, TILE_C // SEGMENT)).to(INDEX)
            segments = tl.cdiv(C, SEGMENT)
            tl.store(
                square_ptr + offs_r[:, None] * segments + offs_s[None, :],
                segment_squares(w, SEGMENT),
                mask=(offs_r < R)[:, None] & (offs_s < segments)[None, :],
            )  # [TILE_R, TILE_C // SEGMENT]

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


# A table's columns: first program, programs, the weight's address, rows, columns, its strides, the
# first score, the scores' strides, the first sum of squares, whether its rows are whole runs of 16
# bytes.


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
    SEGMENT: tl.constexpr,
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
    square_ptr += tl.load(entry + 10 * N)
    if tl.load(entry + 11 * N) != 0:
        # of a number from memory the compiler knows nothing: without these it loads one by one
        _score_tile(
            tl.multiple_of(w_ptr, 16), score_ptr, square_ptr, tile, R, tl.multiple_of(C, UNIT),
            tl.multiple_of(stride_wr, UNIT), 1, stride_sr, stride_sc,
            ROWS, COLS, SQUARED, SCORED, SEGMENT, INDEX, TILE_R, TILE_C,
        )  # fmt: skip
    else:
        _score_tile(
            w_ptr, score_ptr, square_ptr, tile, R, C, stride_wr, stride_wc, stride_sr, stride_sc,
            ROWS, COLS, SQUARED, SCORED, SEGMENT, INDEX, TILE_R, TILE_C,
        )  # fmt: skip


def _launch(
    weights: Sequence[Tensor],
    rows: int,
    cols: int,
    *,
    squared: bool = False,
    scored: bool = True,
    pieces: Sequence[int | None] | None = None,
    normed: bool = False,
) -> tuple[list[Tensor], Places]:
    """Return the scores, parts of one tensor, and where the sums of squares are, if ``normed``.
    Without scores lines are in so many ``pieces``.
    """
    first, own = weights[0], Matrices.of(weights)
    down, across = ceil_div(own.rows, rows), ceil_div(own.cols, cols)
    # along their memory; blocks that are no squares are others then
    turned = own.turned
    R, C = swap(turned, own.rows, own.cols)
    stride_r, stride_c = swap(turned, own.row_stride, own.col_stride)
    stride_sr, stride_sc = swap(turned, across, 1)
    tall, wide = swap(turned, rows, cols)
    sizes = down * across if scored else np.zeros_like(down)
    starts = first_of(ceil_div(sizes, 16) * 16)
    scores = first.new_empty(int((starts + sizes).max()), dtype=torch.float32)
    parts = np.where(C % PIECES == 0, PIECES, 1)
    if pieces is not None:
        parts = np.array([own if n is None else n for n, own in zip(pieces, parts, strict=True)])
    length = C // np.maximum(parts, 1)
    segment = segment_of(length) * normed
    if scored:
        # a tile of scores holds whole segments, or adds up none
        fits = (length % np.maximum(segment, 1) == 0) & (segment >= MAX_BLOCK_SIDE // 4)
        segment = np.where(fits, segment, np.where(parts == 1, MAX_BLOCK_SIDE, 0)) * normed
    elif ((parts != 1) & (R > 1) & (stride_r != C * stride_c)).any():
        lines = [w.T if turn else w for w, turn in zip(weights, turned, strict=True)]
        rows_of = [in_pieces(m, n) for m, n in zip(lines, parts.tolist(), strict=True)]
        return _launch(rows_of, 1, 1, scored=False, pieces=[1] * len(lines), normed=normed)
    else:
        R, C, stride_r = R * parts, length, np.where(parts == 1, stride_r, length * stride_c)
    sums = R * ceil_div(C, np.maximum(segment, 1)) * (segment > 0)
    square_starts = first_of(sums)
    squares = first.new_empty(int(sums.sum()), dtype=torch.float64)
    # without scores a tile is as wide as a segment
    tile_c = np.full_like(segment, TILE["TILE_C"]) if scored else segment
    tile_r = TILE["TILE_R"] * TILE["TILE_C"] // tile_c
    programs = ceil_div(R, np.maximum(tall, tile_r)) * ceil_div(C, tile_c)
    index = list_index_type(own)
    each = (column.tolist() for column in (tall, wide, segment, tile_r, tile_c))
    kinds = zip((w.dtype for w in weights), *each, strict=True)
    with on_device(first):
        for (dtype, ROWS, COLS, SEGMENT, TILE_R, TILE_C), at in alike(kinds).items():
            unit = 16 // dtype.itemsize
            runs = (stride_c == 1) & ((stride_r % unit | C % unit | own.address % 16) == 0)
            columns = (
                *(programs, programs, own.address, R, C, stride_r, stride_c),
                *(starts, stride_sr, stride_sc, square_starts, runs),
            )
            table, total = device_table(first.device, [column[at] for column in columns])
            if total:
                _block_score_kernel[(total,)](
                    table,
                    scores,
                    squares,
                    DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
                    ROWS=ROWS,
                    COLS=COLS,
                    SQUARED=squared,
                    SCORED=scored,
                    SEGMENT=SEGMENT,
                    INDEX=index,
                    N=table.shape[1],
                    TILE_R=TILE_R,
                    TILE_C=TILE_C,
                    **FUSED,
                )
    grids = zip(down.tolist(), across.tolist(), starts.tolist(), strict=True)
    found = [scores.as_strided((i, j), (j, 1), start) for i, j, start in grids] if scored else []
    places = Places([squares], squares.data_ptr() + 8 * square_starts, sums)
    return found, places


def _launch_one(weight: Tensor, rows: int, cols: int, squared: bool) -> Tensor:
    (scores,), _ = _launch([weight], rows, cols, squared=squared)
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
def weight_squares(
    weights: Sequence[Tensor],
    pieces: Sequence[int | None] | None = None,
    backend: Backend = "auto",
) -> list[Tensor]:
    """Return sums of a weight's squares, of which ``inverse_norms`` are made: the same numbers of
    a weight and, taken together, of the parts of it that ranks hold.

    Args:
        weights: as ``block_scores``', or what is here of them.
        pieces: of each, of how many pieces a line that is here consists; None: of ``pieces_of``
            its length.
        backend: as ``block_score``'s.

    Returns:
        float64 vectors.
    """
    pieces = [None] * len(weights) if pieces is None else pieces
    if not _runs_triton("weight_squares", weights, backend):
        return [row_squares(w, n) for w, n in zip(weights, pieces, strict=True)]
    _, places = _launch(weights, 1, 1, scored=False, pieces=pieces, normed=True)
    (squares,) = places.held
    return list(squares.split(places.length.tolist()))


@torch.no_grad()
def block_scores(
    weights: Sequence[Tensor], pattern: Pattern, *, normed: bool, backend: Backend = "auto"
) -> tuple[list[Tensor], Tensor | None]:
    """Score every block of a list of weights, as ``block_score``, without a gradient.

    On a GPU one launch for all weights of one dtype (one more for those stored transposed, and
    with norms for each kind of segments), and three for their norms. Each weight is read once, for
    both; twice where neither its lines nor their sixteenths are whole segments of 64.

    Args:
        weights: one or more, as ``block_score``'s, on one device.
        pattern: as ``block_score``'s; of ``Unstructured`` the weights are their own scores, and
            are returned as they are.
        normed: whether norms are asked for.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        float32 scores, one contiguous matrix a weight. On a GPU they are parts of one tensor.
        And, if ``normed``, float32 ``(len(weights),)``: ``1 / ||w||_2`` of each weight, of
        ``weight_squares``; 1 for a weight of zeros, Inf where the quotient exceeds float32. Else
        None.

    Raises:
        TypeError, ValueError, RuntimeError: as ``block_score``; or devices differ.
    """
    scored = not isinstance(pattern, Unstructured)
    rows, cols = pattern.rows, pattern.cols
    on_triton = _runs_triton("block_scores", weights, backend)
    if on_triton and normed:
        return _scores_and_norms(weights, rows, cols, scored=scored)
    if not scored:
        found, squares = list(weights), weight_squares(weights, None, "torch") if normed else []
    elif on_triton:
        return _launch(weights, rows, cols)[0], None
    elif not weights[0].is_cpu or takes_kernels(weights[0].device):
        found = [block_score_reference(w, pattern, squared=False) for w in weights]
        squares = weight_squares(weights, None, "torch") if normed else []
    else:
        found, squares = [], []
        for weight in weights:
            parts = [weight.new_empty(0, dtype=torch.float64)]  # all of an empty one
            found.append(_in_chunks(weight, rows, cols, False, parts if normed else None))
            squares.append(torch.cat(parts))
    return found, inverse_norms(squares) if normed else None


def _scores_and_norms(
    weights: Sequence[Tensor], rows: int, cols: int, *, scored: bool
) -> tuple[list[Tensor], Tensor]:
    found, places = _launch(weights, rows, cols, scored=scored, normed=True)
    apart = np.flatnonzero(places.length == 0).tolist() if scored else []
    if apart:
        some = [weights[place] for place in apart]
        _, rest = _launch(some, 1, 1, scored=False, normed=True)
        places.address[apart], places.length[apart] = rest.address, rest.length
        places = places._replace(held=[*places.held, *rest.held])
    return found if scored else list(weights), inverse_norms(places)
