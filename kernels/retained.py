"""Retained values: what a weight had where it is pruned, kept apart from it, bit for bit.

A pruned weight holds +0 behind its mask, so the values that a returning group shall have again
lie elsewhere. Of blocks that is one flat tensor with the pruned elements and nothing else, so
``level`` times the weight's bytes. Of fine patterns it is a tensor like the weight, zero where
kept: positions would cost as much as the zeros, and putting back is then one OR.

Bits are moved, whichever floats they make up. A list is one or two launches on a GPU
(``moved.py``), to which the caller says how many elements are pruned, so that nothing waits for
the device. Plain torch elsewhere, but for the zeros in blocks, which `apply_mask_` writes.

Cost of plain torch, blocks: the pruned elements, read and written once each way, in two launches a
region of equal blocks: a matrix has one, or up to four if its sides are no multiples of a block's.
Taking them writes the zeros in one launch more. The positions of the pruned blocks are found anew,
which waits for the device once a region. Fine patterns: three passes over the weight to take, one
to put back; a packed mask is unpacked a chunk at a time, about ten launches per 2^24 elements.

Reading order: blocks -> fine patterns -> public functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .bits import WORDS, bytes_of, chunk_of, chunks, word_mask
from .grid import regions, view_blocks
from .launch import Backend, use_triton
from .masked_weight import apply_mask_, check_mask, kinds
from .moved import launch_moved
from .pattern import Block, Pattern


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(WORDS[tensor.element_size()])


def _pruned_blocks(
    bits: Tensor, mask: Tensor, pattern: Block
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Yield for each region its blocks, ``(down, across, rows, cols)``, and the pruned ones."""
    kept = mask if mask.dtype == torch.bool else mask[:, :: pattern.cols] != 0
    for region in regions(bits.shape, pattern.rows, pattern.cols):
        blocks = view_blocks(bits[region.elements], region.rows, region.cols).transpose(1, 2)
        down, across = kept[region.blocks].logical_not().nonzero().unbind(1)
        yield blocks, (down, across)


def _take_blocks(weight: Tensor, mask: Tensor, pattern: Block, out: Tensor | None) -> Tensor:
    bits = _bits(weight)
    found = list(_pruned_blocks(bits, mask, pattern))
    sizes = [len(at[0]) * blocks[0, 0].numel() for blocks, at in found]
    if out is not None:
        _check_out(out, (sum(sizes),), weight)
    values = bits.new_empty(sum(sizes)) if out is None else _bits(out)
    for (blocks, at), part in zip(found, values.split(sizes) if sizes else (), strict=True):
        # into place: as blocks[at] the values would exist twice
        _gather(blocks, at, part.view(len(at[0]), *blocks.shape[2:]))
    return values


def _gather(blocks: Tensor, at: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Copy the blocks at ``(down, across)`` to ``out``, ``(blocks, rows, cols)``."""
    _, across, rows, cols = blocks.shape
    matrix = blocks.transpose(1, 2)
    if not matrix.is_contiguous():
        torch.ops.aten.index.Tensor_out(blocks, [*at], out=out)
        return
    # whole lines of blocks: on a CPU three times as fast, since it need not look at each element
    row = at[0][:, None] * rows + torch.arange(rows, device=out.device)
    line = row.mul_(across).add_(at[1][:, None]).flatten()
    torch.index_select(matrix.reshape(-1, cols), 0, line, out=out.view(-1, cols))


def _check_out(out: Tensor, shape: Sequence[int], weight: Tensor) -> None:
    if out.dtype != weight.dtype:
        raise TypeError(f"take_pruned: out must be {weight.dtype}, got {out.dtype}")
    if out.shape != torch.Size(shape) or out.device != weight.device:
        raise ValueError(
            f"take_pruned: out must have shape {tuple(shape)} and be on {weight.device}, got "
            f"{tuple(out.shape)} on {out.device}"
        )


def _put_back_blocks(bits: Tensor, values: Tensor, mask: Tensor, pattern: Block) -> None:
    found = list(_pruned_blocks(bits, mask, pattern))
    sizes = [len(at[0]) * blocks[0, 0].numel() for blocks, at in found]
    if values.shape != (sum(sizes),):
        raise ValueError(
            f"put_back_: values must have shape {(sum(sizes),)}, one for each pruned element, "
            f"got {tuple(values.shape)}"
        )
    for (blocks, at), part in zip(found, values.split(sizes) if sizes else (), strict=True):
        blocks[at] = part.view(len(at[0]), *blocks.shape[2:])


def _take_elements(weight: Tensor, mask: Tensor, pattern: Pattern, out: Tensor | None) -> Tensor:
    bits = _bits(weight)
    if out is not None:
        _check_out(out, bits.shape, weight)
    values = torch.empty_like(bits) if out is None else _bits(out)
    if mask.dtype in WORDS.values():
        parts = [(bits, values, mask)]
    else:
        parts = (
            (here, values[at], word_mask(mask[bytes_of(at)], pattern, here.shape, weight.dtype))
            for at in chunks(bits.shape, chunk_of(bits.device))
            for here in (bits[at],)
        )
    for source, target, words in parts:
        torch.bitwise_and(source, words, out=target)  # the kept values
        target ^= source  # the pruned ones
        source ^= target
    return values


def _check_values(values: Tensor, weight: Tensor) -> None:
    if values.dtype != weight.dtype:
        raise TypeError(f"put_back_: values must be {weight.dtype}, got {values.dtype}")
    if values.device != weight.device:
        raise ValueError(f"put_back_: values must be on {weight.device}, got {values.device}")


@torch.no_grad()
def take_pruned(
    weight: Tensor, mask: Tensor, pattern: Pattern, *, out: Tensor | None = None
) -> Tensor:
    """Take the pruned values out of ``weight``, in place: exact +0 stays behind.

    Args:
        weight: float of 16, 32 or 64 bits, shape ``(R, C)``, any strides.
        mask: on the weight's device, compact or words, as for ``apply_mask``.
        pattern: the pattern that the mask belongs to.
        out: memory for the values, of their shape and the weight's dtype: on a CPU fresh memory
            takes longer to get than to fill. Contiguous for ``Block``.

    Returns:
        The values, of the weight's dtype. For ``Block`` one dimension, as long as there are
        pruned elements: the blocks that are whole first, then those at the right edge, at the
        bottom edge, and in the corner; each of these in row-major order, and in each block its
        elements too. For other patterns the weight's shape, with zero bits where kept.

    Raises:
        TypeError: ``out`` has another dtype than ``weight``; or as ``apply_mask``.
        ValueError: ``out`` does not fit; or as ``apply_mask``. The weight is as it was.
    """
    check_mask("take_pruned", weight, mask, pattern)
    if isinstance(pattern, Block):
        values = _take_blocks(weight, mask, pattern, out)
        apply_mask_(weight, mask, pattern)
    else:
        values = _take_elements(weight, mask, pattern, out)
    return values.view(weight.dtype)


@torch.no_grad()
def put_back_(weight: Tensor, values: Tensor, mask: Tensor, pattern: Pattern) -> None:
    """Undo ``take_pruned``, in place and bit for bit; kept elements stay as they are.

    Args:
        weight: float of 16, 32 or 64 bits, shape ``(R, C)``, any strides. For other patterns
            than ``Block`` its pruned elements must be +0, as ``apply_mask_`` leaves them: the
            values are ORed to them.
        values: what ``take_pruned`` returned for this mask, contiguous for ``Block``.
        mask: the same mask, compact or words.
        pattern: the pattern that the mask belongs to.

    Raises:
        TypeError: ``values`` has another dtype than ``weight``; or as ``apply_mask``.
        ValueError: ``values`` has another shape or device; or as ``apply_mask``.
    """
    check_mask("put_back_", weight, mask, pattern)
    _check_values(values, weight)
    if isinstance(pattern, Block):
        _put_back_blocks(_bits(weight), _bits(values), mask, pattern)
    elif values.shape == weight.shape:
        bits = _bits(weight)
        bits |= _bits(values)
    else:
        raise ValueError(
            f"put_back_: values must have shape {tuple(weight.shape)}, got {tuple(values.shape)}"
        )


@torch.no_grad()
def take_all_pruned(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    pattern: Pattern,
    *,
    pruned: Sequence[int],
    out: Sequence[Tensor | None],
    backend: Backend = "auto",
) -> list[Tensor]:
    """Take the pruned values out of several weights, as ``take_pruned``.

    On a GPU two launches for all of one width of element; of other patterns than ``Block`` one.
    Nothing waits for the device, so the caller answers for what ``pruned`` says.

    Args:
        weights: as ``take_pruned``'s, on one device.
        masks: one a weight; all compact, or all words.
        pattern: that of all masks.
        pruned: how many elements each mask prunes.
        out: memory for the values of each, as ``take_pruned``'s, or None.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        As ``take_pruned``, of each.

    Raises:
        TypeError, ValueError, RuntimeError: as ``take_pruned``. On a GPU all weights are then as
            they were.
    """
    if not _launches(masks, backend):
        groups = zip(weights, masks, out, strict=True)
        return [take_pruned(w, mask, pattern, out=memory) for w, mask, memory in groups]
    for first, *_ in kinds(weights, masks):
        check_mask("take_pruned", weights[first], masks[first], pattern)
    values, is_flat = [], isinstance(pattern, Block)
    for weight, count, memory in zip(weights, pruned, out, strict=True):
        shape = (count,) if is_flat else weight.shape
        if memory is not None:
            _check_out(memory, shape, weight)
        elif is_flat:
            memory = weight.new_empty(shape)
        else:
            memory = torch.empty_like(weight)
        values.append(memory)
    launch_moved(weights, values, masks, pattern.rows, pattern.cols, take=True)
    torch.autograd.graph.increment_version([*weights, *values])
    return values


@torch.no_grad()
def put_all_back_(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    pattern: Pattern,
    *,
    backend: Backend = "auto",
) -> None:
    """Undo ``take_all_pruned``, in as many launches.

    Args:
        weights, values, masks, pattern, backend: as ``put_back_``'s and ``take_all_pruned``'s. On
            a GPU values of blocks that are not as many as the mask prunes are not noticed.

    Raises:
        TypeError, ValueError, RuntimeError: as ``put_back_``.
    """
    if not _launches(masks, backend):
        for weight, own, mask in zip(weights, values, masks, strict=True):
            put_back_(weight, own, mask, pattern)
        return
    for first, *_ in kinds(weights, masks):
        check_mask("put_back_", weights[first], masks[first], pattern)
    for weight, own in zip(weights, values, strict=True):
        _check_values(own, weight)
        if not isinstance(pattern, Block) and own.shape != weight.shape:
            raise ValueError(
                f"put_back_: values must have shape {tuple(weight.shape)}, got {tuple(own.shape)}"
            )
    launch_moved(weights, values, masks, pattern.rows, pattern.cols, take=False)
    torch.autograd.graph.increment_version(weights)


def _launches(masks: Sequence[Tensor], backend: Backend) -> bool:
    return bool(masks) and (
        masks[0].dtype not in WORDS.values() and use_triton("take_pruned", backend, masks[0])
    )
