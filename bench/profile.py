"""The job ``profile``: what each kernel achieves here, against what the device can do.

Every result is checked before it is timed. What fails the check is shown as failed and has no
speed.
"""

from __future__ import annotations

import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..kernels import tuning
from ..kernels.launch import Backend, use_triton
from ..kernels.pattern import NM, Pattern, is_skippable, maximum_level
from .measure.apart import start_quietly
from .measure.cases import Built, Case, Outcome, first_line, measure_case, to_row
from .measure.ceilings import Ceilings, highest, measure_ceilings
from .measure.charts import roofline, speedups
from .measure.files import write_atomic
from .measure.operands import Operands
from .measure.operations import operand_cases
from .measure.options import OPERATIONS, check_options
from .measure.progress import Advance
from .measure.record import Row, dump, environment, to_csv
from .measure.shapes import Shape, parse_shapes, spell_shapes
from .measure.spelling import find_device, parse_pattern, spell_pattern
from .measure.steps import model_cases
from .measure.threads import set_threads
from .measure.timing import overhead

PASSES = 5
IDLE = 1.1  # passes on an idle machine differ by less
LEVEL_BOUND = ("score", "select", "mask", "topology", "pack")
"""Operations whose time does not depend on the level, or hardly: measured at one."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: of the weights.
        patterns, levels: each with each.
        mask: ``"random"`` or ``"skewed"``, for operations on one weight.
        operations: of ``options.OPERATIONS``.
        dtype: of weights and activations.
        device, backend: where and how.
        budget: seconds of timed runs of each operation in a pass.
        passes: how often everything is set up and timed, each time in a process of its own. What
            a minute of the machine, or where memory happens to lie, does to a time is then in its
            spread.
    """

    shapes: tuple[Shape, ...]
    patterns: tuple[Pattern, ...]
    levels: tuple[float, ...]
    mask: str
    operations: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    budget: float
    passes: int


def make_plan(
    *,
    shapes: str | None = None,
    tokens: int | None = None,
    patterns: Sequence[str] | None = None,
    levels: Sequence[float] | None = None,
    mask: str | None = None,
    operations: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    budget: float | None = None,
    passes: int | None = None,
) -> Plan:
    """Return the plan that a command line spells; None takes what suits the device.

    Raises:
        ValueError: an option is unknown or out of its range, or the backend cannot run there.
        OSError: a model file cannot be read.
    """
    check_options(
        shapes=shapes,
        patterns=patterns,
        levels=levels,
        operations=operations,
        mask=mask,
        dtypes=None if dtype is None else [dtype],
        device=device,
        backend=backend,
        budget=budget,
        tokens=tokens,
        threads=threads,
        passes=passes,
    )
    place = find_device(device or "auto")
    gpu = place.type == "cuda"
    try:
        triton_runs = use_triton("profile", backend or "auto", torch.empty(0, device=place))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    # each once, however often it was given
    levels = tuple(dict.fromkeys(levels or (0.5, 0.8, 0.9)))
    operations = tuple(dict.fromkeys(operations or OPERATIONS))
    dtype = dtype or ("bfloat16" if gpu else "float32")
    if threads:
        set_threads(threads)
    found = parse_shapes(
        shapes or ("llama3-8b" if gpu else "tiny"), tokens or (8192 if gpu else 256)
    )
    if patterns is None:
        patterns = (
            ("unstructured", "block:32", "block:128") if gpu else ("unstructured", "block:32")
        )
    return Plan(
        shapes=found,
        patterns=tuple(dict.fromkeys(parse_pattern(p) for p in patterns)),
        levels=levels,
        mask=mask or "random",
        operations=operations,
        dtype=getattr(torch, dtype),
        device=place,
        backend="triton" if triton_runs else "torch",
        budget=budget or (0.05 if gpu else 0.02),
        passes=passes or PASSES,
    )


def groups(plan: Plan) -> list[Callable[[], Iterator[Case]]]:
    """Return what is measured, in groups that share their operands and are set up one by one."""
    one_level = plan.levels[len(plan.levels) // 2]
    found: list[Callable[[], Iterator[Case]]] = []
    for shape, pattern, level in product(plan.shapes, plan.patterns, plan.levels):
        if isinstance(pattern, NM):
            # n:m fixes the level
            if level != one_level or not _divides(pattern, shape):
                continue
            level = maximum_level(pattern)
            found.append(partial(_operand_group, plan, shape, pattern, level, plan.operations))
            continue
        wanted = [o for o in plan.operations if level == one_level or o not in LEVEL_BOUND]
        found.append(partial(_operand_group, plan, shape, pattern, level, wanted))
    for pattern, level in product(plan.patterns, plan.levels):
        wanted = [o for o in plan.operations if level == one_level or o == "training step"]
        if isinstance(pattern, NM):
            if level != one_level or not all(_divides(pattern, shape) for shape in plan.shapes):
                continue
            level = maximum_level(pattern)
        found.append(
            partial(
                model_cases,
                plan.shapes, pattern, level, plan.dtype, plan.device, plan.backend, wanted,
            )
        )  # fmt: skip
    return found


def _divides(pattern: NM, shape: Shape) -> bool:
    return not any(a % b for a, b in zip(shape.weight, pattern.group, strict=True))


def _operand_group(
    plan: Plan, shape: Shape, pattern: Pattern, level: float, operations: Sequence[str]
) -> Iterator[Case]:
    operands = Operands(shape, pattern, level, plan.mask, plan.dtype, plan.device, plan.backend)
    try:
        cases = list(operand_cases(operands, operations))
    # no memory for a mask, or a kernel that cannot make it: the other groups are still measured
    except Exception as error:
        problem = error

        def fail() -> Built:
            raise problem

        head = "set-up", (shape,), plan.dtype, pattern, level, plan.mask
        cases = [Case(*head, bytes=0, flops=0, cache_bytes=None, build=fail)]
    yield from cases


Measured = list[tuple[Case, "Outcome"]]


def profile(plan: Plan, progress: Advance) -> dict[str, Any]:
    """Check and time everything in ``plan``.

    Args:
        plan: what and where. One pass takes place here, each of several in a process of its own:
            how fast it is depends on where its memory lies, too.
        progress: is told of every step.

    Returns:
        The record: where, ceilings, and a list of rows as dictionaries.

    Raises:
        ValueError: there is nothing to measure, or a pass could not go on.
    """
    todo = len(groups(plan))
    # one warning about a table that is no good, here rather than in every process
    tuning.table(plan.device)
    passes: list[tuple[Measured, Ceilings]] = []
    for turn in range(plan.passes):

        def advance(done: int, turn: int = turn) -> None:
            note = f"pass {turn + 1} of {plan.passes}"
            progress("profile", turn * todo + done, plan.passes * todo, note)

        run = one_pass if plan.passes == 1 else in_a_process
        # what was right once is right again, and what was wrong is not timed again
        earlier = [outcome for _, outcome in passes[0][0]] if passes else None
        passes.append(run(plan, earlier, advance))
    if len({len(measured) for measured, _ in passes}) > 1:
        raise ValueError("profile: passes differ in what could be set up: is there enough memory?")
    if not passes[0][0]:
        raise ValueError(
            "profile: nothing to measure, since no operation goes with these patterns and shapes: "
            f"{', '.join(plan.operations)} with {', '.join(map(str, plan.patterns))}"
        )
    # what the device can do is what it did at its best
    ceilings = highest([found for _, found in passes])
    rows = [
        to_row(same[0][0], [outcome for _, outcome in same], ceilings)
        for same in zip(*(measured for measured, _ in passes), strict=True)
    ]
    paces = pass_paces([measured for measured, _ in passes])
    return environment(plan.device, plan.backend) | {
        "notes": [*notes(plan), *unrest(paces)],
        "ceilings": ceilings._asdict(),
        "overhead_s": overhead(plan.device),
        "pass_paces": paces,
        "rows": [asdict(row) for row in rows],
    }


def one_pass(
    plan: Plan, earlier: Sequence[Outcome] | None, advance: Callable[[int], None]
) -> tuple[Measured, Ceilings]:
    """Set everything up, check it, and time what is right.

    Args:
        plan: what and where.
        earlier: what came of the first pass; None in the first, which alone checks.
        advance: is told how many groups are done.
    """
    ceilings = measure_ceilings(plan.device, [plan.dtype])
    measured: Measured = []
    before = iter(earlier or ())
    for done, group in enumerate(groups(plan), 1):
        for case in group():
            first = None if earlier is None else next(before, None)
            if first is not None and first.status != "ok":
                outcome = first
            else:
                outcome = measure_case(case, plan.device, plan.budget, check=earlier is None)
            measured.append((replace(case, build=_elsewhere), outcome))
        advance(done)
    return measured, ceilings


def _elsewhere() -> Built:
    raise RuntimeError("the case was set up and measured in another process")


def in_a_process(
    plan: Plan, earlier: Sequence[Outcome] | None, advance: Callable[[int], None]
) -> tuple[Measured, Ceilings]:
    """Do ``one_pass`` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe(duplex=False)
    arguments = (plan, earlier, torch.get_num_threads(), end)
    process = context.Process(target=_serve_pass, args=arguments, daemon=True)
    start_quietly(process)
    # else a process that dies is waited for for ever
    end.close()
    try:
        while not isinstance(message := pipe.recv(), tuple):
            advance(message)
    except EOFError:
        raise ValueError(
            "profile: the process of a pass died before it was done: is there enough memory?"
        ) from None
    finally:
        process.terminate()
        process.join()
    if isinstance(message[0], str):
        raise ValueError(f"profile: a pass could not go on: {message[0]}")
    return message


def _serve_pass(
    plan: Plan, earlier: Sequence[Outcome] | None, threads: int, pipe: Connection
) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message=tuning.IGNORED)
    # who started it may have been killed, and nobody hears it then
    with suppress(BrokenPipeError):
        try:
            pipe.send(one_pass(plan, earlier, pipe.send))
        except BrokenPipeError:
            raise
        except Exception as error:
            pipe.send((first_line(error),))


def pass_paces(passes: Sequence[Measured]) -> list[float]:
    """Return how long dense work took in each pass, 1 being its usual time.

    No change of ours explains a difference: it is the machine's.
    """
    ratios: list[list[float]] = []
    for same in zip(*passes, strict=True):
        dense = [outcome.dense.median for _, outcome in same if outcome.dense is not None]
        if len(dense) == len(passes):
            usual = statistics.median(dense)
            ratios.append([seconds / usual for seconds in dense])
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


def unrest(paces: Sequence[float]) -> list[str]:
    """Return a note if passes differ by more than those on an idle machine."""
    if not paces or max(paces) <= IDLE * min(paces):
        return []
    apart = max(paces) / min(paces)
    return [
        f"the machine was not idle: dense work took {apart:.2f} times as long in the slowest pass "
        "as in the fastest"
    ]


def write_trace(path: Path, plan: Plan, record: Mapping[str, Any]) -> None:
    """Write a trace of one more run of each operation, for chrome://tracing or Perfetto.

    It holds what set the operation up and warmed it, too; the run itself bears its name.

    Raises:
        ValueError: there is not enough memory.
    """
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as watch

    activities = [ProfilerActivity.CPU]
    if plan.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    rows = iter(record["rows"])
    try:
        with watch(activities=activities, acc_events=True) as trace:
            for case in (case for group in groups(plan) for case in group()):
                if next(rows)["status"] != "ok":
                    continue
                run = case.build().run
                run()
                shapes, pattern = spell_shapes(case.shapes), spell_pattern(case.pattern)
                with record_function(f"{case.operation} {shapes} {pattern} {case.level}"):
                    run()
                    if plan.device.type == "cuda":
                        torch.cuda.synchronize(plan.device)
        trace.export_chrome_trace(str(path))
    except torch.OutOfMemoryError:
        raise ValueError(f"profile: not enough memory to trace to {path}") from None


def notes(plan: Plan) -> list[str]:
    """Say what the figures are not, and what cannot be measured here."""
    lines = []
    if plan.device.type != "cuda" and plan.backend == "torch":
        lines.append(
            "no GPU: this is the plain-torch backend; Triton's kernels are not measured. What "
            "fits the CPU's caches can be faster than the copy ceiling"
        )
    elif plan.device.type != "cuda":
        lines.append("Triton's interpreter: its times say nothing of a GPU")
    for pattern, shape in product(plan.patterns, plan.shapes):
        if isinstance(pattern, NM) and not _divides(pattern, shape):
            lines.append(
                f"{spell_pattern(pattern)} does not divide {shape}: not measured, nor is a "
                "training step with it"
            )
    if not any(map(is_skippable, plan.patterns)):
        lines.append("no block of 16 or more a side: block-sparse products are not measured")
    return lines


def save(record: dict[str, Any], folder: Path) -> list[str]:
    """Write a record and its pictures to ``folder``; return the files' names.

    Raises:
        OSError: a file cannot be written.
    """
    write_atomic(folder / "profile.json", dump(record))
    write_atomic(folder / "profile.csv", to_csv([Row(**row) for row in record["rows"]], record))
    write_atomic(folder / "roofline.png", roofline(record))
    names = ["profile.json", "profile.csv", "roofline.png"]
    if any(row["speedup"] for row in record["rows"]):
        write_atomic(folder / "speedup.png", speedups(record))
        names.append("speedup.png")
    return names
