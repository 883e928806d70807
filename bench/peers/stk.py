"""STK, MegaBlocks' block-sparse products: ``dds``, dense = dense x sparse, of 128-blocks."""

# a peer need not be installed
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128


def available(device: torch.device, block: tuple[int, int]) -> str | None:
    """Return why STK cannot be measured, or None."""
    if importlib.util.find_spec("stk") is None:
        return "stk is not installed (pip install stanford-stk)"
    if device.type != "cuda":
        return "stk runs on GPUs only"
    return None if block == (BLOCK, BLOCK) else "stk takes blocks of 128x128 only"


def linear(x: Tensor, masked: Tensor) -> Callable[[], Tensor]:
    """Return the product with the nonzero blocks of ``masked``, converted beforehand."""
    import stk

    weight = stk.ops.to_sparse(masked.T.contiguous(), BLOCK)
    return lambda: stk.ops.dds(x, weight)
