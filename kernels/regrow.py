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

from .bits import Packer, bytes_of, chunks, count_kept, unpack
from .grid import ceil_div
from .launch import FUSED, Backend, on_device, tl, triton, use_triton
from .mask import make_mask
from .pattern import Block, Pattern
from .search_torch import Among
from .select import select_among
from .select_each import MOST, select_each
from .table import Matrices, addresses, alike, device_table, find_tensor, list_index_type

BLOCK = 1024  # groups of a program
_INFINITY = 0x7F800000  # its bit pattern


def keep_highest(mask: Tensor, scores: Tensor, keep: int, growing: bool) -> tuple[Tensor, Tensor]:
    """Define the semantics for one mask: plain torch, any device, any float dtype; a chunk of
    scratch. ``growing``: what the mask keeps stays, and what is chosen comes to it.
    """
    (kept,) = count_kept([mask])
    pruned = scores.numel() - keep if growing else kept - keep
    threshold = select_among(scores, pruned, Among(mask, not growing))
    left, packed = int(threshold.keep_ties), mask.dtype == torch.uint8
    packer = Packer(scores) if packed else None
    found = torch.empty_like(mask)
    for chunk in chunks(scores.shape):
        key = scores[chunk].to(torch.float32, copy=True).abs_()
        own = mask[bytes_of(chunk)] if packed else mask[chunk]
        own = unpack(own, key.shape[1], backend="torch") if packed else own
        among = ~own if growing else own
        chosen = packer.buffer(*key.shape) if packer else found[chunk]
        torch.gt(key, threshold.value, out=chosen)
        chosen &= among
        if left:
            tie = (key == threshold.value).logical_and_(among)
            count = int(tie.count_nonzero())
            if count > left:
                tie &= tie.flatten().cumsum(0).view(tie.shape) <= left
            chosen |= tie
            left -= min(count, left)
        if growing:
            chosen |= own
        if packer:
            packer.write(found[bytes_of(chunk)])
    return found, threshold.nonfinite


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


def _keys_of(scores: Tensor) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.float32, device=scores.device)


def _choose(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    kept: Sequence[int],
    places: Sequence[int],
    nonfinite: Tensor,
    *,
    growing: bool,
    spend: bool,
) -> list[Tensor]:
    """Return compact masks that keep ``kept`` groups each; count what is not finite at ``places``
    of ``nonfinite``. Keys may take the place of scores that are to ``spend``.
    """
    packed = masks[0].dtype == torch.uint8
    scores = [s.float() if s.dtype == torch.float64 else s for s in scores]
    keys = [
        s if spend and s.dtype == torch.float32 and s.is_contiguous() else _keys_of(s)
        for s in scores
    ]
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


def drop_lowest(
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    keep: Sequence[int],
    pattern: Pattern,
    *,
    spend: bool = False,
    backend: Backend = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Find which groups each mask keeps after those of lowest |score| are dropped.

    Args:
        masks: one or more, compact and contiguous, on one device: bool, one element a block, or
            uint8 with one bit an element for ``Unstructured``.
        scores: float scores of all groups of each, matrices of any strides; of equals the first
            stay, row-major.
        keep: how many stay, no more than the mask keeps.
        pattern: that of all masks.
        spend: whether scores may be written over.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, which waits for the device.

    Returns:
        New masks, compact; int64 ``(len(masks),)``: how many scores of the groups that were chosen
        among are NaN or Inf. If any are, that mask means nothing.

    Raises:
        ValueError: scores do not fit their mask.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    return _keep_highest(masks, scores, keep, pattern, backend, growing=False, spend=spend)


def grow_highest(
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    keep: Sequence[int],
    pattern: Pattern,
    *,
    spend: bool = False,
    backend: Backend = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Find which groups each mask keeps after those of highest |score| have come to it.

    Args:
        masks, pattern, spend, backend: as ``drop_lowest``'s.
        scores: as ``drop_lowest``'s; of equals the first come.
        keep: how many it keeps then, no fewer than now.

    Returns, raises: as ``drop_lowest``.
    """
    return _keep_highest(masks, scores, keep, pattern, backend, growing=True, spend=spend)


@torch.no_grad()
def _keep_highest(
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    keep: Sequence[int],
    pattern: Pattern,
    backend: Backend,
    *,
    growing: bool,
    spend: bool,
) -> tuple[list[Tensor], Tensor]:
    packed = not isinstance(pattern, Block)
    operation = "grow_highest" if growing else "drop_lowest"
    for mask, given in zip(masks, scores, strict=True):
        if mask.shape != (given.shape[0], ceil_div(given.shape[1], 8 if packed else 1)):
            raise ValueError(
                f"{operation}: scores must be one a group of a mask {tuple(mask.shape)} of "
                f"{pattern}, got {tuple(given.shape)}"
            )
    if not use_triton(operation, backend, masks[0]):
        each = [keep_highest(*one, growing) for one in zip(masks, scores, keep, strict=True)]
        return [mask for mask, _ in each], torch.stack([nonfinite for _, nonfinite in each])
    nonfinite = torch.zeros(len(masks), dtype=torch.int64, device=masks[0].device)
    many = [place for place, own in enumerate(scores) if own.numel() <= MOST]
    alone = [[place] for place, own in enumerate(scores) if own.numel() > MOST]
    found: dict[int, Tensor] = {}
    for places in [many, *alone] if many else alone:
        own, stay = [masks[place] for place in places], [keep[place] for place in places]
        given = [scores[place] for place in places]
        chosen = _choose(given, own, stay, places, nonfinite, growing=growing, spend=spend)
        found |= zip(places, chosen, strict=True)
    return [found[place] for place in range(len(masks))], nonfinite
