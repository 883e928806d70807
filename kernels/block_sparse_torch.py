"""Block-sparse linear in plain torch: how a machine without a GPU gains from pruned blocks.

A block row's kept columns of the activations are gathered side by side, so that one GEMM does all
of its blocks; for the input gradient, a block column's. A gathered element is then used as often
as the block is wide, so there is a density, the higher the wider the block, above which a dense
GEMM with the masked weight is the faster one: ``dispatch.py`` knows it.

Reading order: gathering -> the three products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .topology import Topology


def _inner(blocks: Tensor, length: int, side: int) -> Tensor:
    """Drop a narrow last block from rising ``blocks``."""
    narrow = length % side and len(blocks) and int(blocks[-1]) == length // side
    return blocks[:-1] if narrow else blocks


def _whole(matrix: Tensor, side: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return a view of the whole blocks of ``matrix`` along ``dim``, and the narrow last one."""
    full = matrix.shape[dim] // side
    whole, edge = matrix.split([full * side, matrix.shape[dim] - full * side], dim)
    return whole.unflatten(dim, (full, side)), edge


def _take(matrix: Tensor, blocks: Tensor, side: int, dim: int) -> Tensor:
    """Return the block rows (0) or columns (1) ``blocks`` of ``matrix``, one after the other."""
    inner = _inner(blocks, matrix.shape[dim], side)
    whole, edge = _whole(matrix, side, dim)
    taken = whole.index_select(dim, inner).flatten(dim, dim + 1)
    return taken if len(inner) == len(blocks) else torch.cat([taken, edge], dim)


def _put(matrix: Tensor, blocks: Tensor, side: int, dim: int, values: Tensor) -> None:
    """Write ``values`` where ``_take`` would read them."""
    inner = _inner(blocks, matrix.shape[dim], side)
    whole, edge = _whole(matrix, side, dim)
    wide = len(inner) * side
    new, rest = values.split([wide, values.shape[dim] - wide], dim)
    whole.index_copy_(dim, inner, new.unflatten(dim, (len(inner), side)))
    if len(inner) < len(blocks):
        edge.copy_(rest)


def _lines(tasks: Tensor, index: Tensor, side: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield each line's slice of its side of the weight, and its kept blocks."""
    index = index.long()
    for line, first, count in tasks.tolist():
        yield slice(line * side, (line + 1) * side), index[first : first + count]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, topology: Topology, rows: int, cols: int
) -> Tensor:
    """Return ``x (W * M)^T + b``, shape ``(T, R)``."""
    y = x.new_empty((x.shape[0], weight.shape[0]))
    for part, blocks in _lines(topology.row_tasks, topology.col_index, rows):
        w = _take(weight[part], blocks, cols, 1)
        torch.mm(_take(x, blocks, cols, 1), w.T, out=y[:, part])
    return y if bias is None else y.add_(bias)


def dgrad(grad: Tensor, weight: Tensor, topology: Topology, rows: int, cols: int) -> Tensor:
    """Return ``grad (W * M)``, shape ``(T, C)``."""
    dx = grad.new_empty((grad.shape[0], weight.shape[1]))
    for part, blocks in _lines(topology.col_tasks, topology.row_index, cols):
        w = _take(weight[:, part], blocks, rows, 0)
        torch.mm(_take(grad, blocks, rows, 1), w, out=dx[:, part])
    return dx


def wgrad(grad: Tensor, x: Tensor, topology: Topology, rows: int, cols: int, out: Tensor) -> None:
    """Write ``(grad^T x) * M`` to ``out``, shape ``(R, C)``."""
    out.zero_()
    if rows >= cols:
        for part, blocks in _lines(topology.row_tasks, topology.col_index, rows):
            _put(out[part], blocks, cols, 1, grad[:, part].T @ _take(x, blocks, cols, 1))
    else:
        for part, blocks in _lines(topology.col_tasks, topology.row_index, cols):
            _put(out[:, part], blocks, rows, 0, _take(grad, blocks, rows, 1).T @ x[:, part])
