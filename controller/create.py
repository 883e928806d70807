"""The entry point: a model and a configuration become a controller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import nn

from ..kernels.dispatch import Dispatch
from ..kernels.launch import Backend
from .base_algo import BaseSparsityAlgoController, SparseModuleInfo
from .config import MagnitudeSparsityConfig, parse_config
from .magnitude import MagnitudeSparsityController
from .modules import SparseModule, densify, sparsify
from .operand import MaskOperand
from .targets import find_targets


def create_controller(
    model: nn.Module,
    config: MagnitudeSparsityConfig | Mapping[str, Any],
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
        config: one of the configuration classes, or NNCF's ``compression`` dictionary.
        backend: ``"auto"`` runs Triton on a GPU and plain torch elsewhere; ``"triton"`` and
            ``"torch"`` are met or refused.
        dispatch: which linears skip pruned blocks of 16 a side and more: ``"auto"``: those that
            are faster for it, judged at each update of the masks by output, input gradient and
            weight gradient; ``"sparse"``: all; ``"dense"``: none.
        batchnorm_data: batches on the model's device, needed when the configuration asks for
            BatchNorm adaptation; see ``adapt_batchnorm``.

    Raises:
        ValueError, TypeError: the configuration or a weight does not fit, see
            ``MagnitudeSparsityConfig`` and ``find_targets``; the model is then as it was.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    config = parse_config(config)
    if dispatch not in get_args(Dispatch):
        raise ValueError(
            f"create_controller: dispatch must be 'auto', 'sparse' or 'dense', got {dispatch!r}"
        )
    if config.batchnorm_adaptation is not None and batchnorm_data is None:
        raise ValueError("create_controller: batchnorm_adaptation needs batchnorm_data, got None")
    targets = find_targets(
        model,
        pattern=config.pattern,
        target_scopes=config.target_scopes,
        ignored_scopes=config.ignored_scopes,
        validate_scopes=config.validate_scopes,
        overrides=config.overrides,
    )
    infos = [
        SparseModuleInfo(
            module_node_name=target.name,
            module=target.users[0][0],
            operand=MaskOperand(
                target.weight,
                target.pattern,
                transposed=target.transposed,
                backend=backend,
                dispatch=dispatch,
            ),
            parameter_name=target.users[0][1],
            minimum_level=target.minimum_level,
            maximum_level=target.maximum_level,
        )
        for target in targets
    ]
    try:
        for target, info in zip(targets, infos, strict=True):
            for module, parameter_name in target.users:
                sparsify(module, {parameter_name: info.operand})
        _cover_readers(model)
        return MagnitudeSparsityController(model, infos, config, batchnorm_data)
    except BaseException:
        for module in list(model.modules()):
            if isinstance(module, SparseModule):
                densify(module)
        raise


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
