"""The sparse weight: a mask, the zeros it puts into its parameter, and the values it took out.

Correctness lives in the data: wherever the mask prunes, the parameter is exactly zero, so that
whoever reads it needs to know nothing of masks. ``guard.py`` keeps it so while others train, load
and convert the model. Weights are looked up through their modules at every use: wrappers replace
parameter objects.

What it costs, in bytes beside the weight: the mask (``kernels/group_mask.py``); the pruned values,
``level`` x the weight for blocks and once the weight for fine patterns, while masks may change.

Reading order: one weight -> entries of a controller -> several weights at once.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional

from ...kernels import group_mask
from ...kernels.dispatch import Dispatch
from ...kernels.group_mask import GroupMask
from ...kernels.launch import PLAIN, Backend, is_plain, read_later, refuse_capture
from ...kernels.masked_weight import and_words, apply_mask
from ...kernels.pattern import NM, Block, Pattern
from ...kernels.product import BlockProduct, has_blocks_to_skip, update_products
from .parallel_linear import parallel_linear
from .ranks import ALONE, Ranks
from .shards import (
    Shard,
    dimensions_of,
    is_resting,
    is_sharded,
    like_shard,
    local_grid,
    local_part,
    same_layout,
    shard_of,
    stage_of,
)


@dataclass(frozen=True)
class Target:
    """One parameter that is to be under a mask.

    Attributes:
        name: dotted path of its module; with the parameter's name behind it where that is not
            ``weight``.
        users: every (module, parameter name) that holds this very parameter; the first is the
            owner.
        pattern: the shape of a group.
        transposed: it is stored ``(in_features, out_features)``, as Hugging Face's Conv1D, or
            ``(experts, in_features, out_features)``.
        experts: it is one matrix an expert.
        minimum_level, maximum_level: limits of its level; None: the default of all.
        holders: the ranks that have it, of those that have stages of a pipeline; none: all.
        stages: these by stage: several that have the same one are replicas of it.
        absent_shape: its shape, where it is on other stages alone, and here of no rows.
        part: what is here of it, where its stage is sharded itself.
    """

    name: str
    users: tuple[tuple[nn.Module, str], ...]
    pattern: Pattern
    transposed: bool = False
    experts: bool = False
    minimum_level: float = 0.0
    maximum_level: float | None = None
    holders: tuple[int, ...] = ()
    stages: tuple[tuple[int, ...], ...] = ()
    absent_shape: tuple[int, ...] | None = None
    part: Shard | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as its module has it now.

        Raises:
            RuntimeError: it is a parameter of its module no longer.
        """
        module, name = self.users[0]
        found = module._parameters.get(name)
        if found is None:
            raise RuntimeError(
                f"the weight of {self.name!r} must stay a parameter of its module, got a "
                f"{type(module).__name__} without it (a parametrization, quantisation or "
                "deletion took its place); strip the model before, or create the controller after"
            )
        return found

    @property
    def shape(self) -> torch.Size:
        """Of the parameter, wherever it is."""
        return torch.Size(self.absent_shape or self.weight.shape)

    @property
    def parted_pattern(self) -> Pattern:
        """The pattern of what ranks have parts of: a vector's is upright, as rows are parted."""
        pattern = self.pattern
        if len(self.shape) == 1 and isinstance(pattern, Block):
            return Block(pattern.cols, pattern.rows)
        return pattern

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as a matrix (out, in): a view where strides allow.

        A convolution's is ``(out, rest)``. Experts lie below one another, or, where they are
        stored (in, out), side by side: no group reaches from one into the next.
        """
        if tensor.ndim == 1:
            return tensor[None]
        if self.transposed:
            return tensor.flatten(0, -2).T
        if self.experts:
            return tensor.flatten(0, 1)
        return tensor if tensor.ndim == 2 else tensor.flatten(1)

    def dim_is_across(self, dim: int) -> bool:
        """Tell whether a dimension of the weight is one of its matrix's columns. A vector's, which
        is sharded, is its rows.
        """
        # of experts the first two dimensions are those of one line in memory each
        return (dim >= (2 if self.experts else 1)) != self.transposed


class GradientTaker(Protocol):
    """Takes dense gradients of a weight, micro-batch by micro-batch."""

    def join(self, gradient: Tensor) -> None:
        """Add to a gradient, which ranks are about to average, what is pruned of earlier ones."""

    def take(self, gradient: Tensor, *, averaged: bool = False) -> None:
        """Keep a gradient, which ranks have averaged or which is of one alone."""


class SparseWeight(GroupMask):
    """One parameter and which of its groups are kept. Called the operand of its module.

    Its tensors are no buffers: distributed wrappers would broadcast them at every forward.

    Args:
        target: which parameter, and the shape of its groups.
        backend, dispatch: as ``create_controller``'s.
        ranks: those that train the model together.
    """

    scores: nn.Parameter | None = None  # trained with the weight, where the mask follows from such
    gathers_scores = False  # a rank has scores of other rows than it has of the weight

    def __init__(
        self,
        target: Target,
        *,
        backend: Backend = "auto",
        dispatch: Dispatch = "auto",
        ranks: Ranks = ALONE,
    ) -> None:
        self.target = target
        self.module, self.parameter_name = target.users[0]
        self.name = target.name
        self.transposed = target.transposed
        self.dispatch: Dispatch = dispatch
        self.ranks = ranks
        self.shard: Shard | None = None
        self._sharded: weakref.ref[nn.Parameter] | None = None  # while its module has it gathered
        self.elements_elsewhere = 0  # kept, on other ranks
        # of a sharded weight what its module multiplies: FSDP2 gathers it; None: the whole
        self.multiplied: Shard | None = None
        # the grid of the full weight, from when it is sharded until its product has lists again
        self.unlisted: Tensor | None = None
        self._looked_at: weakref.ref[Tensor] | None = None  # the gathered weight, last multiplied
        weight = self.weight
        # on another stage of a pipeline, and here of no rows
        self.absent = target.absent_shape is not None
        self.weight_shape = target.shape
        self._begin(weight, backend)
        # whether pruned values are kept until the masks freeze, and those that are
        self.keeps_values = False
        self.values: Tensor | None = None
        # memory of those that were put back, for the next
        self._spare: Tensor | None = None
        self.values_are_loaded = False  # with a state, and the model may yet be
        # a module skips its blocks: with the first mask it gets their lists
        self.skips_blocks = False
        self.product: BlockProduct | None = None
        # the algorithm takes the gradient of pruned elements before it becomes zero
        self.dense_gradient_taker: GradientTaker | None = None
        self._as_left: tuple[Any, ...] = ()

    def shard_of(self, weight: Tensor, gathered: Sequence[int] = ()) -> Shard | None:
        """Return what is here of a parameter, as ``shards.shard_of``."""
        target = self.target
        layout = {"transposed": target.transposed, "experts": target.experts}
        pattern = target.parted_pattern
        if target.part is not None and not gathered:
            return target.part
        if target.holders and target.part is None:
            matrix = target.matrix(torch.empty(self.weight_shape, device="meta"))
            rows, cols = matrix.T.shape if weight.ndim == 1 else matrix.shape
            return stage_of(target.holders, (rows, cols), pattern, self.ranks)
        options: Any = layout | {"gathered": gathered, "holders": target.holders}
        return shard_of(self.name, weight, pattern, self.ranks, **options)

    def _begin(self, weight: nn.Parameter, backend: Backend) -> None:
        """Keep everything of what is here of a parameter."""
        target = self.target
        shard = self.shard_of(weight)
        self.shard = shard
        self._sharded = weakref.ref(weight) if is_sharded(weight) else None
        self._is_matrix = shard is None and weight.ndim == 2 and not target.transposed
        self._dimensions = dimensions_of(weight) if is_sharded(weight) else 0
        local = self.matrix(weight.detach())
        pattern = target.pattern if shard is None else shard.own_pattern
        rows, cols = local.shape
        super().__init__(pattern, (rows, cols), weight.dtype, weight.device, backend)
        self._local_shape = local_part(weight).shape
        if shard is not None:
            # what is chosen among, and counted, is of the full weight
            self.pattern = target.pattern
            self.groups = self.choices = self.kept = math.prod(shard.grid)
            if isinstance(self.pattern, NM):
                self.choices //= math.prod(self.pattern.group)
            self.elements_elsewhere = self.weight_shape.numel() - local.numel()

    # the parameter

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as its module has it now; see ``Target.weight``. Of a sharded one what
        its module has gathered for a while is not it.
        """
        found = self.module._parameters.get(self.parameter_name)
        if found is None:
            found = self.target.weight
        if self._sharded is None:
            return found
        held = self._sharded()
        if found is held:
            return found
        if held is None:
            here = is_sharded(found) and dimensions_of(found) == self._dimensions
            if here and not is_resting(found):
                self._sharded = weakref.ref(found)  # a load has put it in, and that one is gone
            return found
        if is_sharded(found) and dimensions_of(found) > self._dimensions:
            return found  # of which ``follow`` will take note
        if same_layout(found, held):  # a load has put it in
            self._sharded = weakref.ref(found)
            return found
        return held

    @property
    def is_in_module(self) -> bool:
        """False where the parameter has been taken out of its module: ``weight`` is an error."""
        return self.module._parameters.get(self.parameter_name) is not None

    @property
    def in_parts(self) -> bool:
        """True where it lies in parts on several ranks."""
        return self.shard is not None and not self.shard.on_stages

    @property
    def on_stage(self) -> bool:
        """True where it is whole on some stages of a pipeline; not on this one if ``absent``."""
        return self.shard is not None and self.shard.on_stages

    @property
    def full_shape(self) -> tuple[int, int]:
        """Of the full weight's matrix; ``shape`` is of what is here."""
        down, across = self.shape if self.shard is None else self.shard.shape
        return (across, down) if self._upright else (down, across)

    @property
    def full_grid(self) -> tuple[int, int]:
        """Groups down and across of the full weight."""
        down, across = self.grid if self.shard is None else self.shard.grid
        return (across, down) if self._upright else (down, across)

    @property
    def _upright(self) -> bool:
        """True for a vector that is sharded: it is a column here, and a row as a whole."""
        return self.shard is not None and len(self.weight_shape) == 1

    def local_grid(self, grid: Tensor, part: Shard | None = None) -> Tensor:
        """Return the bool grid of a part, or with None of what is here, from that of the full
        weight.
        """
        part = self.shard if part is None else part
        assert part is not None
        return local_grid(part, grid.T if self._upright else grid).contiguous()

    def whole_grid(self, grid: Tensor) -> Tensor:
        """Return the bool grid of the full weight from one whose parts lie below one another."""
        return grid.T.contiguous() if self._upright else grid

    @property
    def own_groups(self) -> tuple[slice, slice]:
        """What of the full grid is chosen among here; the rest is on other ranks."""
        return (slice(None), slice(None)) if self.shard is None else self.shard.groups

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as ``Target.matrix``; of a sharded one what is
        here.
        """
        if self._is_matrix and type(tensor) in PLAIN:  # as most are, some times in each update
            return tensor
        local = local_part(tensor)
        return local[:, None] if self._upright else self.target.matrix(local)

    def follow(self) -> nn.Parameter:
        """Return the parameter; the mask follows device and dtype. Refuses as ``check_fits``."""
        weight = self.weight
        # what FSDP2 has gathered for a while lies on fewer dimensions of a mesh
        parted = is_sharded(weight) and dimensions_of(weight) > self._dimensions
        if parted and not is_resting(weight):
            self.check_fits(weight)
            self._become_sharded(weight)
        fits = self.absent or weight.shape == self.weight_shape
        if not fits or not self._is_here(weight):
            self.check_fits(weight)
            self._move(weight)
        return weight

    @torch.no_grad()
    def _become_sharded(self, weight: nn.Parameter) -> None:
        """Go on with the mask and the values of what is left here of the weight, or of a part."""
        before, kept = self.shard, self.kept
        elements = self.weight_shape.numel() - self.pruned_elements()
        grid = self.kept_grid() if before is None else self.kept_elements()
        values, dense = self.values, None
        if values is not None:
            dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
            group_mask.put_back_all_([self], [dense], [values])
        # of a part products are dense until the next update lists blocks
        self.unlisted = grid if self.skips_blocks and before is None else None
        self.product, self.values, self._spare = None, None, None
        changes = self.changes
        self._begin(weight, self.backend)
        assert self.shard is not None
        here = self.shard.here
        if before is None:
            self.mask.copy_(self._compact(self.local_grid(grid)))
        else:
            firsts = [
                (a.start - b.start, a.stop - b.start)
                for a, b in zip(here, before.here, strict=True)
            ]
            here = slice(*firsts[0]), slice(*firsts[1])
            rows, cols = self.kind.pattern.rows, self.kind.pattern.cols
            part = grid[here] if self.packed else grid[here][::rows, ::cols]
            self.mask.copy_(self._compact(part.contiguous()))
        own = int(self.kept_elements().count_nonzero())
        self.elements_elsewhere, self.changes = elements - own, changes
        self.note(kept, own)
        if dense is not None:
            part = dense[here].contiguous()
            (self.values,) = group_mask.take_all_([self], [part], [None])

    def _is_here(self, weight: Tensor) -> bool:
        """Tell whether the mask is on the device of a weight, and made for its dtype."""
        return weight.device == self.mask.device and weight.dtype == self._dtype

    def check_fits(self, weight: Tensor) -> None:
        """Raise ValueError at another shape, what is no float of 16, 32 or 64 bits, or a weight on
        a stage of a pipeline that is sharded now, or further.
        """
        parted = is_sharded(weight) and dimensions_of(weight) > self._dimensions
        if parted and self.target.holders:
            raise ValueError(
                f"the weight of {self.name!r}, which is on a stage of a pipeline, must be sharded "
                f"before create_controller(stages=True), got {weight.placements} now"  # pyright: ignore[reportAttributeAccessIssue]
            )
        wide = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if weight.shape != self.weight_shape or not wide:
            raise ValueError(
                f"the weight of {self.name!r} must keep the shape {tuple(self.weight_shape)} and "
                f"be a float of 16, 32 or 64 bits, got {weight.dtype} {tuple(weight.shape)}; its "
                "mask is of the old weight: strip the model before it is resized, replaced or "
                "quantised, and then call create_controller again"
            )

    def clear_(self, tensor: Tensor) -> None:
        """Set what the mask prunes to zero, in place, as ``clear_all_``.

        On a CPU every gradient comes here as it arrives, between products that leave no Python in
        the processor's caches: the shortest way counts.
        """
        words = self.mask_for(tensor)
        simple = words is not self.mask and tensor.is_contiguous() and not tensor.requires_grad
        if is_sharded(tensor) or not (simple and is_plain(tensor)):
            clear_([self], [tensor])
            return
        matrix = self.matrix(tensor)
        and_words(matrix, words, self.kind.pattern.rows, matrix)

    def like_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out, in) in the weight's shape, or in that of what is here of it."""
        return (matrix.T if self.transposed else matrix).reshape(self._local_shape)

    def _move(self, weight: Tensor) -> None:
        if self.values is not None:
            self.values = self.values.to(weight.device, weight.dtype)
        self._spare = None
        self.move_mask(weight.device, weight.dtype)
        if self.product is not None and self.shard is None:
            self.serve_product()
        elif self.product is not None:
            grid, kept = self.product.mask.to(weight.device), self.product.kept
            self.product = None
            self.list_blocks([self], [grid], [kept])

    # the mask

    @property
    def holds_zeros(self) -> bool:
        """True where the parameter is zero wherever the mask prunes: not while it is learned."""
        return True

    @property
    def is_first_stage(self) -> bool:
        """True where no earlier stage of a pipeline has it: who adds up the gradients of a weight
        over its stages wants what is added to these once.
        """
        return not self.target.holders or self.ranks.rank in self.target.stages[0]

    @property
    def binary_mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True = kept; of a sharded weight sharded as it is. A
        copy: assign to change the mask, of a sharded weight on every rank.

        Raises:
            ValueError: what is assigned has another shape, differs within a group, or keeps too
                many of one.
        """
        kept = self.like_weight(self.kept_elements())
        parts = self.in_parts and not self.absent
        return like_shard(self.weight, kept, self.weight_shape) if parts else kept

    @binary_mask.setter
    def binary_mask(self, mask: Tensor) -> None:
        if mask.shape != self.weight_shape:
            raise ValueError(
                f"binary_mask: must have the shape {tuple(self.weight_shape)} of {self.name!r}, "
                f"got {tuple(mask.shape)}"
            )
        self.follow()
        if self.shard is not None:
            raise ValueError(
                f"binary_mask: the mask of {self.name!r}, which is sharded, must not be assigned; "
                "assign it before the model is sharded, or load a state"
            )
        grid = self.grid_of(self.matrix(mask.to(self.mask.device) != 0))
        if grid is None:
            raise ValueError(
                f"binary_mask: must be constant within every {self.pattern} group of "
                f"{self.name!r}, got one that is not"
            )
        if not self.fits(grid):
            raise ValueError(
                f"binary_mask: must keep no more of any group of {self.name!r} than "
                f"{self.pattern}, got one that does"
            )
        self._assign(grid)

    def _assign(self, grid: Tensor) -> None:
        """Take over a bool grid from a user, and bring the parameter in line."""
        with dense_weights([self]):
            self.set_grid(grid)

    @staticmethod
    def masks_changed(owners: Sequence[Any]) -> None:
        """Bring the lists of blocks in line with the masks, where modules skip them."""
        # of sharded ones once all masks are set: a rank may need what others have
        served = [weight for weight in owners if weight.skips_blocks]
        own = [w for w in served if not w.in_parts]
        SparseWeight.list_blocks(own, [w.mask for w in own], [w.kept for w in own])

    @staticmethod
    def list_blocks(owners: Sequence[Any], masks: Sequence[Tensor], kept: Sequence[int]) -> None:
        """Bring the lists of blocks in line with masks of what modules multiply."""
        for weight in owners:
            if weight.product is None:
                weight.product = weight._new_product()
        pairs = zip(owners, masks, kept, strict=True)
        serving = [(p, mask, count) for weight, mask, count in pairs if (p := weight.product)]
        if serving:
            update_products(*zip(*serving, strict=True))

    def _new_product(self) -> BlockProduct | None:
        """Return the product of what the module multiplies, without lists; None: there is none."""
        weight, part = self.weight, self.multiplied if self.shard else None
        pattern = self.pattern if part is None else part.own_pattern
        shape = self.full_shape if part is None else part.sides
        if not has_blocks_to_skip(pattern, weight, self.dispatch) or 0 in shape:
            return None
        assert isinstance(pattern, Block)
        choice: Any = {"backend": self.backend, "dispatch": self.dispatch}
        product = BlockProduct(pattern, shape, weight.dtype, **choice)
        product.want_dense_grad(self.dense_gradient_taker is not None)
        return product

    def masked(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape under the mask as a forward pass has it, with a
        gradient to what is kept.
        """
        self.follow()
        matrix = self.matrix(tensor)
        mask = self.mask_for(matrix)
        return self.like_weight(apply_mask(matrix, mask, self.pattern, backend=self.backend))

    def pruned_here(self) -> int:
        if self.shard is None:
            return super().pruned_here()
        assert self._kept_elements is not None
        return math.prod(self.shape) - self._kept_elements

    def pruned_elements(self) -> int:
        if self.shard is None:
            return super().pruned_elements()
        self.settle()
        return self.pruned_here() + self._pruned_elsewhere()

    def _pruned_elsewhere(self) -> int:
        elsewhere = self.weight_shape.numel() - math.prod(self.shape)
        return elsewhere - self.elements_elsewhere

    # the product of a linear

    def serve_product(self) -> None:
        """Prepare ``linear`` to skip pruned blocks, if the pattern has blocks to skip."""
        self.product, self.skips_blocks = None, True
        self.masks_changed([self])

    @property
    def path(self) -> str:
        """Which products skip pruned blocks, in words."""
        if self.product is None:
            return "dense"
        if self.product.unsafe:
            return "dense (pruned blocks were written)"
        return str(self.product.paths)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W^T + b``, without the pruned blocks where that is faster.

        A weight other than the one that was left here, such as a caller's of
        ``torch.func.functional_call``, is multiplied as it is. So is one whose pruned blocks
        somebody has written.
        """
        matrix = weight.T if self.transposed else weight
        product = self.product
        if product is None or (self.shard is None and is_sharded(weight)):
            return functional.linear(x, matrix, bias)
        if self.shard is not None:
            return self._linear_of_shard(product, x, weight, bias)
        # tracing must not look at the paths: it would guard their values
        if torch.compiler.is_compiling():
            return product(x, matrix, bias)
        if is_functorch_wrapped_tensor(x) or not isinstance(weight, nn.Parameter):
            return functional.linear(x, matrix, bias)
        if not self._is_here(weight):
            # one that is new may be what FSDP2 has gathered in another dtype
            if weight is not self.weight or not self.knows(weight):
                return functional.linear(x, matrix, bias)
            self.follow()
            return self.linear(x, weight, bias)
        if product.unsafe and not self.is_as_left(weight):
            self.check_blocks()
        skips = product.skips(weight)
        if skips and not self.is_as_left(weight):
            self.check_blocks()
        if skips and not product.unsafe:
            return product(x, matrix, bias)
        return functional.linear(x, matrix, bias)

    def _linear_of_shard(
        self, product: BlockProduct, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``linear``'s of a sharded weight. Where FSDP2 has not gathered it, or somebody
        else has, it is not what there are lists of, and multiplied as it is.
        """
        whole, matrix = self.multiplied is None, weight.T if self.transposed else weight
        local = weight if whole else local_part(weight)
        known = is_sharded(weight) != whole and local.device == product.mask.device
        if not known or self.matrix(local).shape != product.shape:
            return functional.linear(x, matrix, bias)
        if not torch.compiler.is_compiling():
            if is_functorch_wrapped_tensor(x) or not isinstance(weight, nn.Parameter):
                return functional.linear(x, matrix, bias)
            skips = product.skips(local)
            looked_at = self._looked_at is not None and self._looked_at() is weight
            if (skips or product.unsafe) and not (looked_at and self.is_as_left(self.weight)):
                self._note_written(product, product.written(self.matrix(local)))
                self._looked_at = weakref.ref(weight)
            if product.unsafe or not skips:
                return functional.linear(x, matrix, bias)
        if whole:
            return product(x, matrix, bias)
        return parallel_linear(product, x, matrix, bias)

    def check_blocks(self) -> None:
        """Look once whether pruned blocks are zero; while they are not, products are dense."""
        if self.product is None or self.all_kept:
            return
        written = leaks([self])()[0]
        if self.shard is None or written:
            self._note_written(self.product, written)
        if self.shard is not None:
            self.forget()  # of what is elsewhere the next forward pass will tell

    def _note_written(self, product: BlockProduct, written: int) -> None:
        if written and not product.unsafe:
            warnings.warn(
                f"{written} pruned elements of {self.name!r} have been written (an adapter "
                "merged, an average), so its products are dense until they are zero again",
                stacklevel=3,
            )
        product.trust(not written)
        self.leave()

    # what others do to the parameter

    def leave(self, parameter: Tensor | None = None) -> None:
        """Note the state of the parameter, so that a later write can be noticed."""
        self._as_left = _state_of(self.weight if parameter is None else parameter)

    @torch.no_grad()
    def take_from(self, parameter: nn.Parameter) -> None:
        """Make a parameter zero that is to be the weight; what was there is kept."""
        if not self.holds_zeros:
            return
        if not self._is_here(parameter):
            self._move(parameter)
        _take([(self, parameter)])
        self._as_left = _state_of(parameter)

    def copy_back(self, parameter: Tensor, matrix: Tensor) -> None:
        """Write a matrix back that is no view: a convolution's whose channels lie last."""
        local = local_part(parameter)
        if matrix.untyped_storage().data_ptr() != local.untyped_storage().data_ptr():
            local.copy_(self.like_weight(matrix))

    def forget(self) -> None:
        """Take the parameter for written."""
        self._as_left = self._as_left[:1]

    def knows(self, weight: Tensor) -> bool:
        """Tell whether this is the parameter that was left. A new one that has its address in
        memory has not been written as often.
        """
        left = self._as_left
        if left[:1] != (id(weight),):
            return False
        # of one that somebody may have written the version is not known
        return left[2:3] <= (0 if weight.is_inference() else weight._version,)

    def is_back(self, weight: Tensor) -> bool:
        """Tell that a parameter which its module had not for a while is the one that was left. A
        new one that has its address in memory has not been written as often.
        """
        left, now = self._as_left, _state_of(weight)
        return len(left) == len(now) and left[:2] == now[:2] and 0 < left[2] <= now[2]

    def is_clean(self, weight: Tensor) -> bool:
        """Tell that nobody has been seen to write, now or earlier."""
        return self.is_as_left(weight) and not (self.product and self.product.unsafe)

    def is_as_left(self, weight: Tensor) -> bool:
        """Tell that nobody has been seen to write. Edits of ``weight.data`` escape."""
        return self._as_left == _state_of(weight)


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    if is_sharded(weight):
        return id(weight), local_part(weight).data_ptr(), weight._version, weight.requires_grad
    version = 0 if weight.is_inference() else weight._version
    return id(weight), weight.data_ptr(), version, weight.requires_grad


@dataclass(frozen=True)
class SparseModuleInfo:
    """One masked weight.

    Attributes:
        module_node_name: the weight's name, as ``Target.name``.
        module: the module that owns the weight.
        operand: its mask; ``operand.binary_mask`` is a bool tensor of the weight's shape, True =
            kept. ``operand.target`` says what else was given for it.
    """

    module_node_name: str
    module: nn.Module
    operand: SparseWeight

    @property
    def parameter_name(self) -> str:
        """The weight's name in ``module``."""
        return self.operand.parameter_name

    @property
    def places(self) -> tuple[tuple[nn.Module, str], ...]:
        """Every module, with its name for it, that holds this very parameter."""
        return self.operand.target.users

    @property
    def weight(self) -> nn.Parameter:
        """The parameter: zero wherever the mask prunes, but while masks are learned."""
        return self.operand.weight


def check_at_rest(weights: Sequence[SparseWeight]) -> None:
    """Refuse to write weights that are gathered: what is written would not reach who reads them.

    Raises:
        RuntimeError: FSDP2 has gathered one with what is around the controller's model.
    """
    gathered = [
        weight.name
        for weight in weights
        if weight.in_parts
        and not weight.absent
        # the shard is what a weight is, whatever its module has for a while
        and weight.module._parameters.get(weight.parameter_name) is not weight.weight
    ]
    if gathered:
        raise RuntimeError(
            f"the weights of {gathered} must lie in parts as masks change, but an evaluation has "
            "left them gathered by fully_shard of what is around the controller's model; call "
            "reshard() of that module first, or create the controller for it"
        )


@torch.no_grad()
def clear_(weights: Sequence[SparseWeight], tensors: Sequence[Tensor]) -> None:
    """Set what the masks prune to zero, in place: in one launch for all of one pattern and width.

    ``tensors`` has one each, of its shape: the weight, its gradient, an optimiser's state.
    """
    pairs = [(w, t) for w, t in zip(weights, tensors, strict=True) if w.clears(t)]
    with _matrices(pairs) as (owners, matrices):
        group_mask.clear_all_(owners, matrices)


@torch.no_grad()
def leaks(weights: Sequence[SparseWeight]) -> Callable[[], list[int]]:
    """Count, in each weight, what is not zero though it is pruned; read it as ``read_later``."""
    owners = [weight for weight in weights if not weight.all_kept]
    read = _leaks(owners, [weight.follow() for weight in owners])
    return lambda: [*(dict.fromkeys(weights, 0) | dict(zip(owners, read(), strict=True))).values()]


def _leaks(owners: Sequence[SparseWeight], tensors: Sequence[Tensor]) -> Callable[[], list[int]]:
    if not owners:
        return list
    refuse_capture(tensors[0], f"the weight of {owners[0].name!r}")
    matrices = [weight.matrix(tensor) for weight, tensor in zip(owners, tensors, strict=True)]
    places, counts = group_mask.count_all_leaks(owners, matrices)
    read = read_later(torch.cat(counts))
    return lambda: [count for _, count in sorted(zip(places, read(), strict=True))]


_Pairs = list[tuple[SparseWeight, Tensor]]


@contextmanager
def _matrices(pairs: _Pairs) -> Iterator[tuple[list[SparseWeight], list[Tensor]]]:
    """Give tensors as matrices to be written; of sharded ones what is here."""
    if not PLAIN.issuperset(type(tensor) for _, tensor in pairs):
        for weight, tensor in pairs:
            if is_sharded(tensor) and weight.shard is None:
                weight.follow()
    owners, matrices = [w for w, _ in pairs], [w.matrix(t) for w, t in pairs]
    yield owners, matrices
    for (weight, tensor), matrix in zip(pairs, matrices, strict=True):
        if matrix is not tensor:
            weight.copy_back(tensor, matrix)


def drop_foreign(weights: Sequence[SparseWeight], when: str) -> None:
    """Make zero again what is pruned and was written; a UserWarning says how much, and where."""
    drop_foreign_later(weights, when)()


def drop_foreign_later(
    weights: Sequence[SparseWeight], when: str, *, restoring: bool = False
) -> Callable[[], None]:
    """Make zero again what is pruned; return what warns, as ``read_later``. If values are
    ``restoring``, those of blocks cover what was there; others are ORed, which -0 would spoil.
    """
    guarded = [weight for weight in weights if weight.holds_zeros and not weight.all_kept]
    parameters = [weight.follow() for weight in guarded]
    read = _leaks(guarded, parameters)
    bare = [
        (weight, parameter)
        for weight, parameter in zip(guarded, parameters, strict=True)
        if not restoring or weight.packed or weight.values is None
    ]
    clear_([weight for weight, _ in bare], [parameter for _, parameter in bare])
    if not restoring:  # else once the values are out again
        for weight, parameter in zip(guarded, parameters, strict=True):
            _settle(weight, parameter)

    def warn() -> None:
        counts = dict(zip([weight.name for weight in guarded], read(), strict=True))
        if total := sum(counts.values()):
            names = ", ".join(repr(name) for name, count in counts.items() if count)
            warnings.warn(
                f"{when}: {total} pruned elements had been written by somebody else and are zero "
                f"again, in {names}",
                stacklevel=4,
            )

    return warn


@contextmanager
def dense_weights(weights: Sequence[SparseWeight], *, keep: bool | None = None) -> Iterator[None]:
    """Put pruned values back, in place, while the context is open; take them out by the masks of
    then, ``keep`` as in ``take_values``. A context that ends in an error has changed nothing.
    """
    warn = drop_foreign_later(weights, "set_sparsity_level", restoring=True)
    restore_(weights)
    try:
        yield
    finally:
        take_values(weights, keep=keep)
        warn()  # once the device was waited for anyway


@torch.no_grad()
def restore_(weights: Sequence[SparseWeight]) -> None:
    """Put pruned values back, where they are kept, in place."""
    holding = [weight for weight in weights if weight.values is not None]
    values: list[Any] = [weight.values for weight in holding]
    with _matrices([(weight, weight.weight) for weight in holding]) as (owners, matrices):
        group_mask.put_back_all_(owners, matrices, values)
    for weight in holding:
        weight._spare, weight.values = weight.values, None


def _take(pairs: _Pairs) -> None:
    """Take pruned values out of parameters, which their masks fit, and keep them."""
    for weight, _ in pairs:
        weight.values, weight.values_are_loaded = None, False
    with _matrices([pair for pair in pairs if not pair[0].all_kept]) as (owners, matrices):
        values = group_mask.take_all_(owners, matrices, [weight._spare for weight in owners])
    for weight, own in zip(owners, values, strict=True):
        weight.values, weight._spare = own, None


@torch.no_grad()
def take_values(weights: Sequence[SparseWeight], *, keep: bool | None = None) -> None:
    """Make dense parameters zero where their masks prune. What was there is kept if ``keep``, or,
    with None, where the weight itself ``keeps_values``.
    """
    taken, cleared = [], []
    parameters = [weight.follow() for weight in weights]
    for weight, parameter in zip(weights, parameters, strict=True):
        if not (weight.keeps_values if keep is None else keep):
            weight.values = weight._spare = None
            cleared += [weight] if weight.holds_zeros else []
        elif weight.holds_zeros:
            taken.append((weight, parameter))
    _take(taken)
    clear_(cleared, [weight.weight for weight in cleared])
    # of a backward pass before the masks changed
    found = [
        (weight, gradient)
        for weight, parameter in zip(weights, parameters, strict=True)
        if weight.holds_zeros
        and (gradient := parameter.grad) is not None
        and gradient.layout == torch.strided
    ]
    clear_([weight for weight, _ in found], [gradient for _, gradient in found])
    for weight, parameter in zip(weights, parameters, strict=True):
        _settle(weight, parameter)


def _settle(weight: SparseWeight, parameter: Tensor) -> None:
    """Note that the pruned elements of a weight's parameter are zero."""
    if weight.product is not None:
        weight.product.trust(True)
    weight.leave(parameter)
