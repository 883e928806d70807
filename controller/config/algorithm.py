"""What all algorithms' configurations share: pattern, scopes, overrides, BatchNorm adaptation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    field_validator,
    model_validator,
)

from ...kernels.pattern import NM, Block, Pattern, Unstructured
from .declaration import Declaration, Level, Listed, Share, Whole
from .schedule import (
    AdaptiveSchedule,
    EpochSchedule,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
    RampSchedule,
    Schedule,
)
from .scope import check_scope

# by the names that NNCF has for them
SCHEDULES = {
    "polynomial": PolynomialSchedule,
    "exponential": ExponentialSchedule,
    "multistep": MultistepSchedule,
    "adaptive": AdaptiveSchedule,
}


def parse_pattern(pattern: object) -> Pattern:
    """Return the pattern that ``pattern`` is or spells.

    Args:
        pattern: a pattern, ``"unstructured"``, ``{"block": [rows, cols]}``, ``{"nm": [n, m]}`` or
            ``{"nm": [2, 4], "transposable": True}``.

    Raises:
        ValueError: it is none of these, or ``Block`` or ``NM`` refuse its numbers.
    """
    match pattern:
        case Unstructured() | Block() | NM():
            return pattern
        case "unstructured":
            return Unstructured()
        case {"block": [rows, cols], **rest} if not rest:
            return Block(rows, cols)
        case {"nm": [n, m], **rest} if not rest.keys() - {"transposable"}:
            return NM(n, m, **rest)
    raise ValueError(
        "must be Unstructured(), Block(rows, cols), NM(n, m), 'unstructured', "
        "{'block': [rows, cols]}, {'nm': [n, m]} or {'nm': [2, 4], 'transposable': True}, "
        f"got {pattern!r}"
    )


def _spell_pattern(pattern: Pattern) -> str | dict[str, Any]:
    match pattern:
        case Unstructured():
            return "unstructured"
        case Block(rows, cols):
            return {"block": [rows, cols]}
        case NM(n, m, transposable):
            return {"nm": [n, m]} | ({"transposable": True} if transposable else {})


def _known_schedule(schedule: object) -> object:
    kinds = (*SCHEDULES, RampSchedule.model_fields["kind"].default)
    known = isinstance(schedule, Mapping) and str(schedule.get("kind")) in kinds
    if schedule is None or isinstance(schedule, Schedule) or known:
        return schedule
    raise ValueError(
        f"must be a schedule such as PolynomialSchedule(target_level=0.8), got {schedule!r}"
    )


# what is compared with what: all weights of one pattern; each weight's groups with one another;
# those of each row, or block row
Pool = Literal["global", "weight", "row"]

PatternField = Annotated[Pattern, PlainValidator(parse_pattern), PlainSerializer(_spell_pattern)]
Scope = Annotated[str, Field(strict=True), AfterValidator(check_scope)]
Scopes = Listed[Scope]
# the field `schedule` of an algorithm that follows one; None is for the algorithm to judge
ScheduleField = Annotated[
    Annotated[Schedule, Field(discriminator="kind")] | None, BeforeValidator(_known_schedule)
]


def default_schedule(
    kind: type[EpochSchedule],
) -> Callable[[dict[str, Any]], EpochSchedule | None]:
    """Return what makes a configuration's schedule: ``kind()``, and None in ``local`` mode."""
    return lambda data: None if data.get("sparsity_level_setting_mode") == "local" else kind()


class BatchNormAdaptation(Declaration):
    """Re-estimate the running statistics of BatchNorm layers after the first masks are set.

    Args:
        num_bn_adaptation_samples: inputs to run through the model, rounded up to whole batches; 0
            runs none.
    """

    num_bn_adaptation_samples: Whole = 2000


class Override(Declaration):
    """What holds for some weights alone. Of several overrides that match a weight the first holds.

    Args:
        scope: which weights: module path, glob or ``{re}`` expression.
        pattern: their pattern; None: the configuration's.
        minimum_level, maximum_level: as ``PooledConfig``'s; None: the configuration's.
    """

    scope: Scope
    pattern: PatternField | None = None
    minimum_level: Level | None = None
    maximum_level: Share | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> Override:
        _check_order(self)
        return self


def _check_order(limits: PooledConfig | Override) -> None:
    least, most = limits.minimum_level, limits.maximum_level
    if least is not None and most is not None and least > most:
        raise ValueError(f"minimum_level must be at most maximum_level {most}, got {least}")


class AlgorithmConfig(Declaration):
    """Base of the algorithms' configurations; ``algorithm``, a subclass's field, is its name.

    Args:
        pattern: what is pruned together. Under ``NM`` a level counts elements, and a schedule may
            go up to 1 - n/m; ``NM`` in an override stays there where the schedule goes on.
        targets: ``"linear"``: the linear layers, attention and experts included, of the
            transformer blocks, if there are any; ``"all"``: embeddings, convolutions and heads
            too; None: what ``target_scopes`` names, else ``"linear"`` for a model with transformer
            blocks and ``"all"`` for any other. See ``docs/defaults.md``.
        target_scopes: the modules to take; None takes all. See ``scope.py`` for what a scope is.
        ignored_scopes: the modules to leave out, even if they are targets.
        validate_scopes: whether a scope that matches nothing is an error.
        overrides: patterns and limits of single weights.
        batchnorm_adaptation: None runs none.
    """

    # whether masks are chosen within tuples; else an element or a block has a fate of its own
    takes_nm: ClassVar[bool] = False
    # what decides, where no initial level is given
    sets_levels_by: ClassVar[str] = "the algorithm has no initial level"

    pattern: PatternField = Unstructured()
    targets: Literal["linear", "all"] | None = None
    target_scopes: Scopes | None = None
    ignored_scopes: Scopes = ()
    validate_scopes: StrictBool = True
    overrides: Listed[Override] = ()
    batchnorm_adaptation: BatchNormAdaptation | None = None

    @field_validator("pattern", "overrides")
    @classmethod
    def _check_patterns(cls, given: Any) -> Any:
        for pattern in [o.pattern for o in given] if isinstance(given, tuple) else [given]:
            if isinstance(pattern, NM) and not cls.takes_nm:
                raise ValueError(f"must be Unstructured() or Block(rows, cols), got {pattern!r}")
        return given

    @field_validator("target_scopes")
    @classmethod
    def _check_target_scopes(cls, scopes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if scopes == ():
            raise ValueError("must be None or name a scope, got ()")
        return scopes


class PooledConfig(AlgorithmConfig):
    """Base of the configurations of what compares groups, and may so take a weight too far.

    Args:
        minimum_level: each weight is pruned at least this far, in [0, 1), once the schedule is
            there.
        maximum_level: each weight is pruned at most this far, in [0, 1]. None: 0.98, as in Intel
            Neural Compressor, or as far as all together at levels beyond; 1 lifts the limit.
    """

    minimum_level: Level = 0.0
    maximum_level: Share | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> PooledConfig:
        _check_order(self)
        return self


class ScheduledConfig(AlgorithmConfig):
    """Base of the configurations of what follows a schedule, or has levels set weight by weight.

    Args:
        sparsity_level_setting_mode: ``"global"``: a schedule sets the level of all target weights
            together; ``"local"``: no schedule, each weight's is set through the controller.
        schedule: which level holds when, the initial one included. None in ``local`` mode.
        sparsity_init: in ``local`` mode the level before any is set, in [0, 1).
    """

    sparsity_level_setting_mode: Literal["global", "local"] = "global"
    schedule: ScheduleField = None
    sparsity_init: Level = 0.0

    @property
    def initial_level(self) -> float:
        """The level before the first epoch."""
        return self.sparsity_init if self.schedule is None else self.schedule.initial_level

    @model_validator(mode="after")
    def _check_mode(self) -> ScheduledConfig:
        if self.sparsity_level_setting_mode == "local":
            if self.schedule is not None:
                raise ValueError(
                    "schedule must be None with sparsity_level_setting_mode 'local', where levels "
                    f"are set weight by weight, got {self.schedule!r}"
                )
        elif self.schedule is None:
            raise ValueError(
                "schedule must be given with sparsity_level_setting_mode 'global', got None"
            )
        elif self.sparsity_init:
            raise ValueError(
                "sparsity_init must be left out with a schedule, which has its own initial_level, "
                f"got {self.sparsity_init!r}"
            )
        return self
