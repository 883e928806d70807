"""Fine-tune a model under a sparsity schedule: dense training, sparse training, evaluation, files.

A run is a pure function of its options and the task's data, and its whole state lies in one file
that is replaced in one piece. So a run that is killed at any moment and resumed ends, on the CPU,
bit for bit where a run without interruption ends.

Reading order: the run, its phases, what they share.
"""

from __future__ import annotations

import copy
import io
import json
import math
import platform
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...controller.base_algo import BaseSparsityAlgoController
from ...controller.create import create_controller
from ...controller.magnitude import MagnitudeSparsityConfig
from ...controller.schedule import PolynomialSchedule
from ...kernels.launch import use_triton
from .files import (
    CURVES,
    DENSE,
    FORMAT,
    REPORT,
    STATE,
    STRIPPED,
    claim,
    load_checkpoint,
    load_state,
    serialised,
    sizes,
    write_atomic,
)
from .options import Options, checked, end_level, same_run, sparsity_config, with_defaults
from .report import curves
from .tasks import Task, cross_entropy, load_task

PHASES = ("dense", "sparse")
CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Job:
    """What every phase of a run needs."""

    task: Task
    options: Options
    folder: Path
    progress: Callable[[str, int, int, str], None]
    interrupted: Callable[[], bool]

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def total(self, phase: str) -> int:
        """Optimiser steps of a phase."""
        epochs = self.options.dense_epochs if phase == "dense" else self.options.epochs
        assert epochs is not None
        assert self.options.steps_per_epoch is not None
        return epochs * self.options.steps_per_epoch


def finetune(
    options: Options,
    folder: Path,
    *,
    given: Collection[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int, str], None] = lambda phase, done, total, note: None,
) -> dict[str, Any]:
    """Train dense, fine-tune sparse, evaluate, strip, and write the files.

    SIGINT and SIGTERM let the current step end and its state be saved.

    Args:
        options: what to do.
        folder: where the files go; made if it is not there.
        given: when resuming, the options that must agree with the saved run's; None: all that
            are not None. The others are taken from that run.
        resume: go on with the run in ``folder``, or start one if there is none. The stored report
            of a run that has ended is returned as it is.
        force: replace a run in ``folder``.
        progress: called after each step with phase, steps done, steps in all, and a note.

    Returns:
        What stands in ``report.json``. Whatever depends on the clock has a key that starts with
        ``seconds``.

    Raises:
        ValueError: an option, the checkpoint, the saved state or its data are not as they must be,
            or the training diverged.
        FileExistsError: ``folder`` holds a run, and neither ``resume`` nor ``force`` is given.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: the task needs a package that is missing.
        KeyboardInterrupt: a signal asked to stop; the state is saved.
    """
    saved = load_state(folder) if resume else None
    asked = options.level if saved is None else saved["options"]["level"]
    if saved is None:
        options = checked(options)
    else:
        names = [field.name for field in fields(Options)] if given is None else given
        options = same_run(Options(**saved["options"]), options, names)
        if (folder / REPORT).exists():
            return json.loads((folder / REPORT).read_text())
    task = load_task(options.task)
    options = with_defaults(options, task.recipe)
    if options.algorithm == "const":
        # without a level the zeros that are there are enough, whatever their number
        options = replace(options, level=asked)
    for name in task.data if saved else ():
        before, now = saved["data"].get(name), task.data[name]
        if before != now:
            raise ValueError(
                f"the data of {options.task!r} are not those of the run to resume: {name} is "
                f"{now!r}, was {before!r}"
            )

    assert options.threads is not None
    # how sums are split over threads decides their last bits
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = task.build()
    if saved is not None:
        model.load_state_dict(saved["model"])
    elif options.checkpoint:
        load_checkpoint(model, Path(options.checkpoint))
    # what cannot be pruned is to fail now, not after the dense training
    control(copy.deepcopy(model), replace(options, backend="auto", dispatch="auto"))
    model.to(options.device)

    with catch_signals() as interrupted:
        job = Job(task, options, folder, progress, interrupted)
        if saved is None:
            claim(folder, force=force)
            saved = start(job, model)
        if saved["phase"] == "dense":
            saved = dense_phase(job, model, saved)
        return sparse_phase(job, model, saved)


def start(job: Job, model: nn.Module) -> dict[str, Any]:
    """Save the state before the first step: it shows that the folder can be written."""
    state = {
        "format": FORMAT,
        "options": asdict(job.options),
        "data": job.task.data,
        "phase": "dense",
        "step": 0,
        "history": {
            phase: {"loss": [], "level": [], "metric": [], "seconds": []} for phase in PHASES
        },
        "dense": None,
    }
    made = [path for path in (job.folder, *job.folder.parents) if not path.exists()]
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        return save(job, state, model)
    except OSError:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


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
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(job.folder / STATE, buffer.getvalue())
    return state


def dense_phase(job: Job, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate the dense baseline; return the state in which the sparse phase starts."""
    train(job, model, None, state)
    result = evaluate(job, model) | seconds_per_step(state, "dense") | {"level": 0.0}
    weights = serialised(model)
    write_atomic(job.folder / DENSE, weights)
    state = state | {"phase": "sparse", "step": 0, "dense": result | sizes(weights)}
    return save(job, state, model)


def sparse_phase(job: Job, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune under the schedule, evaluate, strip; write all files and return the report."""
    controller = control(model, job.options)
    if controller.needs_calibration and state["controller"] is None:
        calibrate(job, model, controller)
    train(job, model, controller, state)
    parts = [part.model_statistics for part in vars(controller.statistics()).values()]
    layers = [layer for part in parts for layer in part.sparsified_layers_summary]
    sparse = evaluate(job, model) | seconds_per_step(state, "sparse")
    sparse |= {"level": controller.compression_rate}

    stripped = controller.strip(do_copy=True)
    weights = serialised(stripped)
    targets = [
        stripped.get_parameter(
            f"{info.module_node_name}.weight"
            if info.parameter_name == "weight"
            else info.module_node_name
        )
        for info in controller.sparsified_module_info
    ]
    zeros = sum(int((weight == 0).sum()) for weight in targets)
    report = describe(job) | {
        "results": {
            "dense": state["dense"],
            "sparse": sparse,
            "stripped": evaluate(job, stripped)
            | {"level": zeros / sum(weight.numel() for weight in targets)}
            | sizes(weights),
        },
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.weight_shape),
                "groups": layer.groups,
                "pruned_groups": layer.pruned_groups,
                "path": layer.path,
            }
            for layer in layers
        ],
        "history": state["history"],
    }
    write_atomic(job.folder / STRIPPED, weights)
    write_atomic(job.folder / CURVES, curves({"": report}))
    # last: a run that has its report has ended
    write_atomic(job.folder / REPORT, json.dumps(report, indent=1, allow_nan=False).encode())
    return report


def control(model: nn.Module, options: Options) -> BaseSparsityAlgoController:
    """Put ``model`` under the algorithm that the options name, on the device where it is.

    Raises:
        ValueError: the options do not fit the model.
    """
    config = sparsity_config(options)
    backend: Any = options.backend
    dispatch: Any = options.dispatch
    with warnings.catch_warnings():
        # it is what the next lines are for
        warnings.filterwarnings("ignore", "const_sparsity: no group")
        controller = create_controller(model, config, backend=backend, dispatch=dispatch)
    rate, level = controller.compression_rate, options.level
    if options.algorithm != "const" or (rate > 0 if level is None else rate >= level):
        return controller
    # too few zeros there: those of one pruning, which then stay
    controller.strip(do_copy=False)
    level = end_level(options)
    once = PolynomialSchedule(initial_level=level, target_level=level)
    shared = config.model_dump(exclude={"algorithm"})
    magnitude = MagnitudeSparsityConfig(**shared, schedule=once, weight_importance="abs")
    create_controller(model, magnitude, backend=backend).strip(do_copy=False)
    return create_controller(model, config, backend=backend, dispatch=dispatch)


def calibrate(job: Job, model: nn.Module, controller: BaseSparsityAlgoController) -> None:
    """Show the model a few batches of training data that no step sees."""
    assert job.options.batch_size is not None
    with controller.calibration(), torch.no_grad(), autocast(job):
        for i in range(CALIBRATION_BATCHES):
            inputs, _ = job.task.batch(job.options.batch_size, job.options.seed, len(PHASES), i)
            model(inputs.to(job.device))


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
    history = state["history"][phase]
    scores = [] if controller is None else controller.parameters()
    own = {id(score) for score in scores}
    weights = [weight for weight in model.parameters() if id(weight) not in own]
    groups = [{"params": weights, "peak": peak, "weight_decay": 0.1}]
    if scores:
        groups.append({"params": scores, "peak": options.score_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), fused=True)
    if state["optimizer"] is not None:
        optimizer.load_state_dict(state["optimizer"])
    if controller is not None:
        controller.optimizer = optimizer
    if state["controller"] is not None:
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
        inputs, targets = (tensor.to(job.device) for tensor in batch)
        with autocast(job):
            task_loss = cross_entropy(model(inputs), targets)
        loss = task_loss if controller is None else task_loss + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history["loss"].append(loss.item())
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


def learning_rate(step: int, total: int) -> float:
    """Return the fraction of the peak: up in a tenth of the steps, at most 50, then a cosine."""
    warm_up = min(50, max(1, total // 10))
    return min(1.0, (step + 1) / warm_up) * (0.525 + 0.475 * math.cos(math.pi * step / total))


@torch.no_grad()
def evaluate(job: Job, model: nn.Module, *, batches: int | None = None) -> dict[str, float]:
    """Measure the metric on held-out batches, and the median time of a forward pass.

    Args:
        job: whose task and device.
        model: on that device.
        batches: how many; None: as many as the options say.
    """
    held_out = job.task.held_out[: batches or job.options.eval_batches]
    model.eval()
    score, seconds = torch.zeros((), dtype=torch.float64), []
    for batch in held_out:
        inputs, targets = (tensor.to(job.device) for tensor in batch)
        started = time.perf_counter()
        with autocast(job):
            logits = model(inputs)
        score += job.task.score(logits, targets).double().cpu()
        seconds.append(time.perf_counter() - started)
    model.train()
    count = sum(targets.numel() for _, targets in held_out)
    return {"metric": score.item() / count, "seconds_per_batch": statistics.median(seconds)}


def autocast(job: Job) -> Any:
    """Run matrix products in bfloat16, if that is asked for."""
    enabled = job.options.dtype == "bfloat16"
    return torch.autocast(job.device.type, torch.bfloat16, enabled=enabled)


def seconds_per_step(state: dict[str, Any], phase: str) -> dict[str, float | None]:
    """Return the median training step of a phase; None where it had none."""
    seconds = state["history"][phase]["seconds"]
    return {"seconds_per_step": statistics.median(seconds) if seconds else None}


def describe(job: Job) -> dict[str, Any]:
    """Return what a report says of the run and the machine, its results apart."""
    triton = use_triton("finetune", job.options.backend, torch.empty(0, device=job.device))
    name = (
        torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else platform.machine()
    )
    return {
        "format": FORMAT,
        "task": job.task.name,
        "metric": job.task.metric,
        "higher_is_better": job.task.higher_is_better,
        "device": f"{job.options.device} ({name})",
        "backend": "triton" if triton else "torch",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "triton-sparsity": _version("triton-sparsity"),
        },
        "options": asdict(job.options),
        "data": job.task.data,
        "files": {"dense": DENSE, "stripped": STRIPPED, "state": STATE, "curves": CURVES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Note SIGINT and SIGTERM rather than act on them; a second one acts as it always did."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        caught.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(caught)
    finally:
        restore()
