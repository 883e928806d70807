"""A read of the same data again and again: how fast a GPU's L2 cache is.

No operation of the product. Block-sparse products read far more from the L2 than from memory, so
its bandwidth is their ceiling where blocks are small, and nothing but a measurement tells it.

Cost floor: ``passes * numel * itemsize`` bytes over the L2's bandwidth. The loads pass the L1 by
(``.cg``); a thread has four of 16 bytes in flight, a multiprocessor 32 warps. No custom operator:
nothing differentiates it or captures it.

Reading order: reference -> kernel -> launcher -> public function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import ceil_div
from .launch import FUSED, Backend, on_device, tl, triton, use_triton
from .tiles import device_of

TILE = 4096  # elements: at 8 warps, 16 a thread
PER_PROCESSOR = 4  # programs, 32 warps of the 64 that fit


def read_repeatedly_reference(data: Tensor, passes: int) -> Tensor:
    """Define the result: the sum of the data over all passes, in wrapping int32."""
    return _wrapped(data.sum(dtype=torch.int64) * passes)


def _wrapped(total: Tensor) -> Tensor:
    return (torch.remainder(total + 2**31, 2**32) - 2**31).to(torch.int32)


@triton.jit(do_not_specialize=["tiles", "reads"])
def _read_kernel(data_ptr, sums_ptr, numel, tiles, reads, TILE: tl.constexpr):
    """Read the tiles in turn, ``reads`` in all, shared out among the programs."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    acc = tl.zeros((TILE,), tl.int32)
    for read in range(program, reads, programs):
        offs = read % tiles * TILE + tl.arange(0, TILE)
        acc += tl.load(data_ptr + offs, mask=offs < numel, other=0, cache_modifier=".cg")  # [TILE]
    tl.store(sums_ptr + program, tl.sum(acc.to(tl.int64)))


def _launch(data: Tensor, passes: int) -> Tensor:
    tiles = ceil_div(data.numel(), TILE)
    programs = device_of(data).processors * PER_PROCESSOR
    sums = torch.empty(programs, dtype=torch.int64, device=data.device)
    with on_device(data):
        _read_kernel[(programs,)](
            data,
            sums,
            data.numel(),
            tiles,
            tiles * passes,
            TILE=TILE,
            num_warps=8,
            **FUSED,
        )
    return _wrapped(sums.sum())


def read_repeatedly(data: Tensor, passes: int, *, backend: Backend = "auto") -> Tensor:
    """Read ``data`` ``passes`` times and return the sum of all that was read.

    Args:
        data: int32, contiguous, fewer than 2^31 elements.
        passes: at least 1.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, which reads it once.

    Returns:
        0-d int32, wrapped around.

    Raises:
        ValueError: the data or the number of passes is not as above.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    if data.dtype != torch.int32 or not data.is_contiguous() or data.numel() >= 2**31:
        raise ValueError(
            "read_repeatedly: data must be contiguous int32 of fewer than 2^31 elements, got "
            f"{data.dtype} {tuple(data.shape)}"
        )
    if passes < 1:
        raise ValueError(f"read_repeatedly: passes must be at least 1, got {passes}")
    if use_triton("read_repeatedly", backend, data):
        return _launch(data, passes)
    return read_repeatedly_reference(data, passes)
