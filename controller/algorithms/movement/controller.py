"""Movement sparsity: what training moves towards zero is pruned.

Each group of a linear layer has an importance S that learns from ``-w dL/dw`` summed over the
training (Sanh et al., https://arxiv.org/abs/2005.07683; in blocks, Lagunas et al.,
https://arxiv.org/abs/2109.04838).

- **Hard**: the groups of lowest S are pruned, as many as a schedule's level says.
- **Soft**, NNCF's ``movement_sparsity``: groups are kept where S is above a threshold, which a
  warm-up raises; then, in transformers, whole heads and channels are resolved, and the masks are
  frozen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.bits import count_kept
from ....kernels.pattern import Unstructured
from ...api import CompressionStage
from ...config.algorithm import AlgorithmConfig
from ...masks.exchange import sums_of_parts
from ...masks.schema import END, NAMES, Entry, Schema, number
from ...masks.statistics import SparsifiedModelStatistics, SparsityStatistics
from ...masks.targets import Whereabouts
from ...masks.weight import SparseWeight, Target
from ...selection.thresholds import Scores
from ..base import Change
from ..learned import ScoredController
from .config import MovementSparsityConfig
from .importance import (
    ImportanceLoss,
    MovementWeight,
    kth_importance,
    movement_targets,
    movement_weights,
    structure_groups,
    take_kept,
    with_tiles,
)
from .scheduler import MovementScheduler
from .structures import StructureGroup, resolve

INITIAL_PERCENTAGE = 0.001  # share of the importances below a threshold that is not configured


@dataclass(frozen=True)
class MovementSparsityStatistics(SparsityStatistics):
    """Statistics of soft ``movement_sparsity``.

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


class MovementSparsityController(ScoredController):
    """Controls masks that follow from trained importances: soft at each ``scheduler.step()``,
    hard as the schedule says.
    """

    name = "movement_sparsity"
    scores_name = "importances"
    _weights: list[MovementWeight]  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def find_targets(
        cls, model: nn.Module, config: AlgorithmConfig, elsewhere: Whereabouts | None = None
    ) -> list[Target]:
        hard = getattr(config, "schedule", None) is not None
        # structures have any size, and are checked when the weights are made
        searched = config if hard else config.model_copy(update={"pattern": Unstructured()})
        chosen = super().find_targets(model, searched, elsewhere)
        several = elsewhere is not None
        targets = movement_targets(chosen, biases=not hard, elsewhere=several)
        return targets if hard else with_tiles(model, targets, config)  # pyright: ignore[reportArgumentType]

    @classmethod
    def make_weights(
        cls, model: nn.Module, targets: Sequence[Target], config: Any, **options: Any
    ) -> list[SparseWeight]:
        multiplier = config.compression_lr_multiplier
        return movement_weights(model, targets, config, multiplier=multiplier, **options)

    def _set_up(self) -> None:
        config: MovementSparsityConfig = self.config
        self.threshold = -math.inf
        self._least = torch.zeros((), device=self._device)
        self._groups: list[StructureGroup] = []
        if config.schedule is None and config.enable_structured_masking is not False:
            named = {weight.target.users[0]: weight.name for weight in self._weights}
            self._groups = structure_groups(self._model, named, config)[0]
            asked = config.enable_structured_masking
            if asked and not self.ranks.any(bool(self._groups), self._device):
                raise ValueError(
                    "create_controller: enable_structured_masking needs attention or feed-forward "
                    "blocks whose linear layers are all masked, along the dimension of their "
                    "heads or channels, found none"
                )
        self._kept_units: dict[str, tuple[int, int]] = {}
        self._importance_loss = ImportanceLoss(self._weights)
        self._loss = self._importance_loss
        if config.schedule is None:
            self._scheduler = MovementScheduler(self, config)
            return
        self._trained = False
        self._pool = config.pool
        self._follow_schedule(config.schedule)

    def group_scores(self, weights: Sequence[Any]) -> Scores:
        """Importances above the least of all: ``set_sparsity_level`` prunes the lowest."""
        return Scores([w.spread_part(w.part()) - self._least for w in weights], None)

    def _find_masks(self, weights: list[MovementWeight], level: float) -> Change:
        """As any, but that thresholds are of importances as they are."""
        self._least, greatest = self._range_of(weights)
        if self.config.schedule is not None and level > 0 and not self._trained:
            self._trained = bool(greatest > self._least)
            if not self._trained:
                raise ValueError(
                    f"set_sparsity_level: level {level:g} needs importances that differ, and all "
                    "are 0 until training has changed them; let the schedule start at level 0"
                )
        write = super()._find_masks(weights, level)

        def write_all() -> None:
            write()
            for name in (weight.name for weight in weights):
                if (threshold := self._thresholds.get(name)) is not None:
                    self._thresholds[name] = threshold + self._least

        return write_all

    def _range_of(self, weights: Sequence[MovementWeight]) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest importance, of all ranks."""
        parts = [weight.part() for weight in weights]
        ends = [end for part in parts if part.numel() for end in part.aminmax()]
        nothing = self._least.new_full((2,), -torch.inf)
        found = (
            torch.stack([-torch.stack(ends).min(), torch.stack(ends).max()]) if ends else nothing
        )
        if any(weight.shard for weight in weights):
            self.ranks.most(found)
        return -found[0], found[1]

    def initial_threshold(self) -> float:
        """Return the k-th smallest importance, k = int(n * 0.001) + 1 of the n elements."""
        shares = [math.prod(weight.factors) for weight in self._weights]
        k = int(sum(weight.weight_shape.numel() for weight in self._weights) * INITIAL_PERCENTAGE)
        return float(kth_importance(self._weights, k + 1, shares))

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
        kept = [weight.part() > threshold for weight in self._weights]
        counts = count_kept(kept)
        if any(weight.shard for weight in self._weights):
            own = torch.tensor(counts, device=self._device)
            counts = sums_of_parts(self._weights, own).tolist()
        for i, weight in enumerate(self._weights):
            if math.prod(weight.scores_shape) - counts[i] > weight.most:
                kept[i] = weight.part() > weight.cap()
                own = kept[i].count_nonzero()[None]
                counts[i] = int(sums_of_parts([weight], own))
        take_kept(self._weights, kept, counts)

    @torch.no_grad()
    def resolve_structures(self) -> None:
        """Make the masks of heads and channels keep or prune them whole."""
        weights = {weight.target.users[0]: weight for weight in self._weights}
        masks = {place: weight.kept_everywhere for place, weight in weights.items()}
        resolved, kept = resolve(self._groups, masks)
        for place, mask in resolved.items():
            weights[place].keep_everywhere(mask)
        self._kept_units = {
            f"{group.name or 'model'} {group.kind}": (int(units.sum()), group.count)
            for group, units in zip(self._groups, kept, strict=True)
        }
        staged = [weight for weight in self._weights if weight.target.holders]
        for weight in staged:  # of which the other stages know no counts
            weight.tell_counts()
        if staged:
            self._kept_units = self.ranks.collect(self._kept_units)

    def finish(self) -> None:
        """Resolve heads and channels, freeze the masks, adapt BatchNorm if that is configured."""
        self.resolve_structures()
        self.freeze()
        self._adapt_batchnorm()

    def compression_stage(self) -> CompressionStage:
        """Soft: UNCOMPRESSED at none pruned, else FULLY once frozen, as after the warm-up."""
        if self.config.schedule is not None:
            return super().compression_stage()
        if not any(operand.pruned_groups() for operand in self._weights):
            return CompressionStage.UNCOMPRESSED
        if self.frozen:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED

    def _statistics(
        self, model: SparsifiedModelStatistics, level: float | None
    ) -> SparsityStatistics:
        if self.config.schedule is not None:
            return super()._statistics(model, level)
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
