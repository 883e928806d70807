"""Weights that are dense and read masked: their masks are learned, from scores that are trained
along with them or from what pruned elements come to be.

The module's attribute reads masked: whoever computes with ``child.weight`` sees the mask, and
what the mask follows from is in the graph. Once the masks are frozen the weight holds the zeros,
as any sparse weight.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.bits import pack, packed_shape, unpack
from ...kernels.grid import ceil_div
from ...kernels.masked_weight import apply_mask
from ...kernels.pattern import Pattern, Unstructured
from .exchange import full_masks, known_anywhere
from .linear import restore_class, skip_blocks
from .shards import (
    dimensions_of,
    gathered,
    gathered_over,
    is_sharded,
    like_shard,
    local_part,
    reshard,
    shard_beside,
)
from .weight import SparseWeight, Target, take_values

WEIGHTS = "_learned_weights"  # the attribute of a module that reads such weights: them, by name


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
        return self.module.training and not self.frozen and hasattr(self.module, WEIGHTS)

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
    blocks, and the mask of a bias, every rank has.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._passed: Tensor | None = None  # that of what FSDP2 gathers, where every rank has it
        self._gathered: Any = None  # FSDP2's record of the mask
        # on stages of a pipeline: whether the ranks that have it gather its mask whole, once told
        self._moves_whole: bool | None = None
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
        own = local_part(here).view(torch.uint8)
        width = self._places()[1]
        mask = pack(unpack(self.mask, self.shape[1]).T) if self.transposed else self.mask
        own[:, :width].copy_(mask.view(len(own), width))
        self._passed = None
        return True

    def _mask_beside(self, model: nn.Module) -> Any:
        """Return FSDP2's record of a new parameter for the mask; None: every rank must have it."""
        part, shape = self.multiplied, self.weight_shape
        stored = 1 if self.transposed else 0  # the side of the matrix that is stored first
        fits = part is None or (len(shape) == 2 and not self.transposed)
        by_rows = len(shape) > 1 and self.shape[1 - stored] == self._sides()[1 - stored]
        if not (self.packed and by_rows and fits):
            return None
        first, width = self._places()
        padded = 8 * ceil_div(width, 8)  # bytes of which numbers of any dtype can be made
        local = torch.zeros(first, padded, dtype=torch.uint8, device=self.mask.device)
        beside = 1 if part is None else len(part.edges) - 1
        weight, place = self.target.users[0], (self._holder, "mask")
        return shard_beside(model, weight, [place], local, (shape[0], beside * padded))

    def _sides(self) -> tuple[int, int]:
        """Return the sides of what a forward pass has of the weight as a matrix."""
        part = self.multiplied
        return self.full_shape if part is None else part.sides

    def _places(self) -> tuple[int, int]:
        """Return of how many rows the mask is that FSDP2 gathers, and of how many bytes each. They
        are parted as the weight is: a convolution by its channels, experts by their number, and
        one that is stored (in, out) by its inputs.
        """
        rows, cols = reversed(self._sides()) if self.transposed else self._sides()
        first = self.weight_shape[0] if self.multiplied is None else rows
        return first, rows // max(first, 1) * ceil_div(cols, 8)

    def readable(self, weight: Tensor) -> tuple[Tensor, Tensor, Pattern]:
        """Return what a forward pass has of the weight as a matrix, its mask and its pattern.

        Where FSDP2 has gathered the mask the matrix is as the weight is stored.
        """
        if not self.is_gathered:
            matrix = self.matrix(weight)
            return matrix, self.mask_for(matrix), self.kind.pattern
        part, mask = self.multiplied, self._passed
        matrix = self.target.matrix(weight) if part is None else self.matrix(weight)
        pattern = self.pattern if part is None else part.own_pattern
        if mask is None:
            found: Any = self._holder._parameters["mask"]
            found = found.to_local() if is_sharded(found) else found
            mask = found.detach().view(torch.uint8)[:, : self._places()[1]]
            if self.transposed:
                matrix, pattern = matrix.T, Unstructured()  # as it is stored
            mask = mask.reshape(packed_shape(matrix.shape))
        return matrix, mask, pattern

    def evaluated(self, weight: Tensor) -> Tensor:
        if not self.in_parts:
            return super().evaluated(weight)
        matrix, mask, pattern = self.readable(weight)
        masked = apply_mask(matrix, mask, pattern, backend=self.backend)
        return self.reshaped(masked, weight)

    def reshaped(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Return ``readable``'s matrix in the shape of what a forward pass has of the weight."""
        as_stored = self.is_gathered and self._passed is None
        return (matrix.T if self.transposed and not as_stored else matrix).reshape(weight.shape)

    @staticmethod
    def masks_changed(owners: Sequence[Any]) -> None:
        """Gather the masks of shards, where forward passes need those of what is gathered."""
        SparseWeight.masks_changed(owners)
        gathered = [weight for weight in owners if weight.is_gathered and not weight.frozen]
        moved = {weight for weight in gathered if not weight._gather_mask()}
        staged = [weight for weight in owners if weight.in_parts and weight.target.holders]
        if any(weight._moves_whole is None for weight in staged):
            # of a weight on another stage of a pipeline this rank cannot know; it stays so
            told = known_anywhere(staged, {weight.name for weight in moved})
            for weight in staged:
                weight._moves_whole = weight in told
        moved |= {w for w in staged if w.absent and w._moves_whole and not w.frozen}
        ordered = [weight for weight in owners if weight in moved]
        for weight, grid in zip(ordered, full_masks(ordered) if ordered else (), strict=True):
            if not weight.absent:
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
            check_shard(target, target.weight, over.get(user, ()))


def check_shard(target: Target, weight: Any, over: Sequence[int]) -> None:
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


def scores_name(parameter: str) -> str:
    """Return what a module calls the scores of a weight."""
    return f"{parameter}_scores"
