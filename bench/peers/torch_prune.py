"""``torch.nn.utils.prune``, which ships with torch: masks as buffers, multiplied in at forward."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils import prune


def compress(model: nn.Sequential, level: float) -> Callable[[], None]:
    """Put ``model`` under masks of one pool of |w|, and return what updates them once."""
    weights = [(layer, "weight") for layer in model]

    def update() -> None:
        for layer in model:
            # else the next masks would prune a part of what is left
            if hasattr(layer, "weight_mask"):
                layer.weight_mask.fill_(1)
        prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=level)

    update()
    return update
