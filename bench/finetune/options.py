"""The options of a fine-tuning run, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from ...kernels.pattern import NM, Block, is_reachable, maximum_level
from ..measure.options import END
from ..measure.spelling import check_device, find_device, parse_pattern, spell_pattern

if TYPE_CHECKING:
    from .tasks import Recipe

# as the library has them; written out, as all that the checks need, because it imports torch,
# which takes seconds
TASKS = ("stdlib-lm", "stdlib-lm-wide", "digits", "minilm")
ALGORITHMS = ("magnitude", "const", "set", "rigl", "rb", "movement", "sr_ste")
WITH_NM = ("magnitude", "const", "sr_ste")
REDUCTIONS = ("mean", "max", "sum", "l2")
POOLS = ("global", "weight", "row")
SUMMED = ("snip_momentum", "fisher")
GRADIENT_OR_INPUT = ("snip", "snip_momentum", "taylor", "fisher", "wanda")
IMPORTANCE = ("abs", "normed_abs", *GRADIENT_OR_INPUT, "random", "obs")


@dataclass(frozen=True)
class RunOptions:
    """What every run is told, of a built-in task or of a model of the user's own.

    Attributes:
        algorithm: ``"magnitude"`` along the schedule; ``"const"``: the zeros that are there stay,
            or where there are too few those of one pruning; ``"set"`` and ``"rigl"``: at
            the level from the start, with masks that move until the end of the ramp; ``"rb"``:
            learned, pulled along the schedule; ``"movement"``: learned, with a level along the
            schedule, without one by a warm-up as long as the ramp, from the second epoch on;
            ``"sr_ste"``: dense weights under masks found anew at each step of the ramp.
        pattern: ``"unstructured"``, ``"block:ROWSxCOLS"``, ``"block:SIDE"``, ``"nm:N:M"`` or
            ``"nm:2:4:transposable"``.
        level, initial_level: where the schedule ends and starts, in [0, 1); of N:M up to 1 - n/m.
            Without a level it ends at 0.8, or at full N:M. Movement takes none: what it ends at
            follows from ``regularization``.
        schedule: ``"polynomial"`` (cubic, at every step), ``"exponential"``, ``"multistep"`` (four
            equal rises) or ``"adaptive"``, the latter three at every epoch.
        ramp: fraction of the sparse epochs in which the level rises, in (0, 1].
        importance: ``"abs"``, ``"normed_abs"``, ``"snip"``, ``"snip_momentum"``, ``"taylor"``,
            ``"fisher"``, ``"wanda"`` or ``"random"``; by it magnitude and const prune, and set and
            rigl drop. Const looks at a few batches for it, and has ``"obs"``, optimal brain
            surgeon, too.
        block_reduction: of it over a block: ``"mean"``, ``"max"``, ``"sum"`` or ``"l2"``.
        pool: of magnitude and const: ``"global"``, ``"weight"`` or ``"row"``; None: the library's
            default.
        initial_masks: of set and rigl: ``"importance"`` or ``"random"``.
        distribution: of the level over the layers: ``"erk"``, ``"uniform"``, and of magnitude
            and const ``"owl"``; None: the library's default.
        minimum_level, maximum_level: of magnitude, set and rigl: how far each weight is pruned at
            least and at most; None: the library's defaults.
        alpha: of set and rigl: fraction of the kept groups that moves at the first update.
        delta_t: of set and rigl: steps between two updates; None: a twentieth of the ramp.
        growth: of rigl: ``"gradient"`` or ``"normed_gradient"``.
        score_lr: of rb and movement: peak learning rate of the scores, without weight decay.
        regularization: of movement without a level: factor of its loss.
        scope, ignore: target and ignored scopes.
        distill_weight: share in the loss of what is learned of the dense model, in [0, 1].
        temperature: by which logits are divided for it.
        epochs: of the sparse training.
        batch_size: examples in a step.
        lr: peak learning rate.
        eval_batches: how many of the held-out batches count.
        save_every: steps between two saves of the state.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        dtype: ``"float32"``, or ``"bfloat16"``: matrix products in bfloat16 by autocast, weights
            and optimiser in float32.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        dispatch: which layers skip pruned blocks: ``"auto"`` (where it is faster), ``"sparse"``
            or ``"dense"``.
        threads: of torch on the CPU; None: as many as torch takes.
        seed: of all that is random, the order of the data for one.
    """

    algorithm: str = "magnitude"
    pattern: str = "block:16x16"
    level: float | None = None
    initial_level: float = 0.0
    schedule: str = "polynomial"
    ramp: float | None = None
    importance: str = "normed_abs"
    block_reduction: str = "mean"
    pool: str | None = None
    initial_masks: str = "importance"
    distribution: str | None = None
    minimum_level: float | None = None
    maximum_level: float | None = None
    alpha: float = 0.3
    delta_t: int | None = None
    growth: str = "gradient"
    score_lr: float | None = 0.1
    regularization: float = 0.1
    scope: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    distill_weight: float = 0.5
    temperature: float = 2.0
    epochs: float | None = None
    batch_size: int | None = None
    lr: float | None = None
    eval_batches: int | None = None
    save_every: int = 50
    device: str = "auto"
    dtype: str = "float32"
    backend: str = "auto"
    dispatch: str = "auto"
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Options(RunOptions):
    """All that a built-in task's result depends on, the data apart. None: the task's own default.

    Attributes:
        task: ``"stdlib-lm"``, ``"stdlib-lm-wide"``, ``"digits"`` or ``"minilm"``.
        scope: None: the task's own, without embedding, norms and head.
        dense_epochs: of the dense training. With a checkpoint the default is none.
        steps_per_epoch: optimiser steps in an epoch.
        dense_lr: peak learning rate of the dense training.
        permute: reorder hidden features before the sparse training, so that blocks keep more.
        checkpoint: a safetensors file to start from.
        teacher: a safetensors file of a dense model, whose logits the sparse training learns too.
    """

    task: str = "stdlib-lm"
    dense_epochs: int | None = None
    steps_per_epoch: int | None = None
    dense_lr: float | None = None
    permute: bool = False
    checkpoint: str | None = None
    teacher: str | None = None


_Run = TypeVar("_Run", bound=RunOptions)


def checked(options: _Run) -> _Run:
    """Return ``options`` with pattern, level, device and threads spelled out.

    Raises:
        ValueError: an option is unknown or out of its range, or the backend cannot run there.
    """
    check_values(options)
    import torch

    from ...kernels.launch import use_triton

    device = find_device(options.device)
    try:
        use_triton("finetune", options.backend, torch.empty(0, device=device))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return replace(
        options,
        pattern=spell_pattern(parse_pattern(options.pattern)),
        level=end_level(options),
        device=str(device),
        threads=options.threads or torch.get_num_threads(),
    )


def check_values(options: RunOptions) -> None:
    """Check each option, and what goes with what, without a look at the machine.

    Raises:
        ValueError: an option is unknown or out of its range.
    """
    pattern = parse_pattern(options.pattern)
    options = replace(options, level=end_level(options))
    check_device(options.device)
    for name, choices in (
        ("task", TASKS),
        ("algorithm", ALGORITHMS),
        ("schedule", ("polynomial", "exponential", "multistep", "adaptive")),
        ("importance", IMPORTANCE),
        ("block_reduction", REDUCTIONS),
        ("pool", (None, *POOLS)),
        ("initial_masks", ("importance", "random")),
        ("distribution", (None, "erk", "uniform", "owl")),
        ("growth", ("gradient", "normed_gradient")),
        ("dtype", ("float32", "bfloat16")),
        ("backend", ("auto", "triton", "torch")),
        ("dispatch", ("auto", "sparse", "dense")),
    ):
        # a recipe has no task
        if (value := getattr(options, name, choices[0])) not in choices:
            raise ValueError(
                f"{name.replace('_', '-')} must be one of {', '.join(filter(None, choices))}, "
                f"got {value!r}"
            )
    for name, fits, what in (
        ("level", lambda x: 0 <= x < 1, "in [0, 1)"),
        ("initial_level", lambda x: 0 <= x <= (options.level or 0), "from 0 to the level"),
        ("minimum_level", lambda x: 0 <= x < 1, "in [0, 1)"),
        ("maximum_level", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("ramp", lambda x: 0 < x <= 1, "in (0, 1]"),
        ("alpha", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("delta_t", lambda x: 1 <= x < END, "from 1 to 2^31 - 1"),
        ("score_lr", lambda x: 0 < x < math.inf, "positive and finite"),
        ("regularization", lambda x: 0 <= x < math.inf, "at least 0 and finite"),
        ("distill_weight", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("temperature", lambda x: 0 < x < math.inf, "positive and finite"),
        ("dense_epochs", lambda x: 0 <= x < END, "from 0 to 2^31 - 1"),
        ("epochs", lambda x: 1 <= x < END, "from 1 to 2^31 - 1"),
        ("steps_per_epoch", lambda x: 1 <= x < END, "from 1 to 2^31 - 1"),
        ("batch_size", lambda x: 1 <= x < END, "from 1 to 2^31 - 1"),
        ("dense_lr", lambda x: 0 < x < math.inf, "positive and finite"),
        ("lr", lambda x: 0 < x < math.inf, "positive and finite"),
        ("eval_batches", lambda x: 1 <= x < END, "from 1 to 2^31 - 1"),
        ("save_every", lambda x: 1 <= x < END, "from 1 to 2^31 - 1"),
        ("threads", lambda x: 1 <= x < END, "from 1 to 2^31 - 1"),
        ("seed", lambda x: 0 <= x < 2**63, "from 0 to 2^63 - 1"),
    ):
        value = getattr(options, name, None)
        if value is not None and not fits(value):
            raise ValueError(f"{name.replace('_', '-')} must be {what}, got {value!r}")
    if options.algorithm == "const" and options.importance in SUMMED:
        raise ValueError(
            f"importance {options.importance} adds up the steps of a training, and const prunes "
            "before it; snip and taylor look at a few batches"
        )
    if options.importance == "obs" and options.algorithm != "const":
        raise ValueError(
            "importance obs prunes once, before training: it is for algorithm const, got "
            f"{options.algorithm!r}"
        )
    if isinstance(options, Options) and options.teacher is None:
        for name in ("distill_weight", "temperature"):
            if (value := getattr(options, name)) != getattr(Options, name):
                raise ValueError(
                    f"{name.replace('_', '-')} is of what a teacher is learned by, got {value!r}; "
                    "give teacher too"
                )
    elif isinstance(options, Options) and options.task == "minilm":
        raise ValueError(
            "teacher must be left out with task minilm, which has no logits and learns from its "
            f"dense self, got {options.teacher!r}"
        )
    if getattr(options, "permute", False) and not (isinstance(pattern, Block) and options.level):
        raise ValueError(
            f"permute is for a pattern of blocks and a level, got {options.pattern} and "
            f"{options.level!r}"
        )
    if isinstance(pattern, NM) and options.algorithm not in WITH_NM:
        raise ValueError(
            f"algorithm must be one of {', '.join(WITH_NM)} with pattern {options.pattern}, "
            f"got {options.algorithm!r}"
        )
    if options.level is not None and not is_reachable(options.level, [pattern]):
        raise ValueError(
            f"level must be at most 1 - n/m = {maximum_level(pattern):g} with pattern "
            f"{options.pattern}, got {options.level!r}"
        )
    if options.importance in GRADIENT_OR_INPUT:
        starts = options.algorithm == "magnitude" and options.initial_level > 0
        if options.algorithm in ("set", "rigl"):
            starts = options.initial_masks == "importance" and options.level != 0
        if starts:
            raise ValueError(
                f"importance {options.importance} has nothing to judge the first masks by; start "
                f"from {'initial-level 0' if options.algorithm == 'magnitude' else 'random masks'}"
            )


def with_defaults(options: Options, recipe: Recipe) -> Options:
    """Return ``options`` with the task's defaults in the place of None."""
    defaults = asdict(recipe) | ({"dense_epochs": 0} if options.checkpoint else {})
    defaults |= {"level": end_level(options)}
    missing = {k: v for k, v in defaults.items() if getattr(options, k) is None}
    return replace(options, **missing)


def end_level(options: RunOptions) -> float | None:
    """Return the level that is asked for, or by default 0.8, or all that N:M can express.

    Movement without one is soft.
    """
    if options.level is not None or options.algorithm == "movement":
        return options.level
    pattern = parse_pattern(options.pattern)
    return maximum_level(pattern) if isinstance(pattern, NM) else 0.8


def same_run(
    saved: _Run, asked: _Run, given: Collection[str], check: Callable[[_Run], _Run] = checked
) -> _Run:
    """Return the saved options, if nothing that was asked for explicitly differs from them.

    Args:
        saved: of the run to resume.
        asked: of this call.
        given: names of the options that the user gave.
        check: spells options out.

    Raises:
        ValueError: an option differs; the message names it and both values.
    """
    wanted = {name: getattr(asked, name) for name in given}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    merged = check(replace(saved, **wanted))
    for name in wanted:
        before, now = getattr(saved, name), getattr(merged, name)
        if before != now:
            raise ValueError(
                f"the run to resume has {name.replace('_', '-')} {before!r}, got {now!r}; leave "
                "the option out, or start another run"
            )
    return merged
