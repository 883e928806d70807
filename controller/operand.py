"""The mask of one weight: where it is kept, how it meets the weight in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..kernels.block_sparse_linear import MIN_SIDE, block_sparse_linear
from ..kernels.dispatch import Dispatch, Paths, as_tensor, choose
from ..kernels.launch import Backend, use_triton
from ..kernels.mask import expand_mask, pack, unpack, word_mask
from ..kernels.masked_linear import masked_linear
from ..kernels.masked_weight import apply_mask, apply_mask_
from ..kernels.pattern import NM, Block, Pattern, grid_shape
from ..kernels.semi_structured import nm_fits
from ..kernels.topology import Topology, block_topology

# fused optimisers rewrite a parameter without a trace in its version
_optimizer_steps = [0]


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


def state_of(parameter: Tensor) -> tuple[Any, ...]:
    """Return what differs once ``parameter`` may have other values; edits of ``.data`` escape."""
    return parameter.data_ptr(), parameter._version, parameter.dtype, _optimizer_steps[0]


class MaskOperand:
    """Which groups of one weight are kept.

    The tensors are no buffers: distributed wrappers would broadcast them at every forward. They
    are rewritten in place, so that compiled and captured graphs see an update.

    Args:
        weight: the weight, at least 2-D; a convolution's is seen as ``(shape[0], rest)``.
        pattern: the shape of a group.
        transposed: the weight is stored ``(in_features, out_features)``, as Hugging Face's Conv1D.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        dispatch: ``"auto"``, ``"sparse"`` or ``"dense"``, see ``linear``.
    """

    # trained with the weight, where the mask follows from such; its module holds it too
    scores: nn.Parameter | None = None

    def __init__(
        self,
        weight: Tensor,
        pattern: Pattern,
        *,
        transposed: bool = False,
        backend: Backend = "auto",
        dispatch: Dispatch = "auto",
    ) -> None:
        self.pattern = pattern
        self.transposed = transposed
        self.backend: Backend = backend
        self.dispatch: Dispatch = dispatch
        self.weight_shape = weight.shape
        rows, cols = self.matrix(weight.detach()).shape
        self.shape: tuple[int, int] = (rows, cols)
        self.mask = self._compact(torch.ones(self.grid, dtype=torch.bool, device=weight.device))
        # known on the host: a weight of which nothing is pruned is used as it is
        self.all_kept = True
        # an algorithm that lets groups return asks for it where it chooses them
        self.dense_weight_grad = False
        self._dtype = weight.dtype
        # the CPU's form of the mask, of integers as wide as the weight's elements
        self._words: Tensor | None = None
        self._folded: tuple[tuple[Any, ...], Tensor] | None = None
        # on a CPU the masked weight from the forward pass to the backward one
        self._memory: Tensor | None = None
        # where a linear may skip blocks: their lists, and which products do by their dtype, on the
        # host and as tensors that a compiled graph reads
        self.topology: Topology | None = None
        self._paths: dict[torch.dtype, Paths] = {}
        self._path_flags: dict[torch.dtype, Tensor] = {}
        self._product_dtype = weight.dtype  # of the last product
        self.to(weight)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups down and across; under N:M elements, since a pruned group keeps some of its."""
        return grid_shape(self.pattern, self.shape)

    @property
    def groups(self) -> int:
        """Number of what a level counts: groups, or elements under N:M."""
        down, across = self.grid
        return down * across

    @property
    def candidates(self) -> int:
        """Number of groups to choose from: those that ``groups`` counts, or N:M's own."""
        if isinstance(self.pattern, NM):
            tall, wide = self.pattern.group
            return self.groups // (tall * wide)
        return self.groups

    @property
    def packed(self) -> bool:
        """True where the mask holds one bit an element, False where one bool a block."""
        return not isinstance(self.pattern, Block)

    @property
    def binary_mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True = kept. A copy: assign to change the mask."""
        mask = expand_mask(self.mask, self.pattern, self.shape)
        return (mask.T if self.transposed else mask).reshape(self.weight_shape)

    @binary_mask.setter
    def binary_mask(self, mask: Tensor) -> None:
        if mask.shape != self.weight_shape:
            raise ValueError(
                f"binary_mask: must have the weight's shape {tuple(self.weight_shape)}, "
                f"got {tuple(mask.shape)}"
            )
        kept = self.matrix(mask.to(self.mask.device) != 0)
        grid = kept[:: self.pattern.rows, :: self.pattern.cols].contiguous()
        if not torch.equal(expand_mask(self._compact(grid), self.pattern, self.shape), kept):
            raise ValueError(f"binary_mask: must be constant within every {self.pattern} group")
        if not self.fits(grid):
            raise ValueError(f"binary_mask: must keep no more of any group than {self.pattern}")
        self.set_(self._compact(grid), all_kept=bool(grid.all()))

    def fits(self, grid: Tensor) -> bool:
        """Tell whether the pattern allows ``grid``: N:M's groups keep n of m at most, or all."""
        return not isinstance(self.pattern, NM) or nm_fits(grid, self.pattern)

    def kept_grid(self) -> Tensor:
        """Return the mask as a bool tensor of one element a group."""
        return unpack(self.mask, self.shape[1]) if self.packed else self.mask

    def pruned_groups(self) -> int:
        """Count what is pruned of ``groups``. Synchronises with the device."""
        return 0 if self.all_kept else self.groups - int(self.kept_grid().sum())

    def pruned_elements(self) -> int:
        """Count the pruned weight elements. Synchronises with the device."""
        if self.all_kept:
            return 0
        pruned = ~self.kept_grid()
        if self.packed:
            return int(pruned.sum())
        heights, widths = (
            torch.arange(0, side, step, device=pruned.device).neg().add(side).clamp(max=step)
            for side, step in zip(self.shape, (self.pattern.rows, self.pattern.cols), strict=True)
        )
        return int((pruned * heights[:, None] * widths).sum())

    def set_(self, mask: Tensor | None, *, all_kept: bool, kept: int | None = None) -> None:
        """Take over a compact mask, in place.

        Args:
            mask: as ``self.mask``; None where ``self.mask`` itself has just been written.
            all_kept: nothing is pruned.
            kept: number of kept groups; None: counted where it matters, which waits for the
                device.
        """
        if mask is not None:
            self.mask.copy_(mask)
        self.all_kept = all_kept
        self._folded = None
        if self._words is not None:
            word_mask(self.mask, self.pattern, self.shape, self._dtype, out=self._words)
        if self.topology is not None:
            block_topology(self.mask, self.pattern, out=self.topology, backend=self._list_backend)
            self._choose_paths(kept)

    def to(self, weight: Tensor) -> None:
        """Follow the weight to its device and dtype."""
        self._folded = None
        if self.mask.device != weight.device:
            self.mask = self.mask.to(weight.device)
        if weight.is_cpu and not use_triton("apply_mask", self.backend, weight):
            if self._words is None or self._dtype != weight.dtype:
                self._words = word_mask(self.mask, self.pattern, self.shape, weight.dtype)
        else:
            self._words = None
        self._dtype = self._product_dtype = weight.dtype
        if self.topology is not None:
            self.serve_linear()

    def serve_linear(self) -> None:
        """Prepare ``linear`` to skip pruned blocks, if the pattern has blocks to skip."""
        if (
            isinstance(self.pattern, Block)
            and min(self.pattern.rows, self.pattern.cols) >= MIN_SIDE
            and len(self.weight_shape) == 2
            and self._dtype != torch.float64
        ):
            moved = self.topology is None or self.topology.kept.device != self.mask.device
            out = None if moved else self.topology
            self.topology = block_topology(
                self.mask, self.pattern, out=out, backend=self._list_backend
            )
            self._choose_paths(None)
        else:
            self.topology = None

    @property
    def _list_backend(self) -> Backend:
        return "triton" if self._triton_runs else "torch"

    @property
    def _triton_runs(self) -> bool:
        return use_triton("block_sparse_linear", self.backend, self.mask)

    def _choose_paths(self, kept: int | None) -> None:
        assert isinstance(self.pattern, Block)
        kept = int(self.mask.count_nonzero()) if kept is None else kept
        # autocast may multiply float32 weights in either of the others
        for dtype in {self._dtype, *((torch.bfloat16, torch.float16) if self._casts else ())}:
            self._paths[dtype] = paths = choose(
                kept,
                self.shape,
                self.pattern,
                dtype,
                self.mask.device,
                triton_runs=self._triton_runs,
                dispatch=self.dispatch,
            )
            flags = as_tensor(paths)
            self._path_flags.setdefault(dtype, flags).copy_(flags)

    @property
    def _casts(self) -> bool:
        return self._dtype == torch.float32

    @property
    def paths(self) -> Paths:
        """Which products skip pruned blocks, in the dtype of the last one."""
        return self._paths.get(self._product_dtype, Paths(False, False, False))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x (W * M)^T + b``.

        Of output, input gradient and weight gradient those skip pruned blocks that ``paths``
        tells. A compiled graph reads the same flags: it follows an update without being compiled
        anew.
        """
        matrix = weight.T if self.transposed else weight
        kind = weight.device.type
        dtype = weight.dtype
        if self._casts and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if not torch.compiler.is_compiling():
            self._product_dtype = dtype
        # tracing must not look at the paths: it would guard their values
        if self.topology is not None and (torch.compiler.is_compiling() or self._skips()):
            return block_sparse_linear(
                x,
                matrix,
                self.topology,
                bias,
                pattern=self.pattern,
                paths=self._path_flags[dtype],
                dense_weight_grad=self.dense_weight_grad,
                backend=self.backend,
            )
        if self.all_kept or not (torch.is_grad_enabled() and weight.requires_grad):
            folded = self.apply(weight)
            return functional.linear(x, folded.T if self.transposed else folded, bias)
        self._folded = None
        return masked_linear(
            x,
            matrix,
            # of large blocks the weight gradient is cleared run by run, by the grid
            self._argument if self.topology is None else self.mask,
            bias,
            pattern=self.pattern,
            dense_weight_grad=self.dense_weight_grad,
            memory=None if torch.compiler.is_compiling() else self._remembering(matrix),
            backend=self.backend,
        )

    def _remembering(self, matrix: Tensor) -> Tensor | None:
        """Return memory for the masked weight, on a CPU."""
        if self._words is None or not matrix.is_contiguous():
            return None
        if self._memory is None or self._memory.dtype != matrix.dtype:
            self._memory = torch.empty_like(matrix)
        return self._memory

    def _skips(self) -> bool:
        return any(self.paths) if torch.is_grad_enabled() else self.paths.forward

    def apply(self, weight: Tensor) -> Tensor:
        """Return the masked weight, differentiable, of the weight's shape.

        What depends on weight and mask alone is computed once, until one of them changes: where no
        gradient flows to the weight, the result is kept and costs one more copy of it.
        """
        if self.all_kept:
            return weight
        # a compiled graph must not depend on version counters, or every update would recompile it
        if torch.compiler.is_compiling():
            return self._apply(weight)
        if torch.is_grad_enabled() and weight.requires_grad:
            self._folded = None
            return self._apply(weight)
        if not isinstance(weight, nn.Parameter) or weight.is_inference():
            return self._apply(weight)
        key = state_of(weight)
        if self._folded is None or self._folded[0] != key:
            self._folded = None
            # an inference tensor could not be saved for a later backward
            with torch.inference_mode(False), torch.no_grad():
                self._folded = (key, self._apply(weight))
        return self._folded[1]

    def train(self, mode: bool) -> None:
        """Follow the module into training or evaluation mode."""
        self.forget_folded()
        if not mode:
            self._memory = None

    def forget_folded(self) -> None:
        """Drop the kept masked weight: ``weight.data`` may be edited without a trace."""
        self._folded = None

    @torch.no_grad()
    def fold_(self, weight: Tensor) -> None:
        """Set the pruned elements of ``weight`` to zero, in place."""
        self._fold_(weight, self._argument)

    @torch.no_grad()
    def zero_(self, tensor: Tensor, groups: Tensor) -> None:
        """Set some groups of a tensor of the weight's shape to zero, in place.

        Args:
            tensor: the weight, or what an optimiser knows of each of its elements.
            groups: bool grid, True for the groups to clear.
        """
        self._fold_(tensor, self._compact(~groups))

    def _fold_(self, tensor: Tensor, mask: Tensor) -> None:
        matrix = self.matrix(tensor)
        apply_mask_(matrix, mask, self.pattern, backend=self.backend)
        if matrix.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            tensor.copy_((matrix.T if self.transposed else matrix).reshape(tensor.shape))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as a matrix (out, in): a view where its strides allow one."""
        return weight.T if self.transposed else weight.flatten(1)

    @property
    def _argument(self) -> Tensor:
        return self.mask if self._words is None else self._words

    def _apply(self, weight: Tensor) -> Tensor:
        if self.dense_weight_grad and torch.is_grad_enabled() and weight.requires_grad:
            return _StraightThrough.apply(self._masked(weight.detach()), weight)
        return self._masked(weight)

    def _masked(self, weight: Tensor) -> Tensor:
        masked = apply_mask(
            self.matrix(weight), self._argument, self.pattern, backend=self.backend
        )
        return masked.T if self.transposed else masked.reshape(weight.shape)

    def _compact(self, grid: Tensor) -> Tensor:
        return pack(grid) if self.packed else grid

    def __getstate__(self) -> dict[str, Any]:
        # a copy is not watched by the algorithm that looks at dense gradients
        return self.__dict__ | {
            "_folded": None,
            "_memory": None,
            "dense_weight_grad": False,
        }


class _StraightThrough(torch.autograd.Function):
    """The masked weight's value; the weight gets its gradient whole."""

    @staticmethod
    def forward(ctx: Any, masked: Tensor, weight: Tensor) -> Tensor:
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]
