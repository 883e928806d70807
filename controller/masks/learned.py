"""Weights that are dense and read masked: their masks are learned, from scores that are trained
along with them or from what pruned elements come to be.

The module's attribute reads masked: whoever computes with ``child.weight`` sees the mask, and
what the mask follows from is in the graph. Once the masks are frozen the weight holds the zeros,
as any sparse weight.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels.bits import packed_shape
from ...kernels.grid import ceil_div, side_lengths
from ...kernels.learned_mask import scale_gradient
from ...kernels.masked_weight import apply_mask
from ...kernels.pattern import Block, Pattern, Unstructured
from .exchange import from_stage, full_masks, sums_of_parts
from .linear import restore_class, skip_blocks
from .module import MaskedModule, become, unsharded_class
from .shards import (
    Shard,
    dimensions_of,
    gathered,
    gathered_over,
    is_resting,
    is_sharded,
    like_shard,
    local_part,
    reshard,
    shard_beside,
    shard_of,
)
from .weight import SparseWeight, Target, take_values

_WEIGHTS = "_learned_weights"
# FSDP2 takes parameters that are no floats; torch compares its version as one, not as text
_GATHERS_BYTES = torch.__version__ >= "2.13"


class LearnedWeight(SparseWeight):
    """A weight that is dense and reads masked, until it is frozen."""

    def __init__(self, target: Target, **options: Any) -> None:
        self.frozen = False
        self.model: Callable[[], nn.Module | None] = lambda: None  # the controller's
        super().__init__(target, **options)
        self._folded: tuple[tuple[Any, ...], weakref.ref[nn.Parameter]] | None = None

    @property
    def holds_zeros(self) -> bool:
        return self.frozen

    @property
    def is_gathered(self) -> bool:
        """True where FSDP2 gathers the weight for a forward pass."""
        return self.in_parts and self.multiplied is not self.shard

    def join(self, model: nn.Module) -> None:
        """Find out what a forward pass has of the weight, which is sharded already."""
        over = gathered_over(model).get((id(self.module), self.parameter_name), ())
        self.multiplied = self.shard_of(self.weight, over) if over else self.shard

    def _become_sharded(self, weight: Any) -> None:
        before = self.shard
        super()._become_sharded(weight)
        self.multiplied = before

    def is_passed(self, weight: Tensor) -> bool:
        """Tell whether the module has its weight as a forward pass does: gathered by FSDP2, if
        that shards it.
        """
        if not is_sharded(weight):
            return True
        dimensions = dimensions_of(weight)
        alone = self.in_parts and self.multiplied is self.shard
        return dimensions < self._dimensions or (alone and dimensions == self._dimensions)

    @property
    def learning(self) -> bool:
        """True where a forward pass reads what is to be trained, not the mask of evaluation."""
        return self.learns()

    def learns(self) -> bool:
        """Tell what ``learning`` is: a method, as torch 2.11 compiles no ``super().learning``."""
        return self.module.training and not self.frozen and isinstance(self.module, LearnedModule)

    @abstractmethod
    def learned(self, weight: Tensor) -> Tensor:
        """Return the masked weight, with a gradient to all that the mask follows from."""

    def evaluated(self, weight: Tensor) -> Tensor:
        """Return the weight under the mask of evaluation, differentiable."""
        self.settle()
        # traced, the count would be guarded: an update would compile anew
        if self.all_kept and not torch.compiler.is_compiling():
            return weight
        return torch.where(self.binary_mask, weight, 0)

    def read(self) -> Tensor:
        """Return what the module's attribute is: the masked weight, or once frozen the weight. Of
        a sharded module it is the masked weight while FSDP2 has it gathered, for a forward pass.
        """
        weight: Any = (
            self.weight if self.shard is None else self.module._parameters[self.parameter_name]
        )
        if self.frozen or not self.is_passed(weight):
            return weight
        if not self._is_here(weight):
            self.follow()
        sharded = is_sharded(weight)
        here = weight.to_local() if sharded else weight
        masked = self.learned(here) if self.learning else self.evaluated(here)
        return self.noted(like_shard(weight, masked, weight.shape) if sharded else masked)

    def noted(self, masked: Tensor) -> Tensor:
        """Return the masked weight, which a forward pass reads."""
        return masked

    def masked(self, tensor: Tensor) -> Tensor:
        if self.frozen:
            return super().masked(tensor)
        self.follow()
        return self.learned(tensor) if self.learning else self.evaluated(tensor)

    def check_fits(self, weight: Tensor) -> None:
        super().check_fits(weight)
        # as parallelize_module registers it; fully_shard puts its shards in without a word
        held = self.module._parameters.get(self.parameter_name)
        if is_sharded(weight) and held is not None and not is_sharded(held):
            placements = weight.placements  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                f"the weight of {self.name!r} must not be parted by tensor parallelism under a "
                f"mask that is learned, got {placements}; call parallelize_module before "
                "create_controller"
            )

    def freeze(self, frozen: bool) -> None:
        """Let the stored mask stay, and the weight be zero where it prunes; or go on."""
        self.frozen = frozen
        if frozen:
            take_values([self])
            skip_blocks(self, self.module, self.parameter_name)
        else:
            restore_class(self.module)

    def let_go(self) -> None:
        """Have no more of a mask that FSDP2 gathers, which ``forget_gone`` tells it."""

    def mask_state(self) -> tuple[Any, ...]:
        """Return what differs once the mask of evaluation may be another."""
        return (self.changes,)

    @torch.no_grad()
    def folded(self) -> nn.Parameter:
        """Return the weight under the mask of evaluation as a parameter of its own, for a copy.
        Modules that share a weight share this too, as long as somebody holds it.
        """
        key = self.weight.data_ptr(), self.weight._version, *self.mask_state()
        found = self._folded[1]() if self._folded and self._folded[0] == key else None
        if found is None:
            value = self.evaluated(self.weight.detach()).clone()
            found = nn.Parameter(value, requires_grad=self.weight.requires_grad)
            self._folded = key, weakref.ref(found)
        return found


class UpdatedWeight(LearnedWeight):
    """A weight that reads under the mask of the last update.

    Where FSDP2 gathers the weight, a forward pass needs the mask of what is gathered. Of single
    elements FSDP2 gathers it too, a bit each: bytes, sharded by rows as the weight is. A grid of
    blocks, and a mask whose rows lie otherwise, every rank has; before torch 2.13 any mask.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._passed: Tensor | None = None  # that of what FSDP2 gathers, where every rank has it
        self._gathered: Any = None  # FSDP2's record of the mask
        # has it in the place of the weight's module: it is no parameter of the model, which could
        # not be given a gradient, and would count in an optimiser's state
        self._holder = nn.Module()
        super().__init__(*args, **options)

    def join(self, model: nn.Module) -> None:
        super().join(model)
        if self.is_gathered and not self._gather_mask():
            self._pass(torch.ones(self.full_grid, dtype=torch.bool, device=self.mask.device))

    def _pass(self, grid: Tensor) -> None:
        """Let a forward pass read this bool grid of the full weight, of which FSDP2 gathers all or
        a part.
        """
        part = self.multiplied
        self._passed = self._compact(grid if part is None else self.local_grid(grid, part))

    def _gather_mask(self) -> bool:
        """Let FSDP2 gather what is here of the mask; tell if it can."""
        model = self.model()
        if self._gathered is None and model is not None:
            self._gathered = self._mask_beside(model)
        if self._gathered is None or model is None:
            return False
        here = self._gathered.sharded_param
        if self._holder._parameters["mask"] is not here:
            reshard(model)  # an evaluation has left an earlier mask gathered
        own = local_part(here)
        own.copy_(self.mask.view(own.shape))
        self._passed = None
        return True

    def _mask_beside(self, model: nn.Module) -> Any:
        """Return FSDP2's record of a new parameter for the mask; None: every rank must have it."""
        part, shape = self.multiplied, self.weight_shape
        rows, cols = self.full_shape if part is None else part.sides
        by_rows = len(shape) > 1 and self.shape[1] == cols and not self.transposed
        if not (_GATHERS_BYTES and self.packed and by_rows and (part is None or len(shape) == 2)):
            return None
        # parted as the weight is, a convolution by its channels, experts by their number
        first = shape[0] if part is None else rows
        width = rows // max(first, 1) * ceil_div(cols, 8)
        beside = 1 if part is None else len(part.edges) - 1
        local = torch.zeros(first, width, dtype=torch.uint8, device=self.mask.device)
        weight, place = self.target.users[0], (self._holder, "mask")
        return shard_beside(model, weight, [place], local, (shape[0], beside * width))

    def readable(self, weight: Tensor) -> tuple[Tensor, Tensor, Pattern]:
        """Return what a forward pass has of the weight as a matrix, its mask and its pattern."""
        if not self.is_gathered:
            matrix = self.matrix(weight)
            return matrix, self.mask_for(matrix), self.kind.pattern
        part, mask = self.multiplied, self._passed
        matrix = self.target.matrix(weight) if part is None else self.matrix(weight)
        pattern = self.pattern if part is None else part.own_pattern
        if mask is None:
            found: Any = self._holder._parameters["mask"]
            found = found.to_local() if is_sharded(found) else found
            mask = found.detach().view(packed_shape(matrix.shape))
        return matrix, mask, pattern

    def evaluated(self, weight: Tensor) -> Tensor:
        if not self.in_parts:
            return super().evaluated(weight)
        matrix, mask, pattern = self.readable(weight)
        masked = apply_mask(matrix, mask, pattern, backend=self.backend)
        return self.reshaped(masked, weight)

    def reshaped(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Return a matrix (out, in) in the shape of what a forward pass has of the weight."""
        return (matrix.T if self.transposed else matrix).reshape(weight.shape)

    @staticmethod
    def masks_changed(owners: Sequence[Any]) -> None:
        """Gather the masks of shards, where forward passes need those of what is gathered."""
        SparseWeight.masks_changed(owners)
        gathered = [weight for weight in owners if weight.is_gathered and not weight.frozen]
        moved = [weight for weight in gathered if not weight._gather_mask()]
        for weight, grid in zip(moved, full_masks(moved) if moved else (), strict=True):
            weight._pass(grid)

    def _become_sharded(self, weight: Any) -> None:
        mask = self._compact(self.kept_grid()).clone()
        super()._become_sharded(weight)
        # until the next update: a forward pass may be under way, and the group's gathering with it
        self._passed = None if self.frozen else mask

    def freeze(self, frozen: bool) -> None:
        super().freeze(frozen)
        self._passed = None
        if frozen:
            self.let_go()
        if self.shard is not None:
            self.masks_changed([self])

    def let_go(self) -> None:
        self._gathered = None
        self._holder._parameters.clear()


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
        found = self.module._parameters.get(_scores_name(self.parameter_name))
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
        found: Any = self.module._parameters[_scores_name(self.parameter_name)]
        return self._trained(found.to_local() if is_sharded(found) else found)

    def trained_part(self) -> Tensor:
        """Return the scores that are here, as the loss reads them. Where several stages have
        them, whose gradients are added up, the first pulls.
        """
        scores: Any = self.scores
        if not is_sharded(scores):
            copied = self.on_stage and self.shard is not None and not self.shard.counted
            return self._trained(scores.detach() if copied else scores)
        self.follow()
        return self._trained(scores.to_local())

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
        elif self.on_stage:
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
        layout: Any = {"transposed": self.transposed, "experts": False}
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
    def _groups_a_score(self) -> tuple[int, int]:
        assert self.shard is not None
        (down, across), (rows, cols) = self.shard.grid, self.scores_shard.shape
        return down // rows, across // cols

    def join(self, model: nn.Module) -> None:
        """Shard the scores as the weight is already: let FSDP2 do it, and gather them with it; or
        keep those of the groups that tensor parallelism has left here.
        """
        super().join(model)
        places = [(module, _scores_name(name)) for module, name in self.target.users]
        weight: Any = self.weight
        local = self._new_scores("meta")
        if self.multiplied is not None:
            self._check_sides(self.multiplied)
            local = local[self.own_scores[: local.ndim]]
        local = torch.full(local.shape, self.initial_score, device=weight.device)
        if self.is_gathered:
            shard_beside(model, self.target.users[0], places, local, self.scores_shape)
        else:
            scores = nn.Parameter(like_shard(weight, local, self.scores_shape))
            for owner, own in places:
                owner.register_parameter(own, scores)
        self._watch_scores()

    @property
    def gathers_scores(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.is_gathered

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
        _check_shard(self.target, weight, range(dimensions_of(weight) - self._dimensions))
        super()._become_sharded(weight)
        self._watch_scores()

    def take_part(self, grid: Tensor) -> None:
        """Take over the bool grid of what is here, in place; of other parts, or of the stage that
        has the weight, how much they keep.
        """
        assert self.shard is not None
        here = _elements(grid, self.kind.pattern, self.shape)
        own = torch.tensor([int(grid.count_nonzero()), here], device=grid.device)
        kept, elements = sums_of_parts([self], own).tolist()
        self.elements_elsewhere = elements - here
        self.mask.copy_(self._compact(grid))
        self.note(kept, here)

    def _take_full(self, grid: Tensor) -> None:
        """Take over the bool grid of the full weight, in place."""
        own = self.local_grid(grid)
        here = _elements(own, self.kind.pattern, self.shape)
        self.elements_elsewhere = _elements(grid, self.pattern, self.full_shape) - here
        self.mask.copy_(self._compact(own))
        self.note(int(grid.count_nonzero()), here)


def check_shards(model: nn.Module, targets: Sequence[Target], *, scored: bool) -> None:
    """Refuse weights that are sharded, of which forward passes cannot be told what they have, or
    where scores cannot be sharded with them, if they are ``scored``.
    """
    known, over = (gathered(model), gathered_over(model)) if targets else (set(), {})
    for target in targets:
        module, name = target.users[0]
        user = id(module), name
        if user in known and user not in over:
            raise ValueError(
                f"create_controller: the weight of {target.name!r} must be sharded by fully_shard "
                "on a mesh of its own beside that of tensor parallelism under a mask that is "
                f"learned, got {target.weight.placements}; list it in ignored_scopes"  # pyright: ignore[reportAttributeAccessIssue]
            )
        if scored:
            _check_shard(target, target.weight, over.get(user, ()))


def _check_shard(target: Target, weight: Any, over: Sequence[int]) -> None:
    """Refuse what scores cannot be sharded beside. ``over`` these dimensions of its mesh FSDP2
    gathers a weight.
    """
    by_rows = all(getattr(weight.placements[i], "dim", 0) == 0 for i in over)
    rest = [placed for i, placed in enumerate(weight.placements) if i not in over]
    whole = all(not hasattr(placed, "dim") for placed in rest)
    if not (by_rows and (whole or weight.ndim <= 2)) or weight.dtype != torch.float32:
        raise ValueError(
            f"the weight of {target.name!r} must be float32, and sharded by the dimension that is "
            "stored first under a mask that is learned, with scores that FSDP2 gathers beside it, "
            f"or be a matrix that tensor parallelism has parted, got {weight.dtype} and "
            f"{weight.placements}; MixedPrecisionPolicy computes in fewer bits, ignored_scopes "
            "leaves it dense"
        )


def _dimensions(parameter: Tensor) -> int:
    """Return on how many dimensions of a mesh a parameter lies: 0 of one that is whole."""
    return dimensions_of(parameter) if is_sharded(parameter) else 0


def _elements(grid: Tensor, pattern: Pattern, shape: tuple[int, int]) -> int:
    """Count the elements of the groups that are True: those at the edges have fewer."""
    if not isinstance(pattern, Block):
        return int(grid.count_nonzero())
    tall, wide = side_lengths(shape, pattern.rows, pattern.cols, device=grid.device)
    return int((grid * tall * wide).sum())


class LearnedModule(MaskedModule):
    """A module some of whose weights read masked. Its forward is its own class's; scores, where a
    weight has such, are its parameters ``<weight>_scores``, but no keys of its state dict.
    """

    _learned_weights: dict[str, LearnedWeight]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # scores follow to the device; their dtype stays: a 16-bit one could not take a small step
        with self._without_scores():
            super()._apply(fn, recurse)
        for weight in self._learned_weights.values():
            found = weight.follow()
            if weight.scores is not None and not is_sharded(found) and found.is_shared():
                weight.scores.share_memory_()
        return self

    def train(self, mode: bool = True) -> Any:
        # compiled code cannot look at the scores: it reads the mask as it is
        if not mode:
            for weight in self._learned_weights.values():
                weight.settle()
        return super().train(mode)

    @contextmanager
    def _without_scores(self) -> Iterator[None]:
        """Part with the score parameters for as long as the context is open."""
        scored = [*map(_scores_name, self._learned_weights)]
        held = {name: self._parameters.pop(name) for name in scored if name in self._parameters}
        try:
            yield
        finally:
            self._parameters.update(held)

    # parameters to optimisers and distributed wrappers, scores are no part of the model's state
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_scores():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_scores():
            super()._load_from_state_dict(*args, **kwargs)

    # The mask of evaluation is folded into the weight of a copy. The scores stay parameters of it,
    # or an average of parameters would pair wrong ones.
    def _state_of_copy(self) -> dict[str, Any]:
        state = super()._state_of_copy()
        weights: dict[str, LearnedWeight] = state.pop(_WEIGHTS)
        folded = {name: weight.folded() for name, weight in weights.items()}
        return state | {"_parameters": dict(state["_parameters"]) | folded}


class _LearnedRNN(LearnedModule):
    """Recurrent layers read their weights from a flat list."""

    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dense = self._flat_weights
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._flat_weights = dense


def read_masked(module: nn.Module, weights: Mapping[str, LearnedWeight]) -> None:
    """Let attributes of ``module`` read masked, in place; scores become its parameters."""
    module.__dict__[_WEIGHTS] = dict(weights)
    become(module, _class_of(unsharded_class(type(module)), tuple(weights)))
    for name, weight in weights.items():
        if weight.scores is not None:
            module.register_parameter(_scores_name(name), weight.scores)


def read_plain(module: nn.Module) -> None:
    """Give a module its class back; its weights are left as they are."""
    if isinstance(module, LearnedModule):
        for name, weight in module.__dict__.pop(_WEIGHTS).items():
            drop_scores(module, name)
            weight.let_go()
        become(module, type(module).dense_class)


def drop_scores(module: nn.Module, parameter_name: str) -> None:
    """Take the scores of a weight out of a module."""
    module._parameters.pop(_scores_name(parameter_name), None)


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the trained scores in ``model``, each once, as modules have them now."""
    found = [
        parameter
        for module in model.modules()
        if isinstance(module, LearnedModule)
        for name in module._learned_weights
        if (parameter := module._parameters.get(_scores_name(name))) is not None
    ]
    return list(dict.fromkeys(found))


@cache
def _class_of(dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    base: type[nn.Module] = _LearnedRNN if issubclass(dense, nn.RNNBase) else LearnedModule
    # a property comes before a registered parameter; assigning one still registers it
    attributes: dict[str, Any] = {name: property(_reader(name)) for name in names}
    attributes |= {"dense_class": dense}
    return type(f"Learned{dense.__name__}", (base, dense), attributes)  # pyright: ignore[reportReturnType]


def _reader(name: str) -> Callable[[LearnedModule], Tensor]:
    def read(module: LearnedModule) -> Tensor:
        return module._learned_weights[name].read()

    return read


def _scores_name(parameter: str) -> str:
    return f"{parameter}_scores"
