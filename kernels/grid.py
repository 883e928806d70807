"""Grids: how blocks tile a matrix whose sides need not be multiples of theirs.

A block is ``rows`` x ``cols`` elements; those at the right and the bottom edge have the elements
that exist. All functions work on any device and wait for none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@overload
def ceil_div(a: int, b: int) -> int: ...
@overload
def ceil_div(a: np.ndarray, b: np.ndarray | int) -> np.ndarray: ...
@overload
def ceil_div(a: int, b: np.ndarray) -> np.ndarray: ...
def ceil_div(a: Any, b: Any) -> Any:
    """Return ``a / b``, rounded up: ``triton.cdiv`` takes microseconds."""
    return -(-a // b)


def block_counts(shape: Sequence[int], rows: int, cols: int) -> tuple[int, int]:
    """Return how many blocks a matrix of ``shape`` has down and across."""
    return ceil_div(shape[0], rows), ceil_div(shape[1], cols)


def side_lengths(
    shape: Sequence[int], rows: int, cols: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return how many elements the blocks of a matrix have down and across.

    Returns:
        int64 ``(down, 1)`` and ``(across,)``: their product is the number of elements of each
        block.
    """
    tall, wide = (
        torch.arange(side, 0, -step, device=device).clamp_(max=step)
        for side, step in ((shape[0], rows), (shape[1], cols))
    )
    return tall[:, None], wide


def expand_blocks(grid: Tensor, rows: int, cols: int, shape: Sequence[int]) -> Tensor:
    """Write ``grid``, one value a block, out in full: a new tensor of ``shape``."""
    wide = grid.repeat_interleave(cols, 1)[:, : shape[1]]
    return wide.repeat_interleave(rows, 0)[: shape[0]]


def view_blocks(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """View a matrix of whole blocks as ``(down, rows, across, cols)``, whatever its strides."""
    down, across = matrix.shape[0] // rows, matrix.shape[1] // cols
    return matrix.unflatten(1, (across, cols)).unflatten(0, (down, rows))


def pad_to_blocks(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """Return a matrix, zeros added below and on the right, as ``(down, rows, across, cols)``; a
    view of it where there are none to add.
    """
    (R, C), (down, across) = matrix.shape, block_counts(matrix.shape, rows, cols)
    added = across * cols - C, down * rows - R
    # padding by nothing would copy
    padded = functional.pad(matrix, (0, added[0], 0, added[1])) if any(added) else matrix
    return view_blocks(padded, rows, cols)


class Region(NamedTuple):
    """A part of a matrix that blocks of one size tile exactly."""

    elements: tuple[slice, slice]  # of the matrix
    blocks: tuple[slice, slice]  # of the grid
    rows: int  # sides of these blocks
    cols: int


def regions(shape: Sequence[int], rows: int, cols: int) -> Iterator[Region]:
    """Cut a matrix into those of its interior, right edge, bottom edge and corner that exist."""
    down, across = (
        [
            (slice(0, whole * step), slice(0, whole), step),
            (slice(whole * step, side), slice(whole, whole + 1), side - whole * step),
        ]
        for side, step in ((shape[0], rows), (shape[1], cols))
        for whole in (side // step,)
    )
    for elements_r, blocks_r, height in down:
        for elements_c, blocks_c, width in across:
            if elements_r.stop > elements_r.start and elements_c.stop > elements_c.start:
                yield Region((elements_r, elements_c), (blocks_r, blocks_c), height, width)
