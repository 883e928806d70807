"""How a model is run on a user's batches for what is measured, not trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Run = Callable[[nn.Module, Any], Any]  # calls a model on a batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode while the context is open, and then back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def inputs_of(batch: Any) -> Any:
    """Return what a model takes of a batch: of a tuple or list, only the first item."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def run(model: nn.Module, batch: Any) -> Any:
    """Return ``model(**batch)`` of a mapping, else ``model(inputs_of(batch))``."""
    return model(**batch) if isinstance(batch, Mapping) else model(inputs_of(batch))
