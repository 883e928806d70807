"""The product of a linear whose weight tensor parallelism has parted: of what is here of each.

Each dimension of the mesh is one of four cases, those of torch's own dense product. What tensors
come as in another way is multiplied by that one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


class _Placed(NamedTuple):
    """How tensors lie along one dimension of the mesh: the output, and the gradients of inputs,
    weight and bias.
    """

    y: Placement
    x_grad: Placement
    weight_grad: Placement
    bias_grad: Placement


def parallel_linear(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Any,
    weight: Any,
    bias: Any,
) -> Tensor:
    """Return ``x W^T + b``, a DTensor placed as torch's dense product.

    Args:
        product: multiplies plain tensors: the parts of x, weight and bias that are here.
        x: DTensor, shape ``(..., C)``.
        weight: DTensor, shape ``(R, C)``.
        bias: DTensor, shape ``(R,)``, or None.
    """
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    mesh = weight.device_mesh
    if not all(is_sharded(tensor) and tensor.device_mesh == mesh for tensor in given):
        return functional.linear(x, weight, bias)
    biases = (None,) * mesh.ndim if bias is None else bias.placements
    each = zip(x.placements, weight.placements, biases, strict=True)
    found = [_placed(*placements, x.ndim - 1) for placements in each]
    if None in found:
        return functional.linear(x, weight, bias)
    y, x_grad, weight_grad, bias_grad = zip(*found, strict=True)
    own = None if bias is None else bias.to_local(grad_placements=bias_grad)
    for dim, placed in enumerate(y):
        if own is not None and placed.is_partial():
            own = _Share.apply(own, mesh.size(dim))
    local = product(
        x.to_local(grad_placements=x_grad), weight.to_local(grad_placements=weight_grad), own
    )
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    stride = tuple(accumulate((1, *reversed(shape[1:])), mul))[::-1]
    return type(weight.data).from_local(
        local, mesh, y, run_check=False, shape=shape, stride=stride
    )


def _placed(x: Any, weight: Any, bias: Any, last: int) -> _Placed | None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def whole(*placements: Any) -> bool:
        return all(p is None or p == Replicate() for p in placements)

    if whole(x, weight, bias):
        return _Placed(*[Replicate()] * 4)
    if whole(x) and weight == Shard(0) and bias in (None, Shard(0)):  # columns of the output
        return _Placed(Shard(last), Partial(), Shard(0), Shard(0))
    if x == Shard(last) and weight == Shard(1) and whole(bias):  # parts of a sum
        return _Placed(Partial(), Shard(last), Shard(1), Replicate())
    if type(x) is Shard and x.dim < last and whole(weight, bias):  # other tokens on each
        return _Placed(x, x, Partial(), Partial())
    return None


class _Share(torch.autograd.Function):
    """What one of several ranks adds of a bias, which is added once."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, ranks: int) -> Tensor:
        return bias / ranks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
