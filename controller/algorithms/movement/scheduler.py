"""The warm-up: threshold and factor rise at every step, then the masks stay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from ..scheduler import CompressionScheduler, check_keys, integer
from .config import MovementSparsityConfig


class ThresholdController(Protocol):
    """What the scheduler drives."""

    frozen: bool

    def begin_step(self) -> None: ...
    def check_epoch(self) -> None: ...
    def initial_threshold(self) -> float: ...
    def update_masks(self, threshold: float, factor: float) -> None: ...
    def finish(self) -> None: ...


class MovementScheduler(CompressionScheduler):
    """Raises the threshold and the loss's factor through the warm-up, at every step.

    Before it the threshold is -inf and the factor 0; within it both follow ``v0 + (1 - (1 -
    progress)^power) (v1 - v0)``; after it they are final, heads and channels are resolved, the
    masks are frozen, and BatchNorm is adapted to them where that is configured. Steps of an epoch
    that are not configured are counted in the first.

    Args:
        controller: what is driven.
        config: when, and from where to where.
    """

    def __init__(self, controller: ThresholdController, config: MovementSparsityConfig) -> None:
        super().__init__(controller.begin_step)
        self._controller = controller
        self._config = config
        self._steps_per_epoch = config.steps_per_epoch
        self._steps_in_current_epoch = 0
        self._start = config.init_importance_threshold

    @property
    def progress(self) -> float:
        """Share of the warm-up that has passed: below 0 before it, from 1 on after it."""
        if self._steps_per_epoch is None:
            return -1.0
        start, end = self._config.warmup_start_epoch, self._config.warmup_end_epoch
        steps = self._current_step - start * self._steps_per_epoch
        return steps / ((end - start) * self._steps_per_epoch)

    @property
    def current_importance_threshold(self) -> float:
        """The threshold at this step; that of the warm-up's start is known once it has begun."""
        progress, start = self.progress, self._start
        if progress < 0:
            return -math.inf
        if progress >= 1 or start is None:
            return self._config.final_importance_threshold
        return start + self._share * (self._config.final_importance_threshold - start)

    @property
    def current_importance_regularization_factor(self) -> float:
        """The loss's factor at this step."""
        return self._share * self._config.importance_regularization_factor

    @property
    def _share(self) -> float:
        return 1 - (1 - min(max(self.progress, 0.0), 1.0)) ** self._config.power

    def step(self, next_step: int | None = None) -> None:
        super().step(next_step)
        self._steps_in_current_epoch += 1
        controller = self._controller
        if self._start is None and 0 <= self.progress < 1:
            self._start = controller.initial_threshold()
            if self._start >= self._config.final_importance_threshold:
                warnings.warn(
                    f"the first thousandth of the importances ends at {self._start:.6g}, which is "
                    "not below final_importance_threshold "
                    f"{self._config.final_importance_threshold:.6g}: the warm-up will prune less "
                    "and less",
                    stacklevel=2,
                )
        controller.update_masks(
            self.current_importance_threshold, self.current_importance_regularization_factor
        )
        if self.progress >= 1 and not controller.frozen:
            controller.finish()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin an epoch; see ``CompressionScheduler``.

        Raises:
            ValueError: the epoch that ends had another number of steps than those before it.
        """
        steps = self._steps_in_current_epoch
        if self._steps_per_epoch is None and steps:
            self._steps_per_epoch = steps
        if steps not in (0, self._steps_per_epoch):
            raise ValueError(
                f"epoch_step: epoch {self._current_epoch} must have steps_per_epoch = "
                f"{self._steps_per_epoch} steps, got {steps}"
            )
        self._controller.check_epoch()
        super().epoch_step(next_epoch)
        self._steps_in_current_epoch = 0

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {
            "_init_importance_threshold": self._start,
            "_steps_per_epoch": self._steps_per_epoch,
            "_steps_in_current_epoch": self._steps_in_current_epoch,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        check_keys(state, self.get_state())
        start, configured = state["_init_importance_threshold"], self._config.steps_per_epoch
        if start is not None and (type(start) not in (int, float) or not math.isfinite(start)):
            raise ValueError(
                "load_state: _init_importance_threshold must be a finite number or None, got "
                f"{start!r}"
            )
        steps = configured
        if state["_steps_per_epoch"] is not None:
            steps = integer(state, "_steps_per_epoch", least=1)
            if configured not in (None, steps):
                raise ValueError(
                    f"load_state: _steps_per_epoch must be {configured} as configured, got {steps}"
                )
        steps_in_current_epoch = integer(state, "_steps_in_current_epoch", least=0)
        super().load_state(state)
        self._start, self._steps_per_epoch = start, steps
        self._steps_in_current_epoch = steps_in_current_epoch
