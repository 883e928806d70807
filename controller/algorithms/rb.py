"""Regularisation-based sparsity, NNCF's ``rb_sparsity``: which groups stay is learned.

Each group has a logit s, the log-odds of being kept. In training masks are drawn at random; the
logits learn from the task's gradient and from a loss that pulls the number kept to the scheduled
one (after Louizos et al., https://arxiv.org/abs/1712.01312). In evaluation, and once frozen, a
group is kept where s > 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ..api import CompressionStage
from ..config.algorithm import ScheduledConfig, ScheduleField, default_schedule
from ..config.declaration import NotNegative, Whole
from ..config.schedule import ExponentialSchedule
from ..masks.exchange import sums_of_parts
from ..masks.schema import Schema, integer
from ..masks.statistics import SparsifiedModelStatistics, SparsityStatistics
from ..masks.weight import SparseWeight, Target
from .base import Change
from .learned import ScoredController
from .logits import Draws, SparseLoss, logit_weights


class RBSparsityConfig(ScheduledConfig):
    """Learn which groups stay.

    For example ``RBSparsityConfig(pattern=Block(32, 32),
    schedule=ExponentialSchedule(target_level=0.8, target_epoch=3))``. Further arguments are
    ``ScheduledConfig``'s and ``AlgorithmConfig``'s; overrides are of patterns.

    Args:
        schedule: of the level that the loss pulls to; by default ``ExponentialSchedule()``.
        compression_lr_multiplier: a factor of the logits' gradients, not negative; None: 1.
        seed: of the draws, from 0 to 2^63 - 1; None: torch's (``torch.initial_seed()``), of the
            first rank where there are several.
    """

    algorithm: Literal["rb_sparsity"] = "rb_sparsity"
    schedule: ScheduleField = Field(default_factory=default_schedule(ExponentialSchedule))
    compression_lr_multiplier: NotNegative | None = None
    seed: Whole | None = None

    @model_validator(mode="after")
    def _check_overrides_set_no_level(self) -> RBSparsityConfig:
        for override in self.overrides:
            if (override.minimum_level, override.maximum_level) != (None, None):
                raise ValueError(
                    "overrides must set no minimum_level or maximum_level, as levels are learned, "
                    f"got {override!r}; sparsity_level_setting_mode 'local' gives each weight its "
                    "own"
                )
        return self


@dataclass(frozen=True)
class RBSparsityStatistics(SparsityStatistics):
    """Statistics of ``rb_sparsity``, read off the logits as they are."""

    mean_sparse_prob: float  # mean probability of a group to be pruned

    def to_str(self) -> str:
        return f"{super().to_str()}\n\nMean probability to be pruned: {self.mean_sparse_prob:.4f}"


class RBSparsityController(ScoredController):
    """Controls masks that are drawn from trained logits, anew at each ``scheduler.step()``."""

    name = "rb_sparsity"
    scores_name = "logits"

    @classmethod
    def make_weights(
        cls, model: nn.Module, targets: Sequence[Target], config: Any, **options: Any
    ) -> list[SparseWeight]:
        multiplier = config.compression_lr_multiplier
        return logit_weights(targets, config.seed, multiplier=multiplier, **options)

    def _set_up(self) -> None:
        config: RBSparsityConfig = self.config
        self._draws: Draws = self._weights[0].draws  # pyright: ignore[reportAttributeAccessIssue]
        self.ranks.take_first([self._draws.random])
        local = config.sparsity_level_setting_mode == "local"
        self._loss = self._sparse_loss = SparseLoss(self._weights, local=local)
        if config.schedule is None:
            self.disable_scheduler()
            self.set_sparsity_level(config.sparsity_init)
        else:
            self._follow_schedule(config.schedule)

    def begin_step(self) -> None:
        super().begin_step()
        self._draws.random[1] += 1

    def _find_masks(self, weights: list[Any], level: float) -> Change:
        """Set the level that the loss pulls to; training takes the masks there."""
        target = None if weights is self._weights else weights[0]
        self._sparse_loss.check_target(target)
        return lambda: self._sparse_loss.set_target(1 - level, target)

    def compression_stage(self) -> CompressionStage:
        stage = super().compression_stage()
        if stage is CompressionStage.FULLY_COMPRESSED and self._sparse_loss.local:
            for weight, density in zip(self._weights, self._sparse_loss.densities, strict=True):
                if weight.pruned_groups() < round((1 - density) * weight.groups) - 1:
                    return CompressionStage.PARTIALLY_COMPRESSED
        return stage

    @torch.no_grad()
    def _statistics(
        self, model: SparsifiedModelStatistics, level: float | None
    ) -> SparsityStatistics:
        kept = [weight.part().sigmoid().sum(dtype=torch.float64) for weight in self._weights]
        share = sums_of_parts(self._weights, torch.stack(kept)).sum()
        mean = 1 - float(share) / sum(weight.groups for weight in self._weights)
        return RBSparsityStatistics(model, level, mean)

    def _state_beside_scores(self) -> dict[str, Any]:
        seed, draw = self._draws.random.tolist()
        return {"seed": seed, "draw": draw}

    def _schema_beside_scores(self) -> dict[str, Schema]:
        return {"seed": integer(), "draw": integer(end=2**32)}

    def _take_beside_scores(self, state: Mapping[str, Any]) -> None:
        self._draws.random.copy_(torch.tensor([state["seed"], state["draw"]]))
