"""What the callbacks share: a controller that somebody else's training loop drives.

A loop tells when an epoch and an optimiser step begin, and when its gradients are whole. What has
been trained, and what is saved, is then as in a loop of one's own.
"""

from __future__ import annotations

import math
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from ...kernels.dispatch import Dispatch
from ...kernels.launch import Backend
from ...kernels.mask import pack, unpack
from ..algorithms.base import BaseSparsityAlgoController
from ..algorithms.table import algorithm_of
from ..api import CompressionStage
from ..config.algorithm import AlgorithmConfig
from ..config.schedule import AdaptiveSchedule, RampSchedule
from ..create import create_controller
from ..masks.schema import (
    MAPPING,
    Entry,
    Maybe,
    Schema,
    check,
    exactly,
    integer,
    number,
    optional,
    tensor,
)
from ..nncf import ConfigLike, parse_config

STATE_VERSION = 1
STATE: Schema = {
    "version": exactly(STATE_VERSION),
    "epoch": integer(-1),
    "controller": MAPPING,
    "scores": optional(MAPPING),
    "fingerprint": integer(end=2**32),
}
# three times from rb's first logit to 0, and twice that, as rates decay to nothing
SCORE_WAY = 28.0
MASK = "attention_mask"  # what a batch for a Hugging Face model tells of its padding by
SAMPLE = 4096  # elements of each weight by which a checkpoint's weights are known


class ControlledTraining:
    """A controller, the optimiser of what it trains itself, and how far a training loop has come.

    Args:
        model: as ``create_controller``'s, without wrappers.
        config: as ``create_controller``'s.
        optimizer: the weights' own, without wrappers.
        backend, dispatch: as ``create_controller``'s.
        score_lr: learning rate of learned scores (rb, movement), which an Adam of their own
            trains; it follows the schedule that the optimiser's rate follows. None: 0.1, and in
            a short training as much more as the way of the logits takes.
        steps_per_epoch: optimiser steps in an epoch, where the loop knows it; a schedule that asks
            for it and was not given it takes this.
        steps: how many there will be in all; a schedule that cannot end by then is warned of.
        state: what ``get_state()`` returned, to go on from; the model's weights are loaded.

    Raises:
        ValueError: the model is trained by several processes under an algorithm that cannot be;
            the state is none, or of another run than the weights; and as ``create_controller``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ConfigLike,
        optimizer: Optimizer,
        *,
        backend: Backend = "auto",
        dispatch: Dispatch = "auto",
        score_lr: float | None = None,
        steps_per_epoch: int | None = None,
        steps: int | None = None,
        state: Any = None,
    ) -> None:
        configs = [_with_steps(one, steps_per_epoch) for one in parse_config(config)]
        if steps is not None:
            for one in configs:
                _warn_of_late_target(one, steps, steps_per_epoch)
        if state is not None:
            check(state, STATE)
        options: dict[str, Any] = {"backend": backend, "dispatch": dispatch}
        saved = None if state is None else state["controller"]
        self.controller = create_controller(model, configs, state=saved, **options)
        self.model = model
        self.epoch = -1  # the last that has begun
        self._optimizer = optimizer
        self.controller.optimizer = optimizer
        scores = self.controller.parameters()
        self._score_lr = (
            max(0.1, SCORE_WAY / (steps or math.inf)) if score_lr is None else score_lr
        )
        self._score_optimizer = Adam(scores, lr=self._score_lr) if scores else None
        # gradients that the next update will look at, where the loop has let go of them
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        self._seen: dict[str, tuple[int, Tensor]] = {}  # masks at the last figures
        try:
            _check_scores(self.controller)
            if state is not None:
                self._take(state)
        except ValueError:
            self.controller.fold(model)
            raise

    def gather(self, batches: Iterable[Any], loss: Callable[[Any], Tensor | None]) -> None:
        """Gather what the criterion needs before its first update.

        Wanda measures inputs in evaluation; snip sums gradients in training. The random generators
        are left as they were.

        Args:
            batches: a few, of the training data.
            loss: passes one through the model; returns the loss, if the model gives one.

        Raises:
            ValueError: the criterion needs gradients, and there is no loss.
        """
        controller, model = self.controller, self.model
        if not (controller.needs_calibration or controller.needs_gradients):
            return
        trained = model.training
        devices = [p.device.index for p in model.parameters() if p.device.type == "cuda"]
        with torch.random.fork_rng(list(dict.fromkeys(devices))):
            batches = list(batches)
            try:
                if controller.needs_calibration:
                    model.eval()
                    told = all(isinstance(b, Mapping) and MASK in b for b in batches)
                    mask = MASK if told and batches else None
                    with controller.calibration(attention_mask=mask), torch.no_grad():
                        for batch in batches:
                            loss(batch)
                if controller.needs_gradients:
                    model.train()
                    for batch in batches:
                        if (found := loss(batch)) is None:
                            raise ValueError(
                                "an importance by gradients needs the model to return a loss for "
                                "the first masks, got None; give the training data labels"
                            )
                        (found / len(batches)).backward()
                    # each rank's batches are others, and the model is not the wrapped one
                    for info in controller.sparsified_module_info:
                        if controller.ranks.size > 1:
                            if info.weight.grad is None:
                                info.weight.grad = torch.zeros_like(info.weight)
                            controller.ranks.sum(info.weight.grad)
                    self.hold_gradients()
                    model.zero_grad()
            finally:
                model.train(trained)

    # the loop tells

    def begin_epoch(self, epoch: int, *, again: bool = False) -> None:
        """An epoch begins, or the rest of it after a resume; ``again``: from its first step."""
        if epoch > self.epoch:
            # a schedule that counts the first epoch is an epoch behind the loop
            given = None if epoch == self.epoch + 1 else epoch
            self.epoch = epoch
            with self._gradients():
                self.controller.scheduler.epoch_step(given)
        elif again:
            self.controller.scheduler.epoch_step(epoch)

    def begin_step(self) -> None:
        """An optimiser step begins. Before the first epoch, in the rest of one that is resumed
        without a state, nothing is pruned.
        """
        if self.epoch < 0:
            return
        with self._gradients():
            self.controller.scheduler.step()
        self._held = []

    def add_loss(self) -> None:
        """Add the gradient of the algorithm's loss. Once an optimiser step, before clipping."""
        term = self.controller.loss()
        if self.epoch >= 0 and term.requires_grad:
            term.backward()

    def step_scores(self) -> None:
        """Step the learned scores, with the weights' optimiser."""
        if self._score_optimizer is None:
            return
        group = self._optimizer.param_groups[0]
        share = group["lr"] / first if (first := group.get("initial_lr")) else 1.0
        self._score_optimizer.param_groups[0]["lr"] = self._score_lr * float(share)
        self._score_optimizer.step()
        self._score_optimizer.zero_grad()

    def hold_gradients(self) -> None:
        """Keep gradients that the loop is about to let go of, if the next update looks at them."""
        if self.controller.needs_gradients:
            weights = [info.weight for info in self.controller.sparsified_module_info]
            self._held = [(w, w.grad) for w in weights if w.grad is not None]

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Put held gradients back for as long as the context is open."""
        held = [(weight, gradient) for weight, gradient in self._held if weight.grad is None]
        for weight, gradient in held:
            weight.grad = gradient
        try:
            yield
        finally:
            for weight, _ in held:
                weight.grad = None

    # what there is to say

    @property
    def at_target(self) -> bool:
        """True once the masks have reached the target level. Waits for the device."""
        return self.controller.compression_stage() == CompressionStage.FULLY_COMPRESSED

    def figures(self) -> dict[str, float]:
        """Return what is logged: the level of all groups, the least and greatest of a weight, and
        the share of groups whose mask has changed since this was last asked. Waits for the device.
        """
        infos = self.controller.sparsified_module_info
        weights = {info.operand.name: info.operand for info in infos}
        pruned = {name: weight.pruned_groups() for name, weight in weights.items()}
        levels = [pruned[name] / weight.groups for name, weight in weights.items()]
        groups = sum(weight.groups for weight in weights.values())
        figures = {
            "sparsity_level": sum(pruned.values()) / groups,
            "sparsity_level_min": min(levels),
            "sparsity_level_max": max(levels),
        }
        changed, before = 0, self._seen
        for name, weight in weights.items():
            if name in before and before[name][0] == weight.changes:
                continue
            mask = pack(weight.kept_grid())
            if name in before:
                changed += int(unpack(mask ^ before[name][1], weight.grid[1]).sum())
            self._seen[name] = weight.changes, mask
        return figures | {"mask_churn": changed / groups}

    # what is saved

    def get_state(self) -> dict[str, Any]:
        """Return the whole state, on the CPU: ``torch.load(weights_only=True)`` reads it."""
        scores = self._score_optimizer
        with self._gradients():
            return {
                "version": STATE_VERSION,
                "epoch": self.epoch,
                "controller": self.controller.get_state(),
                "scores": None if scores is None else scores.state_dict(),
                "fingerprint": self._fingerprint(),
            }

    def load_state(self, state: Any) -> None:
        """Go on from ``get_state()``'s result; the model's weights are loaded already.

        Raises:
            ValueError: it is no such state, or of another run than the weights.
        """
        check(state, STATE)
        before = self.controller.get_state()
        self.controller.load_state(state["controller"])
        try:
            self._take(state)
        except ValueError:
            self.controller.load_state(before)
            raise

    def _take(self, state: Mapping[str, Any]) -> None:
        """Take over what the state has beside the controller's."""
        if (self._score_optimizer is None) != (state["scores"] is None):
            raise ValueError("the sparsity state is of another algorithm")
        scores: Any = state["scores"]
        if self._score_optimizer is not None:
            self._check_optimizer(scores)
        if self._fingerprint() != state["fingerprint"]:
            raise ValueError(
                "the sparsity state is not of the weights that were loaded: it belongs to another "
                "checkpoint, or the weights were loaded in another dtype"
            )
        if self._score_optimizer is not None:
            self._score_optimizer.load_state_dict(scores)
        self.epoch = state["epoch"]
        # a resumed loop begins with gradients of None, as any
        self.hold_gradients()
        for weight, _ in self._held:
            weight.grad = None

    def _check_optimizer(self, state: Any) -> None:
        """Refuse a state of another optimiser than the scores' Adam."""
        assert self._score_optimizer is not None
        scores = self.controller.parameters()
        (group,) = self._score_optimizer.state_dict()["param_groups"]
        count = tensor([()], [torch.float32], least=0)
        own: dict[int, Schema] = {}
        for i, score in enumerate(scores):
            kind = [score.shape], [score.dtype]
            moments = {"exp_avg": tensor(*kind), "exp_avg_sq": tensor(*kind, least=0)}
            own[i] = Maybe({"step": count, **moments})
        groups = Entry(
            "a list of one group", lambda value: type(value) is list and len(value) == 1
        )
        check(state, {"state": own, "param_groups": groups}, "state['scores']")
        kept = {key: Maybe(exactly(value)) for key, value in group.items()}
        rate = {"lr": number("a rate from 0", 0, sys.float_info.max)}
        found = state["param_groups"][0]
        check(found, {**kept, **rate, "params": exactly(group["params"])}, "state['scores'] group")

    def _fingerprint(self) -> int:
        """Return a checksum of the first elements of every weight."""
        checksum = 0
        for info in self.controller.sparsified_module_info:
            sample = info.weight.detach().flatten()[:SAMPLE].cpu().contiguous()
            checksum = zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), checksum)
        return checksum


def _check_scores(controller: BaseSparsityAlgoController) -> None:
    """Refuse to train scores that come when the model is wrapped already: no reducer has them."""
    for part in getattr(controller, "controllers", {"": controller}).values():
        if part.learns and part.ranks.size > 1:
            raise ValueError(
                f"{part.name} must be trained by one process, got {part.ranks.size}: its scores "
                "come after DistributedDataParallel, which would not reduce their gradients; use "
                "magnitude, SET or RigL, or a loop of your own that wraps the model after "
                "create_controller"
            )


def _with_steps(config: AlgorithmConfig, steps: int | None) -> AlgorithmConfig:
    """Return ``config`` with the number of steps in an epoch where it asks for one."""
    changes: dict[str, Any] = {}
    counts = getattr(config, "schedule", None) is None
    if counts and getattr(config, "steps_per_epoch", 0) is None:
        changes["steps_per_epoch"] = steps
    schedule: Any = getattr(config, "schedule", None)
    by_step = getattr(schedule, "update_per_optimizer_step", isinstance(schedule, RampSchedule))
    if by_step and schedule.steps_per_epoch is None:
        changes["schedule"] = schedule.model_copy(update={"steps_per_epoch": steps})
    return config.model_copy(update=changes) if changes and steps is not None else config


def _warn_of_late_target(config: AlgorithmConfig, steps: int, steps_per_epoch: int | None) -> None:
    """Warn of a schedule that training ends before."""
    schedule: Any = getattr(config, "schedule", None)
    if schedule is None or isinstance(schedule, AdaptiveSchedule):
        return
    is_ramp = isinstance(schedule, RampSchedule)
    target = schedule.end if is_ramp else schedule.target_epoch
    unit, length = "epoch", float(steps)
    if is_ramp and schedule.unit == "step":
        unit = "step"
    elif steps_per_epoch is None:
        return
    else:
        length /= steps_per_epoch
    if target >= length:
        warnings.warn(
            f"the schedule reaches its target level {schedule.target_level:g} in {unit} "
            f"{target:g}, counted from 0, but training ends after {length:g} {unit}s: it will end "
            "at a lower level",
            stacklevel=5,
        )


def warn_of_early_end(training: ControlledTraining) -> None:
    """Warn if training ends before the masks have reached their target."""
    controller = training.controller
    if not training.at_target:
        warnings.warn(
            f"training has ended at level {controller.compression_rate:.4f}, before the masks "
            f"reached their target; {controller.current_sparsity_level:.4f} is what is scheduled "
            "by now",
            stacklevel=4,
        )


def sample(dataloader: Any, count: int, seed: int) -> Iterator[Any]:
    """Yield batches of a data loader's data, the same on every process.

    They are drawn by a generator of their own, without the loader's sampler: the order of training
    stays what it was. Of what is no ``DataLoader`` they are the first.
    """
    if not isinstance(dataloader, DataLoader):
        yield from islice(dataloader, count)
        return
    data = dataloader.dataset
    size = dataloader.batch_size or getattr(dataloader.batch_sampler, "batch_size", None) or 1
    sampler = None
    if not isinstance(data, IterableDataset):
        generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(data, generator=generator)  # pyright: ignore[reportArgumentType]
    loader = DataLoader(data, size, sampler=sampler, collate_fn=dataloader.collate_fn)
    yield from islice(loader, count)


def refuse_scaler(configs: Sequence[AlgorithmConfig], setting: str) -> None:
    """Raise ValueError if masks are learned: a gradient scaler skips steps and scales losses."""
    for config in configs:
        algorithm = algorithm_of(config)
        if algorithm.controller.learns:
            raise ValueError(
                f"{algorithm.name} must be trained without a gradient scaler, got {setting}: use "
                "bfloat16"
            )


def check_options(score_lr: float | None, calibration_batches: int) -> None:
    """Raise ValueError at what no callback can do."""
    if score_lr is not None and not 0 < score_lr < math.inf:
        raise ValueError(f"score_lr must be positive and finite, got {score_lr!r}")
    if type(calibration_batches) is not int or calibration_batches < 1:
        raise ValueError(
            f"calibration_batches must be an integer from 1, got {calibration_batches!r}"
        )
