"""The entry point: a model and a configuration become a controller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..kernels.launch import Backend
from .base_algo import BaseSparsityAlgoController, SparseModuleInfo
from .magnitude import MagnitudeSparsityConfig, MagnitudeSparsityController
from .modules import SparseModule, densify, sparsify
from .movement import (
    MovementSparsityConfig,
    MovementSparsityController,
    movement_operands,
    movement_targets,
)
from .nncf_config import Config, ConfigLike, parse_config
from .operand import MaskOperand
from .rb import RBSparsityConfig, RBSparsityController, logit_operands
from .targets import Target, find_targets


def create_controller(
    model: nn.Module,
    config: ConfigLike,
    *,
    backend: Backend = "auto",
    batchnorm_data: Iterable[Any] | None = None,
) -> BaseSparsityAlgoController:
    """Put ``model`` under sparse masks, in place, and return what controls them.

    Every parameter object and state-dict key stays; target modules become subclasses of their
    classes. An optimiser may be made before or after.

    Args:
        model: any module with floating-point weights on one device.
        config: one of the configuration classes, or NNCF's ``compression`` dictionary.
        backend: ``"auto"`` runs Triton on a GPU and plain torch elsewhere; ``"triton"`` and
            ``"torch"`` are met or refused.
        batchnorm_data: batches on the model's device, needed when the configuration asks for
            BatchNorm adaptation; see ``adapt_batchnorm``.

    Raises:
        ValueError, TypeError: the configuration or a weight does not fit, see the configuration's
            class and ``find_targets``; the model is then as it was.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    configs = parse_config(config)
    if any(one.batchnorm_adaptation for one in configs) and batchnorm_data is None:
        raise ValueError("create_controller: batchnorm_adaptation needs batchnorm_data, got None")
    if len(configs) > 1:
        raise ValueError(f"create_controller: one algorithm can be given, got {len(configs)}")
    (config,) = configs
    targets = find_targets(
        model,
        pattern=config.pattern,
        target_scopes=config.target_scopes,
        ignored_scopes=config.ignored_scopes,
        validate_scopes=config.validate_scopes,
        overrides=config.overrides,
    )
    if isinstance(config, MovementSparsityConfig):
        targets = movement_targets(targets)
    operands = _operands(model, targets, config, backend)
    infos = [_info(target, operand) for target, operand in zip(targets, operands, strict=True)]
    try:
        for target, info in zip(targets, infos, strict=True):
            for module, parameter_name in target.users:
                sparsify(module, {parameter_name: info.operand})
        _cover_readers(model)
        return _controller(model, infos, config, batchnorm_data)
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


def _operands(
    model: nn.Module, targets: Sequence[Target], config: Config, backend: Backend
) -> Sequence[MaskOperand]:
    """Return a mask for each target, of the kind that the algorithm needs."""
    match config:
        case RBSparsityConfig():
            return logit_operands(targets, config, backend)
        case MovementSparsityConfig():
            return movement_operands(model, targets, config, backend)
        case _:
            return [
                MaskOperand(t.weight, t.pattern, transposed=t.transposed, backend=backend)
                for t in targets
            ]


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
