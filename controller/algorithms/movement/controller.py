"""Movement sparsity, NNCF's ``movement_sparsity``: what training moves towards zero is pruned.

Each group of a linear layer has an importance S that learns from ``-w dL/dw`` summed over the
training (Sanh et al., https://arxiv.org/abs/2005.07683; in blocks, Lagunas et al.,
https://arxiv.org/abs/2109.04838). Groups are kept where S is above a threshold, which a warm-up
raises; then, in transformers, whole heads and channels are resolved, and the masks are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....kernels.pattern import Unstructured
from ....kernels.select import kth_smallest
from ...api import CompressionStage
from ...config.algorithm import AlgorithmConfig
from ...config.state import check_keys, number
from ...masks.learned import read_scores, scores_state
from ...masks.statistics import SparsityStatistics, Statistics
from ...masks.weight import SparseModuleInfo, SparseWeight, Target
from ...selection.thresholds import Scores
from ..base import Change
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
        figures = [
            f"Importance threshold: {self.importance_threshold:.6g}",
            f"Importance regularization factor: {self.importance_regularization_factor:.6g}",
            *(
                f"{name}: {kept} of {count} kept"
                for name, (kept, count) in self.structures.items()
            ),
        ]
        return "\n".join((super().to_str(), "", *figures))


class MovementSparsityController(LearnedController):
    """Controls masks that follow from trained importances, at each ``scheduler.step()``."""

    name = "movement_sparsity"
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
            infos = self.sparsified_module_info
            named = {(i.module, i.parameter_name): i.module_node_name for i in infos}
            self._groups = structure_groups(self._model, named, config)[0]
        self._kept_units: dict[str, tuple[int, int]] = {}
        layers: dict[int, list[MovementWeight]] = {}
        for weight in self._weights:
            layers.setdefault(id(weight.module), []).append(weight)
        self._importance_loss = ImportanceLoss(list(layers.values()))
        self._loss = self._importance_loss
        self._scheduler = MovementScheduler(self, config)
        self.threshold = -math.inf

    def group_scores(self, infos: Sequence[SparseModuleInfo]) -> Scores:
        """Importances above the least of all: ``set_sparsity_level`` prunes the lowest."""
        found = [
            operand.spread(operand.scores.detach())
            for operand in self._weights
            if any(info.operand is operand for info in infos)
        ]
        least = torch.stack([grid.min() for grid in found]).min()
        return Scores([grid - least for grid in found], None)

    def initial_threshold(self) -> float:
        """Return the k-th smallest importance, k = int(n * 0.001) + 1 of the n elements."""
        shares = [math.prod(operand.factors) for operand in self._weights]
        sizes = [operand.weight_shape.numel() for operand in self._weights]
        k = int(sum(sizes) * INITIAL_PERCENTAGE) + 1
        tensors = [operand.scores.detach() for operand in self._weights]
        if len(set(shares)) == 1:
            return float(kth_smallest(tensors, -(-k // shares[0]), self._weights[0].backend))
        values, order = torch.cat([tensor.flatten() for tensor in tensors]).sort()
        counts = torch.tensor(shares, device=values.device).repeat_interleave(
            torch.tensor([tensor.numel() for tensor in tensors], device=values.device)
        )
        return float(values[(counts[order].cumsum(0) < k).sum()])

    @torch.no_grad()
    def update_masks(self, threshold: float, factor: float) -> None:
        """Keep the groups whose importance is above the threshold, or above a weight's cap.

        Waits for the device once; for each weight at its cap, in blocks to skip, once more.

        Args:
            threshold: of importance.
            factor: of the loss.
        """
        self._importance_loss.factor = factor
        if self.frozen or threshold == self.threshold == -math.inf:
            return
        self.threshold = threshold
        kept = [operand.scores > threshold for operand in self._weights]
        counts = torch.stack([mask.count_nonzero() for mask in kept]).tolist()
        for operand, mask, count in zip(self._weights, kept, counts, strict=True):
            if mask.numel() - count > operand.most:
                capped = operand.scores > operand.cap()
                operand.take(capped, int(capped.sum()))
            else:
                operand.take(mask, count)

    @torch.no_grad()
    def resolve_structures(self) -> None:
        """Make the masks of heads and channels keep or prune them whole."""
        infos = self.sparsified_module_info
        masks = {(i.module, i.parameter_name): i.operand.binary_mask for i in infos}
        resolved, kept = resolve(self._groups, masks)
        for info in infos:
            mask = resolved.get((info.module, info.parameter_name))
            if mask is not None:
                info.operand.binary_mask = mask
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

    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        found: SparsityStatistics = getattr(super().statistics(), self.name)
        own = MovementSparsityStatistics(
            found.model_statistics,
            found.target_sparsity_level,
            self.threshold,
            self._importance_loss.factor,
            dict(self._kept_units),
        )
        return Statistics(**{self.name: own})

    def _own_state(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "factor": self._importance_loss.factor,
            "structures": {name: list(units) for name, units in self._kept_units.items()},
            "importances": scores_state(self.sparsified_module_info),
        }

    def _read_own_state(self, state: Mapping[str, Any]) -> Change:
        check_keys("algorithm_state", state, ("threshold", "factor", "structures", "importances"))
        for key in ("threshold", "factor"):
            number(state, key, "a number")
        units = _read_units(state["structures"])
        importances = read_scores(state["importances"], self.sparsified_module_info)

        @torch.no_grad()
        def take() -> None:
            for weight, saved in zip(self._weights, importances, strict=True):
                weight.scores.copy_(saved)
            self.threshold = state["threshold"]
            self._importance_loss.factor = state["factor"]
            self._kept_units = units

        return take


def _read_units(structures: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return units kept and in all of each group, as a state has them."""
    if not isinstance(structures, Mapping):
        raise ValueError(f"load_state: structures must be a mapping, got {structures!r}")
    found = {}
    for name, units in structures.items():
        match units:
            case [int(kept), int(count)] if 0 <= kept <= count:
                found[name] = kept, count
            case _:
                raise ValueError(
                    f"load_state: structures of {name!r} must be the units kept and in all, "
                    f"got {units!r}"
                )
    return found
