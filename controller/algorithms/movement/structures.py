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
    """Rows, or columns, of one weight that belong to the units of a group, in their order."""

    module: nn.Module
    weight: str  # names of parameters
    bias: str
    dim: int  # 0: rows, with the bias's elements; 1: columns
    start: int = 0  # the first of them


@dataclass(frozen=True)
class StructureGroup:
    """The heads of one attention, or the channels of one feed-forward block."""

    name: str  # dotted path of the module that holds them
    kind: str  # "heads" or "channels"
    count: int
    size: int  # rows or columns of each
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
        found = _linears(module, *names)
        if found is None:
            continue
        out = next(filter(None, (_linear(module, name) for name in _OUTPUTS)), None)
        if out is None and path:
            out = _linear(model.get_submodule(path.rpartition(".")[0]), _PARENT_OUTPUT)
        heads, width = _heads(module), found[0].out_features
        # with fewer key than query heads a head is no unit
        alike = all(linear.out_features == width for linear in found)
        if alike and heads and width % heads == 0 and out and out.in_features == width:
            yield StructureGroup(path, "heads", heads, width // heads, _members(*found, out))


def _feed_forward(path: str, module: nn.Module) -> Iterator[StructureGroup]:
    for names, last in _FEED_FORWARDS:
        found = _linears(module, *names, last)
        if found is not None:
            count = found[-1].in_features
            if all(linear.out_features == count for linear in found[:-1]):
                yield StructureGroup(path, "channels", count, 1, _members(*found))


def _members(*linears: nn.Linear) -> tuple[Member, ...]:
    """Return the rows of all but the last, and its columns."""
    last = len(linears) - 1
    return tuple(
        Member(linear, "weight", "bias", int(i == last)) for i, linear in enumerate(linears)
    )


def _linears(module: nn.Module, *paths: str) -> list[nn.Linear] | None:
    """Return all of them, or None."""
    found = [linear for path in paths if (linear := _linear(module, path)) is not None]
    return found if len(found) == len(paths) else None


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
        spans = [slice(m.start, m.start + group.count * group.size) for m in group.members]
        for member, span in zip(group.members, spans, strict=True):
            alive = masks[member.module, member.weight].any(1 - member.dim)
            bias = masks.get((member.module, member.bias))
            if member.dim == 0 and bias is not None:
                alive = alive | bias
            keep = keep.to(alive.device) | alive[span].view(group.count, group.size).any(1)
        kept_units.append(keep)
        spread = keep.repeat_interleave(group.size)
        for member, span in zip(group.members, spans, strict=True):
            own, biases = (member.module, member.weight), (member.module, member.bias)
            for key in (own, biases) if biases in masks else (own,):
                new.setdefault(key, torch.ones_like(masks[key]))
            if member.dim == 0:
                new[own][span] &= spread[:, None]
            else:
                new[own][:, span] &= spread
            if biases in masks:
                part = new[biases][span] if member.dim == 0 else new[biases]
                part &= spread if member.dim == 0 else keep.any()
    return new, kept_units
