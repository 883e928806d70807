"""Stages of a pipeline: weights that are on some ranks and not on others, pruned as one pool.

Of a weight on another stage a rank has a stand-in of no rows. To what cuts a pool a weight is then
a shard, of all rows or of none, and all ranks have the same weights in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .names import canonical
from .ranks import Ranks, fingerprint
from .shards import is_sharded
from .weight import Target


class _Known(NamedTuple):
    """What a rank must know of a weight on another stage; the target is of no module."""

    target: Target
    shape: tuple[int, ...]
    dtype: torch.dtype


def on_stages(targets: Sequence[Target], ranks: Ranks, device: torch.device) -> list[Target]:
    """Return the targets of all ranks, by rank and then in the order of their modules. Ranks that
    have one of the same name have copies of one weight. All ranks must call this.

    Raises:
        ValueError: weights of one name differ; a weight is a DTensor; there is none.
    """
    with ranks.together(device):
        for target in targets:
            if is_sharded(target.weight):
                raise ValueError(
                    f"create_controller: {target.name!r} must be whole on its stage with "
                    "stages=True, got a DTensor; give each stage a process_group, for pools of "
                    "their own"
                )
    known: dict[str, _Known] = {}
    holders: dict[str, list[int]] = {}
    for rank, theirs in enumerate(ranks.gather([*map(_known_of, targets)])):
        for found in theirs:
            name = found.target.name
            holders.setdefault(name, []).append(rank)
            if known.setdefault(name, found) != found:
                first, other = (
                    f"{one.target.pattern} of {one.dtype} {one.shape} on rank {of}"
                    for one, of in ((known[name], holders[name][0]), (found, rank))
                )
                raise ValueError(
                    f"create_controller: {name!r} must be the same weight on every stage that has "
                    f"it, got {first} and {other}"
                )
    if not known:
        raise ValueError("create_controller: no weight to sparsify is left on any stage")
    here = {canonical(target.name): target for target in targets}
    _check_copies(here, [name for name, own in holders.items() if len(own) > 1], ranks)
    return [
        replace(
            here[name] if name in here else _stand_in(found, device), holders=tuple(holders[name])
        )
        for name, found in known.items()
    ]


def _check_copies(here: Mapping[str, Target], shared: Sequence[str], ranks: Ranks) -> None:
    """Refuse weights of one name that hold other numbers, as of stages that each count anew."""
    if not shared:
        return
    prints = {name: int(fingerprint(here[name].weight)) for name in shared if name in here}
    seen: dict[str, int] = {}
    for rank, theirs in enumerate(ranks.gather(prints)):
        for name, found in theirs.items():
            if seen.setdefault(name, found) != found:
                raise ValueError(
                    f"create_controller: {name!r} must be the same weight on every stage that has "
                    f"it, got other numbers on rank {rank}; let modules have the names that they "
                    "have in the whole model, and load their weights first"
                )


def _known_of(target: Target) -> _Known:
    weight = target.weight
    of_none = replace(target, name=canonical(target.name), users=())
    return _Known(of_none, tuple(weight.shape), weight.dtype)


def _stand_in(known: _Known, device: torch.device) -> Target:
    """Return the target of a weight that is on other stages alone."""
    target, shape, dtype = known
    nothing = (*shape[:-1], 0) if target.transposed else (0, *shape[1:])
    module = nn.Module()
    empty = torch.empty(nothing, dtype=dtype, device=device)
    module.weight = nn.Parameter(empty, requires_grad=False)
    return replace(target, users=((module, "weight"),), absent_shape=shape)


def parameters_of_all(model: nn.Module, weights: Sequence[Any]) -> int:
    """Count the elements of the model's parameters; of stages, which must all call this, those of
    all, each name once.
    """
    own = {canonical(name): parameter.numel() for name, parameter in model.named_parameters()}
    if any(weight.shard is not None and weight.shard.on_stages for weight in weights):
        own = dict(pair for theirs in weights[0].ranks.gather(own) for pair in theirs.items())
    return sum(own.values())
