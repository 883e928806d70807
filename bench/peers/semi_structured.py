"""2:4 sparsity by the tensor cores, through torch's cuSPARSELt binding: half of every four."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def available(device: torch.device) -> str | None:
    """Return why 2:4 products cannot be measured, or None."""
    if device.type != "cuda":
        return "2:4 products run on GPUs only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "2:4 products need compute capability 8.0"
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    return None


def prune(weight: Tensor) -> Tensor:
    """Return ``weight`` with the two smaller magnitudes of every four inputs zero."""
    fours = weight.unflatten(1, (-1, 4))
    small = fours.abs().topk(2, dim=2, largest=False).indices
    return fours.scatter(2, small, 0).flatten(1)


def linear(x: Tensor, pruned: Tensor) -> Callable[[], Tensor]:
    """Return the product with a 2:4 weight, packed beforehand."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = False
    weight = to_sparse_semi_structured(pruned)
    return lambda: F.linear(x, weight)
