"""Shards: weights whose rows lie on several ranks, pruned as the one pool that they are.

A rank masks the rows that it holds, under blocks cut to what divides their beginning, so that
every kernel takes a shard for an ordinary matrix. What is chosen among are the blocks of the full
weight: each belongs to the rank that holds its first row, which gets the rows that lie elsewhere
and sends back what becomes of them (``exchange.py``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from ...kernels.grid import ceil_div
from ...kernels.pattern import NM, Block, Pattern, grid_shape
from .ranks import Ranks

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether it is one of torch's, whose import takes a second: who has one has paid."""
    if type(tensor) in _PLAIN:  # as nearly all that are asked of
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return what is here of a tensor, without a gradient if it is sharded."""
    if type(tensor) in _PLAIN or not is_sharded(tensor):
        return tensor
    return tensor.detach().to_local()


def any_nonzero(tensor: Any) -> Tensor:
    """Return whether an element differs from zero, on whatever rank: bool, 0-d."""
    found = local_part(tensor.detach()).any()
    if is_sharded(tensor):
        count = found.long()
        for dim in range(tensor.device_mesh.ndim):
            distributed.all_reduce(count, group=tensor.device_mesh.get_group(dim))
        return count > 0
    return found


@dataclass(frozen=True)
class Shard:
    """The part of a weight that is here: rows of its matrix.

    Attributes:
        shape: of the full matrix.
        bounds: the first row of each part, and behind them the number of rows.
        place: which part is here.
        peers: the ranks, in the controller's group, that have the parts beside it.
        counted: this rank speaks for the part; others may hold copies.
        pattern: of the full matrix.
        copies: the ranks that have the very same part; None: there are no others.
    """

    shape: tuple[int, int]
    bounds: tuple[int, ...]
    place: int
    peers: tuple[int, ...]
    counted: bool
    pattern: Pattern
    copies: Ranks | None = None

    @property
    def rows(self) -> slice:
        """The rows of the full matrix that are here."""
        return slice(*self.bounds[self.place : self.place + 2])

    @property
    def own_pattern(self) -> Pattern:
        """The pattern of the local matrix: blocks so low that one begins at its first row."""
        if not isinstance(self.pattern, Block):
            return self.pattern
        return Block(math.gcd(self.pattern.rows, self.rows.start), self.pattern.cols)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups of the full matrix, down and across."""
        return grid_shape(self.pattern, self.shape)

    def groups_of(self, place: int) -> slice:
        """The rows of the full grid that belong to a part: those that begin in it."""
        first, last = self.bounds[place : place + 2]
        return slice(ceil_div(first, self.pattern.rows), ceil_div(last, self.pattern.rows))

    @property
    def groups(self) -> slice:
        return self.groups_of(self.place)

    def head_of(self, place: int) -> int:
        """How many rows of a part belong to a group that begins in an earlier one."""
        first, last = self.bounds[place : place + 2]
        return min(self.groups_of(place).start * self.pattern.rows, last) - first

    @property
    def head(self) -> int:
        return self.head_of(self.place)

    def owner_of_head(self, place: int) -> int:
        """Which part has the group that the head of ``place`` belongs to."""
        row = self.bounds[place] // self.pattern.rows
        return next(p for p in range(place) if row in range(*self._span(p)))

    def _span(self, place: int) -> tuple[int, int]:
        return self.groups_of(place).start, self.groups_of(place).stop

    @property
    def straddles(self) -> bool:
        """True where a group lies in several parts."""
        return any(self.head_of(place) for place in range(len(self.peers)))


def shard_of(
    name: str, weight: Any, pattern: Pattern, ranks: Ranks, *, transposed: bool, experts: bool
) -> Shard | None:
    """Return which part of a weight is here; None if it is not sharded.

    Args:
        name: the weight's, for messages.
        weight: the parameter.
        pattern: of the groups.
        ranks: those that train the model.
        transposed, experts: as ``Target``'s.

    Raises:
        ValueError: it is sharded in a way that masks do not cover.
    """
    if not is_sharded(weight):
        return None
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as OnDimension

    mesh, placements = weight.device_mesh, weight.placements
    split = [i for i, placed in enumerate(placements) if not isinstance(placed, Replicate)]
    first = placements[split[0]] if split else OnDimension(0)
    copied = [i for i in range(mesh.ndim) if i not in split]
    covered = len(split) <= 1 and type(first) is OnDimension and first.dim == 0
    covered &= len(copied) <= 1
    if not covered or transposed:
        raise ValueError(
            f"create_controller: {name!r} must be sharded on its output dimension alone, "
            "as fully_shard does by default with a weight stored (out, in), got the placements "
            f"{placements}"
            + " of a weight stored (in, out)" * transposed
            + "; list it in ignored_scopes"
        )
    here = mesh.get_coordinate()
    assert here is not None
    line: Any = mesh.mesh
    for dim in reversed(range(mesh.ndim)):
        if dim not in split:
            line = line.select(dim, here[dim])
    known = distributed.get_process_group_ranks(ranks.group) if ranks.group else [0]
    if not set(members := line.flatten().tolist()) <= set(known):
        raise ValueError(
            f"create_controller: process_group must hold all ranks of {name!r}, "
            f"{members}, got {known}"
        )
    per = math.prod(weight.shape[1:2]) if experts else 1  # rows of one index
    count = weight.shape[0]
    step = ceil_div(count, len(members))
    firsts = [min(i * step, count) for i in range(len(members) + 1)]
    place = here[split[0]] if split else 0
    assert weight.to_local().shape[0] == firsts[place + 1] - firsts[place]
    shape = (count * per, weight.shape.numel() // (count * per))
    _check_parts(name, pattern, per, firsts)
    return Shard(
        shape=shape,
        bounds=tuple(first * per for first in firsts),
        place=place,
        peers=tuple(known.index(rank) for rank in members),
        counted=all(here[dim] == 0 for dim in copied),
        pattern=pattern,
        copies=Ranks(mesh.get_group(copied[0])) if copied else None,
    )


def _check_parts(name: str, pattern: Pattern, per: int, firsts: Sequence[int]) -> None:
    if isinstance(pattern, NM) and pattern.transposable and any(per * f % 4 for f in firsts):
        raise ValueError(
            f"create_controller: the shards of {name!r} must be of whole tiles of 4 rows "
            f"for {pattern}, got {[b - a for a, b in pairwise(firsts)]} rows; list it in "
            "ignored_scopes"
        )


def reshard(model: nn.Module) -> None:
    """Let no module hold weights that it has gathered: what is written would not reach them."""
    module: Any = sys.modules.get("torch.distributed.fsdp")
    # each class that is sharded gets a subclass of it: without any there is nothing to look for
    if module is None or not module.FSDPModule.__subclasses__():
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            cast(Any, part).reshard()


def local_grid(shard: Shard, grid: Tensor) -> Tensor:
    """Return the bool grid of what is here from that of the full weight."""
    if not isinstance(shard.pattern, Block):
        return grid[shard.rows]
    start = shard.groups.start - (1 if shard.head else 0)
    return local_rows(shard, [grid[start : shard.groups.stop]])


def local_rows(shard: Shard, grids: list[Tensor]) -> Tensor:
    """Return the grid under ``own_pattern`` from that of each group that is here in part."""
    low, high = shard.own_pattern.rows, shard.pattern.rows
    here = shard.rows.stop - shard.rows.start
    grid = torch.cat(grids)
    skipped = shard.rows.start % high // low
    return grid.repeat_interleave(high // low, 0)[skipped : skipped + ceil_div(here, low)]
