"""Fine-tune a model of the user's own under a sparsity schedule: ``finetune --model``.

``transformers.Trainer`` trains and our callback prunes; a run is its recipe, the folder of the
model and the data. Its checkpoints are the Trainer's, each with the masks' state, so a run that is
killed at any moment and resumed ends, on the CPU, with the weights of one without interruption.

Reading order: the run, what comes before training, the training, what comes after.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.utils.data import DataLoader

from ...controller.algorithms.table import algorithm_of
from ...controller.config.algorithm import AlgorithmConfig
from ...controller.integrations.transformers import STATE_FILE, TransformersCallback
from ...kernels.launch import use_triton
from ..measure.files import SUMS, check_sums, only_writer, write_atomic, write_sums
from ..measure.progress import Advance
from ..measure.record import environment
from ..measure.threads import set_threads
from .curves import training_curves
from .data import digest
from .distill import Distillation
from .examples import Examples, make_examples
from .files import (
    CHECKPOINTS,
    CURVES,
    MODEL,
    RECIPE,
    REPORT,
    START,
    claim,
    has_ended,
    load_report,
)
from .folders import (
    guess_objective,
    load,
    load_processor,
    pooling,
    read_config,
    save,
    sizes,
    zeros,
)
from .job import ONCE_BATCHES, control
from .layers import layers_of, target_names
from .options import Options, RunOptions
from .recipe import FIELDS, Recipe, checked_recipe, make_recipe, read_recipe, same_recipe, spelled
from .scores import METRICS, evaluate
from .signals import catch_signals
from .sparsity import sparsity_config
from .trainer import AllStepsDone, Clock, Trainer, Watch, length, training_arguments

FORMAT = 2
DENSE_STEPS = 6  # timed before training, the first apart, which sets up


@dataclass(frozen=True)
class Run:
    """What every part of a run needs.

    Attributes:
        recipe: checked.
        folder: for its files.
        objective: what is learned.
        pooling: of an embedding.
        args: the Trainer's settings.
        examples: to train and to evaluate on.
        processor: tokenizer or image processor; None where the model has none.
        sparsity: configuration of the algorithm.
        data: what identifies model and data; a resumed run must find the same.
    """

    recipe: Recipe
    folder: Path
    objective: str
    pooling: str
    args: hf.TrainingArguments
    examples: Examples
    processor: Any
    sparsity: AlgorithmConfig
    data: dict[str, Any]

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.args.process_index == 0

    @property
    def tag(self) -> str:
        """What the run's checkpoints carry."""
        return f"triton-sparsity {self.data['sha256']}"

    def load(self) -> Any:
        """Return the model as it was before the run, on the run's device."""
        model = load(
            Path(self.recipe.model),
            self.objective,
            labels=self.examples.labels,
            seed=self.recipe.seed,
        )
        if self.examples.pad_token is not None:
            model.config.pad_token_id = self.examples.pad_token
        return model.to(self.args.device)

    def measure(self, model: Any, dense: Any) -> dict[str, float]:
        """Return a model's figures on the held-out examples."""
        return evaluate(
            model,
            self.examples,
            self.objective,
            batch_size=self.args.per_device_eval_batch_size,
            batches=self.recipe.eval_batches,
            dense=dense,
            pooling=self.pooling,
            bfloat16=self.args.bf16,
        )


def finetune(
    recipe: Recipe,
    folder: Path,
    *,
    given: Collection[str] | None = None,
    resume: bool = False,
    resume_without_state: bool = False,
    force: bool = False,
    progress: Advance = lambda phase, done, total, note: None,
) -> dict[str, Any]:
    """Measure the dense model, fine-tune it sparse, strip it, and write a folder of it.

    SIGINT and SIGTERM let the current step end and save. Under ``torchrun`` every process calls
    this, and one of them writes.

    Args:
        recipe: what to do.
        folder: where the files go; made if it is not there.
        given: when resuming, the options that must agree with the saved run's; None: all.
        resume: go on with the run in ``folder``, or start one if there is none. The stored report
            of a run that has ended is returned as it is.
        resume_without_state: go on also from a checkpoint without sparsity state.
        force: replace a run in ``folder``.
        progress: called after each step with phase, steps done, steps in all, and a note.

    Returns:
        What stands in ``report.json``.

    Raises:
        ValueError: an option, the model, the data or a checkpoint is not as it must be, or the
            training diverged.
        FileExistsError: ``folder`` holds a run, and neither ``resume`` nor ``force`` is given.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: the data need a package that is missing.
        KeyboardInterrupt: a signal asked to stop; the step is saved.
    """
    resume = resume or resume_without_state
    # of several processes one writes; a run that has ended is only read
    reads = os.environ.get("RANK", "0") != "0" or (resume and has_ended(folder))
    with nullcontext() if reads else only_writer(folder):
        resumed = resume and (folder / RECIPE).exists()
        if resumed:
            path = folder / RECIPE
            saved = make_recipe(read_recipe(path), str(path))
            recipe = same_recipe(saved, recipe, FIELDS if given is None else given)
            if has_ended(folder):
                return load_report(folder)
        else:
            recipe = checked_recipe(recipe)
            if not force:
                claim(folder, force=False)
        return _finetune(recipe, folder, resumed, resume_without_state, force, progress)


def _finetune(
    recipe: Recipe,
    folder: Path,
    resumed: bool,
    resume_without_state: bool,
    force: bool,
    progress: Advance,
) -> dict[str, Any]:
    quiet()
    assert recipe.threads is not None
    set_threads(recipe.threads)
    run = prepare(recipe, folder)
    checkpoint = None
    start: dict[str, Any] = {"format": FORMAT, "data": run.data, "dense": None}
    if resumed:
        start = _read_start(run)
        checkpoint = last_checkpoint(run, without_state=resume_without_state)
    with catch_signals() as interrupted:
        if not resumed:
            _together(run, lambda: _claim(run, start, force))
        if start["dense"] is None:
            start = start | {"dense": measure_dense(run, progress)}
            _together(run, lambda: _write_start(run, start))
        if interrupted():
            raise KeyboardInterrupt
        trained = train(run, checkpoint, resume_without_state, progress, interrupted)
        report = finish(run, *trained, start["dense"])
    if run.args.world_size > 1:
        torch.distributed.destroy_process_group()
    return report


# before training


def quiet() -> None:
    """Have transformers say nothing but errors: its warnings speak of calls that are ours."""
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()


def prepare(recipe: Recipe, folder: Path) -> Run:
    """Read and check all that a run needs; nothing is written.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as ``finetune``.
    """
    source = Path(recipe.model)
    config = read_config(source)
    objective = recipe.objective or guess_objective(config, source)
    _check_objective(recipe, objective)
    args = training_arguments(recipe, folder / CHECKPOINTS)
    processor = load_processor(source, objective)
    # the rest may take long: what is not there is to fail now
    data = {"model": digest([recipe.model]), "data": digest((*recipe.data, *recipe.eval_data))}
    examples = make_examples(recipe, objective, config, processor)
    steps, total = length(args, len(examples.train))  # pyright: ignore[reportArgumentType]
    if "logging_steps" not in recipe.trainer:
        args.logging_steps = max(1, total // 200)
    sparsity = sparsity_config(
        Options(**_shared(recipe) | {"epochs": total / steps, "steps_per_epoch": steps})
    )
    model = load(source, objective, labels=examples.labels, seed=recipe.seed)
    # what cannot be pruned is to fail now, not after the dense model is measured; what there is
    # to tell of it is told when training begins, by one process
    log = logging.getLogger("triton_sparsity")
    log.disabled = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm_of(sparsity).controller.find_targets(model, sparsity)
    log.disabled = args.process_index > 0
    identity = json.dumps([data, asdict(recipe)], sort_keys=True, default=str)
    data["sha256"] = hashlib.sha256(identity.encode()).hexdigest()
    return Run(
        recipe=recipe,
        folder=folder,
        objective=objective,
        pooling=pooling(source) if objective == "embedding" else "mean",
        args=args,
        examples=examples,
        processor=processor,
        sparsity=sparsity,
        data=data,
    )


def _shared(recipe: Recipe) -> dict[str, Any]:
    """Return the options that the recipe has in common with a built-in task's run."""
    return {one.name: getattr(recipe, one.name) for one in fields(RunOptions)}


def _check_objective(recipe: Recipe, objective: str) -> None:
    classifies = objective in ("classification", "image-classification")
    if recipe.new_head and not classifies:
        raise ValueError(f"new-head is for classification, got objective {objective}")
    if "hidden" in recipe.distill and objective == "causal-lm":
        raise ValueError("distill must leave hidden out with causal-lm: hidden is of encoders")
    if "logits" in recipe.distill and objective == "embedding":
        raise ValueError("distill must leave logits out with embedding, which has none")
    if "logits" in recipe.distill and recipe.new_head:
        raise ValueError("distill must leave logits out with new-head, which knows nothing yet")


def _together(run: Run, write: Callable[[], None]) -> None:
    """Let one process write, and the others wait for it, before and after."""
    if run.args.world_size > 1:
        torch.distributed.barrier()
    if run.writes:
        write()
    if run.args.world_size > 1:
        torch.distributed.barrier()


def _claim(run: Run, start: Mapping[str, Any], force: bool) -> None:
    claim(run.folder, force=force)
    write_atomic(run.folder / RECIPE, spelled(run.recipe).encode())
    _write_start(run, start)


def _write_start(run: Run, start: Mapping[str, Any]) -> None:
    _write(run, START, {**start, "sha256": _sum_of(start)})


def _sum_of(start: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(start, sort_keys=True).encode()).hexdigest()


def _write(run: Run, name: str, content: Mapping[str, Any]) -> None:
    write_atomic(run.folder / name, json.dumps(content, indent=1, allow_nan=False).encode())


def _read_start(run: Run) -> dict[str, Any]:
    path = run.folder / START
    try:
        start = json.loads(path.read_text())
        if start.pop("sha256") != _sum_of(start):
            raise ValueError("its SHA-256 is not the one in it")
        version, before = start["format"], start["data"]
    except FileNotFoundError:
        # killed between the first two files
        return {"format": FORMAT, "data": run.data, "dense": None}
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, this program reads {FORMAT}")
    for name in ("model", "data"):
        if before[name] != run.data[name]:
            raise ValueError(
                f"the {name} must be that of the run to resume, got contents whose SHA-256 is "
                f"{run.data[name]}, was {before[name]}"
            )
    return start


def last_checkpoint(run: Run, *, without_state: bool) -> Path | None:
    """Return the folder of the last checkpoint that is whole; None where there is none.

    Raises:
        ValueError: a checkpoint is of another run, or there is only one without sparsity state,
            and ``without_state`` does not allow that.
    """
    found = [
        path
        for path in (run.folder / CHECKPOINTS).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "trainer_state.json").exists()
    ]
    stateless = None
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if (path / SUMS).exists():
            check_sums(path)
        try:
            tag = json.loads((path / "trainer_state.json").read_text()).get("trial_name")
        except (ValueError, AttributeError):
            continue  # killed while it was written
        if tag not in (None, run.tag):
            raise ValueError(
                f"{path} must be a checkpoint of the run in {run.folder / RECIPE}, got one of "
                "another run: move it elsewhere"
            )
        # with a tag it is one of ours, and was killed while it was written if it has no sums
        if tag is not None and not (path / SUMS).exists():
            continue
        ranks = range(run.args.world_size) if run.args.world_size > 1 else ()
        whole = all((path / f"rng_state_{rank}.pth").exists() for rank in ranks)
        if (path / STATE_FILE).exists() and whole:
            return path
        if tag is None:
            stateless = stateless or path
    if stateless is not None and not without_state:
        raise ValueError(
            f"{stateless} must hold a sparsity state, {STATE_FILE}, and has none; "
            "--resume-without-state goes on from it, with masks that begin with the next epoch"
        )
    return stateless


def measure_dense(run: Run, progress: Advance) -> dict[str, Any]:
    """Return the dense model's figures, and the median time of a few steps of training it."""
    dense = run.load()
    result: dict[str, Any] = run.measure(dense, dense)
    result["zeros"] = zeros(dense)
    result |= sizes(Path(run.recipe.model))
    distillation = _distillation(run, dense)
    # the steps train a model that is thrown away; the teacher is not to be
    model = dense if distillation is None else run.load()
    clock = Clock(run.examples)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            run.recipe,
            Path(folder),
            max_steps=DENSE_STEPS,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            load_best_model_at_end=False,
            eval_on_start=False,
        )
        trainer = Trainer(model, args, run.examples, dict, distillation)
        trainer.add_callback(clock)
        trainer.train()
    result["seconds_per_step"] = statistics.median(clock.seconds[1:])
    if run.writes:
        note = f"{METRICS[run.objective][0]} {result['metric']:.4g}"
        progress("dense", DENSE_STEPS, DENSE_STEPS, note)
    return result


def _distillation(run: Run, dense: Any) -> Distillation | None:
    recipe = run.recipe
    if not recipe.distill and run.objective != "embedding":
        return None
    return Distillation(
        dense,
        run.objective,
        recipe.distill,
        recipe.distill_weight,
        recipe.temperature,
        run.pooling,
    )


# training


def calibration(run: Run) -> list[dict[str, Any]]:
    """Return batches of training examples, drawn by the run's seed."""
    loader: Any = DataLoader(
        run.examples.train,
        batch_size=run.recipe.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(run.recipe.seed),
        collate_fn=run.examples.collate,
    )
    return [
        {key: value.to(run.args.device) for key, value in batch.items()}
        for batch in islice(loader, ONCE_BATCHES)
    ]


def train(
    run: Run,
    checkpoint: Path | None,
    without_state: bool,
    progress: Advance,
    interrupted: Callable[[], bool],
) -> tuple[Any, Any, TransformersCallback, list[dict[str, Any]]]:
    """Train under the schedule; return the model, still under its controller, the dense model
    where one was learned from, the callback, and what was logged.
    """
    recipe = run.recipe
    model = run.load()
    teaches = bool(recipe.distill) or run.objective == "embedding"
    dense = run.load() if teaches else None
    if recipe.algorithm == "const":
        # where there are too few zeros, those of one pruning; the callback then finds them there
        options = Options(**_shared(recipe))
        control(
            model, options, lambda: calibration(run), lambda model, batch: model(**batch).loss
        ).strip(do_copy=False)
    backend: Any = recipe.backend
    dispatch: Any = recipe.dispatch
    callback = TransformersCallback(
        run.sparsity,
        backend=backend,
        dispatch=dispatch,
        score_lr=recipe.score_lr,
        strip=False,
        resume_from=checkpoint,
        resume_without_state=without_state,
    )
    trainer = Trainer(
        model,
        run.args,
        run.examples,
        lambda model: run.measure(model, dense),
        None if dense is None else _distillation(run, dense),
    )
    for one in (Clock(run.examples, run.tag), callback, Watch(progress, interrupted)):
        trainer.add_callback(one)
    # what came before, the measuring of the dense model for one, has drawn numbers
    hf.set_seed(recipe.seed)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except AllStepsDone:
        if run.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        trainer.callback_handler.on_train_end(run.args, trainer.state, trainer.control)
    return model, dense, callback, trainer.state.log_history


# after training


def finish(
    run: Run,
    model: Any,
    dense: Any,
    callback: TransformersCallback,
    log: list[dict[str, Any]],
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """Evaluate, strip, write the folder, evaluate what it holds; write and return the report."""
    controller, recipe = callback.controller, run.recipe
    assert controller is not None
    assert callback.statistics is not None
    layers, names = layers_of(callback.statistics), target_names(controller)
    seconds = [entry["seconds_per_step"] for entry in log if "seconds_per_step" in entry]
    sparse = run.measure(model, dense) | {
        "level": controller.compression_rate,
        "seconds_per_step": statistics.median(seconds) if seconds else None,
    }
    controller.strip_model(model)
    source, target = Path(recipe.model), run.folder / MODEL
    _together(run, lambda: save(model, run.processor, source, target))
    stripped = load(target, run.objective).to(run.args.device)
    kind = use_triton("finetune", recipe.backend, torch.empty(0, device=run.args.device))
    report = environment(run.args.device, "triton" if kind else "torch") | {
        "format": FORMAT,
        "model": source.name,
        "objective": run.objective,
        "guessed": recipe.objective is None,
        "metric": METRICS[run.objective][0],
        "higher_is_better": METRICS[run.objective][1],
        "processes": run.args.world_size,
        "recipe": asdict(recipe),
        "data": run.data | run.examples.about,
        "results": {
            "dense": {k: v for k, v in before.items() if k != "zeros"}
            | {"level": _level(before["zeros"], names)},
            "sparse": sparse,
            "stripped": run.measure(stripped, dense)
            | {"level": _level(zeros(stripped), names)}
            | sizes(target),
        },
        "layers": layers,
        "history": {
            "train": [entry for entry in log if "loss" in entry],
            "held_out": [entry for entry in log if "eval_metric" in entry],
        },
        "files": {"model": MODEL, "checkpoints": CHECKPOINTS, "recipe": RECIPE, "curves": CURVES},
    }

    def write() -> None:
        write_atomic(run.folder / CURVES, training_curves(report))
        _write(run, REPORT, report)
        # last: a run that has them has ended
        inside = (path for path in target.rglob("*") if path.is_file())
        names = (path.relative_to(run.folder).as_posix() for path in inside)
        write_sums(run.folder, (*names, RECIPE, START, CURVES, REPORT))

    _together(run, write)
    return report


def _level(counted: Mapping[str, tuple[int, int]], names: Collection[str]) -> float:
    """Return the share of zeros in the weights called ``names``."""
    found = [counted[name] for name in names]
    return sum(zero for zero, _ in found) / sum(total for _, total in found)
