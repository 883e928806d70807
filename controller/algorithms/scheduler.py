"""Schedulers: they count epochs and steps, and drive the controller along a schedule."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..config.schedule import (
    AdaptiveSchedule,
    AdaptiveState,
    EpochSchedule,
    PolynomialSchedule,
    RampSchedule,
    Schedule,
)
from ..masks.schema import (
    ANYTHING,
    Entry,
    Maybe,
    Schema,
    check,
    exactly,
    integer,
    number,
    optional,
)


class CompressionScheduler:
    """Counts epochs and optimiser steps.

    Call ``epoch_step()`` at the start of each epoch and ``step()`` at the start of each optimiser
    step. Both indices are -1 before the first call; no epoch resets the step index.

    A call that raises has not counted: the next one is the same step, or epoch.

    Args:
        begin_step: called at each ``step()``, before anything else.
        end_epoch: called at each ``epoch_step()``, likewise.
        have_begun: called at each ``step()``, once the masks are those of the step.
    """

    def __init__(
        self,
        begin_step: Callable[[], None] = lambda: None,
        end_epoch: Callable[[], None] = lambda: None,
        have_begun: Callable[[], None] = lambda: None,
    ) -> None:
        self._begin_step = begin_step
        self._end_epoch = end_epoch
        self._have_begun = have_begun
        self._current_step = -1
        self._current_epoch = -1
        # of a step that was refused: it has begun already, and must not begin twice
        self._begun = False
        self._depth = 0
        # "step" or "epoch_step", which a composite has taken here and another algorithm refused
        self.ahead = ""

    @contextmanager
    def _refusable(self) -> Iterator[None]:
        """Let a step that raises count for nothing."""
        before = {k: copy.copy(v) if k == "_epoch" else v for k, v in vars(self).items()}
        self._depth += 1
        try:
            yield
        except BaseException:
            vars(self).update(before | {"_begun": self._begun})
            raise
        self._depth -= 1
        self._begun = self._begun and self._depth > 0

    def _begin(self) -> None:
        if not self._begun:
            self._begin_step()
            self._begun = True

    @property
    def current_step(self) -> int:
        """Index of the current optimiser step, counted over all epochs."""
        return self._current_step

    @property
    def current_epoch(self) -> int:
        """Index of the current epoch."""
        return self._current_epoch

    def step(self, next_step: int | None = None) -> None:
        """Begin an optimiser step, of index ``next_step``: by default one more than the current.

        Raises:
            ValueError: ``next_step`` is no integer from 0.
        """
        with self._refusable():
            self._step(next_step)
            self._have_begun()

    def _step(self, next_step: int | None) -> None:
        ahead = _next_index("step: next_step", next_step, self._current_step)
        self._begin()
        self._current_step = ahead

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin an epoch, of index ``next_epoch``: by default one more than the current.

        Raises:
            ValueError: ``next_epoch`` is no integer from 0.
        """
        ahead = _next_index("epoch_step: next_epoch", next_epoch, self._current_epoch)
        self._end_epoch()
        self._current_epoch = ahead

    def get_state(self) -> dict[str, Any]:
        """Return what ``load_state`` needs, in plain Python values."""
        state = {"current_step": self._current_step, "current_epoch": self._current_epoch}
        refused = {"begun": self._begun, "ahead": self.ahead}
        return state | {key: value for key, value in refused.items() if value}

    def schema(self) -> Any:
        """Say what ``get_state()``'s result must hold."""
        steps = ("step", "epoch_step")
        return {
            "current_step": integer(least=-1),
            "current_epoch": integer(least=-1),
            "begun": Maybe(exactly(True)),
            "ahead": Maybe(Entry("one of " + ", ".join(steps), steps.__contains__)),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where another scheduler of this configuration was.

        The masks are not touched: they come back with the controller's own state.

        Raises:
            ValueError: a key is missing, foreign, or of a wrong value; nothing is changed then.
        """
        check(state, self.schema())
        self._take(state)

    def _take(self, state: Mapping[str, Any]) -> None:
        self._current_step, self._current_epoch = state["current_step"], state["current_epoch"]
        self._begun, self.ahead = state.get("begun", False), state.get("ahead", "")


class StubScheduler(CompressionScheduler):
    """Changes no mask: it neither counts nor drives, has no state and ignores any it is given."""

    def step(self, next_step: int | None = None) -> None:
        self._begin_step()
        self._have_begun()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        self._end_epoch()

    def get_state(self) -> dict[str, Any]:
        return {}

    def schema(self) -> Any:
        return ANYTHING

    def _take(self, state: Mapping[str, Any]) -> None:
        pass


class EpochLength:
    """How many optimiser steps an epoch has: as configured, or, with None, as the first had."""

    def __init__(self, configured: int | None, advice: str = "") -> None:
        self.configured = self.known = configured
        self.done = 0  # in this epoch
        self._advice = advice

    def end_epoch(self, epoch: int) -> None:
        """Take the number of steps of the epoch that ends, or hold it against the known one."""
        self.known = self.known or self.done or None
        if self.done not in (0, self.known):
            raise ValueError(
                f"epoch_step: epoch {epoch} must have steps_per_epoch = {self.known} steps, got "
                f"{self.done}{self._advice}"
            )

    def get_state(self) -> dict[str, Any]:
        return {"_steps_per_epoch": self.known, "_steps_in_current_epoch": self.done}

    def schema(self) -> dict[str, Schema]:
        known, configured = optional(integer(least=1)), self.configured
        if configured is not None:
            known = Entry(f"{configured} as configured", lambda n: n in (None, configured))
        return {"_steps_per_epoch": known, "_steps_in_current_epoch": integer()}

    def take(self, state: Mapping[str, Any]) -> None:
        self.known = state["_steps_per_epoch"] or self.configured
        self.done = state["_steps_in_current_epoch"]


class SparsityScheduler(CompressionScheduler):
    """Sets the controller's level along a schedule.

    Args:
        controller: has ``begin_step``, ``have_begun``, ``check_epoch``, ``mask_level`` and
            ``follow``, as ``BaseSparsityAlgoController``; its masks are at
            ``schedule.initial_level`` already.
        schedule: which level holds when.
    """

    def __init__(self, controller: Any, schedule: Schedule) -> None:
        super().__init__(controller.begin_step, controller.check_epoch, controller.have_begun)
        self._controller = controller
        self._schedule: Any = schedule

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return self._schedule

    @property
    def target_level(self) -> float:
        """The level at which the schedule ends."""
        return self._schedule.target_level

    @property
    def current_sparsity_level(self) -> float:
        """The scheduled level of this epoch, or step; before the first the initial level."""
        raise NotImplementedError


class RampScheduler(SparsityScheduler):
    """Follows a ``RampSchedule``: the masks are found anew at each of its updates, and frozen at
    the last. Where indices are jumped over, the latest update of those that were is made.
    """

    def __init__(self, controller: Any, schedule: RampSchedule) -> None:
        super().__init__(controller, schedule)
        self._ticks = schedule.ticks()

    @property
    def current_sparsity_level(self) -> float:
        """The level of the last update; before the first the initial level."""
        ticks, schedule = self._ticks, self._schedule
        time = self._current_step if ticks.by_step else self._current_epoch
        if time < ticks.begin:
            return schedule.initial_level
        if (time := ticks.last_update(time)) >= ticks.end:
            return schedule.target_level
        in_epochs = schedule.unit == "epoch" and ticks.by_step
        return schedule.level(time / schedule.steps_per_epoch if in_epochs else time)

    def _step(self, next_step: int | None) -> None:
        before = self._current_step
        super()._step(next_step)
        if self._ticks.by_step:
            self._update(before, self._current_step)

    def epoch_step(self, next_epoch: int | None = None) -> None:
        before = self._current_epoch
        with self._refusable():
            super().epoch_step(next_epoch)
            if not self._ticks.by_step:
                self._update(before, self._current_epoch)

    def _update(self, before: int, now: int) -> None:
        if self._ticks.updates(now) > self._ticks.updates(before):
            last = now >= self._ticks.freeze
            self._controller.follow(self.current_sparsity_level, last=last)


class EpochScheduler(SparsityScheduler):
    """Follows a schedule that counts epochs, as NNCF's do.

    At each ``epoch_step()`` the masks are found anew, even where the level stays, since the
    weights have moved. With ``update_per_optimizer_step`` that is at each ``step()`` instead.

    In the schedule's ``freeze_epoch`` the masks are frozen, once the level of that epoch is
    applied. A freeze epoch before the target epoch waits for it: a run ends at its target.

    With ``update_per_optimizer_step`` and ``steps_per_epoch`` unknown, the first epoch counts its
    steps and does nothing else; both indices stay at -1.
    """

    def __init__(self, controller: Any, schedule: EpochSchedule) -> None:
        super().__init__(controller, schedule)
        self._adaptive = AdaptiveState(schedule.initial_level, bad_epochs=0)
        self._epoch: EpochLength | None = None  # where levels change at each step
        if isinstance(schedule, PolynomialSchedule) and schedule.update_per_optimizer_step:
            advice = "; to begin it again, give its index as next_epoch"
            self._epoch = EpochLength(schedule.steps_per_epoch, advice)

    @property
    def schedule(self) -> EpochSchedule:
        """The schedule; once they are counted, with its ``steps_per_epoch``."""
        if self._epoch is None:
            return self._schedule
        return self._schedule.model_copy(update={"steps_per_epoch": self._epoch.known})

    @property
    def current_sparsity_level(self) -> float:
        schedule = self.schedule
        if isinstance(schedule, AdaptiveSchedule):
            return self._adaptive.level
        if self._current_epoch == -1:
            return schedule.initial_level
        step = 0 if self._epoch is None else max(self._epoch.done - 1, 0)
        return schedule.level(self._current_epoch, step)

    def _step(self, next_step: int | None) -> None:
        if self._epoch is None:
            super()._step(next_step)
        elif self._epoch.known is None:
            self._begin()
            self._epoch.done += 1
        else:
            super()._step(next_step)
            frozen = self._freeze_is_due and self._epoch.done > 0
            self._epoch.done += 1
            if not frozen:
                self._apply()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin an epoch. With ``update_per_optimizer_step`` a ValueError says that the one that
        ends had another number of steps than ``steps_per_epoch``.
        """
        with self._refusable():
            self._epoch_step(next_epoch)

    def _epoch_step(self, next_epoch: int | None) -> None:
        if self._epoch is None:
            frozen = self._freeze_is_due
            super().epoch_step(next_epoch)
            if frozen:
                return
            if isinstance(self._schedule, AdaptiveSchedule):
                level = self._controller.mask_level()
                self._adaptive = self._schedule.advance(self._adaptive, level)
            self._apply()
            return
        # an epoch that is begun again, after a resume within it, has not ended
        ahead = _next_index("epoch_step: next_epoch", next_epoch, self._current_epoch)
        if ahead > self._current_epoch:
            self._epoch.end_epoch(self._current_epoch)
        if self._epoch.known is None:
            self._end_epoch()
            warnings.warn(
                "update_per_optimizer_step without steps_per_epoch: the schedule begins once an "
                "epoch has been counted, at the second epoch_step()",
                stacklevel=3,
            )
        else:
            self._epoch.done = 0
            super().epoch_step(next_epoch)

    def get_state(self) -> dict[str, Any]:
        state = super().get_state() | (self._epoch.get_state() if self._epoch else {})
        if isinstance(self._schedule, AdaptiveSchedule):
            state["num_bad_epochs"] = self._adaptive.bad_epochs
            state["current_sparsity_level"] = self._adaptive.level
        return state

    def schema(self) -> Any:
        found = {**super().schema(), **(self._epoch.schema() if self._epoch else {})}
        if isinstance(self._schedule, AdaptiveSchedule):
            below_1 = math.nextafter(1, 0)
            found["num_bad_epochs"] = integer()
            found["current_sparsity_level"] = number("a number in [0, 1)", 0, below_1)
        return found

    def _take(self, state: Mapping[str, Any]) -> None:
        super()._take(state)
        if isinstance(self._schedule, AdaptiveSchedule):
            level, bad = state["current_sparsity_level"], state["num_bad_epochs"]
            self._adaptive = AdaptiveState(level, bad)
        if self._epoch is not None:
            self._epoch.take(state)

    @property
    def _freeze_is_due(self) -> bool:
        epoch = self._schedule.freeze_epoch
        if not isinstance(self._schedule, AdaptiveSchedule):
            epoch = max(epoch, self._schedule.target_epoch)
        return self._current_epoch >= epoch

    def _apply(self) -> None:
        self._controller.follow(self.current_sparsity_level, last=self._freeze_is_due)


def make_scheduler(controller: Any, schedule: Schedule) -> SparsityScheduler:
    """Return the scheduler that follows ``schedule``; see ``SparsityScheduler``."""
    if isinstance(schedule, RampSchedule):
        return RampScheduler(controller, schedule)
    return EpochScheduler(controller, schedule)


def _next_index(name: str, given: int | None, current: int) -> int:
    if given is None:
        return current + 1
    if type(given) is not int or given < 0:
        raise ValueError(f"{name} must be an integer from 0, got {given!r}")
    return given
