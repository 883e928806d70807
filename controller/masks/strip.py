"""A model without masks: its original classes, and zeros where masks pruned."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.masked_weight import count_leaks
from ...kernels.pattern import NM
from ...kernels.semi_structured import pack_semi_structured
from ..api import StripFormat
from .guard import Guard, drop_remains
from .learned_module import drop_scores, read_plain
from .linear import restore_class
from .names import canonical, match
from .shards import forget_gone, local_part, reshard
from .weight import SparseWeight, drop_foreign

User = tuple[nn.Module, str, SparseWeight]


@torch.no_grad()
def strip_masks(
    model: nn.Module, guards: Sequence[Guard], *, do_copy: bool, strip_format: StripFormat
) -> nn.Module:
    """Return ``model`` with the masks that ``guards`` have folded in; ``strip_model`` says more.

    NNCF's formats mean the same to a mask: there is no fake quantiser to keep or to decompress.
    """
    inside = {id(module) for module in model.modules()}
    users = [user for guard in guards for user in guard.users]
    weights = [weight for guard in guards for weight in guard.weights]
    controlled = all(id(module) in inside for module, _, _ in users)
    if controlled and any(guard.released for guard in guards):
        raise ValueError(
            f"strip_model: {type(model).__name__} holds no masks; it is stripped already"
        )
    places = users if controlled else _places_in(model, guards)
    if strip_format == StripFormat.SEMI_STRUCTURED:
        _check_semi_structured(places)
    if controlled:
        reshard(model)
        drop_foreign(weights, "strip_model")
    if do_copy:
        if any(weight.in_parts for weight in weights):
            raise ValueError(
                "strip_model: do_copy must be False for a sharded model, which cannot be copied, "
                "got True; strip it in place, or read its state dict, whose zeros are those of "
                "the masks"
            )
        memo: dict[int, Any] = {}
        model = copy.deepcopy(model, memo)
        places = [(memo[id(module)], name, weight) for module, name, weight in places]
    elif controlled:
        for guard in guards:
            guard.release()
        for module in dict.fromkeys(module for module, _, _ in users):
            restore_class(module)
            read_plain(module)
        forget_gone(model)
        for weight in weights:
            weight.values = None
    drop_remains(model)
    # the weights of a model that is no longer guarded, or never was
    _fold(places, warn=not controlled)
    if strip_format == StripFormat.SEMI_STRUCTURED:
        _pack(places)
    return model


def _places_in(model: nn.Module, guards: Sequence[Guard]) -> list[User]:
    """Find the masked weights in a model that is not the controlled one."""
    names = {
        user: f"{guard.paths[id(user[0])]}.{user[1]}".lstrip(".")
        for guard in guards
        for user in guard.users
    }
    there = {
        canonical(f"{path}.{name}" if path else name): (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._parameters
    }
    found = match(names.values(), there)
    if found is None:
        missing = [user[2].name for user, n in names.items() if canonical(n) not in there][:3]
        raise ValueError(
            f"strip_model: model must be the controlled model, a copy of it or a wrapper, got a "
            f"{type(model).__name__} without {', '.join(map(repr, missing)) or 'one such part'}; "
            "strip a model before it is quantised or rebuilt"
        )
    places = []
    for user, name in names.items():
        module, parameter_name = there[found[name]]
        parameter = module._parameters[parameter_name]
        if parameter is None or parameter.shape != user[2].weight_shape:
            raise ValueError(
                f"strip_model: {name!r} must have the shape {tuple(user[2].weight_shape)} of its "
                f"mask, got {None if parameter is None else tuple(parameter.shape)}"
            )
        places.append((module, parameter_name, user[2]))
    return places


def _fold(places: Sequence[User], *, warn: bool) -> None:
    changed: dict[str, int] = {}
    for module, name, weight in places:
        weight.settle()
        parameter: Tensor = module._parameters[name]  # pyright: ignore[reportAssignmentType]
        drop_scores(module, name)
        if weight.all_kept:
            continue
        matrix = weight.matrix(parameter)
        if warn and weight.holds_zeros:
            mask = weight.mask.to(matrix.device)
            pattern = weight.kind.pattern
            count = int(count_leaks([matrix], [mask], pattern, backend=weight.backend))
            if count:
                changed[weight.name] = count
        kept = weight.like_weight(weight.kept_elements())
        local_part(parameter).masked_fill_(~kept.to(parameter.device), 0)
    if changed:
        warnings.warn(
            f"strip_model: the model's zeros are not those of the controller's masks; "
            f"{sum(changed.values())} elements became zero, in {', '.join(map(repr, changed))}",
            stacklevel=4,
        )


def _is_2_4(weight: SparseWeight) -> bool:
    return isinstance(weight.pattern, NM) and (weight.pattern.n, weight.pattern.m) == (2, 4)


def _packed(module: nn.Module, name: str) -> Tensor:
    return pack_semi_structured(getattr(module, name).detach().contiguous())


def _check_semi_structured(places: Sequence[User]) -> None:
    """Refuse what cannot be packed before anything is changed."""
    places = [place for place in places if _is_2_4(place[2])]
    for module, name, weight in places:
        refused = f"strip_model: {weight.name!r} cannot become semi-structured: "
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{refused}it must be a Linear, got {type(module).__name__}")
        # a level below 1/2 leaves some tuples whole
        if (weight.kept_grid().unflatten(1, (-1, 4)).sum(2) > 2).any():
            level = weight.pruned_elements() / weight.groups
            raise ValueError(f"{refused}its level must be at least 0.5, got {level:g}")
        try:
            _packed(module, name)
        except ValueError as error:
            raise ValueError(f"{refused}{error}") from None
    if not places:
        raise ValueError(
            "strip_model: strip_format 'semi_structured' needs a Linear under NM(2, 4), got none"
        )


def _pack(places: Sequence[User]) -> None:
    """Make the weights under 2:4 semi-structured; a tied one is packed once."""
    known: dict[SparseWeight, nn.Parameter] = {}
    for module, name, weight in places:
        if _is_2_4(weight):
            if weight not in known:
                known[weight] = nn.Parameter(_packed(module, name), requires_grad=False)
            setattr(module, name, known[weight])
