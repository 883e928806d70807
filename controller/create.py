"""The entry point: a model and a configuration become a controller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..kernels.dispatch import Dispatch, check_dispatch
from ..kernels.launch import Backend
from .algorithms.base import BaseSparsityAlgoController
from .algorithms.composite import CompositeController
from .algorithms.table import algorithm_of
from .config.algorithm import AlgorithmConfig
from .masks.guard import guards_of
from .masks.learned import check_shards
from .masks.learned_module import read_plain
from .masks.linear import restore_class
from .masks.names import canonical, match
from .masks.ranks import Ranks, known_group
from .masks.shards import forget_gone, is_sharded, reshard
from .masks.stages import on_stages
from .masks.state import names_in
from .masks.targets import Whereabouts, weights_of
from .masks.weight import SparseModuleInfo, Target, restore_
from .nncf import ConfigLike, parse_config
from .selection.criteria import check_sharded
from .selection.scorer import needs


def create_controller(
    model: nn.Module,
    config: ConfigLike,
    *,
    backend: Backend = "auto",
    dispatch: Dispatch = "auto",
    batchnorm_data: Iterable[Any] | None = None,
    state: Mapping[str, Any] | None = None,
    process_group: Any = None,
    stages: bool = False,
) -> BaseSparsityAlgoController:
    """Put ``model`` under sparse masks, in place, and return what controls them.

    The weights are zero where the masks prune, from now on and whatever trains or loads them.
    Every parameter object and state-dict key stays. Linear layers that have blocks to skip become
    subclasses of their classes, and modules whose masks are learned; all others keep class and
    forward. An optimiser may be made before or after.

    Args:
        model: any module with floating-point weights on one device.
        config: one of the configuration classes, NNCF's ``compression`` dictionary, or a list of
            these, whose weights must be disjoint; that makes a ``CompositeController``.
        backend: ``"auto"`` runs Triton on a GPU and plain torch elsewhere; ``"triton"`` and
            ``"torch"`` are met or refused.
        dispatch: which linears skip pruned blocks of 16 a side and more: ``"auto"``: those that
            are faster for it, judged at each update of the masks by output, input gradient and
            weight gradient; ``"sparse"``: all; ``"dense"``: none.
        batchnorm_data: batches on the model's device, needed when the configuration asks for
            BatchNorm adaptation; see ``adapt_batchnorm``.
        state: what ``get_state()`` of such a controller returned, to be loaded. Its weights are
            then the targets: of a model whose own state is loaded already another one may be zero
            throughout than at the start, which would leave it out.
        process_group: the ranks that train this model; None: torch.distributed's default group,
            where it is initialised. All of them must call this, and every method that changes
            masks, alike; their first masks are those of the group's first rank.
        stages: the ranks have stages of a pipeline, each its own weights, under the names that
            they have in the whole model: these are one pool, by rank and then in module order. A
            weight that several ranks have is one. ``sparsified_module_info`` has those of other
            stages too, of no rows here. Stages may be sharded themselves, before this.

    Raises:
        ValueError, TypeError: the configuration, a weight or the state does not fit, see the
            configuration's class, ``find_targets`` and ``load_state``; the model's modules are
            then as they were. What one rank refuses, all do; so they do where their models or
            configurations differ.
        RuntimeError: ``backend="triton"`` where Triton cannot run; ``process_group`` without an
            initialised torch.distributed.
    """
    ranks = Ranks(known_group("create_controller", process_group))
    reshard(model)  # an evaluation may have left weights gathered
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), _CPU)
    with ranks.together(device):
        configs = parse_config(config)
        try:
            check_dispatch(dispatch)
        except ValueError as error:
            raise ValueError(f"create_controller: {error}") from None
        if any(one.batchnorm_adaptation for one in configs) and batchnorm_data is None:
            raise ValueError(
                "create_controller: batchnorm_adaptation needs batchnorm_data, got None"
            )
    stages = stages and ranks.size > 1
    if ranks.size > 1:
        told = {"stages": stages, "dispatch": dispatch, "backend": backend}
        told |= {"whether there is a state": state is not None}
        ranks.check_alike("create_controller", told | _told(model, configs, stages=stages))
    every, elsewhere = [], None
    if stages:
        every = ranks.gather(Whereabouts.of(model))
        elsewhere = Whereabouts(*([*chain(*lists)] for lists in zip(*every, strict=True)))
    with ranks.together(device):
        classes: list[Any] = [algorithm_of(one).controller for one in configs]
        searched = configs if state is None or stages else _of_state(model, configs, state)
        targets = [
            cls.find_targets(model, one, elsewhere)
            for cls, one in zip(classes, searched, strict=True)
        ]
        _check_disjoint(targets, configs)
        _check_covered(model, configs, targets)
    if stages:
        targets = [on_stages(found, ranks, device, every) for found in targets]
        _check_parts(configs, targets)
    with ranks.together(device):
        options = {"backend": backend, "dispatch": dispatch, "ranks": ranks}
        weights = [
            cls.make_weights(model, found, one, **options)
            for cls, found, one in zip(classes, targets, configs, strict=True)
        ]
        for members, one in zip(weights, configs, strict=True):
            importance = getattr(one, "weight_importance", None)
            check_sharded(members, importance, getattr(one, "distribution", None))
    found = [f"{canonical(w.name)} {w.pattern}" for members in weights for w in members]
    ranks.check_alike("create_controller", {"the masked weights": found})
    infos = [[SparseModuleInfo(w.name, w.module, w) for w in members] for members in weights]
    try:
        controllers = [
            cls(model, members, one, batchnorm_data)
            for cls, members, one in zip(classes, infos, configs, strict=True)
        ]
        whole = controllers[0] if len(configs) == 1 else CompositeController(model, controllers)
        if state is not None:
            whole.load_state(state)
    except BaseException:
        halfway = [info for members in infos for info in members]
        restore_([info.operand for info in halfway])
        for module, name in (place for info in halfway for place in info.places):
            for guard in guards_of(module, name):
                guard.release()
            restore_class(module)
            read_plain(module)
        forget_gone(model)
        raise
    return whole


_CPU = torch.device("cpu")


def _told(model: nn.Module, configs: Sequence[AlgorithmConfig], *, stages: bool) -> dict[str, Any]:
    """Return what must be the same on every rank of configurations and model."""
    told = {"config": [repr(one) for one in configs]}
    if stages:
        return told
    # of how a DTensor lies: a rank that has a plain tensor would wait for the others for ever
    return told | {
        "the model's parameters": [
            f"{canonical(name)} {tuple(p.shape)} {p.dtype} {getattr(p, 'placements', '')}".strip()
            for name, p in model.named_parameters()
        ]
    }


def _check_parts(configs: Sequence[AlgorithmConfig], targets: Sequence[Sequence[Target]]) -> None:
    """Refuse what does not go with stages of a pipeline that are sharded themselves."""
    for config, found in zip(configs, targets, strict=True):
        algorithm = algorithm_of(config)
        importance: Any = getattr(config, "weight_importance", "abs")
        by_function = not isinstance(importance, str) and "gradients" in needs(importance)
        for target in found:
            part = target.part
            if part is None:
                continue
            if algorithm.name == "rigl" and len(target.stages) > 1:
                refused = "rigl with a weight that several stages have"
            elif importance == "fisher" and part.straddles:
                refused = "weight_importance='fisher' with blocks that lie on two ranks"
            elif by_function and part.leaves_out:
                refused = "a function of gradients with a shard of no rows"
            else:
                continue
            raise ValueError(
                "create_controller: stages=True with stages that are sharded themselves must not "
                f"be of {refused}, got that for {target.name!r}; give each stage a process_group, "
                "for pools of their own"
            )


def _check_covered(
    model: nn.Module, configs: Sequence[AlgorithmConfig], targets: Sequence[Sequence[Target]]
) -> None:
    """Refuse what wrappers and shards do not go with."""
    for config, found in zip(configs, targets, strict=True):
        algorithm = algorithm_of(config)
        sharded = [target for target in found if is_sharded(target.weight)]
        if algorithm.controller.learns:
            check_shards(model, sharded)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        for found in map(algorithm_of, configs):
            if found.controller.learns:
                raise ValueError(
                    f"create_controller: model must not be wrapped for {found.name}, whose "
                    "scores DistributedDataParallel must know to reduce their gradients; create "
                    "the controller first, then wrap the model"
                )


def _of_state(
    model: nn.Module, configs: Sequence[AlgorithmConfig], state: Mapping[str, Any]
) -> list[AlgorithmConfig]:
    """Return configurations that select the weights of ``state``, one an algorithm, where the
    model has them; ``load_state`` will refuse any other state.
    """
    here = [name for candidate in weights_of(model) for name in candidate.names]
    saved = [names_in(part) for part in state.values()] if isinstance(state, Mapping) else []
    if len(saved) != len(configs):
        return list(configs)
    found = [match(names, here) if names else None for names in saved]
    everywhere = {"ignored_scopes": (), "targets": None}
    return [
        one
        if names is None
        else one.model_copy(update={"target_scopes": tuple(names.values()), **everywhere})
        for one, names in zip(configs, found, strict=True)
    ]


def _check_disjoint(
    targets: Sequence[Sequence[Target]], configs: Sequence[AlgorithmConfig]
) -> None:
    """Refuse a weight that two algorithms would mask."""
    takers: dict[int, str] = {}
    for place, (found, config) in enumerate(zip(targets, configs, strict=True)):
        for target in found:
            taker = f"{algorithm_of(config).name} (number {place + 1})"
            if (other := takers.setdefault(id(target.weight), taker)) != taker:
                raise ValueError(
                    f"create_controller: {target.name!r} must be masked by one algorithm, got "
                    f"{other} and {taker}; part their weights by target_scopes and ignored_scopes"
                )
