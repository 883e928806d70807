"""The product of a linear layer that skips pruned blocks: lists of blocks, choice of paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .block_sparse_linear import block_sparse_linear
from .dispatch import Dispatch, Paths, as_tensor, choose
from .launch import Backend, use_triton
from .masked_weight import count_leaks
from .pattern import Block, Pattern, is_skippable
from .topology import Topology, block_topology, empty_topology, write_topologies

DENSE = Paths(False, False, False)


def has_blocks_to_skip(pattern: Pattern, weight: Tensor, dispatch: Dispatch) -> bool:
    """Tell whether some mask of the weight could make a product faster."""
    return (
        is_skippable(pattern)
        and weight.ndim == 2
        and weight.dtype != torch.float64
        and dispatch != "dense"
    )


class BlockProduct:
    """``x W^T + b`` of one weight that is zero in its pruned blocks.

    Of output, input gradient and weight gradient those skip blocks for which that is faster. The
    others are ordinary dense products.

    It has no lists until ``update_products``.

    Args:
        pattern: its blocks.
        shape: of the weight, (out, in).
        dtype: of the weight.
        backend, dispatch: as ``create_controller``'s.
    """

    def __init__(
        self,
        pattern: Block,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        backend: Backend,
        dispatch: Dispatch,
    ) -> None:
        self.pattern = pattern
        self.shape = shape
        self.dtype = dtype
        self.backend: Backend = backend
        self.dispatch: Dispatch = dispatch
        self.topology: Topology | None = None
        self.dense_weight_grad = False
        self.unsafe = False
        self._paths: dict[torch.dtype, Paths] = {}
        # as tensors too: a compiled graph reads them, and follows an update without a recompile
        self._flags: dict[torch.dtype, Tensor] = {}
        self._flagged: dict[torch.dtype, Paths] = {}
        self._last_dtype = dtype

    def take_over(
        self,
        mask: Tensor,
        topology: Topology,
        kept: int,
        triton_runs: bool,
        known: dict[object, list[float]],
    ) -> None:
        """Take over a mask of ``kept`` blocks, and its lists; ``known`` as ``choose``'s."""
        self.mask, self.kept, self.topology = mask, kept, topology
        self._triton_runs = triton_runs
        if self.unsafe:
            self._list_blocks()
        for dtype in self._dtypes:
            self._paths[dtype] = choose(
                kept,
                self.shape,
                self.pattern,
                dtype,
                topology.kept.device,
                triton_runs=triton_runs,
                dispatch=self.dispatch,
                known=known,
            )
        self.flag()

    def _list_blocks(self) -> None:
        # while pruned blocks are written, all of them: a captured graph asks for no paths
        mask = torch.ones_like(self.mask) if self.unsafe else self.mask
        backend: Backend = "triton" if self._triton_runs else "torch"
        block_topology(mask, self.pattern, out=self.topology, backend=backend)

    @property
    def _dtypes(self) -> tuple[torch.dtype, ...]:
        # autocast and FSDP2 may multiply float32 weights in either of the others
        casts = self.dtype == torch.float32
        return (self.dtype, *((torch.bfloat16, torch.float16) if casts else ()))

    def flag(self) -> None:
        """Write what is in force to the flags that compiled graphs read."""
        for dtype in self._paths:
            paths = self._in_force(dtype)
            if self._flagged.get(dtype) != paths:
                flags = as_tensor(paths)
                self._flags.setdefault(dtype, flags).copy_(flags)
                self._flagged[dtype] = paths

    def trust(self, zero: bool) -> None:
        """Take note whether the weight is zero in its pruned blocks: else no product skips any,
        and one that a CUDA graph captured finds all blocks in its lists.
        """
        if self.unsafe == zero:
            self.unsafe = not zero
            self._list_blocks()
            self.flag()

    def want_dense_grad(self, wanted: bool) -> None:
        """Let the gradient of the weight be whole, as algorithms need that grow groups; or not."""
        if self.dense_weight_grad != wanted:
            self.dense_weight_grad = wanted
            self.flag()

    def written(self, weight: Tensor) -> int:
        """Count the elements in pruned blocks of the weight, a matrix (out, in), that are not
        zero. Waits for the device.
        """
        masks, backend = [self.mask], self.backend
        return int(count_leaks([weight.detach()], masks, self.pattern, backend=backend))

    def _in_force(self, dtype: torch.dtype) -> Paths:
        if self.unsafe:
            return DENSE
        paths = self._paths[dtype]
        return paths._replace(wgrad=False) if self.dense_weight_grad else paths

    @property
    def paths(self) -> Paths:
        """Which products skip pruned blocks, in the dtype of the last one."""
        return self._in_force(self._last_dtype)

    def skips(self, weight: Tensor) -> bool:
        """Tell whether the coming product with a weight skips blocks, forward or backward."""
        dtype = _product_dtype(weight)
        if dtype not in self._paths:
            return False
        self._last_dtype, paths = dtype, self._in_force(dtype)
        return any(paths) if torch.is_grad_enabled() else paths.forward

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W^T + b``; ``weight`` is a matrix (out, in) of any strides."""
        assert self.topology is not None
        dtype = _product_dtype(weight)
        if dtype not in self._flags:  # another cast than autocast or FSDP2 was expected to make
            return functional.linear(x, weight, bias)
        return block_sparse_linear(
            x,
            weight,
            self.topology,
            bias,
            pattern=self.pattern,
            paths=self._flags[dtype],
            backend=self.backend,
        )


def _product_dtype(weight: Tensor) -> torch.dtype:
    device_type = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def update_products(
    products: Sequence[BlockProduct], masks: Sequence[Tensor], kept: Sequence[int]
) -> None:
    """Let products take over masks. Lists stay where they are in memory.

    On a GPU the lists of all products of one pattern are two launches.

    Args:
        products: one or more.
        masks: one a product: bool, one flag a block, True = kept.
        kept: how many blocks each mask keeps.
    """
    alike: dict[tuple[Block, torch.device, Backend], list[tuple[BlockProduct, Tensor, int]]] = {}
    for product, mask, count in zip(products, masks, kept, strict=True):
        key = product.pattern, mask.device, product.backend
        alike.setdefault(key, []).append((product, mask, count))
    for (pattern, device, backend), members in alike.items():
        known: dict[object, list[float]] = {}
        own, given, counts = zip(*members, strict=True)
        triton_runs = use_triton("block_sparse_linear", backend, given[0])
        here = [
            t
            if (t := p.topology) is not None and t.kept.device == device
            else empty_topology(mask, pattern)
            for p, mask in zip(own, given, strict=True)
        ]
        write_topologies(given, pattern, here, triton_runs)
        for product, mask, topology, count in zip(own, given, here, counts, strict=True):
            product.take_over(mask, topology, count, triton_runs, known)
