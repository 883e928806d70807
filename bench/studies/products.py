"""The subjects of ``compare.py`` that multiply: one layer of ours, and other libraries' products.

Every function sets one subject up, checks its result, and returns the work to time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...controller.masks.weight import SparseWeight, Target, clear_, dense_weights
from ...kernels.block_sparse_linear import block_sparse_linear
from ...kernels.pattern import Block
from ...kernels.topology import block_topology
from ..measure.operands import Operands
from ..measure.shapes import Shape
from ..measure.timing import Work
from ..peers import blksprs, dense, semi_structured, stk, torch_bsr
from .setup import LEVEL, Place, check_close


def product_operands(place: Place, block: Block, level: float = LEVEL) -> Operands:
    shape = Shape(place.batches[0], place.width, place.width)
    return Operands(shape, block, level, "random", place.dtype, place.kind, "auto")


def sparse_weight(o: Operands) -> SparseWeight:
    """Return the weight as a layer of ours has it, zero where the mask prunes."""
    holder = nn.Module()
    holder.weight = nn.Parameter(o.weight)
    sparse = SparseWeight(Target("weight", ((holder, "weight"),), o.pattern))
    sparse.serve_product()
    with dense_weights([sparse]):
        sparse.set_grid(o.grid)
    return sparse


def layer_product(sparse: SparseWeight) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what a layer of ours computes of input and weight, on the paths chosen for it."""
    return lambda x, weight: sparse.linear(x, weight, None)


def our_layer(place: Place, block: Block, level: float, backward: bool) -> Work:
    """A layer, with both gradients or none."""
    o = product_operands(place, block, level)
    sparse = sparse_weight(o)
    product = layer_product(sparse)
    leaves = [o.x.requires_grad_(backward), sparse.weight.requires_grad_(backward)]

    def work() -> tuple[Tensor, ...]:
        y = product(*leaves)
        if not backward:
            return (y,)
        grads = torch.autograd.grad(y, leaves, o.grad)
        # as the guard does once a gradient has arrived
        clear_([sparse], [grads[1]])
        return y, *grads

    plain = o.x.detach()
    wanted = [F.linear(plain, o.masked), o.grad @ o.masked, (o.grad.T @ plain) * (o.masked != 0)]
    x, w, g = o.exact(plain, o.masked, o.grad)
    exact = [F.linear(x, w), g @ w, (g.T @ x) * (w != 0)]
    found = work()
    for three in zip(found, wanted[: len(found)], exact[: len(found)], strict=True):
        check_close(*three)
    return work


def dense_layer(place: Place, block: Block, backward: bool) -> Work:
    o = product_operands(place, block)
    leaves = [t.detach().requires_grad_(backward) for t in (o.x, o.weight)]

    def work() -> None:
        y = F.linear(*leaves)
        if backward:
            torch.autograd.grad(y, leaves, o.grad)

    return work


def check_product(y: Tensor, o: Operands, weight: Tensor, slack: float = 2.0) -> None:
    check_close(y, F.linear(o.x, weight), F.linear(*o.exact(o.x, weight)), slack)


def our_product(place: Place, block: Block) -> Work:
    o = product_operands(place, block)
    lists = block_topology(o.grid, block)
    check_product(block_sparse_linear(o.x, o.weight, lists, pattern=block), o, o.masked)
    return lambda: block_sparse_linear(o.x, o.weight, lists, pattern=block)


def peer_product(place: Place, block: Block, name: str) -> Work:
    """Set up another library's product with the same operands, and check its result."""
    o = product_operands(place, block)
    weight, finish = o.masked, _as_it_is
    match name:
        case "dense":
            weight = o.weight
            product = dense.linear(o.x, weight)
        case "dense, compiled":
            weight = o.weight
            product = dense.compiled_linear(o.x, weight)
        case "torch BSR":
            product = torch_bsr.linear(o.x, weight, (block.rows, block.cols))
        case "STK":
            product = stk.linear(o.x, weight)
        case "blksprs":
            product, finish = blksprs.linear(o.x, weight, block.rows)
        case _:
            weight = semi_structured.prune(o.weight)
            product = semi_structured.linear(o.x, weight)
    # others may sum in an order of their own, such as one product after the other
    check_product(finish(product()), o, weight, slack=8.0)
    return product


def _as_it_is(y: Tensor) -> Tensor:
    return y
