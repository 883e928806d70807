"""What algorithms share whose weights are dense while their masks are learned: rb and movement, by
trained scores, and SR-STE.

Their ``loss`` must be added to the task's, and ``scheduler.step()`` called at the start of each
optimiser step. Scores are parameters of the modules, ``<weight>_scores``, and so of the model: an
optimiser made from ``model.parameters()`` after the controller trains them, one made before needs
``optimizer.add_param_group({"params": controller.parameters()})``. They are no keys of the model's
state dict; ``get_state()`` has them. ``DistributedDataParallel`` needs
``find_unused_parameters=True``, as frozen masks leave the scores without a gradient.
"""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..masks.exchange import sums_of_parts
from ..masks.guard import Guard
from ..masks.learned import LearnedWeight
from ..masks.learned_module import read_masked
from ..masks.linear import list_blocks_of_shards
from ..masks.module import MaskedModule, compiled_parts
from ..masks.optimizers import parameters_of
from ..masks.schema import Schema, tensor
from ..masks.scored import ScoredWeight
from ..masks.shards import Shard, forget_gone, records_of, reshard
from ..masks.stages import tell_layouts
from ..masks.weight import SparseWeight, check_at_rest
from .base import BaseSparsityAlgoController, Change
from .loss import CompressionLoss
from .scheduler import StubScheduler

PATIENCE = 20  # steps; a gradient scaler may skip the first few
SAMPLE = 256  # scores of each weight that are compared


class LearnedLoss(CompressionLoss):
    """The term by which an algorithm pulls ``weights``, or their scores."""

    def __init__(self, weights: Sequence[LearnedWeight]) -> None:
        super().__init__()
        self.disabled = False
        # whether a backward pass has come through it since this was last set to False
        self.was_added = False
        self._weights = list(weights)
        # of full weights, until they change; None: other ranks have not been asked
        self._of_all: Tensor | None = None
        self._shards: list[Shard | None] = []
        self._is_late = False  # a stage of a pipeline has stepped since they were asked

    @abstractmethod
    def trained(self) -> Tensor | None:
        """Return the term; None where it is 0."""

    @abstractmethod
    def numbers(self) -> Tensor:
        """Return what the term is made of, a number a weight, of what is here of it."""

    def numbers_of_all(self) -> Tensor:
        """Return ``numbers`` of full weights, with the gradient of what is here. Other ranks are
        asked by ``count``, and here only if numbers have changed since.

        Raises:
            RuntimeError: they have, on a stage of a pipeline.
        """
        own, shards = self.numbers(), [weight.shard for weight in self._weights]
        if not any(shards):
            return own
        if self._is_late:
            raise RuntimeError(
                "loss: scheduler.step() must come before it in each optimiser step where ranks "
                "have stages of a pipeline: the stages add up their numbers there"
            )
        if self._of_all is None or shards != self._shards:
            self._of_all = sums_of_parts(self._weights, own.detach())
            self._shards = shards
        # the same on every rank; plus 0, with the gradient of what is here
        return self._of_all + (own - own.detach())

    @torch.no_grad()
    def count(self) -> None:
        """Ask other ranks for their numbers; a step begins, whose passes have these."""
        self._of_all, self._is_late = None, False
        if self.is_live and any(weight.shard for weight in self._weights):
            self.numbers_of_all()

    @property
    def _on_stages(self) -> bool:
        return any(weight.target.holders for weight in self._weights)

    def outdate(self) -> None:
        """Take note that numbers change, on all ranks. Stages of a pipeline come to the loss at
        times of their own: they are asked at once.
        """
        if self._on_stages:
            self.count()
        else:
            self._of_all = None

    def follow_step(self) -> None:
        """Take note that an optimiser has stepped what numbers are of. Of a pipeline another stage
        may have none to step, and would not ask when this one does.
        """
        self._of_all, self._is_late = None, self._on_stages

    @property
    def is_live(self) -> bool:
        """True where training without the term would not be what the algorithm is."""
        return not self.disabled

    def calculate(self) -> Tensor:
        """Return the term; 0 once masks are frozen. A stripped model is a RuntimeError."""
        here = [weight for weight in self._weights if not weight.absent]
        if not all(isinstance(weight.module, MaskedModule) for weight in here):
            raise RuntimeError("loss: the model has been stripped; its masks cannot be trained")
        term = self.trained()
        if term is None:
            return torch.zeros((), device=self._weights[0].weight.device)
        if term.requires_grad:
            term.register_hook(self._note)
        return term

    def _note(self, _: Tensor) -> None:
        self.was_added = True


class LearnedController(BaseSparsityAlgoController):
    """Base of them all: freezes weights and loss together, and tells if the loss is left out."""

    _weights: list[LearnedWeight]
    _loss: LearnedLoss  # pyright: ignore[reportIncompatibleVariableOverride]

    def _guarded(self, model: nn.Module) -> list[Guard]:
        members: dict[nn.Module, dict[str, LearnedWeight]] = {}
        here = [weight for weight in self._weights if not weight.absent]
        for weight in here:
            for module, name in weight.target.users:
                members.setdefault(module, {})[name] = weight
        for module, weights in members.items():
            read_masked(module, weights)
        for weight in here:
            weight.model = weakref.ref(model)
        self._steps = self._optimizer_steps = 0  # since the last epoch has ended
        guards = [Guard(model, here)]
        told = weakref.WeakMethod(self.after_optimizer_step)
        guards[0].after_step = lambda optimizer: (told() or bool)(optimizer)
        reshard(model)
        if parted := [weight for weight in self._weights if weight.in_parts]:
            with parted[0].ranks.together(parted[0].weight.device):  # a stage may be refused
                records = records_of(model)
                for weight in parted:
                    weight.join(records)
        return guards

    def freeze(self, freeze: bool = True) -> None:
        """Keep the masks of evaluation as they are, in training too, and let the loss be 0; or go
        on. Frozen, pruned weights are zero: what they were is gone.
        """
        for weight in self._weights:
            weight.settle()
        if freeze:
            reshard(self._model)
            check_at_rest(self._weights)
        super().freeze(freeze)
        self._take_frozen()

    def _take_frozen(self) -> None:
        self._loss.disabled = self.frozen
        reshard(self._model)
        for weight in self._weights:
            weight.freeze(self.frozen)
        forget_gone(self._model)
        if not self.frozen:
            self._weights[0].masks_changed([weight for weight in self._weights if weight.in_parts])
        list_blocks_of_shards(self._model, self._weights)
        self._loss.outdate()
        self._steps = 0  # an epoch that was frozen in part shows nothing
        self._guard.masks_changed()

    def _read_state(self, state: Mapping[str, Mapping[str, Any]]) -> Change:
        take_state = super()._read_state(state)

        def take() -> None:
            for weight in self._weights:
                weight.freeze(False)
            take_state()
            self._take_frozen()

        return take

    def follow(self, level: float, *, last: bool) -> None:
        """Adapt BatchNorm too to the masks that stay. Masks that the user froze before stay."""
        if not self.frozen:
            super().follow(level, last=last)
            if last:
                self._adapt_batchnorm()

    def disable_scheduler(self) -> None:
        self._scheduler = StubScheduler(self.begin_step, self.check_epoch, self.have_begun)

    def begin_step(self) -> None:
        reshard(self._model)  # what an evaluation has left gathered is a shard, as its scores are
        super().begin_step()
        self._steps += 1

    def have_begun(self) -> None:
        self._loss.count()

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Take note of what an optimiser has changed; the guard calls it."""
        self._optimizer_steps += 1
        if self._trained_by(optimizer):
            self._loss.follow_step()

    def _trained_by(self, optimizer: Optimizer) -> list[Any]:
        """Return the weights that an optimiser steps, or their scores."""
        stepped = {id(parameter) for parameter in parameters_of(optimizer)}
        # of a weight that is gone the model itself will tell
        here = [weight for weight in self._weights if weight.is_in_module]
        return [w for w in here if id(w.weight) in stepped or id(w.scores) in stepped]

    @contextmanager
    def _changing(self, weights: Sequence[SparseWeight]) -> Iterator[None]:
        with super()._changing(weights):
            yield
        self._loss.outdate()

    def check_epoch(self) -> None:
        """Raise a RuntimeError if the epoch has trained without the algorithm's loss."""
        self._check_ranks("epoch_step")
        with self.ranks.together(self._device):
            if self._steps and not self.frozen and self._optimizer_steps > 0:
                self._check_added()
        self._end_epoch()  # one that is refused has not ended

    def _end_epoch(self) -> None:
        self._steps = self._optimizer_steps = 0
        self._loss.was_added = False

    def _check_added(self) -> None:
        here = any(not weight.absent for weight in self._weights)
        if here and self._loss.is_live and not self._loss.was_added:
            raise RuntimeError(
                f"{self.name}: controller.loss() was not part of the loss in {self._steps} steps, "
                f"an epoch, so that nothing pulls {self._weights[0].name!r} and "
                f"{len(self._weights) - 1} more; train on task_loss + controller.loss()"
            )


class ScoredController(LearnedController):
    """Base of rb and movement: tells when nothing trains the scores."""

    learns = True
    scores_name: ClassVar[str]  # what a state calls them
    _weights: list[ScoredWeight]  # pyright: ignore[reportIncompatibleVariableOverride]

    def _guarded(self, model: nn.Module) -> list[Guard]:
        self._versions: list[int] = []
        self._samples: list[Tensor] = []
        self._idle = 0
        guards = super()._guarded(model)
        tell_layouts(self._weights)
        return guards

    def parameters(self) -> list[nn.Parameter]:
        return [weight.scores for weight in self._weights if not weight.absent]

    @abstractmethod
    def _state_beside_scores(self) -> dict[str, Any]: ...

    @abstractmethod
    def _schema_beside_scores(self) -> dict[str, Schema]: ...

    @abstractmethod
    def _take_beside_scores(self, state: Mapping[str, Any]) -> None: ...

    def _own_state(self) -> dict[str, Any]:
        scores = {w.name: w.full_scores() for w in self._weights}
        return self._state_beside_scores() | {self.scores_name: scores}

    def _own_schema(self) -> dict[str, Schema]:
        kinds = {w.name: tensor([w.scores_shape], [w.scores.dtype]) for w in self._weights}
        return {**self._schema_beside_scores(), self.scores_name: kinds}

    @torch.no_grad()
    def _take_own(self, state: Mapping[str, Any]) -> None:
        for weight in self._weights:
            weight.take_scores(state[self.scores_name][weight.name])
        self._take_beside_scores(state)

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        super().after_optimizer_step(optimizer)
        # not by one that another rank may not have: ranks must agree on whether scores changed
        for weight in self._trained_by(optimizer):
            weight.optimizer_steps += 1

    def begin_step(self) -> None:
        super().begin_step()
        if self._scores_are_idle() and not self.frozen and self._model.training:
            warnings.warn(
                f"{self.name}: no optimiser has changed the trained scores in {PATIENCE} steps; "
                "one made before the controller needs "
                "optimizer.add_param_group({'params': controller.parameters()})",
                stacklevel=4,
            )

    def check_epoch(self) -> None:
        """Raise a RuntimeError unless the epoch has trained every score, by the loss too.

        Every mask must have had a part in the task's loss. Compiled code does not say what it
        reads: there it is enough that the scores had a gradient, of the algorithm's loss even.
        """
        self._check_ranks("epoch_step")
        with self.ranks.together(self._device):
            self._check_finite()
            self._check_trained()
        self._end_epoch()
        for weight in self._weights:
            weight.was_read = weight.has_learned = weight.has_gradient = False

    def _check_finite(self) -> None:
        here = [weight for weight in self._weights if not weight.absent]
        fine = torch.stack([w.part().isfinite().all() for w in here]).tolist() if here else []
        if bad := [weight.name for weight, good in zip(here, fine, strict=True) if not good]:
            raise ValueError(
                f"{self.name}: the trained scores of {bad} must be finite, got NaN or infinity; "
                "go back to a state before the loss was, and take a smaller learning rate"
            )

    def _check_trained(self) -> None:
        here, steps = [w for w in self._weights if not w.absent], self._steps
        seen = any(weight.was_read for weight in here)
        silent = compiled_parts(self._model) if seen else {weight.module for weight in here}
        untrained = [
            weight.name
            for weight in here
            if not (weight.has_gradient if weight.module in silent else weight.has_learned)
        ]
        trains = self._optimizer_steps > 0 or len(untrained) < len(here)
        if steps == 0 or self.frozen or not trains:
            return
        if untrained:
            raise RuntimeError(
                f"{self.name}: the scores of {untrained} had no gradient in {steps} steps, an "
                "epoch, so that their masks are not learned; the loss must depend on these "
                "weights as their modules have them, else list them in ignored_scopes"
            )
        self._check_added()

    def _scores_are_idle(self) -> bool:
        """Count a step; True once, when ``PATIENCE`` steps have changed nothing."""
        here = [weight for weight in self._weights if not weight.absent]
        versions = [weight.scores._version for weight in here]
        if versions != self._versions:
            self._versions, self._samples, self._idle = versions, self._sample(), 0
            return False
        self._idle += 1
        if self._idle != PATIENCE or not here:
            return False
        # fused optimisers leave no trace in the versions
        changed = not all(map(torch.equal, self._samples, self._sample()))
        if here[0].target.holders:  # stages may be at odds on how long theirs were idle
            return not changed and any(sample.numel() for sample in self._samples)
        return not self.ranks.any(changed, self._device)

    def _sample(self) -> list[Tensor]:
        return [weight.part().flatten()[:SAMPLE].clone() for weight in self._weights]
