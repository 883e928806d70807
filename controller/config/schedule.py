"""Schedules: the sparsity level as a function of the epoch or the optimiser step.

``RampSchedule`` counts either. The others' formulas and defaults are NNCF's
(https://github.com/openvinotoolkit/nncf, release 2.19), and they count epochs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any, Literal, NamedTuple

from pydantic import Field, StrictBool, field_validator, model_validator

from .declaration import (
    AboveZero,
    Declaration,
    Level,
    Listed,
    NotNegative,
    Positive,
    Whole,
    number,
)


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

    @field_validator("initial_level", mode="before")
    @classmethod
    def _plain(cls, level: Any) -> Any:
        return number(level)

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


class Ticks(NamedTuple):
    """A ramp's times as whole optimiser steps, or as whole epochs."""

    by_step: bool
    begin: int
    end: int
    every: int
    freeze: int

    def updates(self, time: int) -> int:
        """Return how many updates are due up to ``time``."""
        if time < self.begin:
            return 0
        regular = (min(time, self.freeze) - self.begin) // self.every + 1
        return regular + (time >= self.end) + (time >= self.freeze)

    def last_update(self, time: int) -> int:
        """Return when the last update up to ``time`` was; ``time`` is not before the first."""
        time = min(time, self.freeze)
        if time in (self.end, self.freeze):
            return time
        regular = time - (time - self.begin) % self.every
        return max(regular, self.end) if time > self.end else regular


class RampSchedule(Declaration):
    """From ``initial_level`` I to ``target_level`` T between two times, in steps or in epochs.

    With the progress p = (t - begin) / (end - begin):

    - ``"cubic"``: T - (T - I) (1 - p)^3, fast at first (Zhu and Gupta,
      https://arxiv.org/abs/1710.01878);
    - ``"linear"``: I + (T - I) p;
    - ``"cosine"``: T - (T - I) (1 + cos(pi p)) / 2, slow at both ends;
    - ``"exponential"``: 1 - (1 - I) ((1 - T) / (1 - I))^p: the density falls by the same factor at
      each update.

    Args:
        target_level: T, in [0, 1).
        end: when the target is reached.
        begin: when the level leaves the initial one.
        unit: of all times: optimiser steps, or epochs, of which there may be fractions.
        every: time between two updates of the masks.
        shape: which formula.
        initial_level: I, in [0, 1).
        freeze: when the masks are frozen, not before ``end``; None: at ``end``. Until then they
            are found anew at every update, and groups may return.
        steps_per_epoch: optimiser steps in an epoch, by which fractions of epochs become steps;
            the callbacks of ``integrations`` give it where it is None.
    """

    kind: Literal["ramp"] = Field(default="ramp", repr=False)
    target_level: Level
    end: NotNegative
    begin: NotNegative = 0
    unit: Literal["step", "epoch"] = "step"
    every: AboveZero = 1
    shape: Literal["cubic", "linear", "cosine", "exponential"] = "cubic"
    initial_level: Level = 0.0
    freeze: NotNegative | None = None
    steps_per_epoch: Positive | None = None

    @model_validator(mode="after")
    def _check_times(self) -> RampSchedule:
        if self.end < self.begin:
            raise ValueError(f"end must be at least begin {self.begin:g}, got {self.end:g}")
        if self.freeze is not None and self.freeze < self.end:
            raise ValueError(f"freeze must be at least end {self.end:g}, got {self.freeze:g}")
        if self.unit == "step":
            for name, time in self._times().items():
                if time != int(time):
                    raise ValueError(f"{name} must be whole with unit 'step', got {time:g}")
        return self

    def _times(self) -> dict[str, float]:
        freeze = self.end if self.freeze is None else self.freeze
        return {"begin": self.begin, "end": self.end, "every": self.every, "freeze": freeze}

    def ticks(self) -> Ticks:
        """Return the times on the clock that is counted: epochs where all are whole epochs and
        nobody has said how many steps they have, else steps.

        Raises:
            ValueError: there are fractions of epochs, and ``steps_per_epoch`` is None.
        """
        times = self._times()
        if self.unit == "step":
            return Ticks(True, *map(int, times.values()))
        if (steps := self.steps_per_epoch) is not None:
            begin, end, every, freeze = (round(time * steps) for time in times.values())
            return Ticks(True, begin, end, max(1, every), freeze)
        if odd := {name: time for name, time in times.items() if time != int(time)}:
            name, time = next(iter(odd.items()))
            raise ValueError(
                f"steps_per_epoch must be given where {name} is no whole epoch, got {time:g}"
            )
        return Ticks(False, *map(int, times.values()))

    def level(self, time: float) -> float:
        """Return the level at ``time``, in the schedule's unit."""
        start, goal = self.initial_level, self.target_level
        if time >= self.end:
            return goal
        progress = max(time - self.begin, 0.0) / (self.end - self.begin)
        match self.shape:
            case "cubic":
                level = goal - (goal - start) * (1 - progress) ** 3
            case "linear":
                level = start + (goal - start) * progress
            case "cosine":
                level = goal - (goal - start) * (1 + math.cos(math.pi * progress)) / 2
            case "exponential":
                level = 1 - (1 - start) * ((1 - goal) / (1 - start)) ** progress
        # rounding may step over either end by one unit in the last place, and 1.0 is no level
        return min(max(level, min(start, goal)), max(start, goal))


EpochSchedule = PolynomialSchedule | ExponentialSchedule | MultistepSchedule | AdaptiveSchedule
Schedule = EpochSchedule | RampSchedule
