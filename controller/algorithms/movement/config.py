"""What movement sparsity is given: when the threshold rises, and what has an importance."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from ...config.algorithm import AlgorithmConfig, Scopes
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


class MovementSparsityConfig(AlgorithmConfig):
    """Prune the groups of linear layers that training moves towards zero.

    For example ``MovementSparsityConfig(warmup_start_epoch=1, warmup_end_epoch=4,
    importance_regularization_factor=0.1, pattern=Block(32, 32))``. Scopes and BatchNorm adaptation
    are ``AlgorithmConfig``'s.

    Args:
        warmup_start_epoch, warmup_end_epoch: zero-based; the threshold rises from the start of the
            first to the start of the second, at every step.
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
    warmup_start_epoch: Whole
    warmup_end_epoch: Whole
    importance_regularization_factor: NotNegative
    sparse_structure_by_scopes: Listed[SparseStructure] = ()
    enable_structured_masking: StrictBool | None = None
    init_importance_threshold: Finite | None = None
    final_importance_threshold: Finite = 0.0
    power: AboveZero = 3.0
    steps_per_epoch: Positive | None = None
    compression_lr_multiplier: NotNegative | None = None

    @model_validator(mode="after")
    def _check(self) -> MovementSparsityConfig:
        if self.warmup_end_epoch <= self.warmup_start_epoch:
            raise ValueError(
                f"warmup_end_epoch must be after warmup_start_epoch {self.warmup_start_epoch}, "
                f"got {self.warmup_end_epoch}"
            )
        if self.steps_per_epoch is None and self.warmup_start_epoch < 1:
            raise ValueError(
                "steps_per_epoch must be given with warmup_start_epoch 0: the first epoch counts "
                "them"
            )
        if self.overrides:
            raise ValueError(
                "overrides must be left out: sparse_structure_by_scopes is in their place, got "
                f"{self.overrides!r}"
            )
        start, end = self.init_importance_threshold, self.final_importance_threshold
        if start is not None and start >= end:
            warnings.warn(
                f"init_importance_threshold {start} is not below final_importance_threshold "
                f"{end}: the warm-up will prune less and less",
                stacklevel=2,
            )
        return self
