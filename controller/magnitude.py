"""Magnitude sparsity, NNCF's ``magnitude_sparsity``: the smallest weights are pruned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..kernels.block_score import block_score
from .base_algo import BaseSparsityAlgoController, SparseModuleInfo
from .config import AlgorithmConfig, ScheduleField
from .pruning import Scores
from .schedule import Level, PolynomialSchedule


def _default_schedule(data: dict[str, Any]) -> PolynomialSchedule | None:
    local = data.get("sparsity_level_setting_mode") == "local"
    return None if local else PolynomialSchedule()


class MagnitudeSparsityConfig(AlgorithmConfig):
    """Prune the groups of smallest magnitude.

    For example ``MagnitudeSparsityConfig(pattern=Block(32, 32),
    schedule=PolynomialSchedule(target_level=0.8, target_epoch=3))``. Pattern, scopes, overrides
    and BatchNorm adaptation are ``AlgorithmConfig``'s.

    Args:
        algorithm: its name, fixed.
        sparsity_level_setting_mode: ``"global"``: a schedule sets the level of all target weights
            as one pool; ``"local"``: no schedule, levels are set weight by weight through the
            controller.
        schedule: which level holds when, the initial one included; by default
            ``PolynomialSchedule()``. None in ``local`` mode.
        sparsity_init: in ``local`` mode the level before any is set, in [0, 1).
        weight_importance: ``"abs"``: |w|; ``"normed_abs"``: |w| / ||w||_2, the norm of its tensor.

    Raises:
        ValueError: an argument is unknown or out of its range, or two do not go together.
    """

    algorithm: Literal["magnitude_sparsity"] = "magnitude_sparsity"
    sparsity_level_setting_mode: Literal["global", "local"] = "global"
    schedule: ScheduleField = Field(default_factory=_default_schedule)
    sparsity_init: Level = 0.0
    weight_importance: Literal["abs", "normed_abs"] = "normed_abs"

    @property
    def initial_level(self) -> float:
        """The level before the first epoch."""
        return self.sparsity_init if self.schedule is None else self.schedule.initial_level

    @model_validator(mode="after")
    def _check_mode(self) -> MagnitudeSparsityConfig:
        if self.sparsity_level_setting_mode == "local":
            if self.schedule is not None:
                raise ValueError(
                    "schedule must be None with sparsity_level_setting_mode 'local', where levels "
                    f"are set weight by weight, got {self.schedule!r}"
                )
        elif self.schedule is None:
            raise ValueError(
                "schedule must be given with sparsity_level_setting_mode 'global', got None"
            )
        elif self.sparsity_init:
            raise ValueError(
                "sparsity_init must be left out with a schedule, which has its own initial_level, "
                f"got {self.sparsity_init!r}"
            )
        return self


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
        self._configure(config, batchnorm_data)
        self._follow(config.schedule, config.initial_level)

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


def _norm(weight: Tensor) -> Tensor:
    """||w||_2 as a float32 scalar, added up in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dtype=wide).float()
