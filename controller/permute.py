"""Reordering hidden features before pruning, so that blocks keep more: ``permute_features``.

Reading order: the entry point, how weights take an order, which features may change places.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.pattern import Block
from .algorithms.evaluation import Run, evaluating, run
from .config.algorithm import AlgorithmConfig
from .config.declaration import number
from .masks.features import Features, tensors_of, trace_features
from .masks.shards import is_sharded
from .masks.targets import find_targets
from .masks.weight import Target
from .selection.permutation import Side, group_features, kept_mass

_log = logging.getLogger("triton_sparsity")


@dataclass(frozen=True)
class FeaturePermutation:
    """One set of features that has been reordered.

    Attributes:
        parameters: names of the parameters that have these features, and in which dimension.
        order: int64 ``(features,)``: which feature has come to each place.
        kept_before, kept_after: share of the targets' magnitude that is in the blocks that stay,
            where each group of features keeps the same share of its blocks.
    """

    parameters: tuple[tuple[str, int], ...]
    order: Tensor
    kept_before: float
    kept_after: float


@torch.no_grad()
def permute_features(
    model: nn.Module, batch: Any, config: AlgorithmConfig, *, level: float, run: Run = run
) -> list[FeaturePermutation]:
    """Reorder hidden features in place so that the blocks that are kept have a greater magnitude.

    Hidden features may lie in any order, as long as the rows of the weights that make them and the
    columns of the weights that read them agree: those between the two layers of a transformer's
    feed-forward network, say, or the residual stream of a language model. The model computes what
    it did, but for the order in which sums are added up; nothing is permuted when it runs, and a
    stripped model has nothing to fold. Call it before a controller, and before an optimiser whose
    state has the shape of the weights, are made. ``selection/permutation.py`` has the search.

    The model is run on ``batch`` to see where each feature goes. Only elementwise operations,
    linear layers, embeddings, norms over the features and sums or means carry them; what goes into
    anything else (attention's heads, a concatenation) or out of the model stays where it is.
    What a forward pass leaves outside of its outputs, or does on another batch only, is not seen.

    Args:
        model: in evaluation mode of one answer a batch; it must not be compiled.
        batch: an example, one that makes use of all of the model.
        config: pattern and targets.
        level: share of each weight's blocks that is to be pruned, in (0, 1).
        run: calls the model on the batch, as ``prune_obs``'s.

    Returns:
        Each set of features whose order has changed.

    Raises:
        ValueError: level or pattern do not fit, a target is sharded, no target has features that
            may change places, or the model answers differently afterwards; it is then as it was.
    """
    level = number(level)
    if not isinstance(level, (int, float)) or isinstance(level, bool) or not 0 < level < 1:
        raise ValueError(f"permute_features: level must be in (0, 1), got {level!r}")
    targets = [t for t in find_targets(model, config) if isinstance(t.pattern, Block)]
    if not targets:
        raise ValueError(
            f"permute_features: config must have a pattern of blocks, got {config.pattern}; of "
            "single elements none is kept for its neighbours"
        )
    for target in targets:
        if is_sharded(target.weight):
            raise ValueError(
                f"permute_features: {target.name!r} must not be sharded, got a DTensor; permute "
                "before fully_shard, or list it in ignored_scopes"
            )
    with evaluating(model):
        features, before = trace_features(model, lambda: run(model, batch))
        found: list[FeaturePermutation] = []
        try:
            sides = 0
            for one in features:
                if one.held_by is None and (of := _targets_of(model, one, targets)):
                    sides += 1
                    if (permutation := _permuted(model, one, of, level)) is not None:
                        found.append(permutation)
            if not sides:
                raise ValueError(_reasons(model, features, targets))
            _check_answers(before, run(model, batch))
        except BaseException:
            for permutation in reversed(found):
                _reorder(model, permutation.parameters, permutation.order.argsort())
            raise
    _tell(found)
    return found


# how weights take an order


def _targets_of(
    model: nn.Module, features: Features, targets: Sequence[Target]
) -> list[tuple[Target, bool]]:
    """Return the targets that have the features in blocks of several, and whether as outputs."""
    found = []
    for name, dim in features.members:
        weight = model.get_parameter(name)
        for target in targets:
            if target.weight is weight:
                rows = (dim == 0) != target.transposed
                assert isinstance(target.pattern, Block)
                if (target.pattern.rows if rows else target.pattern.cols) > 1:
                    found.append((target, rows))
    return found


def _permuted(
    model: nn.Module, features: Features, of: Sequence[tuple[Target, bool]], level: float
) -> FeaturePermutation | None:
    """Reorder one set of features; None: no order was found that keeps more."""
    sides = []
    for target, rows in of:
        assert isinstance(target.pattern, Block)
        matrix = target.matrix(target.weight)
        sides.append(Side.of(matrix, target.pattern, level, rows=rows))
    order = group_features(sides)
    start = torch.arange(len(order), device=order.device)
    if torch.equal(order, start):
        return None
    total = sum(float(side.sums.sum()) for side in sides)
    shares = [kept_mass(sides, places) / total for places in (start, order)]
    _reorder(model, features.members, order)
    return FeaturePermutation(features.members, order, *shares)


def _reorder(model: nn.Module, members: Sequence[tuple[str, int]], order: Tensor) -> None:
    for name, dim in members:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))


def _check_answers(before: Any, after: Any) -> None:
    """Refuse answers that differ by more than sums in another order do."""
    pairs = zip(tensors_of(before), tensors_of(after), strict=True)
    floating = [(a.double(), b.double(), a.dtype) for a, b in pairs if a.is_floating_point()]
    if not floating:
        raise ValueError(
            f"permute_features: run must return the model's answer, got {type(before).__name__} "
            "without a floating-point tensor"
        )
    for a, b, dtype in floating:
        gap = float((a - b).norm() / a.norm().clamp(min=1e-30))
        if not gap <= max(2e-3, torch.finfo(dtype).eps ** 0.5):
            raise ValueError(
                f"permute_features: the model answers differently by {gap:.2g} of its answer's "
                "norm; batch must get the same answer twice, and features must not be read in a "
                "way that a forward pass does not show. The model is as it was"
            )


def _reasons(model: nn.Module, features: Sequence[Features], targets: Sequence[Target]) -> str:
    parts = []
    for target in targets[:3]:
        held = [
            one.held_by
            for one in features
            for name, _ in one.members
            if one.held_by and model.get_parameter(name) is target.weight
        ]
        what = f"held by {' and '.join(held)}" if held else "not in this forward pass"
        parts.append(f"{target.name!r} {what}")
    return (
        "permute_features: no target has features that may change places: "
        + "; ".join(parts)
        + (f"; and {len(targets) - 3} more" if len(targets) > 3 else "")
    )


def _tell(found: Sequence[FeaturePermutation]) -> None:
    for one in found:
        names = ", ".join(name for name, _ in one.parameters[:3])
        more = f" and {len(one.parameters) - 3} more" if len(one.parameters) > 3 else ""
        _log.info(
            f"{len(one.order)} features of {names}{more} reordered: blocks keep "
            f"{one.kept_after:.1%} of the magnitude, {one.kept_before:.1%} before"
        )
