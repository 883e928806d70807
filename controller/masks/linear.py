"""Linear layers that skip pruned blocks: the one kind of module whose class a mask changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...kernels.product import has_blocks_to_skip
from .exchange import whole_grids
from .module import MaskedModule, become, unsharded_class
from .names import canonical
from .shards import local_grid, records_of
from .weight import SparseWeight

_OWN = ("_sparse_weight", "_sparse_adapter")


class BlockSparseLinear(MaskedModule):
    """A linear whose products leave out pruned blocks."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _sparse_weight: SparseWeight
    # what PEFT put around the layer, and the adapters that it had merged when last looked at
    _sparse_adapter: tuple[weakref.ref[nn.Module], tuple[str, ...]] | None = None

    def forward(self, input: Tensor) -> Tensor:
        sparse: SparseWeight | None = getattr(self, "_sparse_weight", None)
        if sparse is None:
            # somebody has kept this method, and the layer has been given its class back
            return type(self).forward(self, input)
        if self._sparse_adapter is not None and not torch.compiler.is_compiling():
            self._look_at_adapter()
        return sparse.linear(input, self.weight, self.bias)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        # an edit of `weight.data` cannot be noticed: before an evaluation the blocks are looked at
        if not mode and self._sparse_weight.holds_zeros:
            self._sparse_weight.check_blocks()
        return self

    def _look_at_adapter(self) -> None:
        """Look at the blocks when PEFT has merged or unmerged, which leaves no other trace."""
        assert self._sparse_adapter is not None
        reference, seen = self._sparse_adapter
        parent: Any = reference()
        merged = () if parent is None else tuple(parent.merged_adapters)
        if merged != seen:
            self.__dict__["_sparse_adapter"] = reference, merged
            self._sparse_weight.check_blocks()

    def _state_of_copy(self) -> dict[str, Any]:
        return {k: v for k, v in super()._state_of_copy().items() if k not in _OWN}


def conv1d_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return Hugging Face's Conv1D, if ``kind`` is one. By name: transformers may be missing."""
    for base in kind.__mro__:
        if base.__name__ == "Conv1D" and base.__module__.startswith("transformers."):
            return base
    return None


def skip_blocks(weight: SparseWeight, module: nn.Module, parameter_name: str) -> None:
    """Let a module skip the pruned blocks of its weight, if it is a linear that has such.

    A linear whose forward is its own knows best what it does with its weight, and so does one
    whose forward was wrapped before. Attention reads its output projection's weight, and never
    calls it.
    """
    dense = unsharded_class(type(module))
    kind = conv1d_of(dense) or nn.Linear
    multiplies = issubclass(dense, kind) and dense.forward is kind.forward
    if (
        not multiplies
        or isinstance(module, NonDynamicallyQuantizableLinear)
        or "forward" in module.__dict__
        or parameter_name != "weight"
    ):
        return
    if has_blocks_to_skip(weight.pattern, weight.weight, weight.dispatch):
        weight.skips_blocks = True
        # a controller's creation ends with a mask, which brings the lists
        if weight.product is None and not weight.all_kept and not weight.in_parts:
            weight.serve_product()
        module.__dict__["_sparse_weight"] = weight
        become(module, _class_of(dense))


@torch.no_grad()
def list_blocks_of_shards(
    model: nn.Module, weights: Sequence[SparseWeight], grids: Sequence[Tensor] | None = None
) -> None:
    """Bring the lists of blocks of sharded weights in line with their masks, where modules skip
    them: lists of the part that a forward pass has.

    Every rank must call this. One bit a block is added up over the ranks, of the weights that
    FSDP2 gathers.

    Args:
        model: what ``fully_shard`` has been called on, or holds that.
        weights: any.
        grids: bool, one a weight: the grids of the full weights, if they are known.
    """
    served = [weight for weight in weights if weight.in_parts and weight.skips_blocks]
    staged = [weight for weight in weights if weight.in_parts and weight.target.holders]
    if not (served or staged):
        return
    records = records_of(model)
    known = {} if grids is None else dict(zip(weights, grids, strict=True))
    for weight in served:
        record = records.get((id(weight.module), weight.parameter_name))
        part = weight.shard if record is None else weight.shard_of(weight.weight, record.over)
        if part != weight.multiplied:
            weight.product = None
        weight.multiplied, weight.unlisted = part, None
    gathered = [w for w in served if w.multiplied is not w.shard and w not in known]
    if staged:  # stages that have none of a weight take part, too
        names = {canonical(weight.name) for weight in gathered}
        names = {name for theirs in weights[0].ranks.gather(names) for name in theirs}
        gathered = [w for w in weights if canonical(w.name) in names]
    if gathered:
        known |= dict(zip(gathered, whole_grids(gathered), strict=True))
    masks = []
    for weight in served:
        if weight.multiplied is weight.shard:
            masks.append(weight.mask)
        elif weight.multiplied is None:
            masks.append(known[weight])
        else:
            masks.append(local_grid(weight.multiplied, known[weight]).contiguous())
    if not served:
        return
    kept = torch.stack([mask.count_nonzero() for mask in masks]).tolist()
    SparseWeight.list_blocks(served, masks, kept)


def restore_class(module: nn.Module) -> None:
    """Give a module the class back that it had before ``skip_blocks``; its weight stays."""
    if isinstance(module, BlockSparseLinear):
        module._sparse_weight.product, module._sparse_weight.skips_blocks = None, False
        for name in _OWN:
            module.__dict__.pop(name, None)
        become(module, type(module).dense_class)


@cache
def _class_of(dense: type[nn.Module]) -> type[nn.Module]:
    # torch.fx takes a module of torch.nn for a leaf
    attributes = {"dense_class": dense, "__module__": dense.__module__}
    return type(f"BlockSparse{dense.__name__}", (BlockSparseLinear, dense), attributes)


def is_tuner_layer(kind: type[nn.Module]) -> bool:
    """Tell whether PEFT puts such a module around a layer. By name: PEFT may be missing."""
    return any(base.__name__ == "BaseTunerLayer" for base in kind.__mro__)


def note_adapter(parent: nn.Module, child: nn.Module) -> None:
    """Remember that PEFT has put ``parent`` around a layer: it may merge into the weight."""
    if isinstance(child, BlockSparseLinear) and is_tuner_layer(type(parent)):
        child.__dict__["_sparse_adapter"] = weakref.ref(parent), ()
