"""``transformers.Trainer`` as a run drives it: its settings, its loss, what a run hears of it."""

from __future__ import annotations

import difflib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers as hf
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers.trainer_callback import PrinterCallback

from ..measure.files import write_sums
from ..measure.progress import Advance
from .distill import Distillation
from .examples import Examples
from .recipe import Recipe


def training_arguments(recipe: Recipe, folder: Path, **changes: Any) -> hf.TrainingArguments:
    """Return the Trainer's settings.

    Args:
        recipe: checked; its ``trainer`` goes before our defaults.
        folder: for checkpoints.
        changes: go before both.

    Raises:
        ValueError: a setting is unknown or of another type, or the Trainer refuses it.
    """
    names = [one.name for one in fields(hf.TrainingArguments) if one.init]
    for name in recipe.trainer:
        if name not in names:
            near = difflib.get_close_matches(name, names, 2)
            raise ValueError(
                f"trainer has {name!r}, which is no setting of transformers {hf.__version__}"
                + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else "")
            )
    cuda = torch.device(recipe.device).type == "cuda"
    settings: dict[str, Any] = {
        "per_device_eval_batch_size": recipe.batch_size,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "eval_strategy": "epoch",
        "report_to": "none",
        "dataloader_pin_memory": cuda,
        **{name: _typed(name, value) for name, value in recipe.trainer.items()},
        "output_dir": str(folder),
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.lr,
        "per_device_train_batch_size": recipe.batch_size,
        "save_steps": recipe.save_every,
        "seed": recipe.seed,
        "bf16": recipe.dtype == "bfloat16",
        "use_cpu": not cuda,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        **changes,
    }
    try:
        found = hf.TrainingArguments(**settings)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ValueError(f"trainer: {error}") from None
    if found.n_gpu > 1:
        # several GPUs are for several processes: DataParallel would copy the model every step
        found._n_gpu = 1
    return found


def _typed(name: str, value: Any) -> Any:
    """Return a setting's value in the type that it is declared with: ``"1e-4"`` is a number."""
    if value is None:
        return None
    try:
        hint = get_type_hints(hf.TrainingArguments)[name]
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # a type that nothing here knows is left to the Trainer
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        what = error.errors()[0]["msg"].replace("Input should be", "must be")
        raise ValueError(f"trainer: {name} {what}, got {value!r}") from None


def length(args: hf.TrainingArguments, examples: int) -> tuple[int, int]:
    """Return the optimiser steps of an epoch, and of the whole training."""
    batch = args.per_device_train_batch_size * args.world_size
    batches = examples // batch if args.dataloader_drop_last else math.ceil(examples / batch)
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
    return steps, total


class Trainer(hf.Trainer):
    """Evaluates with the run's own figures, and may learn from the dense model.

    Args:
        model: to train.
        args: settings.
        examples: to train and to evaluate on.
        measure: a model -> ``metric``, ``loss`` and times.
        distillation: the loss, where it is not the model's own.
    """

    def __init__(
        self,
        model: Any,
        args: hf.TrainingArguments,
        examples: Examples,
        measure: Callable[[Any], Mapping[str, float]],
        distillation: Distillation | None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=examples.collate,
            train_dataset=examples.train,
            eval_dataset=examples.held_out,
        )
        self.remove_callback(PrinterCallback)
        self._measure, self._distillation = measure, distillation
        if distillation is not None:
            # the loss is a mean over the batch, as of any loss of one's own
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self._distillation is None:
            return super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        with self.accelerator.autocast():
            loss, outputs = self._distillation(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        found = self._measure(self.model)
        metrics = {f"{metric_key_prefix}_{name}": found[name] for name in ("loss", "metric")}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class AllStepsDone(Exception):
    """A checkpoint of the last step was resumed from, within an epoch."""


class Clock(hf.TrainerCallback):
    """Times each step, mask update included; before the sparsity callback in their order.

    Args:
        examples: are told which epoch it is.
        tag: of the run, which its checkpoints carry.
    """

    def __init__(self, examples: Examples, tag: str | None = None) -> None:
        self.seconds: list[float] = []
        self._examples, self._tag = examples, tag
        self._started, self._logged = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # a field that a hyperparameter search fills; it is written with all else of a checkpoint
        state.trial_name = self._tag

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # sums of fractions
        self._examples.epoch.fill_(int((state.epoch or 0) + 1e-6))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AllStepsDone
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs is not None and "loss" in logs and len(self.seconds) > self._logged:
            figure = {"seconds_per_step": statistics.median(self.seconds[self._logged :])}
            self._logged = len(self.seconds)
            logs.update(figure)
            state.log_history[-1].update(figure)


class Watch(hf.TrainerCallback):
    """Tells how far training is, and stops it; behind the sparsity callback in their order.

    Args:
        progress: is told of each step.
        interrupted: whether somebody wants it to stop: the step is saved, then
            ``KeyboardInterrupt``.
    """

    def __init__(self, progress: Advance, interrupted: Callable[[], bool]) -> None:
        self._progress, self._interrupted = progress, interrupted
        self._stops = False
        self._note = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._progress("sparse", state.global_step, state.max_steps, self._note)
        stops = self._interrupted()
        if args.world_size > 1:
            # all at the same step, or none could save
            asked = torch.tensor(int(stops), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            stops = bool(asked)
        if stops:
            self._stops = control.should_save = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise ValueError(
                f"the training diverged: loss {loss} at step {state.global_step}; try a smaller lr"
            )
        self._note = f"loss {loss:.3f}, level {100 * (logs or {}).get('sparsity_level', 0):.1f} %"

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # what all processes have written of the checkpoint is there
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            write_sums(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self._stops:
            if args.world_size > 1:
                torch.distributed.barrier()
            raise KeyboardInterrupt
