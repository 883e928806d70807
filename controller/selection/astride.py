"""Sums of w g over blocks that lie on two ranks, from the sums of their parts.

Where each step adds a sum's square, that needs both parts, and a step sends nothing. So each rank
keeps the sums of its parts, step by step, until ranks talk anyway. As often as these sums take the
memory of the rows that they are of, a step sends them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.grid import ceil_div
from ...kernels.pattern import Block
from ..masks.exchange import heads_elsewhere
from ..masks.shards import Shard
from ..masks.weight import SparseWeight
from .criteria import group_sums, product


def parted(weight: SparseWeight) -> Shard | None:
    """Return the shard of a weight of which ranks have parts of blocks; None of others."""
    shard = weight.shard
    return None if shard is None or weight.packed or not shard.straddles else shard


def whole_rows(shard: Shard | None) -> slice:
    """Return which rows here are of groups that no other rank has a part of."""
    return slice(None) if shard is None else slice(shard.head, shard.sides[0] - shard.tail)


def edge_sums(shard: Shard, values: Tensor, slopes: Tensor | None = None) -> Tensor:
    """Return what the groups with parts elsewhere have here of their sums.

    Args:
        values: of all rows here: w g, or w with ``slopes`` for g.

    Returns:
        float32 ``(units, across)``: a row for each ``Shard.unit`` rows of the first group, then of
        the last one.
    """
    lower, rows = Block(shard.unit, shard.pattern.cols), len(values)
    ends = (slice(0, shard.head), slice(rows - shard.tail, rows))
    found = [values[at] if slopes is None else product(values[at], slopes[at]) for at in ends]
    return torch.cat([group_sums(one, lower) for one in found])


def steps_at_most(shard: Shard) -> int:
    """Return how many steps' sums take the memory of the rows that they are of, in float32."""
    return shard.unit * shard.pattern.cols


def sums_of_whole(
    weights: Sequence[SparseWeight], parts: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Return the sums of w g of the last group that belongs here and ends elsewhere.

    Args:
        weights: of which ranks have parts of blocks.
        parts: of each ``edge_sums`` of some steps, the same on all ranks.

    Returns:
        float32 ``(steps, across)``, as ``group_sums`` of the whole; no rows where there is none.
    """
    shards = [shard for weight in weights if (shard := weight.shard)]
    heads, tails = [], []
    for shard, steps in zip(shards, parts, strict=True):
        # a row of each unit, of all steps side by side
        units = torch.stack([*steps], 1).flatten(1)
        first = ceil_div(shard.head, shard.unit)
        heads.append(units[:first])
        tails.append(units[first:])
    found = []
    came = heads_elsewhere(weights, heads, by_unit=True) if heads else []
    for shard, steps, tail, rest in zip(shards, parts, tails, came, strict=True):
        units_of_all = Block(shard.pattern.rows // shard.unit, 1)
        sums = group_sums(torch.cat([tail, *rest]), units_of_all)
        found.append(sums.view(-1, steps[0].shape[1]))
    return found


def sums_of_shards(weights: Sequence[SparseWeight], matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return the ``group_sums`` of the groups that belong here.

    Args:
        weights: of one block pattern.
        matrices: float32, of each what is here.
    """
    found = {
        weight: group_sums(matrix[whole_rows(parted(weight))], weight.pattern)
        for weight, matrix in zip(weights, matrices, strict=True)
    }
    edges = {
        weight: [edge_sums(shard, matrix)]
        for weight, matrix in zip(weights, matrices, strict=True)
        if (shard := parted(weight))
    }
    for weight, end in zip(edges, sums_of_whole([*edges], [*edges.values()]), strict=True):
        found[weight] = torch.cat([found[weight], end])
    return [*found.values()]
