"""Patterns: the shape of what is pruned together, and how it tiles a weight matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_BLOCK_SIDE = 256
MIN_SIDE = 16  # of a block that products skip: the tensor cores' smallest dot
MAX_M = 32


@dataclass(frozen=True)
class Unstructured:
    """Every element of the weight is a group of its own."""

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return 1

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block:
    """Blocks of ``rows`` output features by ``cols`` input features; edge blocks are groups too.

    Args:
        rows: power of two from 1 to 256.
        cols: power of two from 1 to 256.

    Raises:
        ValueError: a side is not a power of two from 1 to 256.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for name, side in (("rows", self.rows), ("cols", self.cols)):
            power_of_two = (
                type(side) is int and 1 <= side <= MAX_BLOCK_SIDE and not side & (side - 1)
            )
            if not power_of_two:
                raise ValueError(
                    f"Block: {name} must be a power of two from 1 to {MAX_BLOCK_SIDE}, "
                    f"got {side!r}"
                )

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols}"


@dataclass(frozen=True)
class NM:
    """Of every ``m`` consecutive inputs ``n`` are kept. The group is this m-tuple.

    The mask has one bit an element, as that of ``Unstructured``, hence ``rows`` and ``cols``.

    Args:
        n: kept of each tuple, from 1 to m - 1.
        m: length of a tuple, from 2 to 32; divides the weight's inputs.
        transposable: 2:4 alone: the transposed weight is 2:4 too. The group is then a tile of 4 x
            4 elements with two kept in each row and each column (Hubara et al. 2021,
            https://arxiv.org/abs/2102.08124), and 4 divides the weight's outputs.

    Raises:
        ValueError: not 1 <= n < m <= 32, or ``transposable`` for another pattern than 2:4.
    """

    n: int
    m: int
    transposable: bool = False

    def __post_init__(self) -> None:
        if type(self.m) is not int or not 2 <= self.m <= MAX_M:
            raise ValueError(f"NM: m must be an integer from 2 to {MAX_M}, got {self.m!r}")
        if type(self.n) is not int or not 1 <= self.n < self.m:
            raise ValueError(
                f"NM: n must be an integer from 1 to m - 1 = {self.m - 1}, got {self.n!r}"
            )
        if type(self.transposable) is not bool:
            raise ValueError(f"NM: transposable must be True or False, got {self.transposable!r}")
        if self.transposable and (self.n, self.m) != (2, 4):
            raise ValueError(
                f"NM: transposable must be False unless n:m is 2:4, got True for {self.n}:{self.m}"
            )

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return 1

    @property
    def group(self) -> tuple[int, int]:
        """Sides of a group, in elements."""
        return (4, 4) if self.transposable else (1, self.m)

    @property
    def dropped(self) -> int:
        """How many elements a pruned group lacks."""
        return self.group[0] * (self.m - self.n)

    def __str__(self) -> str:
        return f"{self.n}:{self.m} transposable" if self.transposable else f"{self.n}:{self.m}"


Pattern = Unstructured | Block | NM


def grid_shape(pattern: Pattern, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of what a mask of ``pattern`` has for a matrix of ``shape``.

    That is one flag a group, and for ``NM`` one an element.
    """
    # not by grid.py: what a command line spells is checked before torch is imported
    return -(-shape[0] // pattern.rows), -(-shape[1] // pattern.cols)


def is_skippable(pattern: Pattern) -> bool:
    """Tell whether products can skip what is pruned: blocks of at least ``MIN_SIDE`` a side."""
    return isinstance(pattern, Block) and min(pattern.rows, pattern.cols) >= MIN_SIDE


def maximum_level(pattern: Pattern) -> float:
    """Return the fraction of its elements that a wholly pruned weight lacks: 1, or 1 - n/m."""
    return (pattern.m - pattern.n) / pattern.m if isinstance(pattern, NM) else 1.0


def is_reachable(level: float, patterns: Sequence[Pattern]) -> bool:
    """Tell whether any of the patterns can express ``level``: N:M goes up to 1 - n/m."""
    most = max(map(maximum_level, patterns))
    # 2/3 is not 1 - 1/3 in floating point
    return level <= most or math.isclose(level, most, rel_tol=1e-9)
