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

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional

from ...kernels.dispatch import Dispatch
from ...kernels.group_mask import GroupMask
from ...kernels.launch import Backend, is_captured
from ...kernels.masked_weight import apply_mask_, count_leaks
from ...kernels.pattern import Block, Pattern
from ...kernels.product import BlockProduct, has_blocks_to_skip
from ...kernels.retained import put_back_, take_pruned


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
        minimum_level, maximum_level: limits of its level inside a pool.
    """

    name: str
    users: tuple[tuple[nn.Module, str], ...]
    pattern: Pattern
    transposed: bool = False
    experts: bool = False
    minimum_level: float = 0.0
    maximum_level: float = 1.0

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

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as a matrix (out, in): a view where strides allow.

        A convolution's is ``(out, rest)``. Experts lie below one another, or, where they are
        stored (in, out), side by side: no group reaches from one into the next.
        """
        if tensor.ndim == 1:
            return tensor[None]
        if self.transposed:
            return tensor.flatten(0, -2).T
        return tensor.flatten(0, 1) if self.experts else tensor.flatten(1)


class SparseWeight(GroupMask):
    """One parameter and which of its groups are kept. Called the operand of its module.

    Its tensors are no buffers: distributed wrappers would broadcast them at every forward.

    Args:
        target: which parameter, and the shape of its groups.
        backend, dispatch: as ``create_controller``'s.
    """

    scores: nn.Parameter | None = None  # trained with the weight, where the mask follows from such

    def __init__(
        self, target: Target, *, backend: Backend = "auto", dispatch: Dispatch = "auto"
    ) -> None:
        self.target = target
        self.module, self.parameter_name = target.users[0]
        self.name = target.name
        self.transposed = target.transposed
        self.matrix = target.matrix
        self.dispatch: Dispatch = dispatch
        weight = self.weight.detach()
        self.weight_shape = weight.shape
        rows, cols = self.matrix(weight).shape
        super().__init__(target.pattern, (rows, cols), weight.dtype, weight.device, backend)
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
        self.dense_gradient_taker: Callable[[Tensor], None] | None = None
        self._as_left: tuple[Any, ...] = ()

    # the parameter

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as its module has it now; see ``Target.weight``."""
        return self.target.weight

    def follow(self) -> nn.Parameter:
        """Return the parameter; the mask follows device and dtype. Refuses as ``check_fits``."""
        weight = self.weight
        self.check_fits(weight)
        if not self._is_here(weight):
            self._move(weight)
        return weight

    def _is_here(self, weight: Tensor) -> bool:
        """Tell whether the mask is on the device of a weight, and made for its dtype."""
        return weight.device == self.mask.device and weight.dtype == self._dtype

    def check_fits(self, weight: Tensor) -> None:
        """Raise ValueError at another shape, or what is no float of 16, 32 or 64 bits."""
        wide = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if weight.shape != self.weight_shape or not wide:
            raise ValueError(
                f"the weight of {self.name!r} must keep the shape {tuple(self.weight_shape)} and "
                f"be a float of 16, 32 or 64 bits, got {weight.dtype} {tuple(weight.shape)}; its "
                "mask is of the old weight: strip the model before it is resized, replaced or "
                "quantised, and then call create_controller again"
            )

    def like_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out, in) in the weight's shape."""
        return (matrix.T if self.transposed else matrix).reshape(self.weight_shape)

    def _move(self, weight: Tensor) -> None:
        if self.values is not None:
            self.values = self.values.to(weight.device, weight.dtype)
        self._spare = None
        self.move_mask(weight.device, weight.dtype)
        if self.product is not None:
            self.serve_product()

    # the mask

    @property
    def holds_zeros(self) -> bool:
        """True where the parameter is zero wherever the mask prunes: not while it is learned."""
        return True

    @property
    def binary_mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True = kept. A copy: assign to change the mask.

        Raises:
            ValueError: what is assigned has another shape, differs within a group, or keeps too
                many of one.
        """
        return self.like_weight(self.kept_elements())

    @binary_mask.setter
    def binary_mask(self, mask: Tensor) -> None:
        if mask.shape != self.weight_shape:
            raise ValueError(
                f"binary_mask: must have the shape {tuple(self.weight_shape)} of {self.name!r}, "
                f"got {tuple(mask.shape)}"
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

    def set_(self, mask: Tensor | None, kept: int) -> None:
        super().set_(mask, kept)
        if self.product is not None:
            self.product.update(self.mask, kept)
        elif self.skips_blocks:
            self.serve_product()

    # the product of a linear

    def serve_product(self) -> None:
        """Prepare ``linear`` to skip pruned blocks, if the pattern has blocks to skip."""
        self.product = None
        if has_blocks_to_skip(self.pattern, self.weight, self.dispatch):
            assert isinstance(self.pattern, Block)
            sizes = self.pattern, self.shape, self._dtype
            choice: Any = {"backend": self.backend, "dispatch": self.dispatch}
            self.product = BlockProduct(self.mask, self.kept, *sizes, **choice)

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
        if product is None:
            return functional.linear(x, matrix, bias)
        # tracing must not look at the paths: it would guard their values
        if torch.compiler.is_compiling():
            return product(x, matrix, bias)
        if is_functorch_wrapped_tensor(x) or not isinstance(weight, nn.Parameter):
            return functional.linear(x, matrix, bias)
        if not self._is_here(weight):
            if weight is not self.weight:
                return functional.linear(x, matrix, bias)
            self.follow()
            return self.linear(x, weight, bias)
        if product.unsafe and not self.is_as_left(weight):
            self.check_blocks()
        skips = product.skips(weight.device.type)
        if skips and not self.is_as_left(weight):
            self.check_blocks()
        if skips and not product.unsafe:
            return product(x, matrix, bias)
        return functional.linear(x, matrix, bias)

    def check_blocks(self) -> None:
        """Look once whether pruned blocks are zero; while they are not, products are dense."""
        product = self.product
        if product is None or self.all_kept:
            return
        written = int(leaks([self])[0])
        if written and not product.unsafe:
            warnings.warn(
                f"{written} pruned elements of {self.name!r} have been written (an adapter "
                "merged, an average), so its products are dense until they are zero again",
                stacklevel=2,
            )
        product.trust(not written)
        self.leave()

    # what others do to the parameter

    def leave(self) -> None:
        """Note the state of the parameter, so that a later write can be noticed."""
        self._as_left = _state_of(self.weight)

    @torch.no_grad()
    def take_from(self, parameter: nn.Parameter) -> None:
        """Make a parameter zero that is to be the weight; what was there is kept."""
        if not self.holds_zeros:
            return
        if not self._is_here(parameter):
            self._move(parameter)
        self.values, self.values_are_loaded = None, False
        if not self.all_kept:
            matrix = self.matrix(parameter)
            mask, out = self.mask_for(matrix), self._take_spare()
            self.values = take_pruned(matrix, mask, self.pattern, out=out)
            self.copy_back(parameter, matrix)
        self._as_left = _state_of(parameter)

    def _take_spare(self) -> Tensor | None:
        """Return the memory of values that were put back, if the next ones fit."""
        spare, self._spare = self._spare, None
        wanted = self.shape if self.packed else (self.pruned_elements(),)
        return spare if spare is not None and spare.shape == torch.Size(wanted) else None

    def copy_back(self, parameter: Tensor, matrix: Tensor) -> None:
        """Write a matrix back that is no view: a convolution's whose channels lie last."""
        if matrix.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
            parameter.copy_(self.like_weight(matrix))

    def forget(self) -> None:
        """Take the parameter for written."""
        self._as_left = self._as_left[:1]

    def knows(self, weight: Tensor) -> bool:
        """Tell whether this is the parameter that was left."""
        return self._as_left[:1] == (id(weight),)

    def is_clean(self, weight: Tensor) -> bool:
        """Tell that nobody has been seen to write, now or earlier."""
        return self.is_as_left(weight) and not (self.product and self.product.unsafe)

    def is_as_left(self, weight: Tensor) -> bool:
        """Tell that nobody has been seen to write. Edits of ``weight.data`` escape."""
        return self._as_left == _state_of(weight)


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    if isinstance(weight, DTensor):
        return id(weight), weight.to_local().data_ptr(), weight._version, weight.requires_grad
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


@torch.no_grad()
def clear_(weights: Sequence[SparseWeight], tensors: Sequence[Tensor]) -> None:
    """Set what the masks prune to zero, in place: in one launch for all of one pattern and width.

    ``tensors`` has one each, of its shape: the weight, its gradient, an optimiser's state.
    """
    pairs = zip(weights, tensors, strict=True)
    pairs = [(w, t) for w, t in pairs if not w.all_kept or is_captured(t)]
    sharded, alike = _part(pairs)
    for weight, tensor in sharded:
        local, pruned = _shard(weight, tensor)
        local.masked_fill_(pruned, 0)
    for (pattern, backend), members in alike.items():
        matrices = [weight.matrix(tensor) for weight, tensor in members]
        masks = [weight.mask_for(tensor) for weight, tensor in members]
        apply_mask_(matrices, masks, pattern, backend=backend)
        for (weight, tensor), matrix in zip(members, matrices, strict=True):
            weight.copy_back(tensor, matrix)


@torch.no_grad()
def leaks(weights: Sequence[SparseWeight]) -> list[int]:
    """Count, in each weight, what is not zero though it is pruned. Waits for the device once."""
    pairs = [(weight, weight.weight.detach()) for weight in weights if not weight.all_kept]
    if pairs and is_captured(pairs[0][1]):
        raise RuntimeError(
            f"the weight of {pairs[0][0].name!r} must be as it was last seen when a CUDA graph is "
            "captured, got one that was written since: run it once, then capture"
        )
    sharded, alike = _part(pairs)
    found: list[Tensor] = []
    order = [weight for weight, _ in sharded]
    for weight, tensor in sharded:
        local, pruned = _shard(weight, tensor)
        found.append(local[pruned].count_nonzero()[None])
    for (pattern, backend), members in alike.items():
        matrices = [weight.matrix(tensor) for weight, tensor in members]
        masks = [weight.mask_for(tensor) for weight, tensor in members]
        found.append(count_leaks(matrices, masks, pattern, backend=backend))
        order += [weight for weight, _ in members]
    counts = torch.cat(found).tolist() if found else []
    by_weight = dict(zip(order, counts, strict=True))
    return [by_weight.get(weight, 0) for weight in weights]


def _shard(weight: SparseWeight, tensor: DTensor) -> tuple[Tensor, Tensor]:
    """Return the local part of a sharded tensor, and which of its elements are pruned."""
    local = tensor.to_local()
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    part = tuple(slice(at, at + n) for at, n in zip(offsets, local.shape, strict=True))
    return local, ~weight.binary_mask[part].to(local.device)


_Pairs = list[tuple[SparseWeight, Tensor]]


def _part(
    pairs: _Pairs,
) -> tuple[list[tuple[SparseWeight, DTensor]], dict[tuple[Pattern, Backend], _Pairs]]:
    """Return the sharded ones, and the others by what one launch has in common."""
    alike: dict[tuple[Pattern, Backend], _Pairs] = {}
    for weight, tensor in pairs:
        if not isinstance(tensor, DTensor):
            alike.setdefault((weight.pattern, weight.backend), []).append((weight, tensor))
    return [(w, t) for w, t in pairs if isinstance(t, DTensor)], alike


def drop_foreign(weights: Sequence[SparseWeight], when: str) -> None:
    """Make zero again what is pruned and was written; a UserWarning says how much, and where."""
    guarded = [weight for weight in weights if weight.holds_zeros and not weight.all_kept]
    for weight in guarded:
        weight.follow()
    written = {w.name: (w, n) for w, n in zip(guarded, leaks(guarded), strict=True) if n}
    if written:
        clear_([w for w, _ in written.values()], [w.weight for w, _ in written.values()])
        total = sum(count for _, count in written.values())
        warnings.warn(
            f"{when}: {total} pruned elements had been written by somebody else and are zero "
            f"again, in {', '.join(map(repr, written))}",
            stacklevel=3,
        )
    for weight in guarded:
        _settle(weight)


@contextmanager
def dense_weights(weights: Sequence[SparseWeight], *, keep: bool | None = None) -> Iterator[None]:
    """Put pruned values back, in place, while the context is open; take them out by the masks of
    then, ``keep`` as in ``take_values``. A context that ends in an error has changed nothing.
    """
    for weight in weights:
        if isinstance(weight.weight, DTensor):
            raise RuntimeError(
                f"set_sparsity_level: the weight of {weight.name!r} must not be sharded, got a "
                "DTensor; masks hold on shards but cannot change there yet: freeze them before"
            )
    drop_foreign(weights, "set_sparsity_level")
    restore_(weights)
    try:
        yield
    finally:
        take_values(weights, keep=keep)


@torch.no_grad()
def restore_(weights: Sequence[SparseWeight]) -> None:
    """Put pruned values back, where they are kept, in place."""
    # those of fine patterns are put back by OR, which a negative zero would spoil
    fine = [weight for weight in weights if weight.values is not None and weight.packed]
    clear_(fine, [weight.weight for weight in fine])
    for weight in weights:
        if weight.values is not None:
            matrix = weight.matrix(weight.weight)
            put_back_(matrix, weight.values, weight.mask_for(matrix), weight.pattern)
            weight.copy_back(weight.weight, matrix)
            weight._spare, weight.values = weight.values, None


@torch.no_grad()
def take_values(weights: Sequence[SparseWeight], *, keep: bool | None = None) -> None:
    """Make dense parameters zero where their masks prune. What was there is kept if ``keep``, or,
    with None, where the weight itself ``keeps_values``.
    """
    cleared = []
    for weight in weights:
        parameter = weight.follow()
        if weight.keeps_values if keep is None else keep:
            weight.take_from(parameter)
        else:
            weight.values = weight._spare = None
            cleared += [weight] if weight.holds_zeros else []
    clear_(cleared, [weight.weight for weight in cleared])
    # of a backward pass before the masks changed
    found = [(w, g) for w in weights if w.holds_zeros and (g := w.weight.grad) is not None]
    found = [(w, g) for w, g in found if g.layout == torch.strided]
    clear_([weight for weight, _ in found], [gradient for _, gradient in found])
    for weight in weights:
        _settle(weight)


def _settle(weight: SparseWeight) -> None:
    """Note that the pruned elements are zero."""
    if weight.product is not None:
        weight.product.trust(True)
    weight.leave()
