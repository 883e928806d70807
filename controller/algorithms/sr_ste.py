"""SR-STE: dense weights learn under N:M masks that are found anew at each step.

The forward pass reads the weights under the mask of the greatest; the backward pass reaches all
elements straight-through, as if there were none; and what the mask prunes is pulled to zero by
``decay``, so that masks come to rest (Zhou et al., https://arxiv.org/abs/2102.04010). With the
masked weight ``w' = m w`` an element's gradient is ``dL/dw' + decay (1 - m) w``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from ...kernels.masked_weight import apply_mask
from ...kernels.pattern import NM, maximum_level
from ..config.algorithm import AlgorithmConfig, PatternField
from ..config.declaration import Level, NotNegative, Whole
from ..config.schedule import RampSchedule
from ..masks.learned import UpdatedWeight
from ..masks.shards import is_sharded
from ..masks.weight import SparseWeight, Target
from ..selection.scorer import Scorer
from ..selection.thresholds import Scores, is_reachable
from .learned import LearnedController, LearnedLoss


class SRSTEConfig(AlgorithmConfig):
    """Train dense weights towards N:M: ``SRSTEConfig()`` is 2:4 throughout.

    Scopes, overrides and BatchNorm adaptation are ``AlgorithmConfig``'s. Unlike magnitude's, a
    pruned weight is trained on, and returns when it has grown; the optimiser keeps its moments.

    Args:
        pattern: by default ``NM(2, 4)``; any other goes too, beyond the paper.
        level: of each weight, from the first step on, in [0, 1); None: all that N:M prunes.
        t_end: optimiser step from which the masks stay; None: they move as long as training goes
            on, as published.
        decay: lambda of the paper, a factor of the pruned weights in their gradient, not negative.
            It comes by ``controller.loss()``, ``decay / 2`` times their sum of squares, once an
            optimiser step however many forward passes there are.
    """

    takes_nm = True
    sets_levels_by = "the level holds from the start, params.level"

    algorithm: Literal["sr_ste"] = "sr_ste"
    pattern: PatternField = NM(2, 4)
    level: Level | None = None
    t_end: Whole | None = None
    decay: NotNegative = 2e-4

    @property
    def ramp(self) -> RampSchedule:
        """The level as a schedule: there from the first step on, masks found anew at each."""
        level = maximum_level(self.pattern) if self.level is None else self.level
        freeze = FOREVER if self.t_end is None else self.t_end
        return RampSchedule(initial_level=level, target_level=level, end=0, freeze=freeze)

    @model_validator(mode="after")
    def _check_level(self) -> SRSTEConfig:
        if self.level is None and not isinstance(self.pattern, NM):
            raise ValueError(f"level must be given with pattern {self.pattern}, got None")
        if self.level is not None and not is_reachable(self.level, [self.pattern]):
            raise ValueError(
                f"level must be at most 1 - n/m = {maximum_level(self.pattern):g} with pattern "
                f"{self.pattern}, got {self.level!r}"
            )
        return self


FOREVER = 2**53  # steps


class RefinedWeight(UpdatedWeight):
    """A weight all of whose elements have the gradient of the masked one."""

    def learns(self) -> bool:
        return super().learns() and torch.is_grad_enabled()

    def learned(self, weight: Tensor) -> Tensor:
        matrix, mask, pattern = self.readable(weight)
        masked = apply_mask(matrix.detach(), mask, pattern, backend=self.backend)
        # plus 0, with the gradient of the whole
        return self.reshaped(masked + (matrix - matrix.detach()), weight)

    def pruned_square(self) -> Tensor:
        """Return the sum of squares of what the mask prunes, of what is here, with its gradient.
        Where several stages have the weight, whose gradients are added up, the first pulls.
        """
        weight: Any = self.follow()
        here = weight.to_local() if is_sharded(weight) else weight
        matrix = self.matrix(here if self.is_first_stage else here.detach())
        mask = self.mask_for(matrix)
        rest = matrix - apply_mask(matrix, mask, self.kind.pattern, backend=self.backend)
        return rest.to(torch.promote_types(rest.dtype, torch.float32)).square().sum()


class RefinementLoss(LearnedLoss):
    """Pulls what is pruned to zero: ``decay / 2`` times its sum of squares, of all weights."""

    _weights: list[RefinedWeight]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, weights: Sequence[RefinedWeight], decay: float) -> None:
        super().__init__(weights)
        self.decay = decay

    @property
    def is_live(self) -> bool:
        return super().is_live and self.decay > 0

    def trained(self) -> Tensor | None:
        if not self.is_live:
            return None
        return self.numbers_of_all().sum() * (self.decay / 2)

    def numbers(self) -> Tensor:
        """Return the sum of squares of what is pruned of each weight."""
        return torch.stack([weight.pruned_square() for weight in self._weights])


class SRSTEController(LearnedController):
    """Finds the masks of the greatest magnitudes anew at each ``scheduler.step()``. Evaluation
    reads the weights under those of the last one.
    """

    name = "sr_ste"

    @classmethod
    def make_weights(
        cls, model: nn.Module, targets: Sequence[Target], config: Any, **options: Any
    ) -> list[SparseWeight]:
        return [RefinedWeight(target, **options) for target in targets]

    def _set_up(self) -> None:
        config: SRSTEConfig = self.config
        self._criterion = Scorer(self._weights, "abs", seed=0)
        self._loss = RefinementLoss(self._weights, config.decay)  # pyright: ignore[reportArgumentType]
        self._pool = "weight"
        self._follow_schedule(config.ramp)
        self._adapt_batchnorm()

    def group_scores(self, weights: Sequence[SparseWeight]) -> Scores:
        return self._criterion.scores(weights)
