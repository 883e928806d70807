"""Which groups of each weight stay, and which come back: the masks of dynamic sparse training.

Every weight is a pool by itself: of the groups that it keeps those of the highest scores stay, and
of all others those of the highest scores come back, by exact counts. On a GPU all weights of up to
``MOST`` groups share their launches, seven for what stays and what comes back; greater ones, whose
keys take memory too, go one by one. Nothing waits for the device.

A selection is the search for a threshold, over keys that put some groups below all others, or
above them: no group is moved to stand among candidates alone.

Reading order: reference -> kernel -> launcher -> public function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .bits import pack, unpack
from .grid import ceil_div
from .launch import FUSED, Backend, on_device, tl, triton, use_triton
from .mask import make_mask
from .pattern import Block, Pattern
from .select import select
from .select_each import MOST, select_each
from .table import Matrices, addresses, alike, device_table, find_tensor, list_index_type

BLOCK = 1024  # groups of a program
_INFINITY = 0x7F800000  # its bit pattern


def keep_highest(
    scores: Tensor, count: int, among: Tensor, backend: Backend = "torch"
) -> tuple[Tensor, Tensor]:
    """Keep the ``count`` groups of highest |score| among some, the first of equals: the reference.

    Returns:
        A bool grid; int64, 0-d, how many candidates' scores are NaN or Inf: if any are, the grid
        means nothing.
    """
    candidates = scores[among][None]
    threshold = select([candidates], candidates.numel() - count, backend=backend)
    grid = torch.zeros_like(among)
    if not threshold.nonfinite:
        (chosen,) = make_mask([candidates], threshold, packed=False, backend=backend)
        grid[among] = chosen[0]
    return grid, threshold.nonfinite


def _regrow_one(
    mask: Tensor, drop: Tensor, keep: int, grow: Tensor | None, grown: int
) -> tuple[Tensor, Tensor]:
    packed = mask.dtype == torch.uint8
    kept = unpack(mask, drop.shape[1], backend="torch") if packed else mask
    grid, nonfinite = keep_highest(drop, keep, kept)
    if grow is not None:
        more, also = keep_highest(grow, grown, ~grid)
        grid, nonfinite = grid | more, nonfinite + also
    return pack(grid, backend="torch") if packed else grid, nonfinite


# A table's columns: first program, addresses of scores, mask and keys, groups down and across, the
# scores' strides, the place in the list.


@triton.jit
def _key_kernel(
    table_ptr,
    nonfinite_ptr,
    DTYPE: tl.constexpr,
    GROWING: tl.constexpr,
    PACKED: tl.constexpr,
    INFINITY: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write float32 keys that order as |scores| do, but for the groups that are not candidates:
    those pruned are below all, or if ``GROWING`` those kept are above all.
    """
    entry = table_ptr + find_tensor(table_ptr, N)
    first = (tl.program_id(0) - tl.load(entry)).to(INDEX) * BLOCK
    x_ptr = tl.load(entry + N).to(tl.pointer_type(DTYPE))
    mask_ptr = tl.load(entry + 2 * N).to(tl.pointer_type(tl.uint8))
    key_ptr = tl.load(entry + 3 * N).to(tl.pointer_type(tl.int32))
    R, C = tl.load(entry + 4 * N).to(INDEX), tl.load(entry + 5 * N).to(INDEX)
    stride_r, stride_c = tl.load(entry + 6 * N).to(INDEX), tl.load(entry + 7 * N).to(INDEX)
    offs = first + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < R * C - first
    row, col = offs // C, offs % C
    x = tl.load(x_ptr + row * stride_r + col * stride_c, mask=inside, other=0)  # [BLOCK]
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if PACKED:
        flags = tl.load(mask_ptr + row * tl.cdiv(C, 8) + col // 8, mask=inside, other=0)
        kept = ((flags >> (col % 8).to(tl.uint8)) & 1) != 0  # [BLOCK]
    else:
        kept = tl.load(mask_ptr + offs, mask=inside, other=0) != 0  # [BLOCK]
    finite = tl.minimum(bits, INFINITY - 1)
    if GROWING:
        key = tl.where(kept, INFINITY, finite)
        bad = inside & (bits >= INFINITY) & (kept == 0)
    else:
        # one higher, so that what is no candidate is below all
        key = tl.where(kept, finite + 1, 0)
        bad = inside & (bits >= INFINITY) & kept
    tl.store(key_ptr + offs, key, mask=inside)
    count = tl.sum(bad.to(tl.int64))
    at = nonfinite_ptr + tl.load(entry + 8 * N)
    tl.atomic_add(at, count, mask=count > 0)


def _choose(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    kept: Sequence[int],
    places: Sequence[int],
    nonfinite: Tensor,
    *,
    growing: bool,
) -> list[Tensor]:
    """Return compact masks that keep ``kept`` groups each; count what is not finite at ``places``
    of ``nonfinite``.
    """
    packed = masks[0].dtype == torch.uint8
    scores = [s.float() if s.dtype == torch.float64 else s for s in scores]
    keys = [torch.empty(s.shape, dtype=torch.float32, device=s.device) for s in scores]
    own = Matrices.of(scores)
    groups = own.rows * own.cols
    columns = (
        *(ceil_div(groups, BLOCK), own.address, addresses(masks), addresses(keys)),
        *(own.rows, own.cols, own.row_stride, own.col_stride, np.array(places)),
    )
    with on_device(nonfinite):
        for dtype, at in alike(s.dtype for s in scores).items():
            table, programs = device_table(nonfinite.device, [column[at] for column in columns])
            if programs:
                _key_kernel[(programs,)](
                    table,
                    nonfinite,
                    DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
                    GROWING=growing,
                    PACKED=packed,
                    INFINITY=_INFINITY,
                    INDEX=list_index_type(own, Matrices.of(keys)),
                    N=table.shape[1],
                    BLOCK=BLOCK,
                    **FUSED,
                )
    ks = [n - count for n, count in zip(groups.tolist(), kept, strict=True)]
    return make_mask(keys, select_each(keys, ks, backend="triton"), packed=packed)


@torch.no_grad()
def regrow(
    masks: Sequence[Tensor],
    drop: Sequence[Tensor],
    keep: Sequence[int],
    grow: Sequence[Tensor] | None,
    grown: Sequence[int],
    pattern: Pattern,
    *,
    backend: Backend = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Find which groups each mask keeps after some are dropped, and others, or the same, grown.

    Args:
        masks: one or more, compact and contiguous, on one device: bool, one element a block, or
            uint8 with one bit an element for ``Unstructured``.
        drop: float scores of all groups of each, matrices of any strides: of those that the mask
            keeps the highest |score| stay, of equals the first, row-major.
        keep: how many stay, no more than the mask keeps.
        grow: scores too: of the others the highest come back. None: none do.
        grown: how many come back.
        pattern: that of all masks.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, which waits for the device.

    Returns:
        New masks, compact; int64 ``(len(masks),)``: how many scores of the groups that were chosen
        among are NaN or Inf. If any are, that mask means nothing.

    Raises:
        ValueError: scores do not fit their mask.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    packed = not isinstance(pattern, Block)
    for mask, *scores in zip(masks, drop, *(() if grow is None else (grow,)), strict=True):
        for given in scores:
            if mask.shape != (given.shape[0], ceil_div(given.shape[1], 8 if packed else 1)):
                raise ValueError(
                    f"regrow: scores must be one a group of a mask {tuple(mask.shape)} of "
                    f"{pattern}, got {tuple(given.shape)}"
                )
    if not use_triton("regrow", backend, masks[0]):
        again = [None] * len(masks) if grow is None else grow
        each = [*map(_regrow_one, masks, drop, keep, again, grown)]
        return [mask for mask, _ in each], torch.stack([nonfinite for _, nonfinite in each])
    nonfinite = torch.zeros(len(masks), dtype=torch.int64, device=masks[0].device)
    many = [place for place, scores in enumerate(drop) if scores.numel() <= MOST]
    alone = [[place] for place, scores in enumerate(drop) if scores.numel() > MOST]
    found: dict[int, Tensor] = {}
    for places in [many, *alone] if many else alone:
        own, stay = [masks[place] for place in places], [keep[place] for place in places]
        scores = [drop[place] for place in places]
        chosen = _choose(scores, own, stay, places, nonfinite, growing=False)
        if grow is not None:
            scores = [grow[place] for place in places]
            whole = [keep[place] + grown[place] for place in places]
            chosen = _choose(scores, chosen, whole, places, nonfinite, growing=True)
        found |= zip(places, chosen, strict=True)
    return [found[place] for place in range(len(masks))], nonfinite
