"""The mask of one weight: where it is kept, how it meets the weight in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.launch import Backend, use_triton
from ..kernels.mask import expand_mask, pack, unpack, word_mask
from ..kernels.masked_weight import apply_mask, apply_mask_
from ..kernels.pattern import Pattern, Unstructured, grid_shape


class MaskOperand:
    """Which groups of one weight are kept.

    The tensors are no buffers: distributed wrappers would broadcast them at every forward. They
    are rewritten in place, so that compiled and captured graphs see an update.

    Args:
        weight: the weight, at least 2-D; a convolution's is seen as ``(shape[0], rest)``.
        pattern: the shape of a group.
        transposed: the weight is stored ``(in_features, out_features)``, as Hugging Face's Conv1D.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
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
    ) -> None:
        self.pattern = pattern
        self.transposed = transposed
        self.backend: Backend = backend
        self.weight_shape = weight.shape
        rows, cols = self.matrix(weight.detach()).shape
        self.shape: tuple[int, int] = (rows, cols)
        self.mask = self._compact(torch.ones(self.grid, dtype=torch.bool, device=weight.device))
        # known on the host: a weight of which nothing is pruned is used as it is
        self.all_kept = True
        # the CPU's form of the mask, of integers as wide as the weight's elements
        self._words: Tensor | None = None
        self._words_like = weight.dtype
        self._folded: tuple[tuple[int, int, torch.dtype], Tensor] | None = None
        self.to(weight)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups down and across."""
        return grid_shape(self.pattern, self.shape)

    @property
    def groups(self) -> int:
        """Number of groups."""
        down, across = self.grid
        return down * across

    @property
    def packed(self) -> bool:
        """True where the mask holds one bit an element, False where one bool a block."""
        return isinstance(self.pattern, Unstructured)

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
        self.set_(self._compact(grid), all_kept=bool(grid.all()))

    def kept_grid(self) -> Tensor:
        """Return the mask as a bool tensor of one element a group."""
        return unpack(self.mask, self.shape[1]) if self.packed else self.mask

    def pruned_groups(self) -> int:
        """Count the pruned groups. Synchronises with the device."""
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

    def set_(self, mask: Tensor | None, *, all_kept: bool) -> None:
        """Take over a compact mask, in place.

        Args:
            mask: as ``self.mask``; None where ``self.mask`` itself has just been written.
            all_kept: nothing is pruned.
        """
        if mask is not None:
            self.mask.copy_(mask)
        self.all_kept = all_kept
        self._folded = None
        if self._words is not None:
            word_mask(self.mask, self.pattern, self.shape, self._words_like, out=self._words)

    def to(self, weight: Tensor) -> None:
        """Follow the weight to its device and dtype."""
        self._folded = None
        if self.mask.device != weight.device:
            self.mask = self.mask.to(weight.device)
        if weight.is_cpu and not use_triton("apply_mask", self.backend, weight):
            if self._words is None or self._words_like != weight.dtype:
                self._words_like = weight.dtype
                self._words = word_mask(self.mask, self.pattern, self.shape, weight.dtype)
        else:
            self._words = None

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
        key = (weight.data_ptr(), weight._version, weight.dtype)
        if self._folded is None or self._folded[0] != key:
            self._folded = None
            # an inference tensor could not be saved for a later backward
            with torch.inference_mode(False), torch.no_grad():
                self._folded = (key, self._apply(weight))
        return self._folded[1]

    def train(self, mode: bool) -> None:
        """Follow the module into training or evaluation mode."""
        self.forget_folded()

    def forget_folded(self) -> None:
        """Drop the kept masked weight: ``weight.data`` may be edited without a trace."""
        self._folded = None

    @torch.no_grad()
    def fold_(self, weight: Tensor) -> None:
        """Set the pruned elements of ``weight`` to zero, in place."""
        matrix = self.matrix(weight)
        apply_mask_(matrix, self._argument, self.pattern, backend=self.backend)
        if matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            weight.copy_(matrix.reshape(weight.shape))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as a matrix (out, in): a view where its strides allow one."""
        return weight.T if self.transposed else weight.flatten(1)

    @property
    def _argument(self) -> Tensor:
        return self.mask if self._words is None else self._words

    def _apply(self, weight: Tensor) -> Tensor:
        masked = apply_mask(
            self.matrix(weight), self._argument, self.pattern, backend=self.backend
        )
        return masked.T if self.transposed else masked.reshape(weight.shape)

    def _compact(self, grid: Tensor) -> Tensor:
        return pack(grid) if self.packed else grid

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folded": None}
