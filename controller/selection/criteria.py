"""Criteria: how important each element of a weight is. Functions of one signature.

A criterion sees the ``Evidence`` on one weight and returns its ``Importance``; the score of a
block is the mean over its elements, or another reduction. The pool decides what is compared with
what. A user's own criterion is a function of ``Evidence`` that returns a tensor: see ``Function``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from pydantic import PlainSerializer, PlainValidator
from torch import Tensor, nn

from ...kernels.bits import chunk_of, chunks
from ...kernels.block_score import block_score, block_scores
from ...kernels.grid import ceil_div, pad_to_blocks, side_lengths
from ...kernels.launch import Backend
from ...kernels.numbers import uniform_numbers
from ...kernels.pattern import Pattern, Unstructured
from ..masks.exchange import norms_of_all, pieces_here, whole_groups
from ..masks.names import canonical
from ..masks.shards import local_part
from ..masks.weight import SparseWeight
from .thresholds import Scores

Name = Literal["abs", "normed_abs", "snip", "snip_momentum", "taylor", "fisher", "wanda", "random"]
NAMES: tuple[str, ...] = get_args(Name)
Reduction = Literal["mean", "max", "sum", "l2"]

# to first order what a loss of 1 changes by and float32 does not show
ROUNDING = torch.finfo(torch.float32).eps


class Evidence(NamedTuple):
    """What a criterion may look at. All matrices are the weight's, (out, in). Of a sharded weight
    a user's function gets the full ones, as DTensors, and other criteria what is here.

    Attributes:
        name: the weight's, for messages, and to tell random numbers of several weights apart.
        weight: matrix.
        grid: groups of the full weight down and across.
        gradient: matrix, of the last backward pass; None if there was none.
        momentum: float32, the decaying sum over the steps that the criterion has: a matrix of
            |w g|, or of groups; None before the first.
        input_norm: float32, root mean square of each input: (in,), or a matrix where rows have
            inputs of their own; None before a calibration.
        seed: of random numbers.
        product: float32 matrix w g, of the last backward pass and the weight that it was of; None:
            the weight has not moved since.
        pattern: of a group; ``Unstructured`` under N:M too, whose groups are made of elements.
        groups: what of the grid is chosen among here; the rest is on other ranks.
    """

    name: str
    weight: Tensor
    grid: tuple[int, int]
    gradient: Tensor | None = None
    momentum: Tensor | None = None
    input_norm: Tensor | None = None
    seed: int = 0
    product: Tensor | None = None
    pattern: Pattern = Unstructured()
    groups: tuple[slice, slice] = (slice(None), slice(None))


class Importance(NamedTuple):
    """How important the elements are: ``|values|``."""

    values: Tensor  # matrix; the weight itself where that will do, so that no copy is made
    normed: bool = False  # divided by its norm, or where that is 0 by 1
    per_group: bool = False  # one value a group


Criterion = Callable[[Evidence], Importance]

# A user's own: returns a tensor of the weight's shape (out, in), whose magnitudes are reduced over
# each block, or of the grid of groups. An attribute ``needs`` may name what the callbacks of
# ``integrations`` are to gather for it before its first update: "inputs", "gradients".
Function = Callable[[Evidence], Tensor]
WeightImportance = Name | Function


def _check_importance(given: Any) -> Any:
    if callable(given) or given in NAMES:
        return given
    raise ValueError(
        f"must be {', '.join(map(repr, NAMES[:-1]))} or {NAMES[-1]!r}, or a function of Evidence "
        f"that returns a tensor, got {given!r}"
    )


def _spell_importance(given: Any) -> str:
    return given if isinstance(given, str) else f"{given.__module__}.{called(given)}"


def called(function: Any) -> str:
    """Return the name of a user's criterion."""
    return getattr(function, "__qualname__", type(function).__qualname__)


ImportanceField = Annotated[
    WeightImportance,
    PlainValidator(_check_importance),
    PlainSerializer(_spell_importance, when_used="json"),
]


def magnitude(evidence: Evidence) -> Importance:
    """|w|."""
    return Importance(evidence.weight)


def normed_magnitude(evidence: Evidence) -> Importance:
    """|w| / ||w||_2, the norm of the whole tensor (NNCF's ``normed_abs``); of zeros, 0."""
    return Importance(evidence.weight, normed=True)


def snip(evidence: Evidence) -> Importance:
    """|w g|, what the loss changes by, to first order, without the weight.

    Lee et al., https://arxiv.org/abs/1810.02340; g is of the last backward pass, and w the weight
    that it was of.

    Raises:
        RuntimeError: there is no gradient.
    """
    return Importance(slope("snip", evidence))


def taylor(evidence: Evidence) -> Importance:
    """|sum w g| of a group: what the loss changes by, to first order, without the group.

    Molchanov et al., https://arxiv.org/abs/1906.10771, who square it; g as in ``snip``.

    Raises:
        RuntimeError: there is no gradient.
    """
    return Importance(group_sums(slope("taylor", evidence), evidence.pattern), per_group=True)


def fisher(evidence: Evidence) -> Importance:
    """The decaying sum of (sum w g)^2 of a group over the steps, ``MOMENTUM_DECAY`` a step.

    But for a factor w^T F w, of second order, with the group's own part of the empirical Fisher
    matrix F, the sum of g g^T: Liu et al., https://arxiv.org/abs/2108.00708. Theirs sums examples;
    here g is a step's.

    Raises:
        RuntimeError: no gradient has been seen.
    """
    return Importance(_momentum("fisher", evidence), per_group=True)


def slope(name: str, evidence: Evidence) -> Tensor:
    """Return the matrix w g; a RuntimeError names the criterion that has no gradient."""
    if evidence.product is not None:
        return evidence.product
    if evidence.gradient is None:
        raise RuntimeError(
            f"{name}: the weight of {evidence.name!r} has no gradient; run a backward pass first, "
            "and call zero_grad() only after the scheduler's step() or epoch_step()"
        )
    return product(evidence.weight, evidence.gradient)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the float32 product of two matrices, element by element; into ``out``, if given. Of
    other floats no more than a chunk is there as float32.
    """
    out = torch.empty_like(a, dtype=torch.float32) if out is None else out
    if a.dtype == b.dtype == torch.float32:
        return torch.mul(a, b, out=out)
    turned = a.stride(0) < a.stride(1)  # along its memory
    a, b, target = (t.T if turned else t for t in (a, b, out))
    for at in chunks(a.shape, chunk_of(a.device)):
        torch.mul(a[at].float(), b[at].float(), out=target[at])
    return out


def rows_at_a_time(matrix: Tensor, height: int = 1) -> Iterator[slice]:
    """Part a matrix into rows, by multiples of ``height``, of about a chunk: so much scratch is
    little.
    """
    rows, cols = matrix.shape
    step = height * max(1, chunk_of(matrix.device) // max(1, height * cols))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def extremes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest magnitude, 0-d; NaN where there is one."""
    found = [torch.stack(matrix[at].abs().aminmax()) for at in rows_at_a_time(matrix)]
    ends = torch.stack(found)
    return ends[:, 0].amin(), ends[:, 1].amax()


def group_sums(values: Tensor, pattern: Pattern) -> Tensor:
    """Add up a matrix over each group: its rows, by pairs of neighbours, their sums by pairs, and
    so on, so that who adds up sums of lower groups gets the bits of who has them whole.
    """
    if isinstance(pattern, Unstructured):
        return values
    found = [values.new_empty(0, ceil_div(values.shape[1], pattern.cols))]
    for at in rows_at_a_time(values, pattern.rows):
        sums = pad_to_blocks(values[at], pattern.rows, pattern.cols).sum(3)
        while sums.shape[1] > 1:
            sums = sums[:, ::2] + sums[:, 1::2]
        found.append(sums[:, 0])
    return torch.cat(found)


def snip_momentum(evidence: Evidence) -> Importance:
    """The decaying sum of |w g| over the steps, ``MOMENTUM_DECAY`` a step.

    Intel Neural Compressor's ``snip_momentum``.

    Raises:
        RuntimeError: no gradient has been seen.
    """
    return Importance(_momentum("snip_momentum", evidence))


def _momentum(name: str, evidence: Evidence) -> Tensor:
    if evidence.momentum is None:
        raise RuntimeError(
            f"{name}: the weight of {evidence.name!r} has seen no gradient; call the "
            "scheduler's step() at every optimiser step, and zero_grad() only after it"
        )
    return evidence.momentum


def wanda(evidence: Evidence) -> Importance:
    """|w| times the size of its input: Sun et al., https://arxiv.org/abs/2306.11695.

    The size is the root mean square over the calibration's tokens: the paper's ||x||_2 but for a
    factor that one weight has in common, so that layers which saw other numbers of tokens compare.

    The paper prunes the same fraction of each output row: the pool ``"row"``. In a pool of all
    weights layers of larger activations keep more.

    Raises:
        RuntimeError: the inputs have not been calibrated.
    """
    if evidence.input_norm is None:
        raise RuntimeError(
            f"wanda: no input of {evidence.name!r} has been seen; run the model on calibration "
            "data inside `with controller.calibration():` first"
        )
    return Importance(product(evidence.weight, evidence.input_norm.expand(evidence.weight.shape)))


def random(evidence: Evidence) -> Importance:
    """Uniform in (0, 1) for each group: a function of seed and name, the same on every rank."""
    device = evidence.weight.device
    (numbers,) = random_numbers([evidence.name], [evidence.grid], device, evidence.seed)
    return Importance(numbers[evidence.groups], per_group=True)


def random_numbers(
    names: Sequence[str],
    grids: Sequence[tuple[int, int]],
    device: torch.device,
    seed: int,
    number: int = 0,
) -> list[Tensor]:
    """Return ``uniform_numbers`` of the groups of weights, which are told by their names."""
    streams = [zlib.crc32(canonical(name).encode()) for name in names]
    return uniform_numbers(grids, seed=seed, number=number, streams=streams, device=device)


def _own(function: Function, evidence: Evidence) -> Importance:
    """Hold a user's criterion to what it must return. Waits for the device."""
    values = asked(function, evidence)
    if values.numel():
        least, most = map(float, extremes(values))
        check_asked(function, evidence.name, least, most, several=values.numel() > 1)
    return Importance(values, per_group=values.shape != evidence.weight.shape)


def asked(function: Function, evidence: Evidence) -> Tensor:
    """Return what a user's criterion returns: float, of the weight's shape or of its grid's."""
    shape = tuple(evidence.weight.shape)
    found: Any = function(evidence)
    if not isinstance(found, Tensor) or tuple(found.shape) not in (shape, evidence.grid):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"weight_importance: {called(function)} must return a tensor of the weight's shape "
            f"{shape} or of its groups' {evidence.grid} for {evidence.name!r}, got {got}"
        )
    values = found.detach().to(evidence.weight.device)
    return values if values.is_floating_point() else values.float()


def check_asked(
    function: Function, name: str, least: float, most: float, *, several: bool
) -> None:
    """Refuse what a user's criterion has returned of a weight, of ``several`` groups or one, by
    the least and the greatest magnitude.
    """
    where = f"weight_importance: {called(function)} must return"
    if not math.isfinite(most):
        raise ValueError(f"{where} finite values for {name!r}, got NaN or Inf")
    if several and least == most:
        raise ValueError(
            f"{where} values that tell groups of {name!r} apart, got {most:g} throughout"
        )


def criterion(name: WeightImportance) -> Criterion:
    """Return the criterion that a configuration names, or has."""
    if not isinstance(name, str):
        return partial(_own, name)
    return {
        "abs": magnitude,
        "normed_abs": normed_magnitude,
        "snip": snip,
        "snip_momentum": snip_momentum,
        "taylor": taylor,
        "fisher": fisher,
        "wanda": wanda,
        "random": random,
    }[name]


def check_weights(weights: Sequence[SparseWeight]) -> None:
    """Refuse a weight that holds NaN or Inf, where scores are of something else and would not show
    it. Waits for the device.
    """
    here = {weight.name: local_part(weight.weight.detach()) for weight in weights}
    some = [tensor for tensor in here.values() if tensor.numel()]
    if nn.utils.get_total_norm(some, float("inf")).isfinite():
        return
    bad = next(name for name, tensor in here.items() if not tensor.isfinite().all())
    raise ValueError(
        f"set_sparsity_level: the weight of {bad!r} holds NaN or Inf; masks are left as they were"
    )


def check_gradients(
    name: WeightImportance, weights: Sequence[SparseWeight], sums: Sequence[Tensor]
) -> None:
    """Refuse a pool whose gradients say nothing: of equals the masks would go by position, and of
    rounding errors by chance.

    Args:
        name: of the criterion.
        weights: the pool.
        sums: of each weight the sum of |w g|, 0-d.
    """
    total = float(torch.stack([*sums]).sum())
    if total <= ROUNDING:
        much = f"adds up to {total:.3g} over" if total else "is 0 throughout"
        raise RuntimeError(
            f"{name}: |w g| {much} the pool of {weights[0].name!r}, {len(weights)} weights in "
            "all, so that nothing ranks their groups; run a backward pass with finite gradients "
            "first, of a loss that the weights change by more than rounding, and call zero_grad() "
            "only after the scheduler's step() or epoch_step()"
        )


def scores_by_group(
    weights: Sequence[SparseWeight],
    importances: Sequence[Importance],
    reduction: Reduction = "mean",
) -> Scores:
    """Return the scores of the groups of several weights of one pattern.

    Args:
        weights: one or more.
        importances: of each.
        reduction: of |values| over a block: their mean, max, sum or Euclidean norm.
    """
    first, values = weights[0], [found.values for found in importances]
    if importances[0].per_group:
        return Scores(values, None)
    pattern = Unstructured() if first.packed else first.pattern
    normed, backend = importances[0].normed, first.backend
    if any(weight.shard for weight in weights):
        scales = norms_of_all(weights, values) if normed else None
        if first.packed:
            return Scores(values, scales)
        return Scores(
            by_group(weights, values, partial(_block_scores, reduction, backend)), scales
        )
    if reduction == "mean" or isinstance(pattern, Unstructured):
        return Scores(*block_scores(values, pattern, normed=normed, backend=backend))
    _, scales = block_scores(values, Unstructured(), normed=normed, backend=backend)
    return Scores([_reduced(matrix, pattern, reduction, backend) for matrix in values], scales)


def _block_scores(
    reduction: Reduction, backend: Backend, parts: Sequence[Tensor], pattern: Pattern
) -> list[Tensor]:
    if reduction == "mean":
        return block_scores(parts, pattern, normed=False, backend=backend)[0]
    return [_reduced(part, pattern, reduction, backend) for part in parts]


def _reduced(values: Tensor, pattern: Pattern, reduction: Reduction, backend: Backend) -> Tensor:
    rows, cols = pattern.rows, pattern.cols
    if reduction == "sum":
        mean = block_score(values, pattern, backend=backend)
        tall, wide = side_lengths(values.shape, rows, cols, device=values.device)
        return mean * tall * wide
    parts = [values[at] for at in rows_at_a_time(values, rows)]
    return torch.cat([_peaks(part, pattern, reduction, backend) for part in parts])


def _peaks(values: Tensor, pattern: Pattern, reduction: Reduction, backend: Backend) -> Tensor:
    """Return the max or the Euclidean norm of each block."""
    blocks = pad_to_blocks(values, pattern.rows, pattern.cols)
    peaks = torch.maximum(blocks.amax((1, 3)), blocks.amin((1, 3)).neg()).float()
    if reduction == "max":
        return peaks
    # float32 holds the squares of neither 2e19 nor 1e-23: a block is multiplied by a power of 2
    exponents = torch.frexp(peaks).exponent.clamp(-126, 126)
    units = (127 - exponents << 23).view(torch.float32)
    if values.dtype == torch.float16:  # whose squares it does hold
        units = torch.ones_like(units)
    blocks = blocks * units.to(values.dtype)[:, None, :, None]
    matrix = blocks.flatten(2).flatten(0, 1)
    mean = block_score(matrix, pattern, norm="l2", backend=backend)
    return (mean * (pattern.rows * pattern.cols)).sqrt() / units


def by_group(
    weights: Sequence[SparseWeight],
    values: Sequence[Tensor],
    reduce: Callable[[Sequence[Tensor], Pattern], list[Tensor]],
) -> list[Tensor]:
    """Reduce matrices over the blocks that belong here; of sharded weights of one pattern.

    ``reduce`` is given matrices of whole blocks and returns one of their grid's shape for each.
    """
    groups, pattern = whole_groups(weights, values), weights[0].pattern
    flat = [matrix for matrices in groups for matrix in matrices]
    found = iter(reduce(flat, pattern) if flat else ())
    grids = []
    for value, matrices in zip(values, groups, strict=True):
        none = value.new_empty(0, ceil_div(value.shape[1], pattern.cols)).float()
        grids.append(torch.cat([next(found) for _ in matrices]) if matrices else none)
    return grids


def check_sharded(
    weights: Sequence[SparseWeight],
    importance: WeightImportance | None,
    distribution: str | None = None,
) -> None:
    """Refuse shards by which sums over weights would not be one process's, as a ValueError.

    Args:
        weights: of which some may be sharded.
        importance, distribution: by which they are pruned.
    """
    for weight in weights if importance == "normed_abs" or distribution == "owl" else ():
        pieces_here(weight)
