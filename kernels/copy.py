"""Copies of a list of masks into memory that is there, in one launch.

Reading order: kernel -> launcher -> public function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .grid import ceil_div
from .launch import FUSED, Backend, on_device, tl, triton, use_triton
from .table import addresses, device_table, find_tensor

BYTES = 8192  # that a program copies


# A table's columns: first program, addresses of source and target, bytes.


@triton.jit
def _copy_kernel(table_ptr, ALIGNED: tl.constexpr, N: tl.constexpr, BYTES: tl.constexpr):
    entry = table_ptr + find_tensor(table_ptr, N)
    offset = (tl.program_id(0) - tl.load(entry)) * BYTES
    source_ptr = tl.load(entry + N).to(tl.pointer_type(tl.uint8)) + offset
    target_ptr = tl.load(entry + 2 * N).to(tl.pointer_type(tl.uint8)) + offset
    if ALIGNED:
        source_ptr = tl.multiple_of(source_ptr, 16)
        target_ptr = tl.multiple_of(target_ptr, 16)
    left = tl.load(entry + 3 * N) - offset
    offs = tl.arange(0, BYTES)
    if left >= BYTES:  # a predicate a byte would split the accesses
        tl.store(target_ptr + offs, tl.load(source_ptr + offs))  # [BYTES]
    else:
        values = tl.load(source_ptr + offs, mask=offs < left, other=0)  # [BYTES]
        tl.store(target_ptr + offs, values, mask=offs < left)


def copy_all_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], *, backend: Backend = "auto"
) -> None:
    """Copy every mask to the target at its place, in place. On a GPU one launch.

    Args:
        targets, sources: bool or uint8, contiguous, on one device; each pair of one shape.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: shapes or dtypes differ, or a tensor has gaps.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    for target, source in zip(targets, sources, strict=True):
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(
                f"copy_all_: source must be {target.dtype} {tuple(target.shape)}, got "
                f"{source.dtype} {tuple(source.shape)}"
            )
        if not (target.is_contiguous() and source.is_contiguous()):
            raise ValueError(f"copy_all_: masks must be contiguous, got strides {source.stride()}")
    if not targets:
        return
    if not use_triton("copy_all_", backend, targets[0]):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return
    at, to = addresses(sources), addresses(targets)
    sizes = np.where(at == to, 0, [target.numel() for target in targets])
    if not sizes.any():
        return
    with on_device(targets[0]):
        table, programs = device_table(targets[0].device, (ceil_div(sizes, BYTES), at, to, sizes))
        aligned = not ((at | to) % 16).any()
        _copy_kernel[(programs,)](
            table,
            ALIGNED=aligned,
            N=table.shape[1],
            BYTES=BYTES,
            **FUSED,
        )
    torch.autograd.graph.increment_version(targets)
