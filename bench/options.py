"""The options of a fine-tuning run: what they may be, and the configuration that they spell."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import torch

from ..controller.magnitude import MagnitudeSparsityConfig
from ..controller.schedule import (
    AdaptiveSchedule,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
    Schedule,
)
from ..kernels.launch import use_triton
from ..kernels.pattern import Block, Pattern, Unstructured
from .tasks import Recipe


@dataclass(frozen=True)
class Options:
    """All that a run's result depends on, the data apart. None: the task's own default.

    Attributes:
        task: ``"stdlib-lm"`` or ``"digits"``.
        pattern: ``"unstructured"``, ``"block:ROWSxCOLS"`` or ``"block:SIDE"``.
        level, initial_level: where the schedule ends and starts, in [0, 1).
        schedule: ``"polynomial"`` (cubic, at every step), ``"exponential"``, ``"multistep"`` (four
            equal rises) or ``"adaptive"``, the latter three at every epoch.
        ramp: fraction of the sparse epochs in which the level rises, in (0, 1].
        importance: ``"abs"`` or ``"normed_abs"``.
        scope, ignore: target and ignored scopes; by default the transformer's layers, without
            embedding, norms and head.
        dense_epochs, epochs: of the dense and the sparse training. With a checkpoint the default
            is no dense training.
        steps_per_epoch: optimiser steps in an epoch.
        batch_size: windows of text, or images, in a step.
        dense_lr, lr: peak learning rates.
        eval_batches: how many of the held-out batches count.
        save_every: steps between two saves of the state.
        checkpoint: a safetensors file to start from.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        dtype: ``"float32"``, or ``"bfloat16"``: matrix products in bfloat16 by autocast, weights
            and optimiser in float32.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        dispatch: which layers skip pruned blocks: ``"auto"`` (where it is faster), ``"sparse"``
            or ``"dense"``.
        threads: of torch on the CPU; None: as many as torch takes.
        seed: of the model's start and of the order of the data.
    """

    task: str = "stdlib-lm"
    pattern: str = "block:16x16"
    level: float = 0.8
    initial_level: float = 0.0
    schedule: str = "polynomial"
    ramp: float = 0.7
    importance: str = "abs"
    scope: tuple[str, ...] = ("layers",)
    ignore: tuple[str, ...] = ()
    dense_epochs: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    dense_lr: float | None = None
    lr: float | None = None
    eval_batches: int | None = None
    save_every: int = 50
    checkpoint: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    backend: str = "auto"
    dispatch: str = "auto"
    threads: int | None = None
    seed: int = 0


def checked(options: Options) -> Options:
    """Return ``options`` with pattern, device and threads spelled out.

    Raises:
        ValueError: an option is unknown or out of its range, or the backend cannot run there.
    """
    pattern = parse_pattern(options.pattern)
    device = find_device(options.device)
    try:
        use_triton("finetune", options.backend, torch.empty(0, device=device))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    for name, choices in (
        ("schedule", ("polynomial", "exponential", "multistep", "adaptive")),
        ("importance", ("abs", "normed_abs")),
        ("dtype", ("float32", "bfloat16")),
        ("dispatch", ("auto", "sparse", "dense")),
    ):
        if getattr(options, name) not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(choices)}, got {getattr(options, name)!r}"
            )
    for name, fits, what in (
        ("level", lambda x: 0 <= x < 1, "in [0, 1)"),
        ("initial_level", lambda x: 0 <= x <= options.level, "from 0 to the level"),
        ("ramp", lambda x: 0 < x <= 1, "in (0, 1]"),
        ("dense_epochs", lambda x: x >= 0, "at least 0"),
        ("epochs", lambda x: x >= 1, "at least 1"),
        ("steps_per_epoch", lambda x: x >= 1, "at least 1"),
        ("batch_size", lambda x: x >= 1, "at least 1"),
        ("dense_lr", lambda x: 0 < x < math.inf, "positive and finite"),
        ("lr", lambda x: 0 < x < math.inf, "positive and finite"),
        ("eval_batches", lambda x: x >= 1, "at least 1"),
        ("save_every", lambda x: x >= 1, "at least 1"),
        ("threads", lambda x: x >= 1, "at least 1"),
        ("seed", lambda x: 0 <= x < 2**63, "from 0 to 2^63 - 1"),
    ):
        value = getattr(options, name)
        if value is not None and not fits(value):
            raise ValueError(f"{name.replace('_', '-')} must be {what}, got {value!r}")
    return replace(
        options,
        pattern=spell_pattern(pattern),
        device=str(device),
        threads=options.threads or torch.get_num_threads(),
    )


def with_defaults(options: Options, recipe: Recipe) -> Options:
    """Return ``options`` with the task's defaults in the place of None."""
    defaults = asdict(recipe) | ({"dense_epochs": 0} if options.checkpoint else {})
    missing = {k: v for k, v in defaults.items() if getattr(options, k) is None}
    return replace(options, **missing)


def same_run(saved: Options, asked: Options, given: Collection[str]) -> Options:
    """Return the saved options, if nothing that was asked for explicitly differs from them.

    Args:
        saved: of the run to resume.
        asked: of this call.
        given: names of the options that the user gave.

    Raises:
        ValueError: an option differs; the message names it and both values.
    """
    wanted = {name: getattr(asked, name) for name in given}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    merged = checked(replace(saved, **wanted))
    for name in wanted:
        before, now = getattr(saved, name), getattr(merged, name)
        if before != now:
            raise ValueError(
                f"the run to resume has {name.replace('_', '-')} {before!r}, got {now!r}; leave "
                "the option out, or start another run"
            )
    return merged


def parse_pattern(text: str) -> Pattern:
    """Return the pattern that a command line spells.

    Raises:
        ValueError: it is unknown, or the block's sides are no powers of two from 1 to 256.
    """
    if text == "unstructured":
        return Unstructured()
    if sides := re.fullmatch(r"block:([0-9]+)(?:x([0-9]+))?", text):
        rows, cols = sides.groups()
        return Block(int(rows), int(cols or rows))
    raise ValueError(
        f"pattern must be 'unstructured', 'block:ROWSxCOLS' or 'block:SIDE', got {text!r}"
    )


def spell_pattern(pattern: Pattern) -> str:
    """Return the one spelling of ``pattern`` that ``parse_pattern`` understands."""
    match pattern:
        case Unstructured():
            return "unstructured"
        case Block(rows, cols):
            return f"block:{rows}x{cols}"


def find_device(name: str) -> torch.device:
    """Return the device called ``name``; ``"auto"`` is the GPU where there is one.

    Raises:
        ValueError: the name is unknown, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: {torch.cuda.device_count()} GPUs found")
    return torch.device(name)


def sparsity_config(options: Options) -> MagnitudeSparsityConfig:
    """Return the controller's configuration; the target is reached at the end of the ramp."""
    assert options.epochs is not None
    # the level of an epoch holds from its start, so the last epoch is the latest to reach it in
    target_epoch = min(max(1, round(options.ramp * options.epochs)), options.epochs - 1)
    span = {"initial_level": options.initial_level, "target_level": options.level}
    # groups may return as long as training goes on
    end = {"freeze_epoch": options.epochs}
    schedule: Schedule
    match options.schedule:
        case "polynomial":
            schedule = PolynomialSchedule(
                **span,
                **end,
                target_epoch=target_epoch,
                power=3.0,
                update_per_optimizer_step=True,
                steps_per_epoch=options.steps_per_epoch,
            )
        case "exponential":
            schedule = ExponentialSchedule(**span, **end, target_epoch=target_epoch)
        case "multistep":
            rise = (options.level - options.initial_level) / 4
            schedule = MultistepSchedule(
                **end,
                initial_level=options.initial_level,
                steps=tuple(target_epoch * i // 3 for i in (1, 2, 3)),
                levels=(*(options.initial_level + rise * i for i in (1, 2, 3)), options.level),
            )
        case _:
            schedule = AdaptiveSchedule(**span, **end)
    return MagnitudeSparsityConfig(
        pattern=parse_pattern(options.pattern),
        schedule=schedule,
        weight_importance=options.importance,
        target_scopes=options.scope,
        ignored_scopes=options.ignore,
    )
