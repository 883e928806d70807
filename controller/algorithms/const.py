"""Constant sparsity, NNCF's ``const_sparsity``: masks of the zeros there are, fixed for good."""

from __future__ import annotations

import warnings
from typing import Literal

from ...kernels.mask import nonzero_groups
from ..config.algorithm import AlgorithmConfig
from ..masks.weight import SparseModuleInfo, SparseWeight
from .base import BaseSparsityAlgoController


class ConstSparsityConfig(AlgorithmConfig):
    """Keep a sparse model sparse through further fine-tuning. All arguments are
    ``AlgorithmConfig``'s; an override's limits have no bearing.
    """

    takes_nm = True
    sets_levels_by = "the masks are those of the zeros there are"

    algorithm: Literal["const_sparsity"] = "const_sparsity"


class ConstSparsityController(BaseSparsityAlgoController):
    """Masks the groups that are zero as a whole, and the zeros of tuples that are n:m, and keeps
    them zero whatever optimises the model; ``load_state`` brings other masks. Warns if none is.
    """

    name = "const_sparsity"

    def _set_up(self) -> None:
        self.frozen = True
        with self._changing(self._weights):
            grids = [
                nonzero_groups(weight.matrix(weight.weight.detach()), weight.pattern)
                for weight in self._weights
            ]
            self.ranks.take_first(grids)
            for weight, grid in zip(self._weights, grids, strict=True):
                weight.set_grid(grid)
        if all(weight.all_kept for weight in self._weights):
            warnings.warn(
                "const_sparsity: no group of any target weight is zero, so nothing is masked "
                "until load_state() brings masks",
                stacklevel=5,
            )
        else:
            self._adapt_batchnorm()

    def freeze(self, freeze: bool = True) -> None:
        """The masks are frozen, whatever is asked for."""

    def _check_level(
        self, level: float, target: SparseModuleInfo | None, run_batchnorm_adaptation: bool
    ) -> list[SparseWeight]:
        raise RuntimeError(
            "set_sparsity_level: the masks of const_sparsity never change; use magnitude_sparsity "
            f"to reach the level {level!r}"
        )
