"""Magnitude sparsity, NNCF's ``magnitude_sparsity``: the least important weights are pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, StrictBool, model_validator

from ...kernels.pattern import NM, Block, is_reachable, maximum_level
from ..config.algorithm import (
    Pool,
    PooledConfig,
    ScheduledConfig,
    ScheduleField,
    default_schedule,
)
from ..config.declaration import Whole
from ..config.schedule import PolynomialSchedule
from ..masks.weight import SparseWeight
from ..selection.allocation import Distribution, erdos_renyi, outlier_densities
from ..selection.criteria import ImportanceField, Reduction
from ..selection.scorer import Scorer
from ..selection.thresholds import Scores
from .base import BaseSparsityAlgoController


def _default_pool(data: dict[str, Any]) -> Pool:
    if data.get("weight_importance") == "wanda":
        return "row"
    shifts = data.get("distribution", "uniform") != "uniform"
    return "weight" if shifts or isinstance(data.get("pattern"), Block) else "global"


class MagnitudeSparsityConfig(PooledConfig, ScheduledConfig):
    """Prune the groups of smallest magnitude, or of least importance by another criterion.

    For example ``MagnitudeSparsityConfig(pattern=Block(32, 32),
    schedule=PolynomialSchedule(target_level=0.8, target_epoch=3))``. Further arguments are
    ``ScheduledConfig``'s, ``PooledConfig``'s and ``AlgorithmConfig``'s.

    Args:
        schedule: by default ``PolynomialSchedule()``.
        weight_importance: ``"abs"``: |w|; ``"normed_abs"``: |w| / ||w||_2, the norm of its tensor;
            ``"snip"``, ``"snip_momentum"``, ``"taylor"``, ``"fisher"``, ``"wanda"``, ``"random"``;
            a function of ``Evidence`` that returns a tensor: see ``criteria.py``.
        block_reduction: of the elements' importance over a block: ``"mean"``, ``"max"``,
            ``"sum"`` or ``"l2"``, the Euclidean norm.
        distribution: of the level over the weights, where each is pruned by itself:
            ``"uniform"``; ``"erk"``: Erdos-Renyi-Kernel, narrow weights keep more; ``"owl"``:
            those keep more of whose elements more have above 5 times the mean importance (Yin et
            al., https://arxiv.org/abs/2310.05175).
        pool: ``"global"``: all weights of one pattern are compared with one another; ``"weight"``:
            each weight is pruned by itself; ``"row"``: each output row of it, or block row, prunes
            the same share. By default ``"row"`` for Wanda, as published; ``"weight"`` with a
            distribution, and for blocks, whose means differ so little within a weight that a
            common threshold takes whole weights; else ``"global"``.
        keep_pruned_values: keep what is pruned until the masks are frozen, so that a group may
            return with the value that it had; costs ``level`` x the weights' bytes for blocks, and
            once the weights' for other patterns. False: a returning group starts at zero.
        seed: of ``"random"``, which ranks the groups alike at every update.
    """

    takes_nm = True

    algorithm: Literal["magnitude_sparsity"] = "magnitude_sparsity"
    schedule: ScheduleField = Field(default_factory=default_schedule(PolynomialSchedule))
    weight_importance: ImportanceField = "normed_abs"
    block_reduction: Reduction = "mean"
    distribution: Literal["uniform", "erk", "owl"] = "uniform"
    pool: Pool = Field(default_factory=_default_pool)
    keep_pruned_values: StrictBool = True
    seed: Whole = 0

    @model_validator(mode="after")
    def _check_levels(self) -> MagnitudeSparsityConfig:
        if self.distribution != "uniform" and self.pool == "global":
            raise ValueError(
                "distribution must be 'uniform' with pool 'global', whose scores decide the level "
                f"of each weight, got {self.distribution!r}"
            )
        if self.distribution != "uniform" and isinstance(self.pattern, NM):
            raise ValueError(
                f"distribution must be 'uniform' with pattern {self.pattern}, got "
                f"{self.distribution!r}"
            )
        target = self.initial_level if self.schedule is None else self.schedule.target_level
        if not is_reachable(target, [self.pattern]):
            raise ValueError(
                f"target_level must be at most 1 - n/m = {maximum_level(self.pattern):g} with "
                f"pattern {self.pattern}, got {target!r}"
            )
        return self


class MagnitudeSparsityController(BaseSparsityAlgoController):
    """Prunes by |w| or another criterion; masks are always found anew, with pruned values put
    back, so that a group may return. (Under SNIP it does not: a pruned group has no gradient.)
    """

    name = "magnitude_sparsity"

    def _set_up(self) -> None:
        config: MagnitudeSparsityConfig = self.config
        self._scorer = self._criterion = Scorer(
            self._weights, config.weight_importance, config.seed, config.block_reduction
        )
        self._pool, self._shifts = config.pool, config.distribution != "uniform"
        self._keep_values(config.keep_pruned_values)
        if config.schedule is None:
            self.disable_scheduler()
            self.set_sparsity_level(config.sparsity_init)
        else:
            self._follow_schedule(config.schedule)
        if config.initial_level > 0:
            self._adapt_batchnorm()

    def group_scores(self, weights: Sequence[SparseWeight]) -> Scores:
        """The criterion's importance; a block's is the mean over its elements."""
        return self._criterion.scores(weights, self._pool)

    def _distribution(self, weights: Sequence[SparseWeight]) -> Distribution | None:
        kind = "uniform" if isinstance(weights[0].pattern, NM) else self.config.distribution
        match kind:
            case "erk":
                return Distribution([erdos_renyi(weight.weight_shape) for weight in weights])
            case "owl":
                return outlier_densities(self._criterion.outliers(weights))
        return None
