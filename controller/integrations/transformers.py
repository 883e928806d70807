"""Sparse training under ``transformers.Trainer``: one callback."""

from __future__ import annotations

import math
import os
import pickle
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ...kernels.dispatch import Dispatch
from ...kernels.launch import Backend
from ..algorithms.base import BaseSparsityAlgoController
from ..masks.statistics import Statistics
from ..nncf import ConfigLike, parse_config
from .training import ControlledTraining, check_options, refuse_scaler, sample, warn_of_early_end

STATE_FILE = "sparsity_state.pt"


class TransformersCallback(TrainerCallback):
    """Trains the Trainer's model under sparse masks: ``Trainer(..., callbacks=[this])`` is all.

    From the beginning of training the model has a controller. It is stepped once an optimiser step
    and once an epoch. Learned scores (rb, movement) have an optimiser of their own, and their loss
    is added to the task's. Wanda's calibration and the gradients of the first masks come from a
    few batches of the training data. At the end the model is stripped: ``trainer.save_model()``
    saves a plain model with exact zeros.

    Every checkpoint folder gets ``sparsity_state.pt``, from which
    ``trainer.train(resume_from_checkpoint=...)`` goes on bit for bit, within an epoch too. No
    checkpoint counts as the best one before the masks have reached their target, and with
    ``load_best_model_at_end`` the best one's masks come back with its weights.

    Whatever is logged with the loss gets ``sparsity_level``, ``sparsity_level_min`` and ``_max``
    (of single weights) and ``mask_churn``, the share of groups whose mask has changed since the
    last log: in ``trainer.state.log_history``, and for the callbacks behind this one. Reporters
    that ``report_to`` names come before it; list them in ``callbacks`` behind it instead.

    Learned masks are for one process; sharded weights (FSDP, DeepSpeed) are refused.

    Args:
        config: as ``create_controller``'s. A schedule by optimiser steps need not be given
            ``steps_per_epoch``.
        backend, dispatch: as ``create_controller``'s.
        score_lr: learning rate of learned scores; it follows the Trainer's schedule. None: 0.1,
            and in less than 280 steps as much more as the way of the logits takes.
        calibration_batches: batches of the training data for Wanda and snip.
        strip: strip the model at the end; False leaves it under ``controller``.
        resume_from: folder of the checkpoint that training is resumed from, where it is not
            ``checkpoint-<step>`` in the Trainer's ``output_dir``.
        resume_without_state: resume from a checkpoint that has no sparsity state, such as a dense
            run's: the masks begin with the next epoch, at the schedule's level.

    Attributes:
        controller: the controller; None before training.
        statistics: what ``controller.statistics()`` was at the end of training; None before it.

    Raises:
        ValueError, TypeError: ``config`` does not fit, see ``create_controller``; when training
            begins also: the model has a controller already, the checkpoint has no sparsity state,
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
        resume_from: str | os.PathLike[str] | None = None,
        resume_without_state: bool = False,
    ) -> None:
        self.config = parse_config(config)
        check_options(score_lr, calibration_batches)
        self.backend: Backend = backend
        self.dispatch: Dispatch = dispatch
        self.score_lr = score_lr
        self.calibration_batches = calibration_batches
        self.strip = strip
        self.resume_from = resume_from
        self.resume_without_state = resume_without_state
        self.statistics: Statistics | None = None
        self._training: ControlledTraining | None = None
        self._epoch = 0  # the next that begins
        self._begins_again = False
        self._waits = False  # for the end of an epoch that was resumed without a state
        self._best_counts = False

    @property
    def controller(self) -> BaseSparsityAlgoController | None:
        return None if self._training is None else self._training.controller

    # the Trainer's events, in their order

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        _refuse_sharding(args)
        if args.fp16:
            refuse_scaler(self.config, "fp16=True")
        saved = self._saved_state(args, state) if state.global_step else None
        steps = _steps_per_epoch(args, train_dataloader)
        if self._training is not None and self.statistics is None:
            self._training.controller.fold(self._training.model)  # of a run that was broken off
        self.statistics = None
        self._training = None
        try:
            training = ControlledTraining(
                model,
                self.config,
                getattr(optimizer, "optimizer", optimizer),
                backend=self.backend,
                dispatch=self.dispatch,
                score_lr=self.score_lr,
                steps_per_epoch=steps,
                steps=state.max_steps,
                state=saved,
            )
        except ValueError as error:
            if saved is None:
                raise
            raise ValueError(f"{self._state_path(args, state)}: {error}") from None
        self._training = training
        begun = int(state.epoch or 0)
        within = (state.epoch or 0) > begun
        self._epoch = begun
        self._waits = within and saved is None
        self._begins_again = within and args.ignore_data_skip
        if saved is None:
            found = sample(train_dataloader, self.calibration_batches, args.seed)
            batches = (_moved(batch, args.device) for batch in found)
            training.gather(batches, lambda batch: _loss(model, batch))
        self._best_counts = training.at_target

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        assert self._training is not None
        if not self._waits:
            self._training.begin_epoch(self._epoch, again=self._begins_again)
        self._epoch += 1
        self._waits = self._begins_again = False

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        assert self._training is not None
        self._forget_best(state)
        self._training.begin_step()
        self._training.add_loss()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        assert self._training is not None
        self._training.step_scores()
        self._training.hold_gradients()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self._training is None or logs is None or "loss" not in logs:
            return
        figures = self._training.figures()
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        if self._training is not None and self.statistics is None:
            self._best_counts = self._training.at_target

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        assert self._training is not None
        self._forget_best(state)
        writes = state.is_world_process_zero
        if args.save_on_each_node:
            writes = state.is_local_process_zero
        if writes:
            write_state(_folder(args, state) / STATE_FILE, self._training.get_state())

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        *,
        model: Any = None,
        **_: Any,
    ) -> None:
        training = self._training
        assert training is not None
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None:
            path = Path(best) / STATE_FILE
            training.load_state(_read_state(path))
        controller = training.controller
        warn_of_early_end(training)
        self.statistics = controller.statistics()
        if self.strip:
            controller.fold(model)

    # what they share

    def _forget_best(self, state: TrainerState) -> None:
        """Let no checkpoint be the best while the masks prune less than they will."""
        if not self._best_counts and state.best_metric is not None:
            state.best_metric = state.best_model_checkpoint = None
            state.best_global_step = None

    def _state_path(self, args: TrainingArguments, state: TrainerState) -> Path:
        given = self.resume_from or args.resume_from_checkpoint
        # the argument may be "True"
        folder = Path(given) if given and Path(given).is_dir() else _folder(args, state)
        return folder / STATE_FILE

    def _saved_state(self, args: TrainingArguments, state: TrainerState) -> Any:
        path = self._state_path(args, state)
        if path.exists():
            return _read_state(path)
        if self.resume_without_state:
            return None
        raise ValueError(
            f"the checkpoint to resume from must have a sparsity state, got no {path}; give its "
            "folder as resume_from, or resume_without_state=True if the masks shall begin here"
        )


def _refuse_sharding(args: TrainingArguments) -> None:
    for name in ("deepspeed", "fsdp"):
        if given := getattr(args, name, None):
            raise ValueError(f"the weights must be whole on every process, got {name}={given!r}")


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Return the optimiser steps of an epoch; None where the data's length is not known."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def _moved(batch: Any, device: torch.device) -> dict[str, Any]:
    return tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, dict(batch)
    )


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    output = model(**batch)
    return output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)


def write_state(path: Path, state: Any) -> None:
    """Write a state in one piece: whoever reads the file finds all of it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(state, file)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _read_state(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} must be a sparsity state, got a damaged file: {error}") from None
