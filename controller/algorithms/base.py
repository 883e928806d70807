"""The base of every sparsity algorithm: the interface of NNCF's controllers.

An algorithm that prunes the lowest scores overrides ``group_scores`` and no more: pools, exact
counts and limits are in ``selection/thresholds.py``; schedule, state, stage, statistics and strip
are here. An algorithm whose masks come about in another way overrides ``_find_masks``; one with a
state beyond its masks ``_own_state``, ``_own_schema`` and ``_take_own``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...kernels.group_mask import read_counts, set_masks
from ...kernels.pattern import Pattern
from ..api import CompressionStage, StripFormat
from ..config.algorithm import AlgorithmConfig, Pool
from ..config.declaration import number
from ..config.schedule import Schedule
from ..masks.exchange import agree_counts
from ..masks.export import export_onnx
from ..masks.guard import Guard
from ..masks.linear import list_blocks_of_shards, skip_blocks
from ..masks.names import canonical
from ..masks.optimizers import unwrapped
from ..masks.schema import FLAG, MAPPING, Schema, check, exactly, integer
from ..masks.shards import reshard
from ..masks.state import masks_schema, masks_state, read_masks, with_names_of
from ..masks.statistics import SparsifiedModelStatistics, SparsityStatistics, Statistics, summarise
from ..masks.strip import strip_masks
from ..masks.targets import Whereabouts, find_targets
from ..masks.weight import (
    SparseModuleInfo,
    SparseWeight,
    Target,
    check_at_rest,
    dense_weights,
)
from ..selection.allocation import Distribution
from ..selection.scorer import Scorer
from ..selection.thresholds import Scores, check_limits, check_reachable, find_masks, planned
from .batchnorm import adapt_batchnorm
from .loss import CompressionLoss, ZeroCompressionLoss
from .scheduler import CompressionScheduler, SparsityScheduler, StubScheduler, make_scheduler

STATE_VERSION = 2
NEARLY_ALL = 0.99  # a weight pruned beyond this is named, unless the whole pool is

# what has been found and is yet to be done
Change = Callable[[], None]


class BaseSparsityAlgoController:
    """Base of the sparsity algorithms' controllers. ``_set_up`` is a subclass's own part of it.

    Args:
        target_model: the model. Its linears that have blocks to skip change their class.
        sparsified_module_info: one entry a masked weight.
        config: the algorithm's configuration: what to prune, and when.
        batchnorm_data: batches for ``config.batchnorm_adaptation``.
    """

    name: ClassVar[str]
    # whether masks follow from scores that are trained
    learns: ClassVar[bool] = False
    # whether ranks average something as an optimiser steps
    _averages: ClassVar[bool] = False
    config: Any  # of the algorithm's own class

    def __init__(
        self,
        target_model: nn.Module,
        sparsified_module_info: Sequence[SparseModuleInfo],
        config: AlgorithmConfig | None = None,
        batchnorm_data: Iterable[Any] | None = None,
    ) -> None:
        self._model = target_model
        self.sparsified_module_info = list(sparsified_module_info)
        self.frozen = False
        self._weights: list[Any] = [info.operand for info in self.sparsified_module_info]
        self._guards = self._guarded(target_model)
        self._device = self.sparsified_module_info[0].weight.device
        self._loss: CompressionLoss = ZeroCompressionLoss(self._device)
        self.ranks = self._weights[0].ranks
        self._scheduler: CompressionScheduler = CompressionScheduler(self._guard.begin_step)
        self._target_level: float | None = None
        self._pool: Pool = "global"
        self._shifts = False  # levels differ over weights
        self._keeps_values = False
        self._thresholds: dict[str, Tensor | None] = {}
        self._scorer: Scorer | None = None
        self._optimizer: Optimizer | None = None
        self._nearly_empty: set[str] = set()
        self.config = config
        self._batchnorm = None if config is None else config.batchnorm_adaptation
        self._batchnorm_data = batchnorm_data
        self._set_up()
        if self._scorer is not None and (self._scorer.needs_gradients or self._averages):
            self._guard.before_step = _told_by(weakref.ref(self))

    def _set_up(self) -> None:
        """Take up the configuration."""

    def _follow_schedule(self, schedule: Schedule) -> None:
        """Let a schedule set the level, from its initial one on. Refuses what is out of reach."""
        self._scheduler = make_scheduler(self, schedule)
        self._target_level = schedule.target_level
        check_reachable("schedule: target_level", self._target_level, self._patterns)
        check_limits(self._weights, self._target_level)
        self.set_sparsity_level(schedule.initial_level)

    @classmethod
    def find_targets(
        cls, model: nn.Module, config: AlgorithmConfig, elsewhere: Whereabouts | None = None
    ) -> list[Target]:
        """List the weights of ``model`` that a configuration of this algorithm selects; arguments
        as ``find_targets``'s.
        """
        return find_targets(model, config, elsewhere)

    @classmethod
    def make_weights(
        cls, model: nn.Module, targets: Sequence[Target], config: Any, **options: Any
    ) -> list[SparseWeight]:
        """Give each of ``find_targets``'s a mask that keeps everything, of the kind that the
        algorithm needs; ``options`` are ``SparseWeight``'s.
        """
        return [SparseWeight(target, **options) for target in targets]

    def _guarded(self, model: nn.Module) -> list[Guard]:
        here = [weight for weight in self._weights if not weight.absent]
        for weight in here:
            for module, name in weight.target.users:
                skip_blocks(weight, module, name)
        return [Guard(model, here)]

    @property
    def _guard(self) -> Guard:
        return self._guards[0]

    def group_scores(self, weights: Sequence[SparseWeight]) -> Scores:
        """Score every group of the weights given. All of them share one pattern."""
        raise NotImplementedError(f"{type(self).__name__} must override group_scores()")

    def _distribution(self, weights: Sequence[SparseWeight]) -> Distribution | None:
        """Say how levels differ over weights of one pattern; None: they do not."""
        return None

    def _keep_values(self, keep: bool) -> None:
        """Keep pruned values, so that groups may return with them, until the masks are frozen."""
        self._keeps_values = keep
        for weight in self._weights:
            weight.keeps_values = keep and not self.frozen

    @property
    def model(self) -> nn.Module:
        """The model that was passed in."""
        return self._model

    @property
    def loss(self) -> CompressionLoss:
        """The term to add to the task's loss: ``loss = task_loss + controller.loss()``."""
        return self._loss

    @property
    def scheduler(self) -> CompressionScheduler:
        """To be stepped at the start of each optimiser step and of each epoch."""
        return self._scheduler

    def disable_scheduler(self) -> None:
        """Replace the scheduler by one that changes nothing. Masks stay as they are."""
        self._scheduler = StubScheduler(self._guard.begin_step)

    def parameters(self) -> list[nn.Parameter]:
        """List what the algorithm trains of its own; an optimiser must be given it. They are
        parameters of the model too: an optimiser made from these after the controller has them.
        """
        return []

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimiser of the weights. It need not be told: every one is seen at its steps. Told
        before its first, one that was at work before the controller forgets what it remembers of
        pruned elements at each update, not at the step after it. One that Accelerate has prepared
        is as good as its own.
        """
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer | None) -> None:
        self._optimizer = optimizer
        if isinstance(optimizer, Optimizer):
            for guard in self._guards:
                guard.know(unwrapped(optimizer))

    @property
    def current_sparsity_level(self) -> float:
        """The scheduled level where there is a schedule, else the level that the masks have."""
        if isinstance(self._scheduler, SparsityScheduler):
            return self._scheduler.current_sparsity_level
        return self.mask_level()

    def mask_level(self) -> float:
        """Return pruned groups over all groups of the target weights. Waits for the device."""
        pruned = sum(weight.pruned_groups() for weight in self._weights)
        return pruned / sum(weight.groups for weight in self._weights)

    def freeze(self, freeze: bool = True) -> None:
        """Stop updating the masks, or go on. Frozen, pruned values are let go."""
        self.frozen = freeze
        self._keep_values(self._keeps_values)
        if self._guard.began:
            self._guard.begin_training()

    def calibration(self, *, attention_mask: str | None = None) -> AbstractContextManager[None]:
        """Measure the inputs of the target modules while the context is open.

        ``with controller.calibration(): model(x)``, over some batches, is what the importance
        ``"wanda"`` needs. Each context starts anew; it may be opened again as training goes on.

        Args:
            attention_mask: name of the keyword by which the controlled model is given a matrix
                (batch, tokens) that is 0 where there is no token: ``"attention_mask"`` of Hugging
                Face's. Padding is left out then.

        Raises:
            ValueError: the importance is another; a module's inputs cannot be measured; as it
                closes, no input was seen; as the model runs, it was not given such a matrix.
        """
        if self._scorer is None:
            raise ValueError(f"calibration: {self.name} has no importance that needs one")
        return self._scorer.calibration(self._model, attention_mask)

    @property
    def needs_calibration(self) -> bool:
        """True if the importance looks at the inputs."""
        return self._scorer is not None and self._scorer.needs_inputs

    @property
    def needs_gradients(self) -> bool:
        """True if the importance looks at the gradients of the last backward pass."""
        return self._scorer is not None and self._scorer.needs_gradients

    def before_optimizer_step(
        self, weights: Sequence[SparseWeight], overflowed: Tensor | None
    ) -> None:
        """Look at the gradients by which an optimiser is about to step weights; the guard calls
        it, with what a gradient scaler has told the optimiser.
        """
        if self._scorer is not None and self._scorer.needs_gradients and not self.frozen:
            self._scorer.before_step(weights, overflowed)

    def begin_step(self) -> None:
        """Look at what the step that has ended left; called at each ``scheduler.step()``."""
        self._guard.begin_step()
        if self._scorer is not None:
            self._scorer.observe(frozen=self.frozen)

    def have_begun(self) -> None:
        """Look at the masks of a step, which ``scheduler.step()`` has brought about."""

    def check_epoch(self) -> None:
        """Look at the epoch that ends; the scheduler calls it at each ``epoch_step()``."""

    def follow(self, level: float, *, last: bool) -> None:
        """Take up a scheduled level; freeze the masks then, if it is the last."""
        self.set_sparsity_level(level)
        if last:
            self.freeze()

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
            target_sparsified_module_info: prune this weight only; None: every target weight, in
                the configured pools, within each weight's limits.
            run_batchnorm_adaptation: re-estimate BatchNorm statistics afterwards.

        Warns:
            UserWarning: a weight is pruned to nothing, or nearly, where others are spared;
                somebody else had written pruned elements.

        Raises:
            ValueError: the level is outside [0, 1) or beyond what limits and patterns allow; a
                weight holds NaN or Inf; the entry is another controller's; there is no BatchNorm
                adaptation configured.
            RuntimeError: the model has been stripped; masks are learned and frozen.
        """
        with self.ranks.together(self._device, "set_sparsity_level") as alike:
            level, target = number(level), target_sparsified_module_info
            weights = self._check_level(level, target, run_batchnorm_adaptation)
            alike |= self._told_of_level(level, target)
        if self.frozen:
            return
        with self._changing(weights):
            self._find_masks(weights, float(level))()
        self._warn_about_empty(weights, level)
        if run_batchnorm_adaptation:
            self._adapt_batchnorm()

    def _check_level(
        self, level: float, target: SparseModuleInfo | None, run_batchnorm_adaptation: bool
    ) -> list[Any]:
        if type(level) not in (int, float) or not 0 <= level < 1:
            raise ValueError(f"set_sparsity_level: level must be in [0, 1), got {level!r}")
        if run_batchnorm_adaptation and self._batchnorm is None:
            raise ValueError(
                "set_sparsity_level: run_batchnorm_adaptation needs batchnorm_adaptation in the "
                "configuration"
            )
        weights = self._resolve(target)
        if self.learns and self.frozen:
            raise RuntimeError(
                "set_sparsity_level: masks are frozen and their loss is disabled; freeze(False) "
                "goes on"
            )
        check_reachable("set_sparsity_level: level", level, [i.pattern for i in weights])
        return weights

    def _told_of_level(self, level: float, target: SparseModuleInfo | None) -> dict[str, Any]:
        """Return what must be the same on every rank where masks change."""
        weight = None if target is None else canonical(target.module_node_name)
        return {
            "level": float(level),
            "target_sparsified_module_info": weight,
            "frozen": self.frozen,
        }

    @contextmanager
    def _changing(self, weights: Sequence[SparseWeight]) -> Iterator[None]:
        """Let weights be dense while their masks change; then zero where the new ones prune."""
        reshard(self._model)
        for weight in weights:  # it may have been sharded since, and gathered until now
            weight.follow()
        check_at_rest([weight for weight in weights if weight.holds_zeros])
        # before training all that is pruned is kept: a state loaded then has other masks
        with dense_weights(weights, keep=None if self._guard.began else True):
            yield
        if not self._guard.began:
            whole = [w for w in weights if w.shard is None and w.values is not None]
            self.ranks.take_first([w.values for w in whole])
        list_blocks_of_shards(self._model, weights)
        self._guard.masks_changed()

    def _agreed(
        self, weights: Sequence[SparseWeight], masks: list[Tensor], counts: list[list[int]]
    ) -> tuple[list[SparseWeight], list[Tensor], list[list[int]]]:
        """Return ``set_masks``'s arguments as all ranks have them: until training begins those of
        the first; from then on the ranks' own, which must not differ, nor those of before.
        """
        weights = [*weights]
        if self.ranks.size == 1 or not weights:
            return weights, masks, counts
        if self._guard.began:
            self._check_masks("set_sparsity_level", weights, [w.mask for w in weights], masks)
            return weights, masks, counts
        # that which keeps all may be the weight's own
        masks = [m.clone() if w.shard is None else m for w, m in zip(weights, masks, strict=True)]
        whole = [i for i, weight in enumerate(weights) if weight.shard is None]
        if whole:
            own = [masks[i] for i in whole]
            self.ranks.take_first(own)
            found = read_counts([weights[i] for i in whole], own, [])[0]
            counts = [*counts]
            for i, count in zip(whole, found, strict=True):
                counts[i] = count
        return weights, masks, counts

    def _check_masks(
        self, what: str, weights: Sequence[SparseWeight], *masks: Sequence[Tensor]
    ) -> None:
        """Raise on every rank where masks differ between ranks that have the same part."""
        found = [(w, m) for own in masks for w, m in zip(weights, own, strict=True)]
        whole = [(weight.name, mask) for weight, mask in found if weight.shard is None]
        self.ranks.check_same(what, [name for name, _ in whole], [mask for _, mask in whole])
        parted = [(w, m) for w, m in found if w.shard is not None and w.shard.copies > 1]
        if not parted:
            return
        self.ranks.check_copies(
            what,
            [weight.name for weight, _ in parted],
            [mask for _, mask in parted],
            [shard.copies for weight, _ in parted if (shard := weight.shard)],
            [shard.counted for weight, _ in parted if (shard := weight.shard)],
        )

    def _check_ranks(self, what: str) -> None:
        """Raise on every rank where masks, or the scores that they are learned from, differ."""
        reshard(self._model)  # an evaluation may have left weights gathered, whose scores are not
        own = [w.mask if w.scores is None else w.part() for w in self._weights]
        self._check_masks(what, self._weights, own)

    def _find_masks(self, weights: list[Any], level: float) -> Change:
        """Find a level's masks, or refuse; return what writes them."""
        with self.ranks.together(self._device):
            found = find_masks(
                weights,
                level,
                self.group_scores,
                pool=self._pool,
                distribution=self._distribution,
                limited=len(weights) > 1,  # a weight that is set by itself is asked for outright
            )
        masks = self._agreed(found.weights, found.masks, found.counts)

        def write() -> None:
            set_masks(*masks)
            self._thresholds |= found.thresholds

        return write

    def _warn_about_empty(self, weights: Sequence[SparseWeight], level: float) -> None:
        found = []
        for weight in weights:
            name, kept, groups = weight.name, weight.kept, weight.groups
            if kept == 0 or (1 - kept / groups > NEARLY_ALL and level <= NEARLY_ALL):
                if weight.all_kept or len(weight.weight_shape) == 1:
                    continue
                if name not in self._nearly_empty:
                    found.append(f"{name} ({kept} of {groups} groups kept)")
                self._nearly_empty.add(name)
        if found and len(weights) > 1:
            warnings.warn(
                f"at level {level:g} these weights are pruned to nothing, or nearly: "
                f"{', '.join(found)}; pool='weight' prunes each weight alike, an override's "
                "maximum_level or ignored_scopes spares them",
                stacklevel=4,
            )

    @property
    def _patterns(self) -> list[Pattern]:
        return [weight.pattern for weight in self._weights]

    def _resolve(self, target: SparseModuleInfo | None) -> list[Any]:
        if any(guard.released for guard in self._guards):
            raise RuntimeError(
                "set_sparsity_level: the model has been stripped; create a new controller for it"
            )
        inside = _modules_of(self._model)
        gone = [
            weight.name
            for weight in self._weights
            if not weight.absent
            and id(weight.module) not in inside
            and not any(id(module) in inside for module, _ in weight.target.users)
        ]
        if gone:
            raise RuntimeError(
                f"set_sparsity_level: the modules of {gone} must be in the model still, but were "
                "replaced (quantised or resized); strip the model before that, and call "
                "create_controller after"
            )
        if target is None:
            return self._weights
        if not any(info is target for info in self.sparsified_module_info):
            raise ValueError(
                "set_sparsity_level: target_sparsified_module_info must be an entry of this "
                f"controller's sparsified_module_info, got {target!r}"
            )
        return [target.operand]

    def _adapt_batchnorm(self) -> None:
        if self._batchnorm is not None:
            assert self._batchnorm_data is not None
            samples = self._batchnorm.num_bn_adaptation_samples
            adapt_batchnorm(self._model, self._batchnorm_data, samples)

    def compression_stage(self) -> CompressionStage:
        """FULLY once the masks reach the target to within a group, UNCOMPRESSED at none pruned.

        Without a target any masks are where they shall be, once something is pruned.
        """
        pruned = sum(weight.pruned_groups() for weight in self._weights)
        wanted = 0
        if self._target_level is not None:
            wanted = planned(self._weights, self._target_level, self._pool, shifts=self._shifts)
            wanted -= 1
        if pruned == 0 and (wanted > 0 or self._target_level is None):
            return CompressionStage.UNCOMPRESSED
        if pruned >= wanted:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED

    @property
    def compression_rate(self) -> float:
        """Fraction of the target weights' groups that is pruned; may be set."""
        return self.mask_level()

    @compression_rate.setter
    def compression_rate(self, compression_rate: float) -> None:
        frozen = self._thaw()
        try:
            self.set_sparsity_level(compression_rate)
        except BaseException:
            for part, was_frozen in frozen.items():
                part.frozen = was_frozen
            raise
        for part in frozen:
            part.freeze()

    def _thaw(self) -> dict[BaseSparsityAlgoController, bool]:
        """Let masks change that are frozen, where they are not learned; return whose were."""
        if self.learns:
            return {}
        frozen, self.frozen = self.frozen, False
        return {self: frozen}

    @property
    def maximal_compression_rate(self) -> float:
        """Upper bound of ``compression_rate``."""
        return 1.0

    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        """Return the statistics under the algorithm's name; ``to_str()`` draws the tables. There
        is nothing slow that ``quickly_collected_only`` could leave out.
        """
        scheduled = isinstance(self._scheduler, SparsityScheduler)
        level = self.current_sparsity_level if scheduled else None
        model = summarise(self._model, self._weights, self._thresholds)
        return Statistics(**{self.name: self._statistics(model, level)})

    def _statistics(
        self, model: SparsifiedModelStatistics, level: float | None
    ) -> SparsityStatistics:
        return SparsityStatistics(model, level)

    def builder_state(self) -> dict[str, Any]:
        """Return the configuration as plain values."""
        return {} if self.config is None else self.config.model_dump(mode="json")

    def get_compression_state(self) -> dict[str, Any]:
        """Return ``{"builder_state": {name: configuration}, "ctrl_state": get_state()}``."""
        return {"builder_state": {self.name: self.builder_state()}, "ctrl_state": self.get_state()}

    def _own_state(self) -> dict[str, Any]:
        """Return what the algorithm has beyond masks, schedule and loss: values and tensors."""
        return {} if self._scorer is None else self._scorer.get_state()

    def _own_schema(self) -> dict[str, Schema]:
        """Say what ``_own_state``'s result must hold."""
        return {} if self._scorer is None else self._scorer.schema()

    def _take_own(self, state: Mapping[str, Any]) -> None:
        if self._scorer is not None:
            self._scorer.take(state)

    def schema(self) -> dict[str, Schema]:
        """Say what ``get_state()`` has under the algorithm's name."""
        return {
            "version": exactly(STATE_VERSION),
            "loss_state": self._loss.schema(),
            "scheduler_state": self._scheduler.schema(),
            "compression_stage": integer(end=len(CompressionStage)),
            "frozen": FLAG,
            "weights": masks_schema(self._weights),
            "algorithm_state": self._own_schema(),
        }

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return the whole state under the algorithm's name, on the CPU: masks, packed; pruned
        values; schedule, loss, and what else the next update needs.
        """
        state = {
            "version": STATE_VERSION,
            "loss_state": self._loss.get_state(),
            "scheduler_state": self._scheduler.get_state(),
            "compression_stage": int(self.compression_stage()),
            "frozen": self.frozen,
            "weights": masks_state(self._weights),
        }
        own = self._own_state()
        return {self.name: state | ({"algorithm_state": own} if own else {})}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from ``get_state()``'s result, bit for bit, once the model's own state is loaded.

        The two may be loaded in either order. A state that was made on a wrapper of the model
        loads on the model, and the other way round.

        Raises:
            ValueError: the state is of another model, algorithm or version, or damaged; nothing
                has changed then.
        """
        with self.ranks.together(self._device, "load_state") as alike:
            take = self._read_state(state)
            alike |= {
                f"state[{name!r}][{key!r}]": own[key]
                for name, own in state.items()
                for key in ("frozen", "scheduler_state", "loss_state")
            }
        take()
        self._check_ranks("load_state")

    def _read_state(self, state: Mapping[str, Mapping[str, Any]]) -> Change:
        """Check a state as a whole; return what takes it over."""
        check(state, {self.name: MAPPING})
        reshard(self._model)
        check_at_rest(self._weights)
        # an algorithm without a state of its own has no such entry
        own: dict[str, Any] = {"algorithm_state": {}, **state[self.name]}
        name = f"state[{self.name!r}]"
        check(own.get("version"), exactly(STATE_VERSION), f"{name}['version']")
        own = with_names_of(self._weights, own)
        check(own, self.schema(), name)
        masks, values = read_masks(own["weights"], self._weights)

        def take() -> None:
            self._scheduler.load_state(own["scheduler_state"])
            self._loss.load_state(own["loss_state"])
            self.frozen = own["frozen"]
            self._keep_values(self._keeps_values)
            self._take_own(own["algorithm_state"])
            with self._changing(self._weights):
                for members, found, counts in masks:
                    set_masks(members, found, agree_counts(members, found, counts))
            for weight, kept in zip(self._weights, values, strict=True):
                if kept is not None:
                    weight.values, weight.values_are_loaded = kept, True

        return take

    # the names that torch's own stateful objects have
    state_dict = get_state
    load_state_dict = load_state

    def strip_model(
        self,
        model: nn.Module,
        do_copy: bool = False,
        strip_format: StripFormat = StripFormat.NATIVE,
    ) -> nn.Module:
        """Return ``model`` without masks: its original classes, pruned weights exactly zero, no
        hook and no further key; its outputs equal the controlled model's.

        Args:
            model: the controlled model, a wrapper of it, or a copy, such as an average of weights.
            do_copy: leave ``model`` as it is and strip a deep copy.
            strip_format: a mask has one folded form, plain weights with zeros, so that NNCF's
                formats agree. ``SEMI_STRUCTURED`` also turns the weights of linear modules under
                2:4, in half precision on a GPU of compute capability 8.0 or later, into PyTorch's
                semi-structured tensors, for inference.

        Warns:
            UserWarning: the schedule has not reached its target, with both levels; a copy's zeros
                are not those of the masks, with the number of elements that changed: somebody
                else had written pruned elements.

        Raises:
            ValueError: ``strip_format`` is no ``StripFormat``; ``model`` holds no such weights, or
                is stripped already; a weight under 2:4 cannot be packed, or there is none. Nothing
                has changed then.
        """
        strip_format = StripFormat(strip_format)
        self._tell_of_early_strip()
        return self.fold(model, do_copy, strip_format)

    def fold(
        self,
        model: nn.Module,
        do_copy: bool = False,
        strip_format: StripFormat = StripFormat.NATIVE,
    ) -> nn.Module:
        """``strip_model`` for who knows where the schedule is, and needs no warning."""
        return strip_masks(model, self._guards, do_copy=do_copy, strip_format=strip_format)

    def _tell_of_early_strip(self) -> None:
        """Warn if a schedule was broken off, or forgotten. Learned masks come near a target: that
        will do, as will a level that was set while no step was made.
        """
        target, scheduler = self._target_level, self._scheduler
        if target is None or self.current_sparsity_level >= target:
            return
        set_by_hand = max(scheduler.current_step, scheduler.current_epoch) < 0
        stage = self.compression_stage()
        if stage is CompressionStage.UNCOMPRESSED or (
            stage is CompressionStage.PARTIALLY_COMPRESSED and not set_by_hand
        ):
            warnings.warn(
                f"{self.name}: strip at {100 * self.mask_level():.4g} %, before the schedule has "
                f"reached its target of {100 * target:.4g} %; go on until then, or call "
                f"set_sparsity_level({target:g})",
                stacklevel=3,
            )

    def strip(
        self, do_copy: bool = True, strip_format: StripFormat = StripFormat.NATIVE
    ) -> nn.Module:
        """``strip_model`` of the controlled model; by default of a copy: training can go on."""
        return self.strip_model(self._model, do_copy, strip_format)

    def prepare_for_export(self) -> None:
        """Strip the controlled model in place."""
        self._model = self.strip_model(self._model)

    def export_model(
        self,
        save_path: str | PathLike[str],
        save_format: str | None = None,
        input_names: list[str] | None = None,
        output_names: list[str] | None = None,
        model_args: tuple[Any, ...] | None = None,
    ) -> None:
        """Write the stripped model as ONNX. The controlled model stays as it is.

        Args:
            save_path: the file to write.
            save_format: ``"onnx"`` or ``"onnx_<opset>"``; None: ``"onnx"``.
            input_names, output_names: names for the graph's inputs and outputs.
            model_args: example inputs, positional, with a dictionary of keyword arguments last:
                ``(x, {})``, ``(x, {"mask": m})``.

        Raises:
            ValueError: ``save_format`` or ``model_args`` is not of these forms.
        """
        export_onnx(
            self.strip(do_copy=True), save_path, save_format, input_names, output_names, model_args
        )

    def distributed(self) -> None:
        """Do nothing: NNCF's way to let ranks agree, which they do from the start."""


def _modules_of(model: nn.Module) -> set[int]:
    """Return the identities of all modules: ``modules()`` takes twice as long."""
    found, level = set[int](), {id(model): model}
    while level:
        found |= level.keys()
        children = (m for parent in level.values() for m in parent._modules.values())
        level = {id(m): m for m in children if m is not None and id(m) not in found}
    return found


def _told_by(
    controller: weakref.ref[BaseSparsityAlgoController],
) -> Callable[[list[SparseWeight], Tensor | None], None]:
    """Return what a guard tells of an optimiser's step."""

    def before_step(weights: list[SparseWeight], overflowed: Tensor | None) -> None:
        found = controller()
        if found is not None:
            found.before_optimizer_step(weights, overflowed)

    return before_step
