"""Constant sparsity, NNCF's ``const_sparsity``: masks of the zeros there are, fixed for good."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from ...kernels.bits import pack
from ...kernels.group_mask import read_counts, set_masks
from ...kernels.mask import nonzero_groups
from ...kernels.pattern import grid_shape
from ..config.algorithm import AlgorithmConfig
from ..masks.exchange import agree_counts, local_masks, whole_groups
from ..masks.weight import SparseModuleInfo, SparseWeight
from ..selection.thresholds import pools
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
            for members in pools(self._weights):
                set_masks(*self._agreed(*_masks_of_zeros(members)))
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


def _masks_of_zeros(
    weights: list[SparseWeight],
) -> tuple[list[SparseWeight], list[Tensor], list[list[int]]]:
    """Return ``set_masks``'s arguments for weights of one pattern."""
    matrices = [weight.matrix(weight.weight.detach()) for weight in weights]
    packed, pattern = weights[0].packed, weights[0].pattern
    groups = [[matrix] for matrix in matrices] if packed else whole_groups(weights, matrices)
    found = []
    for matrix, parts in zip(matrices, groups, strict=True):
        nothing = matrix.new_zeros(0, grid_shape(pattern, (0, matrix.shape[1]))[1]) != 0
        grid = torch.cat([nothing, *(nonzero_groups(part, pattern) for part in parts)])
        found.append(pack(grid) if packed else grid)
    masks = local_masks(weights, found)
    return weights, masks, agree_counts(weights, masks, read_counts(weights, masks, [])[0])
