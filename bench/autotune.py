"""The job ``autotune``: the best tiles of the block-sparse kernels, and where sparsity pays.

Tiles are found by descent: from the tile that ``tiles.py`` would take, one field is changed at a
time, and a faster tile becomes the new start. Tiles that cannot fit the device, or that read much
more from the L2, are not tried; a tile that three runs show to be slow is dropped. Each is checked
before it is timed. The kernel with warps of two kinds is one of a tile's fields, and is tried in a
process of its own that is ended if it does not return.

Break-even densities are found by bisection, each against the dense product measured just before.
Without Triton there are no tiles; then the densities are those of the plain-torch path.

What was found is written after every step, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..kernels import tiles, tuning
from ..kernels.launch import INTERPRET, Backend, use_triton
from ..kernels.pattern import Block
from ..kernels.tiles import Tile, device_of
from .autotune_tiles import OPERATION, descend, usable
from .measure.apart import apart
from .measure.counts import intensity, tiles_of
from .measure.files import claim_file, write_atomic
from .measure.operands import Operands
from .measure.operations import operand_cases
from .measure.options import check_options
from .measure.progress import Advance
from .measure.record import command, dump, environment
from .measure.shapes import Shape, parse_shapes
from .measure.spelling import find_device, parse_blocks
from .measure.threads import set_threads
from .measure.timing import measure

GIVE_UP = 1.1
LEAST_INTENSITY = 0.6  # of the usual tile's
TRIAL = 240.0  # seconds that a tile may take in a process of its own, compilation and all
LOWEST, STEPS = 0.02, 5  # of the search for a break-even density


@dataclass(frozen=True)
class Search:
    """What to tune.

    Attributes:
        shapes, blocks, dtypes: each with each.
        level: at which tiles are compared; they do not depend on it.
        device, backend: where.
        candidates: tiles to try for each direction, at most.
        budget: seconds of timed runs of each measurement.
        output: the table's file.
        force: measure anew what the file has.
    """

    shapes: tuple[Shape, ...]
    blocks: tuple[Block, ...]
    dtypes: tuple[torch.dtype, ...]
    level: float
    device: torch.device
    backend: Backend
    candidates: int
    budget: float
    output: Path
    force: bool


def make_search(
    *,
    shapes: str | None = None,
    tokens: int | None = None,
    patterns: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    level: float | None = None,
    device: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    candidates: int | None = None,
    budget: float | None = None,
    output: Path | None = None,
    force: bool = False,
) -> Search:
    """Return the search that a command line spells; None takes what suits the device.

    Raises:
        ValueError: an option is unknown or out of its range, or the output is another file.
        OSError: a file cannot be read or written.
    """
    check_options(
        shapes=shapes,
        blocks=patterns,
        levels=None if level is None else [level],
        dtypes=dtypes,
        device=device,
        backend=backend,
        budget=budget,
        tokens=tokens,
        threads=threads,
        candidates=candidates,
    )
    place = find_device(device or "auto")
    gpu = place.type == "cuda"
    try:
        triton_runs = use_triton("autotune", backend or "auto", torch.empty(0, device=place))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    level = 0.8 if level is None else level
    blocks = parse_blocks(patterns or [f"block:{s}" for s in (256, 128, 64, 32)])
    kinds = dtypes or ("bfloat16" if gpu else "float32",)
    found = parse_shapes(
        shapes or ("llama3-8b" if gpu else "tiny"), tokens or (8192 if gpu else 256)
    )
    if output is None:
        if gpu and not triton_runs:
            raise ValueError(
                "autotune: output must be given with backend 'torch' on a GPU, where the table in "
                "the user's cache is the kernels'"
            )
        if INTERPRET:
            raise ValueError(
                "autotune: output must be given with Triton's interpreter: its times are not "
                "to be used"
            )
        output = tuning.user_file(tuning.device_name(place))
        if output is None:
            raise ValueError("autotune: output must be given where platformdirs is not installed")
        output.parent.mkdir(parents=True, exist_ok=True)
    elif output.exists() and not _is_table(output):
        raise ValueError(f"output must be a tuning table or a new file, got {output}")
    claim_file(output)
    if threads:
        set_threads(threads)
    return Search(
        shapes=found,
        blocks=blocks,
        dtypes=tuple(tuning.DTYPES[kind] for kind in kinds),
        level=level,
        device=place,
        backend="triton" if triton_runs else "torch",
        candidates=candidates or 16,
        budget=budget or (0.05 if gpu else 0.1),
        output=output,
        force=force,
    )


def _is_table(path: Path) -> bool:
    """Tell whether a file is empty or some tuning table, stale or damaged ones included."""
    content = path.read_bytes()
    return not content or content.startswith(b'{\n "format": ')


def autotune(search: Search, progress: Advance, warn: Callable[[str], None]) -> Mapping[str, Any]:
    """Search, and write the table after every step.

    Args:
        search: what, where, how long.
        progress: is told of every step.
        warn: is told if the file's old content is of no use.

    Returns:
        The table as it was written.

    Raises:
        ValueError: a result was wrong, or a kernel failed; everything else was measured.
        OSError: the file cannot be written.
    """
    content = _start(search, warn)
    jobs, failed = list(_jobs(search)), []
    for i, (shape, block, dtype, direction) in enumerate(jobs, 1):
        name = "break_even" if direction is None else "tiles"
        head = {
            "weight": list(shape.weight),
            "block": [block.rows, block.cols],
            "dtype": str(dtype).removeprefix("torch."),
        }
        if direction is not None:
            head = {"direction": direction} | head
        found = next((row for row in content[name] if head.items() <= row.items()), None)
        if found is None:
            try:
                if direction is None:
                    found = _break_even_row(head, search, shape, block, dtype, content)
                else:
                    found = _tile_row(head, search, shape, block, dtype, direction)
            except ValueError as error:
                failed.append(str(error))
            else:
                content[name].append(found)
                write_atomic(search.output, dump(content))
        note = f"{shape} {block} {direction or 'break-even'}"
        progress("autotune", i, len(jobs), note)
    tuning.table.cache_clear()
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(jobs)} could not be measured, the others are in "
            f"{search.output}; the first: {failed[0]}"
        )
    return content


def _jobs(search: Search) -> Iterator[tuple[Shape, Block, torch.dtype, str | None]]:
    for shape in search.shapes:
        for dtype in search.dtypes:
            for block in search.blocks:
                # exact float32 has one tile, which its register use dictates
                if search.backend == "triton" and dtype.itemsize == 2:
                    for direction in tuning.DIRECTIONS:
                        yield shape, block, dtype, direction
                yield shape, block, dtype, None


def _start(search: Search, warn: Callable[[str], None]) -> dict[str, Any]:
    """Return the file's content to go on with, or an empty table."""
    wanted = tuning.identity(search.device, search.backend)
    if search.output.exists() and search.output.stat().st_size and not search.force:
        try:
            content = tuning.read(search.output, wanted)
            _check_figures(content)
            return dict(content)
        except ValueError as error:
            warn(f"tuning table {search.output} is replaced: {error}")
    where = environment(search.device, search.backend)
    return {
        "format": tuning.FORMAT,
        **wanted._asdict(),
        **{name: where[name] for name in ("torch", "threads", "version", "commit", "date")},
        "command": command(),
        "tiles": [],
        "break_even": [],
    }


def _check_figures(content: Mapping[str, Any]) -> None:
    """Refuse rows without the figures that kernels have no use for, and a report of them has."""
    for part, names in (
        ("tiles", ("tokens", "seconds", "default_seconds", "tried")),
        ("break_even", ("tokens",)),
    ):
        for row in content[part]:
            for name in names:
                value = row.get(name)
                if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
                    raise ValueError(
                        f"each of its {part} must have a positive {name}, got {value!r:.60}"
                    )


def _operands(
    search: Search, shape: Shape, block: Block, dtype: torch.dtype, level: float
) -> Operands:
    return Operands(shape, block, level, "random", dtype, search.device, search.backend)


def _built(operands: Operands, direction: str) -> Any:
    (case,) = operand_cases(operands, [OPERATION[direction]])
    return case.build()


def _tile_row(
    head: dict[str, Any],
    search: Search,
    shape: Shape,
    block: Block,
    dtype: torch.dtype,
    direction: str,
) -> dict[str, Any]:
    operands = _operands(search, shape, block, dtype, search.level)
    key = direction, shape.weight, block, dtype
    tiles.measured.pop(key, None)
    operation, device = OPERATION[direction], search.device
    # the kernels' own, not what an earlier search found
    start, *others = tiles_of(operation, shape.weight, block, dtype, device)
    built = _built(operands, direction)

    def time(tile: Tile, best: float | None) -> float | None:
        if tile.specialised:
            # its warps wait for one another: a fault in that would be a launch without an end
            return apart(_trial, search, shape, block, dtype, direction, tile, best, limit=TRIAL)
        try:
            return _time(built, search, key, tile, best)
        # a tile that does not compile or fit is no candidate, for whatever reason
        except Exception as error:
            if best is None:
                what = f"{shape} {block} {direction}"
                raise ValueError(
                    f"autotune: {what}: the kernel's own tile {tile} fails: {error}"
                ) from error
            return None

    fits = partial(
        usable,
        direction=direction,
        shape=shape.weight,
        block=block,
        device=device_of(operands.weight),
        size=dtype.itemsize,
        specialise=device.type == "cuda",
        least=LEAST_INTENSITY * intensity(operation, start, dtype.itemsize),
    )
    best, seconds, tried = descend(start, fits, time, search.candidates, others)
    return head | {
        "tile": best._asdict(),
        "tokens": shape.tokens,
        "seconds": seconds,
        "default_seconds": tried[start],
        "tried": len(tried),
    }


def _trial(
    search: Search,
    shape: Shape,
    block: Block,
    dtype: torch.dtype,
    direction: str,
    tile: Tile,
    best: float | None,
) -> float | None:
    """Return a tile's seconds; on operands of its own, for a process of its own."""
    built = _built(_operands(search, shape, block, dtype, search.level), direction)
    return _time(built, search, (direction, shape.weight, block, dtype), tile, best)


def _time(
    built: Any, search: Search, key: tuning.TileKey, tile: Tile, best: float | None
) -> float | None:
    """Return a tile's seconds, None if its result is wrong and it is not the first."""
    tiles.measured[key] = tile
    try:
        if (problem := built.check()) is not None:
            if best is None:
                raise ValueError(problem)
            return None
        give_up = None if best is None else GIVE_UP * best
        timing = measure(built.run, search.device, budget=search.budget, least=3, give_up=give_up)
        return timing.median
    finally:
        del tiles.measured[key]


def _break_even_row(
    head: dict[str, Any],
    search: Search,
    shape: Shape,
    block: Block,
    dtype: torch.dtype,
    content: Mapping[str, Any],
) -> dict[str, Any]:
    dense: dict[str, float] = {}
    sparse: dict[tuple[str, float], float] = {}

    def times(directions: Sequence[str], density: float) -> tuple[float, float]:
        """Return the seconds of sparse and dense products at a density."""
        for direction in directions:
            if (direction, density) in sparse:
                continue
            built = _built(_operands(search, shape, block, dtype, 1 - density), direction)
            if problem := built.check():
                raise ValueError(f"autotune: {shape} {block} {direction}: {problem}")
            sparse[direction, density] = measure(
                built.run, search.device, budget=search.budget
            ).median
            again = measure(built.dense, search.device, budget=search.budget).median
            dense[direction] = min(again, dense.get(direction, again))
        return (
            sum(sparse[direction, density] for direction in directions),
            sum(dense[direction] for direction in directions),
        )

    with _tiles_of(content):
        found = {d: crossing(partial(times, [d])) for d in tuning.DIRECTIONS}
        found["total"] = crossing(partial(times, tuning.DIRECTIONS))
    return head | {"tokens": shape.tokens} | found


def crossing(times: Callable[[float], tuple[float, float]]) -> float:
    """Return the highest density found at which sparse is not slower than dense.

    Args:
        times: density -> seconds of sparse and dense work.

    Returns:
        From 0, if sparse is slower even at 2 % density, to 1.
    """

    def pays(density: float) -> bool:
        sparse, dense = times(density)
        return sparse <= dense

    if pays(1.0):
        return 1.0
    if not pays(LOWEST):
        return 0.0
    low, high = LOWEST, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


@contextmanager
def _tiles_of(content: Mapping[str, Any]) -> Iterator[None]:
    """Let the kernels use the tiles found so far."""
    found = tuning.parse(content).tiles
    before = dict(tiles.measured)
    tiles.measured.update(found)
    try:
        yield
    finally:
        tiles.measured.clear()
        tiles.measured.update(before)
