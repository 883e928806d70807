"""Fine-tune a model under a sparsity schedule: dense training, sparse training, evaluation, files.

A run is a pure function of its options and the task's data, and its whole state lies in one file
that is replaced in one piece. So a run that is killed at any moment and resumed ends, on the CPU,
bit for bit where a run without interruption ends.

Reading order: the run, its phases, what they share.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from ...controller.algorithms.base import BaseSparsityAlgoController
from ...controller.algorithms.const import ConstSparsityConfig
from ...controller.algorithms.evaluation import evaluating, inputs_of, run
from ...controller.create import create_controller
from ...controller.one_shot import prune_obs
from ...controller.permute import permute_features
from ...kernels.launch import use_triton
from ..measure.files import digest, only_writer, write_atomic, write_sums
from ..measure.memory import free_bytes
from ..measure.progress import Advance
from ..measure.threads import set_threads
from .curves import curves
from .files import (
    CURVES,
    DENSE,
    FORMAT,
    REPORT,
    STATE,
    STRIPPED,
    claim,
    has_ended,
    load_checkpoint,
    load_report,
    load_state,
    of_state,
    serialised,
    sizes,
)
from .layers import layers_of, target_names
from .loop import PHASES, Job, autocast, check_tensors, evaluate, save, train
from .options import Options, checked, end_level, same_run, with_defaults
from .signals import catch_signals
from .sparsity import sparsity_config
from .tasks import Batch, Task, load_task

CALIBRATION_BATCHES = 8
ONCE_BATCHES = 32  # of one pruning; a moment has as many numbers as a layer has pairs of inputs


def finetune(
    options: Options,
    folder: Path,
    *,
    given: Collection[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Advance = lambda phase, done, total, note: None,
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
        BlockingIOError: another process writes to ``folder``.
        MemoryError: there is less than a batch takes.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: the task needs a package that is missing.
        KeyboardInterrupt: a signal asked to stop; the state is saved.
    """
    # a run that has ended is only read
    ended = resume and has_ended(folder)
    with nullcontext() if ended else only_writer(folder):
        saved = load_state(folder) if resume else None
        asked = options.level
        if saved is None:
            options = checked(options)
        else:
            names = [field.name for field in fields(Options)] if given is None else given
            with of_state(folder):
                before = read_options(saved["options"])
                checked(before)
            asked = before.level
            options = same_run(before, options, names)
            if has_ended(folder):
                return load_report(folder)
        return run_task(options, asked, folder, saved, force, progress)


def run_task(
    options: Options,
    asked: float | None,
    folder: Path,
    saved: dict[str, Any] | None,
    force: bool,
    progress: Advance,
) -> dict[str, Any]:
    """Do what ``finetune`` does in a folder that this process alone writes to.

    Args:
        options: checked.
        asked: the level as it was given.
        folder: where the files go.
        saved: the state to go on from; None: there is none.
        force: replace a run in ``folder``.
        progress: as of ``finetune``.
    """
    task = load_task(options.task)
    options = with_defaults(options, task.recipe)
    if options.algorithm == "const":
        # without a level the zeros that are there are enough, whatever their number
        options = replace(options, level=asked)
    for name, now in task.data.items():
        before = now if saved is None else saved["data"].get(name)
        if before != now:
            raise ValueError(
                f"the data of {options.task!r} are not those of the run to resume: {name} is "
                f"{now!r}, was {before!r}"
            )

    check_batch(task, options)
    assert options.threads is not None
    # how sums are split over threads decides their last bits
    set_threads(options.threads)
    teacher = teacher_of(task, options, saved)
    torch.manual_seed(options.seed)
    model = task.build()
    if saved is not None:
        with of_state(folder):
            check_tensors("model", saved["model"], model.state_dict())
            model.load_state_dict(saved["model"])
    elif options.checkpoint:
        load_checkpoint(model, Path(options.checkpoint))
    # what cannot be pruned is to fail now, not after the dense training
    with of_state(folder) if saved is not None else nullcontext():
        control(copy.deepcopy(model), replace(options, backend="auto", dispatch="auto"))
    model.to(options.device)

    with catch_signals() as interrupted:
        job = Job(task, options, folder, progress, interrupted, teacher)
        if saved is not None:
            return phases(job, model, saved)
        claim(folder, task.files, force=force)
        return phases(job, model, start(job, model))


def teacher_of(task: Task, options: Options, saved: dict[str, Any] | None) -> nn.Module | None:
    """Return the dense model whose logits are learned, if there is one.

    Raises:
        ValueError: it is not of this task, or not the one that a saved run has learned from.
        OSError: its file cannot be read.
    """
    if options.teacher is None:
        return None
    path = Path(options.teacher)
    if saved is not None and saved.get("teacher") != digest(path):
        raise ValueError(f"teacher {path} is not the file that the run to resume has learned from")
    teacher = task.build()
    load_checkpoint(teacher, path, "teacher")
    return teacher.to(options.device).eval().requires_grad_(False)


def check_batch(task: Task, options: Options) -> None:
    """See that the memory that is free holds a batch, before anything is written.

    Raises:
        MemoryError: it does not.
    """
    size, free = options.batch_size, free_bytes()
    assert size is not None
    like = task.held_out[0]
    need = size * sum(tensor.nbytes for tensor in like) // len(like[0])
    if free is not None and need > free:
        raise MemoryError(f"tried to allocate {need} bytes for a batch of {size} examples")


def read_options(saved: dict[str, Any]) -> Options:
    """Return the options that a state has.

    Raises:
        ValueError: one is missing, unknown or of another type.
    """
    names = {field.name for field in fields(Options)}
    if saved.keys() != names:
        raise ValueError(f"options must be {', '.join(sorted(names))}, got {[*saved]!r:.300}")
    try:
        # as JSON, of which a list is a tuple
        TypeAdapter(Options).validate_json(json.dumps(saved), strict=True)
    except ValidationError as error:
        (first, *_) = error.errors()
        what = first["msg"].replace("Input should be", "must be")
        raise ValueError(f"{first['loc'][0]} {what}, got {first['input']!r:.60}") from None
    # not what was read: a float that was given as an integer stays one
    return Options(**saved)


def phases(job: Job, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Go on from ``state`` to the end; return the report."""
    if state["phase"] == "dense":
        state = dense_phase(job, model, state)
    return sparse_phase(job, model, state)


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
        "teacher": job.options.teacher and digest(Path(job.options.teacher)),
    }
    return save(job, state, model)


def dense_phase(job: Job, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate the dense baseline; return the state in which the sparse phase starts."""
    train(job, model, None, state)
    result = evaluate(job, model) | seconds_per_step(state, "dense") | {"level": 0.0}
    weights = serialised(model)
    write_atomic(job.folder / DENSE, weights)
    if job.options.permute:
        level = end_level(job.options)
        assert level is not None
        batch, _ = calibration(job, 1)[0]
        permute_features(model, batch, sparsity_config(job.options), level=level)
    state = state | {"phase": "sparse", "step": 0, "dense": result | sizes(weights)}
    return save(job, state, model)


def sparse_phase(job: Job, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune under the schedule, evaluate, strip; write all files and return the report."""
    dense = job.folder / DENSE
    if digest(dense) != state["dense"]["sha256"]:
        raise ValueError(f"{dense} is damaged: its SHA-256 is not the one of when it was written")
    controller = control(
        model,
        job.options,
        lambda: calibration(job, ONCE_BATCHES),
        lambda model, batch: job.task.loss(model(batch[0]), batch[1]),
    )
    if controller.needs_calibration and state["controller"] is None:
        calibrate(job, model, controller)
    train(job, model, controller, state)
    layers = layers_of(controller.statistics())
    sparse = evaluate(job, model) | seconds_per_step(state, "sparse")
    sparse |= {"level": controller.compression_rate}

    stripped = controller.strip(do_copy=True)
    weights = serialised(stripped)
    targets = [stripped.get_parameter(name) for name in target_names(controller)]
    zeros = sum(int((weight == 0).sum()) for weight in targets)
    report = describe(job) | {
        "results": {
            "dense": state["dense"],
            "sparse": sparse,
            "stripped": evaluate(job, stripped)
            | {"level": zeros / sum(weight.numel() for weight in targets)}
            | sizes(weights),
        },
        "layers": layers,
        "history": state["history"],
    }
    write_atomic(job.folder / STRIPPED, weights)
    for name, content in job.task.files.items():
        write_atomic(job.folder / name, content)
    write_atomic(job.folder / CURVES, curves({"": report}))
    write_atomic(job.folder / REPORT, json.dumps(report, indent=1, allow_nan=False).encode())
    # last: a run that has them has ended
    write_sums(job.folder, (DENSE, STRIPPED, *job.task.files, CURVES, REPORT))
    return report


def control(
    model: nn.Module,
    options: Options,
    calibration: Callable[[], Sequence[Any]] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> BaseSparsityAlgoController:
    """Put ``model`` under the algorithm that the options name, on the device where it is.

    Args:
        model: dense, or with the zeros that const is to keep.
        options: checked.
        calibration: gives the batches of const's one pruning; without it magnitude decides.
        loss: of a model on one of these batches.

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
    prune_once(model, options, [] if calibration is None else calibration(), loss)
    return create_controller(model, config, backend=backend, dispatch=dispatch)


def prune_once(
    model: nn.Module,
    options: Options,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> None:
    """Prune ``model`` to the level by the options' importance; its zeros are then there."""
    level, config = end_level(options), sparsity_config(options)
    assert level is not None
    assert isinstance(config, ConstSparsityConfig)
    if batches and options.importance == "obs":
        prune_obs(model, batches, config, level=level).strip(do_copy=False)
        return
    # of its schedule nothing is used but the level that it ends at
    at_once = {"algorithm": "magnitude", "schedule": "exponential", "initial_level": 0.0}
    importance = options.importance if batches else "abs"
    once = sparsity_config(replace(options, level=level, importance=importance, **at_once))
    backend: Any = options.backend
    controller = create_controller(model, once, backend=backend)
    gather(controller, model, batches, loss)
    controller.set_sparsity_level(level)
    model.zero_grad()
    controller.strip(do_copy=False)


def gather(
    controller: BaseSparsityAlgoController,
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> None:
    """Show the model batches for what the controller's criterion looks at: inputs, gradients."""
    with evaluating(model):
        if controller.needs_calibration:
            with controller.calibration(), torch.no_grad():
                for batch in batches:
                    run(model, inputs_of(batch))
        if controller.needs_gradients:
            assert loss is not None
            for batch in batches:
                (loss(model, batch) / len(batches)).backward()


def calibrate(job: Job, model: nn.Module, controller: BaseSparsityAlgoController) -> None:
    """Show the model a few batches of training data that no step sees."""
    with controller.calibration(), torch.no_grad(), autocast(job):
        for inputs, _ in calibration(job, CALIBRATION_BATCHES):
            model(inputs)


def calibration(job: Job, count: int) -> list[Batch]:
    """Return batches of training data that no step sees."""
    size, seed = job.options.batch_size, job.options.seed
    assert size is not None
    found = (job.task.batch(size, seed, len(PHASES), i) for i in range(count))
    return [(inputs.to(job.device), targets.to(job.device)) for inputs, targets in found]


def seconds_per_step(state: dict[str, Any], phase: str) -> dict[str, float | None]:
    """Return the median training step at the level a phase ended with; None where it had none."""
    history = state["history"][phase]
    steps = zip(history["level"], history["seconds"], strict=True)
    seconds = [second for level, second in steps if level == history["level"][-1]]
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
