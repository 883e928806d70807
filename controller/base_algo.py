"""The base of every sparsity algorithm: scores become thresholds, thresholds become masks.

An algorithm overrides ``scores``; pools, exact counts, limits, state, stage, statistics and strip
are here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.mask import make_mask, pack, unpack
from ..kernels.pattern import Pattern
from ..kernels.select import Threshold, select
from .allocation import allocate
from .api import CompressionStage, StripFormat
from .batchnorm import adapt_batchnorm
from .compression import PTCompressionAlgorithmController, SparsityController
from .config import BatchNormAdaptation
from .loss import CompressionLoss, ZeroCompressionLoss
from .modules import SparseModule
from .operand import MaskOperand
from .scheduler import CompressionScheduler, SparsityScheduler, StubScheduler
from .state import masks_state, read_masks
from .statistics import SparsityStatistics, Statistics, summarise
from .strip import strip_masks

STATE_VERSION = 1


@dataclass(frozen=True)
class SparseModuleInfo:
    """One masked weight.

    Attributes:
        module_node_name: dotted path of the module; with the parameter's name behind it where that
            is not ``weight``.
        module: the module that owns the weight.
        operand: its mask; ``operand.binary_mask`` is a bool tensor of the weight's shape, True =
            kept.
        parameter_name: the weight's name in ``module``.
        minimum_level, maximum_level: limits of this weight's level inside a pool.
    """

    module_node_name: str
    module: nn.Module
    operand: MaskOperand
    parameter_name: str = "weight"
    minimum_level: float = 0.0
    maximum_level: float = 1.0

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter_name)


class Scores(NamedTuple):
    """Importance of the groups of several weights.

    Attributes:
        tensors: one matrix a weight, of a block pattern's grid, or of the weight itself where
            every element is a group: its magnitude is the score, and no copy is made.
        scales: float32 factor of each tensor, or None.
    """

    tensors: list[Tensor]
    scales: Tensor | None


class _Pruning(NamedTuple):
    """A threshold found and not yet applied."""

    infos: list[SparseModuleInfo]
    scores: Scores
    threshold: Threshold
    pruned: int


class BaseSparsityAlgoController(PTCompressionAlgorithmController[Any], SparsityController):
    """Base of the sparsity algorithms' controllers.

    Args:
        target_model: the model, whose target modules are sparse already.
        sparsified_module_info: one entry a masked weight.
    """

    def __init__(
        self, target_model: nn.Module, sparsified_module_info: Sequence[SparseModuleInfo]
    ) -> None:
        super().__init__(target_model)
        self.sparsified_module_info = list(sparsified_module_info)
        self.frozen = False
        device = self.sparsified_module_info[0].weight.device
        self._loss: CompressionLoss = ZeroCompressionLoss(device)
        self._scheduler: CompressionScheduler = CompressionScheduler()
        self._target_level: float | None = None
        self._thresholds: dict[str, Tensor] = {}
        self._batchnorm: BatchNormAdaptation | None = None
        self._batchnorm_data: Iterable[Any] | None = None

    @abstractmethod
    def scores(self, infos: Sequence[SparseModuleInfo]) -> Scores:
        """Score every group of the weights given. All of them share one pattern."""

    @property
    def current_sparsity_level(self) -> float:
        if isinstance(self._scheduler, SparsityScheduler):
            return self._scheduler.current_sparsity_level
        return self.measured_sparsity_level()

    def measured_sparsity_level(self) -> float:
        """Return pruned groups over all groups of the target weights. Waits for the device."""
        infos = self.sparsified_module_info
        pruned = sum(info.operand.pruned_groups() for info in infos)
        return pruned / sum(info.operand.groups for info in infos)

    @property
    def loss(self) -> CompressionLoss:
        return self._loss

    @property
    def scheduler(self) -> CompressionScheduler:
        return self._scheduler

    def disable_scheduler(self) -> None:
        self._scheduler = StubScheduler()

    def freeze(self, freeze: bool = True) -> None:
        self.frozen = freeze

    @torch.no_grad()
    def set_sparsity_level(
        self,
        level: float,
        target_sparsified_module_info: SparseModuleInfo | None = None,
        run_batchnorm_adaptation: bool = False,
    ) -> None:
        """Prune exactly ``round(level * groups)`` groups: those of the lowest scores.

        Frozen masks stay as they are. Whatever is refused leaves every mask as it was.

        Args:
            level: fraction of groups to prune, in [0, 1).
            target_sparsified_module_info: prune this weight only; None: every target weight. All
                weights of one pattern form one pool, within each weight's limits.
            run_batchnorm_adaptation: re-estimate BatchNorm statistics afterwards.

        Raises:
            ValueError: the level is outside [0, 1) or beyond what the limits allow; a weight holds
                NaN or Inf; the entry is another controller's; there is no BatchNorm adaptation
                configured.
            RuntimeError: the model has been stripped.
        """
        if not (isinstance(level, (int, float)) and 0 <= level < 1):
            raise ValueError(f"set_sparsity_level: level must be in [0, 1), got {level!r}")
        if run_batchnorm_adaptation and self._batchnorm is None:
            raise ValueError(
                "set_sparsity_level: run_batchnorm_adaptation needs batchnorm_adaptation in the "
                "configuration"
            )
        infos = self._resolve(target_sparsified_module_info)
        if self.frozen:
            return
        prunings = [
            p
            for pool in _pools(infos)
            for p in self._prune(pool, float(level), limits=len(infos) > 1)
        ]
        for pruning in prunings:
            self._apply(pruning)
        if run_batchnorm_adaptation:
            self._adapt_batchnorm()

    def _resolve(self, target: SparseModuleInfo | None) -> list[SparseModuleInfo]:
        if not isinstance(self.sparsified_module_info[0].module, SparseModule):
            raise RuntimeError(
                "set_sparsity_level: the model has been stripped; create a new controller for it"
            )
        if target is None:
            return self.sparsified_module_info
        if not any(info is target for info in self.sparsified_module_info):
            raise ValueError(
                "set_sparsity_level: target_sparsified_module_info must be an entry of this "
                f"controller's sparsified_module_info, got {target!r}"
            )
        return [target]

    def _prune(
        self, infos: list[SparseModuleInfo], level: float, *, limits: bool
    ) -> list[_Pruning]:
        """Find the thresholds of one pool; several where limits hold some weights apart."""
        groups = [info.operand.groups for info in infos]
        total = round(level * sum(groups))
        if not limits or all(i.minimum_level <= 0 and i.maximum_level >= 1 for i in infos):
            return [self._threshold(infos, total)]
        # a schedule passes levels below a weight's minimum on its way up
        minimum = [
            round(min(i.minimum_level, level) * n) for i, n in zip(infos, groups, strict=True)
        ]
        maximum = [round(i.maximum_level * n) for i, n in zip(infos, groups, strict=True)]
        minimum = [min(low, high) for low, high in zip(minimum, maximum, strict=True)]
        if not sum(minimum) <= total <= sum(maximum):
            raise ValueError(
                f"set_sparsity_level: level {level} cannot be reached within the limits of "
                f"overrides: {total} of {sum(groups)} groups to prune, between {sum(minimum)} "
                f"and {sum(maximum)} allowed"
            )

        def natural(members: list[int], k: int) -> list[int]:
            pruning = self._threshold([infos[i] for i in members], k)
            masks = _masks_of(pruning)
            return [
                infos[i].operand.groups - _kept(mask, infos[i].operand)
                for i, mask in zip(members, masks, strict=True)
            ]

        fixed, free, left = allocate(total, minimum, maximum, natural)
        prunings = [self._threshold([infos[i]], count) for i, count in fixed.items()]
        if free:
            prunings.append(self._threshold([infos[i] for i in free], left))
        return prunings

    def _threshold(self, infos: list[SparseModuleInfo], pruned: int) -> _Pruning:
        scores = self.scores(infos)
        threshold = select(
            scores.tensors, pruned, scales=scores.scales, backend=infos[0].operand.backend
        )
        # the one wait for the device: masks must not change before every score is known to be
        # finite
        if threshold.nonfinite:
            for info, tensor in zip(infos, scores.tensors, strict=True):
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"set_sparsity_level: the weight of {info.module_node_name!r} holds NaN "
                        "or Inf; masks are left as they were"
                    )
        return _Pruning(infos, scores, threshold, pruned)

    def _apply(self, pruning: _Pruning) -> None:
        masks = _masks_of(pruning, out=[info.operand.mask for info in pruning.infos])
        kept: list[int] | list[None] = [None] * len(masks)
        if any(info.operand.topology is not None for info in pruning.infos):
            # of all weights at once: each count by itself would be a wait for the device
            kept = torch.stack([mask.count_nonzero() for mask in masks]).tolist()
        for info, count in zip(pruning.infos, kept, strict=True):
            info.operand.set_(None, all_kept=pruning.pruned == 0, kept=count)
            self._thresholds[info.module_node_name] = pruning.threshold.value

    def _adapt_batchnorm(self) -> None:
        assert self._batchnorm is not None
        assert self._batchnorm_data is not None
        adapt_batchnorm(
            self._model, self._batchnorm_data, self._batchnorm.num_bn_adaptation_samples
        )

    def compression_stage(self) -> CompressionStage:
        """FULLY once the masks reach the target to within a group, UNCOMPRESSED at none pruned."""
        infos = self.sparsified_module_info
        pruned = sum(info.operand.pruned_groups() for info in infos)
        wanted = 0
        if self._target_level is not None:
            pools = [sum(info.operand.groups for info in pool) for pool in _pools(infos)]
            wanted = sum(round(self._target_level * groups) for groups in pools) - 1
        if pruned == 0 and wanted > 0:
            return CompressionStage.UNCOMPRESSED
        if pruned >= wanted:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED

    @property
    def compression_rate(self) -> float:
        return self.measured_sparsity_level()

    @compression_rate.setter
    def compression_rate(self, compression_rate: float) -> None:
        frozen = self.frozen
        self.frozen = False
        try:
            self.set_sparsity_level(compression_rate)
            frozen = True
        finally:
            self.frozen = frozen

    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        """Return the statistics under the algorithm's name; ``to_str()`` draws the tables.

        Args:
            quickly_collected_only: there is nothing slow to leave out.
        """
        scheduler = self._scheduler
        level = (
            scheduler.current_sparsity_level if isinstance(scheduler, SparsityScheduler) else None
        )
        model = summarise(self._model, self.sparsified_module_info, self._thresholds)
        return Statistics(**{self.name: SparsityStatistics(model, level)})

    def builder_state(self) -> dict[str, Any]:
        return {}

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return the whole state under the algorithm's name; masks are packed, on the CPU."""
        state = {
            "version": STATE_VERSION,
            "loss_state": self._loss.get_state(),
            "scheduler_state": self._scheduler.get_state(),
            "compression_stage": int(self.compression_stage()),
            "frozen": self.frozen,
            "weights": masks_state(self.sparsified_module_info),
        }
        return {self.name: state}

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from ``get_state()``'s result, bit for bit.

        Raises:
            ValueError: the state is of another algorithm, version, model or pattern, or damaged;
                nothing has changed then.
        """
        if set(state) != {self.name}:
            raise ValueError(
                f"load_state: state must be of {self.name!r}, got one of {sorted(state)}"
            )
        own = state[self.name]
        if own.get("version") != STATE_VERSION:
            raise ValueError(
                f"load_state: version must be {STATE_VERSION}, got {own.get('version')!r}"
            )
        missing = {"loss_state", "scheduler_state", "frozen", "weights"} - set(own)
        if missing:
            raise ValueError(f"load_state: state lacks {sorted(missing)}")
        grids = read_masks(own["weights"], self.sparsified_module_info)
        self._scheduler.load_state(own["scheduler_state"])
        self._loss.load_state(own["loss_state"])
        self.frozen = bool(own["frozen"])
        for info, grid in zip(self.sparsified_module_info, grids, strict=True):
            operand = info.operand
            operand.set_(pack(grid) if operand.packed else grid, all_kept=bool(grid.all()))

    def strip_model(
        self,
        model: nn.Module,
        do_copy: bool = False,
        strip_format: StripFormat = StripFormat.NATIVE,
    ) -> nn.Module:
        """Fold the masks into the weights.

        Args:
            model: the controlled model or a copy of it.
            do_copy: leave ``model`` as it is and strip a deep copy.
            strip_format: a mask has one folded form, plain weights with zeros, so that all formats
                agree.

        Returns:
            The model with its original classes, pruned weights exactly zero, no mask and no
            further key; its outputs equal the masked model's.

        Raises:
            ValueError: ``strip_format`` is no ``StripFormat``; ``model`` holds no mask.
        """
        return strip_masks(model, do_copy, StripFormat(strip_format))


def _pools(infos: Sequence[SparseModuleInfo]) -> list[list[SparseModuleInfo]]:
    """Part the weights by pattern: in a mixed pool an element would count as much as a block."""
    pools: dict[Pattern, list[SparseModuleInfo]] = {}
    for info in infos:
        pools.setdefault(info.operand.pattern, []).append(info)
    return list(pools.values())


def _masks_of(pruning: _Pruning, out: list[Tensor] | None = None) -> list[Tensor]:
    operand = pruning.infos[0].operand
    return make_mask(
        pruning.scores.tensors,
        pruning.threshold,
        scales=pruning.scores.scales,
        packed=operand.packed,
        out=out,
        backend=operand.backend,
    )


def _kept(mask: Tensor, operand: MaskOperand) -> int:
    return int((unpack(mask, operand.shape[1]) if operand.packed else mask).sum())
