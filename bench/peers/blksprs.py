"""blksprs, a Triton library of block-sparse matrices: ``matmul`` of three sparse operands."""

# a peer need not be installed
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def available(device: torch.device, block: tuple[int, int]) -> str | None:
    """Return why blksprs cannot be measured, or None."""
    if importlib.util.find_spec("blksprs") is None:
        return "blksprs is not installed (pip install blksprs)"
    if device.type != "cuda":
        return "blksprs runs on GPUs only"
    return None if block[0] == block[1] else "blksprs takes square blocks only"


def linear(
    x: Tensor, masked: Tensor, side: int
) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Return the product with the nonzero blocks of ``masked``, converted beforehand.

    All operands are sparse to blksprs; activations and result have every block. The second
    function makes the result a matrix, which is not timed: a user would go on with blocks.
    """
    import blksprs as bs

    weight = masked.T.contiguous()[None]
    layout = bs.layouting.build_sparsity_layout(weight, side)
    sparse = bs.ops.to_sparse(weight, layout, side)
    tokens, inputs, outputs = x.shape[0] // side, x.shape[1] // side, masked.shape[0] // side
    all_x = torch.ones(1, tokens, inputs, dtype=torch.bool, device=x.device)
    all_y = torch.ones(1, tokens, outputs, dtype=torch.bool, device=x.device)
    blocks = bs.ops.to_sparse(x[None], all_x, side)

    return (
        lambda: bs.ops.matmul(blocks, all_x, sparse, layout, all_y, side),
        lambda y: bs.ops.to_dense(y, all_y, side)[0],
    )
