"""Masks become zeros in plain weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .api import StripFormat
from .modules import SparseModule, densify


@torch.no_grad()
def strip_masks(model: nn.Module, do_copy: bool, strip_format: StripFormat) -> nn.Module:
    """Return ``model`` with every mask folded into its weight; ``strip_model`` says more.

    All formats mean the same to a mask: there is no fake quantiser to keep or to decompress.
    """
    del strip_format
    if not any(isinstance(module, SparseModule) for module in model.modules()):
        raise ValueError(
            f"strip_model: {type(model).__name__} holds no masks; it is another model, "
            "or stripped already"
        )
    if do_copy:
        model = copy.deepcopy(model)
    sparse = [module for module in model.modules() if isinstance(module, SparseModule)]
    for module in sparse:
        for name, operand in module.operands.items():
            operand.fold_(getattr(module, name))
    for module in sparse:
        densify(module)
    return model
