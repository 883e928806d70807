"""Patterns: the shape of what is pruned together, and how it tiles a weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

MAX_BLOCK_SIDE = 256


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


Pattern = Unstructured | Block


def grid_shape(pattern: Pattern, shape: tuple[int, int]) -> tuple[int, int]:
    """Return how many groups ``pattern`` lays down and across a matrix of ``shape``."""
    return -(-shape[0] // pattern.rows), -(-shape[1] // pattern.cols)
