"""A user's own criterion on sharded weights: it sees the full ones, as DTensors.

What it computes of them, rows' norms say, torch adds up by collectives of its own. Of stages of a
pipeline it sees plain tensors, each on the ranks that have the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..masks.exchange import full_matrix
from ..masks.shards import is_sharded, like_shard, on_all_ranks, replicated
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
        ValueError: on every rank: it raises on one, does not work on DTensors, or returns what it
            must not. One that raises between collectives of its own leaves the others waiting.
    """
    ranks, device = weights[0].ranks, weights[0].mask.device
    with ranks.together(device):
        check_weights(weights)
        evidence = [evidence_of(weight) for weight in weights]
    with ranks.together(device):
        seen = [*map(_of_all_ranks, evidence, weights)]
    # before anything else is sent: what one rank raises, and others do not, is told to all
    with ranks.together(device):
        returned = [
            None if weight.absent else _asked(function, weight, own)
            for weight, own in zip(weights, seen, strict=True)
        ]
    each = zip(weights, seen, returned, strict=True)
    found = [
        None if values is None else _here(weight, own, values) for weight, own, values in each
    ]
    ends = ranks.most(torch.stack([_ends(own, device) for own in found])).tolist()
    importances = []
    for weight, own, (minus_least, most, grouped) in zip(weights, found, ends, strict=True):
        rows, across = weight.full_grid if grouped else weight.full_shape
        check_asked(function, weight.name, -minus_least, most, several=rows * across > 1)
        if own is None:
            own = _of_none(weight, bool(grouped), device)
        importances.append(own)
    return importances


def _asked(function: Function, weight: SparseWeight, evidence: Evidence) -> Any:
    """Return what a function returns of a weight; of a sharded one mostly a DTensor."""
    if not is_sharded(weight.weight):
        return asked(function, evidence)
    try:
        return asked(function, evidence)
    except Exception as error:
        raise ValueError(
            f"weight_importance: {called(function)} must work on DTensors for {weight.name!r}, "
            "which is sharded: by torch's operations on what its Evidence has, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _here(weight: SparseWeight, evidence: Evidence, found: Any) -> Importance:
    """Return what is here of what a function has returned, in float32: a rank that has nothing of
    it cannot know its type.
    """
    matrix: Any = evidence.weight
    whole, sharded = found.shape == matrix.shape, is_sharded(found)
    if not is_sharded(weight.weight):
        return Importance(found.float(), per_group=not whole)
    assert weight.shard is not None
    if whole and sharded and not weight.shard.leaves_out:
        found = found.redistribute(matrix.device_mesh, matrix.placements).to_local()
        return Importance(weight.whole_grid(found).float())
    found = weight.whole_grid(found.full_tensor() if sharded else found)
    here = found[weight.shard.here if whole else weight.shard.groups]
    return Importance(here.float(), per_group=not whole)


def _of_all_ranks(evidence: Evidence, weight: SparseWeight) -> Evidence:
    """Return the evidence on the full weight, as DTensors if it is sharded."""
    if not is_sharded(weight.weight):
        return evidence
    parameter, gradient, shard = weight.weight.detach(), weight.weight.grad, weight.shard
    product, norm = evidence.product, evidence.input_norm
    # torch's operations fail on the ranks that have nothing, which has no greatest element, and
    # leave the others waiting
    copied = shard is not None and shard.leaves_out

    def matrix(tensor: Tensor) -> Tensor:
        return weight.target.matrix(on_all_ranks(tensor) if copied else tensor)

    whole = matrix(parameter)
    if product is not None:
        own = weight.whole_grid(full_matrix(weight, product) if copied else product).contiguous()
        product = replicated(whole, own) if copied else like_shard(whole, own, whole.shape)
    return evidence._replace(
        weight=whole,
        gradient=None if gradient is None else matrix(gradient),
        product=product,
        input_norm=None if norm is None else replicated(whole, norm),
        groups=(slice(None), slice(None)),
    )


def _of_none(weight: SparseWeight, grouped: bool, device: torch.device) -> Importance:
    """Return the importances of a weight that other stages have, of no rows."""
    assert weight.shard is not None
    cols = weight.shard.groups[1] if grouped else weight.shard.here[1]
    return Importance(torch.empty(0, cols.stop - cols.start, device=device), per_group=grouped)


def _ends(found: Importance | None, device: torch.device) -> Tensor:
    """Return the least magnitude, with a minus, the greatest, and whether they are of groups."""
    ends = torch.full((3,), -torch.inf, dtype=torch.float64, device=device)
    if found is not None:
        ends[2] = found.per_group
        if found.values.numel():
            least, most = extremes(found.values)
            ends[0], ends[1] = -least, most
    return ends.where(~ends.isnan(), torch.inf)
