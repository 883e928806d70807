"""Checks of a saved state's plain values; each error names the key and shows what is there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def check_keys(what: str, state: object, keys: Iterable[str]) -> None:
    """Refuse a state, called ``what``, that is no mapping with these very keys."""
    if not isinstance(state, Mapping):
        raise ValueError(f"load_state: {what} must be a mapping, got {state!r}")
    *most, last = keys
    if set(state) != {*most, last}:
        named = f"{', '.join(most)} and {last}" if most else last
        raise ValueError(f"load_state: {what} must have {named}, got {sorted(map(str, state))}")


def integer(state: Mapping[str, Any], key: str, least: int = 0, end: float = math.inf) -> int:
    """Return ``state[key]``, an integer in [``least``, ``end``)."""
    value = state[key]
    if type(value) is not int or not least <= value < end:
        raise ValueError(f"load_state: {key} must be an integer from {least}, got {value!r}")
    return value


def number(state: Mapping[str, Any], key: str, what: str, *limits: float) -> float:
    """Return ``state[key]``: a number, but NaN, that ``what`` describes; from and up to limits."""
    value, (least, most) = state[key], limits or (-math.inf, math.inf)
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError(f"load_state: {key} must be {what}, got {value!r}")
    return value
