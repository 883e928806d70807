"""Block scores: the mean magnitude of every block of a weight, in one read of it.

Reading order: reference -> plain torch in chunks -> kernel -> launcher -> operator -> public.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .grid import block_counts, ceil_div, expand_blocks, pad_to_blocks, side_lengths
from .launch import Backend, index_type, on_device, takes_kernels, tl, triton, use_triton
from .pattern import MAX_BLOCK_SIDE, Pattern

# no block is wider than the tile; four or eight 16-byte loads of a thread are in flight at once
TILE = {"TILE_R": 16, "TILE_C": MAX_BLOCK_SIDE}
# elements: a chunk and its magnitudes stay in the cache between the passes over them
CPU_CHUNK = 2**19


def block_score_reference(weight: Tensor, pattern: Pattern, *, squared: bool) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype, differentiable."""
    rows, cols = pattern.rows, pattern.cols
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    size = exact.square() if squared else exact.abs()
    sums = pad_to_blocks(size, rows, cols).sum((1, 3))
    tall, wide = side_lengths(weight.shape, rows, cols, device=weight.device)
    return (sums / tall / wide).to(torch.float32)


def _in_chunks(weight: Tensor, rows: int, cols: int, squared: bool) -> Tensor:
    """Compute the reference with no temporary but a chunk of whole block rows."""
    if weight.stride(0) < weight.stride(1):
        return _in_chunks(weight.T, cols, rows, squared).T.contiguous()
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
def _block_score_kernel(
    w_ptr,
    score_ptr,
    R,
    C,
    stride_wr,
    stride_wc,
    stride_sr,
    stride_sc,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SQUARED: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    # a program covers several small blocks, or walks down one row of tall ones
    SPAN: tl.constexpr = max(ROWS, TILE_R)
    DOWN: tl.constexpr = SPAN // ROWS
    ACROSS: tl.constexpr = TILE_C // COLS
    tiles_c = tl.cdiv(C, TILE_C)
    pid_r, pid_c = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
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

    offs_down = (pid_r * DOWN + tl.arange(0, DOWN)).to(INDEX)
    offs_across = (pid_c * ACROSS + tl.arange(0, ACROSS)).to(INDEX)
    if ROWS * COLS == 1:
        mean = total
    else:
        # rows first: a thread holds whole columns of the tile, so only partial sums change hands
        columns = tl.sum(tl.reshape(total, (DOWN, TILE_R // DOWN, ACROSS, COLS)), axis=1)
        tall = tl.minimum(R - offs_down * ROWS, ROWS)
        wide = tl.minimum(C - offs_across * COLS, COLS)
        elements = tl.maximum(tall[:, None] * wide[None, :], 1)  # a block past the edge has none
        mean = tl.div_rn(tl.sum(columns, axis=2), elements.to(tl.float32))
    tl.store(
        score_ptr + offs_down[:, None] * stride_sr + offs_across[None, :] * stride_sc,
        mean,
        mask=(offs_down * ROWS < R)[:, None] & (offs_across * COLS < C)[None, :],
    )  # [DOWN, ACROSS]


def _launch(weight: Tensor, rows: int, cols: int, squared: bool) -> Tensor:
    R, C = weight.shape
    scores = weight.new_empty(block_counts(weight.shape, rows, cols), dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    w, s = weight, scores
    if weight.stride(0) < weight.stride(1):  # stored transposed: neighbours lie down the columns
        w, s, R, C, rows, cols = w.T, s.T, C, R, cols, rows
    grid = ceil_div(R, max(rows, TILE["TILE_R"])) * ceil_div(C, TILE["TILE_C"])
    with on_device(weight):
        _block_score_kernel[(grid,)](
            w,
            s,
            R,
            C,
            *w.stride(),
            *s.stride(),
            ROWS=rows,
            COLS=cols,
            SQUARED=squared,
            INDEX=index_type(w, s),
            **TILE,
        )
    return scores


def _score(weight: Tensor, rows: int, cols: int, squared: bool) -> Tensor:
    return (_launch if takes_kernels(weight.device) else _in_chunks)(weight, rows, cols, squared)


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
    if not weight.is_floating_point():
        raise TypeError(f"block_score: weight must be of a float dtype, got {weight.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"block_score: weight must be a matrix, got shape {tuple(weight.shape)}")
    if norm not in ("l1", "l2"):
        raise ValueError(f"block_score: norm must be 'l1' or 'l2', got {norm!r}")
    on_triton = use_triton("block_score", backend, weight)
    if on_triton and weight.dtype == torch.float64:
        if backend == "triton":
            raise ValueError("block_score: weight must not be float64 with backend='triton'")
        on_triton = False
    squared = norm == "l2"
    if on_triton or (weight.is_cpu and not takes_kernels(weight.device)):
        return _op(weight, pattern.rows, pattern.cols, squared)
    return block_score_reference(weight, pattern, squared=squared)


def norm_(gradient: Tensor) -> None:
    """Divide a matrix by the root mean square of each row, then of each column, in place."""
    for dim in (1, 0):
        size = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True, dtype=torch.float64)
        size *= gradient.shape[dim] ** -0.5
        gradient.div_(size.masked_fill_(size == 0, 1))
