"""Whether a result agrees with its reference; what disagrees is told in words.

Matrix products are compared with float64 (of 16-bit operands with float32, which is as good and
does not take a GPU for ever), and no element may be further off than twice what plain torch is in
the same dtype, plus four steps of rounding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def disagreement(
    actual: Tensor, eager: Tensor, exact: Tensor, *, slack: float = 2.0
) -> str | None:
    """Say how far ``actual`` is off, if it is further off than plain torch might be.

    Args:
        eager: the same result by plain torch in the same dtype.
        exact: the same in ``exact_dtype``.
        slack: how many times plain torch's largest error is allowed.
    """
    if actual.shape != exact.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    error = (actual.double() - exact).abs().amax().item()
    usual = (eager.double() - exact).abs().amax().item()
    largest = exact.abs().amax().item()
    limit = slack * usual + 4 * torch.finfo(actual.dtype).eps * largest
    # a NaN compares false
    if error <= limit:
        return None
    return f"off by {error:.3g}, plain torch by {usual:.3g}, largest value {largest:.3g}"


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype whose rounding is nothing beside that of ``dtype``."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def difference(name: str, actual: Tensor, wanted: Tensor) -> str | None:
    """Say in how many elements two tensors differ, bit for bit."""
    if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        return f"{name} is {actual.dtype} {tuple(actual.shape)}"
    wrong = int((actual != wanted).sum())
    return f"{name}: {wrong} of {wanted.numel()} elements differ" if wrong else None


def first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)
