"""Weights whose masks follow from scores that are trained: rb's logits, movement's importances."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels.grid import ceil_div, side_lengths
from ...kernels.learned_mask import scale_gradient
from ...kernels.pattern import Block, Pattern, Unstructured
from .exchange import agree_counts, from_stage, within
from .learned import LearnedWeight, check_shard, scores_name
from .shards import (
    Records,
    Shard,
    dimensions_of,
    is_resting,
    is_sharded,
    like_shard,
    local_part,
    records_of,
    shard_beside,
    shard_of,
)
from .weight import Target


class ScoredWeight(LearnedWeight):
    """A weight whose mask follows from trained scores.

    FSDP2 shards the scores as it does the weight, by rows, and gathers both for a forward pass:
    the mask that is learned is made of gathered scores. What ranks tell one another beside is
    which blocks are kept, one bit each, where the mask of what is here is asked for.

    Of a weight that tensor parallelism has parted each rank has the scores of the groups that it
    has, and masks by them.

    Args:
        target: which parameter, and the shape of its groups.
        multiplier: ``compression_lr_multiplier``, a factor of the scores' gradients; None: 1.
        options: as ``SparseWeight``'s.
    """

    initial_score: ClassVar[float] = 0.0  # what all scores start from

    def __init__(self, target: Target, *, multiplier: float | None = None, **options: Any) -> None:
        super().__init__(target, **options)
        self.multiplier = multiplier
        # of a shard they have memory once FSDP2 has parted them
        scores = self._new_scores("meta" if self.in_parts else self.weight.device)
        if self.on_stage:
            scores = scores[self.own_scores[: scores.ndim]].clone()
        self._scores = nn.Parameter(scores)
        # on stages of a pipeline that are sharded: which scores are here, and whether FSDP2
        # gathers them where the weight is
        self._told: tuple[Shard, bool] | None = None
        # fused optimisers rewrite a parameter without a trace in its version
        self.optimizer_steps = 0
        # since these were last set to False: whether the weight was read in training, whether a
        # backward pass has reached what was read, and whether one has reached the scores
        self.was_read = self.has_learned = self.has_gradient = False
        self._watch_scores()

    @property
    def scores(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The trained scores, as the module has them now. Of sharded ones what it has gathered for
        a while is not it.
        """
        found = self.module._parameters.get(scores_name(self.parameter_name))
        if found is not None and _dimensions(found) >= _dimensions(self._scores):
            self._scores = self._scores if is_resting(found) else found
        return self._scores

    def _new_scores(self, device: torch.device | str) -> Tensor:
        size, start = self.scores_shape, self.initial_score
        return torch.full(size, start, dtype=torch.float32, device=device)

    def _watch_scores(self) -> None:
        # weakly: torch holds a tensor's hooks where the garbage collector cannot see the circle
        note = weakref.WeakMethod(self._note_gradient)
        self.scores.register_post_accumulate_grad_hook(lambda _: (note() or bool)())

    def _note_gradient(self) -> None:
        self.has_gradient = True

    def _note_learning(self, _: Tensor) -> None:
        self.has_learned = True

    @property
    @abstractmethod
    def scores_shape(self) -> tuple[int, ...]:
        """How many scores there are, down and across."""

    def noted(self, masked: Tensor) -> Tensor:
        if self.learning and masked.requires_grad and not torch.compiler.is_compiling():
            self.was_read = True
            masked.register_hook(self._note_learning)
        return masked

    def _move(self, weight: Tensor) -> None:
        super()._move(weight)
        # none while the base class is made
        scores: nn.Parameter | None = getattr(self, "_scores", None)
        if scores is None or scores.device == weight.device:
            return
        scores.data = scores.data.to(weight.device)
        if scores.grad is not None:
            scores.grad.data = scores.grad.data.to(weight.device)

    def freeze(self, frozen: bool) -> None:
        if frozen:
            # an optimiser leaves alone what has no gradient, its momentum notwithstanding
            self.scores.grad = None
        super().freeze(frozen)

    def trained_scores(self) -> Tensor:
        """Return the scores as the forward pass reads them: gathered, where the weight is."""
        found: Any = self.module._parameters[scores_name(self.parameter_name)]
        return self._trained(found.to_local() if is_sharded(found) else found)

    def trained_part(self) -> Tensor:
        """Return the scores that are here, as the loss reads them. Where several stages have
        them, whose gradients are added up, the first pulls.
        """
        scores: Any = self.scores
        if is_sharded(scores):
            self.follow()
            scores = scores.to_local()
        return self._trained(scores if self.is_first_stage else scores.detach())

    def _trained(self, scores: Tensor) -> Tensor:
        scores = scores.float()  # of less bits where a mixed-precision policy gathers them
        return scores if self.multiplier is None else scale_gradient(scores, self.multiplier)

    def part(self) -> Tensor:
        """Return the scores that are here, without a gradient."""
        if is_sharded(self.scores):
            self.follow()
        return local_part(self.scores).detach()

    def full_scores(self) -> Tensor:
        """Return all scores, on the CPU: gathered, to be saved."""
        scores: Any = self.scores.detach()
        if is_sharded(scores):
            scores = scores.full_tensor()
        if self.target.holders:
            scores = from_stage(self, scores, self.scores_shape)
        return scores.to("cpu", copy=True)

    def take_scores(self, scores: Tensor) -> None:
        """Take over what ``full_scores`` returned, in place."""
        here: Any = local_part(self.scores)
        if self.on_stage:
            scores = scores[self.own_scores[: scores.ndim]]
        elif self.in_parts:
            scores = scores[self._as_stored(*self.scores_shard.here)[: scores.ndim]]
        here.copy_(scores)
        torch.autograd.graph.increment_version(self.scores)

    def mask_state(self) -> tuple[Any, ...]:
        scores = self.scores
        # as every rank must be of one mind that they have changed: no address
        place = 0 if is_sharded(scores) else scores.data_ptr()
        return place, scores._version, self.optimizer_steps

    # shards

    @property
    @abstractmethod
    def score_sides(self) -> tuple[int, int]:
        """How many rows and columns of the matrix that is here have one score."""

    @property
    def own_scores(self) -> tuple[slice, slice]:
        """Which rows and columns of the scores, as they are stored, a forward pass has: not all on
        a stage of a pipeline, or by tensor parallelism.
        """
        part = self.shard if self.on_stage else self.multiplied
        assert part is not None
        rows, cols = (
            slice(ceil_div(here.start, side), ceil_div(here.stop, side))
            for here, side in zip(part.here, self.score_sides, strict=True)
        )
        return self._as_stored(rows, cols)

    def _as_stored(self, rows: slice, cols: slice) -> tuple[slice, slice]:
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def scores_shard(self) -> Shard:
        """Which scores are here, of a matrix of all that lies as the weight's."""
        if self._told is not None:
            return self._told[0]
        holders = self.target.holders
        layout: Any = {"transposed": self.transposed, "experts": False, "holders": holders}
        found = shard_of(self.name, self.scores, Unstructured(), self.ranks, **layout)
        assert found is not None
        return found

    @property
    def scored_groups(self) -> tuple[slice, slice]:
        """Which rows and columns of the full weight's groups have their scores here."""
        tall, wide = self._groups_a_score
        rows, cols = self.scores_shard.here
        return slice(rows.start * tall, rows.stop * tall), slice(
            cols.start * wide, cols.stop * wide
        )

    @property
    def scored_parts(self) -> tuple[list[int], list[int]]:
        """How many rows of groups have their scores in each part, and how many columns."""
        tall, wide = self._groups_a_score
        shard = self.scores_shard
        rows, cols = (pairwise(ends) for ends in (shard.bounds, shard.edges))
        return [tall * (b - a) for a, b in rows], [wide * (b - a) for a, b in cols]

    @property
    def scored_width(self) -> int:
        """How many columns of groups have their scores here."""
        cols = self.scored_groups[1]
        return cols.stop - cols.start

    @property
    def _groups_a_score(self) -> tuple[int, int]:
        assert self.shard is not None
        (down, across), (rows, cols) = self.shard.grid, self.scores_shard.shape
        return down // rows, across // cols

    def join(self, records: Records) -> None:
        """Shard the scores as the weight is already: let FSDP2 do it, and gather them with it; or
        keep those of the groups that tensor parallelism has left here.
        """
        super().join(records)
        if self.absent:
            return
        places = [(module, scores_name(name)) for module, name in self.target.users]
        weight: Any = self.weight
        local = self._new_scores("meta")
        if self.multiplied is not None:
            self._check_sides(self.multiplied)
            local = local[self.own_scores[: local.ndim]]
        local = torch.full(local.shape, self.initial_score, device=weight.device)
        if self.is_gathered:
            shard_beside(records[self.user], places, local, self.scores_shape)
        else:
            scores = nn.Parameter(like_shard(weight, local, self.scores_shape))
            for owner, own in places:
                owner.register_parameter(own, scores)
        self._watch_scores()

    def take_layout(self, shard: Shard, *, gathered: bool) -> None:
        """Take note of which scores are here on stages of a pipeline that are sharded, and whether
        FSDP2 has ``gathered`` the weight for a forward pass where it is.
        """
        self._told = shard, gathered
        if self.absent:
            rows, cols = shard.sides
            sides = (cols, rows) if self.transposed else (rows, cols)
            nothing = torch.empty(sides[: len(self.scores_shape)], device=self.weight.device)
            self._scores = nn.Parameter(nothing)

    @property
    def gathers_scores(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.is_gathered if self._told is None else self._told[1]

    @property
    def scores_lie_as_elements(self) -> bool:
        """True where a rank has the scores of the very elements that it has of the weight."""
        if self.shard is None or not self.packed or self.score_sides != (1, 1):
            return False
        # of experts, which are parted by their number, scores are parted by rows
        scores = self.scores_shard
        return (scores.bounds, scores.edges) == (self.shard.bounds, self.shard.edges)

    def _check_sides(self, part: Shard) -> None:
        if len(self.scores_shape) != len(self.weight_shape):
            raise ValueError(
                f"create_controller: the weight of {self.name!r} must be a matrix to lie on ranks "
                f"by tensor parallelism under a mask that is learned, got the shape "
                f"{tuple(self.weight_shape)}; list it in ignored_scopes"
            )
        ends = part.bounds, part.edges
        for what, found, side in zip(("rows", "columns"), ends, self.score_sides, strict=True):
            if any(end % side for end in found[:-1]):
                raise ValueError(
                    f"create_controller: tensor parallelism must part {self.name!r} by whole "
                    f"groups of {side} {what} under a mask that is learned, got "
                    f"{[b - a for a, b in pairwise(found)]} {what}; list it in ignored_scopes or "
                    "give it a pattern in overrides"
                )

    def _become_sharded(self, weight: Any) -> None:
        scores: Any = self.scores
        places = [(t.device_mesh, t.placements) for t in (weight, scores) if is_sharded(t)]
        if len(places) < 2 or places[0] != places[1]:
            raise ValueError(
                f"the scores of {self.name!r} must be sharded as their weight is, got "
                f"{scores.placements if is_sharded(scores) else type(scores).__name__} for "
                f"{weight.placements}; let fully_shard have both"
            )
        model = self.model()
        record = None if model is None else records_of(model).get(self.user)
        # with what is around the controller's model: over the first dimensions
        first = range(dimensions_of(weight) - self._dimensions)
        check_shard(self.target, weight, first if record is None else record.over)
        super()._become_sharded(weight)
        self._watch_scores()

    def take_part(self, grid: Tensor, kept: int | None = None) -> None:
        """Take over the bool grid of what is here, whole groups, in place.

        Args:
            grid: of what is here.
            kept: how many groups the full weight keeps, which all have as many elements; None: the
                ranks with other parts of it tell, those of this stage of a pipeline alone.
        """
        here = _elements(grid, self.kind.pattern, self.shape)
        if kept is None:
            speaks, _, add = within(self)
            own = torch.tensor([int(grid.count_nonzero()), here], device=grid.device)
            groups, elements = add(own * speaks).tolist()
        else:
            groups, elements = kept, kept * self.pattern.rows * self.pattern.cols
        self.elements_elsewhere = elements - here
        self.mask.copy_(self._compact(grid))
        self.note(groups, here)

    def tell_counts(self) -> None:
        """Tell all stages of a pipeline, which must call this, how much the mask keeps."""
        here = _elements(self.kept_grid(), self.kind.pattern, self.shape)
        ((kept, here),) = agree_counts([self], [self.mask], [[here, here]])
        self.note(kept, here)

    def _take_full(self, grid: Tensor) -> None:
        """Take over the bool grid of the full weight, in place."""
        own = self.local_grid(grid)
        here = _elements(own, self.kind.pattern, self.shape)
        self.elements_elsewhere = _elements(grid, self.pattern, self.full_shape) - here
        self.mask.copy_(self._compact(own))
        self.note(int(grid.count_nonzero()), here)


def _dimensions(parameter: Tensor) -> int:
    """Return on how many dimensions of a mesh a parameter lies: 0 of one that is whole."""
    return dimensions_of(parameter) if is_sharded(parameter) else 0


def _elements(grid: Tensor, pattern: Pattern, shape: tuple[int, int]) -> int:
    """Count the elements of the groups that are True: those at the edges have fewer."""
    if not isinstance(pattern, Block):
        return int(grid.count_nonzero())
    tall, wide = side_lengths(shape, pattern.rows, pattern.cols, device=grid.device)
    return int((grid * tall * wide).sum())
