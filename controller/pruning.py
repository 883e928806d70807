"""From scores to masks: pools of weights, their exact counts within limits, thresholds, masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..kernels.block_score import block_score
from ..kernels.mask import make_mask, unpack
from ..kernels.pattern import NM, Pattern, Unstructured, maximum_level
from ..kernels.select import Threshold, select
from ..kernels.semi_structured import nm_mask, nm_score
from .allocation import allocate
from .operand import MaskOperand

if TYPE_CHECKING:
    from .base_algo import SparseModuleInfo


class Scores(NamedTuple):
    """Importance of the groups of several weights.

    Attributes:
        tensors: one matrix a weight, of a block pattern's grid, or of the weight itself where
            every element is a group: its magnitude is the score, and no copy is made. Under N:M
            the weight's too: its elements compete inside their tuple.
        scales: float32 factor of each tensor, or None.
    """

    tensors: list[Tensor]
    scales: Tensor | None


class Pruning(NamedTuple):
    """A threshold found and not yet applied.

    Under N:M the scores are those of tuples, and ``elements`` has those of their elements. Where
    every tuple is pruned there is no threshold, and ``masks`` are found.
    """

    infos: list[SparseModuleInfo]
    scores: Scores
    threshold: Threshold | None
    pruned: int
    elements: list[Tensor]
    masks: list[Tensor]


ScoresOf = Callable[[Sequence["SparseModuleInfo"]], Scores]


def pools(infos: Sequence[SparseModuleInfo]) -> list[list[SparseModuleInfo]]:
    """Part the weights by pattern: in a mixed pool an element would count as much as a block."""
    found: dict[Pattern, list[SparseModuleInfo]] = {}
    for info in infos:
        found.setdefault(info.operand.pattern, []).append(info)
    return list(found.values())


def is_reachable(level: float, patterns: Sequence[Pattern]) -> bool:
    """Tell whether any of the patterns can express ``level``: N:M goes up to 1 - n/m."""
    most = max(map(maximum_level, patterns))
    # 2/3 is not 1 - 1/3 in floating point
    return level <= most or math.isclose(level, most, rel_tol=1e-9)


def check_reachable(what: str, level: float, patterns: Sequence[Pattern]) -> None:
    """Refuse a level that no weight can reach, naming ``what`` it is."""
    if not is_reachable(level, patterns):
        pattern = max(patterns, key=maximum_level)
        raise ValueError(
            f"{what} must be at most 1 - n/m = {maximum_level(pattern):g} under the pattern "
            f"{pattern}, got {level!r}"
        )


def find_prunings(
    infos: list[SparseModuleInfo], level: float, scores: ScoresOf, *, limits: bool
) -> list[Pruning]:
    """Find the thresholds of one pool; several where limits hold some weights apart.

    Args:
        infos: the weights, of one pattern.
        level: ``round(level * groups)`` groups are pruned; of N:M tuples that share of what it
            can prune.
        scores: scores every group of the weights given.
        limits: each weight keeps within its own.

    Raises:
        ValueError: the level is beyond what the limits allow; a weight holds NaN or Inf.
    """
    groups = [info.operand.candidates for info in infos]
    most = maximum_level(infos[0].operand.pattern)
    share = min(level / most, 1.0)
    total = round(share * sum(groups))
    if not limits or all(i.minimum_level <= 0 and i.maximum_level >= 1 for i in infos):
        return [_threshold(infos, total, scores)]
    # a schedule passes levels below a weight's minimum on its way up
    least = [min(info.minimum_level / most, share) for info in infos]
    minimum = [round(part * n) for part, n in zip(least, groups, strict=True)]
    greatest = [min(info.maximum_level / most, 1.0) for info in infos]
    maximum = [round(part * n) for part, n in zip(greatest, groups, strict=True)]
    minimum = [min(low, high) for low, high in zip(minimum, maximum, strict=True)]
    if not sum(minimum) <= total <= sum(maximum):
        raise ValueError(
            f"set_sparsity_level: level {level} cannot be reached within the limits of "
            f"overrides: {total} of {sum(groups)} groups to prune, between {sum(minimum)} "
            f"and {sum(maximum)} allowed"
        )

    def natural(members: list[int], k: int) -> list[int]:
        pruning = _threshold([infos[i] for i in members], k, scores)
        if pruning.threshold is None:
            return [groups[i] for i in members]
        masks = _masks_of(pruning)
        return [
            groups[i] - _kept(mask, infos[i].operand)
            for i, mask in zip(members, masks, strict=True)
        ]

    fixed, free, left = allocate(total, minimum, maximum, natural)
    prunings = [_threshold([infos[i]], count, scores) for i, count in fixed.items()]
    if free:
        prunings.append(_threshold([infos[i] for i in free], left, scores))
    return prunings


def apply_pruning(pruning: Pruning) -> None:
    """Write the masks, in place."""
    masks = [info.operand.mask for info in pruning.infos]
    pattern = pruning.infos[0].operand.pattern
    if pruning.threshold is None:
        for mask, found in zip(masks, pruning.masks, strict=True):
            mask.copy_(found)
    elif isinstance(pattern, NM):
        backend = pruning.infos[0].operand.backend
        tuples = zip(pruning.elements, _masks_of(pruning), masks, strict=True)
        for elements, whole, mask in tuples:
            nm_mask(elements, pattern, whole=whole, out=mask, backend=backend)
    else:
        _masks_of(pruning, out=masks)
    kept: list[int] | list[None] = [None] * len(masks)
    if any(info.operand.topology is not None for info in pruning.infos):
        # of all weights at once: each count by itself would be a wait for the device
        kept = torch.stack([mask.count_nonzero() for mask in masks]).tolist()
    for info, count in zip(pruning.infos, kept, strict=True):
        info.operand.set_(None, all_kept=pruning.pruned == 0, kept=count)


def magnitude_scores(infos: Sequence[SparseModuleInfo]) -> Scores:
    """Score every group by |w|, a block by the mean."""
    operand = infos[0].operand
    matrices = [info.operand.matrix(info.weight.detach()) for info in infos]
    if operand.packed:
        return Scores(matrices, None)
    return Scores(
        [block_score(w, operand.pattern, backend=operand.backend) for w in matrices], None
    )


def _threshold(infos: list[SparseModuleInfo], pruned: int, scores: ScoresOf) -> Pruning:
    # where nothing is pruned a criterion need not have what it judges by
    found = scores(infos) if pruned else magnitude_scores(infos)
    pattern, backend = infos[0].operand.pattern, infos[0].operand.backend
    elements = found.tensors
    if isinstance(pattern, NM):
        if pruned == sum(info.operand.candidates for info in infos):
            ends = [nm_mask(tensor, pattern, backend=backend) for tensor in elements]
            _check_finite(infos, elements, torch.stack([end.nonfinite for end in ends]).sum())
            return Pruning(infos, found, None, pruned, elements, [end.mask for end in ends])
        tuples = [nm_score(tensor, pattern, backend=backend) for tensor in elements]
        found = Scores(tuples, found.scales)
    threshold = select(found.tensors, pruned, scales=found.scales, backend=backend)
    _check_finite(infos, found.tensors, threshold.nonfinite)
    return Pruning(infos, found, threshold, pruned, elements, [])


def _check_finite(
    infos: Sequence[SparseModuleInfo], scores: Sequence[Tensor], nonfinite: Tensor
) -> None:
    # the one wait for the device: masks must not change before every score is known to be finite
    if nonfinite:
        for info, tensor in zip(infos, scores, strict=True):
            if not torch.isfinite(tensor).all():
                what = "importance" if torch.isfinite(info.weight).all() else "weight"
                raise ValueError(
                    f"set_sparsity_level: the {what} of {info.module_node_name!r} holds NaN "
                    "or Inf; masks are left as they were"
                )


def _masks_of(pruning: Pruning, out: list[Tensor] | None = None) -> list[Tensor]:
    """Return which of the scores' groups are kept: packed if unstructured, else bool."""
    assert pruning.threshold is not None
    operand = pruning.infos[0].operand
    return make_mask(
        pruning.scores.tensors,
        pruning.threshold,
        scales=pruning.scores.scales,
        packed=isinstance(operand.pattern, Unstructured),
        out=out,
        backend=operand.backend,
    )


def _kept(mask: Tensor, operand: MaskOperand) -> int:
    packed = isinstance(operand.pattern, Unstructured)
    return int((unpack(mask, operand.shape[1]) if packed else mask).sum())
