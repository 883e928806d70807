"""What an algorithm adds to the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..masks.schema import Schema, check


class CompressionLoss(nn.Module):
    """A term of the training loss: ``loss = task_loss + controller.loss()``.

    A subclass overrides ``calculate``, and if it has a state ``get_state``, ``schema``, ``_take``.
    """

    def calculate(self) -> Tensor:
        """Return the term: a tensor of shape ``()`` on the model's device."""
        raise NotImplementedError(f"{type(self).__name__} must override calculate()")

    def forward(self) -> Tensor:
        return self.calculate()

    def get_state(self) -> dict[str, Any]:
        """Return what ``load_state`` needs, in plain Python values."""
        return {}

    def schema(self) -> Schema:
        """Say what ``get_state()``'s result must hold."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another loss of this class; a ValueError if it does not fit."""
        check(state, self.schema())
        self._take(state)

    def _take(self, state: Mapping[str, Any]) -> None:
        pass


class ZeroCompressionLoss(CompressionLoss):
    """The loss of an algorithm that adds none: a zero on ``device``."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self._device = torch.device(device)

    def calculate(self) -> Tensor:
        # a new tensor each time: `loss = controller.loss(); loss += ...` must not change the next
        return torch.zeros((), device=self._device)
