"""The entry point: a model and a configuration become a controller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, get_args

from torch import nn

from ..kernels.dispatch import Dispatch
from ..kernels.launch import Backend
from ..kernels.pattern import Unstructured
from .base_algo import BaseSparsityAlgoController, SparseModuleInfo
from .composite import CompositeController
from .const import ConstSparsityConfig, ConstSparsityController
from .importance import movement_operands, movement_targets
from .logits import logit_operands
from .magnitude import MagnitudeSparsityConfig, MagnitudeSparsityController
from .modules import SparseModule, densify, sparsify
from .movement import MovementSparsityConfig, MovementSparsityController
from .nncf_config import Config, ConfigLike, parse_config
from .operand import MaskOperand
from .rb import RBSparsityConfig, RBSparsityController
from .regrowth import SETConfig, SETController
from .rigl import RigLConfig, RigLController
from .targets import Target, find_targets


def create_controller(
    model: nn.Module,
    config: ConfigLike,
    *,
    backend: Backend = "auto",
    dispatch: Dispatch = "auto",
    batchnorm_data: Iterable[Any] | None = None,
) -> BaseSparsityAlgoController:
    """Put ``model`` under sparse masks, in place, and return what controls them.

    Every parameter object and state-dict key stays; target modules become subclasses of their
    classes. An optimiser may be made before or after.

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

    Raises:
        ValueError, TypeError: the configuration or a weight does not fit, see the configuration's
            class and ``find_targets``; the model is then as it was.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    configs = parse_config(config)
    if dispatch not in get_args(Dispatch):
        raise ValueError(
            f"create_controller: dispatch must be 'auto', 'sparse' or 'dense', got {dispatch!r}"
        )
    if any(one.batchnorm_adaptation for one in configs) and batchnorm_data is None:
        raise ValueError("create_controller: batchnorm_adaptation needs batchnorm_data, got None")
    targets = []
    for one in configs:
        found = find_targets(
            model,
            # movement has structures of any size, on linear layers alone, and checks them itself
            pattern=Unstructured() if isinstance(one, MovementSparsityConfig) else one.pattern,
            target_scopes=one.target_scopes,
            ignored_scopes=one.ignored_scopes,
            validate_scopes=one.validate_scopes,
            overrides=one.overrides,
        )
        targets.append(
            movement_targets(found) if isinstance(one, MovementSparsityConfig) else found
        )
    _check_disjoint(targets, configs)
    infos = [
        _infos(model, found, one, backend, dispatch)
        for found, one in zip(targets, configs, strict=True)
    ]
    try:
        for target, info in zip(chain(*targets), chain(*infos), strict=True):
            for module, parameter_name in target.users:
                sparsify(module, {parameter_name: info.operand})
        _cover_readers(model)
        controllers = []
        for one, members in zip(configs, infos, strict=True):
            controllers.append(_controller(model, members, one, batchnorm_data))
        return controllers[0] if len(configs) == 1 else CompositeController(model, controllers)
    except BaseException:
        for module in list(model.modules()):
            if isinstance(module, SparseModule):
                densify(module)
        raise


def _controller(
    model: nn.Module,
    infos: list[SparseModuleInfo],
    config: Config,
    batchnorm_data: Iterable[Any] | None,
) -> BaseSparsityAlgoController:
    """Return the algorithm that a configuration is of."""
    match config:
        case MagnitudeSparsityConfig():
            return MagnitudeSparsityController(model, infos, config, batchnorm_data)
        case RBSparsityConfig():
            return RBSparsityController(model, infos, config, batchnorm_data)
        case MovementSparsityConfig():
            return MovementSparsityController(model, infos, config, batchnorm_data)
        case ConstSparsityConfig():
            return ConstSparsityController(model, infos, config, batchnorm_data)
        case SETConfig():
            return SETController(model, infos, config, batchnorm_data)
        case RigLConfig():
            return RigLController(model, infos, config, batchnorm_data)


def _check_disjoint(targets: Sequence[Sequence[Target]], configs: Sequence[Config]) -> None:
    """Refuse a weight that two algorithms would mask."""
    takers: dict[int, str] = {}
    for place, (found, config) in enumerate(zip(targets, configs, strict=True)):
        for target in found:
            taker = f"{config.algorithm} (number {place + 1})"
            if (other := takers.setdefault(id(target.weight), taker)) != taker:
                raise ValueError(
                    f"create_controller: {target.name!r} must be masked by one algorithm, got "
                    f"{other} and {taker}; part their weights by target_scopes and ignored_scopes"
                )


def _infos(
    model: nn.Module,
    targets: Sequence[Target],
    config: Config,
    backend: Backend,
    dispatch: Dispatch,
) -> list[SparseModuleInfo]:
    """Give each target a mask, of the kind that the algorithm needs."""
    match config:
        case RBSparsityConfig():
            operands = logit_operands(targets, config, backend, dispatch)
        case MovementSparsityConfig():
            operands = movement_operands(model, targets, config, backend, dispatch)
        case _:
            operands = [
                MaskOperand(
                    target.weight,
                    target.pattern,
                    transposed=target.transposed,
                    backend=backend,
                    dispatch=dispatch,
                )
                for target in targets
            ]
    return [_info(target, operand) for target, operand in zip(targets, operands, strict=True)]


def _info(target: Target, operand: MaskOperand) -> SparseModuleInfo:
    return SparseModuleInfo(
        module_node_name=target.name,
        module=target.users[0][0],
        operand=operand,
        parameter_name=target.users[0][1],
        minimum_level=target.minimum_level,
        maximum_level=target.maximum_level,
    )


def _cover_readers(model: nn.Module) -> None:
    """Make the modules sparse that read a child's weight without calling the child."""
    for module in list(model.modules()):
        attends = isinstance(module, nn.MultiheadAttention)
        if attends and isinstance(module.out_proj, SparseModule):
            sparsify(module, {})
    for module in list(model.modules()):
        fuses = isinstance(module, nn.TransformerEncoderLayer)
        if fuses and any(isinstance(child, SparseModule) for child in module.modules()):
            sparsify(module, {})
