"""The configuration that the options of a fine-tuning run spell."""

from __future__ import annotations

import math
from typing import Any

from ...controller.algorithms.table import ALGORITHMS as TABLE
from ...controller.config.algorithm import AlgorithmConfig
from ...controller.config.schedule import (
    AdaptiveSchedule,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
    RampSchedule,
    Schedule,
)
from ..measure.spelling import parse_pattern
from .options import Options

CONFIGS = {row.short: row.config for row in TABLE.values()}


def sparsity_config(options: Options) -> AlgorithmConfig:
    """Return the configuration of the algorithm: of the options those that it has as fields."""
    config = CONFIGS[options.algorithm]
    given: dict[str, Any] = {
        "weight_importance": options.importance,
        "block_reduction": options.block_reduction,
        "growth": options.growth,
        "seed": options.seed,
    }
    chosen = ("pool", "distribution", "minimum_level", "maximum_level")
    given |= {name: value for name in chosen if (value := getattr(options, name)) is not None}
    soft = options.algorithm == "movement" and options.level is None
    if "schedule" in config.model_fields and not soft:
        given["schedule"] = schedule(options)
    if "t_end" in config.model_fields:
        given |= regrowth(options)
    if soft:
        given |= warm_up(options)
    return config(
        pattern=parse_pattern(options.pattern),
        target_scopes=options.scope or None,
        ignored_scopes=options.ignore,
        **{name: value for name, value in given.items() if name in config.model_fields},
    )


def warm_up(options: Options) -> dict[str, Any]:
    """Return soft movement's warm-up, from the second epoch on, as long as the ramp."""
    assert options.epochs is not None
    assert options.ramp is not None
    if options.epochs <= 1:
        raise ValueError(
            "epochs must be more than 1 with movement without a level, whose warm-up begins with "
            f"the second, got {options.epochs!r}"
        )
    end = min(1 + max(1, round(options.ramp * options.epochs)), math.ceil(options.epochs))
    return {
        "warmup_start_epoch": 1,
        "warmup_end_epoch": end,
        "importance_regularization_factor": options.regularization,
        "init_importance_threshold": -0.1,
        "enable_structured_masking": False,
        "steps_per_epoch": options.steps_per_epoch,
    }


def regrowth(options: Options) -> dict[str, Any]:
    """Return what SET and RigL are told; the masks stay from the end of the ramp on."""
    assert options.epochs is not None
    assert options.ramp is not None
    assert options.steps_per_epoch is not None
    t_end = round(options.ramp * options.epochs * options.steps_per_epoch)
    return {
        "level": options.level,
        "t_end": t_end,
        "initial_masks": options.initial_masks,
        "alpha": options.alpha,
        "delta_t": options.delta_t or max(1, t_end // 20),
    }


def schedule(options: Options) -> Schedule:
    """Return the schedule; the target is reached at the end of the ramp."""
    assert options.epochs is not None
    assert options.ramp is not None
    epochs = math.ceil(options.epochs)
    # the level of an epoch holds from its start, so the last epoch is the latest to reach it in
    target_epoch = min(max(1, round(options.ramp * options.epochs)), epochs - 1)
    assert options.level is not None
    span: dict[str, Any] = {
        "initial_level": options.initial_level,
        "target_level": options.level,
    }
    # groups may return as long as training goes on
    end: dict[str, Any] = {"freeze_epoch": epochs}
    match options.schedule:
        # a single epoch is time enough for a schedule by steps
        case "polynomial" if epochs == 1:
            assert options.steps_per_epoch is not None
            steps = max(1, round(options.epochs * options.steps_per_epoch))
            return RampSchedule(**span, end=round(options.ramp * steps), freeze=steps)
        case "polynomial":
            return PolynomialSchedule(
                **span,
                **end,
                target_epoch=target_epoch,
                power=3.0,
                update_per_optimizer_step=True,
                steps_per_epoch=options.steps_per_epoch,
            )
        case "exponential":
            return ExponentialSchedule(**span, **end, target_epoch=target_epoch)
        case "multistep":
            rise = (options.level - options.initial_level) / 4
            return MultistepSchedule(
                **end,
                initial_level=options.initial_level,
                steps=tuple(target_epoch * i // 3 for i in (1, 2, 3)),
                levels=(*(options.initial_level + rise * i for i in (1, 2, 3)), options.level),
            )
        case _:
            return AdaptiveSchedule(**span, **end)
