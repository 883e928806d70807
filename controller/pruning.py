"""From scores to masks: pools of weights, their exact counts within limits, thresholds, masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..kernels.block_score import block_score
from ..kernels.mask import make_mask, unpack
from ..kernels.pattern import Pattern
from ..kernels.select import Threshold, select
from .allocation import allocate
from .operand import MaskOperand

if TYPE_CHECKING:
    from .base_algo import SparseModuleInfo


class Scores(NamedTuple):
    """Importance of the groups of several weights.

    Attributes:
        tensors: one matrix a weight, of a block pattern's grid, or of the weight itself where
            every element is a group: its magnitude is the score, and no copy is made.
        scales: float32 factor of each tensor, or None.
    """

    tensors: list[Tensor]
    scales: Tensor | None


class Pruning(NamedTuple):
    """A threshold found and not yet applied."""

    infos: list[SparseModuleInfo]
    scores: Scores
    threshold: Threshold
    pruned: int


ScoresOf = Callable[[Sequence["SparseModuleInfo"]], Scores]


def pools(infos: Sequence[SparseModuleInfo]) -> list[list[SparseModuleInfo]]:
    """Part the weights by pattern: in a mixed pool an element would count as much as a block."""
    found: dict[Pattern, list[SparseModuleInfo]] = {}
    for info in infos:
        found.setdefault(info.operand.pattern, []).append(info)
    return list(found.values())


def find_prunings(
    infos: list[SparseModuleInfo], level: float, scores: ScoresOf, *, limits: bool
) -> list[Pruning]:
    """Find the thresholds of one pool; several where limits hold some weights apart.

    Args:
        infos: the weights, of one pattern.
        level: ``round(level * groups)`` groups are pruned.
        scores: scores every group of the weights given.
        limits: each weight keeps within its own.

    Raises:
        ValueError: the level is beyond what the limits allow; a weight holds NaN or Inf.
    """
    groups = [info.operand.groups for info in infos]
    total = round(level * sum(groups))
    if not limits or all(i.minimum_level <= 0 and i.maximum_level >= 1 for i in infos):
        return [_threshold(infos, total, scores)]
    # a schedule passes levels below a weight's minimum on its way up
    minimum = [round(min(i.minimum_level, level) * n) for i, n in zip(infos, groups, strict=True)]
    maximum = [round(i.maximum_level * n) for i, n in zip(infos, groups, strict=True)]
    minimum = [min(low, high) for low, high in zip(minimum, maximum, strict=True)]
    if not sum(minimum) <= total <= sum(maximum):
        raise ValueError(
            f"set_sparsity_level: level {level} cannot be reached within the limits of "
            f"overrides: {total} of {sum(groups)} groups to prune, between {sum(minimum)} "
            f"and {sum(maximum)} allowed"
        )

    def natural(members: list[int], k: int) -> list[int]:
        pruning = _threshold([infos[i] for i in members], k, scores)
        masks = _masks_of(pruning)
        return [
            infos[i].operand.groups - _kept(mask, infos[i].operand)
            for i, mask in zip(members, masks, strict=True)
        ]

    fixed, free, left = allocate(total, minimum, maximum, natural)
    prunings = [_threshold([infos[i]], count, scores) for i, count in fixed.items()]
    if free:
        prunings.append(_threshold([infos[i] for i in free], left, scores))
    return prunings


def apply_pruning(pruning: Pruning) -> None:
    """Write the masks, in place."""
    masks = _masks_of(pruning, out=[info.operand.mask for info in pruning.infos])
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
    threshold = select(
        found.tensors, pruned, scales=found.scales, backend=infos[0].operand.backend
    )
    # the one wait for the device: masks must not change before every score is known to be finite
    if threshold.nonfinite:
        for info, tensor in zip(infos, found.tensors, strict=True):
            if not torch.isfinite(tensor).all():
                what = "importance" if torch.isfinite(info.weight).all() else "weight"
                raise ValueError(
                    f"set_sparsity_level: the {what} of {info.module_node_name!r} holds NaN "
                    "or Inf; masks are left as they were"
                )
    return Pruning(infos, found, threshold, pruned)


def _masks_of(pruning: Pruning, out: list[Tensor] | None = None) -> list[Tensor]:
    operand = pruning.infos[0].operand
    return make_mask(
        pruning.scores.tensors,
        pruning.threshold,
        scales=pruning.scores.scales,
        packed=operand.packed,
        out=out,
        backend=operand.backend,
    )


def _kept(mask: Tensor, operand: MaskOperand) -> int:
    return int((unpack(mask, operand.shape[1]) if operand.packed else mask).sum())
