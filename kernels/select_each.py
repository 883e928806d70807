"""Exact selection in each tensor of a list by itself: one launch for all that are small.

What ``select`` finds for a pool, here for pools of one tensor each: the scores of the blocks of
every weight, when each weight is pruned to the level by itself. A program searches one tensor,
which lies in the second-level cache, two bits of the pattern a pass: sixteen passes over some
10,000 scores take less time than one launch. Tensors beyond ``MOST`` go to ``select``.

Reading order: reference -> kernel -> launcher -> operator -> public function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .launch import FUSED, Backend, is_plain, on_device, tl, triton, use_triton
from .search import Threshold
from .select import select
from .table import addresses, alike, device_table

MOST = 2**18  # elements: sixteen passes over them take one multiprocessor a quarter millisecond
BLOCK = 4096
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def select_each_reference(
    tensors: Sequence[Tensor], ks: Sequence[int], scales: Tensor | None, backend: Backend = "torch"
) -> Threshold:
    """Define the semantics: ``select`` of each."""
    found = []
    for i, (tensor, k) in enumerate(zip(tensors, ks, strict=True)):
        scale = None if scales is None else scales[i : i + 1]
        found.append(select([tensor], k, scales=scale, backend=backend))
    return Threshold(*map(torch.stack, zip(*found, strict=True)))


# A table's columns: first program, which nobody reads, address, elements, k, and the place in the
# list.


@triton.jit
def bounds(lo, n):
    """Return how wide a part is, and the three patterns that pass ``n`` compares keys with.

    They part [lo, lo + 4 parts) in four; all keys before ``lo`` are fewer than k. The first pass
    parts by the highest of 31 bits alone, and by infinity; pass 16 counts the keys up to the one
    that was found.
    """
    part = tl.full((), 1, tl.int32) << tl.maximum(30 - 2 * n, 0)
    last = n == 16
    one = lo + part
    two = tl.where((n == 0) | last, one, one + part)
    three = tl.where(n == 0, 0x7F800000, tl.where(last, one, two + part))
    return part, one, two, three


@triton.jit
def _select_each_kernel(
    table_ptr,
    scales_ptr,
    value_ptr,
    keep_ties_ptr,
    nonfinite_ptr,
    DTYPE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = table_ptr + tl.program_id(0)
    x_ptr = tl.load(entry + N).to(tl.pointer_type(DTYPE))
    size = tl.load(entry + 2 * N).to(tl.int32)
    k = tl.load(entry + 3 * N).to(tl.int32)
    place = tl.load(entry + 4 * N)
    scale = 1.0
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + place)

    lo = tl.zeros((), tl.int32)
    upto = tl.zeros((), tl.int32)
    nonfinite = tl.zeros((), tl.int32)
    for n in range(17):
        part, one, two, three = bounds(lo, n)
        at_one = tl.zeros((BLOCK,), tl.int32)
        at_two = tl.zeros((BLOCK,), tl.int32)
        at_three = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, size, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, mask=offs < size, other=float("nan")).to(tl.float32)
            if scales_ptr is not None:
                x *= scale
            key = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # [BLOCK]; NaN is above every bound
            at_one += (key < one).to(tl.int32)
            at_two += (key < two).to(tl.int32)
            at_three += (key < three).to(tl.int32)
        below_one, below_two = tl.sum(at_one), tl.sum(at_two)
        below_three = tl.sum(at_three)
        if n == 0:
            nonfinite = size - below_three
            lo = tl.where(below_one < k, part, lo)
        elif n == 16:
            upto = below_one
        else:
            steps = (below_one < k).to(tl.int32) + (below_two < k).to(tl.int32)
            lo += part * (steps + (below_three < k).to(tl.int32))
    value = lo.to(tl.float32, bitcast=True)
    tl.store(value_ptr + place, tl.where(k > 0, value, float("-inf")))
    tl.store(keep_ties_ptr + place, tl.where(k > 0, upto - k, 0).to(tl.int64))
    tl.store(nonfinite_ptr + place, nonfinite.to(tl.int64))


def _launch(
    tensors: Sequence[Tensor], ks: Sequence[int], scales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    first = tensors[0]
    value = first.new_empty(len(tensors), dtype=torch.float32)
    keep_ties, nonfinite = (first.new_empty(len(tensors), dtype=torch.int64) for _ in range(2))
    sizes = np.array([tensor.numel() for tensor in tensors])
    with on_device(first):
        for dtype, places in alike(tensor.dtype for tensor in tensors).items():
            own = addresses(tensors[place] for place in places)
            columns = (1, own, sizes[places], np.array(ks)[places], places)
            table, programs = device_table(first.device, columns)
            _select_each_kernel[(programs,)](
                table, scales, value, keep_ties, nonfinite,
                DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), N=table.shape[1],
                BLOCK=BLOCK, num_warps=16,
            **FUSED,)  # fmt: skip
    return value, keep_ties, nonfinite


_op = torch.library.custom_op("triton_sparsity::select_each", _launch, mutates_args=())


@_op.register_fake
def _(tensors, ks, scales) -> tuple[Tensor, Tensor, Tensor]:
    value = tensors[0].new_empty(len(tensors), dtype=torch.float32)
    counts = [tensors[0].new_empty(len(tensors), dtype=torch.int64) for _ in range(2)]
    return value, *counts


def select_each(
    tensors: Sequence[Tensor],
    ks: Sequence[int],
    *,
    scales: Tensor | None = None,
    backend: Backend = "auto",
) -> Threshold:
    """Return the exact k-th smallest of ``float32(|t|) * scale`` in each tensor by itself.

    On a GPU one launch for those up to ``MOST`` elements; nothing waits for the device.

    Args:
        tensors: one or more, as ``select``'s.
        ks: one a tensor, from 0 to its number of elements.
        scales: as ``select``'s.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``Threshold`` of three vectors ``(len(tensors),)``, each element as ``select``'s.

    Raises:
        ValueError: as ``select``.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    if not tensors or len(tensors) != len(ks):
        raise ValueError(f"select_each: ks must be {len(tensors)}, at least 1, got {len(ks)}")
    large = set(range(len(tensors)))
    if use_triton("select_each", backend, tensors[0]):
        large = {i for i, t in enumerate(tensors) if t.numel() > MOST or t.dtype not in FLOATS}
    found: Threshold | None = None
    if len(large) < len(tensors):
        for tensor, k in zip(tensors, ks, strict=True):
            if not 0 <= k <= tensor.numel():
                raise ValueError(
                    f"select_each: k must be from 0 to {tensor.numel()} elements, got {k}"
                )
        here = [tensor[:0] if i in large else tensor for i, tensor in enumerate(tensors)]
        counts = [0 if i in large else k for i, k in enumerate(ks)]
        flat = [tensor.detach().contiguous() for tensor in here]
        scales = None if scales is None else scales.contiguous()
        searched = _launch if is_plain(*flat) else _op
        found = Threshold(*searched(flat, counts, scales))
        if not large:
            return found
    places = sorted(large)
    own = None if scales is None else scales[places]
    rest = select_each_reference(
        [tensors[i] for i in places], [ks[i] for i in places], own, backend
    )
    if found is None:
        return rest
    at = torch.tensor(places, device=tensors[0].device)
    for target, source in zip(found, rest, strict=True):
        target[at] = source
    return found
