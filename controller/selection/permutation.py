"""In which order features lie so that blocks keep more: a search for one set of features.

The rows or columns of a weight that belong to one set of features may be reordered together. A
block of some features and some of the other side has the sum of its magnitudes as its mass. Of
each group of features the blocks of greatest mass are kept, as many as of any other group: by the
greatest mass alone strong features would come together and keep all, others would be gone, and
what was left learned less (docs/accuracy.md has the figures).

The search takes turns. For fixed masks, the mass kept is a sum over features of what each brings
to its group, and pairs of features swap places until no swap of two gains; swaps of two columns
are the moves of Pool and Yu for 2:4 (Channel Permutations for N:M Sparsity, NeurIPS 2021), judged
there by the masks that each leaves. Then the masks are chosen anew, which can only raise the mass.
It ends where neither gains. It starts from the features as they lie, and from groups of alike
ones; the better end counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.pattern import Block

STEPS = 50  # each with masks of its own
SWEEPS = 20  # of swaps for one choice of masks


@dataclass(frozen=True)
class Side:
    """The side of one weight that the features are.

    Attributes:
        sums: float64 ``(features, groups of the other side)``: magnitudes, added over each group.
        width: features in a group, a power of two.
        kept: how many blocks of each group of features stay.
    """

    sums: Tensor
    width: int
    kept: int

    @classmethod
    def of(cls, matrix: Tensor, pattern: Block, level: float, *, rows: bool) -> Side:
        """Return a side of a matrix ``(out, in)``: its rows, or its columns.

        Args:
            matrix: the weight.
            pattern: its blocks.
            level: share of them that is pruned, of each group to the nearest block.
            rows: whether the features are outputs.
        """
        values = (matrix if rows else matrix.T).abs().double()
        width, other = (pattern.rows, pattern.cols) if rows else (pattern.cols, pattern.rows)
        sums = _added(values, 1, other)
        return cls(sums, width, sums.shape[1] - round(level * sums.shape[1]))

    def blocks(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return mass of each block, ``(groups, groups of the other side)``, and which stay."""
        mass = _added(self.sums[order], 0, self.width)
        best = mass.sort(dim=1, descending=True, stable=True).indices[:, : self.kept]
        return mass, torch.zeros_like(mass).scatter_(1, best, 1)


def _added(values: Tensor, dim: int, width: int) -> Tensor:
    """Add up every ``width`` neighbours along a dimension of a matrix; the last may be fewer."""
    rest = -values.shape[dim] % width
    padded = functional.pad(values, (0, rest) if dim == 1 else (0, 0, 0, rest))
    return padded.unflatten(dim, (-1, width)).sum(dim + 1)


def kept_mass(sides: Sequence[Side], order: Tensor) -> float:
    """Return the magnitude in the blocks that stay, of all weights together."""
    return sum(float((mass * kept).sum()) for mass, kept in (s.blocks(order) for s in sides))


def group_features(sides: Sequence[Side]) -> Tensor:
    """Return an order of the features in which blocks keep at least as much as now.

    Deterministic. Memory: a few matrices ``(features, groups)`` in float64.

    Args:
        sides: of all weights that have these features, at least one.

    Returns:
        int64 ``(features,)``: which feature comes to each place.
    """
    start = torch.arange(len(sides[0].sums), device=sides[0].sums.device)
    found = [_climbed(sides, order) for order in (start, _gathered(sides))]
    return max(found, key=lambda order: kept_mass(sides, order))


def _gathered(sides: Sequence[Side]) -> Tensor:
    """Return an order in which alike features are together: from those that differ most from the
    mean on, each group is what is most like the first of it, and then most like their mean.
    """
    width = min(side.width for side in sides)
    values = torch.cat([side.sums / side.sums.sum().clamp(min=1e-300) for side in sides], 1)
    values = values - values.mean(0)
    left, order = torch.arange(len(values), device=values.device), []
    while len(left) > width:
        there = values[left]
        lead = there[there.norm(dim=1).argmax()]
        chosen = left
        for _ in range(2):
            chosen = (there @ lead).topk(width).indices
            lead = there[chosen].mean(0)
        order.append(left[chosen.sort().values])
        rest = torch.ones_like(left, dtype=torch.bool)
        rest[chosen] = False
        left = left[rest]
    return torch.cat([*order, left])


def _climbed(sides: Sequence[Side], order: Tensor) -> Tensor:
    """Return the order that the search ends with from another."""
    best, width = kept_mass(sides, order), min(side.width for side in sides)
    for _ in range(STEPS):
        profits = [_profit(side, order, width) for side in sides]
        swapped = _swapped(torch.stack(profits).sum(0), order, width)
        mass = kept_mass(sides, swapped)
        if mass <= best * (1 + 1e-9):
            break
        order, best = swapped, mass
    return order


def _profit(side: Side, order: Tensor, width: int) -> Tensor:
    """Return what each feature brings to each group of ``width`` places, ``(features, groups)``.

    The masks stay as they are for this order.
    """
    kept = side.blocks(order)[1].repeat_interleave(side.width // width, 0)
    return side.sums @ kept[: -(-len(order) // width)].T


def _swapped(profit: Tensor, order: Tensor, width: int) -> Tensor:
    """Return ``order`` after swaps of two features in different groups, as long as they gain."""
    features, groups = profit.shape
    for _ in range(SWEEPS):
        # a row of places a group; the last may be short
        there = functional.pad(profit[order], (0, 0, 0, -features % width), value=-torch.inf)
        there = there.view(groups, width, groups)
        own = there.diagonal(dim1=0, dim2=2).T[:, :, None]
        change = torch.where(own.isinf(), own, there - own)  # [groups, places, other groups]
        best, place = change.max(1)
        gain = (best + best.T).triu(1)
        pairs = (gain > 1e-9 * profit.abs().max()).nonzero()
        pairs = pairs[gain[tuple(pairs.T)].sort(descending=True, stable=True).indices]
        one, other = pairs.T
        places = torch.stack([one * width + place[one, other], other * width + place[other, one]])
        moved: dict[int, int] = {}
        for a, b in places.T.tolist():
            if a not in moved and b not in moved:
                moved[a], moved[b] = b, a
        if not moved:
            break
        order = order.clone()
        order[[*moved]] = order[[*moved.values()]]
    return order
