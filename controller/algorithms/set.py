"""Dynamic sparse training, SET: the level stays, the masks move.

Every ``delta_t`` steps each weight drops a fraction of its kept groups, those of least importance,
and grows as many others: at random here, by gradient in ``rigl.py``. What returns starts at zero,
with moments of zero: both were cleared when it was pruned. At its first step the second moment is
set, so that it moves as the others do; see ``start_returned`` in ``optimizers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...kernels.group_mask import read_counts, set_masks
from ..config.algorithm import PooledConfig
from ..config.declaration import Level, Positive, Share, Whole
from ..masks.exchange import agree_counts, dropped, grown, local_masks, pieces_here
from ..masks.shards import local_part
from ..masks.weight import SparseWeight
from ..selection.allocation import Distribution, distribute, erdos_renyi, within
from ..selection.criteria import ImportanceField, Reduction, random_numbers
from ..selection.scorer import Scorer, needs
from ..selection.thresholds import limits, pools
from .base import BaseSparsityAlgoController, Change
from .scheduler import CompressionScheduler


def _default_masks(data: dict[str, Any]) -> Literal["random", "importance"]:
    return "random" if needs(data.get("weight_importance", "abs")) else "importance"


class RegrowthConfig(PooledConfig):
    """What SET and RigL are given. Limits are ``PooledConfig``'s, pattern, scopes and overrides
    ``AlgorithmConfig``'s.

    Args:
        level: fraction of the groups that is pruned, from the start on, in [0, 1).
        t_end: optimiser step from which the masks stay; 0: the first masks stay. About three
            quarters of the training, and, unless it is 0 or 1, beyond the first update.
        distribution: ``"erk"``: Erdos-Renyi-Kernel, narrow weights keep more; ``"uniform"``: the
            same level everywhere. Counts are exact, within the limits. RigL's paper
            leaves the first layer dense under ``"uniform"``: here the level is that of all the
            weights which are targets, so that ``ignored_scopes`` says what is none. (Of a
            transformer, embeddings are none by default.)
        weight_importance, block_reduction: by which groups are dropped; see ``criteria.py``.
        initial_masks: the groups of greatest ``"importance"``, as suits a model that is trained
            already, or ``"random"``, for one that is not. By default ``"importance"``, but for
            criteria that have nothing to judge by before training.
        alpha: fraction of the kept groups that moves at first, in [0, 1].
        drop_schedule: ``"cosine"``: that fraction falls along a cosine to 0 at ``t_end``;
            ``"constant"``: it stays until then.
        delta_t: optimiser steps between two updates, and before the first.
        seed: of random masks and growth; the same on every rank.
    """

    sets_levels_by = "the level holds from the start, params.level"

    level: Level
    t_end: Whole
    distribution: Literal["erk", "uniform"] = "erk"
    weight_importance: ImportanceField = "abs"
    block_reduction: Reduction = "mean"
    initial_masks: Literal["random", "importance"] = Field(default_factory=_default_masks)
    alpha: Share = 0.3
    drop_schedule: Literal["cosine", "constant"] = "cosine"
    delta_t: Positive = 100
    seed: Whole = 0

    @model_validator(mode="after")
    def _check_updates(self) -> RegrowthConfig:
        # no delta_t is below a t_end of 1, which says what 0 says
        if 1 < self.t_end <= self.delta_t and self.alpha > 0:
            raise ValueError(
                f"delta_t must be less than t_end {self.t_end}, or no mask would ever move, got "
                f"{self.delta_t}; a delta_t of a twentieth of t_end is common, and t_end=0 says "
                "that the first masks stay"
            )
        return self


class SETConfig(RegrowthConfig):
    """Drop by magnitude, grow at random: Mocanu et al., https://arxiv.org/abs/1707.04780.

    For example ``SETConfig(level=0.8, t_end=7500)``; ``RegrowthConfig`` has the arguments.
    """

    algorithm: Literal["set"] = "set"


class RegrowthScheduler(CompressionScheduler):
    """Has its controller begin every optimiser step; epochs mean nothing to it."""

    def __init__(self, controller: SETController) -> None:
        super().__init__(controller.begin_step)
        self._controller = controller

    def _step(self, next_step: int | None) -> None:
        super()._step(next_step)
        self._controller.update(self._current_step)


def _refuse_nonfinite(weights: Sequence[SparseWeight]) -> None:
    """Refuse weights that hold NaN or Inf: their gradients, which do too, come to no good by
    waiting for the next step.
    """
    fine = torch.stack([local_part(w.weight.detach()).isfinite().all() for w in weights]).tolist()
    if bad := [weight.name for weight, good in zip(weights, fine, strict=True) if not good]:
        raise ValueError(f"update: {bad} hold NaN or Inf; masks are left as they were")


class SETController(BaseSparsityAlgoController):
    """Moves a fraction of the kept groups every ``delta_t`` steps; every weight's count stays."""

    name = "set"

    def _set_up(self) -> None:
        config: RegrowthConfig = self.config
        for weight in self._weights:
            pieces_here(weight)  # refuses, before training, what has none when something returns
        self._scorer = self._criterion = Scorer(
            self._weights, config.weight_importance, config.seed, config.block_reduction
        )
        self._scheduler = RegrowthScheduler(self)
        self._target_level = config.level
        self.set_sparsity_level(config.level)
        self._adapt_batchnorm()

    def drop_fraction(self, step: int) -> float:
        """Return alpha / 2 (1 + cos(pi step / t_end)), or alpha, and 0 from ``t_end`` on."""
        config = self.config
        if step >= config.t_end:
            return 0.0
        if config.drop_schedule == "constant":
            return config.alpha
        return config.alpha / 2 * (1 + math.cos(math.pi * step / config.t_end))

    def update(self, step: int) -> None:
        """Move groups, if that is due at the beginning of ``step``."""
        if self._is_due(step) and not self.frozen:
            self._regrow(step)

    def _is_due(self, step: int) -> bool:
        return step > 0 and step % self.config.delta_t == 0 and self.drop_fraction(step) > 0

    def _dropped(
        self, weights: Sequence[SparseWeight], keep: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """Return masks of one pattern without the groups of lowest score, as ``dropped`` does."""
        scores = self._criterion.scores(weights).tensors
        return dropped(weights, scores, keep, spend=self._criterion.may_overwrite(weights, scores))

    def _random_grids(self, weights: Sequence[SparseWeight], step: int) -> list[Tensor]:
        """Return grids, of weights of one pattern: the groups of highest score are grown."""
        names, grids = (
            [weight.name for weight in weights],
            [weight.full_grid for weight in weights],
        )
        device = weights[0].weight.device
        numbers = random_numbers(names, grids, device, self.config.seed, step)
        return [n[w.own_groups] for w, n in zip(weights, numbers, strict=True)]

    def _grown_at_random(
        self, weights: Sequence[SparseWeight], masks: list[Tensor], keep: Sequence[int], step: int
    ) -> tuple[list[Tensor], Tensor]:
        """Return masks of one pattern that have grown to what they ``keep``, as ``grown`` does."""
        return grown(weights, masks, self._random_grids(weights, step), keep, spend=True)

    _grown = _grown_at_random

    def _regrowing(self) -> list[SparseWeight]:
        """Return the weights that have something to grow."""
        return [weight for weight in self._weights if not weight.all_kept]

    def _spoilt(self) -> list[Tensor]:
        """Return flags, on the device: where one is true, an update waits for the next step."""
        return []

    @contextmanager
    def _changing(self, weights: Sequence[SparseWeight]) -> Iterator[None]:
        with super()._changing(weights):
            yield
        self._guard.regrown(weights)

    @torch.no_grad()
    def _regrow(self, step: int) -> bool:
        """Drop and grow, or tell that it must wait; a refused update has changed nothing."""
        fraction = self.drop_fraction(step)
        growing = self._regrowing()
        found = []
        with self._changing(growing):
            with self.ranks.together(self._device):
                for weights in pools(growing):
                    kept = [weight.kept for weight in weights]
                    stay = [n - int(fraction * n) for n in kept]
                    masks, bad = self._dropped(weights, stay)
                    masks, more = self._grown(weights, masks, kept, step)
                    found.append((weights, local_masks(weights, masks), [bad, more]))
                masks, made = self._checked(found, self._spoilt())
                if not made:
                    _refuse_nonfinite(growing)
            if made and growing:
                set_masks(*self._agreed(*masks))
        return made

    def _find_masks(self, weights: list[SparseWeight], level: float) -> Change:
        """Distribute the level; drop the least important, or grow at random, to reach it.

        The first masks, of a model with none, are those of the configuration.
        """
        first = all(weight.all_kept for weight in self._weights)
        at_random = first and self.config.initial_masks == "random"
        found = []
        with self.ranks.together(self._device):
            for pool in pools(weights):
                counts, kept = self._counts(pool, level), [weight.kept for weight in pool]
                stay = [*map(min, counts, kept)]
                if stay != kept and not at_random:
                    masks, *bad = self._dropped(pool, stay)
                else:
                    masks, *bad = dropped(pool, self._random_grids(pool, 0), stay, spend=True)
                if stay != counts:
                    step = max(self._scheduler.current_step, 0)
                    masks, more = self._grown_at_random(pool, masks, counts, step)
                    bad.append(more)
                found.append((pool, local_masks(pool, masks), bad))
            masks, _ = self._checked(found, [])
        return partial(set_masks, *self._agreed(*masks))

    def _counts(self, pool: list[SparseWeight], level: float) -> list[int]:
        """Return how many groups each weight of a pool keeps."""
        groups = [weight.groups for weight in pool]
        densities = [1.0] * len(pool)
        if self.config.distribution == "erk":
            densities = [erdos_renyi(weight.weight_shape) for weight in pool]
        least, most = [0] * len(pool), groups
        if len(pool) > 1:
            most, least = (
                [n - end for n, end in zip(groups, ends, strict=True)]
                for ends in limits(pool, level, rising=False)
            )
        total = sum(groups) - round(level * sum(groups))
        total = within(level, "keep", total, least, most, sum(groups))
        return distribute(total, groups, Distribution(densities), least, most)

    @staticmethod
    def _checked(
        found: Sequence[tuple[list[SparseWeight], list[Tensor], list[Tensor]]],
        spoilt: Sequence[Tensor],
    ) -> tuple[tuple[list[SparseWeight], list[Tensor], list[list[int]]], bool]:
        """Return ``set_masks``'s arguments, and whether they are to be written: not if something
        is ``spoilt``. Refuses what is not finite. Waits for the device once.
        """
        weights = [weight for pool, _, _ in found for weight in pool]
        if not weights:
            return ([], [], []), True
        masks = [mask for _, own, _ in found for mask in own]
        more = [
            *(flag.long() for flag in spoilt),
            *(bad for *_, all_bad in found for bad in all_bad),
        ]
        counts, numbers = read_counts(weights, masks, more)
        agree_counts(weights, masks, counts)
        if any(numbers[: len(spoilt)]):
            return ([], [], []), False
        scored = [weight for pool, _, bad in found for _ in bad for weight in pool]
        for weight, nonfinite in zip(scored, numbers[len(spoilt) :], strict=True):
            if nonfinite:
                raise ValueError(
                    f"set_sparsity_level: the importance of {weight.name!r} holds NaN or Inf; "
                    "masks are left as they were"
                )
        return (weights, masks, counts), True
