"""The product of a linear layer that skips pruned blocks: lists of blocks, choice of paths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .block_sparse_linear import MIN_SIDE, block_sparse_linear
from .dispatch import Dispatch, Paths, as_tensor, choose
from .launch import Backend, use_triton
from .pattern import Block, Pattern
from .topology import Topology, block_topology

DENSE = Paths(False, False, False)


def has_blocks_to_skip(pattern: Pattern, weight: Tensor, dispatch: Dispatch) -> bool:
    """Tell whether some mask of the weight could make a product faster."""
    return (
        isinstance(pattern, Block)
        and min(pattern.rows, pattern.cols) >= MIN_SIDE
        and weight.ndim == 2
        and weight.dtype != torch.float64
        and dispatch != "dense"
    )


class BlockProduct:
    """``x W^T + b`` of one weight that is zero in its pruned blocks.

    Of output, input gradient and weight gradient those skip blocks for which that is faster. The
    others are ordinary dense products.

    Args:
        mask: bool, one flag a block, True = kept.
        kept: how many of them.
        pattern: its blocks.
        shape: of the weight, (out, in).
        dtype: of the weight.
        backend, dispatch: as ``create_controller``'s.
    """

    def __init__(
        self,
        mask: Tensor,
        kept: int,
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
        self._last_dtype = dtype
        self.update(mask, kept)

    def update(self, mask: Tensor, kept: int) -> None:
        """Take over another mask, as at creation. Lists stay where they are in memory."""
        self._mask = mask
        self._triton_runs = use_triton("block_sparse_linear", self.backend, mask)
        self._list_blocks()
        for dtype in self._dtypes:
            self._paths[dtype] = choose(
                kept,
                self.shape,
                self.pattern,
                dtype,
                mask.device,
                triton_runs=self._triton_runs,
                dispatch=self.dispatch,
            )
        self.flag()

    def _list_blocks(self) -> None:
        # while pruned blocks are written, all of them: a captured graph asks for no paths
        mask = torch.ones_like(self._mask) if self.unsafe else self._mask
        moved = self.topology is None or self.topology.kept.device != mask.device
        self.topology = block_topology(
            mask,
            self.pattern,
            out=None if moved else self.topology,
            backend="triton" if self._triton_runs else "torch",
        )

    @property
    def _dtypes(self) -> tuple[torch.dtype, ...]:
        # autocast may multiply float32 weights in either of the others
        casts = self.dtype == torch.float32
        return (self.dtype, *((torch.bfloat16, torch.float16) if casts else ()))

    def flag(self) -> None:
        """Write what is in force to the flags that compiled graphs read."""
        for dtype in self._paths:
            flags = as_tensor(self._in_force(dtype))
            self._flags.setdefault(dtype, flags).copy_(flags)

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

    def _in_force(self, dtype: torch.dtype) -> Paths:
        if self.unsafe:
            return DENSE
        paths = self._paths[dtype]
        return paths._replace(wgrad=False) if self.dense_weight_grad else paths

    @property
    def paths(self) -> Paths:
        """Which products skip pruned blocks, in the dtype of the last one."""
        return self._in_force(self._last_dtype)

    def skips(self, device_type: str) -> bool:
        """Tell whether the coming product skips blocks, forward or backward."""
        self._last_dtype = self._product_dtype(device_type)
        paths = self.paths
        return any(paths) if torch.is_grad_enabled() else paths.forward

    def _product_dtype(self, device_type: str) -> torch.dtype:
        if self.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.dtype

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W^T + b``; ``weight`` is a matrix (out, in) of any strides."""
        assert self.topology is not None
        dtype = self._product_dtype(weight.device.type)
        if dtype not in self._flags:  # another cast than autocast knows
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
