"""Schedulers: they count epochs and steps, and drive the controller along a schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..config.schedule import AdaptiveSchedule, AdaptiveState, PolynomialSchedule, Schedule


class ScheduledController(Protocol):
    """What a scheduler needs of a controller."""

    def set_sparsity_level(self, level: float, /) -> None:
        """Find the masks anew for ``level``, from today's weights; do nothing to frozen masks."""
        ...

    def freeze(self) -> None:
        """Stop updating the masks."""
        ...

    def begin_step(self) -> None:
        """Take in the gradients of the step that has ended."""
        ...

    def mask_level(self) -> float:
        """Return the level that the masks have."""
        ...


class CompressionScheduler:
    """Counts epochs and optimiser steps.

    Call ``epoch_step()`` at the start of each epoch and ``step()`` at the start of each optimiser
    step. Both indices are -1 before the first call; no epoch resets the step index.

    Args:
        begin_step: called at each ``step()``, before anything else.
    """

    def __init__(self, begin_step: Callable[[], None] = lambda: None) -> None:
        self._begin_step = begin_step
        self._current_step = -1
        self._current_epoch = -1

    @property
    def current_step(self) -> int:
        """Index of the current optimiser step, counted over all epochs."""
        return self._current_step

    @property
    def current_epoch(self) -> int:
        """Index of the current epoch."""
        return self._current_epoch

    def step(self, next_step: int | None = None) -> None:
        """Begin an optimiser step.

        Args:
            next_step: its index, from 0; by default one more than the current.

        Raises:
            ValueError: ``next_step`` is no integer from 0.
        """
        ahead = _next_index("step: next_step", next_step, self._current_step)
        self._begin_step()
        self._current_step = ahead

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin an epoch.

        Args:
            next_epoch: its index, from 0; by default one more than the current.

        Raises:
            ValueError: ``next_epoch`` is no integer from 0.
        """
        self._current_epoch = _next_index(
            "epoch_step: next_epoch", next_epoch, self._current_epoch
        )

    def get_state(self) -> dict[str, Any]:
        """Return what ``load_state`` needs, in plain Python values."""
        return {"current_step": self._current_step, "current_epoch": self._current_epoch}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where another scheduler of this configuration was.

        The masks are not touched: they come back with the controller's own state.

        Raises:
            ValueError: a key is missing, foreign, or of a wrong value; nothing is changed then.
        """
        check_keys(state, self.get_state())
        step = integer(state, "current_step", least=-1)
        epoch = integer(state, "current_epoch", least=-1)
        self._current_step, self._current_epoch = step, epoch


class StubScheduler(CompressionScheduler):
    """Changes no mask: it neither counts nor drives, has no state and ignores any it is given."""

    def step(self, next_step: int | None = None) -> None:
        self._begin_step()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        pass

    def get_state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


class SparsityScheduler(CompressionScheduler):
    """Sets the controller's level along a schedule.

    At each ``epoch_step()`` the masks are found anew, even where the level stays, since the
    weights have moved. With ``update_per_optimizer_step`` that is at each ``step()`` instead.

    In the schedule's ``freeze_epoch`` the masks are frozen, once the level of that epoch is
    applied. A freeze epoch before the target epoch waits for it: a run ends at its target.

    With ``update_per_optimizer_step`` and ``steps_per_epoch`` unknown, the first epoch counts its
    steps and does nothing else; both indices stay at -1.

    Args:
        controller: what is driven. Its masks are at ``schedule.initial_level`` already.
        schedule: which level holds when.
    """

    def __init__(self, controller: ScheduledController, schedule: Schedule) -> None:
        super().__init__(controller.begin_step)
        self._controller = controller
        self._schedule = schedule
        self._configured_steps_per_epoch = _steps_per_epoch(schedule)
        self._steps_in_current_epoch = 0
        self._adaptive = AdaptiveState(schedule.initial_level, bad_epochs=0)

    @property
    def schedule(self) -> Schedule:
        """The schedule; once they are counted, with its ``steps_per_epoch``."""
        return self._schedule

    @property
    def target_level(self) -> float:
        """The level at which the schedule ends."""
        return self._schedule.target_level

    @property
    def current_sparsity_level(self) -> float:
        """The scheduled level of this epoch, or step; before the first the initial level."""
        if isinstance(self._schedule, AdaptiveSchedule):
            return self._adaptive.level
        if self._current_epoch == -1:
            return self._schedule.initial_level
        return self._schedule.level(
            self._current_epoch, step=max(self._steps_in_current_epoch - 1, 0)
        )

    def step(self, next_step: int | None = None) -> None:
        if not self._updates_per_step:
            super().step(next_step)
            return
        if _steps_per_epoch(self._schedule) is None:
            self._begin_step()
            self._steps_in_current_epoch += 1
            return
        super().step(next_step)
        frozen = self._freeze_is_due and self._steps_in_current_epoch > 0
        self._steps_in_current_epoch += 1
        if not frozen:
            self._apply()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin an epoch; see ``CompressionScheduler``.

        Raises:
            ValueError: with ``update_per_optimizer_step``, the epoch that ends had another number
                of steps than ``steps_per_epoch``.
        """
        ahead = _next_index("epoch_step: next_epoch", next_epoch, self._current_epoch)
        if self._updates_per_step:
            # an epoch that is begun again, after a resume within it, has not ended
            if ahead > self._current_epoch:
                self._count_epoch()
            if _steps_per_epoch(self._schedule) is None:
                return
            self._steps_in_current_epoch = 0
            super().epoch_step(next_epoch)
            return
        frozen = self._freeze_is_due
        if isinstance(self._schedule, AdaptiveSchedule) and not frozen:
            self._adaptive = self._schedule.advance(self._adaptive, self._controller.mask_level())
        super().epoch_step(next_epoch)
        if not frozen:
            self._apply()

    def get_state(self) -> dict[str, Any]:
        state = super().get_state()
        if self._updates_per_step:
            state["_steps_per_epoch"] = _steps_per_epoch(self._schedule)
            state["_steps_in_current_epoch"] = self._steps_in_current_epoch
        if isinstance(self._schedule, AdaptiveSchedule):
            state["num_bad_epochs"] = self._adaptive.bad_epochs
            state["current_sparsity_level"] = self._adaptive.level
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        schedule, adaptive = self._schedule, self._adaptive
        steps_in_current_epoch = 0
        check_keys(state, self.get_state())
        if self._updates_per_step:
            steps_in_current_epoch = integer(state, "_steps_in_current_epoch", least=0)
            steps = self._configured_steps_per_epoch
            if state["_steps_per_epoch"] is not None:
                stored = integer(state, "_steps_per_epoch", least=1)
                if steps not in (None, stored):
                    raise ValueError(
                        f"load_state: _steps_per_epoch must be {steps} as configured, got {stored}"
                    )
                steps = stored
            schedule = schedule.model_copy(update={"steps_per_epoch": steps})
        if isinstance(schedule, AdaptiveSchedule):
            level = state["current_sparsity_level"]
            if type(level) not in (int, float) or not 0 <= level < 1:
                raise ValueError(
                    f"load_state: current_sparsity_level must be in [0, 1), got {level!r}"
                )
            adaptive = AdaptiveState(level, integer(state, "num_bad_epochs", least=0))
        super().load_state(state)
        self._schedule, self._adaptive = schedule, adaptive
        self._steps_in_current_epoch = steps_in_current_epoch

    @property
    def _updates_per_step(self) -> bool:
        schedule = self._schedule
        return isinstance(schedule, PolynomialSchedule) and schedule.update_per_optimizer_step

    @property
    def _freeze_is_due(self) -> bool:
        epoch = self._schedule.freeze_epoch
        if not isinstance(self._schedule, AdaptiveSchedule):
            epoch = max(epoch, self._schedule.target_epoch)
        return self._current_epoch >= epoch

    def _apply(self) -> None:
        self._controller.set_sparsity_level(self.current_sparsity_level)
        if self._freeze_is_due:
            self._controller.freeze()

    def _count_epoch(self) -> None:
        """Take the number of steps of the epoch that ends, or hold it against the known one."""
        want, got = _steps_per_epoch(self._schedule), self._steps_in_current_epoch
        if want is None and got == 0:
            warnings.warn(
                "update_per_optimizer_step without steps_per_epoch: the schedule begins once an "
                "epoch has been counted, at the second epoch_step()",
                stacklevel=3,
            )
        elif want is None:
            self._schedule = self._schedule.model_copy(update={"steps_per_epoch": got})
        elif got not in (0, want):
            raise ValueError(
                f"epoch_step: epoch {self._current_epoch} must have steps_per_epoch = {want} "
                f"steps, got {got}; to begin it again, give its index as next_epoch"
            )


def _steps_per_epoch(schedule: Schedule) -> int | None:
    return schedule.steps_per_epoch if isinstance(schedule, PolynomialSchedule) else None


def _next_index(name: str, given: int | None, current: int) -> int:
    if given is None:
        return current + 1
    if type(given) is not int or given < 0:
        raise ValueError(f"{name} must be an integer from 0, got {given!r}")
    return given


def check_keys(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"load_state: the scheduler's state must be a mapping, got {state!r}")
    for what, keys in (
        ("lacks", own.keys() - state.keys()),
        ("has the foreign", state.keys() - own.keys()),
    ):
        if keys:
            raise ValueError(
                f"load_state: the scheduler's state {what} {', '.join(sorted(map(repr, keys)))}; "
                f"its keys must be {', '.join(map(repr, own))}"
            )


def integer(state: Mapping[str, Any], key: str, least: int) -> int:
    value = state[key]
    if type(value) is not int or value < least:
        raise ValueError(f"load_state: {key} must be an integer from {least}, got {value!r}")
    return value
