"""Scopes: how a configuration names modules.

A scope is a module's dotted path (``encoder.layers.0``), a glob over such paths
(``encoder.*.fc?``), or, behind the prefix ``{re}``, a regular expression. A path or glob that fits
a module takes in every module below it. A glob's ``*`` runs over dots. An expression is searched
for anywhere in the path, as NNCF does with ``re.search``: anchor it with ``^`` and ``$`` to mean
all of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from .declaration import did_you_mean

_REGEX = "{re}"


def check_scope(scope: str) -> str:
    """Return ``scope``; a ValueError refuses no string, an empty one, an invalid expression."""
    if not isinstance(scope, str) or scope in ("", _REGEX):
        raise ValueError(f"must be a module path, a glob or a '{{re}}' expression, got {scope!r}")
    if scope.startswith(_REGEX):
        _compile(scope)
    return scope


def matches(scope: str, name: str) -> bool:
    """Tell whether ``scope`` takes in the module of path ``name`` (``""`` is the model itself).
    A ValueError refuses an invalid expression.
    """
    if scope.startswith(_REGEX):
        return _compile(scope).search(name) is not None
    return any(scope == path or fnmatchcase(path, scope) for path in _upward(name))


def check_scopes(scopes: Iterable[str], names: Collection[str], argument: str = "scopes") -> None:
    """Refuse scopes that match none of ``names``, the module paths there are: a ValueError calls
    them ``argument``, and lists each, with near matches.
    """
    unmatched = [s for s in scopes if not any(matches(s, name) for name in names)]
    if unmatched:
        raise ValueError(
            f"{argument} must match a module each, got "
            + "; ".join(f"{scope!r}{_hint(scope, names)}" for scope in unmatched)
        )


def _compile(scope: str) -> re.Pattern[str]:
    try:
        return re.compile(scope.removeprefix(_REGEX))
    except re.error as error:
        raise ValueError(f"scope {scope!r} is no valid regular expression: {error}") from None


def _upward(name: str) -> list[str]:
    """Return ``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _hint(scope: str, names: Collection[str]) -> str:
    if "/" in scope:
        return " (scopes are module paths such as 'layer1.0.conv1', not NNCF's node names)"
    paths = sorted({path for name in names for path in _upward(name)})
    return did_you_mean(scope.removeprefix(_REGEX), paths)
