"""``torch.ao.pruning.WeightNormSparsifier``, block magnitude sparsity that ships with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier


def mask_update(layer: nn.Linear, block: tuple[int, int], level: float) -> Callable[[], None]:
    """Return what updates ``layer``'s mask once: whole blocks, ``level`` of them pruned."""
    sparsifier = WeightNormSparsifier(
        sparsity_level=level, sparse_block_shape=block, zeros_per_block=block[0] * block[1]
    )
    model = nn.Sequential(layer)
    sparsifier.prepare(model, config=[{"tensor_fqn": "0.weight"}])
    return sparsifier.step


def mask_of(layer: nn.Linear) -> Tensor:
    """Return the mask that ``layer`` has got: bool, of the weight's shape."""
    parametrizations: Any = layer.parametrizations
    return parametrizations.weight[0].mask.bool()
