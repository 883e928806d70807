"""Criteria: how important each element of a weight is. Functions of one signature.

A criterion sees the ``Evidence`` on one weight and returns its ``Importance``; the score of a
block is the mean over its elements. The pool decides what is compared with what.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...kernels.block_score import block_scores
from ...kernels.numbers import uniform_numbers
from ...kernels.pattern import Unstructured
from ..masks.names import canonical
from ..masks.weight import SparseWeight
from .thresholds import Scores

WeightImportance = Literal["abs", "normed_abs", "snip", "snip_momentum", "wanda", "random"]


class Evidence(NamedTuple):
    """What a criterion may look at. All matrices are the weight's, (out, in).

    Attributes:
        name: the weight's, for messages, and to tell random numbers of several weights apart.
        weight: matrix.
        grid: groups down and across.
        gradient: matrix, of the last backward pass; None if there was none.
        momentum: float32 matrix, the decaying sum of |w g| over the steps; None before the first.
        input_norm: float32, root mean square of each input: (in,), or a matrix where rows have
            inputs of their own; None before a calibration.
        seed: of random numbers.
    """

    name: str
    weight: Tensor
    grid: tuple[int, int]
    gradient: Tensor | None = None
    momentum: Tensor | None = None
    input_norm: Tensor | None = None
    seed: int = 0


class Importance(NamedTuple):
    """How important the elements are: ``|values|``."""

    values: Tensor  # matrix; the weight itself where that will do, so that no copy is made
    normed: bool = False  # divided by its norm, or where that is 0 by 1
    per_group: bool = False  # one value a group


Criterion = Callable[[Evidence], Importance]


def magnitude(evidence: Evidence) -> Importance:
    """|w|."""
    return Importance(evidence.weight)


def normed_magnitude(evidence: Evidence) -> Importance:
    """|w| / ||w||_2, the norm of the whole tensor (NNCF's ``normed_abs``); of zeros, 0."""
    return Importance(evidence.weight, normed=True)


def snip(evidence: Evidence) -> Importance:
    """|w g|, what the loss changes by, to first order, without the weight.

    Lee et al., https://arxiv.org/abs/1810.02340; g is of the last backward pass.

    Raises:
        RuntimeError: there is no gradient.
    """
    if evidence.gradient is None:
        raise RuntimeError(
            f"snip: the weight of {evidence.name!r} has no gradient; run a backward pass first, "
            "and call zero_grad() only after the scheduler's step() or epoch_step()"
        )
    return Importance(evidence.weight.float() * evidence.gradient.float())


def snip_momentum(evidence: Evidence) -> Importance:
    """The decaying sum of |w g| over the steps, ``MOMENTUM_DECAY`` a step.

    Intel Neural Compressor's ``snip_momentum``.

    Raises:
        RuntimeError: no gradient has been seen.
    """
    if evidence.momentum is None:
        raise RuntimeError(
            f"snip_momentum: the weight of {evidence.name!r} has seen no gradient; call the "
            "scheduler's step() at every optimiser step, and zero_grad() only after it"
        )
    return Importance(evidence.momentum)


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
    return Importance(evidence.weight.float() * evidence.input_norm)


def random(evidence: Evidence) -> Importance:
    """Uniform in (0, 1) for each group: a function of seed and name, the same on every rank."""
    device = evidence.weight.device
    (numbers,) = random_numbers([evidence.name], [evidence.grid], device, evidence.seed)
    return Importance(numbers, per_group=True)


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


def criterion(name: WeightImportance) -> Criterion:
    """Return the criterion that a configuration names."""
    return {
        "abs": magnitude,
        "normed_abs": normed_magnitude,
        "snip": snip,
        "snip_momentum": snip_momentum,
        "wanda": wanda,
        "random": random,
    }[name]


def check_gradients(
    name: WeightImportance, weights: Sequence[SparseWeight], speak: Sequence[Tensor]
) -> None:
    """Refuse a pool whose gradients say nothing: of equals the masks would go by position."""
    if not torch.stack([*speak]).any():
        raise RuntimeError(
            f"{name}: |w g| is 0 throughout the pool of {weights[0].name!r}, "
            f"{len(weights)} weights in all, so that nothing ranks their groups; run a backward "
            "pass with finite gradients first, and call zero_grad() only after the scheduler's "
            "step() or epoch_step()"
        )


def scores_by_group(weights: Sequence[SparseWeight], importances: Sequence[Importance]) -> Scores:
    """Return the scores of the groups of several weights of one pattern."""
    first, values = weights[0], [found.values for found in importances]
    if importances[0].per_group:
        return Scores(values, None)
    pattern = Unstructured() if first.packed else first.pattern
    normed = importances[0].normed
    return Scores(*block_scores(values, pattern, normed=normed, backend=first.backend))
