"""Sparse training under ``lightning.pytorch.Trainer``: one callback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from ...kernels.dispatch import Dispatch
from ...kernels.launch import Backend
from ..algorithms.base import BaseSparsityAlgoController
from ..masks.statistics import Statistics
from ..nncf import ConfigLike, parse_config
from .training import ControlledTraining, check_options, refuse_scaler, sample, warn_of_early_end

SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class LightningCallback(Callback):
    """Trains a LightningModule under sparse masks: ``Trainer(callbacks=[this])`` is all.

    From the start of training the module has a controller. It is stepped once an optimiser step
    and once an epoch. Learned scores (rb, movement) have an optimiser of their own, and their loss
    is added to the task's, before gradients are clipped. Wanda's calibration and the gradients of
    the first masks come from ``training_step`` on a few batches of the training data. At the end
    of ``fit`` the module is stripped: its own classes, with exact zeros.

    A checkpoint has the callback's state, from which ``fit(ckpt_path=...)`` goes on bit for bit as
    far as the data do. ``ModelCheckpoint`` forgets what was best before the masks reached their
    target, and ``EarlyStopping`` does not count till then.

    As often as the loss is logged, so are ``sparsity_level``, ``sparsity_level_min`` and ``_max``
    (of single weights) and ``mask_churn``, the share of groups whose mask has changed since the
    last log.

    Learned masks are for one process; sharded weights (FSDP, DeepSpeed) are refused.

    Args:
        config: as ``create_controller``'s. A schedule by optimiser steps need not be given
            ``steps_per_epoch``.
        backend, dispatch: as ``create_controller``'s.
        score_lr: learning rate of learned scores; it follows the first optimiser's schedule. None:
            0.1, and in less than 280 steps as much more as the way of the logits takes.
        calibration_batches: batches of the training data for Wanda and snip.
        strip: strip the module at the end; False leaves it under ``controller``.
        resume_without_state: resume from a checkpoint that has no sparsity state, such as a dense
            run's: the masks begin there, at the schedule's level.

    Attributes:
        controller: the controller; None before training.
        statistics: what ``controller.statistics()`` was at the end of training; None before it.

    Raises:
        ValueError, TypeError: ``config`` does not fit, see ``create_controller``; when training
            starts also: the module has a controller already, the checkpoint has no sparsity state,
            or that of another run.
    """

    def __init__(
        self,
        config: ConfigLike,
        *,
        backend: Backend = "auto",
        dispatch: Dispatch = "auto",
        score_lr: float | None = None,
        calibration_batches: int = 8,
        strip: bool = True,
        resume_without_state: bool = False,
    ) -> None:
        self.config = parse_config(config)
        check_options(score_lr, calibration_batches)
        self.backend: Backend = backend
        self.dispatch: Dispatch = dispatch
        self.score_lr = score_lr
        self.calibration_batches = calibration_batches
        self.strip = strip
        self.resume_without_state = resume_without_state
        self.statistics: Statistics | None = None
        self._training: ControlledTraining | None = None
        self._saved: dict[str, Any] | None = None  # of the checkpoint that is resumed from
        self._steps = False  # an optimiser step has begun in this batch
        self._best_counts = False

    @property
    def controller(self) -> BaseSparsityAlgoController | None:
        return None if self._training is None else self._training.controller

    # the Trainer's hooks, in their order

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (strategy := type(trainer.strategy).__name__) in SHARDING:
            raise ValueError(f"the weights must be whole on every process, got {strategy}")
        if trainer.precision == "16-mixed":
            refuse_scaler(self.config, "precision '16-mixed'")
        if trainer.global_step and self._saved is None and not self.resume_without_state:
            raise ValueError(
                "the checkpoint to resume from must have a sparsity state, got one without "
                f"{self.state_key}; resume_without_state=True lets the masks begin here"
            )
        if self._training is not None and self.statistics is None:
            self._training.controller.fold(self._training.model)  # of a run that was broken off
        self.statistics, self._training = None, None
        batches = float(trainer.num_training_batches) / trainer.accumulate_grad_batches
        steps = None if batches == float("inf") else -int(-batches // 1)
        total = trainer.estimated_stepping_batches
        self._training = training = ControlledTraining(
            pl_module,
            self.config,
            trainer.optimizers[0],
            backend=self.backend,
            dispatch=self.dispatch,
            score_lr=self.score_lr,
            steps_per_epoch=steps,
            steps=None if total == float("inf") else int(total),
            state=self._saved,
        )
        if self._saved is None:
            found = sample(trainer.train_dataloader, self.calibration_batches, seed=0)
            move = trainer.strategy.batch_to_device
            with _silent(pl_module):
                training.gather(
                    (move(batch) for batch in islice(found, self.calibration_batches)),
                    lambda batch: _loss(pl_module.training_step(batch, 0)),
                )
        self._saved = None
        self._best_counts = training.at_target

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._training is not None
        self._training.begin_epoch(trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._training is not None
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._training.begin_step()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        assert self._training is not None
        if not self._steps:  # the first of several optimisers
            self._steps = True
            with torch.enable_grad():
                self._training.add_loss()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._training is not None
        if not self._steps:
            return
        self._steps = False
        self._training.step_scores()
        self._training.hold_gradients()  # a validation loop lets go of them
        if trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            pl_module.log_dict(self._training.figures())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is None or self.statistics is not None or self._best_counts:
            return
        self._best_counts = self._training.at_target
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            _forget_best(callback)

    def state_dict(self) -> dict[str, Any]:
        assert self._training is not None
        return self._training.get_state()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._training is not None
        warn_of_early_end(self._training)

    # behind on_train_end, in which others save
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is None:
            return
        controller = self._training.controller
        self.statistics = controller.statistics()
        if self.strip:
            controller.fold(pl_module)


def _forget_best(callback: Any) -> None:
    """Let nothing that was best count: the masks pruned less than they will."""
    if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
        callback.best_k_models = {}
        callback.kth_best_model_path = callback.best_model_path = ""
        callback.kth_value = callback.best_model_score = None  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(callback, EarlyStopping):
        worst = float("inf") if callback.mode == "min" else -float("inf")
        callback.best_score, callback.wait_count = torch.tensor(worst), 0


@contextmanager
def _silent(pl_module: LightningModule) -> Iterator[None]:
    """Let ``training_step`` log nothing for as long as the context is open."""
    names = ("log", "log_dict")
    for name in names:
        object.__setattr__(pl_module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name in names:
            object.__delattr__(pl_module, name)


def _loss(output: Any) -> Tensor | None:
    return output.get("loss") if isinstance(output, dict) else output
