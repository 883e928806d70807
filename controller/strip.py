"""Masks become zeros in plain weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..kernels.pattern import NM
from ..kernels.semi_structured import pack_semi_structured
from .api import StripFormat
from .modules import SparseModule, densify


@torch.no_grad()
def strip_masks(model: nn.Module, do_copy: bool, strip_format: StripFormat) -> nn.Module:
    """Return ``model`` with every mask folded into its weight; ``strip_model`` says more.

    NNCF's formats mean the same to a mask: there is no fake quantiser to keep or to decompress.
    """
    if not any(isinstance(module, SparseModule) for module in model.modules()):
        raise ValueError(
            f"strip_model: {type(model).__name__} holds no masks; it is another model, "
            "or stripped already"
        )
    if do_copy:
        model = copy.deepcopy(model)
    sparse = [module for module in model.modules() if isinstance(module, SparseModule)]
    packed: dict[nn.Linear, nn.Parameter] = {}
    if strip_format == StripFormat.SEMI_STRUCTURED:
        packed = _pack(model)
    for module in sparse:
        for name, operand in module.operands.items():
            operand.fold_(getattr(module, name))
    for module in sparse:
        densify(module)
    for module, weight in packed.items():
        module.weight = weight
    return model


def _pack(model: nn.Module) -> dict[nn.Linear, nn.Parameter]:
    """Return the semi-structured weight of every module under 2:4; a tied one is packed once."""
    packed: dict[nn.Linear, nn.Parameter] = {}
    known: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        operands = module.operands if isinstance(module, SparseModule) else {}
        for name, operand in operands.items():
            pattern = operand.pattern
            if not isinstance(pattern, NM) or (pattern.n, pattern.m) != (2, 4):
                continue
            refused = f"strip_model: {path!r} cannot become semi-structured: "
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{refused}it must be a Linear, got {type(module).__name__}")
            # a level below 1/2 leaves some tuples whole
            if (operand.kept_grid().unflatten(1, (-1, 4)).sum(2) > 2).any():
                level = operand.pruned_elements() / operand.groups
                raise ValueError(f"{refused}its level must be at least 0.5, got {level:g}")
            weight = getattr(module, name)
            if id(weight) not in known:
                try:
                    tensor = pack_semi_structured(operand.apply(weight).detach().contiguous())
                except ValueError as error:
                    raise ValueError(f"{refused}{error}") from None
                known[id(weight)] = nn.Parameter(tensor, requires_grad=False)
            packed[module] = known[id(weight)]
    if not packed:
        raise ValueError(
            "strip_model: strip_format 'semi_structured' needs a Linear under NM(2, 4), got none"
        )
    return packed
