"""The base of every sparsity algorithm.

An algorithm that prunes the lowest scores overrides ``scores`` and no more: pools, exact counts
and limits are in ``pruning.py``; schedule, state, stage, statistics and strip are here. An
algorithm whose masks come about in another way overrides ``_set_level``; one with a state beyond
its masks ``_own_state`` and ``_load_own_state``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..kernels.mask import pack
from ..kernels.pattern import NM, Pattern, maximum_level
from .api import CompressionStage, StripFormat
from .batchnorm import adapt_batchnorm
from .compression import PTCompressionAlgorithmController, SparsityController
from .config import AlgorithmConfig, BatchNormAdaptation
from .loss import CompressionLoss, ZeroCompressionLoss
from .modules import SparseModule
from .operand import MaskOperand
from .pruning import Scores, apply_pruning, check_reachable, find_prunings, pools
from .saliency import Saliency
from .schedule import Schedule
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
        self._config: AlgorithmConfig | None = None
        self._saliency: Saliency | None = None
        self._optimizer: Optimizer | None = None
        self._batchnorm: BatchNormAdaptation | None = None
        self._batchnorm_data: Iterable[Any] | None = None

    def scores(self, infos: Sequence[SparseModuleInfo]) -> Scores:
        """Score every group of the weights given. All of them share one pattern."""
        raise NotImplementedError(f"{type(self).__name__} must override scores()")

    def _configure(
        self, config: AlgorithmConfig, batchnorm_data: Iterable[Any] | None = None
    ) -> None:
        """Take over what every algorithm's configuration has."""
        self._config = config
        self._batchnorm = config.batchnorm_adaptation
        self._batchnorm_data = batchnorm_data

    def _follow(self, schedule: Schedule | None, initial_level: float) -> None:
        """Take up a schedule, if there is one, and set the initial level."""
        if schedule is None:
            self._scheduler = StubScheduler()
        else:
            self._scheduler = SparsityScheduler(self, schedule)
            self._target_level = self._scheduler.target_level
            check_reachable("schedule: target_level", self._target_level, self._patterns)
        self.set_sparsity_level(initial_level)
        if initial_level > 0 and self._batchnorm is not None:
            self._adapt_batchnorm()

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

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimiser of the weights, which algorithms that grow groups back must be told."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer | None) -> None:
        self._use_optimizer(optimizer)

    def _use_optimizer(self, optimizer: Optimizer | None) -> None:
        self._optimizer = optimizer

    def freeze(self, freeze: bool = True) -> None:
        self.frozen = freeze

    def calibration(self) -> AbstractContextManager[None]:
        """Measure the inputs of the target modules while the context is open.

        ``with controller.calibration(): model(x)``, over some batches, is what the importance
        ``"wanda"`` needs. Each context starts anew; it may be opened again as training goes on.

        Raises:
            ValueError: the importance is another; a module's inputs cannot be measured.
        """
        if self._saliency is None:
            raise ValueError(f"calibration: {self.name} has no importance that needs one")
        return self._saliency.calibration()

    @property
    def needs_calibration(self) -> bool:
        """True if the importance looks at the inputs."""
        return self._saliency is not None and self._saliency.importance == "wanda"

    def begin_step(self) -> None:
        """Look at what the step that has ended left; the scheduler calls it at each ``step()``."""
        if self._saliency is not None and not self.frozen:
            self._saliency.observe()

    @torch.no_grad()
    def set_sparsity_level(
        self,
        level: float,
        target_sparsified_module_info: SparseModuleInfo | None = None,
        run_batchnorm_adaptation: bool = False,
    ) -> None:
        """Prune exactly ``round(level * groups)`` groups: those of the lowest scores.

        Frozen masks stay as they are. Whatever is refused leaves every mask as it was.

        N:M can express levels up to 1 - n/m, which count elements. At level s of a pool of N:M
        weights exactly ``round(s / (1 - n/m) * tuples)`` tuples are pruned to n of m: those that
        lose the least, by the sum of what they lose. Beside weights that can go further an N:M
        weight stays at 1 - n/m.

        Args:
            level: fraction of groups to prune, in [0, 1).
            target_sparsified_module_info: prune this weight only; None: every target weight. All
                weights of one pattern form one pool, within each weight's limits.
            run_batchnorm_adaptation: re-estimate BatchNorm statistics afterwards.

        Raises:
            ValueError: the level is outside [0, 1) or beyond what limits and patterns allow; a
                weight holds NaN or Inf; the entry is another controller's; there is no BatchNorm
                adaptation configured.
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
        check_reachable(
            "set_sparsity_level: level", level, [info.operand.pattern for info in infos]
        )
        if self.frozen:
            return
        self._set_level(infos, float(level))
        if run_batchnorm_adaptation:
            self._adapt_batchnorm()

    def _set_level(self, infos: list[SparseModuleInfo], level: float) -> None:
        """Prune the groups of lowest score; what is refused leaves every mask as it was."""
        prunings = [
            pruning
            for pool in pools(infos)
            for pruning in find_prunings(pool, level, self.scores, limits=len(infos) > 1)
        ]
        for pruning in prunings:
            apply_pruning(pruning)
            for info in pruning.infos:
                if pruning.threshold is None:
                    self._thresholds.pop(info.module_node_name, None)
                else:
                    self._thresholds[info.module_node_name] = pruning.threshold.value

    @property
    def _patterns(self) -> list[Pattern]:
        return [info.operand.pattern for info in self.sparsified_module_info]

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

    def _adapt_batchnorm(self) -> None:
        assert self._batchnorm is not None
        assert self._batchnorm_data is not None
        adapt_batchnorm(
            self._model, self._batchnorm_data, self._batchnorm.num_bn_adaptation_samples
        )

    def compression_stage(self) -> CompressionStage:
        """FULLY once the masks reach the target to within a group, UNCOMPRESSED at none pruned.

        Without a target any masks are where they shall be, once something is pruned.
        """
        infos = self.sparsified_module_info
        pruned = sum(info.operand.pruned_groups() for info in infos)
        wanted = 0
        if self._target_level is not None:
            for pool in pools(infos):
                target = min(self._target_level, maximum_level(pool[0].operand.pattern))
                wanted += round(target * sum(info.operand.groups for info in pool))
            wanted -= max(p.dropped if isinstance(p, NM) else 1 for p in self._patterns)
        if pruned == 0 and (wanted > 0 or self._target_level is None):
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
        return {} if self._config is None else self._config.model_dump(mode="json")

    def _own_state(self) -> dict[str, Any]:
        """Return what the algorithm has beyond masks, schedule and loss: values and tensors."""
        return {} if self._saliency is None else self._saliency.get_state()

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over ``_own_state``'s result; what is refused must change nothing."""
        if self._saliency is not None:
            self._saliency.load_state(state)
        elif state:
            raise ValueError(
                f"load_state: {self.name} has no state of its own, got {', '.join(state)}"
            )

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return the whole state under the algorithm's name; masks are packed, on the CPU."""
        state = {
            "version": STATE_VERSION,
            "loss_state": self._loss.get_state(),
            "scheduler_state": self._scheduler.get_state(),
            "compression_stage": int(self.compression_stage()),
            "frozen": self.frozen,
            "algorithm_state": self._own_state(),
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
        before = self._scheduler.get_state(), self._loss.get_state()
        try:
            self._scheduler.load_state(own["scheduler_state"])
            self._loss.load_state(own["loss_state"])
            self._load_own_state(own.get("algorithm_state", {}))
        except BaseException:
            self._scheduler.load_state(before[0])
            self._loss.load_state(before[1])
            raise
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
            strip_format: a mask has one folded form, plain weights with zeros, so that NNCF's
                formats agree. ``SEMI_STRUCTURED`` also turns the weights of linear modules under
                2:4, in half precision on a GPU of compute capability 8.0 or later, into PyTorch's
                semi-structured tensors, for inference.

        Returns:
            The model with its original classes, pruned weights exactly zero, no mask and no
            further key; its outputs equal the masked model's.

        Raises:
            ValueError: ``strip_format`` is no ``StripFormat``; ``model`` holds no mask; a weight
                under 2:4 cannot be packed, or there is none. Nothing has changed then.
        """
        strip_format = StripFormat(strip_format)
        self._before_strip(do_copy)
        return strip_masks(model, do_copy, strip_format)

    def _before_strip(self, do_copy: bool) -> None:
        """Bring masks up to date before they are folded, or let go of a model that is stripped."""
