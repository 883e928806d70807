"""What movement sparsity is given: when the threshold rises, and what has an importance."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ...config.algorithm import PooledConfig, ScheduleField, Scopes
from ...config.declaration import (
    AboveZero,
    Declaration,
    Finite,
    Listed,
    NotNegative,
    Positive,
    Whole,
    listed,
)


class SparseStructure(Declaration):
    """What has one importance, in the linear layers that scopes select.

    Args:
        mode: ``"fine"``: each element; ``"block"``: each block of ``sparse_factors``;
            ``"per_dim"``: each row (``axis`` 0) or column (1).
        sparse_factors: rows and columns of a block, which must divide the weight's; any integers.
        axis: the dimension whose indices have an importance each.
        target_scopes: the layers; see ``scope.py`` for what a scope is.
    """

    target_scopes: Scopes
    mode: Literal["fine", "block", "per_dim"] = "fine"
    sparse_factors: (
        Annotated[tuple[Positive, Positive], BeforeValidator(listed), Field(strict=True)] | None
    ) = None
    axis: Literal[0, 1] | None = None

    @model_validator(mode="after")
    def _check_mode(self) -> SparseStructure:
        wanted = {"fine": (), "block": ("sparse_factors",), "per_dim": ("axis",)}[self.mode]
        for name in ("sparse_factors", "axis"):
            given = getattr(self, name)
            if name in wanted and given is None:
                raise ValueError(f"{name} must be given with mode {self.mode!r}")
            whole = self.mode == "fine" and given == (1, 1)
            if name not in wanted and given is not None and not whole:
                raise ValueError(f"{name} must be left out with mode {self.mode!r}, got {given!r}")
        if not self.target_scopes:
            raise ValueError("target_scopes must name a scope, got ()")
        return self

    def factors(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return rows and columns of a group in a weight of ``shape``."""
        if self.mode == "per_dim":
            return (1, shape[1]) if self.axis == 0 else (shape[0], 1)
        return self.sparse_factors or (1, 1)


_SOFT = (
    *("warmup_start_epoch", "warmup_end_epoch", "importance_regularization_factor"),
    *("sparse_structure_by_scopes", "enable_structured_masking", "init_importance_threshold"),
    *("final_importance_threshold", "power", "steps_per_epoch"),
)
_HARD = ("pool", "minimum_level", "maximum_level", "overrides")


class MovementSparsityConfig(PooledConfig):
    """Prune the groups of linear layers that training moves towards zero.

    Hard, to a level (Sanh et al.'s top-v): ``MovementSparsityConfig(pattern=Block(32, 32),
    schedule=RampSchedule(target_level=0.8, end=3000))``. Pattern, overrides and limits are then
    those of ``AlgorithmConfig`` and ``PooledConfig``; biases stay dense.

    Soft, to a threshold, NNCF's: ``MovementSparsityConfig(warmup_start_epoch=1,
    warmup_end_epoch=4, importance_regularization_factor=0.1, pattern=Block(32, 32))``. How much is
    pruned is the factor's to decide. Biases have importances too.

    Args:
        schedule: which share of the groups is pruned when; None: soft. The other arguments but
            ``compression_lr_multiplier``, ``pattern`` and scopes are for one of the two.
        pool: hard: ``"weight"``: the importances of each weight are compared with one another, as
            published; ``"global"``: those of all weights of one pattern.
        warmup_start_epoch, warmup_end_epoch: soft: zero-based; the threshold rises from the start
            of the first to the start of the second, at every step.
        importance_regularization_factor: of the loss, at the end of the warm-up; not negative.
        pattern: what has one importance where no structure says otherwise.
        sparse_structure_by_scopes: what has one importance, by scopes; of several structures that
            match a layer the first holds.
        enable_structured_masking: resolve whole heads and channels at the end; True: there must be
            such, None: where there are.
        init_importance_threshold: where the threshold starts; None: at about the first thousandth
            of the importances, when the warm-up starts.
        final_importance_threshold: where it ends.
        power: of the polynomial; positive.
        steps_per_epoch: optimiser steps in an epoch; None: counted in the first, which must come
            before the warm-up.
        compression_lr_multiplier: a factor of the importances' gradients, not negative; None: 1.
    """

    sets_levels_by = "the importances and their threshold decide"

    algorithm: Literal["movement_sparsity"] = "movement_sparsity"
    # before those that it excludes
    schedule: ScheduleField = None
    pool: Literal["global", "weight"] = "weight"
    warmup_start_epoch: Whole | None = None
    warmup_end_epoch: Whole | None = None
    importance_regularization_factor: NotNegative | None = None
    sparse_structure_by_scopes: Listed[SparseStructure] = ()
    enable_structured_masking: StrictBool | None = None
    init_importance_threshold: Finite | None = None
    final_importance_threshold: Finite = 0.0
    power: AboveZero = 3.0
    steps_per_epoch: Positive | None = None
    compression_lr_multiplier: NotNegative | None = None

    @field_validator(*_SOFT)
    @classmethod
    def _check_is_soft(cls, given: Any, info: ValidationInfo) -> Any:
        if "schedule" not in info.data:  # it was refused itself
            return given
        assert info.field_name is not None
        if info.data["schedule"] is None:
            if given is None and info.field_name in _SOFT[:3]:
                raise ValueError("must be given, or a schedule of the level in its place")
        elif given != cls.model_fields[info.field_name].default:
            raise ValueError(
                f"must be left out with a schedule, whose level holds exactly, got {given!r}"
            )
        return given

    @model_validator(mode="after")
    def _check(self) -> MovementSparsityConfig:
        if self.schedule is not None:
            return self
        for name in _HARD:
            if (given := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} must be left out without a schedule, as the threshold and "
                    f"sparse_structure_by_scopes decide, got {given!r}"
                )
        begin, warm = self.warmup_start_epoch, self.warmup_end_epoch
        assert begin is not None
        assert warm is not None
        if warm <= begin:
            raise ValueError(
                f"warmup_end_epoch must be after warmup_start_epoch {begin}, got {warm}"
            )
        if self.steps_per_epoch is None and begin < 1:
            raise ValueError(
                "steps_per_epoch must be given with warmup_start_epoch 0: the first epoch counts "
                "them"
            )
        start, end = self.init_importance_threshold, self.final_importance_threshold
        if start is not None and start >= end:
            warnings.warn(
                f"init_importance_threshold {start} is not below final_importance_threshold "
                f"{end}: the warm-up will prune less and less",
                stacklevel=2,
            )
        return self
