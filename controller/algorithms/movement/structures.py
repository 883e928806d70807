"""Structures of transformers: which rows and columns of which weights make up a head or a channel.

A head is rows of the query, key and value projections and columns of the output projection; a
channel is a row of a feed-forward block's first linear layer (or of both, where it is gated) and a
column of its last. Found by the names that ``torch.nn`` and Hugging Face's models give them.

As in NNCF's structured masking a head or channel is pruned only where every member prunes all of
it, biases included; what stays is dense again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# query, key, value; then the output projection, in the same module or in its parent
_ATTENTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
)
_OUTPUTS = ("out_proj", "o_proj", "out_lin", "dense")
_PARENT_OUTPUT = "output.dense"
_HEADS = ("num_attention_heads", "num_heads", "n_heads")
# layers before the non-linearity, and the one behind it
_FEED_FORWARDS = (
    (("linear1",), "linear2"),
    (("lin1",), "lin2"),
    (("fc1",), "fc2"),
    (("intermediate_dense",), "output_dense"),
    (("intermediate.dense",), "output.dense"),
    (("gate_proj", "up_proj"), "down_proj"),
)


@dataclass(frozen=True)
class Member:
    """Rows, or columns, of one weight that belong to the units of a group, in their order.

    Attributes:
        module: owner of the weight.
        weight, bias: names of its parameters.
        dim: 0: rows, with the bias's elements; 1: columns.
        start: the first of them.
    """

    module: nn.Module
    weight: str
    bias: str
    dim: int
    start: int = 0


@dataclass(frozen=True)
class StructureGroup:
    """The heads of one attention, or the channels of one feed-forward block.

    Attributes:
        name: dotted path of the module that holds them.
        kind: ``"heads"`` or ``"channels"``.
        count: how many.
        size: rows or columns of each.
        members: where they are.
    """

    name: str
    kind: str
    count: int
    size: int
    members: tuple[Member, ...]


def find_structures(model: nn.Module) -> list[StructureGroup]:
    """List the heads and channels of ``model``."""
    groups = []
    for path, module in model.named_modules():
        groups += _attention(model, path, module)
        groups += _feed_forward(path, module)
    return groups


def _attention(model: nn.Module, path: str, module: nn.Module) -> Iterator[StructureGroup]:
    if isinstance(module, nn.MultiheadAttention):
        size = module.embed_dim // module.num_heads
        if module.in_proj_weight is not None:
            starts = [("in_proj_weight", i * module.embed_dim) for i in range(3)]
        else:
            starts = [(f"{name}_proj_weight", 0) for name in "qkv"]
        # the bias is one vector for all three in either case
        inputs = [
            Member(module, name, "in_proj_bias" if name == "in_proj_weight" else "", 0, start)
            for name, start in starts
        ]
        out = Member(module.out_proj, "weight", "bias", 1)
        yield StructureGroup(path, "heads", module.num_heads, size, (*inputs, out))
        return
    for names in _ATTENTIONS:
        inputs = [_linear(module, name) for name in names]
        found = [linear for linear in inputs if linear is not None]
        if len(found) < len(names):
            continue
        out = next(filter(None, (_linear(module, name) for name in _OUTPUTS)), None)
        if out is None and path:
            parent = model.get_submodule(path.rpartition(".")[0])
            out = _linear(parent, _PARENT_OUTPUT)
        heads = _heads(module)
        width = found[0].out_features
        if out is None or heads is None or width % heads:
            continue
        # with fewer key than query heads a head is no unit
        if any(linear.out_features != width for linear in found) or out.in_features != width:
            continue
        members = (*(Member(linear, "weight", "bias", 0) for linear in found), _columns(out))
        yield StructureGroup(path, "heads", heads, width // heads, members)


def _feed_forward(path: str, module: nn.Module) -> Iterator[StructureGroup]:
    for names, last in _FEED_FORWARDS:
        ups, down = [_linear(module, name) for name in names], _linear(module, last)
        found = [linear for linear in ups if linear is not None]
        if down is None or len(found) < len(names):
            continue
        if all(linear.out_features == down.in_features for linear in found):
            members = (*(Member(linear, "weight", "bias", 0) for linear in found), _columns(down))
            yield StructureGroup(path, "channels", down.in_features, 1, members)


def _columns(linear: nn.Linear) -> Member:
    return Member(linear, "weight", "bias", 1)


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    for name in path.split("."):
        module = getattr(module, name, None)  # pyright: ignore[reportAssignmentType]
    return module if isinstance(module, nn.Linear) else None


def _heads(module: nn.Module) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            heads = getattr(holder, name, None)
            if type(heads) is int and heads > 0:
                return heads
    return None


def units(groups: Sequence[StructureGroup]) -> dict[tuple[nn.Module, str], tuple[int, int]]:
    """Return, by weight, what rows and columns a structured mask is constant in; 0: any number."""
    found: dict[tuple[nn.Module, str], tuple[int, int]] = {}
    for group in groups:
        for member in group.members:
            rows, cols = found.get((member.module, member.weight), (0, 0))
            side = math.gcd(group.size, member.start)
            if member.dim == 0:
                rows = math.gcd(rows, side)
            else:
                cols = math.gcd(cols, side)
            found[member.module, member.weight] = rows, cols
    return found


Masks = Mapping[tuple[nn.Module, str], Tensor]


def resolve(
    groups: Sequence[StructureGroup], masks: Masks
) -> tuple[dict[tuple[nn.Module, str], Tensor], list[Tensor]]:
    """Make masks keep or prune whole units.

    Args:
        groups: whose units; of each member ``masks`` has the weight, and the bias if it is masked.
        masks: bool, by module and parameter name, True = kept.

    Returns:
        New masks of the members' weights and biases; which units of each group are kept.
    """
    new: dict[tuple[nn.Module, str], Tensor] = {}
    kept_units = []
    for group in groups:
        keep = torch.zeros(group.count, dtype=torch.bool, device="cpu")
        for member in group.members:
            alive = masks[member.module, member.weight].any(1 - member.dim)
            bias = masks.get((member.module, member.bias))
            if member.dim == 0 and bias is not None:
                alive = alive | bias
            span = slice(member.start, member.start + group.count * group.size)
            keep = keep.to(alive.device) | alive[span].view(group.count, group.size).any(1)
        kept_units.append(keep)
        spread = keep.repeat_interleave(group.size)
        for member in group.members:
            span = slice(member.start, member.start + group.count * group.size)
            key = member.module, member.weight
            mask = new.setdefault(key, torch.ones_like(masks[key]))
            if member.dim == 0:
                mask[span] &= spread[:, None]
            else:
                mask[:, span] &= spread
            key = member.module, member.bias
            if key in masks:
                bias = new.setdefault(key, torch.ones_like(masks[key]))
                if member.dim == 0:
                    bias[span] &= spread
                else:
                    bias &= keep.any()
    return new, kept_units
