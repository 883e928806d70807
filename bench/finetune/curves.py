"""Pictures of one or several runs, as PNG bytes, drawn from their reports alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any


def curves(runs: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw loss, level and metric over the optimiser steps of one or several runs, as a PNG.

    Args:
        runs: reports of one task by label. The first that trained a dense phase shows it; the
            sparse phases start where it ends.
    """
    # the figure's own canvas: no window system, no state that is shared with other plots
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    loss, level, metric = figure.subplots(3, sharex=True)
    first = next(iter(runs.values()))
    dense_steps = max(len(run["history"]["dense"]["loss"]) for run in runs.values())
    shown = [
        ("dense", 0, run["history"]["dense"], "0.35")
        for run in runs.values()
        if run["history"]["dense"]["loss"]
    ][:1]
    shown += [
        (label or "sparse", dense_steps, run["history"]["sparse"], f"C{i}")
        for i, (label, run) in enumerate(runs.items())
    ]
    for label, start, history, colour in shown:
        steps = range(start + 1, start + 1 + len(history["loss"]))
        loss.plot(steps, history["loss"], color=colour, alpha=0.25, linewidth=0.8)
        loss.plot(steps, _smooth(history["loss"]), color=colour, label=label)
        level.plot(steps, [100 * x for x in history["level"]], color=colour)
        points = [(start + step, value) for step, value in history["metric"]]
        metric.plot(*zip(*points, strict=True), color=colour, marker=".")
    for axes in (loss, level, metric):
        axes.grid(alpha=0.3)
        if dense_steps:
            axes.axvline(dense_steps + 0.5, color="0.5", linestyle=":")
    dense_metric = first["results"]["dense"]["metric"]
    metric.axhline(dense_metric, color="0.35", linestyle="--")
    star = {"marker": "*", "markersize": 12, "linestyle": ""}
    for i, run in enumerate(runs.values()):
        end = dense_steps + len(run["history"]["sparse"]["loss"])
        metric.plot(end, run["results"]["stripped"]["metric"], color=f"C{i}", **star)
    # the colours have their legend above
    metric.plot([], [], color="0.35", marker=".", label="part of the held-out data")
    metric.plot([], [], color="0.35", linestyle="--", label="dense, all of it")
    metric.plot([], [], color="0.35", **star, label="stripped, all of it")
    loss.set_ylabel("training loss, nats")
    level.set_ylabel("sparsity level, %")
    level.set_ylim(-5, 105)
    metric.set_ylabel(first["metric"])
    metric.set_xlabel("optimiser step")
    loss.legend()
    metric.legend()
    loss.set_title(f"{first['task']}: dense training, then fine-tuning under a sparsity schedule")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def metric_over_level(runs: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw the final metric over the final level, a line an algorithm, as a PNG.

    Faint lines are the way there, on a part of the held-out data.

    Args:
        runs: reports of one task by label.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    ends: dict[str, list[tuple[float, float]]] = {}
    for run in runs.values():
        ends.setdefault(run["options"]["algorithm"], []).append(
            (100 * run["results"]["stripped"]["level"], run["results"]["stripped"]["metric"])
        )
    colours = {algorithm: f"C{i}" for i, algorithm in enumerate(ends)}
    for run in runs.values():
        history, colour = run["history"]["sparse"], colours[run["options"]["algorithm"]]
        way = [(100 * history["level"][step - 1], value) for step, value in history["metric"]]
        axes.plot(*zip(*way, strict=True), color=colour, alpha=0.3, marker=".")
    for algorithm, points in ends.items():
        points = sorted(points)
        style = {"marker": "*", "markersize": 12, "label": algorithm}
        axes.plot(*zip(*points, strict=True), color=colours[algorithm], **style)
    first = next(iter(runs.values()))
    axes.axhline(first["results"]["dense"]["metric"], color="0.35", linestyle="--", label="dense")
    axes.set_xlabel("sparsity level, %")
    axes.set_ylabel(first["metric"])
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{first['task']}: stripped models, and the way there")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def training_curves(report: Mapping[str, Any]) -> bytes:
    """Draw loss, level and metric over the steps of a run on a model of the user's own, as a PNG.

    Args:
        report: its report.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    loss, level, metric = figure.subplots(3, sharex=True)
    logged, held_out = report["history"]["train"], report["history"]["held_out"]
    results = report["results"]
    steps = [entry["step"] for entry in logged]
    values = [entry["loss"] for entry in logged]
    loss.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
    loss.plot(steps, _smooth(values), color="C0")
    for name, style in (("", "-"), ("_min", ":"), ("_max", ":")):
        levels = [100 * entry[f"sparsity_level{name}"] for entry in logged]
        level.plot(steps, levels, color="C0", linestyle=style)
    level.plot([], [], "C0:", label="of single weights, least and greatest")
    points = [(entry["step"], entry["eval_metric"]) for entry in held_out]
    metric.plot([x for x, _ in points], [y for _, y in points], "C0.-", label="held out")
    metric.axhline(results["dense"]["metric"], color="0.35", linestyle="--", label="dense")
    end = max(steps, default=0)
    metric.plot(end, results["stripped"]["metric"], "C0*", markersize=12, label="stripped")
    for axes in (loss, level, metric):
        axes.grid(alpha=0.3)
    loss.set_ylabel("training loss")
    level.set_ylabel("sparsity level, %")
    level.set_ylim(-5, 105)
    metric.set_ylabel(report["metric"])
    metric.set_xlabel("optimiser step")
    level.legend()
    metric.legend()
    loss.set_title(f"{report['model']}, {report['objective']}: fine-tuning under masks")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _smooth(values: list[float]) -> list[float]:
    """Return the exponential moving average over about 20 values, unbiased at the start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = 0.95 * total + value, 0.95 * weight + 1
        smoothed.append(total / weight)
    return smoothed
