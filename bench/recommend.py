"""The job ``autotune --recommend``: which sparsity block for a model at a level.

A larger block runs faster and keeps less of what matters: the larger the blocks, the more large
weights share one with small ones. The magnitude kept is exact, of the masks that magnitude pruning
over one pool of all weights would give. The speed-up is that of forward and both gradients of all
weights together, each product dense where that is faster: measured on a GPU, elsewhere modelled.

Recommended is the block that keeps most among those whose speed-up is at least 80 % of the best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.bits import expand_mask
from ..kernels.block_score import block_score
from ..kernels.launch import Backend, use_triton
from ..kernels.mask import make_mask
from ..kernels.pattern import Block, Pattern, Unstructured, grid_shape
from ..kernels.select import select
from .measure.charts import pareto
from .measure.files import write_atomic
from .measure.model import H200, ModelledDevice, dense_time, sparse_time
from .measure.operands import Operands
from .measure.operations import operand_cases
from .measure.options import PRODUCTS, check_options
from .measure.progress import Advance
from .measure.record import dump, environment
from .measure.shapes import Shape, matrices
from .measure.spelling import find_device, parse_blocks, spell_pattern
from .measure.tables import faster
from .measure.threads import set_threads
from .measure.timing import measure

NEAR_BEST = 0.8
CANDIDATES = tuple(f"block:{side}" for side in (16, 32, 64, 128, 256))
MODELLED_BASIS = f"modelled for an {H200.name}, not measured"  # for machines without a GPU


def recommend(
    model: Path,
    *,
    level: float | None = None,
    patterns: Sequence[str] | None = None,
    tokens: int | None = None,
    device: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    budget: float | None = None,
    progress: Advance,
) -> dict[str, Any]:
    """Weigh the speed-up of each candidate block against the magnitude that it keeps.

    Args:
        model: a safetensors file, or a folder as ``save_pretrained`` writes it.
        level: fraction of the blocks to prune, in (0, 1).
        patterns: candidates, as on the command line.
        tokens: through each weight.
        device, backend, threads, budget: as of ``autotune``.
        progress: is told of every step.

    Returns:
        The record: a row a candidate, and which is recommended.

    Raises:
        ValueError: an option or the file does not fit; OSError: it cannot be read.
    """
    check_options(
        blocks=patterns,
        levels=None if level is None else [level],
        device=device,
        backend=backend,
        budget=budget,
        tokens=tokens,
        threads=threads,
    )
    level = 0.8 if level is None else level
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1) to recommend a block, got {level}")
    blocks = parse_blocks(patterns or CANDIDATES)
    place = find_device(device or "auto")
    try:
        triton_runs = use_triton("autotune", backend or "auto", torch.empty(0, device=place))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    if threads:
        set_threads(threads)
    kind: Backend = "triton" if triton_runs else "torch"

    weights = []
    for name, matrix in matrices(model):
        if not matrix.isfinite().all():
            raise ValueError(f"{model} must hold finite weights, {name!r} has NaN or infinity")
        weights.append(matrix.to(place))
    shapes = Counter(Shape(tokens or 8192, w.shape[1], w.shape[0]) for w in weights)
    measured = place.type == "cuda"
    basis = f"measured, {tokens or 8192} tokens" if measured else MODELLED_BASIS
    rows: list[dict[str, Any]] = []
    candidates: list[Pattern] = [Unstructured(), *blocks]
    for i, pattern in enumerate(candidates, 1):
        l1, l2 = magnitude_kept(weights, pattern, level, kind)
        speedup = None
        if isinstance(pattern, Block):
            speedup = (
                _measured(shapes, pattern, level, place, kind, budget or 0.05)
                if measured
                else modelled_speedup(shapes, pattern, level, H200)
            )
        rows.append(
            {
                "pattern": spell_pattern(pattern),
                "l1_kept": l1,
                "l2_kept": l2,
                "speedup": speedup,
                "basis": basis if speedup is not None else "no kernel skips single weights",
            }
        )
        progress("recommend", i, len(candidates), str(pattern))
    best = choose(rows)
    return environment(place, kind) | {
        "model": model.resolve().name,
        "level": level,
        "weights": len(weights),
        "parameters": sum(w.numel() for w in weights),
        "basis": basis,
        "recommended": best["pattern"],
        "sentence": sentence(best, rows, level, basis),
        "rows": rows,
    }


def magnitude_kept(
    weights: Sequence[Tensor], pattern: Pattern, level: float, backend: Backend
) -> tuple[float, float]:
    """Return the fractions of the L1 and the L2 norm of all weights that masks at a level keep."""
    if isinstance(pattern, Unstructured):
        scores, squares = list(weights), None
    else:
        scores = [block_score(w, pattern, backend=backend) for w in weights]
        squares = [block_score(w, pattern, norm="l2", backend=backend) for w in weights]
    threshold = select(scores, round(level * sum(s.numel() for s in scores)), backend=backend)
    packed = isinstance(pattern, Unstructured)
    masks = make_mask(scores, threshold, packed=packed, backend=backend)
    kept, total = [0.0, 0.0], [0.0, 0.0]
    for i, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        if squares is None:
            keep = expand_mask(mask, pattern, weight.shape, backend=backend)
            values = weight.float().abs()
            parts = values, values.square()
        else:
            sizes = _block_sizes(weight, pattern)
            keep, parts = mask, (scores[i] * sizes, squares[i] * sizes)
        for norm, part in enumerate(parts):
            total[norm] += part.sum(dtype=torch.float64).item()
            kept[norm] += part.masked_fill(~keep, 0).sum(dtype=torch.float64).item()
    if not total[0]:
        return 0.0, 0.0
    return kept[0] / total[0], (kept[1] / total[1]) ** 0.5


def _block_sizes(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return how many elements each block has."""
    rows, cols = grid_shape(pattern, (weight.shape[0], weight.shape[1]))
    heights, widths = (
        (side - torch.arange(count, device=weight.device) * block).clamp(max=block)
        for side, count, block in (
            (weight.shape[0], rows, pattern.rows),
            (weight.shape[1], cols, pattern.cols),
        )
    )
    return heights[:, None] * widths


def modelled_speedup(
    shapes: Counter[Shape], block: Block, level: float, device: ModelledDevice
) -> float:
    """Return dense over sparse time of all weights' products, as the model of the device says."""
    dense = sparse = 0.0
    for shape, count in shapes.items():
        for name in PRODUCTS:
            usual = dense_time(name, shape, device)
            skipping = sparse_time(name, shape, block, level, device).time
            dense += count * usual
            sparse += count * min(skipping, usual)
    return dense / sparse


def _measured(
    shapes: Counter[Shape],
    block: Block,
    level: float,
    device: torch.device,
    backend: Backend,
    budget: float,
) -> float:
    """Return dense over sparse time of all weights' products; a wrong result raises."""
    dense = sparse = 0.0
    for shape, count in shapes.items():
        operands = Operands(shape, block, level, "random", torch.bfloat16, device, backend)
        for case in operand_cases(operands, PRODUCTS):
            built = case.build()
            if problem := built.check():
                raise ValueError(f"recommend: {shape} {block} {case.operation}: {problem}")
            assert built.dense is not None
            skipping = measure(built.run, device, budget=budget).median
            usual = measure(built.dense, device, budget=budget).median
            dense += count * usual
            sparse += count * min(skipping, usual)
    return dense / sparse


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row that keeps most among those nearly as fast as the fastest."""
    fast = [row for row in rows if row["speedup"] is not None]
    limit = NEAR_BEST * max(row["speedup"] for row in fast)
    return max((row for row in fast if row["speedup"] >= limit), key=lambda row: row["l1_kept"])


def sentence(
    best: dict[str, Any], rows: Sequence[dict[str, Any]], level: float, basis: str
) -> str:
    """Return the recommendation in one line."""
    bound = next(row for row in rows if row["pattern"] == "unstructured")
    return (
        f"take {best['pattern']} at {100 * level:g} %: {faster(best['speedup'])} ({basis}) and "
        f"{100 * best['l1_kept']:.1f} % of the L1 norm, of {100 * bound['l1_kept']:.1f} % that "
        "no pattern can exceed"
    )


def save(record: dict[str, Any], folder: Path) -> None:
    """Write the record and its picture.

    Raises:
        OSError: a file cannot be written.
    """
    write_atomic(folder / "recommend.json", dump(record))
    write_atomic(folder / "pareto.png", pareto(record))
