"""The warm-up: threshold and factor rise at every step, then the masks stay."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from ...masks.schema import number, optional
from ..scheduler import CompressionScheduler, EpochLength
from .config import MovementSparsityConfig


class MovementScheduler(CompressionScheduler):
    """Raises the threshold and the loss's factor through the warm-up, at every step.

    Before it the threshold is -inf and the factor 0; within it both follow ``v0 + (1 - (1 -
    progress)^power) (v1 - v0)``; after it they are final, heads and channels are resolved, the
    masks are frozen, and BatchNorm is adapted to them where that is configured. Steps of an epoch
    that are not configured are counted in the first.

    Args:
        controller: a ``MovementSparsityController``, or what has its methods and ``frozen``.
        config: when, and from where to where.
    """

    def __init__(self, controller: Any, config: MovementSparsityConfig) -> None:
        super().__init__(controller.begin_step, controller.check_epoch, controller.have_begun)
        self._controller = controller
        self._config = config
        self._epoch = EpochLength(config.steps_per_epoch)
        self._start = config.init_importance_threshold

    @property
    def progress(self) -> float:
        """Share of the warm-up that has passed: below 0 before it, from 1 on after it."""
        if self._epoch.known is None:
            return -1.0
        start, end = self._config.warmup_start_epoch, self._config.warmup_end_epoch
        assert start is not None
        assert end is not None
        steps = self._current_step - start * self._epoch.known
        return steps / ((end - start) * self._epoch.known)

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
        factor = self._config.importance_regularization_factor
        assert factor is not None
        return self._share * factor

    @property
    def _share(self) -> float:
        return 1 - (1 - min(max(self.progress, 0.0), 1.0)) ** self._config.power

    def _step(self, next_step: int | None) -> None:
        super()._step(next_step)
        self._epoch.done += 1
        controller = self._controller
        if self._start is None and 0 <= self.progress < 1:
            self._start = controller.initial_threshold()
            if self._start >= self._config.final_importance_threshold:
                warnings.warn(
                    f"the first thousandth of the importances ends at {self._start:.6g}, which is "
                    "not below final_importance_threshold "
                    f"{self._config.final_importance_threshold:.6g}: the warm-up will prune less "
                    "and less",
                    stacklevel=3,
                )
        controller.update_masks(
            self.current_importance_threshold, self.current_importance_regularization_factor
        )
        if self.progress >= 1 and not controller.frozen:
            controller.finish()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin an epoch; a ValueError if the one that ends had another number of steps."""
        with self._refusable():
            self._epoch.end_epoch(self._current_epoch)
            super().epoch_step(next_epoch)
            self._epoch.done = 0

    def get_state(self) -> dict[str, Any]:
        start = {"_init_importance_threshold": self._start}
        return super().get_state() | start | self._epoch.get_state()

    def schema(self) -> Any:
        largest = sys.float_info.max
        start = {"_init_importance_threshold": optional(number("finite", -largest, largest))}
        return {**super().schema(), **start, **self._epoch.schema()}

    def _take(self, state: Mapping[str, Any]) -> None:
        super()._take(state)
        self._start = state["_init_importance_threshold"]
        self._epoch.take(state)
