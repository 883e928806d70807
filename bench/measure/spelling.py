"""Devices and patterns as a command line and a record spell them."""

from __future__ import annotations

import re

import torch

from ...kernels.pattern import NM, Block, Pattern, Unstructured


def find_device(name: str) -> torch.device:
    """Return the device called ``name``; ``"auto"`` is the GPU where there is one.

    Raises:
        ValueError: the name is unknown, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device(name)
    found = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", name)
    if found is None:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if int(found[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: {torch.cuda.device_count()} GPUs found")
    return torch.device(name)


def parse_pattern(text: str) -> Pattern:
    """Return the pattern that a command line spells.

    Raises:
        ValueError: it is unknown, or ``Block`` or ``NM`` refuse its numbers.
    """
    if text == "unstructured":
        return Unstructured()
    if sides := re.fullmatch(r"block:([0-9]+)(?:x([0-9]+))?", text):
        rows, cols = sides.groups()
        return Block(int(rows), int(cols or rows))
    if numbers := re.fullmatch(r"nm:([0-9]+):([0-9]+)(:transposable)?", text):
        n, m, transposable = numbers.groups()
        return NM(int(n), int(m), transposable is not None)
    raise ValueError(
        "pattern must be 'unstructured', 'block:ROWSxCOLS', 'block:SIDE', 'nm:N:M' or "
        f"'nm:2:4:transposable', got {text!r}"
    )


def spell_pattern(pattern: Pattern) -> str:
    """Return the one spelling of ``pattern`` that ``parse_pattern`` understands."""
    match pattern:
        case Unstructured():
            return "unstructured"
        case Block(rows, cols):
            return f"block:{rows}x{cols}"
        case NM(n, m, transposable):
            return f"nm:{n}:{m}{':transposable' if transposable else ''}"
