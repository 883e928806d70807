"""What the objects that a user writes share, and the kinds of values that their fields have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
)
from pydantic_core import core_schema

from ..api import DeclarationError, Problem


def number(value: Any) -> Any:
    """Let a scalar of numpy or torch stand for what it holds; all else is left for the check."""
    if not hasattr(value, "ndim"):
        return value
    try:
        # an array of one element would pass for a float
        return value.item() if value.ndim == 0 else repr(value)
    except RuntimeError:  # on `meta` it holds nothing
        return repr(value)


def _whole(value: Any) -> Any:
    """Let JSON's ``3.0`` stand for 3; what else is no int is left for the strict check."""
    value = number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def listed(value: Any) -> Any:
    """Let one string, or JSON's list, stand for a tuple; all else, as a set, is to be refused."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


_Item = TypeVar("_Item")

# of integers: what counts in int64 can hold those below it, and no float overflows
END = 2**63

Listed = Annotated[tuple[_Item, ...], BeforeValidator(listed), Field(strict=True)]
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0, lt=END)]
Positive = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=1, lt=END)]
Finite = Annotated[float, BeforeValidator(number), Field(strict=True, allow_inf_nan=False)]
NotNegative = Annotated[Finite, Field(ge=0)]
AboveZero = Annotated[Finite, Field(gt=0)]
Level = Annotated[Finite, Field(ge=0, lt=1)]
Share = Annotated[Finite, Field(ge=0, le=1)]


def _named(data: Any) -> Any:
    for key in data if isinstance(data, Mapping) else ():
        if not isinstance(key, str):
            raise ValueError(f"must have names of fields as keys, got {key!r}")
    return data


class Declaration(BaseModel):
    """Base of schedules and configurations: frozen.

    Raises:
        DeclarationError: an argument, by its keyword, is missing, unknown or out of its range, or
            two do not go together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        # before a dictionary becomes keyword arguments
        return core_schema.no_info_before_validator_function(_named, handler(source))

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            problems = [
                _problem(details, type(self))
                for details in error.errors()
                # it only repeats that a field on which this default depends was refused
                if details["type"] != "default_factory_not_called"
            ]
            raise DeclarationError(type(self).__name__, problems) from None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x' or 'y'?)"`` for the nearest of ``known``, or nothing."""
    near = difflib.get_close_matches(str(word), list(known))
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _problem(details: Any, owner: type[BaseModel]) -> Problem:
    """Turn one of pydantic's error details into a field and ``must be ..., got ...``."""
    # names past the first are pydantic's union branches: inner declarations name their own fields
    field = str(details["loc"][0]) if details["loc"] else ""
    place = "".join(f"[{at}]" for at in details["loc"][1:] if isinstance(at, int))
    match details["type"]:
        case "extra_forbidden":
            known = owner.model_fields
            what = f"is no field{did_you_mean(field, known)}; the fields are {', '.join(known)}"
        case "missing":
            what = "must be given"
        case "value_error":
            what = str(details["ctx"]["error"])
        case _:
            must_be = details["msg"].replace("Input should be", "must be")
            what = f"{must_be}, got {details['input']!r}"
    return Problem(field, place, what)
