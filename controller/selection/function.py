"""A user's own criterion on sharded weights: it sees the full ones, as DTensors.

What it computes of them, rows' norms say, torch adds up by collectives of its own. Of stages of a
pipeline it sees plain tensors, each on the ranks that have the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..masks.shards import is_sharded, like_shard, replicated
from ..masks.weight import SparseWeight
from .criteria import (
    Evidence,
    Function,
    Importance,
    asked,
    called,
    check_asked,
    check_weights,
    extremes,
)


def found_by_function(
    function: Function,
    weights: Sequence[SparseWeight],
    evidence_of: Callable[[SparseWeight], Evidence],
) -> list[Importance]:
    """Return the importances of what is here of weights, of which some are sharded; 24 bytes a
    weight are sent beside what the function itself sends.

    Args:
        function: the user's.
        weights: all ranks give the same.
        evidence_of: of a weight, of what is here.

    Raises:
        ValueError: on every rank: it does not work on DTensors, or returns what it must not.
    """
    ranks, device = weights[0].ranks, weights[0].mask.device
    with ranks.together(device):
        check_weights(weights)
        evidence = [evidence_of(weight) for weight in weights]
    # an error of the function is one of all ranks, which it asks alike
    with ranks.together(device):
        found = [
            None if weight.absent else _asked(function, weight, own)
            for weight, own in zip(weights, evidence, strict=True)
        ]
    ends = ranks.most(torch.stack([_ends(own, device) for own in found])).tolist()
    importances = []
    for weight, own, (minus_least, most, grouped) in zip(weights, found, ends, strict=True):
        rows, across = weight.full_grid if grouped else weight.full_shape
        check_asked(function, weight.name, -minus_least, most, several=rows * across > 1)
        nothing = torch.empty(0, across, device=device)
        importances.append(own or Importance(nothing, per_group=bool(grouped)))
    return importances


def _asked(function: Function, weight: SparseWeight, evidence: Evidence) -> Importance:
    """Return what is here of what a function returns, in float32: a rank that has nothing of it
    cannot know its type.
    """
    matrix: Any = weight.target.matrix(weight.weight.detach())
    if not is_sharded(matrix):
        values = asked(function, evidence).float()
        return Importance(values, per_group=values.shape != matrix.shape)
    try:
        found: Any = asked(function, _of_all_ranks(evidence, weight, matrix))
    except Exception as error:
        raise ValueError(
            f"weight_importance: {called(function)} must work on DTensors for {weight.name!r}, "
            "which is sharded: by torch's operations on what its Evidence has, got "
            f"{type(error).__name__}: {error}"
        ) from error
    assert weight.shard is not None
    whole, sharded = found.shape == matrix.shape, is_sharded(found)
    if whole and sharded:
        found = found.redistribute(matrix.device_mesh, matrix.placements).to_local()
        return Importance(weight.whole_grid(found).float())
    found = weight.whole_grid(found.full_tensor() if sharded else found)
    here = found[weight.shard.here if whole else weight.shard.groups]
    return Importance(here.float(), per_group=not whole)


def _of_all_ranks(evidence: Evidence, weight: SparseWeight, matrix: Any) -> Evidence:
    """Return the evidence on the full weight, as DTensors."""
    gradient, product, norm = weight.weight.grad, evidence.product, evidence.input_norm
    own = None if product is None else weight.whole_grid(product).contiguous()
    return evidence._replace(
        weight=matrix,
        gradient=None if gradient is None else weight.target.matrix(gradient),
        product=None if own is None else like_shard(matrix, own, matrix.shape),
        input_norm=None if norm is None else replicated(matrix, norm),
        groups=(slice(None), slice(None)),
    )


def _ends(found: Importance | None, device: torch.device) -> Tensor:
    """Return the least magnitude, with a minus, the greatest, and whether they are of groups."""
    ends = torch.full((3,), -torch.inf, dtype=torch.float64, device=device)
    if found is not None:
        ends[2] = found.per_group
        if found.values.numel():
            least, most = extremes(found.values)
            ends[0], ends[1] = -least, most
    return ends.where(~ends.isnan(), torch.inf)
