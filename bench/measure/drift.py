"""How two records of ``profile`` differ: what ``--against`` tells."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from .record import Row, load


class Moved(NamedTuple):
    """A time that two records give differently.

    Attributes:
        row: of the later record.
        dense: whether it is the dense work's time, which no change of ours explains.
        ratio: the later median over the earlier one.
    """

    row: Mapping[str, Any]
    dense: bool
    ratio: float


class Drift(NamedTuple):
    """How two records of ``profile`` differ.

    Attributes:
        moved: times whose spreads over passes do not meet.
        compared: how many times both records have.
        pace: median ratio of dense work's times, the later over the earlier; None without any.
    """

    moved: list[Moved]
    compared: int
    pace: float | None


def load_profile(path: Path) -> dict[str, Any]:
    """Return an earlier record of ``profile``.

    Raises:
        ValueError: the file holds none.
        OSError: it cannot be read.
    """
    record = load(path)
    if not {"device", "backend", "torch", "triton", "commit", "date"} <= {*record}:
        raise ValueError(f"{path} must be a profile.json, which says where it was measured")
    rows = record.get("rows")
    columns = {field.name for field in fields(Row)}
    if not (isinstance(rows, list) and all(isinstance(r, dict) and columns >= {*r} for r in rows)):
        raise ValueError(f"{path} must be a profile.json, which has rows of measurements")
    try:
        # as JSON, of which a dictionary is a row
        TypeAdapter(list[Row]).validate_json(json.dumps(rows), strict=True)
    except ValidationError as error:
        (first, *_) = error.errors()
        place = "".join(f"[{part!r}]" for part in ("rows", *first["loc"]))
        what = first["msg"].replace("Input should be", "must be")
        raise ValueError(
            f"{path} must be a profile.json, whose rows are measurements: {place} {what}, got "
            f"{first['input']!r:.60}"
        ) from None
    for i, row in enumerate(rows):
        for names in (("median_s", "low_s", "high_s"), ("dense_s", "dense_low_s", "dense_high_s")):
            median, low, high = times = [row.get(name) for name in names]
            if low is None:
                continue
            # by the median is divided
            if not median or high is None or not all(0 <= time < math.inf for time in times):
                raise ValueError(
                    f"{path} must have positive times {', '.join(names)} in rows[{i}], got {times}"
                )
    return record


def drift(record: Mapping[str, Any], earlier: Mapping[str, Any]) -> Drift:
    """Compare two records of ``profile``: two times agree if their spreads over passes meet."""
    names = ("operation", "shape", "dtype", "pattern", "level", "mask", "status")
    before = {tuple(row.get(name) for name in names): row for row in earlier["rows"]}
    found, compared, paces = [], 0, []
    for row in record["rows"]:
        other = before.get(tuple(row[name] for name in names))
        for dense, median, low, high in (
            (False, "median_s", "low_s", "high_s"),
            (True, "dense_s", "dense_low_s", "dense_high_s"),
        ):
            if other is None or row.get(low) is None or other.get(low) is None:
                continue
            compared += 1
            if dense:
                paces.append(row[median] / other[median])
            if row[low] > other[high] or other[low] > row[high]:
                found.append(Moved(row, dense, row[median] / other[median]))
    return Drift(found, compared, statistics.median(paces) if paces else None)
