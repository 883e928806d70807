"""Weights that are dense and read masked: their masks are learned, from scores that are trained
along with them or from what pruned elements come to be.

The module's attribute reads masked: whoever computes with ``child.weight`` sees the mask, and
what the mask follows from is in the graph. Once the masks are frozen the weight holds the zeros,
as any sparse weight.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.bits import pack, packed_shape, unpack
from ...kernels.grid import ceil_div
from ...kernels.masked_weight import apply_mask
from ...kernels.pattern import Pattern, Unstructured
from .exchange import full_masks, known_anywhere
from .linear import restore_class, skip_blocks
from .shards import (
    Records,
    bytes_beside,
    dimensions_of,
    is_sharded,
    like_shard,
    local_part,
    records_of,
    reshard,
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

    @property
    def user(self) -> tuple[int, str]:
        """What ``records_of`` calls the weight."""
        return id(self.module), self.parameter_name

    def join(self, records: Records) -> None:
        """Find out what a forward pass has of the weight, which is sharded already.

        Args:
            records: ``records_of`` the controller's model.
        """
        over = records[self.user].over if self.user in records else ()
        self.multiplied = self.shard_of(self.weight, over) if over else self.shard

    def _become_sharded(self, weight: Any) -> None:
        before = self.shard
        super()._become_sharded(weight)
        self.multiplied = before

    def is_passed(self, weight: Tensor) -> bool:
        """Tell whether the module has its weight as a forward pass does: gathered by FSDP2, if
        that shards it.

        Raises:
            ValueError: it is gathered with what is around the controller's model, without what its
                mask follows from.
        """
        dimensions = dimensions_of(weight) if is_sharded(weight) else 0
        alone = self.in_parts and self.multiplied is self.shard
        fewer = alone and dimensions < self._dimensions
        if fewer and local_part(weight).shape != self._local_shape:
            raise ValueError(
                f"the weight of {self.name!r} must not be gathered by fully_shard of what is "
                f"around the controller's model, as its mask is not, got {tuple(weight.shape)}; "
                "create the controller for the model that is around, or before fully_shard"
            )
        if not is_sharded(weight):
            return True
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


class GatheredMask(NamedTuple):
    """How the mask of single elements lies that FSDP2 gathers: with each rank's part in one row of
    bytes. Gathered, it is packed by the lines that FSDP2 parts.

    Attributes:
        ranks: how many it is gathered from.
        turned: lines are columns of the weight's matrix.
        lines: how many there are of what a forward pass has, and of how many bytes each.
        share: how many of them a rank has; the last ones have fewer.
    """

    ranks: int
    turned: bool
    lines: tuple[int, int]
    share: int

    @property
    def bytes_a_rank(self) -> int:
        return self.share * self.lines[1]


class UpdatedWeight(LearnedWeight):
    """A weight that reads under the mask of the last update.

    Where FSDP2 gathers the weight, a forward pass needs the mask of what is gathered. Of single
    elements FSDP2 gathers it too, as bytes, of which each rank has those of its own elements. A
    grid of blocks every rank has.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._passed: Tensor | None = None  # that of what FSDP2 gathers, where every rank has it
        self._gathered: Any = None  # FSDP2's record of the mask
        self._layout: GatheredMask | None = None  # of that
        # on stages of a pipeline: whether the ranks that have it gather its mask whole, once told
        self._moves_whole: bool | None = None
        # has it in the place of the weight's module: it is no parameter of the model, which could
        # not be given a gradient, and would count in an optimiser's state
        self._holder = nn.Module()
        super().__init__(*args, **options)

    def join(self, records: Records) -> None:
        super().join(records)
        if self.is_gathered and not self._gather_mask(records):
            self._pass(torch.ones(self.full_grid, dtype=torch.bool, device=self.mask.device))

    def _pass(self, grid: Tensor) -> None:
        """Let a forward pass read this bool grid of the full weight, of which FSDP2 gathers all or
        a part.
        """
        part = self.multiplied
        if part is None:
            grid = grid.T.contiguous() if self._upright else grid
        else:
            grid = self.local_grid(grid, part)
        self._passed = self._compact(grid)

    def _gather_mask(self, records: Records | None = None) -> bool:
        """Let FSDP2 gather what is here of the mask; tell if it can: not where it is not FSDP2
        that gathers the weight, or with what is around the controller's model.
        """
        model = self.model()
        if self._gathered is None and model is not None and self.packed:
            known = records_of(model) if records is None else records
            if (record := known.get(self.user)) is not None:
                self._layout = self._layout_beside(record.over)
            if record is not None and self._layout is not None:
                # bytes of which numbers of any dtype can be made
                size = 8 * ceil_div(self._layout.bytes_a_rank, 8)
                place, shape = (self._holder, "mask"), (self._layout.ranks, size)
                self._gathered = bytes_beside(record, place, shape, self.mask.device)
        if self._gathered is None or self._layout is None or model is None:
            return False
        here = self._gathered.sharded_param
        if self._holder._parameters["mask"] is not here:
            reshard(model)  # an evaluation has left an earlier mask gathered
        turned = self._layout.turned
        mask = pack(unpack(self.mask, self.shape[1]).T) if turned else self.mask
        local_part(here).view(torch.uint8).view(-1)[: mask.numel()].copy_(mask.view(-1))
        self._passed = None
        return True

    def _layout_beside(self, over: Sequence[int]) -> GatheredMask | None:
        """Return how the mask lies that FSDP2 gathers, ``over`` these dimensions of the weight's
        mesh; None: none of them parts the weight.
        """
        weight: Any = self.weight
        parted = [i for i in over if hasattr(weight.placements[i], "dim")]
        if self.shard is None or not parted:
            return None
        dim = weight.placements[parted[0]].dim
        ranks = math.prod(weight.device_mesh.size(i) for i in parted)
        turned = self.target.dim_is_across(dim)
        part = self.multiplied
        lines, elements = self.shard.shape if part is None else part.sides
        full = self.shard.shape[0]
        if turned:
            lines, elements, full = elements, lines, self.shard.shape[1]
        # torch parts indices of a dimension, which several lines have in common
        alike = max(full // max(self.weight_shape[dim], 1), 1)
        share = ceil_div(lines // alike, ranks) * alike
        return GatheredMask(ranks, turned, packed_shape((lines, elements)), share)

    def readable(self, weight: Tensor) -> tuple[Tensor, Tensor, Pattern]:
        """Return what a forward pass has of the weight as a matrix, its mask and its pattern.

        Where FSDP2 has gathered the mask rows of the matrix are the lines that it parts.
        """
        matrix = self.matrix(weight)
        if not self.is_gathered:
            return matrix, self.mask_for(matrix), self.kind.pattern
        if self._passed is not None:
            part, whole = self.multiplied, self.shard
            assert whole is not None
            return matrix, self._passed, whole.pattern if part is None else part.own_pattern
        layout = self._layout
        assert layout is not None
        found: Any = self._holder._parameters["mask"]
        found = found.to_local() if is_sharded(found) else found
        own = found.detach().view(torch.uint8)[:, : layout.bytes_a_rank].reshape(-1)
        mask = own[: math.prod(layout.lines)].view(layout.lines)
        return matrix.T if layout.turned else matrix, mask, Unstructured()

    def evaluated(self, weight: Tensor) -> Tensor:
        if not self.in_parts:
            return super().evaluated(weight)
        matrix, mask, pattern = self.readable(weight)
        masked = apply_mask(matrix, mask, pattern, backend=self.backend)
        return self.reshaped(masked, weight)

    def reshaped(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Return ``readable``'s matrix in the shape of what a forward pass has of the weight."""
        layout = self._layout if self.is_gathered and self._passed is None else None
        turned = self.transposed != (layout is not None and layout.turned)
        return (matrix.T if turned else matrix).reshape(weight.shape)

    @staticmethod
    def masks_changed(owners: Sequence[Any]) -> None:
        """Gather the masks of shards, where forward passes need those of what is gathered."""
        SparseWeight.masks_changed(owners)
        learned = [weight for weight in owners if not weight.frozen]
        gathered = [weight for weight in learned if weight.is_gathered]
        new = [weight for weight in gathered if weight.packed and weight._gathered is None]
        model = new[0].model() if new else None
        records = {} if model is None else records_of(model)
        moved = {weight for weight in gathered if not weight._gather_mask(records)}
        staged = [weight for weight in learned if weight.in_parts and weight.target.holders]
        if any(weight._moves_whole is None for weight in staged):
            # of a weight on another stage of a pipeline this rank cannot know; it stays so
            told = known_anywhere(staged, {weight.name for weight in moved})
            for weight in staged:
                weight._moves_whole = weight in told
        moved |= {w for w in staged if w.absent and w._moves_whole}
        ordered = [weight for weight in owners if weight in moved]
        for weight, grid in zip(ordered, full_masks(ordered) if ordered else (), strict=True):
            if not weight.absent:
                weight._pass(grid)

    def _become_sharded(self, weight: Any) -> None:
        upright = self.shard is None and len(self.weight_shape) == 1
        grid = self.kept_grid().T if upright else self.kept_grid()
        mask = self._compact(grid.contiguous()).clone()
        super()._become_sharded(weight)
        # until the next update: a forward pass may be under way, and the group's gathering with it
        self._passed = None if self.frozen else mask

    def freeze(self, frozen: bool) -> None:
        super().freeze(frozen)
        self._passed = None
        if frozen:
            self.let_go()

    def let_go(self) -> None:
        self._gathered = self._layout = None
        self._holder._parameters.clear()


def check_shards(model: nn.Module, targets: Sequence[Target]) -> None:
    """Refuse weights, which are sharded, where scores cannot be sharded with them."""
    records = records_of(model) if targets else {}
    for target in targets:
        module, name = target.users[0]
        record = records.get((id(module), name))
        check_shard(target, target.weight, () if record is None else record.over)


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
