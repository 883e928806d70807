"""What an update of masks sends over the wire, by a formula, for ``docs/scaling.md``.

``python -m triton_sparsity.bench.studies.wire`` prints the table for Llama's shapes on many ranks.
A step sends nothing. The formula is held to what gloo is given (``tests/bench/studies``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

from ...controller.masks.shards import Shard
from ...kernels.grid import ceil_div
from ...kernels.line_score import lines_a_band
from ...kernels.pattern import Block, Pattern, Unstructured, grid_shape, is_skippable
from ...kernels.search import BINS_SHARED
from ...kernels.spread import BITS, TIES_DIGIT, digit_of, search_bytes
from ...kernels.topology import capacities
from ..measure.tables import markdown

HEADER = 4  # counts before the bins of a histogram
NUMBER = 8  # bytes of what is added up
FLAGS = 3 * NUMBER  # whether a rank has raised, and what must be the same
REDUCTIONS = 5  # of histograms, where one is sampled first
BFLOAT16 = 2
INT32 = FLOAT32 = 4
MB = 1e6

# layers, hidden features, those of the feed-forward, those of keys and values
LLAMA = {
    "8B": (32, 4096, 14336, 1024),
    "70B": (80, 8192, 28672, 1024),
    "400B": (126, 16384, 53248, 1024),
}
RANKS = (8, 64, 1024)
TENSOR = 8  # ranks of tensor parallelism, inside a node


class Parted(NamedTuple):
    """A weight and the first row of each part of it, and behind them how many rows there are."""

    shape: tuple[int, int]
    bounds: tuple[int, ...]


@cache
def bounds(rows: int, *shares: int) -> tuple[int, ...]:
    """Return first rows as torch parts them: by each number of ranks in turn, rounded up."""
    lengths = [rows]
    for n in shares:
        lengths = [
            min(max(length - i * ceil_div(length, n), 0), ceil_div(length, n))
            for length in lengths
            for i in range(n)
        ]
    return tuple(accumulate(lengths, initial=0))


def numbers_sent(
    shapes: Sequence[tuple[int, int]],
    pattern: Pattern,
    *,
    moves: bool = False,
    each: bool = False,
    normed: bool = False,
    tied: int | None = None,
    histograms: int = REDUCTIONS * (HEADER + BINS_SHARED) * NUMBER,
) -> int:
    """Return how many bytes of numbers a rank gives to reductions at an update, at most.

    Args:
        shapes: of all weights, which have one pattern.
        pattern: of the groups.
        moves: SET or RigL, which choose twice: what goes and what comes.
        each: each weight is a pool by itself (``pool="weight"``).
        normed: by ``"normed_abs"``.
        tied: of how many weights some ties are kept and others are not; None: as many as can be.
        histograms: what those of a common pool take.
    """
    count = len(shapes)
    alone = moves or each
    most = count if alone else 1
    groups = [rows * cols for rows, cols in (grid_shape(pattern, shape) for shape in shapes)]
    position = search_bytes(max(groups).bit_length(), TIES_DIGIT)
    search = search_bytes(BITS, digit_of(count))
    # of each pool: its threshold, what lies up to it and is not finite, its size
    threshold = count * (search + 3 * NUMBER) if alone else 2 * NUMBER + histograms
    ties = count * NUMBER + (most if tied is None else tied) * position
    choice = threshold + ties + (count * NUMBER if moves else 0)
    norms, kept = 2 * count * NUMBER * normed, 2 * count * NUMBER
    # the level, what is found, what is written; SET and RigL have theirs
    flags = (2 if moves else 3) * FLAGS
    return flags + norms + (2 if moves else 1) * choice + kept


def rows_sent(
    weights: Sequence[Parted], pattern: Pattern, itemsize: int, *, of: int = 1
) -> list[int]:
    """Return how many bytes each place of a column of ranks sends to others at an update: rows of
    blocks that begin elsewhere, and masks of its own blocks that end elsewhere.

    Args:
        weights: of one pattern.
        pattern: of the groups.
        itemsize: bytes of an element.
        of: how many matrices: weights, and under RigL gradients.
    """
    places = len(weights[0].bounds) - 1
    sent = [0] * places
    for ((rows, cols), ends), times in Counter(weights).items():
        shard = Shard((rows, cols), ends, (0, cols), 0, 0, ((0,) * places,), True, 1, pattern)
        for place in range(places if isinstance(pattern, Block) else 0):
            if head := shard.head_of(place):
                sent[place] += times * of * head * cols * itemsize
                sent[shard.owner_of_head(place)] += times * shard.grid[1]
    return sent


def lines_sent(
    shapes: Sequence[tuple[int, int]], *, parted: Sequence[tuple[int, int]] = ()
) -> int:
    """Return how many bytes of sizes of lines a rank gives to reductions at an update by
    ``growth="normed_gradient"``, where rows lie on several ranks, at most.

    Args:
        shapes: of all weights.
        parted: of those whose columns lie on several ranks.
    """
    band = lines_a_band(shapes)
    # a rank has whole rows where columns are not parted, but not whole bands of rows
    rows = parted if band == 1 else shapes
    bands = sum(ceil_div(n, band) for n, _ in rows) + sum(ceil_div(n, band) for _, n in shapes)
    return bands * (1 + INT32)  # an exponent and a sum


def parts_sent(weights: Sequence[Parted], pattern: Block, steps: int) -> list[int]:
    """Return how many bytes each place of a column of ranks sends to others of sums of its parts
    of blocks that begin elsewhere, by ``"fisher"`` and ``"taylor"``.

    Args:
        weights, pattern: as ``rows_sent``'s.
        steps: whose sums are sent: of ``"fisher"`` since the last time, of ``"taylor"`` one.
    """
    places = len(weights[0].bounds) - 1
    sent = [0] * places
    for ((rows, cols), ends), times in Counter(weights).items():
        shard = Shard((rows, cols), ends, (0, cols), 0, 0, ((0,) * places,), True, 1, pattern)
        unit = shard.unit
        for place in range(places):
            units = ceil_div(shard.head_of(place), unit)
            sent[place] += times * steps * units * shard.grid[1] * FLOAT32
    return sent


def grids_sent(shapes: Sequence[tuple[int, int]], pattern: Pattern) -> int:
    """Return how many bytes a rank gives to a reduction at an update, so that products skip blocks
    of what FSDP2 gathers: a bit a block, each row of blocks in whole bytes.

    Args:
        shapes: of the weights of linear layers.
        pattern: of the groups.
    """
    if not is_skippable(pattern):
        return 0
    grids = (grid_shape(pattern, shape) for shape in shapes)
    return sum(down * ceil_div(across, 8) for down, across in grids)


def lists_held(shapes: Sequence[tuple[int, int]], pattern: Pattern) -> int:
    """Return how many bytes a rank holds so that products skip blocks of what FSDP2 gathers: the
    grid, and the lists, which have another one.

    Args:
        shapes, pattern: as ``grids_sent``'s.
    """
    if not is_skippable(pattern):
        return 0
    held = 0
    for shape in shapes:
        *lists, grid = capacities(grid_shape(pattern, shape), pattern)
        held += INT32 * sum(map(prod, lists)) + 2 * prod(grid)
    return held


def llama(name: str) -> list[tuple[tuple[int, int], bool]]:
    """Return the shape of each linear weight, and whether tensor parallelism parts its columns."""
    layers, hidden, wide, keys = LLAMA[name]
    layer = [
        *(((hidden, hidden), False), ((keys, hidden), False), ((keys, hidden), False)),
        *(((hidden, hidden), True), ((wide, hidden), False), ((wide, hidden), False)),
        ((hidden, wide), True),
    ]
    return layers * layer


def table() -> str:
    """Return the table, as Markdown: blocks of 32 x 32 of bfloat16 weights, in MB."""
    pattern, lines = Block(32, 32), []
    for name in LLAMA:
        weights = llama(name)
        shapes = [shape for shape, _ in weights]
        kept = numbers_sent(shapes, pattern, normed=True)
        each = numbers_sent(shapes, pattern, normed=True, each=True)
        grids, lists = grids_sent(shapes, pattern), lists_held(shapes, pattern)
        moved = max(numbers_sent(shapes, p, moves=True) for p in (pattern, Unstructured()))
        for ranks in RANKS:
            own = sum(rows * cols for rows, cols in shapes) * BFLOAT16 / ranks
            alone = [Parted(shape, bounds(shape[0], ranks)) for shape in shapes]
            data = ranks // TENSOR
            beside = [
                Parted((rows, cols // TENSOR), bounds(rows, data))
                if by_columns
                else Parted((rows, cols), bounds(rows, TENSOR, data))
                for (rows, cols), by_columns in weights
            ]
            rows = max(rows_sent(alone, pattern, BFLOAT16))
            # of those by columns a rank has a place on fewer ranks
            mixed = [
                max(rows_sent(found, pattern, BFLOAT16))
                for found in (
                    [w for w in beside if len(w.bounds) == data + 1],
                    [w for w in beside if len(w.bounds) == ranks + 1],
                )
                if found
            ]
            sizes = (kept, each, moved, grids, rows, sum(mixed), lists, own)
            lines.append(
                [name, f"{len(shapes)}", f"{ranks:,}", *(f"{n / MB:,.1f}" for n in sizes)]
            )
    return markdown(
        [
            "model:",
            "M",
            "ranks",
            "numbers",
            "one pool each",
            "of SET, RigL",
            "grids",
            "rows",
            "rows, TP 8",
            "lists",
            "its weights",
        ],
        lines,
    )


if __name__ == "__main__":
    print(table())
