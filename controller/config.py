"""Configurations: what is pruned, how and when, as frozen objects or as NNCF's dictionary.

Reading order: the objects, then the dictionary form and its translation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

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

from ..kernels.pattern import NM, Block, Pattern, Unstructured, maximum_level
from .declaration import Declaration, DeclarationError, did_you_mean
from .schedule import (
    AdaptiveSchedule,
    ExponentialSchedule,
    Level,
    MultistepSchedule,
    PolynomialSchedule,
    Schedule,
    Whole,
)
from .scope import check_scope

_Declaration = TypeVar("_Declaration", bound=Declaration)


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


def _scope(scope: str) -> str:
    check_scope(scope)
    return scope


def _listed(scopes: Any) -> Any:
    match scopes:
        case str():
            return (scopes,)
        case list():
            return tuple(scopes)
    return scopes


_Pattern = Annotated[Pattern, PlainValidator(parse_pattern), PlainSerializer(_spell_pattern)]
_Scope = Annotated[str, Field(strict=True), AfterValidator(_scope)]
_Scopes = Annotated[tuple[_Scope, ...], BeforeValidator(_listed), Field(strict=True)]


class BatchNormAdaptation(Declaration):
    """Re-estimate the running statistics of BatchNorm layers after the first masks are set.

    Args:
        num_bn_adaptation_samples: inputs to run through the model, rounded up to whole batches; 0
            runs none.

    Raises:
        ValueError: an argument is unknown or out of its range.
    """

    num_bn_adaptation_samples: Whole = 2000


class Override(Declaration):
    """What holds for some weights alone. Of several overrides that match a weight the first holds.

    Args:
        scope: which weights: module path, glob or ``{re}`` expression.
        pattern: their pattern; None: the configuration's.
        minimum_level: each of them is pruned at least this far, in [0, 1).
        maximum_level: each of them is pruned at most this far, in [0, 1].

    Raises:
        ValueError: an argument is unknown or out of its range, or the limits cross.
    """

    scope: _Scope
    pattern: _Pattern | None = None
    minimum_level: Level = 0.0
    maximum_level: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _check_limits(self) -> Override:
        if self.minimum_level > self.maximum_level:
            raise ValueError(
                f"minimum_level must be at most maximum_level {self.maximum_level}, "
                f"got {self.minimum_level}"
            )
        return self


def _default_schedule(data: dict[str, Any]) -> PolynomialSchedule | None:
    local = data.get("sparsity_level_setting_mode") == "local"
    return None if local else PolynomialSchedule()


class MagnitudeSparsityConfig(Declaration):
    """Prune the groups of smallest magnitude.

    For example ``MagnitudeSparsityConfig(pattern=Block(32, 32),
    schedule=PolynomialSchedule(target_level=0.8, target_epoch=3))``.

    Args:
        algorithm: its name, fixed.
        pattern: what is pruned together. Under ``NM`` a level counts elements, and the schedule
            may go up to 1 - n/m; ``NM`` in an override stays there where the schedule goes on.
        sparsity_level_setting_mode: ``"global"``: a schedule sets the level of all target weights
            as one pool; ``"local"``: no schedule, levels are set weight by weight through the
            controller.
        schedule: which level holds when, the initial one included; by default
            ``PolynomialSchedule()``. None in ``local`` mode.
        sparsity_init: in ``local`` mode the level before any is set, in [0, 1).
        weight_importance: ``"abs"``: |w|; ``"normed_abs"``: |w| / ||w||_2, the norm of its tensor.
        target_scopes: the modules to take; None takes all. See ``scope.py`` for what a scope is.
        ignored_scopes: the modules to leave out, even if they are targets.
        validate_scopes: whether a scope that matches nothing is an error.
        overrides: patterns and limits of single weights.
        batchnorm_adaptation: None runs none.

    Raises:
        ValueError: an argument is unknown or out of its range, or two do not go together.
    """

    algorithm: Literal["magnitude_sparsity"] = "magnitude_sparsity"
    pattern: _Pattern = Unstructured()
    sparsity_level_setting_mode: Literal["global", "local"] = "global"
    schedule: Annotated[Schedule, Field(discriminator="kind")] | None = Field(
        default_factory=_default_schedule
    )
    sparsity_init: Level = 0.0
    weight_importance: Literal["abs", "normed_abs"] = "normed_abs"
    target_scopes: _Scopes | None = None
    ignored_scopes: _Scopes = ()
    validate_scopes: StrictBool = True
    overrides: Annotated[tuple[Override, ...], BeforeValidator(_listed), Field(strict=True)] = ()
    batchnorm_adaptation: BatchNormAdaptation | None = None

    @property
    def initial_level(self) -> float:
        """The level before the first epoch."""
        return self.sparsity_init if self.schedule is None else self.schedule.initial_level

    @field_validator("schedule", mode="before")
    @classmethod
    def _check_schedule(cls, schedule: object) -> object:
        known = isinstance(schedule, Mapping) and str(schedule.get("kind")) in _SCHEDULES
        if schedule is None or isinstance(schedule, Schedule) or known:
            return schedule
        raise ValueError(
            f"must be a schedule such as PolynomialSchedule(target_level=0.8), got {schedule!r}"
        )

    @model_validator(mode="after")
    def _check_mode(self) -> MagnitudeSparsityConfig:
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

    @model_validator(mode="after")
    def _check_levels(self) -> MagnitudeSparsityConfig:
        most = maximum_level(self.pattern)
        target = self.initial_level if self.schedule is None else self.schedule.target_level
        # 2/3 is not 1 - 1/3 in floating point
        if target > most and not math.isclose(target, most, rel_tol=1e-9):
            raise ValueError(
                f"target_level must be at most 1 - n/m = {most:g} with pattern {self.pattern}, "
                f"got {target!r}"
            )
        return self

    @field_validator("target_scopes")
    @classmethod
    def _check_target_scopes(cls, scopes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if scopes == ():
            raise ValueError("must be None or name a scope, got ()")
        return scopes


_SCHEDULES = {
    "polynomial": PolynomialSchedule,
    "exponential": ExponentialSchedule,
    "multistep": MultistepSchedule,
    "adaptive": AdaptiveSchedule,
}
# NNCF's keys in `params`, and the schedules' fields that they are
_SCHEDULE_KEYS = {
    "sparsity_target": "target_level",
    "sparsity_target_epoch": "target_epoch",
    "sparsity_freeze_epoch": "freeze_epoch",
    "power": "power",
    "concave": "concave",
    "update_per_optimizer_step": "update_per_optimizer_step",
    "steps_per_epoch": "steps_per_epoch",
    "multistep_steps": "steps",
    "multistep_sparsity_levels": "levels",
    "step": "step",
    "eps": "eps",
    "patience": "patience",
}
_CONFIG_KEYS = ("pattern", "sparsity_level_setting_mode", "weight_importance", "overrides")
_SCOPE_KEYS = ("target_scopes", "ignored_scopes", "validate_scopes")
_SECTION_KEYS = (
    "algorithm",
    "sparsity_init",
    *_SCOPE_KEYS,
    "params",
    "initializer",
    "compression_lr_multiplier",
)
# what an NNCF configuration holds beside `compression`; of these only scopes bear on sparsity
_NNCF_KEYS = (
    "compression",
    "target_scopes",
    "ignored_scopes",
    "input_info",
    "target_device",
    "accuracy_aware_training",
    "compression_lr_multiplier",
    "disable_shape_matching",
    "log_dir",
)


def parse_config(
    config: MagnitudeSparsityConfig | Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> MagnitudeSparsityConfig:
    """Return the configuration that ``config`` is or spells.

    Args:
        config: a configuration, NNCF's ``compression`` dictionary, a list of one such, or a whole
            NNCF configuration with the key ``compression``. Of what stands beside that key, scopes
            alone bear on sparsity; they count as in NNCF: ignored ones add up, target ones there
            replace the section's.

    Raises:
        TypeError: ``config`` is none of these.
        ValueError: an algorithm, key or value is not known, see ``from_nncf``; or there are
            several algorithms.
    """
    match config:
        case MagnitudeSparsityConfig():
            return config
        case Mapping() if "compression" in config:
            _check_keys("config", config, _NNCF_KEYS)
            section = dict(_only_section(config["compression"]))
            if "target_scopes" in config:
                section["target_scopes"] = config["target_scopes"]
            ignored = [_listed(part.get("ignored_scopes", ())) for part in (config, section)]
            # what is no list of scopes is left for the configuration to refuse
            wrong = [scopes for scopes in ignored if not isinstance(scopes, tuple)]
            section["ignored_scopes"] = wrong[0] if wrong else sum(ignored, ())
            return from_nncf(section)
    return from_nncf(_only_section(config))


def from_nncf(section: Mapping[str, Any]) -> MagnitudeSparsityConfig:
    """Translate NNCF's ``compression`` dictionary, and our additions to it.

    Beyond NNCF ``params`` takes ``pattern`` (``"unstructured"``, ``{"block": [64, 64]}``,
    ``{"nm": [2, 4]}``),
    ``overrides`` (a list of dictionaries with ``Override``'s fields) and, for the adaptive
    schedule, ``step`` and ``eps``. As in NNCF a key that the chosen schedule has no use for, and
    ``compression_lr_multiplier``, which scales parameters that this algorithm has not, are let be.

    Raises:
        ValueError: an algorithm, key or value is not known; the message names it as it is written
            in the dictionary.
    """
    algorithm = section.get("algorithm")
    if algorithm != "magnitude_sparsity":
        raise ValueError(f"compression: algorithm must be 'magnitude_sparsity', got {algorithm!r}")
    _check_keys("compression", section, _SECTION_KEYS)
    params = _subsection(
        section, "params", "compression", ("schedule", *_CONFIG_KEYS, *_SCHEDULE_KEYS)
    )
    initializer = _subsection(section, "initializer", "compression", ("batchnorm_adaptation",))

    spelled = {key: f"params.{key}" for key in _CONFIG_KEYS}
    given = {key: section[key] for key in _SCOPE_KEYS if key in section}
    given |= {key: params[key] for key in _CONFIG_KEYS if key in params}
    if params.get("sparsity_level_setting_mode") == "local":
        scheduled = [key for key in ("schedule", *_SCHEDULE_KEYS) if key in params]
        if scheduled:
            raise ValueError(
                f"compression: params.{scheduled[0]} must be left out with "
                "sparsity_level_setting_mode 'local', which has no schedule, got "
                f"{params[scheduled[0]]!r}"
            )
        if "sparsity_init" in section:
            given["sparsity_init"] = section["sparsity_init"]
    else:
        given["schedule"] = _nncf_schedule(section, params)
    if "batchnorm_adaptation" in initializer:
        adaptation = _subsection(
            initializer,
            "batchnorm_adaptation",
            "compression.initializer",
            tuple(BatchNormAdaptation.model_fields),
        )
        given["batchnorm_adaptation"] = _build(
            BatchNormAdaptation,
            adaptation,
            {key: f"initializer.batchnorm_adaptation.{key}" for key in adaptation},
        )
    return _build(MagnitudeSparsityConfig, given, spelled)


def _nncf_schedule(section: Mapping[str, Any], params: Mapping[str, Any]) -> Schedule:
    kind = params.get("schedule", "polynomial")
    if not isinstance(kind, str) or kind not in _SCHEDULES:
        raise ValueError(
            f"compression: params.schedule must be one of {', '.join(map(repr, _SCHEDULES))}, "
            f"got {kind!r}"
        )
    schedule = _SCHEDULES[kind]
    keys = {
        field: key
        for key, field in _SCHEDULE_KEYS.items()
        if key in params and field in schedule.model_fields
    }
    given = {field: params[key] for field, key in keys.items()}
    spelled = {field: f"params.{key}" for field, key in keys.items()}
    if "sparsity_init" in section:
        given["initial_level"] = section["sparsity_init"]
        spelled["initial_level"] = "sparsity_init"
    return _build(schedule, given, spelled)


def _build(
    declaration: type[_Declaration], given: Mapping[str, Any], spelled: Mapping[str, str]
) -> _Declaration:
    """Make a declaration; report what is wrong with a field under its key in the dictionary."""
    try:
        return declaration(**given)
    except DeclarationError as error:
        problems = (
            f"{spelled.get(field, field)}{place} {what}".lstrip()
            for field, place, what in error.problems
        )
        raise ValueError(f"compression: {'; '.join(problems)}") from None


def _only_section(compression: object) -> Mapping[str, Any]:
    match compression:
        case Mapping() | [Mapping()]:
            return compression if isinstance(compression, Mapping) else compression[0]
        case [Mapping(), *_]:
            raise ValueError(f"compression: one algorithm can be given, got {len(compression)}")
    raise TypeError(
        "config must be a MagnitudeSparsityConfig or NNCF's compression dictionary, "
        f"got {compression!r}"
    )


def _subsection(
    section: Mapping[str, Any], name: str, where: str, known: Sequence[str]
) -> Mapping[str, Any]:
    found = section.get(name, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: {name} must be a dictionary, got {found!r}")
    _check_keys(f"{where}.{name}", found, known)
    return found


def _check_keys(where: str, section: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in section:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r}{did_you_mean(key, known)}; the keys are "
                f"{', '.join(known)}"
            )
