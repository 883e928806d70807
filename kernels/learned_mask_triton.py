"""Learned masks by Triton's kernels: ``learned_mask.py``.

The backward pass makes the forward's draws again rather than read a mask: a block's logit is read
once a group, and costs nothing beside the weight.

Reading order: what the kernels share -> elements -> blocks -> launches.
"""

# in a kernel one constexpr decides what is bound and what is used
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
from torch import Tensor

from .draw import LANES
from .grid import block_counts, ceil_div
from .launch import index_type, on_device, tl, triton

TILE = {"QUADS": 4, "CHUNKS": 32, "WIDTH": 8}  # rows by LANES, then columns: 16-byte loads
BLOCK_TILE = {"TILE_R": 16, "TILE_C": 256}  # no block is wider


@triton.jit
def _philox(random_ptr, stream, quad):
    """Return the four random integers of each quad."""
    seed, draw = tl.load(random_ptr), tl.load(random_ptr + 1)
    c0 = quad.to(tl.uint32)
    zero = c0 * 0
    return tl.philox(seed, c0, zero, zero + draw.to(tl.uint32), zero + stream)


@triton.jit
def _uniform(bits):
    whole = tl.minimum(tl.maximum((bits >> 8).to(tl.int32), 17), 16777199)
    return whole.to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _exp_minus_of(s):
    # by comparisons, so that a NaN stays one
    s = tl.where(s > 20.0, 20.0, tl.where(s < -20.0, -20.0, s))
    y = s * -1.4426950216293335
    whole = tl.floor(y)
    f = y - whole
    power = f * 0.0018775766948238015
    power = (power + 0.00898933969438076) * f
    power = (power + 0.05582631751894951) * f
    power = (power + 0.24015361070632935) * f
    power = (power + 0.6931530833244324) * f
    power = power + 0.9999999403953552
    bits = power.to(tl.int32, bitcast=True) + (whole.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _slope_of(u, v):
    total = u + v
    return u * v / (total * total)


@triton.jit
def _tile(C, INDEX: tl.constexpr, QUADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a program's quads of rows, its chunks and its columns; [QUADS, CHUNKS, WIDTH]."""
    tiles_c = tl.cdiv(C, CHUNKS * WIDTH)
    pid_q, pid_c = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
    offs_q = (pid_q * QUADS + tl.arange(0, QUADS)).to(INDEX)[:, None, None]
    chunk = (pid_c * CHUNKS + tl.arange(0, CHUNKS)).to(INDEX)[None, :, None]
    return offs_q, chunk, chunk * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit(do_not_specialize=["stream"])
def _sample_kernel(
    w_ptr,
    logit_ptr,
    random_ptr,
    stream,
    out_ptr,
    R,
    C,
    stride_wr,
    stride_wc,
    stride_lr,
    stride_lc,
    stride_or,
    stride_oc,
    INDEX: tl.constexpr,
    QUADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    offs_q, _, offs_c = _tile(C, INDEX, QUADS, CHUNKS, WIDTH)
    b0, b1, b2, b3 = _philox(random_ptr, stream, offs_q * C + offs_c)
    for lane in tl.static_range(4):
        offs_r = offs_q * 4 + lane
        inside = (offs_r < R) & (offs_c < C)
        s = tl.load(
            logit_ptr + offs_r * stride_lr + offs_c * stride_lc, mask=inside, other=0.0
        )  # [QUADS, CHUNKS, WIDTH]
        w = tl.load(w_ptr + offs_r * stride_wr + offs_c * stride_wc, mask=inside, other=0.0)
        bits = b0 if lane == 0 else b1 if lane == 1 else b2 if lane == 2 else b3
        u = _uniform(bits)
        keep = u > (1.0 - u) * _exp_minus_of(s)
        tl.store(
            out_ptr + offs_r * stride_or + offs_c * stride_oc, tl.where(keep, w, 0.0), mask=inside
        )


@triton.jit(do_not_specialize=["stream"])
def _grad_kernel(
    g_ptr,
    w_ptr,
    logit_ptr,
    random_ptr,
    stream,
    mask_ptr,
    grad_w_ptr,
    grad_s_ptr,
    R,
    C,
    stride_gr,
    stride_gc,
    stride_wr,
    stride_wc,
    stride_lr,
    stride_lc,
    stride_mr,
    stride_dr,
    stride_dc,
    SAMPLED: tl.constexpr,
    INDEX: tl.constexpr,
    QUADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    offs_q, chunk, offs_c = _tile(C, INDEX, QUADS, CHUNKS, WIDTH)
    if SAMPLED:
        b0, b1, b2, b3 = _philox(random_ptr, stream, offs_q * C + offs_c)
    for lane in tl.static_range(4):
        offs_r = offs_q * 4 + lane
        inside = (offs_r < R) & (offs_c < C)
        g = tl.load(
            g_ptr + offs_r * stride_gr + offs_c * stride_gc, mask=inside, other=0.0
        )  # [QUADS, CHUNKS, WIDTH]
        w = tl.load(w_ptr + offs_r * stride_wr + offs_c * stride_wc, mask=inside, other=0.0)
        grad_s = g.to(tl.float32) * w.to(tl.float32)
        if SAMPLED:
            s = tl.load(
                logit_ptr + offs_r * stride_lr + offs_c * stride_lc, mask=inside, other=0.0
            )
            bits = b0 if lane == 0 else b1 if lane == 1 else b2 if lane == 2 else b3
            u = _uniform(bits)
            v = (1.0 - u) * _exp_minus_of(s)
            keep = u > v
            grad_s *= _slope_of(u, v)
        else:
            # a byte holds the bits of WIDTH columns and is read once
            flags = tl.load(
                mask_ptr + offs_r * stride_mr + chunk,
                mask=(offs_r < R) & (chunk * WIDTH < C),
                other=0,
            )  # [QUADS, CHUNKS, 1]
            keep = ((flags >> (offs_c % 8).to(tl.uint8)) & 1) != 0
        tl.store(
            grad_w_ptr + offs_r * stride_dr + offs_c * stride_dc,
            tl.where(keep, g, 0.0),
            mask=inside,
        )
        tl.store(grad_s_ptr + offs_r * C + offs_c, grad_s, mask=inside)


@triton.jit
def _block_tile(
    C,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Return a program's first row, its columns, and the blocks that it covers."""
    # several rows of small blocks, or one row of tall ones, to walk down
    SPAN: tl.constexpr = max(ROWS, TILE_R)
    tiles_c = tl.cdiv(C, TILE_C)
    pid_r, pid_c = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
    offs_down = (pid_r * (SPAN // ROWS) + tl.arange(0, SPAN // ROWS)).to(INDEX)
    offs_across = (pid_c * (TILE_C // COLS) + tl.arange(0, TILE_C // COLS)).to(INDEX)
    offs_c = (pid_c * TILE_C + tl.arange(0, TILE_C)).to(INDEX)
    return pid_r * SPAN, offs_c[None, :], offs_down[:, None], offs_across[None, :]


@triton.jit
def _draw_blocks(
    logit_ptr, random_ptr, stream, offs_down, offs_across, across, in_group, stride_lr, stride_lc
):
    """Return u and v of the blocks of a tile: kept where u > v."""
    s = tl.load(
        logit_ptr + offs_down * stride_lr + offs_across * stride_lc, mask=in_group, other=0.0
    )
    b0, b1, b2, b3 = _philox(random_ptr, stream, (offs_down // 4) * across + offs_across)
    lane = offs_down % 4
    bits = tl.where(lane < 2, tl.where(lane == 0, b0, b1), tl.where(lane == 2, b2, b3))
    u = _uniform(bits)
    return u, (1.0 - u) * _exp_minus_of(s)


@triton.jit
def _spread_blocks(keep, ROWS: tl.constexpr, COLS: tl.constexpr, TILE_R: tl.constexpr):
    """Write one flag a block out for the elements of TILE_R rows of them."""
    DOWN: tl.constexpr = keep.shape[0]
    ACROSS: tl.constexpr = keep.shape[1]
    keep = tl.broadcast_to(
        keep.to(tl.int8)[:, None, :, None], (DOWN, TILE_R // DOWN, ACROSS, COLS)
    )
    return tl.reshape(keep, (TILE_R, ACROSS * COLS)) != 0


@triton.jit(do_not_specialize=["stream"])
def _sample_blocks_kernel(
    w_ptr,
    logit_ptr,
    random_ptr,
    stream,
    out_ptr,
    R,
    C,
    stride_wr,
    stride_wc,
    stride_lr,
    stride_lc,
    stride_or,
    stride_oc,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    first, offs_c, offs_down, offs_across = _block_tile(C, INDEX, ROWS, COLS, TILE_R, TILE_C)
    in_group = (offs_down * ROWS < R) & (offs_across * COLS < C)
    u, v = _draw_blocks(
        logit_ptr,
        random_ptr,
        stream,
        offs_down,
        offs_across,
        tl.cdiv(C, COLS),
        in_group,
        stride_lr,
        stride_lc,
    )
    keep = _spread_blocks(u > v, ROWS, COLS, TILE_R)
    for start in range(0, max(ROWS, TILE_R), TILE_R):
        offs_r = (first + start + tl.arange(0, TILE_R)).to(INDEX)[:, None]
        inside = (offs_r < R) & (offs_c < C)
        w = tl.load(
            w_ptr + offs_r * stride_wr + offs_c * stride_wc, mask=inside, other=0.0
        )  # [TILE_R, TILE_C]
        tl.store(
            out_ptr + offs_r * stride_or + offs_c * stride_oc, tl.where(keep, w, 0.0), mask=inside
        )


@triton.jit(do_not_specialize=["stream"])
def _grad_blocks_kernel(
    g_ptr,
    w_ptr,
    logit_ptr,
    random_ptr,
    stream,
    mask_ptr,
    grad_w_ptr,
    grad_s_ptr,
    R,
    C,
    stride_gr,
    stride_gc,
    stride_wr,
    stride_wc,
    stride_lr,
    stride_lc,
    stride_mr,
    stride_dr,
    stride_dc,
    SAMPLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    first, offs_c, offs_down, offs_across = _block_tile(C, INDEX, ROWS, COLS, TILE_R, TILE_C)
    in_group = (offs_down * ROWS < R) & (offs_across * COLS < C)
    across = tl.cdiv(C, COLS)
    if SAMPLED:
        u, v = _draw_blocks(
            logit_ptr,
            random_ptr,
            stream,
            offs_down,
            offs_across,
            across,
            in_group,
            stride_lr,
            stride_lc,
        )
        keep = u > v
    else:
        flags = tl.load(mask_ptr + offs_down * stride_mr + offs_across, mask=in_group, other=0)
        keep = flags != 0
    kept = _spread_blocks(keep, ROWS, COLS, TILE_R)

    total = tl.zeros((TILE_R, TILE_C), tl.float32)
    for start in range(0, max(ROWS, TILE_R), TILE_R):
        offs_r = (first + start + tl.arange(0, TILE_R)).to(INDEX)[:, None]
        inside = (offs_r < R) & (offs_c < C)
        g = tl.load(
            g_ptr + offs_r * stride_gr + offs_c * stride_gc, mask=inside, other=0.0
        )  # [TILE_R, TILE_C]
        w = tl.load(w_ptr + offs_r * stride_wr + offs_c * stride_wc, mask=inside, other=0.0)
        total += g.to(tl.float32) * w.to(tl.float32)
        tl.store(
            grad_w_ptr + offs_r * stride_dr + offs_c * stride_dc,
            tl.where(kept, g, 0.0),
            mask=inside,
        )

    DOWN: tl.constexpr = max(ROWS, TILE_R) // ROWS
    # rows first: a thread holds whole columns of the tile, so only partial sums change hands
    sums = tl.sum(tl.reshape(total, (DOWN, TILE_R // DOWN, TILE_C // COLS, COLS)), axis=1)
    grad_s = tl.sum(sums, axis=2)
    if SAMPLED:
        grad_s *= _slope_of(u, v)
    tl.store(grad_s_ptr + offs_down * across + offs_across, grad_s, mask=in_group)


def _programs(
    R: int, C: int, rows: int, cols: int, *, blocks: bool
) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid, and what the kernels for blocks or for elements are compiled for."""
    if not blocks:
        height, width = LANES * TILE["QUADS"], TILE["CHUNKS"] * TILE["WIDTH"]
        return (ceil_div(R, height) * ceil_div(C, width),), TILE
    tiles = ceil_div(R, max(rows, BLOCK_TILE["TILE_R"])) * ceil_div(C, BLOCK_TILE["TILE_C"])
    return (tiles,), {"ROWS": rows, "COLS": cols, **BLOCK_TILE}


def launch_sample(
    weight: Tensor, logits: Tensor, random: Tensor, stream: int, rows: int, cols: int
) -> Tensor:
    """Return the weight under a mask that is drawn from the logits."""
    out = torch.empty_like(weight)
    if weight.numel() == 0:
        return out
    blocks = rows > 1 or cols > 1
    R, C = weight.shape
    grid, layout = _programs(R, C, rows, cols, blocks=blocks)
    kernel = _sample_blocks_kernel if blocks else _sample_kernel
    with on_device(weight):
        # fused, a multiplication and an addition round once: other masks than elsewhere
        kernel[grid](
            weight, logits, random, stream, out, *weight.shape,
            *weight.stride(), *logits.stride(), *out.stride(),
            INDEX=index_type(weight, logits, out), enable_fp_fusion=False, **layout,
        )  # fmt: skip
    return out


def launch_gradients(
    grad: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    random: Tensor | None,
    stream: int,
    mask: Tensor | None,
    rows: int,
    cols: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and scores, under a mask that is drawn or given."""
    R, C = weight.shape
    grad_weight = torch.empty_like(weight)
    grad_scores = weight.new_empty(block_counts(weight.shape, rows, cols), dtype=torch.float32)
    if weight.numel() == 0:
        return grad_weight, grad_scores
    # a mask of 1 x 1 blocks has a byte an element, not a bit
    blocks = rows > 1 or cols > 1 or (mask is not None and mask.dtype == torch.bool)
    grid, layout = _programs(R, C, rows, cols, blocks=blocks)
    kernel = _grad_blocks_kernel if blocks else _grad_kernel
    mask_bytes = grad_scores if mask is None else mask.contiguous().view(torch.uint8)
    given = [t for t in (grad, weight, logits, mask, grad_weight, grad_scores) if t is not None]
    with on_device(weight):
        # what a variant does not read is given a tensor all the same
        kernel[grid](
            grad, weight, grad_scores if logits is None else logits,
            grad_scores if random is None else random, stream, mask_bytes,
            grad_weight, grad_scores, R, C,
            *grad.stride(), *weight.stride(),
            *(grad_scores if logits is None else logits).stride(), mask_bytes.stride(0),
            *grad_weight.stride(),
            SAMPLED=mask is None, INDEX=index_type(*given), enable_fp_fusion=False, **layout,
        )  # fmt: skip
    return grad_weight, grad_scores
