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
from .scored import ScoredWeight
from .shards import Shard, is_sharded, local_part, part_of_stage, shard_of
from .targets import Whereabouts
from .weight import SparseWeight, Target


class _Known(NamedTuple):
    """What a rank must know of a weight on another stage; the target is of no module."""

    target: Target
    shape: tuple[int, ...]
    dtype: torch.dtype
    sharded: bool


class _Place(NamedTuple):
    """Where a weight is on the first rank that has it: its module's number, and its name there; of
    which shape that rank's part is.
    """

    module: int
    parameter: str
    shape: tuple[int, ...]


def on_stages(
    targets: Sequence[Target],
    ranks: Ranks,
    device: torch.device,
    everywhere: Sequence[Whereabouts],
) -> list[Target]:
    """Return the targets of all ranks, by rank and then in the order of their modules. Ranks that
    have one of the same name have copies of one weight. All ranks must call this.

    Args:
        targets: of this rank.
        ranks: those of all stages.
        device: for what is sent.
        everywhere: of each rank; those that have the same have one stage.

    Raises:
        ValueError: weights of one name differ; there is none; one is sharded otherwise than masks
            cover.
    """
    known: dict[str, _Known] = {}
    places: dict[str, tuple[int, _Place]] = {}
    holders: dict[str, list[int]] = {}
    modules = [*dict.fromkeys(target.users[0][0] for target in targets)]
    own = [
        _Place(modules.index(module), parameter, tuple(local_part(target.weight).shape))
        for target in targets
        for module, parameter in target.users[:1]
    ]
    told = [*zip(map(_known_of, targets), own, strict=True)]
    for rank, theirs in enumerate(ranks.gather(told)):
        for found, place in theirs:
            name = found.target.name
            holders.setdefault(name, []).append(rank)
            places.setdefault(name, (rank, place))
            if known.setdefault(name, found) != found:
                first, other = (
                    f"{one.target.pattern} of {one.dtype} {one.shape}"
                    f"{', sharded' if one.sharded else ''} on rank {of}"
                    for one, of in ((known[name], holders[name][0]), (found, rank))
                )
                raise ValueError(
                    f"create_controller: {name!r} must be the same weight on every stage that has "
                    f"it, got {first} and {other}"
                )
    if not known:
        raise ValueError("create_controller: no weight to sparsify is left on any stage")
    here = {canonical(target.name): target for target in targets}
    sharded = [name for name, found in known.items() if found.sharded]
    parts = _parts(here, holders, sharded, ranks, device)
    copied = [name for name, held in holders.items() if len(held) > 1]
    _check_copies(here, parts, copied, ranks)
    # weights of one module are so here too
    stand_ins: dict[tuple[int, int], nn.Module] = {}
    alike = [everywhere.index(one) for one in everywhere]  # the first rank of the same stage
    targets = []
    for name, found in known.items():
        if name not in here:
            rank, place = places[name]
            module = stand_ins.setdefault((rank, place.module), nn.Module())
            here[name] = _stand_in(found, module, place, device)
        held = tuple(holders[name])
        stages: dict[int, list[int]] = {}
        for rank in held:
            stages.setdefault(alike[rank], []).append(rank)
        by_stage = tuple(map(tuple, stages.values()))
        own = {"holders": held, "stages": by_stage, "part": parts.get(name)}
        targets.append(replace(here[name], **own))
    return targets


def _parts(
    here: Mapping[str, Target],
    holders: Mapping[str, Sequence[int]],
    sharded: Sequence[str],
    ranks: Ranks,
    device: torch.device,
) -> dict[str, Shard]:
    """Return what is here of the weights whose stages are sharded themselves."""
    if not sharded:
        return {}
    own: dict[str, Shard] = {}
    with ranks.together(device):
        for name in sharded:
            if name in here:
                target = here[name]
                layout = {"transposed": target.transposed, "experts": target.experts}
                options: Any = layout | {"holders": holders[name]}
                found = shard_of(name, target.weight, target.parted_pattern, ranks, **options)
                assert found is not None
                own[name] = found
    return parts_of_all(own, sharded, ranks)


def parts_of_all(own: Mapping[str, Shard], names: Sequence[str], ranks: Ranks) -> dict[str, Shard]:
    """Return what is here of tensors that are sharded on some stages, of which ``own`` has those
    of this one: of the others nothing. All ranks must call this.
    """
    known: dict[str, Shard] = {}
    for rank, theirs in enumerate(ranks.gather(own)):
        for name, shard in theirs.items():
            first = known.setdefault(name, shard)
            if (shard.bounds, shard.edges) != (first.bounds, first.edges):
                raise ValueError(
                    f"create_controller: {name!r} must be sharded alike on every stage that has "
                    f"it, got parts from rows {first.bounds[:-1]} and columns {first.edges[:-1]}, "
                    f"and on rank {rank} from {shard.bounds[:-1]} and {shard.edges[:-1]}"
                )
    return {name: part_of_stage(own.get(name, known[name]), here=name in own) for name in names}


def tell_layouts(weights: Sequence[ScoredWeight]) -> None:
    """Tell stages of a pipeline how the scores lie of weights that are sharded on other stages.
    All ranks must call this.
    """
    parted = [w for w in weights if w.in_parts and w.target.holders]
    if not parted:
        return
    ranks, names = parted[0].ranks, [canonical(weight.name) for weight in parted]
    here = [(n, w) for n, w in zip(names, parted, strict=True) if not w.absent]
    shards = parts_of_all({name: weight.scores_shard for name, weight in here}, names, ranks)
    gathered = ranks.collect({name: weight.is_gathered for name, weight in here})
    for name, weight in zip(names, parted, strict=True):
        weight.take_layout(shards[name], gathered=gathered[name])


def _check_copies(
    here: Mapping[str, Target], parts: Mapping[str, Shard], shared: Sequence[str], ranks: Ranks
) -> None:
    """Refuse weights of one name that hold other numbers, as of stages that each count anew."""
    if not shared:
        return
    prints: dict[tuple[str, str], int] = {}
    for name in shared:
        if name in here:
            part = parts[name].here if name in parts else None
            place = None if part is None else [(at.start, at.stop) for at in part]
            prints[name, str(place)] = int(fingerprint(local_part(here[name].weight)))
    seen: dict[tuple[str, str], int] = {}
    for rank, theirs in enumerate(ranks.gather(prints)):
        for (name, place), found in theirs.items():
            if seen.setdefault((name, place), found) != found:
                raise ValueError(
                    f"create_controller: {name!r} must be the same weight on every stage that has "
                    f"it, got other numbers on rank {rank}; let modules have the names that they "
                    "have in the whole model, and load their weights first"
                )


def _known_of(target: Target) -> _Known:
    weight = target.weight
    of_none = replace(target, name=canonical(target.name), users=())
    return _Known(of_none, tuple(weight.shape), weight.dtype, is_sharded(weight))


def _stand_in(known: _Known, module: nn.Module, place: _Place, device: torch.device) -> Target:
    """Return the target of a weight that is on other stages alone; it becomes a parameter of a
    module that has none of it, of no rows, and as many columns as the first part.
    """
    target, shape, dtype, _ = known
    nothing = (*place.shape[:-1], 0) if target.transposed else (0, *place.shape[1:])
    empty = torch.empty(nothing, dtype=dtype, device=device)
    module.register_parameter(place.parameter, nn.Parameter(empty, requires_grad=False))
    return replace(target, users=((module, place.parameter),), absent_shape=shape)


def parameters_of_all(
    model: nn.Module, weights: Sequence[Any], ignored: Sequence[nn.Parameter]
) -> int:
    """Count the elements of the model's parameters but those ``ignored``; of stages, which must
    all call this, those of all, each name once.
    """
    left_out = {id(parameter) for parameter in ignored}
    named = [(canonical(name), p) for name, p in model.named_parameters()]
    own = {name: p.numel() for name, p in named if id(p) not in left_out}
    if any(weight.target.holders for weight in weights):
        own = weights[0].ranks.collect(own)
    return sum(own.values())


def paths_of_all(weights: Sequence[SparseWeight]) -> list[str]:
    """Say of each weight which products skip pruned blocks; of stages, which must all call this,
    as the stage does that has it.
    """
    own = {canonical(weight.name): weight.path for weight in weights if not weight.absent}
    if any(weight.target.holders for weight in weights):
        own = weights[0].ranks.collect(own)
    return [own[canonical(weight.name)] for weight in weights]
