"""Schedules: the sparsity level as a function of the epoch.

Formulas and defaults are NNCF's (https://github.com/openvinotoolkit/nncf, release 2.19).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Literal, NamedTuple

from pydantic import Field, StrictBool, field_validator, model_validator

from .declaration import AboveZero, Declaration, Level, Listed, NotNegative, Positive, Whole


class _Ramp(Declaration):
    """From one level to another, and the epoch in which it is there.

    Args:
        initial_level: I, the level before the first epoch, in [0, 1).
        target_level: T, the level from ``target_epoch`` on, in [0, 1).
        target_epoch: zero-based; 0 means the target at once.
        freeze_epoch: masks are frozen once the level of this epoch is applied, but not before
            ``target_epoch``.
    """

    initial_level: Level = 0.0
    target_level: Level = 0.5
    target_epoch: Whole = 90
    freeze_epoch: Whole = 100


class PolynomialSchedule(_Ramp):
    """From ``initial_level`` I to ``target_level`` T along a polynomial.

    With the progress p = epoch / target_epoch, concave, fast at first: T - (T - I) (1 - p)^power
    (Zhu and Gupta, https://arxiv.org/abs/1710.01878, with power 3); convex, slow at first:
    I + (T - I) p^power.

    Args:
        initial_level, target_level, target_epoch, freeze_epoch: as any ramp's.
        power: positive.
        concave: which of the two formulas.
        update_per_optimizer_step: change the level at each optimiser step, not each epoch.
        steps_per_epoch: optimiser steps in an epoch, for ``update_per_optimizer_step``; None: the
            scheduler spends the first epoch counting them.
    """

    kind: Literal["polynomial"] = Field(default="polynomial", repr=False)
    power: AboveZero = 0.9
    concave: StrictBool = True
    update_per_optimizer_step: StrictBool = False
    steps_per_epoch: Positive | None = None

    def level(self, epoch: int, step: int = 0) -> float:
        """Return the level in ``epoch``, at its optimiser step ``step``; both count from zero.

        ``step`` counts with ``update_per_optimizer_step`` and known ``steps_per_epoch`` only.
        """
        start, end = self.initial_level, self.target_level
        elapsed: float = epoch
        if self.update_per_optimizer_step and self.steps_per_epoch is not None:
            elapsed += step / self.steps_per_epoch
        if elapsed >= self.target_epoch:
            return end
        progress = max(elapsed / self.target_epoch, 0.0)
        if self.concave:
            level = end - (end - start) * (1 - progress) ** self.power
        else:
            level = start + (end - start) * progress**self.power
        # rounding may step over either end by one unit in the last place, and 1.0 is no level
        return min(max(level, min(start, end)), max(start, end))


class ExponentialSchedule(_Ramp):
    """The density, 1 - level, decays exponentially.

    It is max((1 - I) ((1 - T) / (1 - I))^(epoch / target_epoch), 1 - T).

    Args:
        initial_level, target_level, target_epoch, freeze_epoch: as any ramp's; with T below I it
            is T at once.
    """

    kind: Literal["exponential"] = Field(default="exponential", repr=False)

    def level(self, epoch: int, step: int = 0) -> float:
        """Return the level in ``epoch``, counted from zero; it is the same at each ``step``."""
        if epoch >= self.target_epoch:
            return self.target_level
        start, end = 1 - self.initial_level, 1 - self.target_level
        density = start * (end / start) ** (max(epoch, 0) / self.target_epoch)
        # 1 - (1 - I) need not be I
        return min(max(1 - density, self.initial_level), self.target_level)


class MultistepSchedule(Declaration):
    """Piecewise constant: ``levels[i]`` from epoch ``steps[i - 1]`` up to, not in, ``steps[i]``.

    Args:
        steps: zero-based epochs at which the level changes; kept sorted.
        levels: one more than ``steps``, each in [0, 1); the last is the target.
        initial_level: the level before the first epoch, in [0, 1); by default ``levels[0]``.
        freeze_epoch: masks are frozen once the level of this epoch is applied, but not before
            the last of ``steps``.
    """

    kind: Literal["multistep"] = Field(default="multistep", repr=False)
    steps: Listed[Whole] = (90,)
    levels: Listed[Level] = (0.1, 0.5)
    # not Level: pydantic 2.10 cannot join its constraints with a default_factory
    initial_level: float = Field(
        default_factory=lambda data: next(iter(data.get("levels", ())), 0.0),
        strict=True,
        ge=0,
        lt=1,
        allow_inf_nan=False,
    )
    freeze_epoch: Whole = 100

    @field_validator("steps")
    @classmethod
    def _sort(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(steps))

    @model_validator(mode="after")
    def _check_lengths(self) -> MultistepSchedule:
        if len(self.levels) != len(self.steps) + 1:
            raise ValueError(
                f"levels must be one more than the {len(self.steps)} steps, got {self.levels!r}"
            )
        return self

    @property
    def target_level(self) -> float:
        return self.levels[-1]

    @property
    def target_epoch(self) -> int:
        return self.steps[-1] if self.steps else 0

    def level(self, epoch: int, step: int = 0) -> float:
        """Return the level in ``epoch``, counted from zero; it is the same at each ``step``."""
        return self.levels[bisect_right(self.steps, epoch)]


class AdaptiveState(NamedTuple):
    """Where an adaptive schedule stands."""

    level: float
    bad_epochs: int  # in which the model had kept up, since the level was last raised


class AdaptiveSchedule(Declaration):
    """Raise the level by ``step`` whenever the model has kept up with it for ``patience`` epochs.

    Args:
        initial_level: the level before the first epoch, in [0, 1).
        target_level: the level at which it ends, in [0, 1).
        step: what is added to the level, positive.
        eps: how far the measured level may lag behind and still have kept up, at least 0.
        patience: epochs that the model must have kept up for.
        freeze_epoch: masks are frozen once the level of this epoch is applied.
    """

    kind: Literal["adaptive"] = Field(default="adaptive", repr=False)
    initial_level: Level = 0.0
    target_level: Level = 0.5
    step: AboveZero = 0.05
    eps: NotNegative = 0.03
    patience: Whole = 1
    freeze_epoch: Whole = 100

    def advance(self, state: AdaptiveState, measured_level: float) -> AdaptiveState:
        """Return the state of the next epoch, given the level that the masks have now."""
        level, bad_epochs = state
        if measured_level >= level - self.eps:
            bad_epochs += 1
        if bad_epochs >= self.patience:
            level, bad_epochs = level + self.step, 0
        # ten times 0.05 adds up to a little less than 0.5, which would take an epoch more
        if level > self.target_level or math.isclose(level, self.target_level, rel_tol=1e-9):
            level = self.target_level
        return AdaptiveState(level, bad_epochs)


Schedule = PolynomialSchedule | ExponentialSchedule | MultistepSchedule | AdaptiveSchedule
