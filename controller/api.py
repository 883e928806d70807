"""The enumerations of the controller's surface, with NNCF's names and values; its exceptions."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import NamedTuple


class CompressionStage(IntEnum):
    """How far the compression of a model has come.

    ``a + b`` is the stage of two algorithms on one model: ``a`` if they agree, else
    ``PARTIALLY_COMPRESSED``.
    """

    UNCOMPRESSED = 0
    PARTIALLY_COMPRESSED = 1
    FULLY_COMPRESSED = 2

    def __add__(self, other: int) -> CompressionStage:
        return self if self == other else CompressionStage.PARTIALLY_COMPRESSED


class StripFormat(StrEnum):
    """What a stripped model looks like: after sparsity plain weights in all of NNCF's formats.

    ``SEMI_STRUCTURED`` is ours: linear weights under 2:4 become PyTorch's semi-structured tensors,
    which a GPU of compute capability 8.0 or later multiplies without their zeros.
    """

    NATIVE = "native"
    DQ = "dequantize"
    IN_PLACE = "in_place"
    SEMI_STRUCTURED = "semi_structured"


class Problem(NamedTuple):
    """One thing that is wrong: with which field (empty: with the whole), where in it, and what."""

    field: str
    place: str
    what: str


class DeclarationError(ValueError):
    """A declaration, of the class called ``owner``, was refused; the message names each field and
    shows its value.
    """

    def __init__(self, owner: str, problems: list[Problem]) -> None:
        super().__init__(owner, problems)
        self.owner = owner
        self.problems = problems

    def __str__(self) -> str:
        return f"{self.owner}: " + "; ".join(
            f"{field}{place} {what}".lstrip() for field, place, what in self.problems
        )
