"""The job ``sensitivity``: what a model loses by each weight at each level, and the levels by
which it loses least.

One weight at a time is pruned to each level, the others left as they are, and the loss measured;
then its values are put back. Levels for a budget follow: each weight's curve is replaced by its
lower convex hull, and the flattest pieces of all hulls are taken until as much is pruned as was
asked for. That is the best choice where losses add up. Whether they do is told by the loss under
all these levels together, beside that of one level for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..controller.algorithms.base import BaseSparsityAlgoController
from ..controller.create import create_controller
from ..kernels.pattern import NM, Pattern, maximum_level
from .finetune.job import gather
from .finetune.pretrained import Run, calibration, prepare, quiet
from .finetune.recipe import Recipe, checked_recipe
from .measure.charts import heat_maps
from .measure.files import write_atomic
from .measure.progress import Advance
from .measure.record import dump, environment
from .measure.spelling import parse_pattern, spell_pattern
from .measure.threads import set_threads
from .sensitivity_levels import BUDGET, Curves, allocate, check_levels

RECORD, PICTURE = "sensitivity.json", "sensitivity.png"


def sensitivity(
    recipe: Recipe,
    patterns: Sequence[str],
    levels: Sequence[float],
    folder: Path,
    progress: Advance,
) -> dict[str, Any]:
    """Scan the target weights of a model, and propose levels for them.

    Args:
        recipe: model, data, scopes, importance and, as ``level``, the budget: the fraction of all
            target elements that is to be pruned; 0.8 by default.
        patterns: as on the command line.
        levels: to scan, in (0, 1); of N:M the pattern's own is the only one.
        folder: for the files, later; nothing is written to it.
        progress: is told of every weight.

    Returns:
        The record: a row a pattern, weight and level, and a proposal a pattern.

    Raises:
        ValueError: an option, the model or the data do not fit; OSError: they cannot be read.
    """
    levels = sorted(set(levels))
    budget = BUDGET if recipe.level is None else recipe.level
    check_levels(patterns, levels, budget)
    quiet()
    recipe = checked_recipe(recipe)
    found = [parse_pattern(pattern) for pattern in patterns]
    assert recipe.threads is not None
    set_threads(recipe.threads)
    run = prepare(recipe, folder)
    model, dense = run.load().eval(), None
    if run.objective == "embedding":
        dense = run.load().eval()

    def loss() -> float:
        return run.measure(model, dense)["loss"]

    before = loss()
    rows: list[dict[str, Any]] = []
    proposals = []
    for pattern in found:
        controller = _control(run, model, pattern)
        at = [maximum_level(pattern)] if isinstance(pattern, NM) else levels
        scanned = _scan(controller, loss, at, progress)
        for info in controller.sparsified_module_info:
            name = info.module_node_name
            rows += [
                {
                    "pattern": spell_pattern(pattern),
                    "name": name,
                    "shape": list(info.weight.shape),
                    "level": level,
                    "loss": after,
                    "increase": after - before,
                }
                for level, after in scanned[name].items()
            ]
        curves = {
            name: {level: after - before for level, after in losses.items()}
            for name, losses in scanned.items()
        }
        reachable = min(budget, maximum_level(pattern))
        proposals.append(_propose(controller, loss, pattern, curves, reachable))
        controller.fold(model)
    return environment(run.args.device, "torch") | {
        "model": Path(recipe.model).name,
        "objective": run.objective,
        "importance": recipe.importance,
        "examples": _examples(run),
        "level": budget,
        "levels": levels,
        "loss": before,
        "rows": rows,
        "proposals": proposals,
    }


def _examples(run: Run) -> int:
    """Return on how many examples the loss is measured."""
    held_out: Any = run.examples.held_out
    batches = run.recipe.eval_batches
    assert batches is not None
    return min(len(held_out), batches * run.args.per_device_eval_batch_size)


def _control(run: Run, model: nn.Module, pattern: Pattern) -> BaseSparsityAlgoController:
    """Return a controller under which each weight is a pool, with what its criterion needs."""
    changes = {"pattern": pattern, "maximum_level": 1.0, "schedule": None}
    config = run.sparsity.model_copy(update=changes)
    backend: Any = run.recipe.backend
    controller = create_controller(model, config, backend=backend, dispatch="dense")
    gather(controller, model, calibration(run), lambda model, batch: model(**batch).loss)
    return controller


def _scan(
    controller: BaseSparsityAlgoController,
    loss: Callable[[], float],
    levels: Sequence[float],
    progress: Advance,
) -> dict[str, dict[float, float]]:
    """Return the loss with one weight alone at each level; the weights are then as they were."""
    infos, losses = controller.sparsified_module_info, {}
    for i, info in enumerate(infos, 1):
        name = info.module_node_name
        losses[name] = {}
        for level in levels:
            controller.set_sparsity_level(level, info)
            losses[name][level] = loss()
        controller.set_sparsity_level(0.0, info)
        progress(f"scan {info.operand.pattern}", i, len(infos), name)
    return losses


def _propose(
    controller: BaseSparsityAlgoController,
    loss: Callable[[], float],
    pattern: Pattern,
    curves: Curves,
    level: float,
) -> dict[str, Any]:
    """Return levels for the budget, and the loss under these and under one level for all; the
    weights are then as they were.
    """
    infos = controller.sparsified_module_info
    sizes = {info.module_node_name: info.weight.numel() for info in infos}
    chosen = allocate(sizes, curves, level)
    losses = []
    for levels in (chosen, dict.fromkeys(sizes, level)):
        for info in infos:
            controller.set_sparsity_level(levels[info.module_node_name], info)
        losses.append(loss())
    for info in infos:
        controller.set_sparsity_level(0.0, info)
    return {
        "pattern": spell_pattern(pattern),
        "level": sum(chosen[name] * size for name, size in sizes.items()) / sum(sizes.values()),
        "loss": losses[0],
        "uniform_loss": losses[1],
        "levels": chosen,
    }


def save(record: Mapping[str, Any], folder: Path) -> None:
    """Write the record and the heat maps.

    Raises:
        OSError: a file cannot be written.
    """
    write_atomic(folder / RECORD, dump(record))
    write_atomic(folder / PICTURE, heat_maps(record))
