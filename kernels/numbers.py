"""Uniform random numbers of the groups of a weight, made where the weight is.

They are those of ``draw.uniform``: a function of seed, draw, stream and group alone, on a GPU of
Philox counters, so that nothing is drawn on the host and every run and rank has the same.

Reading order: kernel -> public function; the reference is ``draw.uniform``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .draw import LANES, uniform
from .grid import ceil_div
from .launch import FUSED, on_device, takes_kernels, tl, triton
from .table import addresses, device_table, find_tensor

BLOCK = 1024  # quads of groups of a program


# A table's columns: first program, the numbers' address, groups down and across, quads, stream.


@triton.jit(do_not_specialize=["low", "high", "number"])
def _number_kernel(
    table_ptr,
    low,
    high,
    number,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    entry = table_ptr + find_tensor(table_ptr, N)
    out_ptr = tl.load(entry + N).to(tl.pointer_type(tl.float32))
    R, C = tl.load(entry + 2 * N), tl.load(entry + 3 * N)
    quads, stream = tl.load(entry + 4 * N), tl.load(entry + 5 * N)
    quad = (tl.program_id(0) - tl.load(entry)) * BLOCK + tl.arange(0, BLOCK)
    c0 = quad.to(tl.uint32)
    zero = c0 * 0
    seed = (high.to(tl.uint64) << 32) | (low.to(tl.uint64) & 0xFFFFFFFF)
    b0, b1, b2, b3 = tl.philox(
        seed, c0, zero, zero + number.to(tl.uint32), zero + stream.to(tl.uint32)
    )
    # a quad is of four consecutive rows
    row, col = quad // C * LANES, quad % C
    for lane in tl.static_range(LANES):
        bits = b0 if lane == 0 else b1 if lane == 1 else b2 if lane == 2 else b3
        whole = tl.minimum(tl.maximum((bits >> 8).to(tl.int32), 17), 16777199)
        u = whole.to(tl.float32) * 5.9604644775390625e-08
        inside = (quad < quads) & (row + lane < R)
        tl.store(out_ptr + (row + lane) * C + col, u, mask=inside)  # [BLOCK]


def uniform_numbers(
    shapes: Sequence[tuple[int, int]],
    *,
    seed: int,
    number: int,
    streams: Sequence[int],
    device: torch.device,
) -> list[Tensor]:
    """Return float32 numbers in (0, 1), on ``device``: a pure function of what is given.

    A CPU's are others than a GPU's, see ``draw.py``. On a GPU all are one launch, for which
    nothing waits.

    Args:
        shapes: of each weight's grid of groups.
        seed: not negative; of it 63 bits count.
        number: of the draw, from 0 to 2^32 - 1.
        streams: which weight each is, from 0 to 2^32 - 1.
        device: where the numbers are wanted.
    """
    seed %= 2**63
    if not takes_kernels(device):
        random = torch.tensor([seed, number], dtype=torch.int64, device="cpu")
        pairs = zip(streams, shapes, strict=True)
        return [uniform(random, stream, shape).to(device) for stream, shape in pairs]
    out = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    rows, cols = np.array(shapes, np.int64).reshape(-1, 2).T
    quads = ceil_div(rows, LANES) * cols
    if quads.any():
        with on_device(out[0]):
            columns = ceil_div(quads, BLOCK), addresses(out), rows, cols, quads, streams
            table, programs = device_table(out[0].device, columns)
            # words as signed numbers of 64 bits, whatever their value
            words = [word + 2**32 for word in (seed & 0xFFFFFFFF, seed >> 32, number)]
            _number_kernel[(programs,)](
                table,
                *words,
                N=table.shape[1],
                BLOCK=BLOCK,
                LANES=LANES,
                **FUSED,
            )
    return out
