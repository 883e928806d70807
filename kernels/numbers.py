"""Uniform random numbers of the groups of a weight, made where the weight is.

They are those of ``draw.uniform``: a function of seed, draw, stream and group alone, on a GPU of
Philox counters, so that nothing is drawn on the host and every run and rank has the same.

Reading order: kernel -> launcher -> public function; the reference is ``draw.uniform``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .draw import LANES, uniform
from .grid import ceil_div
from .launch import on_device, takes_kernels, tl, triton

BLOCK = 1024  # quads of groups of a program


@triton.jit(do_not_specialize=["low", "high", "number", "stream"])
def _number_kernel(
    out_ptr, R, C, quads, low, high, number, stream, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    quad = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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


def _launch(
    shape: tuple[int, int], seed: int, number: int, stream: int, device: torch.device
) -> Tensor:
    R, C = shape
    out = torch.empty(shape, dtype=torch.float32, device=device)
    quads = ceil_div(R, LANES) * C
    if out.numel():
        with on_device(out):
            # words as signed numbers of 64 bits, whatever their value
            words = [word + 2**32 for word in (seed & 0xFFFFFFFF, seed >> 32, number, stream)]
            _number_kernel[(ceil_div(quads, BLOCK),)](
                out, R, C, quads, *words, BLOCK=BLOCK, LANES=LANES
            )
    return out


def uniform_numbers(
    shape: tuple[int, int], *, seed: int, number: int, stream: int, device: torch.device
) -> Tensor:
    """Return float32 numbers in (0, 1), on ``device``: a pure function of what is given.

    A CPU's are others than a GPU's, see ``draw.py``. Nothing waits for the device.

    Args:
        shape: of the grid of groups.
        seed: not negative; of it 63 bits count.
        number: of the draw, from 0 to 2^32 - 1.
        stream: which weight, from 0 to 2^32 - 1.
        device: where the numbers are wanted.
    """
    seed %= 2**63
    if takes_kernels(device):
        return _launch(shape, seed, number, stream, device)
    random = torch.tensor([seed, number], dtype=torch.int64, device="cpu")
    return uniform(random, stream, shape).to(device)
