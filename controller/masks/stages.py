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
from .weight import SparseWeight, Target


class _Known(NamedTuple):
    """What a rank must know of a weight on another stage; the target is of no module."""

    target: Target
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Place(NamedTuple):
    """Where a weight is on the stage that has it: its module's number, and its name there."""

    module: int
    parameter: str


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
    places: dict[str, tuple[int, _Place]] = {}
    holders: dict[str, list[int]] = {}
    modules = [*dict.fromkeys(target.users[0][0] for target in targets)]
    own = [_Place(modules.index(t.users[0][0]), t.users[0][1]) for t in targets]
    told = [*zip(map(_known_of, targets), own, strict=True)]
    for rank, theirs in enumerate(ranks.gather(told)):
        for found, place in theirs:
            name = found.target.name
            holders.setdefault(name, []).append(rank)
            places.setdefault(name, (rank, place))
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
    _check_copies(here, [name for name, held in holders.items() if len(held) > 1], ranks)
    # weights of one module are so here too
    stand_ins: dict[tuple[int, int], nn.Module] = {}
    targets = []
    for name, found in known.items():
        if name not in here:
            rank, place = places[name]
            module = stand_ins.setdefault((rank, place.module), nn.Module())
            here[name] = _stand_in(found, module, place.parameter, device)
        targets.append(replace(here[name], holders=tuple(holders[name])))
    return targets


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


def _stand_in(known: _Known, module: nn.Module, parameter: str, device: torch.device) -> Target:
    """Return the target of a weight that is on other stages alone; it becomes a parameter of a
    module that has none of it.
    """
    target, shape, dtype = known
    nothing = (*shape[:-1], 0) if target.transposed else (0, *shape[1:])
    empty = torch.empty(nothing, dtype=dtype, device=device)
    module.register_parameter(parameter, nn.Parameter(empty, requires_grad=False))
    return replace(target, users=((module, parameter),), absent_shape=shape)


def parameters_of_all(
    model: nn.Module, weights: Sequence[Any], ignored: Sequence[nn.Parameter]
) -> int:
    """Count the elements of the model's parameters but those ``ignored``; of stages, which must
    all call this, those of all, each name once.
    """
    left_out = {id(parameter) for parameter in ignored}
    named = [(canonical(name), p) for name, p in model.named_parameters()]
    own = {name: p.numel() for name, p in named if id(p) not in left_out}
    if any(weight.on_stage for weight in weights):
        own = dict(pair for theirs in weights[0].ranks.gather(own) for pair in theirs.items())
    return sum(own.values())


def paths_of_all(weights: Sequence[SparseWeight]) -> list[str]:
    """Say of each weight which products skip pruned blocks; of stages, which must all call this,
    as the stage does that has it.
    """
    own = {canonical(weight.name): weight.path for weight in weights if not weight.absent}
    if any(weight.on_stage for weight in weights):
        own = dict(pair for theirs in weights[0].ranks.gather(own) for pair in theirs.items())
    return [own[canonical(weight.name)] for weight in weights]
