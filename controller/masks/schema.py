"""What a saved state must hold, as data: checked as a whole, before anything is taken over.

An object with a state says in one place, its ``schema()``, what each entry must be. To add an
entry is to add it there and to ``get_state()``.
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
END = 2**63  # of integers: whatever counts in int64 can hold them


@dataclass(frozen=True)
class Entry:
    """One value: what it must be, in words, and whether it is."""

    what: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """An entry that may be missing."""

    schema: Schema


# a mapping has these keys and no others
Schema = Entry | Maybe | Mapping[Any, "Schema"]


def check(state: Any, schema: Schema, name: str = "state") -> None:
    """Refuse a state, called ``name``, that is not as ``schema`` says.

    Raises:
        ValueError: it names the first entry that is missing, unknown or wrong.
    """
    if isinstance(schema, Maybe):
        return check(state, schema.schema, name)
    if isinstance(schema, Entry):
        try:
            fits = schema.fits(state)
        except Exception:  # whatever comparing foreign objects raises, they do not fit
            fits = False
        if not fits:
            raise ValueError(f"load_state: {name} must be {schema.what}, got {_shown(state)}")
        return None
    check(state, MAPPING, name)
    for key, inner in schema.items():
        if key in state:
            check(state[key], inner, f"{name}[{key!r}]")
        elif not isinstance(inner, Maybe):
            raise ValueError(
                f"load_state: {name} must have {key!r}, got {_shown(list(state)) or 'nothing'}"
            )
    if unknown := [key for key in state if key not in schema]:
        known = ", ".join(map(repr, schema)) or "nothing"
        raise ValueError(
            f"load_state: {name} must have no more than {known}, got also {_shown(unknown)}"
        )
    return None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
        if value.is_meta or value.layout is not torch.strided or value.isfinite().all():
            return kind
        return f"{kind} with NaN or Inf"
    try:
        return reprlib.repr(value)
    except Exception:  # an integer of more digits than may be printed, say
        return f"a {type(value).__name__}"


MAPPING = Entry("a mapping", lambda value: isinstance(value, Mapping))
NAMES = Entry(
    "a mapping whose keys are names",
    lambda value: isinstance(value, Mapping) and all(type(key) is str for key in value),
)
ANYTHING = Entry("anything", lambda _: True)
FLAG = Entry("True or False", lambda value: type(value) is bool)


def exactly(value: Any) -> Entry:
    """A plain value that is known."""
    return Entry(repr(value), lambda found: type(found) is type(value) and found == value)


def optional(entry: Entry) -> Entry:
    return Entry(f"{entry.what}, or None", lambda value: value is None or entry.fits(value))


def integer(least: int = 0, end: int = END) -> Entry:
    return Entry(
        f"an integer from {least} and below {end}",
        lambda value: type(value) is int and least <= value < end,
    )


def number(what: str, least: float = -math.inf, most: float = math.inf) -> Entry:
    """A number, but NaN, that ``what`` describes; from and up to the limits."""

    def fits(value: Any) -> bool:
        in_float = type(value) is float or (
            type(value) is int and abs(value) <= sys.float_info.max
        )
        return in_float and least <= value <= most

    return Entry(what, fits)


def list_of(entry: Entry, length: int) -> Entry:
    """A list of ``length`` such values."""

    def fits(value: Any) -> bool:
        return type(value) is list and len(value) == length and all(map(entry.fits, value))

    return Entry(f"a list of {length} values, each {entry.what}", fits)


def tensor(
    shapes: Sequence[tuple[int | None, ...]],
    dtypes: Sequence[torch.dtype],
    *,
    finite: bool = True,
    least: float = -math.inf,
) -> Entry:
    """A strided tensor that has memory.

    Args:
        shapes: those it may have; None: any length along that dimension.
        dtypes: those it may have.
        finite: whether it must hold no NaN or Inf. A gradient that overflowed, as with AMP, may.
        least: what no element is below.
    """

    def fits(value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.layout is torch.strided
            and not value.is_meta
            and value.dtype in dtypes
            and any(
                value.ndim == len(shape)
                and all(
                    want in (None, have) for want, have in zip(shape, value.shape, strict=True)
                )
                for shape in shapes
            )
            and not (finite and value.is_floating_point() and not value.isfinite().all())
            and not (least > -math.inf and (value < least).any())
        )

    kinds = " or ".join(str(dtype) for dtype in dtypes)
    sides = [f"({', '.join('n' if n is None else str(n) for n in shape)})" for shape in shapes]
    finite = finite and any(dtype.is_floating_point for dtype in dtypes)
    what = f"{'finite ' * finite}{kinds} of shape {' or '.join(sides)}"
    return Entry(what + (f", from {least:g}" if least > -math.inf else ""), fits)
