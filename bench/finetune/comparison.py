"""Which runs compare algorithms at levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from .options import ALGORITHMS, Options


class Entry(NamedTuple):
    """One run of a series: how it is called, its folder's name, what it does."""

    label: str
    name: str
    options: Options


def comparison(
    options: Options, algorithms: Sequence[str], levels: Sequence[float | None]
) -> list[Entry]:
    """Return the runs that compare ``algorithms`` at each of ``levels``.

    Raises:
        ValueError: an algorithm is unknown or there twice, or there is none; two levels are the
            same to six digits, by which folders are named.
    """
    if not algorithms or len(set(algorithms)) < len(algorithms):
        raise ValueError(f"compare must name algorithms, each once, got {','.join(algorithms)!r}")
    for algorithm in algorithms:
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"compare must name some of {', '.join(ALGORITHMS)}, got {algorithm!r}"
            )
    named = [f"{level:g}" for level in levels if level is not None]
    if len(set(named)) < len(named):
        spelled = ",".join(f"{level}" for level in levels)
        raise ValueError(f"levels must differ from one another in six digits, got {spelled}")
    entries = []
    for algorithm in algorithms:
        entries += [
            Entry(
                algorithm
                if level is None or len(levels) == 1
                else f"{algorithm} {100 * level:g} %",
                algorithm if level is None or len(levels) == 1 else f"{algorithm}-{level:g}",
                replace(options, algorithm=algorithm, level=level),
            )
            for level in levels
        ]
    return entries
