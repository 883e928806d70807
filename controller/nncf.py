"""NNCF's ``compression`` dictionary, translated into configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from .algorithms.table import ALGORITHMS
from .config.algorithm import SCHEDULES, AlgorithmConfig, BatchNormAdaptation, ScheduledConfig
from .config.declaration import Declaration, DeclarationError, did_you_mean, listed
from .config.schedule import Schedule

_Declaration = TypeVar("_Declaration", bound=Declaration)

ConfigLike = AlgorithmConfig | Mapping[str, Any] | Sequence[AlgorithmConfig | Mapping[str, Any]]

# NNCF's keys in `params`, and the schedules' fields that they are
_SCHEDULE_KEYS = {
    "sparsity_target": "target_level",
    "sparsity_target_epoch": "target_epoch",
    "sparsity_freeze_epoch": "freeze_epoch",
    **{key: key for key in ("power", "concave", "update_per_optimizer_step", "steps_per_epoch")},
    "multistep_steps": "steps",
    "multistep_sparsity_levels": "levels",
    **{key: key for key in ("step", "eps", "patience")},
}
_SHARED_PARAMS = ("pattern", "targets", "overrides")
_SCOPE_KEYS = ("target_scopes", "ignored_scopes", "validate_scopes")
_MULTIPLIER = "compression_lr_multiplier"
_BESIDE = (_MULTIPLIER, "sparse_structure_by_scopes")  # fields that stand beside `params`
_LEVELS = ("algorithm", "schedule", "sparsity_init")  # fields that are read from several keys
_SECTION_KEYS = ("algorithm", "sparsity_init", *_SCOPE_KEYS, "params", "initializer", _MULTIPLIER)
_ADAPTATION = "batchnorm_adaptation"
# what an NNCF configuration holds beside `compression`
_NNCF_KEYS = (
    *("compression", "target_scopes", "ignored_scopes", "input_info", "target_device"),
    *("accuracy_aware_training", _MULTIPLIER, "disable_shape_matching", "log_dir"),
)


def parse_config(config: ConfigLike) -> list[AlgorithmConfig]:
    """Return the configuration of each algorithm that ``config`` is or spells.

    Args:
        config: a configuration, NNCF's ``compression`` dictionary, a list of these, or a whole
            NNCF configuration with the key ``compression``. Of what stands beside that key, scopes
            and ``compression_lr_multiplier`` alone bear on sparsity; they count as in NNCF:
            ignored scopes add up, target ones there replace the section's, whose own multiplier
            holds.

    Raises:
        TypeError: ``config`` is none of these.
        ValueError: an algorithm, key or value is not known, see ``from_nncf``.
    """
    match config:
        case AlgorithmConfig():
            return [config]
        case Mapping() if "compression" in config:
            _check_keys("config", config, _NNCF_KEYS)
            sections = config["compression"]
            sections = [sections] if isinstance(sections, Mapping) else sections
            if isinstance(sections, list) and all(isinstance(s, Mapping) for s in sections):
                sections = [_with_outer_scopes(section, config) for section in sections]
            return parse_config(sections)
        case Mapping():
            return [from_nncf(config)]
        case [_, *_] if all(isinstance(part, (AlgorithmConfig, Mapping)) for part in config):
            return [one for part in config for one in parse_config(part)]
    raise TypeError(
        "config must be a configuration such as MagnitudeSparsityConfig, NNCF's compression "
        f"dictionary, or a list of these, got {config!r}"
    )


def _with_outer_scopes(section: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    section = dict(section)
    if "target_scopes" in config:
        section["target_scopes"] = config["target_scopes"]
    if _MULTIPLIER in config:
        section.setdefault(_MULTIPLIER, config[_MULTIPLIER])
    ignored = [listed(part.get("ignored_scopes", ())) for part in (config, section)]
    # what is no list of scopes is left for the configuration to refuse
    wrong = [scopes for scopes in ignored if not isinstance(scopes, tuple)]
    section["ignored_scopes"] = wrong[0] if wrong else sum(ignored, ())
    return section


def from_nncf(section: Mapping[str, Any]) -> AlgorithmConfig:
    """Translate one of NNCF's ``compression`` dictionaries, and our additions to it.

    Beyond NNCF ``params`` takes ``pattern`` (``"unstructured"``, ``{"block": [64, 64]}``,
    ``{"nm": [2, 4]}``), ``overrides`` (a list of dictionaries with ``Override``'s fields), other
    fields of the configuration and, for the adaptive schedule, ``step`` and ``eps``. As in NNCF a
    key that the chosen schedule has no use for, and ``compression_lr_multiplier`` where the
    algorithm has no parameters that it could scale, are let be.

    Raises:
        ValueError: an algorithm, key or value is not known; the message names it as it is written
            in the dictionary.
    """
    algorithm = section.get("algorithm")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ValueError(
            f"compression: algorithm must be one of {', '.join(map(repr, ALGORITHMS))}, "
            f"got {algorithm!r}"
        )
    config = ALGORITHMS[algorithm].config
    scheduled = issubclass(config, ScheduledConfig)
    fields = [name for name in config.model_fields if name not in AlgorithmConfig.model_fields]
    beside = [name for name in _BESIDE if name in fields]
    own = [name for name in fields if name not in (*_LEVELS, *beside)]
    inside = section.get("params")
    if isinstance(inside, Mapping) and (wrong := [name for name in beside if name in inside]):
        raise ValueError(f"compression: {wrong[0]} must stand beside params, got it inside")
    if not scheduled and "sparsity_init" in section:
        raise ValueError(
            f"compression: sparsity_init must be left out; {config.sets_levels_by}, got "
            f"{section['sparsity_init']!r}"
        )
    _check_keys("compression", section, (*_SECTION_KEYS, *beside))
    scheduling = ("schedule", *_SCHEDULE_KEYS) if scheduled else ()
    known = (*scheduling, *own, *_SHARED_PARAMS)
    params = _subsection(section, "params", "compression", known)
    given = {key: section[key] for key in (*_SCOPE_KEYS, *beside) if key in section}
    given |= {key: params[key] for key in (*own, *_SHARED_PARAMS) if key in params}
    initializer = _subsection(section, "initializer", "compression", (_ADAPTATION,))
    if _ADAPTATION in initializer:
        fields = tuple(BatchNormAdaptation.model_fields)
        adaptation = _subsection(initializer, _ADAPTATION, "compression.initializer", fields)
        spelled = {key: f"initializer.{_ADAPTATION}.{key}" for key in adaptation}
        given[_ADAPTATION] = _build(BatchNormAdaptation, adaptation, spelled)
    if params.get("sparsity_level_setting_mode") == "local":
        if found := [key for key in scheduling if key in params]:
            raise ValueError(
                f"compression: params.{found[0]} must be left out with "
                "sparsity_level_setting_mode 'local', which has no schedule, got "
                f"{params[found[0]]!r}"
            )
        given |= {key: section[key] for key in ("sparsity_init",) if key in section}
    elif scheduled:
        default = config.model_fields["schedule"].get_default(
            call_default_factory=True, validated_data={}
        )
        given["schedule"] = _nncf_schedule(section, params, default=default.kind)
    return _build(config, given, {key: f"params.{key}" for key in (*own, *_SHARED_PARAMS)})


def _nncf_schedule(
    section: Mapping[str, Any], params: Mapping[str, Any], *, default: str
) -> Schedule:
    kind = params.get("schedule", default)
    if not isinstance(kind, str) or kind not in SCHEDULES:
        raise ValueError(
            f"compression: params.schedule must be one of {', '.join(map(repr, SCHEDULES))}, "
            f"got {kind!r}"
        )
    schedule = SCHEDULES[kind]
    spelled = {
        field: f"params.{key}"
        for key, field in _SCHEDULE_KEYS.items()
        if key in params and field in schedule.model_fields
    }
    given = {field: params[key.removeprefix("params.")] for field, key in spelled.items()}
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
