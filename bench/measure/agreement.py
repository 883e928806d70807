"""Whether a result agrees with its reference; what disagrees is told in words.

Matrix products are compared with float64 (of 16-bit operands with float32, which is as good and
does not take a GPU for ever), and no element may be further off than twice what plain torch is in
the same dtype, plus four steps of rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from ...kernels.pattern import NM


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


def gradient_of(leaf: Tensor) -> Tensor:
    """Return the gradient of what was in a backward pass."""
    assert leaf.grad is not None
    return leaf.grad


def first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def worse_tuples(weight: Tensor, keep: Tensor, pattern: NM) -> str | None:
    """Say how many tuples keep another number than n, or less magnitude than they might.

    Of 4 x 4 tiles both are asked of rows and columns, and the best is found by trying all.

    Args:
        weight: float ``(R, C)``.
        keep: bool of the same shape.
        pattern: its n, its m, and whether rows and columns count.
    """
    n, m = pattern.n, pattern.m
    for side, matrix in (("", keep), ("transposed ", keep.T))[: 1 + pattern.transposable]:
        if wrong := int((matrix.unflatten(1, (-1, m)).sum(2) != n).sum()):
            return f"{wrong} {side}tuples keep another number than {n}"
    if not pattern.transposable:
        size = weight.float().abs().unflatten(1, (-1, m))
        kept = keep.unflatten(1, (-1, m))
        least = size.masked_fill(~kept, float("inf")).amin(2)
        wrong = int((size.masked_fill(kept, -1).amax(2) > least).sum())
        return f"{wrong} tuples keep a smaller magnitude" if wrong else None
    rows = [row for row in product((0, 1), repeat=4) if sum(row) == 2]
    tiles = torch.tensor(list(product(rows, repeat=4)), device=weight.device)
    tiles = tiles[(tiles.sum(1) == 2).all(1)].flatten(1).double()

    def tiled(values: Tensor) -> tuple[Tensor, ...]:
        grid = values.double().unflatten(1, (-1, 4)).unflatten(0, (-1, 4))
        # 90 sums a tile: of so many tiles at a time they fit in memory
        return grid.movedim(2, 1).reshape(-1, 16).split(2**18)

    wrong = 0
    for sizes, kept in zip(tiled(weight.abs()), tiled(keep), strict=True):
        best = (sizes @ tiles.T).amax(1)
        # sums are made in float32
        wrong += int(((sizes * kept).sum(1) < best * (1 - 1e-5)).sum())
    return f"{wrong} tiles keep a smaller magnitude" if wrong else None
