"""Movement sparsity, NNCF's ``movement_sparsity``: what training moves towards zero is pruned.

Each group of a linear layer has an importance S that learns from ``-w dL/dw`` summed over the
training (Sanh et al., https://arxiv.org/abs/2005.07683; in blocks, Lagunas et al.,
https://arxiv.org/abs/2109.04838). Groups are kept where S is above a threshold, which a warm-up
raises; then, in transformers, whole heads and channels are resolved, and the masks are frozen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, StrictBool, model_validator
from torch import nn

from .api import CompressionStage
from .base_algo import BaseSparsityAlgoController, SparseModuleInfo
from .config import AlgorithmConfig, Scopes, listed
from .declaration import Declaration
from .importance import ImportanceLoss, MovementOperand, kth_smallest, structure_groups
from .learned import ScoreWatch, read_scores, scored_operands, scores_state
from .pruning import Scores
from .schedule import Positive, Whole
from .scheduler import CompressionScheduler, _check_keys, _integer
from .statistics import SparsityStatistics, Statistics
from .structures import StructureGroup, resolve

INITIAL_PERCENTAGE = 0.001  # share of the importances below a threshold that is not configured


class SparseStructure(Declaration):
    """What has one importance, in the linear layers that scopes select.

    Args:
        mode: ``"fine"``: each element; ``"block"``: each block of ``sparse_factors``;
            ``"per_dim"``: each row (``axis`` 0) or column (1).
        sparse_factors: rows and columns of a block, which must divide the weight's; any integers.
        axis: the dimension whose indices have an importance each.
        target_scopes: the layers; see ``scope.py`` for what a scope is.

    Raises:
        ValueError: an argument is missing, unknown or out of its range, or does not go with
            ``mode``.
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

    def factors(self, shape: tuple[int, int]) -> tuple[int, int]:
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
        algorithm: its name, fixed.
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

    Raises:
        ValueError: an argument is missing, unknown or out of its range, or two do not go together.
    """

    algorithm: Literal["movement_sparsity"] = "movement_sparsity"
    warmup_start_epoch: Whole
    warmup_end_epoch: Whole
    importance_regularization_factor: Annotated[
        float, Field(strict=True, ge=0, allow_inf_nan=False)
    ]
    sparse_structure_by_scopes: Annotated[
        tuple[SparseStructure, ...], BeforeValidator(listed), Field(strict=True)
    ] = ()
    enable_structured_masking: StrictBool | None = None
    init_importance_threshold: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = (
        None
    )
    final_importance_threshold: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 0.0
    power: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 3.0
    steps_per_epoch: Positive | None = None
    compression_lr_multiplier: (
        Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None
    ) = None

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


class MovementSparsityController(BaseSparsityAlgoController):
    """Controls masks that follow from trained importances.

    The importances are parameters of the sparse modules, ``<weight>_scores``, and so of the model:
    an optimiser made from ``model.parameters()`` after the controller trains them, one made before
    needs ``optimizer.add_param_group({"params": controller.parameters()})``. They are no keys of
    the model's state dict; ``get_state()`` has them. ``loss`` must be added to the task's, and
    ``scheduler.step()`` called at the start of each optimiser step: there masks are updated.
    ``DistributedDataParallel`` needs ``find_unused_parameters=True``, as frozen masks leave the
    importances out of the graph.

    Args:
        target_model: the model, whose target modules are sparse already, by ``MovementOperand``.
        sparsified_module_info: one entry a masked weight or bias.
        config: what to prune, and when.
        batchnorm_data: batches for ``config.batchnorm_adaptation``.
    """

    name = "movement_sparsity"

    def __init__(
        self,
        target_model: nn.Module,
        sparsified_module_info: Sequence[SparseModuleInfo],
        config: MovementSparsityConfig,
        batchnorm_data: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(target_model, sparsified_module_info)
        self.config = config
        self._configure(config, batchnorm_data)
        self._groups: list[StructureGroup] = []
        if config.enable_structured_masking is not False:
            infos = self.sparsified_module_info
            named = {(i.module, i.parameter_name): i.module_node_name for i in infos}
            self._groups = structure_groups(target_model, named, config)[0]
        self._kept_units: dict[str, tuple[int, int]] = {}
        self._operands: list[MovementOperand] = scored_operands(self.sparsified_module_info)  # pyright: ignore[reportAttributeAccessIssue]
        self._watch = ScoreWatch(self._operands)
        layers: dict[int, list[MovementOperand]] = {}
        for info, operand in zip(self.sparsified_module_info, self._operands, strict=True):
            layers.setdefault(id(info.module), []).append(operand)
        self._importance_loss = ImportanceLoss(
            list(layers.values()), self.sparsified_module_info[0].module
        )
        self._loss = self._importance_loss
        self._scheduler = MovementScheduler(self, config)
        self.threshold = -math.inf

    def parameters(self) -> list[nn.Parameter]:
        return [operand.scores for operand in self._operands]

    def scores(self, infos: Sequence[SparseModuleInfo]) -> Scores:
        """Importances above the least of all: ``set_sparsity_level`` prunes the lowest."""
        found = [
            operand.spread(operand.scores.detach())
            for operand in self._operands
            if any(info.operand is operand for info in infos)
        ]
        least = torch.stack([grid.min() for grid in found]).min()
        return Scores([grid - least for grid in found], None)

    def initial_threshold(self) -> float:
        """Return the k-th smallest importance, k = int(n * 0.001) + 1 of the n elements."""
        shares = [math.prod(operand.factors) for operand in self._operands]
        sizes = [operand.weight_shape.numel() for operand in self._operands]
        k = int(sum(sizes) * INITIAL_PERCENTAGE) + 1
        tensors = [operand.scores.detach() for operand in self._operands]
        if len(set(shares)) == 1:
            return float(kth_smallest(tensors, -(-k // shares[0]), self._operands[0].backend))
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
        if self._watch.idle() and not self.frozen and self._model.training:
            warnings.warn(
                f"{self.name}: no optimiser has changed the importances in {ScoreWatch.PATIENCE} "
                "steps; one made before the controller needs "
                "optimizer.add_param_group({'params': controller.parameters()})",
                stacklevel=4,
            )
        if self.frozen or threshold == self.threshold == -math.inf:
            return
        self.threshold = threshold
        kept = [operand.scores > threshold for operand in self._operands]
        counts = torch.stack([mask.count_nonzero() for mask in kept]).tolist()
        for operand, mask, count in zip(self._operands, kept, counts, strict=True):
            if mask.numel() - count > operand.most:
                operand.take(operand.scores > operand.cap(), None)
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
        if self._batchnorm is not None:
            self._adapt_batchnorm()

    def set_sparsity_level(
        self,
        level: float,
        target_sparsified_module_info: SparseModuleInfo | None = None,
        run_batchnorm_adaptation: bool = False,
    ) -> None:
        """Prune exactly ``round(level * groups)`` groups: those of the lowest importance.

        The next ``scheduler.step()`` within the warm-up goes by the threshold again.

        Args, Raises: as ``BaseSparsityAlgoController``'s; and RuntimeError once masks are frozen.
        """
        if self.frozen:
            raise RuntimeError(
                "set_sparsity_level: masks are frozen and their loss is disabled; freeze(False) "
                "goes on"
            )
        super().set_sparsity_level(level, target_sparsified_module_info, run_batchnorm_adaptation)

    def compression_stage(self) -> CompressionStage:
        """UNCOMPRESSED at none pruned, else FULLY once frozen, as after the warm-up."""
        if not any(operand.pruned_groups() for operand in self._operands):
            return CompressionStage.UNCOMPRESSED
        if self.frozen:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED

    def freeze(self, freeze: bool = True) -> None:
        """Keep the masks as they are, and let the loss be 0; or go on."""
        super().freeze(freeze)
        self._take_frozen()

    def _take_frozen(self) -> None:
        self._importance_loss.disabled = self.frozen
        for operand in self._operands:
            operand.freeze(self.frozen)

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

    @torch.no_grad()
    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        keys = {"threshold", "factor", "structures", "importances"}
        if set(state) != keys:
            raise ValueError(
                f"load_state: algorithm_state must have {', '.join(sorted(keys))}, "
                f"got {sorted(state)}"
            )
        for key in ("threshold", "factor"):
            if type(state[key]) not in (int, float) or math.isnan(state[key]):
                raise ValueError(f"load_state: {key} must be a number, got {state[key]!r}")
        units = _read_units(state["structures"])
        importances = read_scores(state["importances"], self.sparsified_module_info)
        for operand, saved in zip(self._operands, importances, strict=True):
            operand.scores.copy_(saved)
        self.threshold = state["threshold"]
        self._importance_loss.factor = state["factor"]
        self._kept_units = units

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        super().load_state(state)
        self._take_frozen()


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


class MovementScheduler(CompressionScheduler):
    """Raises the threshold and the loss's factor through the warm-up, at every step.

    Before it the threshold is -inf and the factor 0; within it both follow ``v0 + (1 - (1 -
    progress)^power) (v1 - v0)``; after it they are final, heads and channels are resolved, the
    masks are frozen, and BatchNorm is adapted to them where that is configured. Steps of an epoch
    that are not configured are counted in the first.

    Args:
        controller: what is driven.
        config: when, and from where to where.
    """

    def __init__(
        self, controller: MovementSparsityController, config: MovementSparsityConfig
    ) -> None:
        super().__init__()
        self._controller = controller
        self._config = config
        self._steps_per_epoch = config.steps_per_epoch
        self._steps_in_current_epoch = 0
        self._start = config.init_importance_threshold

    @property
    def progress(self) -> float:
        """Share of the warm-up that has passed: below 0 before it, from 1 on after it."""
        if self._steps_per_epoch is None:
            return -1.0
        start, end = self._config.warmup_start_epoch, self._config.warmup_end_epoch
        steps = self._current_step - start * self._steps_per_epoch
        return steps / ((end - start) * self._steps_per_epoch)

    @property
    def current_importance_threshold(self) -> float:
        """The threshold at this step; that of the warm-up's start is known once it has begun."""
        progress, start = self.progress, self._start
        if progress < 0:
            return -math.inf
        if progress >= 1 or start is None:
            return self._config.final_importance_threshold
        return start + self._share * (self._config.final_importance_threshold - start)

    @property
    def current_importance_regularization_factor(self) -> float:
        """The loss's factor at this step."""
        return self._share * self._config.importance_regularization_factor

    @property
    def _share(self) -> float:
        return 1 - (1 - min(max(self.progress, 0.0), 1.0)) ** self._config.power

    def step(self, next_step: int | None = None) -> None:
        super().step(next_step)
        self._steps_in_current_epoch += 1
        controller = self._controller
        if self._start is None and 0 <= self.progress < 1:
            self._start = controller.initial_threshold()
            if self._start >= self._config.final_importance_threshold:
                warnings.warn(
                    f"the first thousandth of the importances ends at {self._start:.6g}, which is "
                    "not below final_importance_threshold "
                    f"{self._config.final_importance_threshold:.6g}: the warm-up will prune less "
                    "and less",
                    stacklevel=2,
                )
        controller.update_masks(
            self.current_importance_threshold, self.current_importance_regularization_factor
        )
        if self.progress >= 1 and not controller.frozen:
            controller.finish()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin an epoch; see ``CompressionScheduler``.

        Raises:
            ValueError: the epoch that ends had another number of steps than those before it.
        """
        steps = self._steps_in_current_epoch
        if self._steps_per_epoch is None and steps:
            self._steps_per_epoch = steps
        if steps not in (0, self._steps_per_epoch):
            raise ValueError(
                f"epoch_step: epoch {self._current_epoch} must have steps_per_epoch = "
                f"{self._steps_per_epoch} steps, got {steps}"
            )
        super().epoch_step(next_epoch)
        self._steps_in_current_epoch = 0

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {
            "_init_importance_threshold": self._start,
            "_steps_per_epoch": self._steps_per_epoch,
            "_steps_in_current_epoch": self._steps_in_current_epoch,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        _check_keys(state, self.get_state())
        start, configured = state["_init_importance_threshold"], self._config.steps_per_epoch
        if start is not None and (type(start) not in (int, float) or not math.isfinite(start)):
            raise ValueError(
                "load_state: _init_importance_threshold must be a finite number or None, got "
                f"{start!r}"
            )
        steps = configured
        if state["_steps_per_epoch"] is not None:
            steps = _integer(state, "_steps_per_epoch", least=1)
            if configured not in (None, steps):
                raise ValueError(
                    f"load_state: _steps_per_epoch must be {configured} as configured, got {steps}"
                )
        steps_in_current_epoch = _integer(state, "_steps_in_current_epoch", least=0)
        super().load_state(state)
        self._start, self._steps_per_epoch = start, steps
        self._steps_in_current_epoch = steps_in_current_epoch
