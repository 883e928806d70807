"""NNCF's ``compression`` dictionary, translated into configurations.

Reading order: the entry point, one translation an algorithm, what they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from .config import SCHEDULES, AlgorithmConfig, BatchNormAdaptation, listed
from .const import ConstSparsityConfig
from .declaration import Declaration, DeclarationError, did_you_mean
from .magnitude import MagnitudeSparsityConfig
from .movement import MovementSparsityConfig
from .rb import RBSparsityConfig
from .regrowth import RegrowthConfig, SETConfig
from .rigl import RigLConfig
from .schedule import Schedule

_Declaration = TypeVar("_Declaration", bound=Declaration)

Config = (
    MagnitudeSparsityConfig
    | RBSparsityConfig
    | MovementSparsityConfig
    | ConstSparsityConfig
    | SETConfig
    | RigLConfig
)
ConfigLike = Config | Mapping[str, Any] | Sequence[Config | Mapping[str, Any]]

_ALGORITHMS = (
    "magnitude_sparsity",
    "rb_sparsity",
    "movement_sparsity",
    "const_sparsity",
    "set",
    "rigl",
)
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
_SHARED_PARAMS = ("pattern", "overrides")
_SCOPE_KEYS = ("target_scopes", "ignored_scopes", "validate_scopes")
_MULTIPLIER = "compression_lr_multiplier"
_STRUCTURES = "sparse_structure_by_scopes"
_SECTION_KEYS = (
    "algorithm",
    "sparsity_init",
    *_SCOPE_KEYS,
    "params",
    "initializer",
    _MULTIPLIER,
)
# what an NNCF configuration holds beside `compression`
_NNCF_KEYS = (
    "compression",
    "target_scopes",
    "ignored_scopes",
    "input_info",
    "target_device",
    "accuracy_aware_training",
    _MULTIPLIER,
    "disable_shape_matching",
    "log_dir",
)


def parse_config(config: ConfigLike) -> list[Config]:
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


def from_nncf(section: Mapping[str, Any]) -> Config:
    """Translate one of NNCF's ``compression`` dictionaries, and our additions to it.

    Beyond NNCF ``params`` takes ``pattern`` (``"unstructured"``, ``{"block": [64, 64]}``,
    ``{"nm": [2, 4]}``), ``overrides`` (a list of dictionaries with ``Override``'s fields) and, for
    the adaptive schedule, ``step`` and ``eps``. As in NNCF a key that the chosen schedule has no
    use for, and ``compression_lr_multiplier`` where the algorithm has no parameters that it could
    scale, are let be.

    Raises:
        ValueError: an algorithm, key or value is not known; the message names it as it is written
            in the dictionary.
    """
    match section.get("algorithm"):
        case "magnitude_sparsity":
            return _magnitude(section)
        case "rb_sparsity":
            return _rb(section)
        case "movement_sparsity":
            return _movement(section)
        case "const_sparsity":
            _refuse_initial_level(section, "the masks are those of the zeros there are")
            _, given, spelled = _shared(section, ())
            return _build(ConstSparsityConfig, given, spelled)
        case "set":
            return _build(SETConfig, *_regrowth(section))
        case "rigl":
            return _build(RigLConfig, *_regrowth(section))
        case algorithm:
            raise ValueError(
                f"compression: algorithm must be one of {', '.join(map(repr, _ALGORITHMS))}, "
                f"got {algorithm!r}"
            )


def _magnitude(section: Mapping[str, Any]) -> MagnitudeSparsityConfig:
    own = ("sparsity_level_setting_mode", "weight_importance", "seed")
    given, spelled = _with_levels(section, own, default="polynomial")
    return _build(MagnitudeSparsityConfig, given, spelled)


def _rb(section: Mapping[str, Any]) -> RBSparsityConfig:
    own = ("sparsity_level_setting_mode", "seed")
    given, spelled = _with_levels(section, own, default="exponential")
    if _MULTIPLIER in section:
        given[_MULTIPLIER] = section[_MULTIPLIER]
    return _build(RBSparsityConfig, given, spelled)


def _movement(section: Mapping[str, Any]) -> MovementSparsityConfig:
    _refuse_initial_level(section, "the importances and their threshold decide")
    shared = ("algorithm", "batchnorm_adaptation", *_SCOPE_KEYS, *_SHARED_PARAMS)
    beside = (_MULTIPLIER, _STRUCTURES)
    own = [n for n in MovementSparsityConfig.model_fields if n not in (*shared, *beside)]
    inside = section.get("params")
    if isinstance(inside, Mapping) and _STRUCTURES in inside:
        raise ValueError(f"compression: {_STRUCTURES} must stand beside params, got it inside")
    params, given, spelled = _shared(section, own, (_STRUCTURES,))
    given |= {key: params[key] for key in own if key in params}
    spelled |= {key: f"params.{key}" for key in own}
    given |= {key: section[key] for key in beside if key in section}
    return _build(MovementSparsityConfig, given, spelled)


def _with_levels(
    section: Mapping[str, Any], own: Sequence[str], *, default: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read what an algorithm has that is given levels, by a schedule or weight by weight.

    Args:
        section: the dictionary.
        own: keys of ``params`` that are fields of the configuration.
        default: the schedule's kind where none is given.

    Returns:
        Arguments for the configuration; how the dictionary spells each argument.
    """
    params, given, spelled = _shared(section, ("schedule", *own, *_SCHEDULE_KEYS))
    given |= {key: params[key] for key in own if key in params}
    spelled |= {key: f"params.{key}" for key in own}
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
        given["schedule"] = _nncf_schedule(section, params, default=default)
    return given, spelled


def _regrowth(section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    own = tuple(
        key for key in RegrowthConfig.model_fields if key not in AlgorithmConfig.model_fields
    )
    _refuse_initial_level(section, "the level holds from the start, params.level")
    params, given, spelled = _shared(section, own)
    given |= {key: params[key] for key in own if key in params}
    return given, spelled | {key: f"params.{key}" for key in own}


def _refuse_initial_level(section: Mapping[str, Any], why: str) -> None:
    if "sparsity_init" in section:
        raise ValueError(
            f"compression: sparsity_init must be left out; {why}, got {section['sparsity_init']!r}"
        )


def _shared(
    section: Mapping[str, Any], own_params: Sequence[str], own_keys: Sequence[str] = ()
) -> tuple[Mapping[str, Any], dict[str, Any], dict[str, str]]:
    """Read what every algorithm's dictionary has.

    Args:
        section: the dictionary.
        own_params: keys of ``params`` that the algorithm knows beyond the shared ones.
        own_keys: keys beside ``params``, likewise.

    Returns:
        ``params``; arguments for the configuration; how the dictionary spells each argument.
    """
    _check_keys("compression", section, (*_SECTION_KEYS, *own_keys))
    params = _subsection(section, "params", "compression", (*own_params, *_SHARED_PARAMS))
    initializer = _subsection(section, "initializer", "compression", ("batchnorm_adaptation",))
    given = {key: section[key] for key in _SCOPE_KEYS if key in section}
    given |= {key: params[key] for key in _SHARED_PARAMS if key in params}
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
    return params, given, {key: f"params.{key}" for key in _SHARED_PARAMS}


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
