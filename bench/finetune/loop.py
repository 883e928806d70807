"""The training loop of a run: its steps, its saved state, its evaluation."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.progress import Advance
from .distill import logits_loss
from .files import of_state, save_state
from .options import Options
from .tasks import Batch, Outputs, Task

PHASES = ("dense", "sparse")


@dataclass(frozen=True)
class Job:
    """What every phase of a run needs."""

    task: Task
    options: Options
    folder: Path
    progress: Advance
    interrupted: Callable[[], bool]
    teacher: nn.Module | None = None  # whose logits the sparse training learns too

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def total(self, phase: str) -> int:
        """Optimiser steps of a phase."""
        epochs = self.options.dense_epochs if phase == "dense" else self.options.epochs
        assert epochs is not None
        assert self.options.steps_per_epoch is not None
        return round(epochs * self.options.steps_per_epoch)


def save(
    job: Job,
    state: dict[str, Any],
    model: nn.Module,
    optimizer: Any = None,
    controller: Any = None,
) -> dict[str, Any]:
    """Save ``state`` and all that training changes, in one piece; return what was saved."""
    state = state | {
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "controller": None if controller is None else controller.get_state(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(job.device) if job.device.type == "cuda" else None,
    }
    save_state(job.folder, state)
    return state


def train(job: Job, model: nn.Module, controller: Any, state: dict[str, Any]) -> None:
    """Train from ``state["step"]`` to the end of the phase, and save at intervals.

    ``state`` is kept up to date in place.
    """
    options, phase = job.options, state["phase"]
    total, steps_per_epoch = job.total(phase), options.steps_per_epoch
    peak = options.dense_lr if phase == "dense" else options.lr
    assert peak is not None
    assert steps_per_epoch is not None
    assert options.batch_size is not None
    assert options.score_lr is not None
    history = state["history"][phase]
    optimizer = make_optimizer(model, controller, peak, options.score_lr)
    with of_state(job.folder):
        if state["step"] > total:
            raise ValueError(f"step must be at most {total}, got {state['step']}")
        if state["optimizer"] is not None:
            load_optimizer(optimizer, state["optimizer"])
        if controller is not None and state["controller"] is not None:
            controller.load_state(state["controller"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], job.device)

    model.train()
    for step in range(state["step"], total):
        batch = job.task.batch(options.batch_size, options.seed, PHASES.index(phase), step)
        started = time.perf_counter()
        if controller is not None:
            if step % steps_per_epoch == 0:
                controller.scheduler.epoch_step()
            controller.scheduler.step()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, total)
        loss = update(job, model, controller, optimizer, batch)
        history["loss"].append(loss)
        history["seconds"].append(time.perf_counter() - started)
        history["level"].append(0.0 if controller is None else controller.current_sparsity_level)
        if not math.isfinite(history["loss"][-1]):
            raise ValueError(
                f"the {phase} training diverged: loss {history['loss'][-1]} at step {step}; try a "
                "smaller learning rate"
            )
        state["step"] = step + 1
        if (step + 1) % steps_per_epoch == 0:
            history["metric"].append([step + 1, evaluate(job, model, batches=1)["metric"]])
        stop = job.interrupted()
        if stop or step + 1 == total or (step + 1) % options.save_every == 0:
            save(job, state, model, optimizer, controller)
        job.progress(phase, step + 1, total, f"loss {history['loss'][-1]:.3f}")
        if stop:
            raise KeyboardInterrupt


def make_optimizer(model: nn.Module, controller: Any, peak: float, score_peak: float) -> Any:
    """Return the optimiser of weights and, with a rate of their own, the controller's scores.

    Args:
        model: whose weights.
        controller: is told of the optimiser; None: there is none.
        peak, score_peak: peak learning rates; a group has its own under ``"peak"``.
    """
    scores = [] if controller is None else controller.parameters()
    own = {id(score) for score in scores}
    weights = [weight for weight in model.parameters() if id(weight) not in own]
    groups = [{"params": weights, "peak": peak, "weight_decay": 0.1}]
    if scores:
        groups.append({"params": scores, "peak": score_peak, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), fused=True)
    if controller is not None:
        controller.optimizer = optimizer
    return optimizer


def check_tensors(what: str, found: Any, wanted: Mapping[str, Tensor]) -> None:
    """See that tensors by name have the shapes and dtypes of ``wanted`` ones, and are finite.

    Raises:
        ValueError: one is missing, too many or has not; the message names it.
    """
    if not isinstance(found, Mapping) or found.keys() != wanted.keys():
        names = sorted(map(str, found)) if isinstance(found, Mapping) else found
        raise ValueError(f"{what} must have {', '.join(wanted)}, got {names!r:.300}")
    for name, tensor in wanted.items():
        other = found[name]
        if not isinstance(other, Tensor) or (other.shape, other.dtype) != (
            tensor.shape,
            tensor.dtype,
        ):
            got = f"{tuple(other.shape)}, {other.dtype}" if isinstance(other, Tensor) else other
            raise ValueError(
                f"{what}: {name} must be {tuple(tensor.shape)}, {tensor.dtype}, got {got!r:.60}"
            )
        if not other.isfinite().all():
            raise ValueError(f"{what}: {name} must be finite, got NaN or infinity")


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load an optimiser's state, which torch itself takes whatever its shapes and settings are.

    Raises:
        ValueError, KeyError, TypeError: it is not of this optimiser.
    """
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for name, value in group.items():
            # the rate is set anew in each step
            if name in ("params", "lr"):
                continue
            if type(saved[name]) is not type(value) or saved[name] != value:
                raise ValueError(f"optimizer: {name} must be {value!r}, got {saved[name]!r:.60}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for saved in state["param_groups"] for i in saved["params"]]
    if indices != [*range(len(parameters))] or not state["state"].keys() <= {*indices}:
        raise ValueError(f"optimizer must be of {len(parameters)} parameters, got {indices!r:.60}")
    for index, found in state["state"].items():
        like = parameters[index]
        moments = {"step": torch.zeros(()), "exp_avg": like, "exp_avg_sq": like}
        check_tensors(f"optimizer of parameter {index}", found, moments)
    optimizer.load_state_dict(state)


def update(job: Job, model: nn.Module, controller: Any, optimizer: Any, batch: Batch) -> float:
    """Train on one batch; return the loss."""
    inputs, targets = (tensor.to(job.device) for tensor in batch)
    with autocast(job):
        outputs = model(inputs)
        loss = job.task.loss(outputs, targets)
        if job.teacher is not None and controller is not None:
            with torch.no_grad():
                dense = job.teacher(inputs)
            learned = logits_loss(outputs, dense, None, job.options.temperature)
            share = job.options.distill_weight
            loss = (1 - share) * loss + share * learned
    if controller is not None:
        loss = loss + controller.loss()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def learning_rate(step: int, total: int) -> float:
    """Return the fraction of the peak: up in a tenth of the steps, at most 50, then a cosine."""
    warm_up = min(50, max(1, total // 10))
    return min(1.0, (step + 1) / warm_up) * (0.525 + 0.475 * math.cos(math.pi * step / total))


@torch.no_grad()
def evaluate(job: Job, model: nn.Module, *, batches: int | None = None) -> dict[str, Any]:
    """Measure the metric on held-out batches, and the median time of a forward pass.

    Args:
        job: whose task and device.
        model: on that device.
        batches: how many; None: as many as the options say, and the task's further figures.
    """
    held_out = job.task.held_out[: batches or job.options.eval_batches]
    further = None if batches else job.task.further
    model.eval()
    score, count, seconds = torch.zeros((), dtype=torch.float64), 0, []
    kept: list[Outputs] = []
    for batch in held_out:
        inputs, targets = (tensor.to(job.device) for tensor in batch)
        started = time.perf_counter()
        with autocast(job):
            outputs = model(inputs)
        scores = job.task.score(outputs, targets)
        score += scores.double().sum().cpu()
        seconds.append(time.perf_counter() - started)
        count += scores.numel()
        if further is not None:
            kept.append((outputs.cpu(), targets.cpu()))
    model.train()
    result = {"metric": score.item() / count, "seconds_per_batch": statistics.median(seconds)}
    return result if further is None else result | {"further": further(kept)}


def autocast(job: Job) -> Any:
    """Run matrix products in bfloat16, if that is asked for."""
    enabled = job.options.dtype == "bfloat16"
    return torch.autocast(job.device.type, torch.bfloat16, enabled=enabled)
