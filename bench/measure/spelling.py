"""Devices and patterns as a command line and a record spell them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...kernels.pattern import MIN_SIDE, NM, Block, Pattern, Unstructured, is_skippable

if TYPE_CHECKING:
    import torch


def check_device(name: str) -> None:
    """Refuse what is no device's name, without a look at what devices there are.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ("auto", "cpu") and re.fullmatch(r"cuda(?::([0-9]{1,4}))?", name) is None:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")


def find_device(name: str) -> torch.device:
    """Return the device called ``name``; ``"auto"`` is the GPU where there is one.

    Raises:
        ValueError: the name is unknown, or the device is not there.
    """
    check_device(name)
    # it takes seconds to import, and what is wrong with an option is told before
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device(name)
    if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: {torch.cuda.device_count()} GPUs found")
    return torch.device(name)


def parse_pattern(text: str) -> Pattern:
    """Return the pattern that a command line spells.

    Raises:
        ValueError: it is unknown, or ``Block`` or ``NM`` refuse its numbers.
    """
    if text == "unstructured":
        return Unstructured()
    try:
        if sides := re.fullmatch(r"block:([0-9]+)(?:x([0-9]+))?", text):
            rows, cols = sides.groups()
            return Block(int(rows), int(cols or rows))
        if numbers := re.fullmatch(r"nm:([0-9]+):([0-9]+)(:transposable)?", text):
            n, m, transposable = numbers.groups()
            return NM(int(n), int(m), transposable is not None)
    except ValueError as error:
        raise ValueError(f"pattern {text:.40}: {error}") from None
    raise ValueError(
        "pattern must be 'unstructured', 'block:ROWSxCOLS', 'block:SIDE', 'nm:N:M' or "
        f"'nm:2:4:transposable', got {text!r}"
    )


def parse_blocks(texts: Sequence[str]) -> tuple[Block, ...]:
    """Return the patterns that a command line spells, each of blocks that products can skip.

    Raises:
        ValueError: one is unknown, or has no such blocks.
    """
    found = []
    for pattern in map(parse_pattern, texts):
        if not (isinstance(pattern, Block) and is_skippable(pattern)):
            raise ValueError(
                f"pattern must be blocks of at least {MIN_SIDE} a side, got {str(pattern)!r}"
            )
        found.append(pattern)
    return tuple(found)


def spell_pattern(pattern: Pattern) -> str:
    """Return the one spelling of ``pattern`` that ``parse_pattern`` understands."""
    match pattern:
        case Unstructured():
            return "unstructured"
        case Block(rows, cols):
            return f"block:{rows}x{cols}"
        case NM(n, m, transposable):
            return f"nm:{n}:{m}{':transposable' if transposable else ''}"
