"""Constant sparsity, NNCF's ``const_sparsity``: masks of the zeros there are, fixed for good."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels.pattern import NM, Pattern, grid_shape
from ...kernels.semi_structured import nm_complete
from ..config.algorithm import AlgorithmConfig
from ..masks.weight import SparseModuleInfo
from .base import BaseSparsityAlgoController


class ConstSparsityConfig(AlgorithmConfig):
    """Keep a sparse model sparse through further fine-tuning.

    Pattern, scopes, overrides and BatchNorm adaptation are ``AlgorithmConfig``'s; an override's
    limits have no bearing.

    Args:
        algorithm: its name, fixed.

    Raises:
        ValueError: an argument is unknown or out of its range.
    """

    takes_nm = True
    sets_levels_by = "the masks are those of the zeros there are"

    algorithm: Literal["const_sparsity"] = "const_sparsity"


class ConstSparsityController(BaseSparsityAlgoController):
    """Masks the groups that are zero as a whole, and the zeros of tuples that are n:m;
    ``load_state`` brings other masks.

    A masked group stays zero whatever optimises the model.

    Args:
        target_model: the model.
        sparsified_module_info: one entry a masked weight.
        config: which weights, in which pattern.
        batchnorm_data: batches for ``config.batchnorm_adaptation``.

    Warns:
        UserWarning: no group of any weight is zero.
    """

    name = "const_sparsity"

    def __init__(
        self,
        target_model: nn.Module,
        sparsified_module_info: Sequence[SparseModuleInfo],
        config: ConstSparsityConfig,
        batchnorm_data: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(target_model, sparsified_module_info)
        self.config = config
        self._configure(config, batchnorm_data)
        self.frozen = True
        with self._changing(self.sparsified_module_info):
            for info in self.sparsified_module_info:
                weight = info.operand.matrix(info.weight.detach())
                info.operand.set_grid(nonzero_groups(weight, info.operand.pattern))
        if all(info.operand.all_kept for info in self.sparsified_module_info):
            warnings.warn(
                "const_sparsity: no group of any target weight is zero, so nothing is masked "
                "until load_state() brings masks",
                stacklevel=4,
            )
        elif self._batchnorm is not None:
            self._adapt_batchnorm()

    def freeze(self, freeze: bool = True) -> None:
        """The masks are frozen, whatever is asked for."""

    def _check_level(
        self, level: float, target: SparseModuleInfo | None, run_batchnorm_adaptation: bool
    ) -> list[SparseModuleInfo]:
        """Refuse any level: the masks never change.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "set_sparsity_level: the masks of const_sparsity never change; use magnitude_sparsity "
            f"to reach the level {level!r}"
        )


def nonzero_groups(matrix: Tensor, pattern: Pattern) -> Tensor:
    """Return a bool grid: True where a group has an element that is not zero.

    Under N:M the grid is of elements, and a tuple of more than n that are not zero is kept whole.
    """
    rows, cols = pattern.rows, pattern.cols
    down, across = grid_shape(pattern, (matrix.shape[0], matrix.shape[1]))
    nonzero = matrix != 0
    if isinstance(pattern, NM):
        return nm_complete(nonzero, pattern)
    if rows == cols == 1:
        return nonzero
    bottom, right = down * rows - matrix.shape[0], across * cols - matrix.shape[1]
    padded = functional.pad(nonzero, (0, right, 0, bottom))
    return torch.any(padded.view(down, rows, across, cols).any(3), 1)
