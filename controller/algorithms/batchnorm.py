"""Re-estimate BatchNorm statistics after masks have changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .evaluation import evaluating, inputs_of, run


@torch.no_grad()
def adapt_batchnorm(model: nn.Module, batches: Iterable[Any], samples: int) -> None:
    """Replace the running statistics of every BatchNorm by the average over ``batches``.

    All else runs in evaluation mode, so that dropout and the like stay out. Training flags and
    momenta are put back; a failing forward puts the old statistics back too.

    Args:
        model: run as ``model(batch)``; of a tuple or list, only the first item; a dictionary as
            keywords.
        batches: what ``model`` takes, already on its device; the first dimension counts samples.
        samples: stop once this many have been seen.

    Raises:
        ValueError: ``batches`` is empty.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or samples == 0:
        return
    momenta = {norm: norm.momentum for norm in norms}
    before = {norm: {k: v.clone() for k, v in norm.named_buffers(recurse=False)} for norm in norms}
    for norm in norms:
        # None averages over all batches; running statistics would remember the dense model
        norm.momentum = None
        norm.reset_running_stats()
    seen = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
            for batch in batches:
                run(model, batch)
                seen += _size(batch)
                if seen >= samples:
                    break
        if seen == 0:
            raise ValueError(
                "batchnorm_adaptation: the data must yield at least one batch, got none"
            )
    except BaseException:
        for norm, buffers in before.items():
            for name, value in buffers.items():
                getattr(norm, name).copy_(value)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _size(batch: Any) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else inputs_of(batch))
