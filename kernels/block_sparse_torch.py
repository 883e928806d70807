"""Block-sparse linear in plain torch: how a machine without a GPU gains from pruned blocks.

A line of blocks is a block row of the weight, or for the input gradient a block column. Where its
blocks are long, kept blocks that lie side by side are one product of views, added to what the
line has so far: nothing is copied, but each run of blocks costs a call. Where they are short, the
activations of a line's kept blocks are gathered side by side, for one product a line. Either way
an activation that is read serves as many weights as the line is wide, so there is a density, the
higher the wider the line, above which a dense product is the faster one: ``dispatch.py`` knows it.

Reading order: lines -> by runs -> gathered -> the three products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .topology import Topology, runs

# Length of blocks from which runs are multiplied where they lie. Measured on two cores, 2048 x
# 2048: blocks of 64 either way take as long, at 512 tokens and 64; of 32, gathered ones half of
# it at 64 tokens.
RUN_LENGTH = 64


def _lines(kept: Tensor, side: int, length: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield each line's slice of its side of the weight, and those of its runs of the other."""
    for line, found in enumerate(runs(kept)):
        part = slice(line * side, (line + 1) * side)
        yield part, [slice(first * length, end * length) for first, end in found]


def _wide(tensor: Tensor) -> Tensor:
    """Return the dtype in which sums run on: they are rounded once, not once a run."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _by_runs(tokens: Tensor, weight: Tensor, kept: Tensor, side: int, length: int) -> Tensor:
    tokens = _wide(tokens)
    y = tokens.new_empty((tokens.shape[0], weight.shape[0]))
    for part, found in _lines(kept, side, length):
        target = y[:, part]
        if not found:
            target.zero_()
        for i, run in enumerate(found):
            w = _wide(weight[part, run]).T
            if i == 0:
                torch.mm(tokens[:, run], w, out=target)
            else:
                target.addmm_(tokens[:, run], w)
    return y


def _gathered(tokens: Tensor, weight: Tensor, kept: Tensor, side: int, length: int) -> Tensor:
    y = tokens.new_empty((tokens.shape[0], weight.shape[0]))
    # memory for any line: fresh one for each would cost more than they
    most = int(kept.sum(1).max()) * length if kept.numel() else 0
    xs, ws = tokens.new_empty(most * tokens.shape[0]), tokens.new_empty(most * side)
    for line, flags in enumerate(kept):
        part, blocks = slice(line * side, (line + 1) * side), flags.nonzero()[:, 0]
        w = weight[part]
        # along memory, whichever way the weight lies in it
        w = (
            _take(w.T, blocks, length, 0, ws)
            if w.stride(0) == 1
            else _take(w, blocks, length, 1, ws).T
        )
        torch.mm(_take(tokens, blocks, length, 1, xs), w, out=y[:, part])
    return y


def _take(matrix: Tensor, blocks: Tensor, length: int, dim: int, buffer: Tensor) -> Tensor:
    """Gather blocks of rows (0) or columns (1) of ``matrix`` into ``buffer``, side by side.

    Args:
        matrix: of blocks of ``length``, the last one perhaps shorter.
        blocks: which, rising.
        length, dim: of the blocks.
        buffer: large enough.
    """
    full, rest = divmod(matrix.shape[dim], length)
    has_edge = rest > 0 and len(blocks) > 0 and int(blocks[-1]) == full
    whole = blocks[:-1] if has_edge else blocks
    width = len(whole) * length
    shape = list(matrix.shape)
    shape[dim] = width + rest * has_edge
    out = buffer[: shape[0] * shape[1]].view(shape)
    source, target = matrix.narrow(dim, 0, full * length), out.narrow(dim, 0, width)
    torch.index_select(
        source.unflatten(dim, (full, length)), dim, whole,
        out=target.unflatten(dim, (len(whole), length)),
    )  # fmt: skip
    if has_edge:
        out.narrow(dim, width, rest).copy_(matrix.narrow(dim, full * length, rest))
    return out


def _product(tokens: Tensor, weight: Tensor, kept: Tensor, side: int, length: int) -> Tensor:
    """Return ``tokens (W * M)^T``; a line is ``side`` rows of W, its blocks ``length`` long."""
    way = _by_runs if length >= RUN_LENGTH else _gathered
    return way(tokens, weight, kept, side, length).to(tokens.dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, topology: Topology, rows: int, cols: int
) -> Tensor:
    """Return ``x (W * M)^T + b``, shape ``(T, R)``."""
    y = _product(x, weight, topology.kept, rows, cols)
    return y if bias is None else y.add_(bias)


def dgrad(grad: Tensor, weight: Tensor, topology: Topology, rows: int, cols: int) -> Tensor:
    """Return ``grad (W * M)``, shape ``(T, C)``."""
    return _product(grad, weight.T, topology.kept.T, cols, rows)


def wgrad(grad: Tensor, x: Tensor, topology: Topology, rows: int, cols: int, out: Tensor) -> None:
    """Write ``(grad^T x) * M`` to ``out``, shape ``(R, C)``."""
    out.zero_()
    kept = topology.kept
    if rows < cols:
        # the same for the transpose: the longer side of a block is the line's
        grad, x, out, kept, rows, cols = x, grad, out.T, kept.T, cols, rows
    # a line's part of it lies in one piece then
    grad = grad.T.contiguous()
    for part, found in _lines(kept, rows, cols):
        for run in found:
            torch.mm(grad[part], x[:, run], out=out[part, run])
