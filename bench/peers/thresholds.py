"""The k-th smallest magnitude with torch's own functions."""

from __future__ import annotations

from torch import Tensor


def by_sort(values: Tensor, k: int) -> Tensor:
    return values.abs().flatten().sort().values[k - 1]


def by_topk(values: Tensor, k: int) -> Tensor:
    """The larger part is looked for, if that is the smaller number of elements."""
    flat = values.abs().flatten()
    if 2 * k <= flat.numel():
        return flat.topk(k, largest=False, sorted=False).values.amax()
    return flat.topk(flat.numel() - k + 1, sorted=False).values.amin()


def by_kthvalue(values: Tensor, k: int) -> Tensor:
    return values.abs().flatten().kthvalue(k).values
