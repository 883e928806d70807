"""Importances: what movement sparsity trains, and masks by; of a weight or bias one a group.

``controller.py`` says when the masks follow them, and to which threshold.

Reading order: one weight's -> which weights -> what they are pulled by.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.bits import expand_mask
from ....kernels.learned_mask import straight_through
from ....kernels.pattern import MAX_BLOCK_SIDE, Block, Unstructured
from ....kernels.select import kth_smallest
from ...config.scope import check_scopes, matches
from ...masks.exchange import full_grid, full_kept, others_of
from ...masks.learned import UpdatedWeight
from ...masks.scored import ScoredWeight
from ...masks.targets import weights_of
from ...masks.weight import SparseWeight, Target
from ..learned import LearnedLoss
from .config import MovementSparsityConfig, SparseStructure
from .structures import StructureGroup, find_structures, units

QUANTILE = 98  # percent of a weight that may be pruned at most
LAYER_FACTOR = 0.5


class MovementWeight(UpdatedWeight, ScoredWeight):
    """A mask by importance, of a weight (a matrix) or a bias (a vector).

    Args:
        target: which parameter, and what rows and columns a mask can tell apart: divisors of
            ``factors``.
        factors: rows and columns of what has one importance; a bias's rows are 1.
        options: as ``ScoredWeight``'s.
    """

    def __init__(self, target: Target, factors: tuple[int, int], **options: Any) -> None:
        self.factors = factors
        pattern = target.pattern
        self._repeats = factors[0] // pattern.rows, factors[1] // pattern.cols
        super().__init__(target, **options)

    @property
    def scores_shape(self) -> tuple[int, ...]:
        grid = tuple(n // times for n, times in zip(self.full_grid, self._repeats, strict=True))
        return grid[1:] if len(self.weight_shape) == 1 else grid

    def learns(self) -> bool:
        return super().learns() and torch.is_grad_enabled()

    @property
    def score_sides(self) -> tuple[int, int]:
        down, across = self.factors
        return (across, down) if self._upright else (down, across)

    def learned(self, weight: Tensor) -> Tensor:
        scores = self.spread_part(self.trained_scores())
        matrix, mask, pattern = self.readable(weight)
        masked = straight_through(matrix, scores, mask, pattern, backend=self.backend)
        return masked.reshape(weight.shape)

    def spread(self, scores: Tensor) -> Tensor:
        """Repeat one value an importance for the groups of the mask."""
        grid = scores[None] if scores.ndim == 1 else scores
        for dim, times in enumerate(self._repeats):
            if times > 1:
                grid = grid.repeat_interleave(times, dim)
        return grid

    def spread_part(self, part: Tensor) -> Tensor:
        """Return ``spread``'s of scores that are here, as the mask of what is here lies."""
        grid = self.spread(part)
        return grid.T.contiguous() if self.shard is not None and part.ndim == 1 else grid

    @property
    def kept_everywhere(self) -> Tensor:
        """Bool tensor of the full weight's shape, True = kept; a copy."""
        if not self.in_parts:
            return self.binary_mask
        whole = self._compact(full_grid(self))
        return expand_mask(whole, self.pattern, self.full_shape).view(self.weight_shape)

    def keep_everywhere(self, kept: Tensor) -> None:
        """Take over such a tensor, which is constant within every group."""
        if self.shard is None:
            self.binary_mask = kept
        else:
            matrix = self.target.matrix(kept)
            self.take_whole(matrix[:: self.pattern.rows, :: self.pattern.cols].contiguous())

    def take_whole(self, grid: Tensor) -> None:
        """Take over the bool grid of the full weight, of which a part is here."""
        self._take_full(grid)
        if self.is_gathered and not self._gather_mask():
            self._pass(grid)

    def take(self, kept: Tensor, count: int) -> None:
        """Take over which importances that are here are kept, bool, of the scores' shape; those of
        the full weight are ``count``. A rank has the scores of the very groups that it has.
        """
        grid, count = self.spread_part(kept).contiguous(), count * math.prod(self._repeats)
        if self.shard is None:
            self.set_(self._compact(grid), count)
        else:
            self.take_part(grid, count)

    def take_elements(self, whole: Tensor, count: int) -> None:
        """Take over which importances of the full weight are kept, bool, ``count`` of them, under
        a mask of single elements: of these what is here.
        """
        assert self.shard is not None
        ends = zip(self.shard.here, self.score_sides, strict=True)
        rows, cols = (
            torch.arange(here.start, here.stop, device=whole.device) // side for here, side in ends
        )
        whole = whole.T if self._upright else whole
        self.take_part(whole[rows][:, cols].contiguous(), count * math.prod(self._repeats))

    @property
    def most(self) -> int:
        """How many importances may be pruned: not more than reach the quantile's place."""
        size, share = self.weight_shape.numel(), math.prod(self.factors)
        return (QUANTILE * (size - 1) // 100 + 1) // share

    def cap(self) -> Tensor:
        """Return the largest threshold, the importance at place 0.98 (n - 1) of n elements.

        ``torch.quantile`` interpolates to the next one: nothing lies between, so that the mask is
        the same.
        """
        share = math.prod(self.factors)
        place = QUANTILE * (self.weight_shape.numel() - 1) // 100 // share
        return kth_importance([self], place + 1)


def take_kept(
    weights: Sequence[MovementWeight], kept: Sequence[Tensor], counts: Sequence[int]
) -> None:
    """Take over which importances that are here are kept, ``counts`` of those of whole weights; of
    shards in groups of several elements one bit an importance is gathered.
    """
    elements, shards = [], []
    for weight, own, count in zip(weights, kept, counts, strict=True):
        if weight.gathers_scores and not weight.scores_lie_as_elements:
            shards.append((weight, own, count))
            continue
        weight.take(own, count)
        if weight.gathers_scores:
            elements.append(weight)
    if shards:
        found = full_kept([w for w, *_ in shards], [own for _, own, _ in shards])
        for (weight, _, count), whole in zip(shards, found, strict=True):
            if weight.packed:
                weight.take_elements(whole, count)
                elements.append(weight)
            else:
                weight.take_whole(weight.spread(whole).contiguous())
    UpdatedWeight.masks_changed(elements)


def kth_importance(
    weights: Sequence[MovementWeight], k: int, shares: Sequence[int] | None = None
) -> Tensor:
    """Return the k-th smallest importance of weights, as ``kth_smallest``; of all ranks."""
    others, parts = others_of(weights), [weight.part() for weight in weights]
    if others is None:
        return kth_smallest(parts, k, weights[0].backend, shares)
    own = [part if n else part[:0] for part, n in zip(parts, others.counted, strict=True)]
    return kth_smallest(own, k, weights[0].backend, shares, others.reduce)


def movement_targets(
    targets: Sequence[Target], *, biases: bool, elsewhere: bool = False
) -> list[Target]:
    """Return the linear layers among ``targets``; each weight is followed by its bias, with
    ``biases``.

    Raises:
        ValueError: there is none, and nothing is ``elsewhere``.
    """
    found = []
    for target in targets:
        module, name = target.users[0]
        if not isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            continue
        found.append(target)
        bias = "in_proj_bias" if name == "in_proj_weight" else "bias"
        has_bias = biases and getattr(module, bias, None) is not None
        if has_bias and name in ("weight", "in_proj_weight"):
            path = target.name if name == "weight" else target.name.removesuffix(name)[:-1]
            path = "" if path == name else path
            found.append(
                replace(target, name=f"{path}.{bias}" if path else bias, users=((module, bias),))
            )
    if not found and not elsewhere:
        raise ValueError(
            "create_controller: movement_sparsity masks linear layers, and none is left, got "
            f"{[target.name for target in targets]}"
        )
    return found


def structure_groups(
    model: nn.Module, names: Mapping[tuple[nn.Module, str], str], config: MovementSparsityConfig
) -> tuple[list[StructureGroup], list[StructureGroup]]:
    """Find the heads and channels that masks can be resolved to, and those that they cannot: all
    members must be among ``names``, the masked weights, and no structure along other dimensions.
    """
    found, left_out = [], []
    for group in find_structures(model):
        fits = True
        for member in group.members:
            name = names.get((member.module, member.weight))
            structure = None if name is None else _structure(name, config)
            along = None if structure is None else structure.axis
            fits = fits and name is not None and along in (None, member.dim)
        (found if fits else left_out).append(group)
    return found, left_out


def _warn_about_structures(
    left_out: Sequence[StructureGroup], config: MovementSparsityConfig
) -> None:
    if left_out and config.enable_structured_masking is not False:
        groups = [f"{group.name or 'the model'} ({group.kind})" for group in left_out]
        warnings.warn(
            "no structured masking, because not all linear layers are masked, or along other "
            f"dimensions: {groups}; enable_structured_masking=False silences this",
            stacklevel=6,
        )


def _warn_about_dense(
    model: nn.Module, targets: Sequence[Target], config: MovementSparsityConfig
) -> None:
    """Name the weights that ``target_scopes`` select though movement cannot mask them.

    Without such scopes Conv1D alone is named, which anyone takes for a linear layer.
    """
    masked = {id(target.weight) for target in targets}
    left_out = []
    for candidate in weights_of(model):
        scopes = config.target_scopes
        chosen = candidate.is_conv1d if scopes is None else candidate.matches(scopes)
        ignored = candidate.matches(config.ignored_scopes)
        if chosen and not ignored and id(candidate.weight) not in masked:
            left_out.append(candidate.names[0])
    if left_out:
        warnings.warn(
            "left dense, because movement_sparsity masks linear layers that store their weight as "
            f"(out_features, in_features) alone: {left_out}; name them in ignored_scopes to "
            "silence this",
            stacklevel=6,
        )


def _structure(name: str, config: MovementSparsityConfig) -> SparseStructure | None:
    for structure in config.sparse_structure_by_scopes:
        if any(matches(scope, name) for scope in structure.target_scopes):
            return structure
    return None


def movement_weights(
    model: nn.Module, targets: Sequence[Target], config: MovementSparsityConfig, **options: Any
) -> list[SparseWeight]:
    """Return each target under importances.

    Raises:
        ValueError: a structure does not divide its weight, or its scope matches nothing.
    """
    _warn_about_dense(model, targets, config)
    if config.schedule is not None:
        return [MovementWeight(t, (t.pattern.rows, t.pattern.cols), **options) for t in targets]  # pyright: ignore[reportAttributeAccessIssue]
    structures = config.sparse_structure_by_scopes
    if config.validate_scopes:
        names = [target.name for target in targets]
        scopes = [scope for structure in structures for scope in structure.target_scopes]
        check_scopes(scopes, names, "sparse_structure_by_scopes")
    named = {user: target.name for target in targets for user in target.users}
    _warn_about_structures(structure_groups(model, named, config)[1], config)
    made: list[SparseWeight] = []
    for target, owner in zip(targets, _owners(targets), strict=True):
        factors = _factors(owner, config)
        factors = factors if owner is target else (1, factors[0])
        made.append(MovementWeight(target, factors, **options))
    return made


def with_tiles(
    model: nn.Module, targets: Sequence[Target], config: MovementSparsityConfig
) -> list[Target]:
    """Return targets whose pattern is what masks can tell apart: parts of what has an importance,
    and of heads and channels.

    Raises:
        ValueError: a structure does not divide its weight.
    """
    named = {user: target.name for target in targets for user in target.users}
    groups, _ = structure_groups(model, named, config)
    sides = {} if config.enable_structured_masking is False else units(groups)
    found = []
    for target, owner in zip(targets, _owners(targets), strict=True):
        factors, unit = _factors(owner, config), sides.get(owner.users[0], (0, 0))
        tile = _tile(factors[0], unit[0]), _tile(factors[1], unit[1])
        tile = tile if owner is target else (1, tile[0])
        pattern = Unstructured() if tile == (1, 1) else Block(*tile)
        found.append(replace(target, pattern=pattern))
    return found


def _owners(targets: Sequence[Target]) -> list[Target]:
    """Return of each target the weight of its layer: of a bias another one."""
    weights = {target.users[0][0]: target for target in targets if len(target.shape) == 2}
    return [t if len(t.shape) == 2 else weights[t.users[0][0]] for t in targets]


def _tile(factor: int, unit: int) -> int:
    """Return the longest side of a block that divides both; a unit of 0 does not matter."""
    common = math.gcd(factor, unit)
    return min(common & -common, MAX_BLOCK_SIDE)


def _factors(target: Target, config: MovementSparsityConfig) -> tuple[int, int]:
    shape = target.shape
    structure, pattern = _structure(target.name, config), config.pattern
    factors = structure.factors(shape) if structure else (pattern.rows, pattern.cols)
    if shape[0] % factors[0] or shape[1] % factors[1]:
        raise ValueError(
            f"create_controller: sparse_factors {list(factors)} must divide the weight of "
            f"{target.name!r}, got {list(shape)}"
        )
    return factors


class ImportanceLoss(LearnedLoss):
    """Pulls importances down: the mean over layers of ``(mean sigmoid(S) * r * c + mean
    sigmoid(S_bias) * r) * 0.5 * factor``, with r x c elements an importance.
    """

    _weights: list[MovementWeight]  # pyright: ignore[reportIncompatibleVariableOverride]
    factor = 0.0

    @property
    def is_live(self) -> bool:
        return super().is_live and self.factor > 0

    def trained(self) -> Tensor | None:
        """Return the loss; None before the warm-up and once masks are frozen."""
        if self.disabled or self.factor == 0:
            return None
        sums = self.numbers_of_all()
        means = [
            own / math.prod(weight.scores_shape) * math.prod(weight.factors)
            for own, weight in zip(sums, self._weights, strict=True)
        ]
        # a bias is of its weight's layer
        layers = len({weight.module for weight in self._weights})
        return torch.stack(means).sum() * (LAYER_FACTOR * self.factor / layers)

    def numbers(self) -> Tensor:
        """Return the sum of the sigmoids of each weight's importances."""
        return torch.stack([weight.trained_part().sigmoid().sum() for weight in self._weights])
