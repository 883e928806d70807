"""Masks as plain state: packed, one bit a group, and checked before anything takes them over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.mask import pack, unpack

if TYPE_CHECKING:
    from .base_algo import SparseModuleInfo


def masks_state(infos: Sequence[SparseModuleInfo]) -> dict[str, dict[str, Any]]:
    """Return shape, pattern and packed mask of each weight by name; tensors on the CPU."""
    return {
        info.module_node_name: {
            "shape": list(info.operand.weight_shape),
            "pattern": str(info.operand.pattern),
            "mask": pack(info.operand.kept_grid()).cpu(),
        }
        for info in infos
    }


def read_masks(
    weights: Mapping[str, Mapping[str, Any]], infos: Sequence[SparseModuleInfo]
) -> list[Tensor]:
    """Return ``masks_state``'s masks as bool grids of one element a group, on the weights' device.

    Raises:
        ValueError: the state is of another model or pattern, or damaged.
    """
    names = [info.module_node_name for info in infos]
    if set(weights) != set(names):
        raise ValueError(
            "load_state: state is of another model; "
            f"without a mask there: {sorted(set(names) - set(weights))}, "
            f"unknown here: {sorted(set(weights) - set(names))}"
        )
    grids = []
    for info in infos:
        name, operand = info.module_node_name, info.operand
        saved = weights[name]
        for key, here in (
            ("shape", list(operand.weight_shape)),
            ("pattern", str(operand.pattern)),
        ):
            if saved.get(key) != here:
                raise ValueError(
                    f"load_state: {key} of {name!r} must be {here}, got {saved.get(key)}"
                )
        down, across = operand.grid
        mask, shape = saved.get("mask"), (down, -(-across // 8))
        if not isinstance(mask, Tensor) or mask.dtype != torch.uint8 or mask.shape != shape:
            raise ValueError(f"load_state: mask of {name!r} must be packed bits, uint8 {shape}")
        grids.append(unpack(mask.to(operand.mask.device), across))
        if not operand.fits(grids[-1]):
            raise ValueError(
                f"load_state: mask of {name!r} must be {operand.pattern}, got another"
            )
    return grids
