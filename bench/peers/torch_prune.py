"""``torch.nn.utils.prune``, which ships with torch: masks as buffers, multiplied in at forward."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils import prune


def compress(model: nn.Sequential, level: float) -> Callable[[], None]:
    """Put ``model`` under masks of one pool of |w|, and return what updates them once."""
    weights = [(layer, "weight") for layer in model]

    def update() -> None:
        for name, buffer in model.named_buffers():
            # else the next masks would prune a part of what is left
            if name.endswith("weight_mask"):
                buffer.fill_(1)
        prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=level)

    update()
    return update
