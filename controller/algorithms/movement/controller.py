"""Movement sparsity, NNCF's ``movement_sparsity``: what training moves towards zero is pruned.

Each group of a linear layer has an importance S that learns from ``-w dL/dw`` summed over the
training (Sanh et al., https://arxiv.org/abs/2005.07683; in blocks, Lagunas et al.,
https://arxiv.org/abs/2109.04838). Groups are kept where S is above a threshold, which a warm-up
raises; then, in transformers, whole heads and channels are resolved, and the masks are frozen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....kernels.bits import count_kept
from ....kernels.pattern import Unstructured
from ....kernels.select import kth_smallest
from ...api import CompressionStage
from ...config.algorithm import AlgorithmConfig
from ...masks.schema import END, NAMES, Entry, Schema, number
from ...masks.statistics import SparsifiedModelStatistics, SparsityStatistics
from ...masks.weight import SparseWeight, Target
from ...selection.thresholds import Scores
from ..learned import LearnedController
from .config import MovementSparsityConfig
from .importance import (
    ImportanceLoss,
    MovementWeight,
    movement_targets,
    movement_weights,
    structure_groups,
)
from .scheduler import MovementScheduler
from .structures import StructureGroup, resolve

INITIAL_PERCENTAGE = 0.001  # share of the importances below a threshold that is not configured


@dataclass(frozen=True)
class MovementSparsityStatistics(SparsityStatistics):
    """Statistics of ``movement_sparsity``.

    Attributes:
        importance_threshold, importance_regularization_factor: where they stand.
        structures: units kept and in all of each group of heads or channels; empty before they
            are resolved.
    """

    importance_threshold: float
    importance_regularization_factor: float
    structures: Mapping[str, tuple[int, int]]

    def to_str(self) -> str:
        units = [f"{name}: {kept} of {n} kept" for name, (kept, n) in self.structures.items()]
        figures = [
            f"Importance threshold: {self.importance_threshold:.6g}",
            f"Importance regularization factor: {self.importance_regularization_factor:.6g}",
        ]
        return "\n".join((super().to_str(), "", *figures, *units))


class MovementSparsityController(LearnedController):
    """Controls masks that follow from trained importances, at each ``scheduler.step()``."""

    name = "movement_sparsity"
    scores_name = "importances"
    _weights: list[MovementWeight]  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def find_targets(cls, model: nn.Module, config: AlgorithmConfig) -> list[Target]:
        # structures have any size, and are checked when the weights are made
        return movement_targets(
            super().find_targets(model, config.model_copy(update={"pattern": Unstructured()}))
        )

    @classmethod
    def make_weights(
        cls, model: nn.Module, targets: Sequence[Target], config: Any, **options: Any
    ) -> list[SparseWeight]:
        multiplier = config.compression_lr_multiplier
        return movement_weights(model, targets, config, multiplier=multiplier, **options)

    def _set_up(self) -> None:
        config: MovementSparsityConfig = self.config
        self._groups: list[StructureGroup] = []
        if config.enable_structured_masking is not False:
            named = {weight.target.users[0]: weight.name for weight in self._weights}
            self._groups = structure_groups(self._model, named, config)[0]
        self._kept_units: dict[str, tuple[int, int]] = {}
        self._importance_loss = ImportanceLoss(self._weights)
        self._loss = self._importance_loss
        self._scheduler = MovementScheduler(self, config)
        self.threshold = -math.inf

    def group_scores(self, weights: Sequence[SparseWeight]) -> Scores:
        """Importances above the least of all: ``set_sparsity_level`` prunes the lowest."""
        found = [w.spread(w.scores.detach()) for w in self._weights if w in weights]
        least = torch.stack([grid.min() for grid in found]).min()
        return Scores([grid - least for grid in found], None)

    def initial_threshold(self) -> float:
        """Return the k-th smallest importance, k = int(n * 0.001) + 1 of the n elements."""
        shares = [math.prod(weight.factors) for weight in self._weights]
        k = int(sum(weight.weight_shape.numel() for weight in self._weights) * INITIAL_PERCENTAGE)
        tensors = [weight.scores.detach() for weight in self._weights]
        return float(kth_smallest(tensors, k + 1, self._weights[0].backend, shares))

    @torch.no_grad()
    def update_masks(self, threshold: float, factor: float) -> None:
        """Keep the groups whose importance is above the threshold, or above a weight's cap; let
        ``factor`` be the loss's.

        Waits for the device once; for each weight at its cap, in blocks to skip, once more.
        """
        self._importance_loss.factor = factor
        if self.frozen or threshold == self.threshold == -math.inf:
            return
        self.threshold = threshold
        kept = [weight.scores > threshold for weight in self._weights]
        for weight, mask, count in zip(self._weights, kept, count_kept(kept), strict=True):
            if mask.numel() - count > weight.most:
                mask = weight.scores > weight.cap()
                count = int(mask.sum())
            weight.take(mask, count)

    @torch.no_grad()
    def resolve_structures(self) -> None:
        """Make the masks of heads and channels keep or prune them whole."""
        weights = {weight.target.users[0]: weight for weight in self._weights}
        masks = {place: weight.binary_mask for place, weight in weights.items()}
        resolved, kept = resolve(self._groups, masks)
        for place, mask in resolved.items():
            weights[place].binary_mask = mask
        self._kept_units = {
            f"{group.name or 'model'} {group.kind}": (int(units.sum()), group.count)
            for group, units in zip(self._groups, kept, strict=True)
        }

    def finish(self) -> None:
        """Resolve heads and channels, freeze the masks, adapt BatchNorm if that is configured."""
        self.resolve_structures()
        self.freeze()
        self._adapt_batchnorm()

    def compression_stage(self) -> CompressionStage:
        """UNCOMPRESSED at none pruned, else FULLY once frozen, as after the warm-up."""
        if not any(operand.pruned_groups() for operand in self._weights):
            return CompressionStage.UNCOMPRESSED
        if self.frozen:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED

    def _statistics(
        self, model: SparsifiedModelStatistics, level: float | None
    ) -> SparsityStatistics:
        factor, units = self._importance_loss.factor, dict(self._kept_units)
        return MovementSparsityStatistics(model, level, self.threshold, factor, units)

    def _state_beside_scores(self) -> dict[str, Any]:
        units = {name: list(units) for name, units in self._kept_units.items()}
        factor = self._importance_loss.factor
        return {"threshold": self.threshold, "factor": factor, "structures": units}

    def _schema_beside_scores(self) -> dict[str, Schema]:
        kinds = number("a number"), number("a number from 0", 0, sys.float_info.max)
        return {"threshold": kinds[0], "factor": kinds[1], "structures": STRUCTURES}

    def _take_beside_scores(self, state: Mapping[str, Any]) -> None:
        self.threshold, self._importance_loss.factor = state["threshold"], state["factor"]
        self._kept_units = {name: (n, of) for name, (n, of) in state["structures"].items()}


def _are_units(structures: Mapping[str, Any]) -> bool:
    return NAMES.fits(structures) and all(
        type(kept) is type(count) is int and 0 <= kept <= count < END
        for kept, count in structures.values()
    )


STRUCTURES = Entry("of each group [units kept, units in all]", _are_units)
