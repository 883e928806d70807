"""What ranks tell one another of sharded weights: counts, and rows of the groups at the edges.

A group belongs to the rank that holds its first row, which gets the rows that lie elsewhere and
sends back what becomes of them. Nothing else moves; no weight is gathered but to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, distributed

from ...kernels.bits import pack, unpack
from ...kernels.block_score import weight_squares
from ...kernels.cut import Others, find_cut
from ...kernels.exact_sum import exact_sums, inverse_norms
from ...kernels.grid import ceil_div
from ...kernels.line_score import Piece, norm_all_
from ...kernels.pattern import NM, Block
from ...kernels.prune_rows import Part
from ...kernels.regrow import drop_lowest, grow_highest
from ...kernels.search import Reduce
from ...kernels.table import alike
from .names import canonical
from .shards import Shard, local_rows
from .weight import SparseWeight

_INFINITY = 0x7F800000  # its bit pattern


def others_of(weights: Sequence[SparseWeight]) -> Others | None:
    """Return what a cut of several weights, all of them sharded, must ask the other ranks."""
    shards = [weight.shard for weight in weights]
    if not any(shards):
        return None
    ranks = weights[0].ranks
    # a weight that is whole on every rank is spoken for by the first
    counted = [ranks.rank == 0 if shard is None else shard.counted for shard in shards]
    edges = [*map(_edges_of, weights)]
    return Others(ranks.sum, counted, [*map(_place_of, weights)], edges)


def _place_of(weight: SparseWeight) -> tuple[Part, Part]:
    shard = weight.shard
    if shard is not None and weight.gathers_scores:
        rows, cols = cast(Any, weight).scored_groups
        return Part(rows.start, shard.grid[0]), Part(cols.start, shard.grid[1])
    firsts = (0, 0) if shard is None else (shard.here[0].start, shard.here[1].start)
    rows, cols = (
        Part(ceil_div(first, side), ceil_div(length, side))
        for first, length, side in zip(firsts, weight.full_shape, _sides(weight), strict=True)
    )
    return rows, cols


def _edges_of(weight: SparseWeight) -> tuple[int, ...]:
    """Return the first column of groups of each part, and behind them how many there are."""
    ends = (0, weight.full_shape[1]) if weight.shard is None else weight.shard.edges
    return tuple(ceil_div(end, _sides(weight)[1]) for end in ends)


def _sides(weight: SparseWeight) -> tuple[int, int]:
    """Return how many rows and columns what competes has: a group, or a tuple under N:M."""
    pattern = weight.pattern
    return pattern.group if isinstance(pattern, NM) else (pattern.rows, pattern.cols)


def sums_of_parts(weights: Sequence[SparseWeight], numbers: Tensor) -> Tensor:
    """Return numbers of full weights, one each, from those of what is here: 8 bytes a weight, and
    nothing where none is sharded.
    """
    if not any(weight.shard for weight in weights):
        return numbers
    ranks = weights[0].ranks
    counted = [ranks.rank == 0 if w.shard is None else w.shard.counted for w in weights]
    return ranks.sum(numbers * numbers.new_tensor(counted))


def whole_groups(
    weights: Sequence[SparseWeight], matrices: Sequence[Tensor]
) -> list[list[Tensor]]:
    """Return matrices of whole groups, in order: those that belong here.

    Args:
        weights: of one block pattern.
        matrices: of each what is here: the weights themselves, or importances.
    """
    heads = [
        matrix[: weight.shard.head] if weight.shard else matrix[:0]
        for weight, matrix in zip(weights, matrices, strict=True)
    ]
    tails = heads_elsewhere(weights, heads)
    found = []
    for weight, matrix, tail in zip(weights, matrices, tails, strict=True):
        if weight.shard is None:
            found.append([matrix])
            continue
        body = matrix[weight.shard.head :]
        whole = len(body) - weight.shard.tail
        parts = [body[:whole], torch.cat([body[whole:], *tail]) if tail else body[:0]]
        found.append([part for part in parts if part.numel()])
    return found


def heads_elsewhere(
    weights: Sequence[SparseWeight], heads: Sequence[Tensor], *, by_unit: bool = False
) -> list[list[Tensor]]:
    """Return what other ranks have of the last group that belongs here of each weight, in order.

    Args:
        weights: any; nothing comes of what no edge parts.
        heads: of each a matrix of the rows here that are of a group which begins elsewhere.
        by_unit: a matrix has one row for each ``Shard.unit`` of these.
    """

    def rows_of(shard: Shard, source: int, to: int) -> int:
        belongs = shard.head_of(source) and shard.owner_of_head(source) == to
        rows = shard.head_of(source) if belongs else 0
        return ceil_div(rows, shard.unit) if by_unit else rows

    return _exchange(weights, heads, rows_of)


def norms_of_all(weights: Sequence[SparseWeight], matrices: Sequence[Tensor]) -> Tensor:
    """Return ``1 / ||w||_2`` of full weights from what is here of them: 16 bytes a weight.

    Raises:
        ValueError: columns are parted within what is added up first.
    """
    others, ranks = others_of(weights), weights[0].ranks
    counted = [True] * len(weights) if others is None else others.counted
    lines = [m.T if w.transposed else m for w, m in zip(weights, matrices, strict=True)]
    own = [m if counts else m[:0] for m, counts in zip(lines, counted, strict=True)]
    backend = weights[0].backend
    squares = weight_squares(own, [pieces_here(weight) for weight in weights], backend)
    return inverse_norms(squares, ranks.most, ranks.sum, backend)


def lines_of_all(
    weights: Sequence[SparseWeight], matrices: Sequence[Tensor], band: int
) -> list[Tensor]:
    """Return gradients of what is here of weights against their rows and columns, as ``norm_`` by
    bands; 5 bytes a band that lies on several ranks.
    """
    ranks, found = weights[0].ranks, [matrix.clone() for matrix in matrices]
    pieces = [_piece_of(weight, band) for weight in weights]
    norm_all_(found, pieces, band, ranks.most, ranks.sum)
    return found


def _piece_of(weight: SparseWeight, band: int) -> Piece:
    shard = weight.shard
    if shard is None or shard.on_stages:
        return Piece((0, 0), weight.full_shape)
    rows, cols = shard.here
    by_row, by_col = (any(end % band for end in ends[:-1]) for ends in (shard.bounds, shard.edges))
    parted = len(shard.peers) > 1 or by_col, shard.split or by_row
    return Piece((rows.start, cols.start), shard.shape, parted, shard.counted)


def pieces_here(weight: SparseWeight) -> int | None:
    """Return in how many pieces the lines that are here of a weight, as it lies in memory, are
    added up; None: those of a whole line.
    """
    shard = weight.shard
    if shard is None:
        return None
    found = shard.pieces(weight.transposed)
    if found is None:
        ends = shard.bounds if weight.transposed else shard.edges
        raise ValueError(
            f"{weight.name!r} must lie on ranks by sixteenths of its inputs, whose sums are the "
            "same on any number of ranks (weight_importance='normed_abs', SET and RigL ask for "
            f"them), got {[b - a for a, b in pairwise(ends)]} of {ends[-1]}; list it in "
            "ignored_scopes, or take 2, 4, 8 or 16 ranks for tensor parallelism"
        )
    return found


def sums_of_each(
    weights: Sequence[SparseWeight], vectors: Sequence[Tensor], counts: Sequence[int]
) -> Tensor:
    """Return ``exact_sums`` of full weights from vectors of what is here of them."""
    others, ranks = others_of(weights), weights[0].ranks
    if others is None:
        return exact_sums(vectors, counts=counts)
    own = [v if speaks else v[:0] for v, speaks in zip(vectors, others.counted, strict=True)]
    return exact_sums(own, ranks.most, ranks.sum, counts)


def sums_of_all(
    weights: Sequence[SparseWeight], vectors: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Return of each weight the sums of vectors that have a number for each piece of its lines;
    float64, the same on any number of ranks. Of a sharded weight they are of what is here; one on
    a stage of a pipeline is whole. Ranks tell one another of all weights at once.
    """
    # of one on stages the ranks of this stage have parts, by its mesh
    having = [
        (w.in_parts, cast(Any, w.weight).device_mesh if w.in_parts and w.target.holders else None)
        for w in weights
    ]
    found = [torch.empty(0)] * len(weights)
    for (in_parts, _), places in alike(having).items():
        rows = [row for place in places for row in vectors[place]]
        if not in_parts:
            sums = exact_sums(rows)
        else:
            _, most, add = within(weights[places[0]])
            speaks = [within(weights[place])[0] for place in places for _ in vectors[place]]
            own = [row if speak else row[:0] for row, speak in zip(rows, speaks, strict=True)]
            sums = exact_sums(own, most, add)
        sizes = [len(vectors[place]) for place in places]
        for place, own in zip(places, sums.split(sizes), strict=True):
            found[place] = own
    return found


def within(weight: SparseWeight) -> tuple[bool, Reduce, Reduce]:
    """Return how the ranks that have parts of a weight add up what each has: whether this one
    speaks for its part, the greatest of a tensor, and its sum, both in place. Of a weight on
    stages of a pipeline only the ranks of this stage take part.
    """
    shard, ranks = weight.shard, weight.ranks
    assert shard is not None
    if not weight.target.holders:
        return shard.counted, ranks.most, ranks.sum
    mesh: Any = cast(Any, weight.weight).device_mesh
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]

    def over(kind: Any) -> Reduce:
        def reduce(tensor: Tensor) -> Tensor:
            for group in groups:
                distributed.all_reduce(tensor, kind, group)
            return tensor

        return reduce

    kinds = distributed.ReduceOp
    return shard.speaks, over(kinds.MAX), over(kinds.SUM)


def local_masks(weights: Sequence[SparseWeight], masks: Sequence[Tensor]) -> list[Tensor]:
    """Return compact masks of what is here from those of the groups that belong here."""
    if not any(weight.shard for weight in weights):
        return list(masks)
    scored = cast(Any, weights) if weights[0].scores is not None else ()
    if moved := [w for w in scored if w.gathers_scores and not w.scores_lie_as_elements]:
        given = dict(zip(weights, masks, strict=True))
        grids = [unpack(given[w], w.scored_width) if w.packed else given[w] for w in moved]
        for weight, grid in zip(moved, full_grids(moved, grids), strict=True):
            own = weight.local_grid(grid)
            given[weight] = pack(own) if weight.packed else own
        return list(given.values())
    if weights[0].packed or weights[0].scores is not None:
        return list(masks)
    last = [mask[-1:] for mask in masks]

    def rows_of(shard: Shard, source: int, to: int) -> int:
        return int(shard.head_of(to) > 0 and shard.owner_of_head(to) == source)

    above = _exchange(weights, last, rows_of)
    found = []
    for weight, mask, first in zip(weights, masks, above, strict=True):
        found.append(mask if weight.shard is None else local_rows(weight.shard, [*first, mask]))
    return found


def own_groups(weight: SparseWeight, grid: Tensor) -> Tensor:
    """Return the rows of groups that belong here of the grid of what is here."""
    shard = weight.shard
    if shard is None or not isinstance(shard.pattern, Block):
        return grid
    low, high = shard.own_pattern.rows, shard.pattern.rows
    rows, _ = shard.groups
    return grid[shard.head // low :: high // low][: rows.stop - rows.start]


def _exchange(
    weights: Sequence[SparseWeight],
    sent: Sequence[Tensor],
    rows_of: Callable[[Shard, int, int], int],
) -> list[list[Tensor]]:
    """Send rows of matrices between the parts of each weight, in one exchange of bytes.

    Args:
        weights: of one pattern.
        sent: of each the rows that others may get: the first of them.
        rows_of: how many of them one part sends to another.

    Returns:
        What came, by the sender's place.
    """
    here: list[list[Tensor]] = [[] for _ in weights]
    ranks = weights[0].ranks
    members = [(i, w.shard) for i, w in enumerate(weights) if w.shard and w.shard.straddles]
    if not members:
        return here
    outgoing: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    incoming: list[list[tuple[int, int]]] = [[] for _ in range(ranks.size)]
    for i, shard in members:
        for place in shard.neighbours:
            rank = shard.peers[place]
            if rows := rows_of(shard, shard.place, place):
                part = sent[i][:rows].contiguous()
                outgoing[rank].append(part.view(-1).view(torch.uint8))
            if rows := rows_of(shard, place, shard.place):
                incoming[rank].append((i, rows))
    flat = [part for parts in outgoing for part in parts]
    device = sent[0].device
    data = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)
    give = [sum(part.numel() for part in parts) for parts in outgoing]
    sizes = [[n * sent[i].shape[1] * sent[i].element_size() for i, n in p] for p in incoming]
    take = [sum(own) for own in sizes]
    got = torch.empty(sum(take), dtype=torch.uint8, device=device)
    distributed.all_to_all_single(got, data, take, give, ranks.group)
    ends = [0, *accumulate(n for own in sizes for n in own)]
    for (i, rows), (start, stop) in zip(
        [entry for own in incoming for entry in own], pairwise(ends), strict=True
    ):
        part = got[start:stop].clone().view(sent[i].dtype)
        here[i].append(part.view(rows, sent[i].shape[1]))
    return here


def agree_counts(
    weights: Sequence[SparseWeight], masks: Sequence[Tensor], counts: list[list[int]]
) -> list[list[int]]:
    """Return counts whose groups are those of the full weights; elements are those that are here.

    Args:
        weights: any.
        masks: compact, of what is here.
        counts: how many groups and elements of it each keeps.
    """
    sharded = [i for i, weight in enumerate(weights) if weight.shard]
    if not sharded:
        return counts
    numbers = []
    for i in sharded:
        shard = weights[i].shard
        assert shard is not None
        own = masks[i].new_tensor(counts[i], dtype=torch.int64)
        if not weights[i].packed:
            own[0] = own_groups(weights[i], masks[i]).sum()
        numbers.append(own * shard.counted)
    summed = weights[0].ranks.sum(torch.stack(numbers)).tolist()
    for i, (groups, elements) in zip(sharded, summed, strict=True):
        weights[i].elements_elsewhere = elements - counts[i][1]
        counts[i] = [groups, counts[i][1]]
    return counts


def dropped(
    weights: Sequence[SparseWeight],
    scores: Sequence[Tensor],
    keep: Sequence[int],
    *,
    spend: bool,
) -> tuple[list[Tensor], Tensor]:
    """Return ``drop_lowest``'s of weights of one pattern: compact masks of the groups that belong
    here, as scores are.
    """
    others, first = others_of(weights), weights[0]
    if others is None:
        masks, pattern = [weight.mask for weight in weights], first.pattern
        return drop_lowest(masks, scores, keep, pattern, spend=spend, backend=first.backend)
    kept = [own_groups(weight, weight.kept_grid()) for weight in weights]
    # below all, so that what is pruned already is pruned first; one more, so that 0 is below all
    found = [_keys(own, grid, 1) for own, grid in zip(scores, kept, strict=True)]
    return _highest(weights, found, keep, others)


def grown(
    weights: Sequence[SparseWeight],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    keep: Sequence[int],
    *,
    spend: bool,
) -> tuple[list[Tensor], Tensor]:
    """Return ``grow_highest``'s of ``dropped``'s masks."""
    others, first = others_of(weights), weights[0]
    if others is None:
        options = {"spend": spend, "backend": first.backend}
        return grow_highest(masks, scores, keep, first.pattern, **options)
    cols = [own.shape[1] for own in scores]
    kept = [unpack(m, n) if first.packed else m for m, n in zip(masks, cols, strict=True)]
    # above all, so that what stays is kept first
    found = [_keys(own, ~grid, 0) for own, grid in zip(scores, kept, strict=True)]
    for (keys, _), grid in zip(found, kept, strict=True):
        keys.masked_fill_(grid, torch.inf)
    return _highest(weights, found, keep, others)


def _keys(scores: Tensor, among: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """Return float32 keys that order as |scores| do, 0 where no candidate is; how many are NaN or
    Inf.
    """
    shape = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    bits = shape.copy_(scores).abs_().view(torch.int32)
    bad = (bits >= _INFINITY).logical_and_(among).count_nonzero()
    return bits.clamp_(max=_INFINITY - 1 - more).add_(more).mul_(among).view(torch.float32), bad


def _highest(
    weights: Sequence[SparseWeight],
    found: Sequence[tuple[Tensor, Tensor]],
    counts: Sequence[int],
    others: Others,
) -> tuple[list[Tensor], Tensor]:
    """Return masks that keep the highest keys of each weight, the first of equals, and how many
    scores of all ranks are NaN or Inf.
    """
    pruned = [weight.groups - count for weight, count in zip(weights, counts, strict=True)]
    keys, bad = [keys for keys, _ in found], torch.stack([bad for _, bad in found])
    cut = find_cut(keys, pruned, Block(1, 1), None, weights[0].backend, others=others)
    others.reduce(bad.mul_(bad.new_tensor(others.counted)))
    return [pack(m) if weights[0].packed else m for m in cut.masks()], bad


def known_anywhere(weights: Sequence[SparseWeight], names: Collection[str]) -> list[SparseWeight]:
    """Return the weights whose names are among those that something is known of; on stages of a
    pipeline, which must all call this, among any rank's.
    """
    own = {canonical(name) for name in names}
    if any(weight.target.holders for weight in weights):
        # who speaks for a weight is asked
        here = [w for w in weights if w.shard is not None and w.shard.counted]
        told = [name for w in here if (name := canonical(w.name)) in own]
        own = {name for theirs in weights[0].ranks.gather(told) for name in theirs}
    return [weight for weight in weights if canonical(weight.name) in own]


def from_stage(weight: SparseWeight, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return on all ranks, which must call this, what the first that has a weight gives.

    Args:
        weight: on stages of a pipeline.
        tensor: what this rank has; another's is not read.
        shape: of what is given.
    """
    ranks, first = weight.ranks, weight.target.holders[0]
    whole = tensor.contiguous() if ranks.rank == first else tensor.new_empty(tuple(shape))
    distributed.broadcast(whole, distributed.get_global_rank(ranks.group, first), ranks.group)
    return whole


def over_stages(weight: SparseWeight, tensor: Tensor) -> Tensor:
    """Return the sum over the stages of a pipeline that have a weight of what each has for it, of
    replicas of a stage their mean, the same on all of them; of another rank, which must call this
    too, its own tensor. Whole tensors are sent, between these stages alone.
    """
    ranks, holders = weight.ranks, weight.target.holders
    if len(holders) == 1:
        return tensor
    size = 0 if weight.absent else tensor.numel()
    sizes = [size if rank in holders else 0 for rank in range(ranks.size)]
    given = tensor.contiguous().view(-1)
    sent = given.repeat(len(holders)) if size else given[:0]
    got = torch.empty_like(sent)
    distributed.all_to_all_single(got, sent, sizes, sizes, ranks.group)
    if weight.absent:
        return tensor
    found = dict(zip(holders, got.view(len(holders), *tensor.shape), strict=True))
    stages = [torch.stack([found[rank] for rank in stage]) for stage in weight.target.stages]
    return torch.stack([replicas.mean(0) for replicas in stages]).sum(0)


def _gathered(
    weight: SparseWeight, part: Tensor, bounds: Sequence[slice], sides: Sequence[slice]
) -> list[list[Tensor]]:
    """Return of each part of a weight a matrix, which has rows and columns as these say, side by
    side in lists of those below one another. All ranks take part.
    """
    shard = weight.shard
    assert shard is not None
    heights, widths = ([cut.stop - cut.start for cut in cuts] for cuts in (bounds, sides))
    if shard.on_stages:
        return [[from_stage(weight, part, (heights[0], widths[0]))]]
    padded = part.new_zeros(max(heights), max(widths))
    padded[: part.shape[0], : part.shape[1]] = part[:, : padded.shape[1]]
    every = [torch.empty_like(padded) for _ in range(weight.ranks.size)]
    if weight.ranks.size > 1:
        distributed.all_gather(every, padded, weight.ranks.group)
    else:
        every = [padded]
    return [
        [every[rank][:h, :w] for rank, h in zip(ranks, heights, strict=True)]
        for ranks, w in zip(shard.ranks, widths, strict=True)
    ]


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([torch.cat([*below]) for below in parts], 1)


def full_grid(weight: SparseWeight) -> Tensor:
    """Return the bool grid of the full weight; one bit a group is gathered."""
    grid, shard = weight.kept_grid(), weight.shard
    if shard is None:
        return grid
    rows, across = _groups(shard)
    widths = [cut.stop - cut.start for cut in across]
    packed = [slice(0, ceil_div(width, 8)) for width in widths]
    found = _gathered(weight, pack(own_groups(weight, grid)), rows, packed)
    parts = [[unpack(p, n) for p in below] for below, n in zip(found, widths, strict=True)]
    return weight.whole_grid(_joined(parts))


def whole_grids(weights: Sequence[SparseWeight]) -> list[Tensor]:
    """Return the bool grids of full weights, which are sharded, of blocks: one bit a block is
    added up, of all weights in one reduction.
    """
    grids = []
    for weight in weights:
        assert weight.shard is not None
        grid = weight.mask.new_zeros(weight.shard.grid)
        if weight.shard.counted:
            grid[weight.shard.groups] = own_groups(weight, weight.mask)
        grids.append(grid)
    parts = [pack(grid) for grid in grids]
    # no two ranks count one bit, so that a sum carries none
    summed = weights[0].ranks.sum(torch.cat([part.view(-1) for part in parts]))
    found = zip(summed.split([part.numel() for part in parts]), parts, grids, strict=True)
    return [unpack(own.view(part.shape), grid.shape[1]) for own, part, grid in found]


def full_grids(weights: Sequence[Any], grids: Sequence[Tensor]) -> list[Tensor]:
    """Return bool grids of full ``ScoredWeight``s, which are sharded, from the parts of them that
    have their scores here: one bit a group is gathered, of all weights in one exchange.
    """
    return _full_grids(weights, grids, [weight.scored_parts for weight in weights])


def full_kept(weights: Sequence[Any], kept: Sequence[Tensor]) -> list[Tensor]:
    """Return which scores of full ``ScoredWeight``s are kept, which are sharded, bool, from those
    that are here: one bit a score is gathered, of all weights in one exchange.
    """
    matrices = [own if own.ndim == 2 else own[:, None] for own in kept]
    sizes = []
    for shard in (weight.scores_shard for weight in weights):
        ends = shard.bounds, shard.edges
        sizes.append(tuple([b - a for a, b in pairwise(of)] for of in ends))
    return _full_grids(weights, matrices, sizes)


def full_grid_within(weight: Any, grid: Tensor) -> Tensor:
    """Return ``full_grids``'s of one weight. Of one on stages of a pipeline only the ranks of this
    stage take part.
    """
    gather = _gather_stage if weight.target.holders else _gather
    return _full_grids([weight], [grid], [weight.scored_parts], gather)[0]


def full_masks(weights: Sequence[SparseWeight]) -> list[Tensor]:
    """Return bool grids of full weights, which are sharded: one bit a group is gathered, of all
    weights in one exchange.
    """
    grids = [own_groups(weight, weight.kept_grid()).contiguous() for weight in weights]
    shards = [shard for weight in weights if (shard := weight.shard)]
    sizes = [tuple([cut.stop - cut.start for cut in of] for of in _groups(s)) for s in shards]
    return _full_grids(weights, grids, sizes)


def _gather(weight: SparseWeight, sent: Tensor) -> Sequence[Tensor]:
    """Return what each rank has sent, by rank."""
    ranks = weight.ranks
    every = [torch.empty_like(sent) for _ in range(ranks.size)] if ranks.size > 1 else [sent]
    if ranks.size > 1:
        distributed.all_gather(every, sent, ranks.group)
    return every


def _gather_stage(weight: SparseWeight, sent: Tensor) -> Mapping[int, Tensor]:
    """Return what each rank has sent that has a part of a weight on this stage, by rank."""
    mesh: Any = cast(Any, weight.weight).device_mesh
    found = sent
    for dim in reversed(range(mesh.ndim)):
        every = [torch.empty_like(found) for _ in range(mesh.size(dim))]
        distributed.all_gather(every, found, mesh.get_group(dim))
        found = torch.stack(every)
    known = distributed.get_process_group_ranks(weight.ranks.group)
    members = map(known.index, mesh.mesh.flatten().tolist())
    return dict(zip(members, found.view(-1, *sent.shape), strict=True))


def _full_grids(
    weights: Sequence[Any],
    grids: Sequence[Tensor],
    sizes: Sequence[Sequence[list[int]]],
    gather: Callable[[SparseWeight, Tensor], Any] = _gather,
) -> list[Tensor]:
    """Return grids of which each rank has a part.

    Args:
        weights: sharded.
        grids: what is here of each.
        sizes: of each the heights and the widths of the parts.
        gather: which ranks take part.
    """
    device = grids[0].device
    slots = [max(h * ceil_div(w, 8) for h in tall for w in wide) for tall, wide in sizes]
    ends = [0, *accumulate(slots)]
    sent = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
    for start, grid in zip(ends, grids, strict=False):
        sent[start : start + len(grid) * ceil_div(grid.shape[1], 8)] = pack(grid).view(-1)
    every, found = gather(weights[0], sent), []
    for weight, (tall, wide), start in zip(weights, sizes, ends, strict=False):
        widths = [ceil_div(w, 8) for w in wide]
        parts = [
            [
                unpack(every[rank][start : start + h * n].view(h, n), w)
                for rank, h in zip(below, tall, strict=True)
            ]
            for below, w, n in zip(weight.shard.ranks, wide, widths, strict=True)
        ]
        found.append(weight.whole_grid(_joined(parts)))
    return found


def _groups(shard: Shard) -> tuple[list[slice], list[slice]]:
    places, sides = range(len(shard.peers)), range(len(shard.ranks))
    return [*map(shard.groups_of, places)], [*map(shard.across, sides)]


def full_groups(weight: SparseWeight, groups: Tensor) -> Tensor:
    """Return the full grid of which ``groups`` are those that belong here."""
    assert weight.shard is not None
    return _joined(_gathered(weight, groups, *_groups(weight.shard)))


def full_matrix(weight: SparseWeight, matrix: Tensor) -> Tensor:
    """Return the full matrix of which ``matrix`` is what is here: gathered, to be saved."""
    shard = weight.shard
    if shard is None:
        return matrix
    rows, cols = ([slice(*ends) for ends in pairwise(of)] for of in (shard.bounds, shard.edges))
    return _joined(_gathered(weight, matrix, rows, cols))


def full_tensor(weight: SparseWeight, local: Tensor) -> Tensor:
    """Return the full tensor of the weight's shape, on the CPU, from what is here."""
    if weight.shard is None:
        return local.detach().to("cpu", copy=True)
    matrix = full_matrix(weight, weight.target.matrix(local.detach()))
    matrix = matrix.T if weight.transposed else matrix
    return matrix.reshape(weight.weight_shape).to("cpu", copy=True)


def own_part(weight: SparseWeight, tensor: Tensor) -> Tensor:
    """Return what is here of a full tensor of the weight's shape, copied to its device."""
    if weight.shard is not None:
        tensor = weight.like_weight(weight.target.matrix(tensor)[weight.shard.here])
    return tensor.to(weight.mask.device, copy=True)
