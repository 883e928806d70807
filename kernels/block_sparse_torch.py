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


def _lines(tasks: Tensor, index: Tensor, side: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield each line's slice of its side of the weight, and its kept blocks."""
    index = index.long()
    for line, first, count in tasks.tolist():
        yield slice(line * side, (line + 1) * side), index[first : first + count]


def _buffer(like: Tensor, tasks: Tensor, side: int, other: int) -> Tensor:
    """Return memory for the blocks of any line: fresh memory a line would cost more than they."""
    # the task with the most entries comes first
    most = int(tasks[0, 2]) if len(tasks) else 0
    return like.new_empty(most * side * other)


def _in_blocks(matrix: Tensor, side: int, dim: int) -> Tensor:
    """Return a view in which ``dim``, of whole blocks, is two: the blocks, and within a block."""
    shape = list(matrix.shape)
    shape[dim : dim + 1] = shape[dim] // side, side
    return matrix.view(shape)


def _whole(matrix: Tensor, blocks: Tensor, side: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the whole blocks of ``matrix`` along ``dim``, those of ``blocks`` (they rise) that
    are whole, and the narrow last block of the matrix if it is among them, else nothing of it.
    """
    full, rest = divmod(matrix.shape[dim], side)
    if not rest:
        return _in_blocks(matrix, side, dim), blocks, matrix.narrow(dim, 0, 0)
    whole, edge = matrix.split([full * side, rest], dim)
    if len(blocks) and int(blocks[-1]) == full:
        return _in_blocks(whole, side, dim), blocks[:-1], edge
    return _in_blocks(whole, side, dim), blocks, edge.narrow(dim, 0, 0)


def _take(matrix: Tensor, blocks: Tensor, side: int, dim: int, buffer: Tensor) -> Tensor:
    """Gather block rows (0) or columns (1) of ``matrix`` into ``buffer``, one after the other."""
    whole, inner, edge = _whole(matrix, blocks, side, dim)
    wide, narrow = len(inner) * side, edge.shape[dim]
    shape = list(matrix.shape)
    shape[dim] = wide + narrow
    out = buffer[: shape[0] * shape[1]].view(shape)
    target = out
    if narrow:
        target, last = out.split([wide, narrow], dim)
        last.copy_(edge)
    torch.index_select(whole, dim, inner, out=_in_blocks(target, side, dim))
    return out


def _put(matrix: Tensor, blocks: Tensor, side: int, dim: int, values: Tensor) -> None:
    """Write ``values`` where ``_take`` would read them."""
    whole, inner, edge = _whole(matrix, blocks, side, dim)
    new, last = values.split([len(inner) * side, edge.shape[dim]], dim)
    whole.index_copy_(dim, inner, _in_blocks(new, side, dim))
    edge.copy_(last)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, topology: Topology, rows: int, cols: int
) -> Tensor:
    """Return ``x (W * M)^T + b``, shape ``(T, R)``."""
    y, tasks = x.new_empty((x.shape[0], weight.shape[0])), topology.row_tasks
    xs, ws = _buffer(x, tasks, cols, x.shape[0]), _buffer(x, tasks, cols, rows)
    for part, blocks in _lines(tasks, topology.col_index, rows):
        w = _take(weight[part], blocks, cols, 1, ws)
        torch.mm(_take(x, blocks, cols, 1, xs), w.T, out=y[:, part])
    return y if bias is None else y.add_(bias)


def dgrad(grad: Tensor, weight: Tensor, topology: Topology, rows: int, cols: int) -> Tensor:
    """Return ``grad (W * M)``, shape ``(T, C)``."""
    dx, tasks = grad.new_empty((grad.shape[0], weight.shape[1])), topology.col_tasks
    gs, ws = _buffer(grad, tasks, rows, grad.shape[0]), _buffer(grad, tasks, rows, cols)
    for part, blocks in _lines(tasks, topology.row_index, cols):
        w = _take(weight[:, part], blocks, rows, 0, ws)
        torch.mm(_take(grad, blocks, rows, 1, gs), w, out=dx[:, part])
    return dx


def wgrad(grad: Tensor, x: Tensor, topology: Topology, rows: int, cols: int, out: Tensor) -> None:
    """Write ``(grad^T x) * M`` to ``out``, shape ``(R, C)``."""
    out.zero_()
    if rows < cols:
        # the same for the transpose: the wider side shares what is gathered
        grad, x, out, rows, cols = x, grad, out.T, cols, rows
        tasks, index = topology.col_tasks, topology.row_index
    else:
        tasks, index = topology.row_tasks, topology.col_index
    xs, products = _buffer(x, tasks, cols, x.shape[0]), _buffer(x, tasks, cols, rows)
    for part, blocks in _lines(tasks, index, rows):
        taken, to = _take(x, blocks, cols, 1, xs), grad[:, part].T
        product = products[: to.shape[0] * taken.shape[1]].view(to.shape[0], taken.shape[1])
        _put(out[part], blocks, cols, 1, torch.mm(to, taken, out=product))
