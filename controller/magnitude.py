"""Magnitude sparsity, NNCF's ``magnitude_sparsity``: the smallest weights are pruned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.block_score import block_score
from .base_algo import BaseSparsityAlgoController, Scores, SparseModuleInfo
from .config import MagnitudeSparsityConfig
from .scheduler import SparsityScheduler, StubScheduler


class MagnitudeSparsityController(BaseSparsityAlgoController):
    """Prunes by |w|; masks are always found anew from the dense weights, so that a group may
    return.

    Args:
        target_model: the model, whose target modules are sparse already.
        sparsified_module_info: one entry a masked weight.
        config: what to prune, when, by which importance.
        batchnorm_data: batches for ``config.batchnorm_adaptation``.
    """

    name = "magnitude_sparsity"

    def __init__(
        self,
        target_model: nn.Module,
        sparsified_module_info: Sequence[SparseModuleInfo],
        config: MagnitudeSparsityConfig,
        batchnorm_data: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(target_model, sparsified_module_info)
        self.config = config
        self._batchnorm = config.batchnorm_adaptation
        self._batchnorm_data = batchnorm_data
        if config.schedule is None:
            self._scheduler = StubScheduler()
        else:
            self._scheduler = SparsityScheduler(self, config.schedule)
            self._target_level = self._scheduler.target_level
            self.check_reachable(self._target_level)
        initial = config.initial_level
        self.set_sparsity_level(initial)
        if initial > 0 and self._batchnorm is not None:
            self._adapt_batchnorm()

    def scores(self, infos: Sequence[SparseModuleInfo]) -> Scores:
        """|w|, or |w| / ||w||_2 under ``normed_abs``; a block's is the mean over its elements."""
        weights = [info.weight.detach() for info in infos]
        matrices = [i.operand.matrix(w) for i, w in zip(infos, weights, strict=True)]
        operand = infos[0].operand
        scales = None
        if self.config.weight_importance == "normed_abs":
            norms = [_norm(weight) for weight in weights]
            # an all-zero weight has importance 0, whatever it is divided by
            scales = torch.stack([norm.where(norm > 0, 1) for norm in norms]).reciprocal()
        if operand.packed:
            return Scores(matrices, scales)
        grids = [
            block_score(matrix, operand.pattern, backend=operand.backend) for matrix in matrices
        ]
        return Scores(grids, scales)

    def builder_state(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")


def _norm(weight: Tensor) -> Tensor:
    """||w||_2 as a float32 scalar, added up in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dtype=wide).float()
