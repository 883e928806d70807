"""The job ``sensitivity``: what a model loses by each weight at each level, and the levels by
which it loses least.

One weight at a time is pruned to each level, the others left as they are, and the loss measured;
then its values are put back. Levels for a budget follow: each weight's curve is replaced by its
lower convex hull, and the flattest pieces of all hulls are taken until as much is pruned as was
asked for. That is the best choice where losses add up. Whether they do is told by the loss under
all these levels together, beside that of one level for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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

LEVELS = (0.5, 0.7, 0.8, 0.9)
PATTERNS = ("unstructured", "block:16")
RECORD, PICTURE = "sensitivity.json", "sensitivity.png"

# of each weight: level -> how much the loss rose
Curves = Mapping[str, Mapping[float, float]]


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
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels must be in (0, 1), got {', '.join(map(str, levels)) or 'none'}")
    quiet()
    recipe = checked_recipe(recipe)
    budget = 0.8 if recipe.level is None else recipe.level
    found = [parse_pattern(pattern) for pattern in patterns]
    for pattern in found:
        if not isinstance(pattern, NM) and budget > levels[-1]:
            raise ValueError(
                f"levels must go up to the level {budget:g} that is to be reached, got "
                f"{', '.join(map(str, levels))}"
            )
    assert recipe.threads is not None
    torch.set_num_threads(recipe.threads)
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


def allocate(sizes: Mapping[str, int], curves: Curves, level: float) -> dict[str, float]:
    """Return a level for each weight that together prune a share of all elements and cost least.

    Args:
        sizes: elements of each weight.
        curves: how much the loss rises by each weight at some levels; at 0 it does not.
        level: share of all elements, at most what the highest levels of all weights make.

    Returns:
        Levels at corners of the lower convex hulls of the curves, but for one at most.
    """
    pieces = sorted(
        ((end[1] - start[1]) / ((end[0] - start[0]) * sizes[name]), name, start[0], end[0])
        for name, curve in curves.items()
        for start, end in itertools.pairwise(_hull(curve))
    )
    levels = dict.fromkeys(sizes, 0.0)
    rest = level * sum(sizes.values())
    # slopes of a hull rise, so that a weight's pieces come in order
    for _, name, start, end in pieces:
        taken = min(1.0, rest / ((end - start) * sizes[name]))
        levels[name] = end if taken == 1.0 else start + taken * (end - start)
        rest -= taken * (end - start) * sizes[name]
        if rest <= 0:
            break
    return levels


def _hull(curve: Mapping[float, float]) -> list[tuple[float, float]]:
    """Return the corners of the lower convex hull, from (0, 0) on; a fall counts as 0."""
    corners: list[tuple[float, float]] = []
    highest = 0.0
    for level, increase in [(0.0, 0.0), *sorted(curve.items())]:
        # more pruning does not help: where it seems to, that is noise
        highest = max(highest, increase) if math.isfinite(increase) else math.inf
        point = (level, min(highest, 1e9))
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def save(record: Mapping[str, Any], folder: Path) -> None:
    """Write the record and the heat maps.

    Raises:
        OSError: a file cannot be written.
    """
    write_atomic(folder / RECORD, dump(record))
    write_atomic(folder / PICTURE, heat_maps(record))
